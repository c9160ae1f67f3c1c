"""Snapshots and mirrors as blockferry remembers them, and as a caller asks for them."""

from __future__ import annotations

from typing import Literal

import msgspec


class MirrorWish(msgspec.Struct, frozen=True, kw_only=True):
    """A `<mirror>` that a caller asks for.

    Attributes:
        file: the destination's path; created as qcow2.
        backing: what it backs onto; None for the same image as the source's overlay.
        backing_format: the backing's format; None for the format of the image that the source's overlay backs onto.
    """

    file: str
    backing: str | None = None
    backing_format: str | None = None


class DiskWish(msgspec.Struct, frozen=True, kw_only=True):
    """A `<disk>` of a snapshot that a caller asks for.

    Attributes:
        name: a target, a qdev id, or the path of an image in the chain.
        snapshot: `external`, or `no` to leave the disk out.
        file: the overlay's path; None for a generated one.
        mirror: where its writes are to go as well.
    """

    name: str
    snapshot: Literal["external", "no"] = "external"
    file: str | None = None
    mirror: MirrorWish | None = None


class SnapshotWish(msgspec.Struct, frozen=True, kw_only=True):
    """A `<domainsnapshot>` that a caller asks for.

    Attributes:
        name: None for a generated one (seconds since 1970, as libvirt).
        description: free text.
        disks: those that are spoken of.
        only_these: leave all other disks out, as the command with --disk; libvirt's XML snapshots them too.
    """

    name: str | None = None
    description: str | None = None
    disks: tuple[DiskWish, ...] = ()
    only_these: bool = False


class SnapshotDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk of a snapshot that was taken.

    Attributes:
        target: the disk's.
        file: the overlay, what the guest has written to since.
        format: the overlay's.
        backing: the image as of the snapshot.
        backing_format: its format.
        mirror: the mirror's destination, when it was asked for.
        mirror_backing: what the destination backs onto.
        mirror_backing_format: its format.
    """

    target: str
    file: str
    format: str
    backing: str
    backing_format: str
    mirror: str | None = None
    mirror_backing: str | None = None
    mirror_backing_format: str | None = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot that was taken.

    Attributes:
        domain: its domain's name.
        name: unique in the domain.
        created: seconds since 1970.
        state: the guest's run state at that moment.
        parent: the snapshot that was current before, or None.
        disks: those that took part.
        left_out: targets of those that took none.
        description: free text.
    """

    domain: str
    name: str
    created: float
    state: str
    disks: tuple[SnapshotDisk, ...]
    left_out: tuple[str, ...] = ()
    parent: str | None = None
    description: str | None = None


MirrorEnd = Literal["active", "pivoted", "finished", "cancelled", "removed", "lost"]


class Mirror(msgspec.Struct, frozen=True, kw_only=True):
    """A mirror or copy that was started, with all that is needed to go on with it after a restart.

    Attributes:
        domain: its domain's name.
        target: the disk's.
        operation: the operation that started it.
        snapshot: the snapshot that it belongs to; None for a block copy.
        job: QEMU's job id.
        source_node: the node that is mirrored.
        source: the source's file.
        node: the destination's format node.
        file_node: the destination's protocol node.
        filter_node: the filter that QEMU puts above the source while it runs.
        file: the destination's path or URI.
        format: the destination's format.
        backing: what the destination backs onto; None when it stands alone.
        backing_format: its format.
        state: `active` until it ended; then how.
        reason: why it was lost or removed, in QEMU's own words where there are any.
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
    snapshot: str | None = None
    backing: str | None = None
    backing_format: str | None = None
    state: MirrorEnd = "active"
    reason: str | None = None
