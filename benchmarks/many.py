"""What many domains cost the host process that keeps them while nothing happens: prints a table.

    .venv/bin/python benchmarks/many.py [--domains N] [--seconds S] [--quick] [--docs]

Each domain is a real QEMU with one disk that stands still before its guest's first instruction (-S, 8 MiB): QEMU's storage
daemon is lighter, and lacks `query-status` and `query-block`, without which nothing is a domain. Whoever is measured is
`blockferry serve`, as a service would run it; this process is a client, which asks over its socket.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import report
from figures import grid, markdown
from storage import DISK_FOLDER, room

import blockferry
from blockferry.testing import QemuBinaries, TestQemu, blockdev_disk, find_qemu, make_image

BEGIN = "<!-- figures: benchmarks/many.py --docs -->"
DISK_BYTES = 64 * 1024 * 1024
MEMORY_MIB = 8
# So many QEMUs are started, or asked for, at once.
AT_ONCE = 4
ROUNDS = 5
# What was asked for last is over by then.
SETTLE_SECONDS = 1.0
READY_SECONDS = 30.0
TARGET = 0.1  # per cent of a core for a hundred idle domains


class Used:
    """What a process has used so far.

    Args:
        pid: its number.
    """

    def __init__(self, pid: int) -> None:
        # In nanoseconds, where /proc/PID/stat counts hundredths of a second.
        threads = [each.read_text().split() for each in Path(f"/proc/{pid}/task").glob("*/schedstat")]
        self.seconds = sum(int(words[0]) for words in threads) / 1e9
        memory = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
        self.kib = int(memory[memory.index("Pss:") + 1])
        self.descriptors = len(os.listdir(f"/proc/{pid}/fd"))


@contextlib.asynccontextmanager
async def guests(binaries: QemuBinaries, folder: Path, count: int) -> AsyncIterator[list[TestQemu]]:
    """So many QEMUs, each with a disk."""
    image = make_image(binaries, folder / "base.qcow2", "qcow2", DISK_BYTES)
    started: list[TestQemu] = []
    turns = asyncio.Semaphore(AT_ONCE)

    async def start(number: int) -> None:
        async with turns:
            home = folder / str(number)
            home.mkdir()
            disk = make_image(binaries, home / "disk.qcow2", "qcow2", backing=image, backing_fmt="qcow2")
            qemu = TestQemu(binaries, home, args=blockdev_disk("d0", disk, "qcow2"), memory_mib=MEMORY_MIB)
            started.append(qemu)
            await qemu.start()

    try:
        await asyncio.gather(*(start(number) for number in range(count)))
        yield started
    finally:
        await asyncio.gather(*(qemu.kill() for qemu in started))


@contextlib.contextmanager
def serving(state: Path) -> Iterator[int]:
    """The host process of a state directory; its number."""
    command = str(Path(sys.executable).parent / "blockferry")
    with (state.parent / "serve.log").open("wb") as log:
        process = subprocess.Popen([command, "--state-dir", str(state), "serve"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not (state / "run/api.sock").exists():
            assert process.poll() is None, log.name
            assert time.monotonic() < deadline, log.name
            time.sleep(0.05)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(READY_SECONDS)


async def measure(binaries: QemuBinaries, folder: Path, count: int, seconds: float) -> list[tuple[str, ...]]:
    """The rows of the table."""
    state = folder / "state"
    async with guests(binaries, folder, count) as qemus:
        with serving(state) as pid:
            async with blockferry.connect(state) as ferry:
                await ferry.list()
                empty = Used(pid)
                alone = await _idle(pid, seconds)
                attached = time.perf_counter()
                await _each([ferry.attach(f"vm{number}", qemu.qmp) for number, qemu in enumerate(qemus)])
                attached = time.perf_counter() - attached
                looks = [await _observe_all(ferry, count) for _round in range(ROUNDS)]
                core = await _idle(pid, seconds)
                after = Used(pid)
        with serving(state) as again:
            started = time.perf_counter()
            async with blockferry.connect(state) as ferry:
                await _observe_all(ferry, count)
            started = time.perf_counter() - started
            assert again != pid
    per_hundred = core * 100 / count
    kept = "yes" if per_hundred <= TARGET else "no"
    look = f"{statistics.median(looks):.2f} s ({min(looks):.2f} to {max(looks):.2f})"
    return [
        (f"{count} domains, one host process", "figure", "target", "kept"),
        ("CPU while nothing happens, of a core, per 100 domains", f"{per_hundred:.3f} %", f"at most {TARGET} %", kept),
        ("CPU while nothing happens, of a core, with none and with all", f"{alone:.3f} and {core:.3f} %", "-", "-"),
        ("memory per domain (PSS)", f"{(after.kib - empty.kib) / count:.0f} KiB", "-", "-"),
        ("memory of the process with none, and with all", f"{empty.kib // 1024} and {after.kib // 1024} MiB", "-", "-"),
        ("descriptors per domain", f"{(after.descriptors - empty.descriptors) / count:.1f}", "-", "-"),
        (f"attach all, {AT_ONCE} at once", f"{attached:.2f} s", "-", "-"),
        (f"observe all, {AT_ONCE} at once: graph, disks, jobs", look, "-", "-"),
        ("observe all by a process that has just been started", f"{started:.2f} s", "-", "-"),
    ]


async def _observe_all(ferry: blockferry.Ferry, count: int) -> float:
    """Ask for every domain, which asks its QEMU for everything; seconds."""
    began = time.perf_counter()
    await _each([ferry.domain(f"vm{number}") for number in range(count)])
    return time.perf_counter() - began


async def _idle(pid: int, seconds: float) -> float:
    """What a process uses while nothing is asked, in per cent of a core."""
    await asyncio.sleep(SETTLE_SECONDS)
    before, began = Used(pid), time.perf_counter()
    await asyncio.sleep(seconds)
    return 100 * (Used(pid).seconds - before.seconds) / (time.perf_counter() - began)


async def _each(work: Sequence[Coroutine[Any, Any, Any]]) -> None:
    """Some at once, until all are done."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(each: Coroutine[Any, Any, Any]) -> None:
        async with turns:
            await each

    await asyncio.gather(*map(one, work))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--domains", type=int, help="how many (500); each takes 16 MiB of memory")
    parser.add_argument("--seconds", type=float, help="how long nothing happens (30)")
    parser.add_argument("--quick", action="store_true", help="to try it: 20 domains, 5 seconds")
    parser.add_argument("--folder", default=DISK_FOLDER, help=f"where images and sockets are made ({DISK_FOLDER})")
    parser.add_argument("--docs", action="store_true", help="write the figures into docs/ too")
    given = parser.parse_args()
    given.domains = given.domains or (20 if given.quick else 500)
    given.seconds = given.seconds or (5.0 if given.quick else 30.0)
    return given


async def _run(given: argparse.Namespace) -> None:
    _least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    binaries = find_qemu("distribution")
    begun = os.getloadavg()
    with room(given.folder) as folder:
        about = report.machine(folder, binaries, {"blockferry": blockferry.__version__})
        table = await measure(binaries, folder, given.domains, given.seconds)
    about["load"] = report.load(begun, os.getloadavg())
    print(grid(table))
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    if given.docs:
        report.put(BEGIN, [markdown(table), report.measured_on(about)])


if __name__ == "__main__":
    report.run(_run(_arguments()))
