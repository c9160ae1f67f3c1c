"""What can be asked of the service: one frozen value a request, the same in process and over HTTP.

On the wire a request is a JSON object whose `request` member says which one it is.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from blockferry.model.move import Verify
from blockferry.model.snapshot import SnapshotWish


class _Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="request", forbid_unknown_fields=True):
    pass


class Attach(_Request, frozen=True, kw_only=True, tag="attach"):
    """Take charge of a running guest. `qmp` is an absolute socket path; `timeout` seconds for the greeting.

    `agent` is the socket of its guest agent's channel, None where it is not known or stays what it was. With `resume_mirrors`
    the mirrors that it had when its QEMU ended are established again.
    """

    domain: str
    qmp: str
    timeout: float = 5.0
    agent: str | None = None
    resume_mirrors: bool = False


class Detach(_Request, frozen=True, kw_only=True, tag="detach"):
    """Let go of a guest; it runs on. Refused while a copy or mirror of ours works."""

    domain: str


class Define(_Request, frozen=True, kw_only=True, tag="define"):
    """Remember a guest that is started here, from libvirt's domain XML; one of that name that is shut off is replaced."""

    xml: str


class Undefine(_Request, frozen=True, kw_only=True, tag="undefine"):
    """Forget a guest that is shut off; its images stay."""

    domain: str


class Start(_Request, frozen=True, kw_only=True, tag="start"):
    """Start a defined guest, with its mirrors.

    `paused` leaves it paused; with `require_mirrors` a mirror that can't be established again keeps it from starting.
    """

    domain: str
    paused: bool = False
    require_mirrors: bool = False


class Stop(_Request, frozen=True, kw_only=True, tag="stop"):
    """Shut a defined guest down: by ACPI, within `timeout` seconds; with `force` its QEMU is ended as it is."""

    domain: str
    timeout: float = 60.0
    force: bool = False


class Suspend(_Request, frozen=True, kw_only=True, tag="suspend"):
    """Pause a guest's processors."""

    domain: str


class Resume(_Request, frozen=True, kw_only=True, tag="resume"):
    """Let a paused guest run."""

    domain: str


class ListDomains(_Request, frozen=True, kw_only=True, tag="list"):
    """All attached domains."""


class ShowDomain(_Request, frozen=True, kw_only=True, tag="show"):
    """One domain with its disks, chains and mirrors, and its XML: of how it is now, or (`inactive`) is started next."""

    domain: str
    inactive: bool = False


class ShowGraph(_Request, frozen=True, kw_only=True, tag="graph"):
    """One domain's block graph: devices, nodes, who uses what, and the jobs that work on it."""

    domain: str


class CreateSnapshot(_Request, frozen=True, kw_only=True, tag="snapshot-create"):
    """Take a snapshot, from XML or from a wish. `flags` are SnapshotCreate's.

    `name` and `description` fill in what the XML leaves out.
    """

    domain: str
    xml: str | None = None
    name: str | None = None
    description: str | None = None
    wish: SnapshotWish | None = None
    flags: int = 0
    dry_run: bool = False


class ListSnapshots(_Request, frozen=True, kw_only=True, tag="snapshot-list"):
    """A domain's snapshots."""

    domain: str


class ShowSnapshot(_Request, frozen=True, kw_only=True, tag="snapshot-show"):
    """One snapshot, with its XML."""

    domain: str
    snapshot: str


class DeleteSnapshot(_Request, frozen=True, kw_only=True, tag="snapshot-delete"):
    """Delete a snapshot; `flags` are SnapshotDelete's. `timeout` seconds for its mirrors to be ready."""

    domain: str
    snapshot: str
    flags: int = 0
    timeout: float = 60.0
    dry_run: bool = False


class RevertSnapshot(_Request, frozen=True, kw_only=True, tag="snapshot-revert"):
    """Bring a defined guest back to a snapshot; it is shut off then, or started again (`start`), or paused (`pause`)."""

    domain: str
    snapshot: str
    start: bool = False
    pause: bool = False


class StartCopy(_Request, frozen=True, kw_only=True, tag="copy"):
    """Start a block copy.

    `base` is an image of the chain that the copy is to back onto, None for a whole copy. `format` None is the source's;
    `bandwidth` bytes per second, 0 for no limit; `granularity` (None for QEMU's) and `buf_size` (None for ours) bytes. `flags` are BlockCopy's.
    `resume` goes on with the copy to `dest` that was cancelled or lost.
    """

    domain: str
    disk: str
    dest: str
    base: str | None = None
    format: str | None = None
    bandwidth: int = 0
    granularity: int | None = None
    buf_size: int | None = None
    flags: int = 0
    resume: bool = False
    dry_run: bool = False


class Rebase(_Request, frozen=True, kw_only=True, tag="rebase"):
    """Pull into a disk's active image what lies between it and `base` (None: everything), while the guest runs.

    On a disk that is being copied onto the same base this joins that copy. `bandwidth` bytes per second, 0 for no limit.
    """

    domain: str
    disk: str
    base: str | None = None
    bandwidth: int = 0
    flags: int = 0
    dry_run: bool = False


class Commit(_Request, frozen=True, kw_only=True, tag="commit"):
    """Write the layers from `top` (None: the active image) to above `base` (None: the bottom) down into the base.

    `bandwidth` bytes per second, 0 for no limit; `flags` are BlockCommit's.
    """

    domain: str
    disk: str
    top: str | None = None
    base: str | None = None
    bandwidth: int = 0
    flags: int = 0
    dry_run: bool = False


class ListJobs(_Request, frozen=True, kw_only=True, tag="job-list"):
    """The copies and mirrors of a domain."""

    domain: str


class PivotJobs(_Request, frozen=True, kw_only=True, tag="job-pivot"):
    """Let the guest go on on the destinations of these disks, all at one instant or none."""

    domain: str
    disks: tuple[str, ...]
    timeout: float = 60.0


class FinishJobs(_Request, frozen=True, kw_only=True, tag="job-finish"):
    """Make the destinations of these disks consistent copies of one instant; the guest stays on its sources."""

    domain: str
    disks: tuple[str, ...]
    timeout: float = 60.0


class CancelJobs(_Request, frozen=True, kw_only=True, tag="job-cancel"):
    """Stop the copies or mirrors of these disks. The destination files stay, incomplete."""

    domain: str
    disks: tuple[str, ...]


class SetJobSpeed(_Request, frozen=True, kw_only=True, tag="job-speed"):
    """Limit a copy to `bandwidth` bytes per second; 0 lifts the limit."""

    domain: str
    disk: str
    bandwidth: int


class MoveStorage(_Request, frozen=True, kw_only=True, tag="move"):
    """Move a guest's disks to the directory `dest` while it runs; all go over at one instant or none does.

    `disks` are those that are moved, each to a file of that name (None: its own name), a block device or an NBD URI; nothing
    there means all. `format` is the new images', `keep` each its own; `chain` keeps the images under the active ones or makes
    one image of each disk. `bandwidth` is bytes per second of the whole move, 0 for no limit; `max_pause_ms` keeps it
    mirroring while a longer pause is to be expected; `converge` makes the guest's writes wait for the destination. A move
    whose guest has not gone over within `deadline` seconds, more than 0, is given up.
    `verify` compares source and destination afterwards; `delete_source` removes the sources at the end.
    """

    domain: str
    dest: str
    disks: dict[str, str | None] = {}
    format: Literal["keep", "qcow2", "raw"] = "keep"
    chain: Literal["keep", "flatten"] = "keep"
    strategy: Literal["auto", "mirror", "offload"] = "auto"
    bandwidth: int = 0
    max_pause_ms: int | None = None
    verify: Verify = "full"
    delete_source: bool = False
    converge: bool = False
    deadline: float | None = None
    dry_run: bool = False


class ShowMove(_Request, frozen=True, kw_only=True, tag="move-show"):
    """A move, by the number of its operation."""

    operation: int


class SetMoveSpeed(_Request, frozen=True, kw_only=True, tag="move-speed"):
    """Limit a move that is not over to `bandwidth` bytes per second; 0 lifts the limit."""

    operation: int
    bandwidth: int


class SetStorageSpeed(_Request, frozen=True, kw_only=True, tag="storage-speed"):
    """Limit what all moves together write to the file system of `folder` to `bandwidth` bytes per second; 0 lifts that."""

    folder: str
    bandwidth: int


class ListStorages(_Request, frozen=True, kw_only=True, tag="storage-list"):
    """The storages that have a limit."""


class ResumeOperation(_Request, frozen=True, kw_only=True, tag="operation-resume"):
    """Go on with a move that stands still, or with a copy that was cancelled or lost; with `verify` none a move is not compared."""

    operation: int
    verify: Literal["none"] | None = None


class CancelOperation(_Request, frozen=True, kw_only=True, tag="operation-cancel"):
    """Give up a move whose guest has not gone over yet, or a copy: the guest is where it was."""

    operation: int


class ListEvents(_Request, frozen=True, kw_only=True, tag="events"):
    """The events after number `since`, of one domain or of all."""

    domain: str | None = None
    since: int = 0


class ListOperations(_Request, frozen=True, kw_only=True, tag="operations"):
    """Operations, of one domain or of all."""

    domain: str | None = None


class ShowOperation(_Request, frozen=True, kw_only=True, tag="operation-show"):
    """One operation with its steps."""

    operation: int


class Recover(_Request, frozen=True, kw_only=True, tag="recover"):
    """Look at every operation that is not settled, and settle it."""


class Doctor(_Request, frozen=True, kw_only=True, tag="doctor"):
    """What is wrong, and what to type: of a domain, or (None) of the host, each domain in a line. Changes nothing."""

    domain: str | None = None


Request = (
    Attach
    | Detach
    | Define
    | Undefine
    | Start
    | Stop
    | Suspend
    | Resume
    | ListDomains
    | ShowDomain
    | ShowGraph
    | CreateSnapshot
    | ListSnapshots
    | ShowSnapshot
    | DeleteSnapshot
    | RevertSnapshot
    | StartCopy
    | Rebase
    | Commit
    | ListJobs
    | PivotJobs
    | FinishJobs
    | CancelJobs
    | SetJobSpeed
    | MoveStorage
    | ShowMove
    | SetMoveSpeed
    | SetStorageSpeed
    | ListStorages
    | ResumeOperation
    | CancelOperation
    | ListEvents
    | ListOperations
    | ShowOperation
    | Recover
    | Doctor
)
