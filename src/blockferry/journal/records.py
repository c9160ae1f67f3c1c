"""What the journal keeps of domains, and of operations and their steps."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from blockferry.model.operation import OperationState, StepState, Stretch
from blockferry.plan.plan import Plan


class DomainRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An attached domain.

    Attributes:
        name: its name.
        qmp: its QMP socket.
        pid: its QEMU process when it was last seen.
        born: when that process was started (qemu.process.born), to tell it from another of that number.
        gone: whether that process is known, and has been said, to have ended.
        defined: whether we start it (and have its definition), rather than somebody else.
        agent: its guest agent's socket, where that is known.
        ending: why we are about to end its QEMU.
        targets: qdev -> target, kept once given.
    """

    name: str
    qmp: str
    pid: int | None = None
    born: int | None = None
    gone: bool = False
    defined: bool = False
    agent: str | None = None
    ending: str | None = None
    targets: dict[str, str] = {}


class Defined(msgspec.Struct, frozen=True, kw_only=True):
    """A domain that we start.

    Attributes:
        xml: its definition as it was given.
        images: target -> (file, format) of its active image, where that is another by now.
    """

    xml: str
    images: dict[str, tuple[str, str]] = {}


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A step as it was done: times in seconds since 1970, `outcome` what undo and recovery need of it."""

    index: int
    stretch: Stretch
    text: str
    state: StepState
    started: float
    ended: float | None = None
    error: str | None = None
    outcome: dict[str, Any] = {}

    @classmethod
    def begin(cls, index: int, stretch: Stretch, text: str) -> StepRecord:
        """The intent of a step that is about to be done."""
        return cls(index=index, stretch=stretch, text=text, state="intent", started=time.time())

    def end(self, state: StepState, outcome: dict[str, Any] | None = None, *, error: str | None = None) -> StepRecord:
        """What became of it."""
        return msgspec.structs.replace(self, state=state, ended=time.time(), outcome=outcome or {}, error=error)


class OperationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An operation: its plan, where it stands, and why it failed when it did."""

    id: int
    domain: str
    plan: Plan
    state: OperationState
    started: float
    ended: float | None = None
    error: str | None = None
    row: str | None = None
    pause_ms: float | None = None
