"""A plan: what an operation does, in four stretches, and what is true once it has done it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from blockferry.model.blockjob import BlockJob, ChainJob, JobEnd, Mirror
from blockferry.model.move import Move
from blockferry.model.snapshot import Snapshot
from blockferry.plan.steps import Step


class WindowDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk in a window, with what it takes to bring it back.

    Attributes:
        target: the disk's.
        backend: what the graph calls the device.
        drive: what query-block calls its qdev.
        source_node: the node under the device before.
        source_options: how to open the source again, layer by layer, when QEMU has freed that node (a node that
            nobody named goes when its last user does); AddNode's options without node names.
        back_node: the name for the source opened again.
        back_job: the id of the job that brings it back.
        mirror: the mirror as it was before.
    """

    target: str
    backend: str
    drive: str
    source_node: str
    source_options: dict[str, Any]
    back_node: str
    back_job: str
    mirror: Mirror


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """The instant: the guest stands still from the first step to the record after the last.

    In one that is `held` its processors run, and the jobs hold its requests to these disks: from a step that has each wait to be
    finalized, until that is done, which follows the record.

    Attributes:
        ends_on: `destination` (a pivot) or `source` (a finish).
        resume: whether the guest ran before, so that it is to run again.
        disks: those that take part.
        steps: in their order.
        chain: an active commit or a rebase that ends in it, instead of mirrors.
        held: whether the guest is not stopped for it.
    """

    ends_on: Literal["destination", "source"]
    resume: bool
    disks: tuple[WindowDisk, ...]
    steps: tuple[Step, ...]
    chain: ChainJob | None = None
    held: bool = False

    @property
    def holding(self) -> tuple[str, ...]:
        """The jobs that hold the guest's requests, where it is not stopped."""
        jobs = [self.chain.job] if self.chain is not None else [disk.mirror.job for disk in self.disks]
        return tuple(jobs) if self.held else ()


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The point of no return: what is true from then on, written in one durable transaction.

    Attributes:
        authoritative: target -> the file that holds the guest's data.
        formats: target -> that file's format, where the file is another than before.
        snapshot: a snapshot that now exists.
        metadata: whether it is remembered.
        changed: snapshots whose images are others now.
        forget: snapshots that exist no more.
        jobs: mirrors, commits and streams that now work.
        move: a move as it is from now on.
        ended: target -> how its job ended.
        reason: why they ended, when there is one.
    """

    authoritative: dict[str, str] = {}
    formats: dict[str, str] = {}
    snapshot: Snapshot | None = None
    metadata: bool = True
    changed: tuple[Snapshot, ...] = ()
    forget: tuple[str, ...] = ()
    jobs: tuple[BlockJob, ...] = ()
    move: Move | None = None
    ended: dict[str, JobEnd] = {}
    reason: str | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that an operation will do.

    Attributes:
        what: `snapshot`, `copy`, `pivot`, `finish`, `reopen`, `cancel`, `remove-mirror`, `forget`, `redefine`, `rebase`, `commit`,
            `delete`, and `job-end`: what follows when a commit or stream has ended.
        text: one line for people.
        prepare: steps with an undo; the guest runs and is not affected.
        window: where an instant is needed.
        record: the point of no return.
        settle: idempotent; tried forwards until done.
        left_out: disks that take no part, with the reason.
        notes: what people should know of it, such as a device that is overwritten.
        offline: whether no QEMU runs when it begins: it starts one, or is about files alone.
        in_part: whether, the disks being switched one after the other, a failure leaves those that are switched.
    """

    what: str
    text: str
    prepare: tuple[Step, ...] = ()
    window: Window | None = None
    record: Record = Record()
    settle: tuple[Step, ...] = ()
    left_out: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    offline: bool = False
    in_part: bool = False

    def lines(self) -> tuple[str, ...]:
        """The steps as people read them, for --dry-run."""
        lines = [f"prepare: {step.text}" for step in self.prepare]
        lines += [f"window: {step.text}" for step in self.window.steps] if self.window else []
        lines += ["record: " + (", ".join(f"{t} is {f}" for t, f in self.record.authoritative.items()) or self.text)]
        lines += [f"settle: {step.text}" for step in self.settle]
        return tuple(lines)


class Names:
    """Node names and job ids, derived from the state directory's tag, the operation and the disk's target.

    QEMU limits a node's name to 31 characters (block.c, `NODE_NAME_MAX`... qdict names of 32 with the NUL):
    `bf` + 4 + `-` + 8 + `-` + 10 + `-` + 2 is 28.
    """

    PREFIX = "bf"

    def __init__(self, tag: str, operation: int) -> None:
        self.stem = f"{self.PREFIX}{tag}-{operation}"

    def of(self, target: str, role: str) -> str:
        """The name for this disk's `role`: s, sf (overlay), x, xf (destination), t (filter), m (job), y0... (bases)."""
        return f"{self.stem}-{target[-10:]}-{role}"


def is_ours(name: str, tag: str) -> bool:
    """Whether a node, job or bitmap has a name that the state directory of this tag gives."""
    return name.startswith(f"{Names.PREFIX}{tag}-")
