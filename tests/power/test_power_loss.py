"""Power loss: of each operation that moves a guest's data, the power fails at a sample of its flushes; `make power` takes all.

BLOCKFERRY_SEED chooses other moments, and other subsets of what was not flushed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import get_args

import pytest
from cuts import Tally, Theatre, open_theatre, play
from operations import OPERATIONS as CHAOS
from worlds import playground

from blockferry.testing import QemuVersion

SEED = int(os.environ.get("BLOCKFERRY_SEED", "1"))
CUTS = 5  # of each operation
MOVES = ("move", "move-chain", "move-shared", "move-resume", "move-cancel")
OPERATIONS = ("pivot", "pivot-3", "reopen", "rebase", "commit-active", "commit-middle", "delete", "start", *MOVES)
VERSIONS: tuple[QemuVersion, ...] = get_args(QemuVersion)
Opened = Callable[..., Theatre]


@pytest.fixture(scope="module")
def theatre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """One for each QEMU and kind of file system, opened when it is asked for."""
    with contextlib.ExitStack() as stack:
        opened: dict[tuple[QemuVersion, bool], Theatre] = {}

        def get(version: QemuVersion, *, shares: bool) -> Theatre:
            if (version, shares) not in opened:
                folder = stack.enter_context(playground(tmp_path_factory.mktemp(version)))
                opened[version, shares] = stack.enter_context(open_theatre(version, folder, shares=shares))
            return opened[version, shares]

        yield get


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_that_was_flushed_is_missing(operation: str, theatre: Opened) -> None:
    # On one QEMU each: with the next seed on the other.
    version = VERSIONS[(OPERATIONS.index(operation) + SEED) % len(VERSIONS)]
    recording = asyncio.run(theatre(version, shares=CHAOS[operation].shares).record(operation))
    tally = Tally()
    try:
        asyncio.run(play(recording, recording.sample(SEED, CUTS), tally))
    except BaseException as error:
        error.add_note(f"seed {SEED}: python tests/power/run.py --qemu {version} --seed {SEED} {operation}")
        raise
    assert tally.cuts == CUTS
    assert tally.records > 0
