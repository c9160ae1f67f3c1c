"""The matrix can fail: with a recovery that was broken on purpose, or a record that is not there, its verdict says so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from matrix import Case, Course, Mishap, Tally, play, whole
from verdict import require_records
from worlds import MIB, SIZE, Stage, playground

from blockferry.engine import runner
from blockferry.plan.recover import Decision
from blockferry.testing.pen import RECORD_BYTES, RECORDS_AT, Records


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage.open("distribution", tmp_path_factory.mktemp("template")) as stage:
        yield stage


def in_the_middle(course: Course, what: str) -> Mishap:
    """The host process dies just after that command was sent and answered."""
    return Mishap("die", course.boundaries.index(f"after {what}"))


def finds(stage: Stage, folder: Path, operation: str, command: str) -> None:
    """Play a case in which the host process dies after a command."""
    course = asyncio.run(whole(stage, folder / "whole", operation))
    case = Case(operation, (in_the_middle(course, command),))
    asyncio.run(play(stage, folder / "case", case, course, Tally()))


@pytest.mark.parametrize(
    ("operation", "command", "row", "words"),
    [
        ("pivot-3", "job-finalize", "B", "the guest is paused"),
        ("pivot-3", "job-finalize", "W", "the guest is paused"),
        ("copy", "blockdev-add", "B", "files are left"),
        ("copy", "blockdev-add", "W", "a second recovery found something to do"),
    ],
)
def test_a_recovery_that_falls_into_the_wrong_row(  # noqa: PLR0917 - a table
    operation: str, command: str, row: str, words: str, stage: Stage, tmp_path: Path
) -> None:
    with playground(tmp_path) as folder:
        finds(stage, folder / "sound", operation, command)
        with (
            mock.patch.object(runner, "decide", return_value=Decision(row)),
            pytest.raises(AssertionError, match=words),
        ):
            finds(stage, folder / "broken", operation, command)


def test_a_record_that_is_lost_or_torn() -> None:
    held = bytes([0x61]) * MIB + bytes(SIZE - MIB)
    at, after = RECORDS_AT, RECORDS_AT + RECORD_BYTES
    written = held[:at] + bytes([7]) * RECORD_BYTES + held[after:]
    acknowledged, announced = Records(must={0: 7}, may={0: set()}), Records(must={}, may={0: {7}})
    assert require_records("vda", written, held, acknowledged) == 1
    assert require_records("vda", held, held, announced) == require_records("vda", written, held, announced) == 0
    with pytest.raises(AssertionError, match="record 7 in slot 0 is lost"):
        require_records("vda", held, held, acknowledged)
    with pytest.raises(AssertionError, match="slot 0 holds"):
        require_records("vda", held[:at] + bytes([8]) * RECORD_BYTES + held[after:], held, announced)
    with pytest.raises(AssertionError, match="is not what the disk held"):
        require_records("vda", bytes(MIB) + written[MIB:], held, acknowledged)
