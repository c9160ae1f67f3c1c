"""What going on with an interrupted copy moves, beside a full one: a full disk, cancelled at 60 %, with new writes.

    .venv/bin/python benchmarks/resume.py [--size MIB] [--writes MIB] [--folder FOLDER]

The target: less than 45 % of the disk, as QEMU counts the bytes of its jobs. The guest's firmware does nothing: the new
writes are made through its device, all over the disk, between the interruption and the resume.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path

from qemu.qmp import EventListener
from sides import moved_by_jobs

import blockferry
from blockferry.testing import TestQemu, blockdev_disk, compare_images, find_qemu

MIB = 1024 * 1024
INTERRUPTED_AT = 0.6
AT_MOST = 0.45
# So long it takes until it is interrupted: QEMU is asked without end where it is.
SECONDS = 4.0


def full(path: Path, size: int) -> None:
    """A raw image without a hole or a byte that repeats within a mebibyte."""
    block = os.urandom(MIB)
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(block)


async def interrupted(vm: blockferry.Domain, qemu: TestQemu, to: Path, size: int) -> int:
    """Begin a copy and cancel it; the bytes that it had moved."""
    await vm.block_copy("vda", to, bandwidth=int(size * INTERRUPTED_AT / SECONDS), buf_size=MIB)
    moved = 0
    while moved < INTERRUPTED_AT * size:
        moved = max(job["current-progress"] for job in await qemu.command("query-jobs"))
    await vm.cancel(["vda"])
    return moved


async def write(qemu: TestQemu, size: int, count: int) -> None:
    """Write so many mebibytes, evenly over the disk."""
    qdev = next(each["qdev"] for each in await qemu.command("query-block") if each.get("qdev") and "inserted" in each)
    for number in range(count):
        line = f'qemu-io -d {qdev} "aio_write -q -P {number % 255 + 1} {number * (size // count) // MIB * MIB} 1M"'
        await qemu.command("human-monitor-command", {"command-line": line})
    while True:
        stats = next(each for each in await qemu.command("query-blockstats") if each.get("qdev") == qdev)["stats"]
        if stats["wr_operations"] >= count:
            return


async def resumed(vm: blockferry.Domain, ended: EventListener, to: Path) -> tuple[int, float]:
    """Go on with the copy and let the guest go over to it: bytes moved until the pivot, seconds until it was ready."""
    began = time.perf_counter()
    async for _progress in await vm.block_copy("vda", to, resume=True):
        pass
    took = time.perf_counter() - began
    await vm.pivot(["vda"])
    return moved_by_jobs(ended), took


async def measure(folder: Path, size: int, writes: int) -> None:
    """Once, with a table."""
    binaries = find_qemu("distribution")
    source, to = folder / "source.img", folder / "copy.img"
    full(source, size)
    (folder / "state").mkdir()
    disk = blockdev_disk("d0", source, "raw", iothread="io0")
    async with (
        TestQemu(binaries, folder, args=disk, paused=False) as qemu,
        blockferry.open(str(folder / "state")) as ferry,
    ):
        vm = await ferry.attach("vm", str(qemu.qmp))
        first = await interrupted(vm, qemu, to, size)
        await write(qemu, size, writes)
        with qemu.control.listener("BLOCK_JOB_COMPLETED") as ended:
            second, took = await resumed(vm, ended, to)
        pauses = [each.pause_ms for each in await ferry.operations() if each.pause_ms is not None]
    assert compare_images(binaries, source, "raw", to, "raw"), "the copy is another"
    print(f"disk                        {size // MIB:8} MiB, all of it data")
    print(f"moved until interrupted     {first // MIB:8} MiB  {first / size:6.1%}")
    print(f"written before the resume   {writes:8} MiB")
    print(f"moved by the resume         {second // MIB:8} MiB  {second / size:6.1%}   (target: under {AT_MOST:.0%})")
    print(f"until it was ready          {took:8.2f} s")
    print(f"pauses: resume, pivot       {', '.join(f'{pause:.1f}' for pause in pauses):>8} ms")
    assert second < AT_MOST * size


def main() -> None:
    """Measure in a folder that goes away."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, metavar="MIB", help="the disk's")
    parser.add_argument("--writes", type=int, default=50, metavar="MIB", help="written between")
    parser.add_argument("--folder", help="where there is room for the disk and its copy")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bf-resume-", dir=given.folder) as folder:
        asyncio.run(measure(Path(folder), given.size * MIB, given.writes))


if __name__ == "__main__":
    main()
