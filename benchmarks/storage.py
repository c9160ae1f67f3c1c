"""Snapshots, pivots and block copy, blockferry and libvirt side by side: prints a table.

    .venv/bin/python benchmarks/storage.py [--rounds N] [--cases snapshot,pivot] [--docs]

Both sides are warm: the library is open and libvirtd runs for all rounds, and a first round is not counted. In every
round each side has a new guest on new images, on the same file system, one side after the other; who begins changes
with every round. Where libvirtd is not installed that is said, and blockferry runs alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import libvirt_side
import report
from cases import MIB, Case, all_cases
from ferry import ferry_side
from figures import NOTES, Series, text_table
from sides import Side, boot, running

from blockferry.testing import QemuBinaries, find_qemu

DISK_FOLDER = "/var/tmp"  # noqa: S108 (a folder of our own is made in it; /tmp may be in memory)
MEMORY_FOLDER = "/dev/shm"  # noqa: S108 (as above)


@contextlib.contextmanager
def room(place: str) -> Iterator[Path]:
    """A new folder that other users may pass through, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="bfbench-", dir=place))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.asynccontextmanager
async def warm_sides(folder: Path, binaries: QemuBinaries) -> AsyncIterator[list[Side]]:
    """Whoever takes part: blockferry first."""
    async with contextlib.AsyncExitStack() as stack:
        sides: list[Side] = []
        for name in ("f", "l"):
            (folder / name).mkdir()
        sides.append(await stack.enter_async_context(ferry_side(folder / "f", binaries)))
        lacks = libvirt_side.missing()
        if lacks:
            print(f"libvirt takes no part: {lacks}", file=sys.stderr)
        else:
            sides.append(await stack.enter_async_context(libvirt_side.libvirt_side(folder / "l", binaries.system)))
        yield sides


async def _once(side: Side, case: Case, binaries: QemuBinaries, place: Path) -> dict[str, float]:
    """One round of one side, on a new guest and new images."""
    folder = place / "round"
    folder.mkdir()
    try:
        images = case.prepare(binaries, folder)
        side.own(folder)
        for image in images:
            side.own(image.path)
        linux = boot(images, folder) if case.writing else None
        async with running(side, images, folder, linux) as guest:
            os.sync()  # what was written so far is not to be paid for by whoever is measured
            return await case.ask(guest, images, folder)
    finally:
        shutil.rmtree(folder)


async def _measure(case: Case, rounds: int, sides: list[Side], binaries: QemuBinaries, place: Path) -> list[Series]:
    """All rounds of a case; a first one is not counted."""
    series = [Series(figure) for figure in case.figures]
    for number in range(rounds + 1):
        order = sides if number % 2 else sides[::-1]
        for side in order:
            values = await _once(side, case, binaries, place)
            print(f"{case.name} {number or 'warm-up'} {side.name}: {values}", file=sys.stderr)
            if number:
                for each in series:
                    each.add(side.name, values[each.figure.key])
    return series


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, help="counted rounds of each side (7)")
    known = [case.name for case in all_cases(MIB)]
    parser.add_argument("--cases", type=report.some_of(known), help="some only, with commas between them")
    parser.add_argument("--copy-mib", type=int, help="size of the disk that is copied, in MiB (1024)")
    parser.add_argument("--quick", action="store_true", help="to try it: 2 rounds, 128 MiB; the figures mean little")
    parser.add_argument("--folder", default=DISK_FOLDER, help=f"where images are made ({DISK_FOLDER})")
    parser.add_argument("--docs", action="store_true", help="write the figures into docs/ too")
    given = parser.parse_args()
    given.rounds = given.rounds or (2 if given.quick else 7)
    given.copy_mib = given.copy_mib or (128 if given.quick else 1024)
    return given


async def _run(arguments: argparse.Namespace) -> None:
    cases = all_cases(arguments.copy_mib * MIB)
    if arguments.cases:
        cases = tuple(case for case in cases if case.name in arguments.cases)
    binaries = find_qemu("distribution")
    begun = os.getloadavg()
    every: list[Series] = []
    with room(arguments.folder) as disk, room(MEMORY_FOLDER) as memory:
        async with warm_sides(disk, binaries) as sides:
            machine = report.machine(disk, binaries, {side.name: side.version for side in sides})
            for case in cases:
                every += await _measure(case, arguments.rounds, sides, binaries, memory if case.memory else disk)
    machine["load"] = report.load(begun, os.getloadavg())
    print(text_table(every), *NOTES, sep="\n")
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    if arguments.docs:
        report.write(every, machine)


if __name__ == "__main__":
    report.run(_run(_arguments()))
