"""Planning a revert: a guest that is shut off goes on from what its images were at a snapshot."""

from __future__ import annotations

import os

import msgspec

from blockferry import errors
from blockferry.model.blockjob import Mirror
from blockferry.model.definition import Definition
from blockferry.model.files import ImageFact
from blockferry.model.snapshot import Snapshot, SnapshotDisk
from blockferry.plan.destinations import NEW_OVERLAY_BYTES, Apart, Files, Room, require_new
from blockferry.plan.files import ClaimFile, CreateImage
from blockferry.plan.plan import Plan, Record
from blockferry.plan.steps import Step


def overlay_of(disk: SnapshotDisk, snapshot: Snapshot, operation: int) -> str:
    """The file of the overlay that a revert makes on a disk's image as of the snapshot: beside the one of the snapshot."""
    folder, base = os.path.split(disk.file)
    return os.path.join(folder, f"{os.path.splitext(base)[0]}.{snapshot.name}-r{operation}")


def plan_revert(
    definition: Definition, snapshot: Snapshot, *, operation: int, files: Files, resting: tuple[Mirror, ...]
) -> Plan:
    """The plan of a revert: a new overlay on each image as of the snapshot, all disks or none.

    What was written since stays where it is, on images that no chain has any more, until somebody deletes them.

    Args:
        definition: the guest, which is shut off.
        snapshot: where to.
        operation: its number.
        files: of each overlay to be made, with the headers of each image as of the snapshot.
        resting: mirrors of the guest; those of the snapshot's disks have nothing to mirror any more.

    Raises:
        Refused: any of its kinds, with nothing done.
    """
    targets = {disk.target: disk for disk in definition.disks}
    steps: list[Step] = []
    apart, room = Apart(), Room()
    made: dict[str, str] = {}
    for disk in snapshot.disks:
        if disk.target not in targets:
            known = ", ".join(targets) or "no disks"
            raise errors.NoSuchDisk(domain=definition.name, disk=disk.target, known=known)
        head = _whole(files.images.get(disk.backing, ()), disk)
        path = overlay_of(disk, snapshot, operation)
        fact = files.facts[path]
        apart.add(fact)
        require_new(fact, files.users)
        room.take(fact, NEW_OVERLAY_BYTES)
        steps += [
            ClaimFile(path=path, like=disk.backing),
            CreateImage(
                path=path,
                format="qcow2",
                size=head.virtual_size,
                backing=disk.backing,
                backing_format=disk.backing_format,
            ),
        ]
        made[disk.target] = path
    steps = [step for verb in (ClaimFile, CreateImage) for step in steps if isinstance(step, verb)]
    reverted = {target: (*snapshot.reverted.get(target, ()), path) for target, path in made.items()}
    return Plan(
        what="revert",
        text=f"revert {definition.name} to snapshot {snapshot.name}",
        prepare=tuple(steps),
        record=Record(
            authoritative=made,
            formats=dict.fromkeys(made, "qcow2"),
            changed=(msgspec.structs.replace(snapshot, reverted=reverted),),
            ended={mirror.target: "lost" for mirror in resting if mirror.target in made},
            reason=f"the guest was reverted to snapshot {snapshot.name}",
        ),
        offline=True,
    )


def _whole(chain: tuple[ImageFact, ...], disk: SnapshotDisk) -> ImageFact:
    if disk.written_into:
        reason = "a commit that did not end has written into it, or into what is under it: it is not what it was at the snapshot"
        raise errors.ImageUnsuitable(path=disk.backing, reason=reason)
    if not chain:
        raise errors.ImageUnsuitable(path=disk.backing, reason="it was not looked at")
    for image in chain:
        if image.problem:
            raise errors.ImageUnsuitable(path=image.path, reason=image.problem)
    return chain[0]
