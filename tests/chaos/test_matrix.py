"""Every operation with whatever can go wrong in it, chosen by a seed: a sample of the matrix, all of which is `make chaos`.

BLOCKFERRY_SEED chooses other cases. What fails is named so that it can be played again:
`python tests/chaos/run.py --qemu qemu10 "pivot-3 die@17"`.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import get_args

import pytest
from linux import Saved, open_linux, save
from matrix import Case, Course, Mishap, Opens, Tally, choose, play, whole
from operations import OPERATIONS
from worlds import Stage, open_world, playground

from blockferry.testing import QemuVersion

SEED = int(os.environ.get("BLOCKFERRY_SEED", "1"))
# Of each operation on each QEMU: a move is some operations in one, and takes as long as three; a server that holds requests costs
# the time in which the guest is freed of it. Of what is not to be there afterwards few cases have records to be found: they get two more.
CASES, SERVED_CASES, MOVE_CASES = 8, 6, 7
LINUX_CASES = 2


VERSIONS: tuple[QemuVersion, ...] = get_args(QemuVersion)


@pytest.fixture(scope="module", params=VERSIONS)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage.open(request.param, tmp_path_factory.mktemp("template")) as stage:
        yield stage


@pytest.fixture(scope="module")
def courses(stage: Stage) -> dict[str, Course]:
    """How each operation goes on that QEMU, as far as somebody has looked."""
    assert stage.template.is_dir()
    return {}


def course_of(operation: str, stage: Stage, folder: Path, courses: dict[str, Course]) -> Course:
    if operation not in courses:
        courses[operation] = asyncio.run(whole(stage, folder / "whole", operation))
    return courses[operation]


def chosen(operation: str, version: str, course: Course, count: int, which: str = "") -> Iterator[Case]:
    chance = random.Random(f"{SEED} {operation} {version}{which}")  # noqa: S311 - it has to be found again, not secret
    return itertools.islice(choose(operation, course, chance), count)


async def play_all(stage: Stage, folder: Path, cases: Iterable[Case], course: Course, *, opens: Opens) -> Tally:
    tally = Tally()
    for case in cases:
        here = folder / str(tally.cases)
        try:
            await play(stage, here, case, course, tally, opens=opens)
        except BaseException as error:
            error.add_note(f"seed {SEED}, case: {case}")
            raise
        shutil.rmtree(here)
    assert tally.records > 0
    return tally


@pytest.mark.timeout(600)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_goes_wrong(
    operation: str,
    stage: Stage,
    courses: dict[str, Course],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    with playground(tmp_path) as folder:
        course = course_of(operation, stage, folder, courses)
        what = OPERATIONS[operation]
        count = MOVE_CASES if what.moves else SERVED_CASES if what.served else CASES + 2 * what.forgets
        cases = chosen(operation, stage.version, course, count)
        tally = asyncio.run(play_all(stage, folder, cases, course, opens=open_world))
    record_property("chaos", [tally.cases, tally.kills, tally.faults])


@pytest.fixture(scope="module")
def saved(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    with playground(tmp_path_factory.mktemp("saved")) as folder:
        yield asyncio.run(save(stage, folder / "linux"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "operation", [name for name, each in OPERATIONS.items() if not each.defined and not each.served]
)
def test_whatever_goes_wrong_under_a_linux_that_writes(  # noqa: PLR0917 - fixtures
    operation: str,
    stage: Stage,
    courses: dict[str, Course],
    saved: Saved,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    with playground(tmp_path) as folder:
        course = course_of(operation, stage, folder, courses)
        cases = chosen(operation, stage.version, course, LINUX_CASES, " linux")
        tally = asyncio.run(play_all(stage, folder, cases, course, opens=functools.partial(open_linux, saved)))
    record_property("chaos", [tally.cases, tally.kills, tally.faults])


@pytest.mark.parametrize("text", ["pivot-3 die@17+again:kill@2", "copy error@blockdev-add#2", "snapshot nothing"])
def test_a_case_is_what_it_is_called(text: str) -> None:
    assert str(Case.parse(text)) == text


@pytest.mark.parametrize("text", ["die", "die@", "hang@3", "die@x"])
def test_what_is_no_mishap(text: str) -> None:
    with pytest.raises(ValueError, match="is no mishap"):
        Mishap.parse(text)
