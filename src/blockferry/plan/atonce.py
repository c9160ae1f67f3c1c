"""Planning a move that is over at once: all images are raw files that share their blocks with their destinations.

A mirror that copies nothing of what is there (`sync none`) begins first, so that whatever the guest writes from then on is
carried over; then the destination shares the source's blocks, as they are at some instant after that, while the guest
writes. What it wrote before the instant is in the blocks, what it writes after it comes by the mirror: no overlay is laid, and
nothing has to be written down afterwards. Why that loses nothing: docs/adr/0019-shared-under-a-mirror.md.
"""

from __future__ import annotations

import msgspec

from blockferry.model.domain import Observation
from blockferry.model.graph import Disk
from blockferry.model.move import Move, MovedDisk
from blockferry.model.snapshot import Snapshot
from blockferry.plan.destinations import Files
from blockferry.plan.files import ShareBlocks
from blockferry.plan.move import going_over, open_destinations
from blockferry.plan.plan import Names, Plan
from blockferry.plan.snapshot import written_out
from blockferry.plan.steps import StartMirror
from blockferry.plan.window import plan_window


def plan_at_once(
    move: Move,
    seen: Observation,
    disks: tuple[tuple[MovedDisk, Disk], ...],
    *,
    names: Names,
    files: Files,
    snapshots: tuple[Snapshot, ...],
) -> Plan:
    """The plan of the whole of such a move, but for comparing and removing the sources.

    Args:
        move: all of it; nothing of it has begun.
        seen: the domain as observed.
        disks: each as it is moved, and as it is now.
        names: of nodes and jobs.
        files: of the destinations.
        snapshots: the domain's.

    Raises:
        Refused: any of its kinds, with nothing done.
    """
    mirrors, opens = open_destinations(move, seen, disks, names=names, files=files)
    starting = (
        *opens,
        *written_out((disk for _moved, disk in disks), seen),
        *(StartMirror.of(mirror, "none") for mirror in mirrors),
        *(ShareBlocks(source=moved.source, file=moved.file) for moved in move.disks),
    )
    pivot = plan_window(
        move.domain,
        seen,
        mirrors,
        names=names,
        ends_on="destination",
        what="move",
        bases={},
        starting=starting,
    )
    shared = msgspec.structs.replace(move, methods={moved.source: "reflink" for moved in move.disks})
    plan = going_over(shared, pivot, mirrors, names=names, operation=move.operation, snapshots=snapshots)
    # Its mirrors are never recorded: they begin and end in this one operation.
    return msgspec.structs.replace(
        plan,
        what="move",
        text=f"move {', '.join(f'{moved.target} to {moved.file} (shared blocks)' for moved in move.disks)}",
        record=msgspec.structs.replace(plan.record, ended={}),
    )
