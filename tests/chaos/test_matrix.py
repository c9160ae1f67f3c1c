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

import pytest
from matrix import Case, Mishap, Tally, choose, play, whole
from operations import OPERATIONS
from worlds import Stage, playground

from blockferry.testing import find_qemu
from blockferry.testing.crash import Crasher

SEED = int(os.environ.get("BLOCKFERRY_SEED", "1"))
CASES = 44  # of each operation on each QEMU


@pytest.fixture(scope="module", params=["distribution", "qemu10"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    binaries = find_qemu(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKFERRY_QEMU_DIR", str(binaries.system.parent))
        with Crasher() as crasher:
            yield Stage.build(binaries, crasher, tmp_path_factory.mktemp("template"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_goes_wrong(
    operation: str, stage: Stage, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    tally = Tally()
    with playground(tmp_path) as folder:
        course = asyncio.run(whole(stage, folder / "whole", operation))
        chance = random.Random(f"{SEED} {operation} {stage.binaries.system.parent.parent.name}")  # noqa: S311 - no secret
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
