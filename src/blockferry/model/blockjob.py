"""Block jobs of ours, with all that is needed to go on with them after a restart: mirrors, and jobs on a chain."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from blockferry.model.files import FileStamp

JobEnd = Literal["active", "resting", "done", "pivoted", "finished", "cancelled", "removed", "lost"]

# An operation that began one of these is not over.
WORKING: frozenset[JobEnd] = frozenset({"active", "resting"})


class Mirror(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="mirror"):
    """A mirror or copy that was started.

    Attributes:
        domain: its domain's name.
        target: the disk's.
        operation: the operation that started it.
        snapshot: the snapshot that it belongs to; None for a block copy.
        job: QEMU's job id.
        source_node: the node that is mirrored.
        source: the source's file.
        device: what QEMU is given as the job's device: the topmost filter above the source, when there is one; None for
            the source's node itself.
        node: the destination's format node.
        file_node: the destination's protocol node.
        filter_node: the filter that QEMU puts above the source while it runs.
        file: the destination's path or URI.
        format: the destination's format.
        backing: what the destination backs onto; None when it stands alone.
        backing_format: its format.
        stands_for: the image of the source's chain that `backing` holds the data of, when it is another file; None for
            the one under the source.
        options: more arguments of blockdev-mirror (granularity, buf-size, copy-mode).
        state: `active` until it ended, then how; `resting` while its guest is shut off.
        reason: why it was lost or removed, in QEMU's own words where there are any.
        stamps: path -> what its files and the source's looked like when they were closed and equal, while it rests; what
            a copy's file looked like when it was closed, after it was cancelled or lost.
        again: whether it was established again, after its guest had been shut off.
        bitmap: a copy's dirty bitmap on the source's node: what was written since it began; None where there is none, and
            then it can't be resumed.
        blank: whether a given destination is known to have held nothing when the copy began.
        multi_conn: whether the destination is an export of a server that takes several clients at a time, so that we can
            ask it for a flush.
        exact: whether the bitmap counts all that the destination lacks as well, as a resumed copy's does.
        move: the operation of the move that it is of.
    """

    domain: str
    target: str
    operation: int
    job: str
    source_node: str
    source: str
    node: str
    file_node: str
    filter_node: str
    file: str
    format: str
    device: str | None = None
    snapshot: str | None = None
    backing: str | None = None
    backing_format: str | None = None
    stands_for: str | None = None
    options: dict[str, Any] = {}
    state: JobEnd = "active"
    reason: str | None = None
    stamps: dict[str, FileStamp] = {}
    again: bool = False
    bitmap: str | None = None
    blank: bool = False
    multi_conn: bool = False
    exact: bool = False
    move: int | None = None

    @property
    def type(self) -> str:
        """What people call it."""
        return "copy" if self.snapshot is None else "mirror"

    @property
    def copy(self) -> Mirror:
        """The mirror that this job is, or leads to; as ChainJob's."""
        return self


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One image of a chain, by its node of this QEMU process."""

    node: str
    file: str
    format: str


class ChainJob(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="chain"):
    """A commit or stream that was started: a job that moves data within a backing chain.

    Until it has ended the old chain is whole: what a commit writes below is what lies above it anyway.

    Attributes:
        domain: its domain's name.
        target: the disk's.
        operation: the operation that started it.
        job: QEMU's job id.
        type: `commit` of layers under the active image, `active-commit` with it (the guest goes over to the base),
            `rebase` (a stream into the active image), `fill` (a stream into the destination of a copy), `resume` (a
            backup into the destination of a copy, of what it lacks).
        top: a commit's topmost layer; the image that a stream writes to.
        base: what a commit writes to, and what is to be under the disk or under `top`; None for a stream of all.
        above: the node whose backing becomes the base: the overlay of a commit's top, or a stream's own image; None
            for an active commit.
        leaving: the layers that are in the chain no more, top first.
        remove_files: whether the files of those are removed then.
        deletes: snapshots that a delete with merge is about.
        then: the mirror that is started after a fill or a resume.
        round: how many rounds of a resume have gone before this one.
        lacking: bytes that the destination lacked when this round began.
        speed: bytes per second, 0 for no limit; for the rounds and the mirror after it too.
        state: `active` until it ended; then how.
        reason: why it was lost, in QEMU's own words where there are any.
    """

    domain: str
    target: str
    operation: int
    job: str
    type: Literal["commit", "active-commit", "rebase", "fill", "resume"]
    top: Layer
    base: Layer | None
    above: str | None = None
    leaving: tuple[Layer, ...] = ()
    remove_files: bool = False
    deletes: tuple[str, ...] = ()
    then: Mirror | None = None
    speed: int = 0
    round: int = 0
    lacking: int = 0
    state: JobEnd = "active"
    reason: str | None = None

    @property
    def copy(self) -> Mirror | None:
        """The mirror that this job is, or leads to: a fill's or a resume's; None for the others."""
        return self.then

    @property
    def written(self) -> str | None:
        """The image that a commit writes to: until it has ended it is whole only under the disk. None of the others."""
        return self.base.file if self.base is not None and self.type in ("commit", "active-commit") else None


BlockJob = Mirror | ChainJob
