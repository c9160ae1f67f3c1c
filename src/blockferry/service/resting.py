"""Mirrors whose guest was gone: what is there of them, and establishing them again on one that runs."""

from __future__ import annotations

from blockferry import errors
from blockferry.engine.keeper import Keeper
from blockferry.model.blockjob import Mirror
from blockferry.plan.resting import Ground, Look, flaw, lost_with_guest, plan_again
from blockferry.qemu.nbd import reachable
from blockferry.service.desk import Desk


async def look(desk: Desk, mirror: Mirror, ground: Ground | None) -> Look:
    """What is there of a mirror's destination, and why it can't be used, where that shows."""
    if not mirror.file.startswith("/"):
        return Look(fact=None, problem=flaw(mirror, ground, None) or await reachable(mirror.file))
    fact = (await desk.images.facts((mirror.file,)))[mirror.file]
    stamps = await desk.images.stamps((mirror.file, *mirror.stamps))
    problem = flaw(mirror, ground, fact)
    stamp, claim = stamps.get(mirror.file), desk.journal.claim(mirror.operation, mirror.file)
    if problem is None and stamp is not None and claim not in (None, (stamp.device, stamp.inode)):
        problem = "another file is there now"
    if problem is None and ground is not None:
        (head, *_below) = await desk.images.chain(mirror.file, mirror.format)
        other = f"it has {head.virtual_size} bytes now, and the disk has {ground.size}"
        problem = head.problem or (None if head.virtual_size == ground.size else other)
    return Look(fact=fact, stamps=stamps, problem=problem)


def left(desk: Desk, domain: str) -> tuple[Mirror, ...]:
    """The mirrors that were lost because the QEMU of an attached guest ended."""
    return tuple(mirror for mirror in desk.journal.mirrors(domain) if lost_with_guest(mirror))


async def resume(desk: Desk, keeper: Keeper) -> tuple[str, ...]:
    """Establish them again, each for itself; what there is to say of it. The caller holds the domain's lock."""
    said = []
    for mirror in left(desk, keeper.name):
        seen = await keeper.observe()
        ground = Ground.running(seen.disk(mirror.target), seen.graph)
        there = await look(desk, mirror, ground)
        problem = there.problem
        if problem is None and ground is not None:
            number, _names = desk.names()
            try:
                await keeper.run(number, plan_again(mirror, ground, there))
            except errors.OperationFailed as failure:
                problem = failure.reason
        said.append(
            f"{mirror.target} is mirrored to {mirror.file} again"
            if problem is None
            else f"{mirror.target} can't be mirrored to {mirror.file} again: {problem}"
        )
    return tuple(said)
