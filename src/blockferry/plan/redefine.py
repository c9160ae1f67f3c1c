"""Planning that a snapshot which was taken, here or elsewhere, is remembered: no disk is touched."""

from __future__ import annotations

from itertools import pairwise

from blockferry import errors
from blockferry.model.files import Chains, ImageFact
from blockferry.model.snapshot import RedefinedDisk, Redefinition, Snapshot, SnapshotDisk
from blockferry.plan.destinations import same_file
from blockferry.plan.history import current_snapshot, descendants, in_order, not_current
from blockferry.plan.plan import Plan, Record

# What is said of the guest where the dump does not say it: libvirt's word.
UNKNOWN_STATE = "disk-snapshot"
# QEMU's when it was given none.
NO_UUID = "00000000-0000-0000-0000-000000000000"


def unknown_backings(wanted: Redefinition, snapshots: tuple[Snapshot, ...], chains: Chains) -> tuple[str, ...]:
    """The overlays whose headers are to be read: nothing else says what they back onto."""
    return tuple(
        disk.file
        for disk in wanted.disks
        if disk.backing is None
        and _known(disk, _existing(wanted, snapshots)) is None
        and _under(disk, chains) is None
        and disk.target in chains
    )


def plan_redefine(
    domain: str,
    wanted: Redefinition,
    snapshots: tuple[Snapshot, ...],
    *,
    chains: Chains,
    uuid: str | None,
    headers: Chains,
    current: bool,
) -> Plan:
    """The plan of remembering a snapshot: a record alone.

    Args:
        domain: its name.
        wanted: the snapshot.
        snapshots: those that are remembered of the domain.
        chains: what its disks are on now.
        uuid: the guest's.
        headers: by path, of every one in `unknown_backings`.
        current: whether it must be the current one then.

    Raises:
        InvalidXml: it is of another domain, or contradicts what is remembered or there.
        ImageUnsuitable: nothing says what an overlay backs onto.
        SnapshotNotCurrent: it would not be.
    """
    if wanted.name is None:
        raise _refused("name", "a redefinition says the snapshot's name: it has no <name>")
    _require_domain(domain, uuid, wanted)
    existing = _existing(wanted, snapshots)
    _require_parent(domain, wanted.name, wanted.parent, snapshots)
    _require_disks(wanted, chains)
    snapshot = Snapshot(
        domain=domain,
        name=wanted.name,
        created=_created(wanted, existing),
        state=wanted.state or (existing.state if existing is not None else UNKNOWN_STATE),
        parent=wanted.parent,
        # What the guest went on on here, a dump of before does not know.
        reverted=wanted.reverted if existing is None else existing.reverted,
        description=wanted.description,
        disks=tuple(_disk(disk, existing, chains, headers) for disk in wanted.disks),
        left_out=wanted.left_out,
    )
    if existing is not None:
        _require_the_same(domain, snapshot, existing)
    if current:
        _require_current(snapshot, snapshots, chains)
    return Plan(
        what="redefine",
        text=f"redefine snapshot {snapshot.name}",
        record=Record(changed=(snapshot,)) if existing is not None else Record(snapshot=snapshot),
        notes=tuple(note for disk in snapshot.disks if (note := _note(disk, chains)) is not None),
    )


def remembered(plan: Plan) -> Snapshot:
    """The snapshot that such a plan remembers."""
    (snapshot,) = (*plan.record.changed, *([plan.record.snapshot] if plan.record.snapshot is not None else []))
    return snapshot


def _refused(place: str, reason: str) -> errors.InvalidXml:
    return errors.InvalidXml(element=f"domainsnapshot/{place}", reason=reason)


def _existing(wanted: Redefinition, snapshots: tuple[Snapshot, ...]) -> Snapshot | None:
    return next((each for each in snapshots if each.name == wanted.name), None)


def _require_domain(domain: str, uuid: str | None, wanted: Redefinition) -> None:
    if wanted.domain is not None and wanted.domain != domain:
        raise _refused("domain/name", f"it is a snapshot of {wanted.domain[:80]!r}, and this is {domain}")
    if wanted.uuid is not None and uuid not in (None, NO_UUID) and wanted.uuid.lower() != str(uuid).lower():
        raise _refused("domain/uuid", f"it is a snapshot of {wanted.uuid[:80]!r}, and {domain} is {uuid}")


def _require_parent(domain: str, name: str, parent: str | None, snapshots: tuple[Snapshot, ...]) -> None:
    if parent is None:
        return
    if parent == name:
        raise _refused("parent", f"{name!r} can't be its own parent")
    if all(each.name != parent for each in snapshots):
        raise _refused("parent", f"{domain} has no snapshot {parent!r}: redefine that one first")
    if any(each.name == parent for each in descendants(name, snapshots)):
        raise _refused("parent", f"{parent!r} was taken on {name!r} itself")


def _require_disks(wanted: Redefinition, chains: Chains) -> None:
    """Every disk is one of the domain's, and no overlay is in another disk's chain."""
    targets = [*(disk.target for disk in wanted.disks), *wanted.left_out]
    for target in targets:
        if target not in chains:
            known = ", ".join(chains) or "none"
            raise _refused(
                "disks", f"there is no disk {target!r}; the domain has {known}, and a dump names their targets"
            )
    for disk in wanted.disks:
        for other, chain in chains.items():
            if other != disk.target and any(same_file(image.path, disk.file) for image in chain):
                raise _refused("disks", f"{disk.file} is in the chain of {other}, and can't be {disk.target}'s")


def _created(wanted: Redefinition, existing: Snapshot | None) -> float:
    """A dump that is not ours has whole seconds: what is remembered more exactly stays."""
    if existing is not None and not wanted.exact and int(existing.created) == int(wanted.created):
        return existing.created
    return wanted.created


def _disk(disk: RedefinedDisk, existing: Snapshot | None, chains: Chains, headers: Chains) -> SnapshotDisk:
    known = _known(disk, existing)
    backing, backing_format = disk.backing, disk.backing_format
    if backing is None and known is not None:
        backing, backing_format = known.backing, known.backing_format
    if backing is None and (under := _under(disk, chains)) is not None:
        backing, backing_format = under.path, under.format
    if backing is None:
        head = headers[disk.file][0]
        backing, backing_format = head.backing, head.backing_format
        if head.problem or backing is None or backing_format is None:
            why = head.problem or "its header names no backing file with its format"
            raise errors.ImageUnsuitable(
                path=disk.file, reason=f"neither the XML nor {disk.target}'s chain says what it backs onto, and {why}"
            )
    return SnapshotDisk(
        target=disk.target,
        file=disk.file,
        format="qcow2",
        block=disk.block,
        backing=backing,
        backing_format=str(backing_format),
        mode=disk.mode,
        mirror=disk.mirror.file if disk.mirror is not None else None,
        mirror_backing=disk.mirror.backing if disk.mirror is not None else None,
        mirror_backing_format=disk.mirror.backing_format if disk.mirror is not None else None,
    )


def _known(disk: RedefinedDisk, existing: Snapshot | None) -> SnapshotDisk | None:
    """What is remembered of this overlay already."""
    disks = existing.disks if existing is not None else ()
    return next((each for each in disks if (each.target, each.file) == (disk.target, disk.file)), None)


def _under(disk: RedefinedDisk | SnapshotDisk, chains: Chains) -> ImageFact | None:
    """The image under the overlay in the disk's chain."""
    chain = chains.get(disk.target, ())
    return next((below for above, below in pairwise(chain) if same_file(above.path, disk.file)), None)


def _require_the_same(domain: str, snapshot: Snapshot, existing: Snapshot) -> None:
    """Redefined, a snapshot is still the same: only what is said of it may be another."""
    if {disk.target: disk for disk in snapshot.disks} != {disk.target: disk for disk in existing.disks}:
        was = "; ".join(f"{disk.target} is {disk.file} on {disk.backing}" for disk in existing.disks)
        words = f"{domain} has a snapshot {snapshot.name!r} of other images ({was})"
        raise _refused("disks", f"{words}: forget that one first (`blockferry snapshot delete --metadata`)")
    if snapshot.state != existing.state:
        words = f"the guest was {existing.state} when {snapshot.name!r} was taken, and this says {snapshot.state}"
        raise _refused("state", words)


def _require_current(snapshot: Snapshot, snapshots: tuple[Snapshot, ...], chains: Chains) -> None:
    """Refuse it where the guest is on other images: which snapshot is current is seen, never said."""
    reason = not_current(snapshot, chains)
    others = tuple(each for each in snapshots if each.name != snapshot.name)
    after = in_order(tuple(sorted((*others, snapshot), key=lambda each: (each.created, each.name))))
    found = current_snapshot(after, chains)
    if reason is None and found != snapshot.name:
        reason = f"the guest is on the images of {found} as well, which is newer"
    if reason is not None:
        raise errors.SnapshotNotCurrent(domain=snapshot.domain, snapshot=snapshot.name, reason=reason)


def _note(disk: SnapshotDisk, chains: Chains) -> str | None:
    """What to know of a disk whose images are not as the snapshot has them."""
    under = _under(disk, chains)
    if under is not None and not same_file(under.path, disk.backing):
        return f"{disk.target}: {disk.file} backs onto {under.path} now, not onto {disk.backing}: it can't be merged"
    if under is None:
        return f"{disk.target}: {disk.file} is not on another image in its chain now: it can't be merged"
    return None
