"""`make chaos`: cases for as long as asked, each chosen by a seed; or the cases that are named.

python tests/chaos/run.py --seconds 600 --seed 7
python tests/chaos/run.py "pivot-3 die@17+again:kill@2"
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from matrix import Case, Tally, choose, play, whole
from operations import OPERATIONS
from worlds import Stage

from blockferry.testing import find_qemu
from blockferry.testing.crash import Crasher

AT_ONCE = 12  # cases of an operation, before it is the next one's turn


async def named(stage: Stage, folder: Path, cases: list[str], tally: Tally) -> None:
    for number, text in enumerate(cases):
        case = Case.parse(text)
        course = await whole(stage, folder / f"whole{number}", case.operation)
        await one(stage, folder / str(number), case, course, tally)


async def one(stage: Stage, folder: Path, case: Case, course, tally: Tally) -> None:  # type: ignore[no-untyped-def]
    try:
        await play(stage, folder, case, course, tally)
    except BaseException:
        print(f"{case}: kept in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)


async def until(stage: Stage, folder: Path, seconds: float, chance: random.Random, tally: Tally) -> None:
    deadline = time.monotonic() + seconds
    courses = {}
    while time.monotonic() < deadline:
        for name in chance.sample(sorted(OPERATIONS), len(OPERATIONS)):
            if name not in courses:
                courses[name] = await whole(stage, folder / f"whole-{name}", name)
            for case in choose(name, courses[name], AT_ONCE, chance):
                if time.monotonic() > deadline:
                    return
                await one(stage, folder / str(tally.cases), case, courses[name], tally)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help="cases by name: «pivot-3 die@17»")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--qemu", choices=("distribution", "qemu10"), default="distribution")
    arguments = parser.parse_args()
    tally = Tally()
    folder = Path(tempfile.mkdtemp(prefix="chaos", dir=os.environ.get("TMPDIR", "/var/tmp")))
    (folder / "template").mkdir()
    binaries = find_qemu(arguments.qemu)
    os.environ["BLOCKFERRY_QEMU_DIR"] = str(binaries.system.parent)
    with Crasher() as crasher:
        stage = Stage.build(binaries, crasher, folder / "template")
        if arguments.cases:
            asyncio.run(named(stage, folder, arguments.cases, tally))
        else:
            print(f"seed {arguments.seed}")
            chance = random.Random(arguments.seed)  # noqa: S311 - a case has to be found again, not to be a secret
            asyncio.run(until(stage, folder, arguments.seconds, chance, tally))
    shutil.rmtree(folder)
    print(tally)


if __name__ == "__main__":
    main()
