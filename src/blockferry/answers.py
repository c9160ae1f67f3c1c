"""From what was observed and remembered to what is answered: pure."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from blockferry.engine.executor import FROZEN_FROM, FROZEN_UNTIL
from blockferry.engine.progress import state_of
from blockferry.formats.defined import live_xml
from blockferry.formats.domain import domain_xml
from blockferry.formats.snapshot import snapshot_xml
from blockferry.model.blockjob import BlockJob, ChainJob, Mirror
from blockferry.model.operation import ENDED
from blockferry.model.view import (
    DiskView,
    DomainView,
    ImageView,
    InternalSnapshotView,
    JobView,
    MirrorView,
    MoveDifference,
    MoveDiskView,
    MoveFileView,
    MoveView,
    MovingView,
    OperationView,
    PlannedFile,
    SnapshotDiskView,
    SnapshotView,
    StepView,
)
from blockferry.plan.destinations import NEW_OVERLAY_BYTES

if TYPE_CHECKING:
    from blockferry.journal.records import DomainRecord, OperationRecord, StepRecord
    from blockferry.model.definition import Definition, DiskDef
    from blockferry.model.domain import Observation
    from blockferry.model.files import Chains, ImageFact
    from blockferry.model.graph import Disk
    from blockferry.model.job import Job
    from blockferry.model.move import Move
    from blockferry.model.snapshot import Snapshot, SnapshotDisk
    from blockferry.plan.destinations import Files
    from blockferry.plan.placement import Placed

# A mirror in one of these is not shown at its disk any more.
OVER = frozenset({"pivoted", "finished", "cancelled", "removed"})


def mirror_views(mirrors: tuple[Mirror, ...], seen: Observation | None) -> dict[str, MirrorView]:
    """The mirrors by target, with what QEMU says of those that work."""
    jobs: Mapping[str, Job] = seen.jobs if seen is not None else {}
    return {mirror.target: _mirror(mirror, jobs.get(mirror.job)) for mirror in mirrors}


def _mirror(mirror: Mirror, job: Job | None) -> MirrorView:
    working = job if mirror.state == "active" else None
    return MirrorView(
        file=mirror.file,
        format=mirror.format,
        state=state_of(mirror, job),
        reason=mirror.reason or (job.error if job is not None else None),
        snapshot=mirror.snapshot,
        current=working.current if working else None,
        total=working.total if working else None,
    )


def domain_view(
    record: DomainRecord,
    seen: Observation | None,
    mirrors: tuple[Mirror, ...],
    *,
    problem: tuple[str, str] | None = None,
    current: str | None = None,
    definition: str | None = None,
    moving: Mapping[str, MovingView] | None = None,
) -> DomainView:
    """A domain with its disks.

    Args:
        record: the domain.
        seen: as observed.
        mirrors: of its disks.
        problem: (`gone` or `unreachable`, why) when it could not be observed.
        current: its current snapshot.
        definition: the XML that it is started from, when we start it.
        moving: the disks that are being moved, by target.
    """
    views = mirror_views(mirrors, seen)
    if seen is None:
        state, reason = problem or ("unreachable", "it was not asked")
        return DomainView(
            name=record.name,
            qmp=record.qmp,
            state=state,
            reason=reason,
            pid=record.pid,
            agent=record.agent,
            disks=(),
            current_snapshot=current,
        )
    shown = {target: view for target, view in views.items() if view.state not in OVER}
    return DomainView(
        name=record.name,
        qmp=record.qmp,
        state=seen.status,
        pid=seen.pid,
        qemu=seen.capabilities.version,
        disks=tuple(_disk(disk, shown.get(disk.target), (moving or {}).get(disk.target)) for disk in seen.disks),
        agent=record.agent,
        current_snapshot=current,
        xml=domain_xml(record.name, seen, views) if definition is None else live_xml(definition, seen, views),
        defined=record.defined,
    )


def shut_off_view(
    record: DomainRecord,
    definition: Definition,
    chains: Chains,
    mirrors: tuple[Mirror, ...],
    *,
    xml: str,
    crash: str | None = None,
    current: str | None = None,
) -> DomainView:
    """A domain that is shut off, with its disks as they are started next; `crash` says how it ended, if nobody ended it."""
    views = mirror_views(mirrors, None)
    return DomainView(
        name=record.name,
        qmp=record.qmp,
        state="shut off",
        pid=None,
        disks=tuple(
            _defined_disk(disk, chains.get(disk.target, ()), views.get(disk.target)) for disk in definition.disks
        ),
        reason=f"nobody ended it: {crash}" if crash is not None else None,
        xml=xml,
        defined=True,
        agent=record.agent,
        current_snapshot=current,
    )


def _defined_disk(disk: DiskDef, chain: tuple[ImageFact, ...], mirror: MirrorView | None) -> DiskView:
    return DiskView(
        target=disk.target,
        qdev=disk.id,
        bus=disk.bus,
        device=disk.device,
        read_only=disk.read_only,
        source=disk.source.where if disk.source is not None else None,
        format=disk.source.format if disk.source is not None else None,
        # Of an export it is not known before it is opened.
        virtual_size=(chain[0].virtual_size or None) if chain else None,
        chain=tuple(
            ImageView(file=each.path, format=each.format, virtual_size=each.virtual_size or 0) for each in chain
        ),
        mirror=mirror if mirror is not None and mirror.state not in OVER else None,
    )


def _disk(disk: Disk, mirror: MirrorView | None, moving: MovingView | None) -> DiskView:
    active = disk.chain[0] if disk.chain else None
    return DiskView(
        target=disk.target,
        qdev=disk.qdev,
        bus=disk.bus,
        device=disk.device,
        read_only=disk.read_only,
        source=active.file if active else None,
        format=active.format if active else None,
        virtual_size=active.virtual_size if active else None,
        chain=tuple(
            ImageView(file=image.file, format=image.format, virtual_size=image.virtual_size) for image in disk.chain
        ),
        mirror=mirror,
        moving=moving,
    )


def snapshot_view(
    snapshot: Snapshot,
    mirrors: Mapping[str, MirrorView],
    *,
    current: bool,
    children: tuple[str, ...] = (),
    operation: int | None = None,
) -> SnapshotView:
    """A snapshot, with the state of its mirrors."""
    own = {target: view for target, view in mirrors.items() if view.snapshot == snapshot.name}
    return SnapshotView(
        domain=snapshot.domain,
        name=snapshot.name,
        created=snapshot.created,
        state=snapshot.state,
        parent=snapshot.parent,
        current=current,
        description=snapshot.description,
        disks=tuple(_snapshot_disk(disk, own.get(disk.target)) for disk in snapshot.disks),
        xml=snapshot_xml(snapshot, own, current),
        children=children,
        operation=operation,
    )


def _snapshot_disk(disk: SnapshotDisk, mirror: MirrorView | None) -> SnapshotDiskView:
    return SnapshotDiskView(
        target=disk.target,
        source=disk.file,
        format=disk.format,
        backing=disk.backing,
        backing_format=disk.backing_format,
        mirror=mirror if mirror is not None and mirror.file == disk.mirror else None,
        written_into=disk.written_into,
    )


def internal_views(chains: Chains) -> tuple[InternalSnapshotView, ...]:
    """The snapshots inside the images of these disks."""
    return tuple(
        InternalSnapshotView(
            name=each.name, target=target, file=image.path, id=each.id, created=each.created, memory=each.memory
        )
        for target, chain in chains.items()
        for image in chain
        for each in image.snapshots
    )


def job_view(ours: BlockJob, now: Mapping[str, Job]) -> JobView:
    """A job as people look at it, by what QEMU says of its jobs."""
    job = now.get(ours.job)
    source, dest, image_format = _ends(ours)
    base = ours.copy.backing if ours.copy is not None else None
    if isinstance(ours, ChainJob) and ours.base is not None:
        base = base or ours.base.file
    return JobView(
        domain=ours.domain,
        disk=ours.target,
        source=source,
        dest=dest,
        format=image_format,
        state=state_of(ours, job),
        current=job.current if job else 0,
        total=job.total if job else 0,
        speed=job.speed if job else 0,
        operation=ours.operation,
        snapshot=ours.snapshot if isinstance(ours, Mirror) else None,
        reason=ours.reason or (job.error if job else None),
        type=ours.type,
        base=base,
    )


def _ends(ours: BlockJob) -> tuple[str, str, str]:
    """Where a job's data comes from, where it goes, and the format of that."""
    if isinstance(ours, Mirror):
        return ours.source, ours.file, ours.format
    if ours.then is not None:
        return ours.then.source, ours.then.file, ours.then.format
    if ours.type == "rebase" or ours.base is None:
        return (ours.leaving[0].file if ours.leaving else ours.top.file), ours.top.file, ours.top.format
    return ours.top.file, ours.base.file, ours.base.format


def operation_view(
    record: OperationRecord,
    steps: tuple[StepRecord, ...],
    follows: tuple[str, ...],
    *,
    in_flight: bool,
    frozen_ms: float | None = None,
) -> OperationView:
    """An operation; one that is open and in nobody's hands is `unsettled`, and only recovery `follows` then."""
    state: str = record.state
    if record.state not in ENDED and record.state != "in-progress":
        state = "running" if in_flight else "unsettled"
    return OperationView(
        id=record.id,
        domain=record.domain,
        what=record.plan.what,
        state=state,
        text=record.plan.text,
        started=record.started,
        ended=record.ended,
        error=record.error,
        row=record.row,
        pause_ms=record.pause_ms,
        frozen_ms=frozen_ms,
        steps=tuple(
            StepView(
                index=step.index,
                stretch=step.stretch,
                text=step.text,
                state=step.state,
                started=step.started,
                ended=step.ended,
                error=step.error,
            )
            for step in steps
        ),
        next=("blockferry recover",) if state == "unsettled" else follows,
    )


def move_view(
    move: Move,
    *,
    phase: str,
    at_work: bool,
    kept: Mapping[str, int],
    left: tuple[str, ...],
    left_out: dict[str, str],
    notes: tuple[str, ...],
) -> MoveView:
    """A move as people look at it.

    Args:
        move: as recorded.
        phase: what is done next or now.
        at_work: whether somebody does.
        kept: by source, bytes of its copy that are on disk.
        left: images of the old places that are still there.
        left_out: disks that stay.
        notes: what to know of it.
    """
    verdict = move.verdict
    files = _move_files(move, kept)
    return MoveView(
        domain=move.domain,
        operation=move.operation,
        state="standing still" if not move.over and not at_work else move.state,
        phase=phase,
        disks=tuple(
            MoveDiskView(
                target=disk.target,
                source=disk.source,
                dest=disk.file,
                format=disk.file_format,
                strategy=disk.strategy,
                why=disk.why,
            )
            for disk in move.disks
        ),
        files=files,
        copied=sum(file.copied for file in files),
        total=sum(file.total for file in files),
        pivoted=move.pivoted,
        pause_ms=move.pause_ms,
        deadline=move.deadline,
        verified=verdict.how if verdict is not None else None,
        compared=verdict.compared if verdict is not None else 0,
        differences=tuple(
            MoveDifference(target=each.target, offset=each.offset, length=each.length)
            for each in (verdict.differences if verdict is not None else ())
        ),
        left=left,
        reason=move.reason,
        left_out=left_out,
        notes=notes,
        next=next_for(move),
    )


def _move_files(move: Move, kept: Mapping[str, int]) -> tuple[MoveFileView, ...]:
    return tuple(
        MoveFileView(
            source=layer.source,
            file=layer.file,
            copied=layer.length if layer.source in move.methods else kept[layer.source],
            total=layer.length,
            method=move.methods.get(layer.source),
        )
        for layer in move.layers
    )


def moving_views(
    move: Move, mirrors: Mapping[str, MirrorView], *, phase: str, kept: Mapping[str, int]
) -> dict[str, MovingView]:
    """The disks of a move that is not over, by target.

    Args:
        move: as recorded.
        mirrors: by target, as `mirror_views`.
        phase: what is done next or now.
        kept: by source, bytes of its copy that are on disk.
    """
    files = {file.source: file for file in _move_files(move, kept)}
    found: dict[str, MovingView] = {}
    for disk in move.disks:
        mirror = mirrors.get(disk.target)
        current, total = 0, 0
        if phase == "copy":
            current = sum(files[source].copied for source in disk.layers)
            total = sum(files[source].total for source in disk.layers)
        elif mirror is not None and mirror.file == disk.file:
            current, total = mirror.current or 0, mirror.total or 0
        found[disk.target] = MovingView(
            operation=move.operation, file=disk.file, state=move.state, phase=phase, current=current, total=total
        )
    return found


def planned_files(
    move: Move, placed: tuple[Placed, ...], files: Files, data: Mapping[str, int]
) -> tuple[PlannedFile, ...]:
    """The files that a move would make, those below first.

    Args:
        move: as planned.
        placed: its disks.
        files: what is there.
        data: by source, the bytes of it that hold data.
    """
    shared = {disk.source for disk in move.disks if disk.shared}
    # What shares blocks takes up room as soon as either file is written to.
    found = [
        PlannedFile(
            file=layer.file,
            what=f"shares the blocks of {layer.source}"
            if layer.source in shared
            else f"copy of {layer.source}, outside QEMU",
            bytes=0 if layer.source in shared else data.get(layer.source, layer.length),
            room=data.get(layer.source, layer.length),
        )
        for layer in move.layers
    ]
    for disk, each in zip(move.disks, placed, strict=True):
        if disk.shared:
            continue
        if disk.overlay is not None:
            what = f"overlay of {disk.target} until the pivot: what is written meanwhile"
            found.append(PlannedFile(file=disk.overlay, what=what, bytes=0, room=NEW_OVERLAY_BYTES))
            continue
        copied = each.disk.chain[:1] if each.below else each.disk.chain
        known = [files.facts[image.file] for image in copied if image.file in files.facts]
        count = sum(data.get(fact.path, fact.size) for fact in known)
        found.append(PlannedFile(file=disk.file, what=f"mirror of {disk.target}, by QEMU", bytes=count, room=count))
    return tuple(found)


def room_by_place(planned: tuple[PlannedFile, ...], files: Files) -> dict[str, int]:
    """The bytes that planned files may take up, by the folder of the first one on each file system."""
    places: dict[int, str] = {}
    found: dict[str, int] = {}
    for each in planned:
        fact = files.facts.get(each.file)
        if fact is not None and fact.kind != "block":
            place = places.setdefault(fact.device, os.path.dirname(each.file))
            found[place] = found.get(place, 0) + each.room
    return found


def next_for(move: Move) -> tuple[str, ...]:
    """What can be typed now, of a move that is not over."""
    if move.over:
        return ()
    on = f"blockferry operations resume {move.operation}"
    if not move.pivoted:
        return on, f"blockferry operations cancel {move.operation}"
    return (on, f"{on} --verify none") if move.verify != "none" and move.verdict is None else (on,)


def frozen_for(steps: tuple[StepRecord, ...]) -> float | None:
    """How long a guest's file systems stood frozen at most: from when that was asked until the answer to the thaw."""
    found = {name: at for step in steps for name, at in step.outcome.items() if name in (FROZEN_FROM, FROZEN_UNTIL)}
    return 1000 * (found[FROZEN_UNTIL] - found[FROZEN_FROM]) if len(found) == 2 else None


def next_commands(record: OperationRecord, jobs: tuple[BlockJob, ...]) -> tuple[str, ...]:
    """What can be typed now: the commands that go on with an operation's jobs, or cancel them."""
    own = [job for job in jobs if job.state == "active" and (job.operation == record.id or job.job in _jobs(record))]
    copies = [job.copy for job in own if job.copy is not None]
    commands: list[str] = []
    for snapshot in dict.fromkeys(copy.snapshot for copy in copies if copy.snapshot):
        commands += [
            f"blockferry snapshot delete {record.domain} {snapshot} --reopen-mirror",
            f"blockferry snapshot delete {record.domain} {snapshot} --remove-mirror",
        ]
    targets = " ".join(copy.target for copy in copies if copy.snapshot is None)
    if targets:
        commands += [f"blockferry job {verb} {record.domain} {targets}" for verb in ("pivot", "finish", "cancel")]
    chains = " ".join(job.target for job in own if job.copy is None)
    if chains:
        commands += [f"blockferry job list {record.domain}", f"blockferry job cancel {record.domain} {chains}"]
    if any(job.state == "resting" and job.operation == record.id for job in jobs):
        commands.append(f"blockferry start {record.domain}")
    return tuple(commands)


def _jobs(record: OperationRecord) -> set[str]:
    window = record.plan.window
    return {disk.mirror.job for disk in window.disks} if window is not None else set()
