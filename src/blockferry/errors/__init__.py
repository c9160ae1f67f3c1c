"""Every error that blockferry raises on purpose: one tree, one message template each.

A message says what happened, what state things are in now, and what to type next. `code` and `exit_status` are
stable and unique (docs/errors.md lists them; a test holds both). The three branches are the three outcomes:

    Refused   nothing was done
    Failed    it was tried and undone: things are as they were before
    Unknown   nobody can say yet: recovery must look
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from blockferry.errors.domains import (
    DomainBusy,
    DomainExists,
    DomainInUse,
    GuestGone,
    InvalidName,
    MissingCapability,
    NoSuchDomain,
    QmpBusy,
    QmpTimeout,
    QmpUnreachable,
)
from blockferry.errors.images import (
    AmbiguousDisk,
    DestinationExists,
    DestinationUnusable,
    DiskBusy,
    DiskUnsuitable,
    DuplicateFile,
    ImageUnsuitable,
    NoRoom,
    NoSuchDisk,
)
from blockferry.errors.jobs import (
    JobFailed,
    JobLost,
    JobNotDismissed,
    JobNotReady,
    NoSuchJob,
    NotResumable,
    RebaseElsewhere,
    SpeedRefused,
)
from blockferry.errors.lifecycle import (
    AgentUnreachable,
    AlreadyFrozen,
    AlreadyRunning,
    CannotShutDown,
    MirrorGone,
    NotDefined,
    NotRunning,
    StillRunning,
)
from blockferry.errors.moves import (
    MoveCancelled,
    MoveDiffers,
    MoveNotPossible,
    MoveStands,
    MoveUnderWay,
    NothingToResume,
)
from blockferry.errors.operations import (
    NoSuchOperation,
    OperationAsItIs,
    OperationFailed,
    OperationUnsettled,
    SnapshotInPart,
    Unsettled,
)
from blockferry.errors.process import (
    BadRequest,
    HostProcessUnreachable,
    InternalError,
    JournalUnwritable,
    StateDirBusy,
    StateDirUnusable,
)
from blockferry.errors.snapshots import (
    InvalidXml,
    NoMirror,
    NoSuchSnapshot,
    SnapshotExists,
    SnapshotHasMirrors,
    SnapshotInternal,
    SnapshotNotCurrent,
    SnapshotNotMergeable,
    UnsupportedFlag,
)
from blockferry.errors.tree import (
    BlockferryError,
    Failed,
    Refused,
    Unknown,
)

__all__ = [
    "BY_CODE",
    "AgentUnreachable",
    "AlreadyFrozen",
    "AlreadyRunning",
    "AmbiguousDisk",
    "BadRequest",
    "BlockferryError",
    "CannotShutDown",
    "DestinationExists",
    "DestinationUnusable",
    "DiskBusy",
    "DiskUnsuitable",
    "DomainBusy",
    "DomainExists",
    "DomainInUse",
    "DuplicateFile",
    "Failed",
    "GuestGone",
    "HostProcessUnreachable",
    "ImageUnsuitable",
    "InternalError",
    "InvalidName",
    "InvalidXml",
    "JobFailed",
    "JobLost",
    "JobNotDismissed",
    "JobNotReady",
    "JournalUnwritable",
    "MirrorGone",
    "MissingCapability",
    "MoveCancelled",
    "MoveDiffers",
    "MoveNotPossible",
    "MoveStands",
    "MoveUnderWay",
    "NoMirror",
    "NoRoom",
    "NoSuchDisk",
    "NoSuchDomain",
    "NoSuchJob",
    "NoSuchOperation",
    "NoSuchSnapshot",
    "NotDefined",
    "NotResumable",
    "NotRunning",
    "NothingToResume",
    "OperationAsItIs",
    "OperationFailed",
    "OperationUnsettled",
    "QmpBusy",
    "QmpTimeout",
    "QmpUnreachable",
    "RebaseElsewhere",
    "Refused",
    "SnapshotExists",
    "SnapshotHasMirrors",
    "SnapshotInPart",
    "SnapshotInternal",
    "SnapshotNotCurrent",
    "SnapshotNotMergeable",
    "SpeedRefused",
    "StateDirBusy",
    "StateDirUnusable",
    "StillRunning",
    "Unknown",
    "Unsettled",
    "UnsupportedFlag",
    "from_dict",
]


def _tree(cls: type[BlockferryError]) -> list[type[BlockferryError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _tree(sub))]


BY_CODE: dict[str, type[BlockferryError]] = {cls.code: cls for cls in _tree(BlockferryError) if cls.code}


def from_dict(data: dict[str, Any]) -> BlockferryError:
    """Rebuild the error that `to_dict` described, as a client of the API does.

    A code that this version does not know becomes `InternalError` with the other side's message.
    """
    cls = BY_CODE.get(str(data.get("code")))
    values = data.get("fields")
    if cls is None or not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
        return InternalError(detail=str(data.get("message", data)))
    return cls(**values)
