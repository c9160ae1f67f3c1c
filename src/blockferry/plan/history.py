"""The snapshots that are remembered: their tree, which is current, and what becomes of them when layers are merged."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from blockferry.model.blockjob import ChainJob
from blockferry.model.files import Chains
from blockferry.model.snapshot import Snapshot, SnapshotDisk


def in_order(snapshots: tuple[Snapshot, ...]) -> tuple[Snapshot, ...]:
    """Each after the one that it was taken on, whatever the clocks of their hosts said; otherwise as they come."""
    by_name = {snapshot.name: snapshot for snapshot in snapshots}
    placed: dict[str, Snapshot] = {}
    for snapshot in snapshots:
        line: dict[str, Snapshot] = {}
        above: Snapshot | None = snapshot
        while above is not None and above.name not in placed and above.name not in line:
            line[above.name] = above
            above = by_name.get(above.parent) if above.parent is not None else None
        placed |= {each.name: each for each in reversed(line.values())}
    return tuple(placed.values())


def current_snapshot(snapshots: tuple[Snapshot, ...], chains: Chains) -> str | None:
    """The newest snapshot whose overlays are what the guest writes to; None when there is none."""
    for snapshot in reversed(snapshots):
        if not_current(snapshot, chains) is None:
            return snapshot.name
    return None


def not_current(snapshot: Snapshot, chains: Chains) -> str | None:
    """Why the snapshot is not the current one: a disk whose active image is not the snapshot's overlay."""
    for disk in snapshot.disks:
        chain = chains.get(disk.target, ())
        if not chain:
            return f"disk {disk.target} is not there"
        if chain[0].path not in (disk.file, *snapshot.reverted.get(disk.target, ())):
            return f"{disk.target} is on {chain[0].path}, not on {disk.file}"
    return None


def descendants(name: str, snapshots: tuple[Snapshot, ...]) -> tuple[Snapshot, ...]:
    """The snapshots that were taken on top of that one, and on top of those, oldest first."""
    found: set[str] = {name}
    below = []
    for snapshot in snapshots:
        if snapshot.parent in found and snapshot.name not in found:
            found.add(snapshot.name)
            below.append(snapshot)
    return tuple(below)


def children(name: str, snapshots: tuple[Snapshot, ...]) -> tuple[str, ...]:
    """The names of the snapshots that were taken directly on top of that one."""
    return tuple(snapshot.name for snapshot in snapshots if snapshot.parent == name)


def while_committed(
    snapshots: tuple[Snapshot, ...], jobs: Mapping[str, ChainJob], above: Mapping[str, str | None]
) -> tuple[Snapshot, ...]:
    """The snapshots that commits write into from their beginning on, marked: they stay so if a commit does not end.

    Args:
        snapshots: the domain's.
        jobs: the commits, by target.
        above: as `after_commit`'s, by target.
    """
    found = []
    for snapshot in snapshots:
        disks = tuple(
            msgspec.structs.replace(disk, written_into=True)
            if disk.target in jobs and _kept(disk, jobs[disk.target], above[disk.target]) is None
            else disk
            for disk in snapshot.disks
        )
        if disks != snapshot.disks:
            found.append(msgspec.structs.replace(snapshot, disks=disks))
    return tuple(found)


def after_commit(
    snapshots: tuple[Snapshot, ...], job: ChainJob, above: str | None
) -> tuple[tuple[Snapshot, ...], tuple[str, ...]]:
    """The snapshots that are others once a commit has ended, and those that are no more.

    What a snapshot kept of a disk is the image under its overlay. Where that was written over, the snapshot keeps
    nothing of the disk any more; where the overlay stays and what is under it was merged down, the same data is now in the
    commit's base.

    Args:
        snapshots: the domain's.
        job: the commit.
        above: the file of the overlay of its topmost layer; None for an active commit. No other image that backs onto a
            merged layer (of a snapshot that the guest has left behind) finds its data in the base.
    """
    changed: dict[str, Snapshot] = {}
    gone: dict[str, str | None] = {}
    for snapshot in snapshots:
        disks = tuple(
            kept for disk in snapshot.disks if (kept := disk if disk.target != job.target else _kept(disk, job, above))
        )
        if not disks:
            gone[snapshot.name] = snapshot.parent
        elif disks != snapshot.disks:
            changed[snapshot.name] = msgspec.structs.replace(snapshot, disks=disks)
    for snapshot in snapshots:
        parent = snapshot.parent
        while parent in gone:
            parent = gone[parent]
        if snapshot.name not in gone and parent != snapshot.parent:
            now = changed.get(snapshot.name, snapshot)
            changed[snapshot.name] = msgspec.structs.replace(now, parent=parent)
    return tuple(changed.values()), tuple(gone)


def _kept(disk: SnapshotDisk, job: ChainJob, above: str | None) -> SnapshotDisk | None:
    """A snapshot's disk once a commit of that disk has ended; None when what it kept is written over."""
    base, leaving = job.base, {layer.file for layer in job.leaving}
    if base is None:
        return disk
    if disk.file in leaving or disk.backing == base.file:
        return None
    if disk.backing in leaving:
        if disk.file != above:
            return None
        return msgspec.structs.replace(disk, backing=base.file, backing_format=base.format)
    return disk


def after_forgetting(forgotten: Snapshot, snapshots: tuple[Snapshot, ...]) -> tuple[Snapshot, ...]:
    """The snapshots that are others once that one is no more: its children become its parent's."""
    return tuple(
        msgspec.structs.replace(snapshot, parent=forgotten.parent)
        for snapshot in snapshots
        if snapshot.parent == forgotten.name
    )
