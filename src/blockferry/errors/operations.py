"""Operations: how they failed, and what they left."""

from __future__ import annotations

from dataclasses import dataclass

from blockferry.errors.tree import Failed, Refused, Unknown


@dataclass(eq=False)
class NoSuchOperation(Refused):
    """No operation has that number."""

    operation: int
    code = "no-such-operation"
    exit_status = 60
    template = "there is no operation {operation}. `blockferry operations` lists them."


@dataclass(eq=False)
class OperationFailed(Failed):
    """A step failed; all that had been done was undone."""

    domain: str
    operation: int
    step: str
    reason: str
    code = "operation-failed"
    exit_status = 61
    template = (
        "{domain}: operation {operation} failed at «{step}»: {reason}. It was undone: every disk is on the image that "
        "it was on. `blockferry operations show {operation}` has the steps."
    )


@dataclass(eq=False)
class OperationUnsettled(Unknown):
    """A step failed and its undo too, or QEMU stopped answering."""

    domain: str
    operation: int
    step: str
    reason: str
    code = "operation-unsettled"
    exit_status = 62
    template = (
        "{domain}: operation {operation} stopped at «{step}»: {reason}. It is neither done nor undone; `blockferry "
        "recover` looks and settles it, `blockferry operations show {operation}` has the steps."
    )


@dataclass(eq=False)
class OperationAsItIs(Unknown):
    """A window failed and could not be left by bringing the disks back: each stays where it is."""

    domain: str
    operation: int
    step: str
    reason: str
    code = "operation-as-it-is"
    exit_status = 64
    template = (
        "{domain}: operation {operation} failed at «{step}»: {reason}. The disks could not be brought back (somebody let "
        "the guest run, or QEMU refused), so each stays on the image that it is on now, which holds its data: "
        "`blockferry show {domain}` names them."
    )


@dataclass(eq=False)
class Unsettled(Refused):
    """An earlier operation of the domain must be settled first."""

    domain: str
    operation: int
    code = "unsettled"
    exit_status = 63
    template = (
        "{domain}: operation {operation} is not settled yet, so nothing new may be begun. `blockferry recover` settles "
        "it; `blockferry operations show {operation}` says where it stands."
    )


@dataclass(eq=False)
class SnapshotInPart(Unknown):
    """On a QEMU without `transaction` a snapshot failed after some disks had switched."""

    domain: str
    operation: int
    step: str
    reason: str
    switched: str
    code = "snapshot-in-part"
    exit_status = 65
    template = (
        "{domain}: operation {operation} failed at «{step}»: {reason}. Its QEMU has no `transaction`, so the disks were "
        "switched one after the other: {switched} now on the new images, the others as they were, and there is no snapshot of "
        "that name. `blockferry show {domain}` shows the images; `blockferry commit {domain} DISK --base IMAGE --wait`, with "
        "the image under the new one, takes one back."
    )
