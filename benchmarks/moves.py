"""Moves of a guest's storage beside libvirt's block copy, qemu-img convert and cp, on the same files: prints tables.

    .venv/bin/python benchmarks/moves.py [--rounds N] [--cases full,eight] [--quick] [--docs]

The images of a case are made once, and every way copies them in every round; the order goes round. A first round is not
counted: it compares every copy with its source, unless a guest writes to that. Both sides are warm, as in storage.py. Without libvirt, or where nobody may
mount an XFS, that is said, and the others run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import closed
import movefigures
import report
from interrupted import interrupted
from latency import Watch, Writes
from movecases import (
    CLOSED,
    LIBVIRT,
    MIRROR,
    MOVES,
    OFFLOAD,
    WAYS,
    Chain,
    MoveCase,
    Place,
    exported,
    move_cases,
    sharing,
)
from movefigures import Figures
from sides import MIB, TICKS_PER_SECOND, Boot, Guest, Image, Side, Way, paced, running
from storage import DISK_FOLDER, MEMORY_FOLDER, room, warm_sides

from blockferry.testing import QemuBinaries, compare_images, find_qemu

PACED_RATE = 50 * MIB
# How long the guest's writes are looked at before a move; and at least from its beginning on.
BEFORE_SECONDS, DURING_SECONDS = 1.0, 2.0
# The case of benchmarks/interrupted.py.
INTERRUPTED = "interrupted"
WAY_OF: dict[str, Way] = {LIBVIRT: "blockcopy", MIRROR: "mirror", OFFLOAD: "offload"}


@dataclass(frozen=True)
class Bench:
    """Where and with whom it runs.

    Attributes:
        binaries: which QEMU.
        sides: by the name of the way.
        places: where copies go; an export's is where its image is.
        size: of a disk that is copied alone.
        rounds: that count.
        wanted: the ways that were asked for.
    """

    binaries: QemuBinaries
    sides: dict[str, Side]
    places: dict[Place, Path]
    size: int
    rounds: int
    wanted: tuple[str, ...] = WAYS

    def source_folder(self, case: MoveCase) -> Path:
        """Where a case's images are made: on the disk, unless they are to share blocks with their copies."""
        return self.places["xfs" if case.place == "xfs" else "disk"] / "source"

    def ways(self, case: MoveCase) -> list[str]:
        """Those of a case's that can take part."""
        return [way for way in case.ways if way in self.wanted and (way in CLOSED or way in self.sides)]

    def own(self, path: Path) -> None:
        """Let every side's QEMU have a file or folder."""
        for side in self.sides.values():
            side.own(path)


async def measure(bench: Bench, case: MoveCase, figures: Figures) -> None:
    """All rounds of a case."""
    folder = bench.source_folder(case)
    folder.mkdir()
    try:
        chains = case.make(bench.binaries, folder, bench.size)
        for path in (folder, *folder.iterdir()):
            bench.own(path)
        made = set(folder.iterdir())
        ways = bench.ways(case)
        # What a guest writes to can't be compared: no round is run for that.
        for number in range(1 if case.writing else 0, bench.rounds + 1):
            for way in (*ways[number % len(ways) :], *ways[: number % len(ways)]):
                values = await once(bench, case, way, chains, compare=not number)
                print(f"{case.name} {number or 'warm-up'} {way}: {values}", file=sys.stderr)
                for path in set(folder.iterdir()) - made:
                    path.unlink()
                if number:
                    figures.add(case, way, values)
    finally:
        shutil.rmtree(folder)


async def once(bench: Bench, case: MoveCase, way: str, chains: list[Chain], *, compare: bool) -> dict[str, float]:
    """One way, one round."""
    folder = bench.places[case.place] / "copies"
    folder.mkdir()
    bench.own(folder)
    try:
        async with contextlib.AsyncExitStack() as stack:
            uri = None
            if case.place == "nbd":
                uri = await stack.enter_async_context(exported(bench.binaries, folder, bench.size))
            if way in CLOSED:
                os.sync()
                return {"move": await closed.timed(CLOSED[way], bench.binaries, chains[0], folder, uri)}
            values = await moved(bench, case, way, chains, folder, uri)
        if compare:
            require_equal(bench.binaries, [chain[0] for chain in chains], folder, uri)
        return values
    finally:
        shutil.rmtree(folder)


def require_equal(binaries: QemuBinaries, images: list[Image], folder: Path, uri: str | None) -> None:
    """Fail unless the copies are what their sources are."""
    for image in images:
        copy, form = (folder / "exported.img", "raw") if uri else (folder / image.path.name, image.format)
        assert compare_images(binaries, image.path, image.format, copy, form), f"{copy} is another than {image.path}"


async def moved(  # noqa: PLR0917
    bench: Bench, case: MoveCase, way: str, chains: list[Chain], folder: Path, uri: str | None
) -> dict[str, float]:
    """A running guest's move: how long it took, and what the guest had of it."""
    images = [chain[0] for chain in chains]
    async with started(bench, case, bench.sides[way], images) as guest:
        if not case.writing:
            os.sync()  # what was written so far is not to be paid for by whoever is measured
            return await guest.move(WAY_OF[way], images, folder, uri)
        watch = Watch(guest)
        await watch.begin()
        await asyncio.sleep(BEFORE_SECONDS)
        before = await watch.end()
        # The guest writes in bursts: whoever begins at the same moment of one every time is always given one more, or less.
        await asyncio.sleep(random.random() / TICKS_PER_SECOND)  # noqa: S311 - nothing is kept secret
        await watch.begin()
        values = await guest.move(WAY_OF[way], images, folder, uri)
        await asyncio.sleep(max(0.0, DURING_SECONDS - watch.seconds))
        return {**values, **of_writes(await watch.end(), ""), **of_writes(before, "-before")}


def of_writes(writes: Writes, when: str) -> dict[str, float]:
    """As what a round answers."""
    return {f"rate{when}": writes.rate, f"p99{when}": writes.p99_ms, f"worst{when}": writes.worst_ms}


@contextlib.asynccontextmanager
async def started(bench: Bench, case: MoveCase, side: Side, images: list[Image]) -> AsyncIterator[Guest]:
    """A guest with these disks, which writes if it is to."""
    folder = bench.places["disk"] / "round"
    folder.mkdir()
    try:
        side.own(folder)
        linux: Boot | None = None
        if case.writing:
            linux = paced(images, folder, PACED_RATE, images[0].path.stat().st_size)
        async with running(side, images, folder, linux) as guest:
            yield guest
    finally:
        shutil.rmtree(folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, help="counted rounds of each way (5)")
    known = [*(case.name for case in move_cases(MIB)), INTERRUPTED]
    parser.add_argument("--cases", type=report.some_of(known), help=f"some only, with commas; `{INTERRUPTED}` is one")
    parser.add_argument("--ways", type=report.some_of(WAYS), default=WAYS, help="some only, with commas between them")
    parser.add_argument("--size", type=int, metavar="MIB", help="of a disk that is copied alone (2048)")
    parser.add_argument("--quick", action="store_true", help="to try it: 2 rounds of 256 MiB; the figures mean little")
    parser.add_argument("--folder", default=DISK_FOLDER, help=f"where images are made ({DISK_FOLDER})")
    parser.add_argument("--docs", action="store_true", help="write the figures into docs/ too")
    given = parser.parse_args()
    given.rounds = given.rounds or (2 if given.quick else 5)
    given.size = given.size or (256 if given.quick else 2048)
    return given


async def _run(given: argparse.Namespace) -> None:
    size = given.size * MIB
    cases = [case for case in move_cases(size) if given.cases is None or case.name in given.cases]
    binaries = find_qemu("distribution")
    begun = os.getloadavg()
    figures = Figures()
    with room(given.folder) as disk, room(MEMORY_FOLDER) as memory, contextlib.ExitStack() as mounts:
        places: dict[Place, Path] = {"disk": disk, "nbd": disk, "tmpfs": memory}
        if os.geteuid() == 0:
            places["xfs"] = mounts.enter_context(sharing(disk, 3 * size + 1024 * MIB))
        else:
            print("XFS takes no part: only root may mount one", file=sys.stderr)
            cases = [case for case in cases if case.place != "xfs"]
        async with warm_sides(disk, binaries) as sides:
            named: dict[str, Side] = {
                way: side for side in sides for way in MOVES if (side.name == LIBVIRT) == (way == LIBVIRT)
            }
            bench = Bench(binaries, named, places, size, given.rounds, given.ways)
            about = report.machine(disk, binaries, {side.name: side.version for side in sides})
            for case in cases:
                await measure(bench, case, figures)
        if given.cases is None or INTERRUPTED in given.cases:
            for number in range(given.rounds):
                share = await interrupted(binaries, disk, size)
                print(f"interrupted {number + 1}: {share}", file=sys.stderr)
                figures.again.append(share)
    about["load"] = report.load(begun, os.getloadavg())
    print(movefigures.text(figures), *movefigures.NOTES, sep="\n")
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    if given.docs:
        movefigures.write(figures, about)


if __name__ == "__main__":
    report.run(_run(_arguments()))
