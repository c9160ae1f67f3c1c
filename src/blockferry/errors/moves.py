"""Moves of a guest's storage."""

from __future__ import annotations

from dataclasses import dataclass

from blockferry.errors.tree import Failed, Refused


@dataclass(eq=False)
class MoveUnderWay(Refused):
    """What was asked for would get in the way of a move that is not over."""

    domain: str
    operation: int
    what: str
    code = "move-under-way"
    exit_status = 90
    template = (
        "{domain}: {what} is part of move {operation}, which is not over. `blockferry operations resume {operation}` goes on "
        "with it, `blockferry operations cancel {operation}` gives it up. Nothing was done."
    )


@dataclass(eq=False)
class MoveNotPossible(Refused):
    """A move can't be gone on with, or given up, where it stands."""

    domain: str
    operation: int
    reason: str
    code = "move-not-possible"
    exit_status = 91
    template = (
        "{domain}: move {operation} {reason}. Nothing was done; `blockferry operations show {operation}` shows it."
    )


@dataclass(eq=False)
class NothingToResume(Refused):
    """An operation that has nothing that could be gone on with, or given up."""

    operation: int
    what: str
    state: str
    code = "nothing-to-resume"
    exit_status = 94
    template = (
        "operation {operation} ({what}, {state}) is no move and has no copy that could be gone on with or given up. "
        "Nothing was done; `blockferry operations` lists what there is."
    )


@dataclass(eq=False)
class MoveStands(Failed):
    """A move stands still: what it has done stays, and it can be gone on with or given up."""

    domain: str
    operation: int
    phase: str
    reason: str
    code = "move-stands"
    exit_status = 92
    template = (
        "{domain}: move {operation} stands still ({phase}): {reason}. The guest works on, and what was copied stays. "
        "`blockferry operations resume {operation}` goes on with it; `blockferry operations cancel {operation}` gives it up, as long "
        "as the guest has not gone over; after that `blockferry operations resume {operation} --verify none` ends it without comparing."
    )


@dataclass(eq=False)
class MoveDiffers(Failed):
    """After a move source and destination were found not to be equal; the sources are kept."""

    domain: str
    operation: int
    differences: str
    code = "move-differs"
    exit_status = 93
    template = (
        "{domain}: after move {operation} the guest runs on the destinations, and they are not equal to what it left: "
        "{differences}. The sources are kept as they were at that instant; `blockferry operations show {operation}` names all."
    )


@dataclass(eq=False)
class MoveCancelled(Failed):
    """A move that somebody waits for was given up."""

    domain: str
    operation: int
    reason: str
    code = "move-cancelled"
    exit_status = 95
    template = "{domain}: move {operation} was given up: {reason}. Every disk is on the image that it was on, and the copies are removed."
