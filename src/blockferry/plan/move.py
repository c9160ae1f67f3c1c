"""Planning the parts of a move that was begun: its mirrors, the instant, its end; and what comes next.

A move is several operations, each with its own plan and record: it begins (`plan.placement`), then its mirrors start, then
all disks go over at one instant. Between them images that nobody writes are copied outside QEMU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from blockferry import errors
from blockferry.model.blockjob import BlockJob, ChainJob, Mirror
from blockferry.model.domain import Observation
from blockferry.model.files import FileFact
from blockferry.model.graph import Disk, Node
from blockferry.model.move import Layer, Move, MovedDisk
from blockferry.model.snapshot import Snapshot
from blockferry.plan import destinations as dest
from blockferry.plan.chain import commit_job, start_of
from blockferry.plan.copy import close_job, open_export
from blockferry.plan.destinations import Files, is_uri
from blockferry.plan.disks import find_disk, require_mirrorable, require_suitable
from blockferry.plan.files import ClaimFile, CreateImage, DropFile, NameBacking, RemoveCopy
from blockferry.plan.plan import Names, Plan, Record
from blockferry.plan.steps import AddNode, StartMirror, Step
from blockferry.plan.tracking import AddBitmap

# The role of a destination's bitmap, which counts what the guest writes from the pivot on.
COUNTED = "v"
# And that of a node with a copy of it, while source and destination are compared (qemu.compare).
COPIED = "w"
Next = Literal["copy", "mirror", "pivot", "verify", "end", "back"]


def next_of(move: Move, jobs: Mapping[str, BlockJob]) -> Next:
    """What is to be done next with a move that works: it follows from what is there.

    Args:
        move: as recorded.
        jobs: the newest of each disk, by target.
    """
    if move.state == "cancelling":
        return "back"
    if move.pivoted:
        return "verify" if move.verify != "none" and move.verdict is None else "end"
    if any(layer.source not in move.methods for layer in move.layers):
        return "copy"
    return "mirror" if waiting(move, jobs) else "pivot"


def mirrors_of(move: Move, jobs: Mapping[str, BlockJob]) -> tuple[Mirror, ...]:
    """The mirrors of a move that work."""
    found = [jobs.get(disk.target) for disk in move.disks]
    return tuple(
        job for job in found if isinstance(job, Mirror) and job.move == move.operation and job.state == "active"
    )


def waiting(move: Move, jobs: Mapping[str, BlockJob]) -> tuple[MovedDisk, ...]:
    """The disks of a move that no mirror works for."""
    at_work = {mirror.target for mirror in mirrors_of(move, jobs)}
    return tuple(disk for disk in move.disks if disk.target not in at_work)


def plan_mirrors(
    move: Move,
    seen: Observation,
    disks: tuple[MovedDisk, ...],
    *,
    names: Names,
    files: Files,
    claimed: frozenset[str],
    speeds: Mapping[str, int],
) -> Plan:
    """The plan of starting a move's mirrors; what they stand on has been copied.

    Args:
        move: as recorded.
        seen: the domain as observed.
        disks: those that no mirror works for.
        names: of nodes and jobs.
        files: of the destinations, and the exports.
        claimed: destinations that the move has created before.
        speeds: target -> bytes per second, 0 for no limit.

    Raises:
        DiskUnsuitable: a disk is not on the image that it was on.
        Refused: any other of its kinds, with nothing done.
    """
    named = tuple(
        NameBacking(
            path=layer.file, format=layer.format, backing=layer.backing, backing_format=str(layer.backing_format)
        )
        for layer in layers_of(move, disks)
        if layer.backing is not None
    )
    observed = tuple((moved, require_unchanged(move, moved, seen)) for moved in disks)
    mirrors, starting = start_mirrors(move, seen, observed, names=names, files=files, claimed=claimed, speeds=speeds)
    return Plan(
        what="move-mirror",
        text=f"mirror {', '.join(f'{disk.target} to {disk.file}' for disk in disks)} (move {move.operation})",
        prepare=(*named, *starting),
        record=Record(authoritative={disk.target: disk.stands_on for disk in disks}, jobs=mirrors),
    )


def start_mirrors(
    move: Move,
    seen: Observation,
    disks: tuple[tuple[MovedDisk, Disk], ...],
    *,
    names: Names,
    files: Files,
    speeds: Mapping[str, int],
    claimed: frozenset[str] = frozenset(),
) -> tuple[tuple[Mirror, ...], tuple[Step, ...]]:
    """The mirrors of some disks, and what begins them.

    Args:
        move: theirs.
        seen: the domain as observed, with which disks are at work.
        disks: each as it is moved, and as it is now.
        names: of nodes and jobs.
        files: of the destinations.
        speeds: target -> bytes per second, 0 for no limit.
        claimed: destinations that the move has created before.

    Raises:
        Refused: any of its kinds, with nothing done.
    """
    mirrors, opens = open_destinations(move, seen, disks, names=names, files=files, claimed=claimed)
    starts = (
        StartMirror.of(
            mirror, "full" if moved.overlay is None and moved.backing is None else "top", speeds.get(mirror.target, 0)
        )
        for mirror, (moved, _disk) in zip(mirrors, disks, strict=True)
    )
    return mirrors, (*opens, *starts)


def open_destinations(
    move: Move,
    seen: Observation,
    disks: tuple[tuple[MovedDisk, Disk], ...],
    *,
    names: Names,
    files: Files,
    claimed: frozenset[str] = frozenset(),
) -> tuple[tuple[Mirror, ...], tuple[Step, ...]]:
    """The mirrors of some disks, and what makes and opens their destinations, verb by verb.

    Args:
        move: theirs.
        seen: the domain as observed.
        disks: each as it is moved, and as it is now.
        names: of nodes and jobs.
        files: of the destinations.
        claimed: destinations that the move has created before.

    Raises:
        Refused: any of its kinds, with nothing done.
    """
    steps: list[Step] = []
    mirrors = []
    together = sum(disk.active.virtual_size for _moved, disk in disks)
    for moved, disk in disks:
        require_mirrorable(move.domain, disk, seen)
        # Who has asked for the guest's writes to be held has no use for a copy that makes way for them.
        at_work = moved.target in seen.at_work and not move.converge
        buffer = dest.buffer_of(moved.file, disk.active.virtual_size, together, at_work=at_work)
        mirror = _mirror(move, moved, disk, names=names, files=files, buffer=buffer)
        like = seen.graph.nodes[seen.graph.protocol(disk.active.node)]
        if is_uri(moved.file):
            # Asked again: QEMU, and the guest with it, would wait for a server that hangs by now.
            dest.require_export(moved.file, files, disk.active.virtual_size)
            steps += open_export(mirror, disk)
        else:
            made_before = moved.file in claimed
            steps += _open_file(moved, mirror, disk, like, files.facts[moved.file], made_before=made_before)
        mirrors.append(mirror)
    made = (step for verb in (ClaimFile, CreateImage, AddNode) for step in steps if isinstance(step, verb))
    return tuple(mirrors), tuple(made)


def layers_of(move: Move, disks: tuple[MovedDisk, ...]) -> tuple[Layer, ...]:
    """The images of some disks that were copied outside QEMU: those of others QEMU may have open already, and write to."""
    sources = {source for moved in disks for source in moved.layers}
    return tuple(layer for layer in move.layers if layer.source in sources)


def require_unchanged(move: Move, moved: MovedDisk, seen: Observation) -> Disk:
    """A moved disk, if the guest is still on the image that it was on.

    Raises:
        NoSuchDisk, DiskUnsuitable: it is not.
    """
    disk = find_disk(move.domain, seen, moved.target)
    if not disk.chain or disk.active.file != moved.stands_on:
        on = disk.active.file if disk.chain else "nothing"
        reason = f"it is on {on} now, and move {move.operation} left it on {moved.stands_on}"
        raise errors.DiskUnsuitable(domain=move.domain, disk=moved.target, reason=reason)
    return disk


def _mirror(
    move: Move, moved: MovedDisk, disk: Disk, *, names: Names, files: Files, buffer: Mapping[str, int]
) -> Mirror:
    export = files.exports.get(moved.file)
    return Mirror(
        domain=move.domain,
        target=moved.target,
        operation=move.operation,
        move=move.operation,
        job=names.of(moved.target, "m"),
        source_node=disk.active.node,
        source=disk.active.file,
        device=disk.filtered,
        node=names.of(moved.target, "x"),
        file_node=names.of(moved.target, "xf"),
        filter_node=names.of(moved.target, "t"),
        file=moved.file,
        format=moved.file_format,
        backing=moved.backing,
        backing_format=moved.backing_format,
        stands_for=moved.chain[1] if moved.backing is not None else None,
        options={**buffer, **({"copy-mode": "write-blocking"} if move.converge else {})},
        multi_conn=export is not None and export.multi_conn,
    )


def _open_file(
    moved: MovedDisk, mirror: Mirror, disk: Disk, like: Node, fact: FileFact, *, made_before: bool
) -> list[Step]:
    """Make a mirror's destination, where it is not a copy that is there already, and open it."""
    steps: list[Step] = []
    if moved.overlay is not None:
        if fact.kind != "file":
            raise errors.ImageUnsuitable(path=moved.file, reason="the copy that was made there is gone")
    else:
        if fact.kind == "absent":
            steps.append(ClaimFile(path=moved.file, like=dest.owner_like(like)))
        elif fact.kind == "file" and not made_before:
            raise errors.DestinationExists(path=moved.file)
        if fact.kind != "block" or moved.file_format == "qcow2":
            steps.append(
                CreateImage(
                    path=moved.file,
                    format=moved.file_format,
                    size=disk.active.virtual_size,
                    backing=moved.backing,
                    backing_format=moved.backing_format,
                    overwrites=fact.kind == "block",
                )
            )
    options = dest.image_options(moved.file_format, mirror.file_node, fact, like)
    if moved.file_format == "qcow2":
        options["backing"] = None
    return [*steps, AddNode(node=mirror.node, options=options)]


def going_over(
    move: Move,
    plan: Plan,
    mirrors: tuple[Mirror, ...],
    *,
    names: Names,
    operation: int,
    snapshots: tuple[Snapshot, ...],
) -> Plan:
    """The plan of the instant, made of a pivot's: what is written from then on is counted, for whoever compares."""
    window = plan.window
    # All of them or none: a window of some would leave the others on images that count as left.
    if window is None or {mirror.target for mirror in mirrors} != set(move.targets):
        raise AssertionError(plan)
    if move.verify != "none":
        counted = [AddBitmap(node=mirror.node, bitmap=names.of(mirror.target, COUNTED)) for mirror in mirrors]
        window = msgspec.structs.replace(window, steps=(*window.steps, *counted))
    record = msgspec.structs.replace(
        plan.record,
        move=msgspec.structs.replace(move, pivot=operation, reason=None),
        changed=moved_snapshots(move, snapshots),
    )
    return msgspec.structs.replace(
        plan, what="move-pivot", text=f"{plan.text} (move {move.operation})", window=window, record=record
    )


def names_kept(moves: Iterable[Move], tag: str) -> frozenset[str]:
    """The names of bitmaps and nodes that comparisons need which have not ended, of moves of that state directory under way."""
    comparing = [move for move in moves if move.pivot is not None and move.verify != "none"]
    return frozenset(
        Names(tag, move.pivot or 0).of(target, role)
        for move in comparing
        for target in move.targets
        for role in (COUNTED, COPIED)
    )


def moved_snapshots(move: Move, snapshots: tuple[Snapshot, ...]) -> tuple[Snapshot, ...]:
    """The snapshots that are others once their images are elsewhere; what was flattened is not theirs any more."""
    where = {layer.source: layer.file for layer in move.layers}
    where |= {disk.source: disk.file for disk in move.disks if disk.backing is not None}
    changed = []
    for snapshot in snapshots:
        disks = tuple(
            msgspec.structs.replace(disk, file=where[disk.file], backing=where[disk.backing])
            if disk.target in move.targets and disk.file in where and disk.backing in where
            else disk
            for disk in snapshot.disks
        )
        if disks != snapshot.disks:
            changed.append(msgspec.structs.replace(snapshot, disks=disks))
    return tuple(changed)


def plan_end(move: Move, *, drop: tuple[str, ...] = ()) -> Plan:
    """The plan of a move's end: recorded, and the sources removed that nobody else has a use for."""
    return Plan(
        what="move-end",
        text=f"move {move.operation} is done",
        record=Record(move=msgspec.structs.replace(move, state="done", reason=None)),
        settle=tuple(DropFile(path=path) for path in drop),
        offline=True,
    )


def plan_back(move: Move, seen: Observation, *, names: Names, operation: int) -> Plan | None:
    """The plan of writing a move's overlays down into the images that they were laid over; None when none is left.

    Raises:
        Refused: a disk is busy.
    """
    jobs: list[ChainJob] = []
    starts: list[Step] = []
    for moved in move.disks:
        disk = find_disk(move.domain, seen, moved.target)
        if moved.overlay is None or not disk.chain or disk.active.file != moved.overlay:
            continue
        require_suitable(move.domain, disk, seen)
        top, base = disk.chain[0], disk.chain[1]
        jobs.append(commit_job(move.domain, disk, top, base, names=names, operation=operation, remove=True))
        starts.append(start_of(jobs[-1], disk))
    if not jobs:
        return None
    return Plan(
        what="move-back",
        text=f"write what was written since move {move.operation} began down into {', '.join(str(job.base and job.base.file) for job in jobs)}",
        prepare=tuple(starts),
        record=Record(authoritative={job.target: job.top.file for job in jobs}, jobs=tuple(jobs)),
    )


def plan_given_up(move: Move, *, reason: str | None = None) -> Plan:
    """The plan of a move's end that was given up, once no overlay of it is left; or for that `reason`, with them.

    Args:
        move: as recorded.
        reason: why its overlays stay.
    """
    return Plan(
        what="move-cancel",
        text=f"move {move.operation} is given up",
        record=Record(move=msgspec.structs.replace(move, state="cancelled", reason=reason or move.reason)),
    )


def plan_give_up(move: Move, mirrors: tuple[Mirror, ...], claims: Mapping[str, tuple[int, int]], reason: str) -> Plan:
    """The plan of giving a move up: its mirrors end, and its copies are removed; its overlays are still there.

    Args:
        move: as recorded.
        mirrors: those that work.
        claims: path -> device and inode of the copies that it has created.
        reason: why.
    """
    return Plan(
        what="move-cancel",
        text=f"give move {move.operation} up",
        record=Record(
            ended={mirror.target: "cancelled" for mirror in mirrors},
            reason=reason,
            move=msgspec.structs.replace(move, state="cancelling", reason=reason),
        ),
        settle=(
            *(step for mirror in mirrors for step in close_job(mirror)),
            *(RemoveCopy(path=path, device=device, inode=inode) for path, (device, inode) in claims.items()),
        ),
        offline=not mirrors,
    )
