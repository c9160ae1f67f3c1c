"""`make chaos`: cases for as long as asked, each chosen by a seed; or the cases that are named.

python tests/chaos/run.py --seconds 600 --seed 7
python tests/chaos/run.py "pivot-3 die@17+again:kill@2"
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parent))
from matrix import Case, Course, Tally, choose, play, whole
from operations import OPERATIONS
from worlds import Stage, playground

from blockferry.testing import QemuVersion

AT_ONCE = 12  # cases of an operation, before it is the next one's turn


async def named(stage: Stage, folder: Path, cases: list[str], tally: Tally) -> None:
    for number, text in enumerate(cases):
        case = Case.parse(text)
        course = await whole(stage, folder / f"whole{number}", case.operation)
        await one(stage, folder / str(number), case, course, tally)


async def one(stage: Stage, folder: Path, case: Case, course: Course, tally: Tally) -> None:
    try:
        await play(stage, folder, case, course, tally)
    except BaseException as error:
        error.add_note(f"the case: {case}")
        raise
    shutil.rmtree(folder)


async def until(stage: Stage, folder: Path, seconds: float, chance: random.Random, tally: Tally) -> None:
    deadline = time.monotonic() + seconds
    courses: dict[str, Course] = {}
    while time.monotonic() < deadline:
        for name in chance.sample(sorted(OPERATIONS), len(OPERATIONS)):
            if name not in courses:
                courses[name] = await whole(stage, folder / f"whole-{name}", name)
            for case in itertools.islice(choose(name, courses[name], chance), AT_ONCE):
                if time.monotonic() > deadline:
                    return
                await one(stage, folder / str(tally.cases), case, courses[name], tally)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help="cases by name: «pivot-3 die@17»")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--qemu", choices=get_args(QemuVersion), default="distribution")
    arguments = parser.parse_args()
    tally = Tally()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(playground(Path(tempfile.gettempdir())))
        (folder / "template").mkdir()
        stage = stack.enter_context(Stage.open(arguments.qemu, folder / "template"))
        if arguments.cases:
            asyncio.run(named(stage, folder, arguments.cases, tally))
        else:
            sys.stdout.write(f"seed {arguments.seed}\n")
            chance = random.Random(arguments.seed)  # noqa: S311 - a case has to be found again, not to be a secret
            asyncio.run(until(stage, folder, arguments.seconds, chance, tally))
    for end, count in tally.ends.most_common():
        sys.stdout.write(f"{count:7,} ended {end}\n")
    sys.stdout.write(f"{tally}\n")


if __name__ == "__main__":
    main()
