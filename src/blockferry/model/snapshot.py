"""Snapshots and mirrors as blockferry remembers them, and as a caller asks for them."""

from __future__ import annotations

from typing import Literal

import msgspec

# What an overlay's header says of its backing: `existing` takes a file that is there as it is; `none` names no backing,
# for those who give QEMU the chain themselves.
Mode = Literal["existing", "absolute", "relative", "none"]


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
        mode: what the overlay's header, and the mirror's, say of the backing; None for the request's.
        mirror: where its writes are to go as well.
    """

    name: str
    snapshot: Literal["external", "no"] = "external"
    file: str | None = None
    mode: Mode | None = None
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
        block: whether that is a block device.
        backing: the image as of the snapshot.
        backing_format: its format.
        mode: what was asked for of the overlay's header; None for absolute.
        mirror: the mirror's destination, when it was asked for.
        mirror_backing: what the destination backs onto.
        mirror_backing_format: its format.
        written_into: whether a commit has begun to write into what the snapshot keeps of the disk. One that ends takes the
            disk out of the snapshot; after one that does not, `backing` is not what it was at the snapshot.
    """

    target: str
    file: str
    format: str
    backing: str
    backing_format: str
    written_into: bool = False
    block: bool = False
    mode: Mode | None = None
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
        reverted: target -> overlays that were made on its images when the guest was brought back to it, the newest last.
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
    reverted: dict[str, tuple[str, ...]] = {}
    description: str | None = None


class RedefinedDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk of a snapshot that was taken, as a dump has it.

    Attributes:
        target: the disk's.
        file: the overlay.
        block: whether that is a block device.
        backing: the image as of the snapshot; None where the dump does not say.
        backing_format: its format.
        mode: of the overlay's header; None for absolute.
        mirror: its mirror, as it was asked for.
    """

    target: str
    file: str
    block: bool = False
    backing: str | None = None
    backing_format: str | None = None
    mode: Mode | None = None
    mirror: MirrorWish | None = None


class Redefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot that was taken, here or elsewhere, as a dump has it.

    Attributes:
        name: the snapshot's; None when the dump does not say.
        created: seconds since 1970.
        exact: whether a dump of ours said so, with what is below the second.
        state: the guest's run state at that moment, None where the dump does not say; `shutoff` when it was shut off.
        disks: those that took part.
        left_out: targets of those that took none.
        parent: the snapshot that it was taken on.
        reverted: as of a Snapshot.
        description: free text.
        domain: the name of the domain that it is of, where the dump says.
        uuid: and its UUID.
    """

    name: str | None
    created: float
    disks: tuple[RedefinedDisk, ...]
    exact: bool = False
    state: str | None = None
    left_out: tuple[str, ...] = ()
    parent: str | None = None
    reverted: dict[str, tuple[str, ...]] = {}
    description: str | None = None
    domain: str | None = None
    uuid: str | None = None
