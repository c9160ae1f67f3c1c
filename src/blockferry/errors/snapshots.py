"""Snapshots and their XML."""

from __future__ import annotations

from dataclasses import dataclass

from blockferry.errors.tree import Refused


@dataclass(eq=False)
class NoSuchSnapshot(Refused):
    """The domain has no snapshot of that name."""

    domain: str
    snapshot: str
    code = "no-such-snapshot"
    exit_status = 40
    template = "{domain} has no snapshot {snapshot!r}. `blockferry snapshot list {domain}` shows those that it has."


@dataclass(eq=False)
class SnapshotExists(Refused):
    """The snapshot's name is taken."""

    domain: str
    snapshot: str
    code = "snapshot-exists"
    exit_status = 41
    template = "{domain} has a snapshot {snapshot!r} already. Take another name."


@dataclass(eq=False)
class InvalidXml(Refused):
    """XML that is malformed, hostile or says what can't be done."""

    element: str
    reason: str
    code = "invalid-xml"
    exit_status = 42
    template = "the XML can't be used: {element}: {reason}. Nothing was done."


@dataclass(eq=False)
class UnsupportedFlag(Refused):
    """A flag that this version does not carry out."""

    call: str
    flag: str
    code = "unsupported-flag"
    exit_status = 43
    template = "{call} does not carry out {flag} in this version, and a flag is never ignored. Nothing was done."


@dataclass(eq=False)
class SnapshotHasMirrors(Refused):
    """A plain delete of a snapshot with mirrors."""

    domain: str
    snapshot: str
    code = "snapshot-has-mirrors"
    exit_status = 44
    template = (
        "snapshot {snapshot!r} of {domain} has mirrors: say --reopen-mirror (the guest goes on on them) or "
        "--remove-mirror (they are dropped). Nothing was done."
    )


@dataclass(eq=False)
class SnapshotNotCurrent(Refused):
    """Its images are not the ones that the guest writes to."""

    domain: str
    snapshot: str
    reason: str
    code = "snapshot-not-current"
    exit_status = 45
    template = "snapshot {snapshot!r} of {domain} is not current: {reason}. Nothing was done."


@dataclass(eq=False)
class NoMirror(Refused):
    """The snapshot has no mirror."""

    domain: str
    snapshot: str
    reason: str
    code = "no-mirror"
    exit_status = 46
    template = "snapshot {snapshot!r} of {domain} has no mirror to go over to: {reason}. Nothing was done."


@dataclass(eq=False)
class SnapshotInternal(Refused):
    """A snapshot inside a qcow2 image, which is listed and nothing else."""

    domain: str
    snapshot: str
    images: str
    code = "snapshot-internal"
    exit_status = 47
    template = (
        "snapshot {snapshot!r} of {domain} is internal, inside {images}: such are listed, and neither shown, reverted to nor "
        "deleted here. Nothing was done. Once the guest is shut off, `qemu-img snapshot -d {snapshot!r} IMAGE` deletes it "
        "from each image."
    )


@dataclass(eq=False)
class SnapshotNotMergeable(Refused):
    """A snapshot whose overlays can't be merged: the chain is another by now."""

    domain: str
    snapshot: str
    reason: str
    code = "snapshot-not-mergeable"
    exit_status = 48
    template = (
        "snapshot {snapshot!r} of {domain} can't be merged: {reason}. Nothing was done; --metadata forgets it and "
        "leaves its images as they are."
    )
