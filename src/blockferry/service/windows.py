"""The window, asked for by two rooms: a pivot, a finish, a reopen."""

from __future__ import annotations

from typing import Literal

from blockferry.engine.keeper import Keeper
from blockferry.journal.records import OperationRecord
from blockferry.model.blockjob import Mirror
from blockferry.model.domain import Observation
from blockferry.model.files import ImageFact
from blockferry.model.snapshot import Snapshot
from blockferry.plan.history import after_forgetting
from blockferry.plan.window import plan_window
from blockferry.service.desk import Desk


async def run_window(
    desk: Desk,
    keeper: Keeper,
    seen: Observation,
    mirrors: tuple[Mirror, ...],
    *,
    ends_on: Literal["destination", "source"],
    what: str,
    forget: Snapshot | None = None,
) -> OperationRecord:
    """Plan a window and pass it; the caller holds the domain.

    Args:
        desk: what the rooms share.
        keeper: the domain's.
        seen: the domain as observed.
        mirrors: those of the disks that take part; ready.
        ends_on: where the guest goes on.
        what: `pivot`, `finish` or `reopen`.
        forget: the snapshot that a reopen deletes.
    """
    bases: dict[str, tuple[ImageFact, ...]] = {
        mirror.target: await desk.images.chain(mirror.backing, mirror.backing_format)
        for mirror in mirrors
        if mirror.backing is not None and mirror.backing_format is not None
    }
    operation, names = desk.names()
    changed = after_forgetting(forget, desk.journal.snapshots(keeper.name)) if forget is not None else ()
    plan = plan_window(
        keeper.name,
        seen,
        mirrors,
        names=names,
        ends_on=ends_on,
        what=what,
        bases=bases,
        forget_snapshot=forget.name if forget is not None else None,
        changed=changed,
    )
    return await keeper.run(operation, plan)
