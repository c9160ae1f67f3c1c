"""Steps: a verb and its arguments, each with what undoes it; done twice, one finds what it did before by its names."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from blockferry.model.blockjob import Mirror
from blockferry.model.definition import RunAs
from blockferry.plan import files, tracking
from blockferry.plan.verb import Verb

# --- nodes ----------------------------------------------------------------------------------------------------


class AddNode(Verb, frozen=True, kw_only=True, tag="add-node"):
    """blockdev-add with these options (QAPI BlockdevOptions); the driver is always named.

    The file below is opened with it, under a name of its own, and closed with it. `may_stay`: what is under a mirror's destination
    does no harm when it can't be closed before that one (see SetBacking.undo); it is closed with what is left over.
    """

    alongside: ClassVar[bool] = True
    node: str
    options: dict[str, Any]
    may_stay: bool = False

    def undo(self) -> tuple[Step, ...]:
        """Close it."""
        return (RemoveNode(node=self.node, if_unused=self.may_stay),)

    @property
    def text(self) -> str:
        """A line for people."""
        return f"open {self.node} ({self.options.get('driver')}{f' on {self.filename}' if self.filename else ''})"

    @property
    def filename(self) -> str | None:
        """The path of the image's file; None for one that is no file."""
        file = self.options.get("file")
        return file.get("filename") if isinstance(file, dict) else None


class RemoveNode(Verb, frozen=True, kw_only=True, tag="remove-node"):
    """blockdev-del, if the node is there. `if_unused`: leave it when something uses it."""

    # In their order: QEMU takes them one after the other.
    alongside: ClassVar[bool] = True

    node: str
    if_unused: bool = False

    @property
    def text(self) -> str:
        """A line for people."""
        return f"close {self.node}" + (" unless it is used" if self.if_unused else "")


class RequireSize(Verb, frozen=True, kw_only=True, tag="require-size"):
    """Fail unless the node has exactly that virtual size, in bytes: QEMU would start the job and fail it later."""

    node: str
    size: int

    @property
    def text(self) -> str:
        """A line for people."""
        return f"{self.node} has {self.size} bytes"


class SetBacking(Verb, frozen=True, kw_only=True, tag="set-backing"):
    """Give an open image its backing node, or take it away (None), by blockdev-reopen.

    `if_possible`: one that QEMU can't reopen stays as it is.
    """

    node: str
    format: str
    file_node: str
    backing: str | None
    if_possible: bool = False

    def undo(self) -> tuple[Step, ...]:
        """Take the backing away again: our destinations are opened without one.

        Not one whose storage can't be flushed, which QEMU never forgets: it can't be reopened then, and the operation would stay
        open for ever. Nobody reads a mirror's destination, so that its backing does no harm until it is closed.
        """
        return (msgspec.structs.replace(self, backing=None, if_possible=True),)

    @property
    def text(self) -> str:
        """A line for people."""
        return f"let {self.node} back onto {self.backing}" if self.backing else f"take the backing of {self.node} away"


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """A disk's switch from `node` to `overlay`; `job` names the commit that would undo it."""

    target: str
    node: str
    overlay: str
    job: str


class TakeSnapshots(Verb, frozen=True, kw_only=True, tag="take-snapshots"):
    """One QMP transaction of blockdev-snapshot: all disks at one instant or none.

    Not `together`: blockdev-snapshot of one disk, for a QEMU without `transaction`.
    """

    pairs: tuple[Pair, ...]
    together: bool = True

    def undo(self) -> tuple[Step, ...]:
        """Commit each overlay down into its node; the guest runs on, and keeps what it wrote meanwhile."""
        return tuple(CommitDown(overlay=pair.overlay, base=pair.node, job=pair.job) for pair in self.pairs)

    @property
    def text(self) -> str:
        """A line for people."""
        at_once = " at one instant" if self.together else ""
        return f"switch to the overlays{at_once}: " + ", ".join(pair.target for pair in self.pairs)


class CommitDown(Verb, frozen=True, kw_only=True, tag="commit-down"):
    """Commit an active overlay into `base` and let the guest go on there, if the overlay is in use."""

    overlay: str
    base: str
    job: str

    @property
    def text(self) -> str:
        """A line for people."""
        return f"commit {self.overlay} down into {self.base}"


# --- jobs -----------------------------------------------------------------------------------------------------


class StartMirror(Verb, frozen=True, kw_only=True, tag="start-mirror"):
    """blockdev-mirror, kept after its end and not finalized by itself; `speed` bytes per second, 0 for no limit.

    `sync` is QEMU's: `full` (the whole chain), `top` (the active layer), `none` (only what is written from now on).
    `replaces` is the node whose place the destination takes, where `device` is a filter above it. `options` are more
    arguments of blockdev-mirror.
    """

    alongside: ClassVar[bool] = True
    target: str
    job: str
    device: str
    node: str
    filter_node: str
    sync: str
    speed: int = 0
    replaces: str | None = None
    options: dict[str, Any] = msgspec.field(default_factory=dict)

    @classmethod
    def of(cls, mirror: Mirror, sync: str, speed: int = 0) -> StartMirror:
        """The step that starts this mirror."""
        return cls(
            target=mirror.target,
            job=mirror.job,
            device=mirror.device or mirror.source_node,
            node=mirror.node,
            filter_node=mirror.filter_node,
            sync=sync,
            speed=speed,
            replaces=mirror.source_node if mirror.device else None,
            options=mirror.options,
        )

    def undo(self) -> tuple[Step, ...]:
        """Cancel it."""
        return (CancelJob(job=self.job),)

    @property
    def text(self) -> str:
        """A line for people."""
        return f"mirror {self.target}: {self.device} to {self.node} ({self.sync})"


class StartCommit(Verb, frozen=True, kw_only=True, tag="start-commit"):
    """block-commit of the layers from `top` down to above `base` into `base`; kept after its end.

    An `active` one is not finalized by itself: its disk is to go over to the base in a window of ours.
    """

    job: str
    device: str
    top: str
    base: str
    backing_file: str | None
    filter_node: str
    active: bool
    speed: int = 0

    def undo(self) -> tuple[Step, ...]:
        """Cancel it; the chain is as it was, and what it had written below lies under what is above anyway."""
        return (CancelJob(job=self.job),)

    @property
    def text(self) -> str:
        """A line for people."""
        return f"commit {self.top} into {self.base}"


class StartStream(Verb, frozen=True, kw_only=True, tag="start-stream"):
    """block-stream into `device`, of all that lies between it and `base` (None: of all under it).

    It is not finalized by itself: the image's header changes then, and what was copied has to be on disk before. It is not
    kept after its end: QEMU 7.2 and 10.0 crash when they are asked for their nodes while a stream is concluded and not
    dismissed.
    """

    job: str
    device: str
    base: str | None
    backing_file: str | None
    filter_node: str
    speed: int = 0

    def undo(self) -> tuple[Step, ...]:
        """Cancel it; the chain is as it was."""
        return (CancelJob(job=self.job),)

    @property
    def text(self) -> str:
        """A line for people."""
        return f"pull into {self.device} what lies between it and {self.base or 'nothing'}"


class StartBackup(Verb, frozen=True, kw_only=True, tag="start-backup"):
    """blockdev-backup of what the bitmap counts; kept after its end.

    The bitmap goes on counting meanwhile. However the job ends, it counts then what is still to be copied.
    """

    job: str
    device: str
    node: str
    bitmap: str
    filter_node: str
    speed: int = 0

    def undo(self) -> tuple[Step, ...]:
        """Cancel it."""
        return (CancelJob(job=self.job),)

    @property
    def text(self) -> str:
        """A line for people."""
        return f"copy to {self.node} what is counted as written to {self.device}"


class FinalizeStream(Verb, frozen=True, kw_only=True, tag="finalize-stream"):
    """job-finalize a stream that is pending, and wait until QEMU has forgotten it; the graph says how it went."""

    job: str

    @property
    def text(self) -> str:
        """A line for people."""
        return f"finalize {self.job}"


class RequireBacking(Verb, frozen=True, kw_only=True, tag="require-backing"):
    """Fail unless the node now backs onto that one (None: onto nothing): success is what the graph says."""

    node: str
    backing: str | None

    @property
    def text(self) -> str:
        """A line for people."""
        return f"the graph shows {self.node} on {self.backing or 'nothing'}"


class CancelJob(Verb, frozen=True, kw_only=True, tag="cancel-job"):
    """Cancel a job in whatever state it is, wait for its end and dismiss it; nothing if there is none."""

    job: str

    @property
    def text(self) -> str:
        """A line for people."""
        return f"cancel {self.job}"


class RequireReady(Verb, frozen=True, kw_only=True, tag="require-ready"):
    """Fail unless every one of these mirrors is ready and without an error."""

    jobs: tuple[str, ...]

    @property
    def text(self) -> str:
        """A line for people."""
        return "every mirror is ready: " + ", ".join(self.jobs)


class CompleteJobs(Verb, frozen=True, kw_only=True, tag="complete-jobs"):
    """job-complete each (or, with `soft_cancel`, block-job-cancel without force) and wait until all are pending.

    QEMU then holds the guest's requests to their disks until they are finalized. `running`: the guest runs and may write so much that
    one is never drained; it is stopped for that where it takes long, and let run again.
    """

    jobs: tuple[str, ...]
    soft_cancel: bool = False
    running: bool = False

    @property
    def text(self) -> str:
        """A line for people."""
        return ("end, staying on the source: " if self.soft_cancel else "drain: ") + ", ".join(self.jobs)


class FinalizeJobs(Verb, frozen=True, kw_only=True, tag="finalize-jobs"):
    """job-finalize each and wait until all are concluded, without an error.

    `recorded`: that they go over is recorded, and it is tried until they have: one that QEMU was let forget had done so.
    """

    jobs: tuple[str, ...]
    recorded: bool = False

    @property
    def text(self) -> str:
        """A line for people."""
        return "finalize " + ", ".join(self.jobs)


class DrainMirrors(Verb, frozen=True, kw_only=True, tag="drain-mirrors"):
    """End mirrors that have caught up, so that source and destination are equal; the guest stands still.

    target -> job. One that fails is left: the outcome says which are equal.
    """

    jobs: dict[str, str]

    @property
    def text(self) -> str:
        """A line for people."""
        return "bring mirrors to rest: " + ", ".join(self.jobs)


class AwaitReady(Verb, frozen=True, kw_only=True, tag="await-ready"):
    """Wait until these jobs are ready; only for those that are ready at once."""

    jobs: tuple[str, ...]

    @property
    def text(self) -> str:
        """A line for people."""
        return "wait for " + ", ".join(self.jobs)


class DismissJobs(Verb, frozen=True, kw_only=True, tag="dismiss-jobs"):
    """Let QEMU forget jobs whose result has been recorded; nothing for those that it has forgotten."""

    jobs: tuple[str, ...]

    @property
    def text(self) -> str:
        """A line for people."""
        return "dismiss " + ", ".join(self.jobs)


# --- QEMU itself ----------------------------------------------------------------------------------------------


class Launch(Verb, frozen=True, kw_only=True, tag="launch"):
    """Start the domain's QEMU, its guest not running yet; files that are not there are made from their `templates`."""

    program: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    templates: dict[str, str] = msgspec.field(default_factory=dict)
    run_as: RunAs | None = None

    def undo(self) -> tuple[Step, ...]:
        """End it: the guest has not run one instruction."""
        return (EndQemu(),)

    @property
    def text(self) -> str:
        """A line for people."""
        return f"start {self.program}"


class EndQemu(Verb, frozen=True, kw_only=True, tag="end-qemu"):
    """End the domain's QEMU, which closes its images; without mercy when it does not end."""

    @property
    def text(self) -> str:
        """A line for people."""
        return "end QEMU"


class SetLimits(Verb, frozen=True, kw_only=True, tag="set-limits"):
    """block_set_io_throttle of a device, with these of its arguments: bytes or operations per second."""

    device: str
    limits: dict[str, int]

    @property
    def text(self) -> str:
        """A line for people."""
        return f"limit {self.device}: " + ", ".join(f"{name} {number}" for name, number in self.limits.items())


# --- the guest ------------------------------------------------------------------------------------------------


class Stop(Verb, frozen=True, kw_only=True, tag="stop"):
    """Pause the guest, if it runs."""

    @property
    def text(self) -> str:
        """A line for people."""
        return "pause the guest"


class Resume(Verb, frozen=True, kw_only=True, tag="cont"):
    """Let the guest run again; only in plans for a guest that ran. `first`: also one that has never run."""

    first: bool = False

    @property
    def text(self) -> str:
        """A line for people."""
        return "let the guest run"


class Freeze(Verb, frozen=True, kw_only=True, tag="freeze"):
    """Have the guest's agent freeze its file systems.

    Thawing does not wait for its turn when an operation is undone, so it is none of what undoes this: it comes first
    (engine.runner), wherever `plan.recover.may_be_frozen` says so.
    """

    @property
    def text(self) -> str:
        """A line for people."""
        return "freeze the guest's file systems"


class Thaw(Verb, frozen=True, kw_only=True, tag="thaw"):
    """Have the guest's agent thaw its file systems. `held`: fail if they were not frozen until then."""

    held: bool = False

    @property
    def text(self) -> str:
        """A line for people."""
        return "thaw the guest's file systems"


class RequireRoots(Verb, frozen=True, kw_only=True, tag="require-roots"):
    """Fail unless each device (by backend) now stands on the node: success is what the graph says."""

    roots: dict[str, str]

    @property
    def text(self) -> str:
        """A line for people."""
        return "the graph shows " + ", ".join(f"{backend} on {node}" for backend, node in self.roots.items())


class CheckServers(Verb, frozen=True, kw_only=True, tag="check-servers"):
    """Fail unless the server of each of these NBD URIs accepts a connection from us (target -> URI), and flushes those."""

    uris: dict[str, str]
    flush: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """A line for people."""
        return "the servers of the destinations accept: " + ", ".join(self.uris)


class ReadBack(Verb, frozen=True, kw_only=True, tag="read-back"):
    """Read a sector of each disk as the guest would, and fail unless what is behind it answers. target -> drive.

    A server that died after the drain leaves a switched disk on a dead destination, without a job's error.
    """

    disks: dict[str, str]

    @property
    def text(self) -> str:
        """A line for people."""
        return "what the disks now stand on answers: " + ", ".join(self.disks)


Step = (
    files.ClaimFile
    | files.CreateImage
    | files.RemoveFile
    | files.SyncFiles
    | files.FlushFiles
    | AddNode
    | RemoveNode
    | RequireSize
    | SetBacking
    | TakeSnapshots
    | CommitDown
    | StartMirror
    | StartCommit
    | StartStream
    | FinalizeStream
    | RequireBacking
    | files.DropFile
    | CancelJob
    | RequireReady
    | CompleteJobs
    | FinalizeJobs
    | AwaitReady
    | DrainMirrors
    | DismissJobs
    | Launch
    | EndQemu
    | SetLimits
    | Stop
    | Resume
    | Freeze
    | Thaw
    | RequireRoots
    | CheckServers
    | ReadBack
    | tracking.AddBitmap
    | tracking.RemoveBitmap
    | tracking.CountAsWritten
    | tracking.RequireNothingWritten
    | tracking.OpenAgain
    | tracking.LeaveDestination
    | StartBackup
    | files.NameBacking
    | files.MendBacking
    | files.RemoveCopy
    | files.ShareBlocks
)
