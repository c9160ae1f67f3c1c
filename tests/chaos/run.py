"""`make chaos`: cases for as long as asked, each chosen by a seed, on both QEMUs at once; or the cases that are named.

python tests/chaos/run.py --seconds 600 --seed 7
python tests/chaos/run.py --qemu qemu10 "pivot-3 die@17+again:kill@2"
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fnmatch
import itertools
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parent))
from matrix import Case, Course, Tally, choose, play, whole
from operations import OPERATIONS
from worlds import Stage, playground

from blockferry.errors import BlockferryError
from blockferry.testing import QemuVersion

AT_ONCE = 12  # cases of an operation, before it is the next one's turn
VERSIONS: tuple[QemuVersion, ...] = get_args(QemuVersion)


class Session:
    """Cases on one QEMU; one that fails is said, and kept for whoever looks, and the next is played."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.tally = Tally()
        self.failed: list[str] = []
        self._stage, self._folder = stage, folder
        self._courses: dict[str, Course] = {}
        self._numbers = itertools.count()

    async def course(self, operation: str) -> Course:
        """How an operation goes without a mishap; once."""
        if operation not in self._courses:
            self._courses[operation] = await whole(self._stage, self._folder / f"whole-{operation}", operation)
        return self._courses[operation]

    async def play(self, case: Case) -> None:
        """Play one."""
        course = await self.course(case.operation)
        folder = self._folder / str(next(self._numbers))
        try:
            await play(self._stage, folder, case, course, self.tally)
        except (AssertionError, OSError, ValueError, RuntimeError, BlockferryError) as error:
            self._stage.heal()
            # To another file system: what is no file can't be copied there.
            for path in folder.rglob("*"):
                if path.is_socket():
                    path.unlink()
            kept = shutil.move(folder, tempfile.mkdtemp(prefix="chaos-failed-"))
            self.failed.append(f'--qemu {self._stage.version} "{case}"')
            traceback.print_exception(error)
            sys.stdout.write(f"FAILED {self.failed[-1]}: what it left is in {kept}\n")
        else:
            shutil.rmtree(folder)

    async def named(self, cases: list[str]) -> None:
        """Play those."""
        for text in cases:
            await self.play(Case.parse(text))

    async def until(self, deadline: float, chance: random.Random, wanted: str) -> None:
        """Play operations whose names match until then, by the monotonic clock."""
        names = sorted(fnmatch.filter(OPERATIONS, wanted))
        while names:
            for name in chance.sample(names, len(names)):
                for case in itertools.islice(choose(name, await self.course(name), chance), AT_ONCE):
                    if time.monotonic() > deadline:
                        return
                    await self.play(case)


@contextlib.contextmanager
def session(version: QemuVersion) -> Iterator[Session]:
    """One with a folder of its own."""
    with playground(Path(tempfile.gettempdir())) as folder:
        (folder / "template").mkdir()
        with Stage.open(version, folder / "template") as stage:
            yield Session(stage, folder)


def for_some_time(version: QemuVersion, seconds: float, seed: int, wanted: str) -> tuple[Tally, list[str]]:
    """A session that long."""
    with session(version) as found:
        chance = random.Random(f"{seed} {version}")  # noqa: S311 - a case has to be found again, not to be a secret
        asyncio.run(found.until(time.monotonic() + seconds, chance, wanted))
        return found.tally, found.failed


def these(version: QemuVersion, cases: list[str]) -> tuple[Tally, list[str]]:
    """A session of named cases."""
    with session(version) as found:
        asyncio.run(found.named(cases))
        return found.tally, found.failed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help="cases by name: «pivot-3 die@17»")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", default="*", metavar="PATTERN", help="operations of these names: «move*»")
    parser.add_argument("--qemu", choices=VERSIONS, help="one alone, rather than both")
    arguments = parser.parse_args()
    versions = [arguments.qemu] if arguments.qemu else VERSIONS
    total, failed = Tally(), []
    with ProcessPoolExecutor(len(versions)) as pool:
        if arguments.cases:
            running = [pool.submit(these, version, arguments.cases) for version in versions]
        else:
            sys.stdout.write(f"seed {arguments.seed}\n")
            sys.stdout.flush()
            running = [
                pool.submit(for_some_time, version, arguments.seconds, arguments.seed, arguments.only)
                for version in versions
            ]
        for each in running:
            tally, names = each.result()
            total.add(tally)
            failed += names
    for end, count in total.ends.most_common():
        sys.stdout.write(f"{count:7,} ended {end}\n")
    if failed:
        sys.stdout.write("".join(f"failed: python tests/chaos/run.py {name}\n" for name in failed))
        sys.exit(f"{total.cases:,} cases, {len(failed)} of them failed")
    sys.stdout.write(f"{total}\n")


if __name__ == "__main__":
    main()
