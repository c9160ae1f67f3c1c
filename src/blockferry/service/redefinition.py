"""Remembering a snapshot that was taken: from its XML, without a word to QEMU but what its disks are on."""

from __future__ import annotations

import msgspec

from blockferry import errors
from blockferry.formats.names import valid_name
from blockferry.formats.redefinition import parse_redefinition
from blockferry.model import request as ask
from blockferry.model.flags import SnapshotCreate
from blockferry.model.snapshot import Redefinition
from blockferry.plan.plan import Plan
from blockferry.plan.redefine import plan_redefine, unknown_backings
from blockferry.service.desk import Desk

# These say how a snapshot is taken, and none is; ATOMIC, DISK_ONLY and VALIDATE it is in any case.
_FLAGS = (
    SnapshotCreate.REDEFINE
    | SnapshotCreate.CURRENT
    | SnapshotCreate.ATOMIC
    | SnapshotCreate.DISK_ONLY
    | SnapshotCreate.VALIDATE
)


async def redefine(desk: Desk, request: ask.CreateSnapshot) -> tuple[int, Plan]:
    """Remember the snapshot that a request describes; the operation and its plan, carried out unless it is a dry run.

    Raises:
        Refused: any of its kinds, with nothing done.
    """
    wanted = _wanted(request)
    flags = SnapshotCreate(request.flags)
    async with desk.holding(request.domain) as keeper:
        now = await desk.chains_now(keeper)
        snapshots = desk.journal.snapshots(request.domain)
        unknown = unknown_backings(wanted, snapshots, now.chains)
        plan = plan_redefine(
            request.domain,
            wanted,
            snapshots,
            chains=now.chains,
            uuid=now.uuid,
            headers={path: await desk.images.chain(path, "qcow2") for path in unknown},
            current=bool(flags & SnapshotCreate.CURRENT),
        )
        operation, _names = desk.names(dry_run=request.dry_run)
        if not request.dry_run:
            await keeper.run(operation, plan)
        return operation, plan


def _wanted(request: ask.CreateSnapshot) -> Redefinition:
    flags = SnapshotCreate(request.flags)
    if not flags & SnapshotCreate.REDEFINE:
        raise errors.BadRequest(reason="CURRENT is for a snapshot that is redefined: say REDEFINE as well")
    if flags & ~_FLAGS:
        raise errors.BadRequest(reason=f"REDEFINE takes no snapshot, and {flags & ~_FLAGS!r} says how one is taken")
    if request.xml is None or request.wish is not None:
        raise errors.BadRequest(reason="a snapshot is redefined from XML")
    wanted = parse_redefinition(request.xml)
    for field in ("name", "description"):
        said, inside = getattr(request, field), getattr(wanted, field)
        if said is not None and inside not in (None, said):
            raise errors.BadRequest(reason=f"the XML's {field} is {inside!r}, and the request says {said!r}")
        wanted = msgspec.structs.replace(wanted, **{field: said if said is not None else inside})
    if wanted.name is not None and not valid_name(wanted.name):
        raise errors.InvalidName(name=wanted.name)
    return wanted
