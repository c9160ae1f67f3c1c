"""Every operation with whatever can go wrong in it, chosen by a seed: a sample of the matrix, all of which is `make chaos`.

BLOCKFERRY_SEED chooses other cases. What fails is named so that it can be played again:
`python tests/chaos/run.py --qemu qemu10 "pivot-3 die@17"`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
from matrix import Case, Mishap, Tally, choose, play, whole
from operations import OPERATIONS
from worlds import Stage, playground

from blockferry.testing import QemuVersion

SEED = int(os.environ.get("BLOCKFERRY_SEED", "1"))
CASES = 44  # of each operation on each QEMU


VERSIONS: tuple[QemuVersion, ...] = get_args(QemuVersion)


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> QemuVersion:
    found: QemuVersion = request.param
    return found


@pytest.fixture(scope="module")
def stage(version: QemuVersion, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage.open(version, tmp_path_factory.mktemp("template")) as stage:
        yield stage


@pytest.mark.timeout(600)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_goes_wrong(
    operation: str, version: QemuVersion, stage: Stage, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    tally = Tally()
    with playground(tmp_path) as folder:
        course = asyncio.run(whole(stage, folder / "whole", operation))
        chance = random.Random(f"{SEED} {operation} {version}")  # noqa: S311 - no secret
        for case in itertools.islice(choose(operation, course, chance), CASES):
            here = folder / str(tally.cases)
            try:
                asyncio.run(play(stage, here, case, course, tally))
            except BaseException as error:
                error.add_note(f"seed {SEED}, case: {case}")
                raise
            shutil.rmtree(here)
    assert tally.records > 0
    record_property("chaos", [tally.cases, tally.kills, tally.faults])


@pytest.mark.parametrize("text", ["pivot-3 die@17+again:kill@2", "copy error@blockdev-add#2", "snapshot nothing"])
def test_a_case_is_what_it_is_called(text: str) -> None:
    assert str(Case.parse(text)) == text


@pytest.mark.parametrize("text", ["die", "die@", "hang@3", "die@x"])
def test_what_is_no_mishap(text: str) -> None:
    with pytest.raises(ValueError, match="is no mishap"):
        Mishap.parse(text)
