"""What is answered: documented, versioned shapes (docs/json.md), the same in process, over HTTP and with --json.

Every answer is an object with `version` (1) and `kind`.
"""

from __future__ import annotations

from typing import Any

import msgspec

VERSION = 1


class _View(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    pass


class ImageView(msgspec.Struct, frozen=True, kw_only=True):
    """A layer of a chain: its file, format and virtual size in bytes."""

    file: str
    format: str
    virtual_size: int


class MirrorView(msgspec.Struct, frozen=True, kw_only=True):
    """A disk's mirror.

    `state` is copying, ready, pivoted, finished, cancelled, removed or lost; `job` is libvirt's word for it, `copy`;
    `current` and `total` are bytes, while it works.
    """

    file: str
    format: str
    state: str
    reason: str | None = None
    job: str = "copy"
    snapshot: str | None = None
    current: int | None = None
    total: int | None = None


class MovingView(msgspec.Struct, frozen=True, kw_only=True):
    """That a disk is part of a move which is not over, where it goes, and how far that is.

    `state` and `phase` are the move's; `current` and `total` are bytes: of its images while they are copied outside QEMU, of
    its mirror then.
    """

    operation: int
    file: str
    state: str
    phase: str
    current: int
    total: int


class DiskView(msgspec.Struct, frozen=True, kw_only=True):
    """A disk. `source` and `format` are the active image's, None for an empty drive."""

    target: str
    qdev: str
    bus: str
    device: str
    read_only: bool
    source: str | None
    format: str | None
    virtual_size: int | None
    chain: tuple[ImageView, ...]
    mirror: MirrorView | None = None
    moving: MovingView | None = None


class DomainView(_View, frozen=True, kw_only=True, tag="domain"):
    """A domain.

    `state` is QEMU's run state, or `unreachable`, `gone` (of one that was attached) or `shut off` (of one that is defined);
    `reason` says why for the first two, and how a guest that is shut off ended when nobody ended it. `agent` is the socket of its guest agent. `notes` say what of its definition is not carried out, when it was just defined.
    """

    name: str
    qmp: str
    state: str
    pid: int | None
    disks: tuple[DiskView, ...]
    qemu: str | None = None
    reason: str | None = None
    current_snapshot: str | None = None
    xml: str | None = None
    defined: bool = False
    agent: str | None = None
    notes: tuple[str, ...] = ()
    version: int = VERSION


class DomainRow(msgspec.Struct, frozen=True, kw_only=True):
    """A domain in the list."""

    name: str
    state: str
    qmp: str
    pid: int | None
    disks: int
    mirrors: int


class DomainList(_View, frozen=True, kw_only=True, tag="domains"):
    """All domains, by name."""

    domains: tuple[DomainRow, ...]
    version: int = VERSION


class GraphDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A disk's device. `root` is the node that it uses, None for an empty drive."""

    target: str
    bus: str
    device: str
    qdev: str
    read_only: bool
    root: str | None


class GraphNode(msgspec.Struct, frozen=True, kw_only=True):
    """A block node.

    `id` is its name in QEMU. `kind` is `filter`, `format`, `protocol` (it reads and writes bytes: `file` says where) or, of
    a guest that is shut off, `image`: then `id` is the image's file. `read_only` says whether it is open so now.
    """

    id: str
    kind: str
    driver: str
    file: str | None
    virtual_size: int | None
    read_only: bool


class GraphEdge(msgspec.Struct, frozen=True, kw_only=True):
    """That the node `parent` uses the node `child` as its `role`: `backing`, `file`..."""

    parent: str
    role: str
    child: str


class GraphJob(msgspec.Struct, frozen=True, kw_only=True):
    """A block job.

    `type` and `state` are those of a `job`; of one that is not ours they are QEMU's, and `operation` is None. `source` and
    `dest` are the nodes that data comes from and goes to, as far as there are any; `file` is where it goes. `base` is the
    node that a mirror's destination is to back onto once the guest goes over; None when it does already, or stands alone.
    """

    id: str
    type: str
    state: str
    disk: str | None
    source: str | None
    dest: str | None
    file: str | None
    current: int
    total: int
    base: str | None = None
    operation: int | None = None
    snapshot: str | None = None
    reason: str | None = None


class GraphUser(msgspec.Struct, frozen=True, kw_only=True):
    """What uses a node and is neither a disk nor a job: a firmware's drive; an export, which has no `name`."""

    name: str
    node: str


class GraphView(_View, frozen=True, kw_only=True, tag="graph"):
    """A domain's block graph. `unused` are nodes that nobody uses, the topmost of what hangs together."""

    domain: str
    state: str
    devices: tuple[GraphDevice, ...]
    nodes: tuple[GraphNode, ...]
    edges: tuple[GraphEdge, ...]
    jobs: tuple[GraphJob, ...]
    users: tuple[GraphUser, ...] = ()
    unused: tuple[str, ...] = ()
    version: int = VERSION


class SnapshotDiskView(msgspec.Struct, frozen=True, kw_only=True):
    """A disk of a snapshot: the overlay, the image as of the snapshot, and the mirror with its state.

    `written_into`: a commit has begun to write into that image; if it does not end, the image is not what it was.
    """

    target: str
    source: str
    format: str
    backing: str
    backing_format: str
    mirror: MirrorView | None = None
    written_into: bool = False


class SnapshotView(_View, frozen=True, kw_only=True, tag="snapshot"):
    """A snapshot. `created` is seconds since 1970.

    `parent` and `children` are the snapshots before and after it, `current` the one whose images the guest writes to. When it
    was just taken `left_out` names disks that took no part, with the reason, `notes` say what to know of it, and `frozen_ms` how
    long the guest's file systems stood frozen at most.
    """

    domain: str
    name: str
    created: float
    state: str
    parent: str | None
    current: bool
    description: str | None
    disks: tuple[SnapshotDiskView, ...]
    xml: str | None = None
    operation: int | None = None
    children: tuple[str, ...] = ()
    left_out: dict[str, str] = msgspec.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    frozen_ms: float | None = None
    version: int = VERSION


class InternalSnapshotView(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot inside a qcow2 image in a disk's chain: listed, and nothing is done with it.

    `id` is its number in that image, `created` seconds since 1970, `memory` bytes of the guest's memory that it holds.
    """

    name: str
    target: str
    file: str
    id: str
    created: float
    memory: int = 0


class SnapshotList(_View, frozen=True, kw_only=True, tag="snapshots"):
    """A domain's snapshots, oldest first; `internal` are those inside its images."""

    domain: str
    snapshots: tuple[SnapshotView, ...]
    internal: tuple[InternalSnapshotView, ...] = ()
    version: int = VERSION


class JobView(_View, frozen=True, kw_only=True, tag="job"):
    """A block job that works, or how the last one on that disk ended.

    `type` is copy, mirror, commit, active-commit, rebase or fill (a copy whose lower layers come first). `state` is copying
    or ready (a copy or mirror) or running (the others) while it works; then pivoted, finished, done, cancelled, removed or
    lost. `current` and `total` are bytes, `speed` bytes per second (0: no limit). `dest` is what is written to.
    """

    domain: str
    disk: str
    source: str
    dest: str
    format: str
    state: str
    current: int
    total: int
    speed: int
    operation: int
    snapshot: str | None = None
    reason: str | None = None
    type: str = "copy"
    base: str | None = None
    notes: tuple[str, ...] = ()
    version: int = VERSION


class JobList(_View, frozen=True, kw_only=True, tag="jobs"):
    """Jobs by target."""

    domain: str
    jobs: tuple[JobView, ...]
    version: int = VERSION


class MoveDiskView(msgspec.Struct, frozen=True, kw_only=True):
    """A disk of a move: where it comes from and goes to, and which way, with the reason."""

    target: str
    source: str
    dest: str
    format: str
    strategy: str
    why: str


class MoveFileView(msgspec.Struct, frozen=True, kw_only=True):
    """An image that is copied outside QEMU.

    `copied` and `total` are bytes, holes with them; `method` is reflink, copy_file_range or read-write once all of it is copied.
    """

    source: str
    file: str
    copied: int
    total: int
    method: str | None = None


class MoveDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a disk, from `offset` on, that differ and were not written since the pivot."""

    target: str
    offset: int
    length: int


class MoveView(_View, frozen=True, kw_only=True, tag="move"):
    """A move.

    `state` is working, standing still, cancelling, done or cancelled; `phase` what is done next or now: copy, mirror, pivot,
    verify, end; back. `files` are copied outside QEMU, `copied` and `total` bytes of all of them. `verified` is sample or full
    once a comparison has ended; `differences` what it found. A move is given up at its `deadline` (seconds since the epoch) if its guest has not gone over by then.
    `left` are images of the old places that are still there. `next` is what can be typed now.
    """

    domain: str
    operation: int
    state: str
    phase: str
    disks: tuple[MoveDiskView, ...]
    files: tuple[MoveFileView, ...] = ()
    copied: int = 0
    total: int = 0
    pivoted: bool = False
    pause_ms: float | None = None
    deadline: float | None = None
    verified: str | None = None
    compared: int = 0
    differences: tuple[MoveDifference, ...] = ()
    left: tuple[str, ...] = ()
    reason: str | None = None
    left_out: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    next: tuple[str, ...] = ()
    version: int = VERSION


class MovePart(msgspec.Struct, frozen=True, kw_only=True):
    """How far a disk (its target), a file that is copied outside QEMU (its path) or the `comparison` is: bytes, bytes per second.

    `converging` is false of a mirror that the guest's writes outrun; `state` is `comparing`, or as of a job.
    """

    name: str
    state: str
    current: int
    total: int
    rate: float | None = None
    converging: bool | None = None


class MoveProgress(_View, frozen=True, kw_only=True, tag="move-progress"):
    """How far a move is in its phase: each part of it, and in all.

    `state` and `phase` are the move's. `remaining_seconds` is the time left of this phase at that rate, None when it can't be
    said; `converging` is false when the guest's writes outrun any mirror.
    """

    domain: str
    operation: int
    time: float
    state: str
    phase: str
    parts: tuple[MovePart, ...]
    current: int
    total: int
    rate: float | None = None
    remaining_seconds: float | None = None
    converging: bool | None = None
    version: int = VERSION


class PlannedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that a move would make: `what` says how, `bytes` what is copied into it at first, `room` what it may take up."""

    file: str
    what: str
    bytes: int
    room: int


class StorageRow(msgspec.Struct, frozen=True, kw_only=True):
    """A storage with a limit: `bandwidth` bytes per second, and how many mirrors and copies of moves write to it now."""

    folder: str
    bandwidth: int
    writers: int


class StorageList(_View, frozen=True, kw_only=True, tag="storages"):
    """The storages that have a limit, by folder."""

    storages: tuple[StorageRow, ...]
    version: int = VERSION


class PlanView(_View, frozen=True, kw_only=True, tag="plan"):
    """What would be done (--dry-run): nothing has been. `left_out` names disks that take no part, with the reason.

    Of a move: `files`; `room` bytes that they may take up, by file system (a path on it); `seconds` that the copying takes at
    the rate that was allowed, or seen last, None where neither is known; `pause_ms` how long the guest is to stand still.
    """

    domain: str
    operation: str
    steps: tuple[str, ...]
    left_out: dict[str, str] = msgspec.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: tuple[PlannedFile, ...] = ()
    room: dict[str, int] = {}
    seconds: float | None = None
    pause_ms: float | None = None
    version: int = VERSION


class StepView(msgspec.Struct, frozen=True, kw_only=True):
    """A step: `state` is intent, done, failed or undone; times are seconds since 1970."""

    index: int
    stretch: str
    text: str
    state: str
    started: float
    ended: float | None
    error: str | None = None


class OperationView(_View, frozen=True, kw_only=True, tag="operation"):
    """An operation.

    `state` is running, in-progress, done, undone or unsettled; `pause_ms` is how long the guest stood still, from
    QEMU's own clock, `frozen_ms` how long its file systems stood frozen at most; `next` is what can be typed now; `row` is the row of the recovery table, after a crash.
    """

    id: int
    domain: str
    what: str
    state: str
    text: str
    started: float
    ended: float | None
    error: str | None = None
    row: str | None = None
    pause_ms: float | None = None
    frozen_ms: float | None = None
    steps: tuple[StepView, ...] = ()
    next: tuple[str, ...] = ()
    version: int = VERSION


class OperationList(_View, frozen=True, kw_only=True, tag="operations"):
    """Operations, oldest first, without their steps."""

    operations: tuple[OperationView, ...]
    version: int = VERSION


class Event(_View, frozen=True, kw_only=True, tag="event"):
    """Something that happened. `seq` grows by one an event in a state directory; `data` depends on `type`.

    Progress events have `seq` 0: they are never recorded.
    """

    seq: int
    time: float
    type: str
    domain: str
    disk: str | None = None
    data: dict[str, Any] = msgspec.field(default_factory=dict)
    version: int = VERSION


class EventList(_View, frozen=True, kw_only=True, tag="events"):
    """Recorded events, oldest first. `last` is the newest number there is."""

    events: tuple[Event, ...]
    last: int
    version: int = VERSION


class RecoveredOperation(msgspec.Struct, frozen=True, kw_only=True):
    """What recovery made of one operation: `row` of the table in ARCHITECTURE.md, and why."""

    operation: int
    domain: str
    what: str
    row: str
    why: str
    state: str
    next: tuple[str, ...] = ()


class RecoveryReport(_View, frozen=True, kw_only=True, tag="recovery"):
    """What recovery found and did. `unreachable` names domains whose QEMU could not be asked, with the reason."""

    operations: tuple[RecoveredOperation, ...]
    unreachable: dict[str, str] = msgspec.field(default_factory=dict)
    version: int = VERSION


class Done(_View, frozen=True, kw_only=True, tag="done"):
    """It was done; `text` says what, `operation` is the number of the operation when there was one."""

    text: str
    operation: int | None = None
    pause_ms: float | None = None
    version: int = VERSION


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What doctor found: `severity` ok, note or problem, a stable `code`, what is so, and what to type (`next`).

    `domain` and `disk` say what it is about, where it is about one.
    """

    severity: str
    code: str
    text: str
    domain: str | None = None
    disk: str | None = None
    next: tuple[str, ...] = ()


class Findings(_View, frozen=True, kw_only=True, tag="findings"):
    """What doctor found, of a domain or (`domain` null) of the host; `problems` counts those of that severity."""

    domain: str | None
    findings: tuple[Finding, ...]
    problems: int
    version: int = VERSION


View = (
    DomainView
    | DomainList
    | GraphView
    | SnapshotView
    | SnapshotList
    | JobView
    | JobList
    | MoveView
    | MoveProgress
    | StorageList
    | PlanView
    | OperationView
    | OperationList
    | Event
    | EventList
    | RecoveryReport
    | Findings
    | Done
)
