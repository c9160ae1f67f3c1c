"""Planning the instant: a pivot onto destinations, a finish on sources, for one or several disks.

QEMU does not group finalizes, so the window is built to be left at any point: until the record is written, every disk
can be brought back to its source (`leave`), because the guest stands still and both images are the same.

A guest that may forget an interrupt when it is stopped (`Observation.forgets`) runs on, and the jobs hold its requests:
nothing is finalized before the record, so that until then every disk is on its source, and afterwards none stays there.
docs/adr/0025-held-by-their-jobs.md says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from blockferry import errors
from blockferry.model.blockjob import JobEnd, Mirror
from blockferry.model.domain import Observation
from blockferry.model.files import ImageFact
from blockferry.model.graph import Disk
from blockferry.model.job import Job
from blockferry.model.snapshot import Snapshot
from blockferry.plan.chain import has_ended
from blockferry.plan.copy import close_job, forget_bitmap
from blockferry.plan.destinations import is_uri, require_size_of
from blockferry.plan.disks import READ_ONLY_FILE, close_images, source_options
from blockferry.plan.files import SyncFiles
from blockferry.plan.plan import Names, Plan, Record, Window, WindowDisk
from blockferry.plan.steps import (
    AddNode,
    AwaitReady,
    CancelJob,
    CheckServers,
    CompleteJobs,
    DismissJobs,
    FinalizeJobs,
    ReadBack,
    RemoveNode,
    RequireReady,
    RequireRoots,
    Resume,
    SetBacking,
    StartMirror,
    Step,
    Stop,
)


def plan_window(
    domain: str,
    seen: Observation,
    mirrors: tuple[Mirror, ...],
    *,
    names: Names,
    ends_on: Literal["destination", "source"],
    what: str,
    bases: Mapping[str, tuple[ImageFact, ...]],
    forget_snapshot: str | None = None,
    changed: tuple[Snapshot, ...] = (),
    starting: tuple[Step, ...] = (),
) -> Plan:
    """The plan of a pivot, a finish or a reopen; all mirrors are ready already, or `starting` has them ready at once.

    Args:
        domain: its name.
        seen: the domain as observed.
        mirrors: those of the disks that take part.
        names: of nodes and jobs.
        ends_on: where the guest goes on.
        what: `pivot`, `finish` or `reopen`.
        bases: target -> the destination's own chain, top first; empty where it has none.
        forget_snapshot: the snapshot that a reopen deletes.
        changed: the snapshots that are others without it.
        starting: what begins mirrors that do not work yet.

    Raises:
        ImageUnsuitable: a destination's backing is not whole or not what it should be.
        JobLost, JobNotReady: a mirror is not ready.
    """
    disks = [_disk(domain, seen, mirror) for mirror in mirrors]
    prepare = list(starting)
    for disk, mirror in zip(disks, mirrors, strict=True):
        if not starting:
            _require_ready(domain, mirror, seen.jobs.get(mirror.job))
        if ends_on == "destination":
            prepare += _give_backing(disk, mirror, names, bases.get(mirror.target, ()))
    jobs = tuple(mirror.job for mirror in mirrors)
    prepare += [*_check_servers(mirrors), _sync(mirrors, bases, ends_on)]
    window_disks = tuple(_window_disk(seen, disk, mirror, names) for disk, mirror in zip(disks, mirrors, strict=True))
    way = _way_over(seen, disks, mirrors, ends_on=ends_on, starting=bool(starting))
    return Plan(
        what=what,
        text=f"{what} {', '.join(mirror.target for mirror in mirrors)}"
        + (f" and delete snapshot {forget_snapshot}" if forget_snapshot else ""),
        prepare=(*prepare, *way.before),
        window=Window(
            ends_on=ends_on,
            resume=seen.running,
            disks=window_disks,
            steps=way.steps,
            held=way.held,
        ),
        record=msgspec.structs.replace(
            _ended(mirrors, ends_on),
            changed=changed,
            forget=(forget_snapshot,) if forget_snapshot is not None else (),
        ),
        settle=(
            *way.after,
            *([Resume()] if seen.running else []),
            DismissJobs(jobs=jobs),
            *(step for mirror in mirrors for step in forget_bitmap(mirror)),
            *(_close_sources(seen, disks) if ends_on == "destination" else _close_destinations(mirrors)),
        ),
    )


class _WayOver(msgspec.Struct, frozen=True, kw_only=True):
    """How the disks go over: what comes last before the window, its steps, and what comes first after the record."""

    held: bool
    before: tuple[Step, ...] = ()
    steps: tuple[Step, ...]
    after: tuple[Step, ...] = ()


def _way_over(
    seen: Observation,
    disks: list[Disk],
    mirrors: tuple[Mirror, ...],
    *,
    ends_on: Literal["destination", "source"],
    starting: bool,
) -> _WayOver:
    """A guest that forgets is not stopped; but what is on an export is read back before the record, with nobody else at it."""
    held = seen.running and seen.forgets and not any(is_uri(mirror.file) for mirror in mirrors)
    jobs = tuple(mirror.job for mirror in mirrors)
    roots = {
        disk.backend: mirror.node if ends_on == "destination" else mirror.source_node
        for disk, mirror in zip(disks, mirrors, strict=True)
    }
    waiting: list[Step] = [AwaitReady(jobs=jobs)] if starting else []
    ready, drain = RequireReady(jobs=jobs), CompleteJobs(jobs=jobs, soft_cancel=ends_on == "source", running=held)
    switch: tuple[Step, ...] = (FinalizeJobs(jobs=jobs, recorded=held), RequireRoots(roots=roots))
    if held:
        # They are looked at before they are told to end: what fails before costs no mirror.
        return _WayOver(held=held, before=(*waiting, ready), steps=(drain,), after=switch)
    stop: list[Step] = [Stop()] if seen.running else []
    read_back = _read_back(disks, mirrors) if ends_on == "destination" else []
    return _WayOver(held=held, steps=(*waiting, *stop, ready, drain, *switch, *read_back))


def _read_back(disks: list[Disk], mirrors: tuple[Mirror, ...]) -> list[Step]:
    """A job ends well on a server that is gone when nothing is left to be written; a file has just been flushed by it."""
    served = {disk.target: disk.drive for disk, mirror in zip(disks, mirrors, strict=True) if is_uri(mirror.file)}
    return [ReadBack(disks=served)] if served else []


def _sync(
    mirrors: tuple[Mirror, ...],
    bases: Mapping[str, tuple[ImageFact, ...]],
    ends_on: Literal["destination", "source"],
) -> Step:
    """What the window flushes and reads: sources, destinations, and the destinations' own chains."""
    files = [
        file
        for mirror in mirrors
        for file in (mirror.source, mirror.file, *(base.path for base in bases.get(mirror.target, ())))
    ]
    goes_to = [mirror.file for mirror in mirrors] if ends_on == "destination" else []
    return SyncFiles(
        paths=tuple(file for file in files if file.startswith("/")),
        readable=tuple(file for file in goes_to if file.startswith("/")),
    )


def _check_servers(mirrors: tuple[Mirror, ...]) -> list[Step]:
    servers = {mirror.target: mirror.file for mirror in mirrors if is_uri(mirror.file)}
    several = tuple(mirror.target for mirror in mirrors if mirror.multi_conn)
    return [CheckServers(uris=servers, flush=several)] if servers else []


def _ended(mirrors: tuple[Mirror, ...], ends_on: Literal["destination", "source"]) -> Record:
    if ends_on == "source":
        ended: dict[str, JobEnd] = {mirror.target: "finished" for mirror in mirrors}
        return Record(authoritative={mirror.target: mirror.source for mirror in mirrors}, ended=ended)
    return Record(
        authoritative={mirror.target: mirror.file for mirror in mirrors},
        formats={mirror.target: mirror.format for mirror in mirrors},
        ended={mirror.target: "pivoted" for mirror in mirrors},
    )


def _disk(domain: str, seen: Observation, mirror: Mirror) -> Disk:
    disk = seen.disk(mirror.target)
    if disk is None:
        known = ", ".join(each.target for each in seen.disks) or "no disks"
        raise errors.NoSuchDisk(domain=domain, disk=mirror.target, known=known)
    if not disk.chain or disk.active.node != mirror.source_node:
        raise errors.JobLost(
            domain=domain,
            disk=mirror.target,
            reason=f"the disk no longer stands on {mirror.source}, which was being mirrored",
        )
    return disk


def _require_ready(domain: str, mirror: Mirror, job: Job | None) -> None:
    if job is None:
        raise errors.JobLost(domain=domain, disk=mirror.target, reason="QEMU has no such job any more")
    if job.over:
        raise errors.JobLost(domain=domain, disk=mirror.target, reason=job.error or f"its job is {job.status}")
    if not job.caught_up:
        raise errors.JobNotReady(domain=domain, disk=mirror.target, seconds=0.0, state=job.status)


def _give_backing(disk: Disk, mirror: Mirror, names: Names, bases: tuple[ImageFact, ...]) -> list[Step]:
    """Put the destination's chain under it before the switch."""
    if mirror.backing is None:
        return []
    shared = next((image for image in disk.chain[1:] if image.file == mirror.backing), None)
    if shared is not None:
        return [_backing(mirror, shared.node)]
    _check_base(disk, mirror, bases)
    steps: list[Step] = []
    below: str | None = None
    for index in reversed(range(len(bases))):
        node, base = names.of(mirror.target, f"y{index}"), bases[index]
        name = names.of(mirror.target, f"z{index}")
        file = {"driver": "file", "node-name": name, "filename": base.path, **READ_ONLY_FILE}
        options = {"driver": base.format, "file": file, "read-only": True}
        if base.format == "qcow2":
            options["backing"] = below
        steps.append(AddNode(node=node, options=options, may_stay=True))
        below = node
    return [*steps, _backing(mirror, names.of(mirror.target, "y0"))]


def _backing(mirror: Mirror, node: str) -> Step:
    return SetBacking(node=mirror.node, format=mirror.format, file_node=mirror.file_node, backing=node)


def _check_base(disk: Disk, mirror: Mirror, bases: tuple[ImageFact, ...]) -> None:
    if not bases:
        raise errors.ImageUnsuitable(path=str(mirror.backing), reason="it was not looked at")
    for base in bases:
        if base.problem:
            raise errors.ImageUnsuitable(path=base.path, reason=base.problem)
    below = next((image for image in disk.chain[1:] if mirror.stands_for in (None, image.file)), None)
    if below is not None:
        require_size_of(bases[0], below)


def _window_disk(seen: Observation, disk: Disk, mirror: Mirror, names: Names) -> WindowDisk:
    return WindowDisk(
        target=disk.target,
        backend=disk.backend,
        drive=disk.drive,
        source_node=mirror.source_node,
        source_options=source_options(seen.graph, mirror.source_node),
        back_node=names.of(disk.target, "r"),
        back_job=names.of(disk.target, "b"),
        mirror=mirror,
    )


def _close_sources(seen: Observation, disks: list[Disk]) -> list[Step]:
    return close_images(seen.graph, (image.node for disk in disks for image in disk.chain))


def _close_destinations(mirrors: tuple[Mirror, ...]) -> list[Step]:
    return [RemoveNode(node=mirror.node) for mirror in mirrors]


TOLD_TO_END = "the guest runs, and its mirror had been told to end"
STAYED = "QEMU did not let every disk go over when all were to"
LET_RUN = "the guest was let run while the mirror was drained"


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """How to leave a window: the steps, the mirrors as they are afterwards, and those that are lost with the reason."""

    steps: tuple[Step, ...]
    mirrors: tuple[Mirror, ...]
    lost: dict[str, str]


def leave(window: Window, seen: Observation, dead: Mapping[str, str]) -> Way:
    """How to bring every disk back to its source, from wherever the window was left, and keep the mirrors.

    The guest stands still, so source and destination are equal: a mirror that was drained is started again with
    `sync none`, ready at once, and the failed window has cost nothing but time. Never called for a guest that runs
    with a disk switched (recover.py, row L): its source would be stale.

    Where the guest's requests were held instead, it writes on as soon as they are not: all mirrors are lost. So is one that is
    ready still, and may have been told to end: it would hold the guest's requests later, when nobody waits for it.

    Args:
        window: what was planned.
        seen: the domain as observed now.
        dead: targets whose destination does not answer, with the reason.
    """
    steps: list[Step] = []
    mirrors: list[Mirror] = []
    lost: dict[str, str] = {}
    for disk in window.disks:
        job = seen.jobs.get(disk.mirror.job)
        error = dead.get(disk.target) or (job.error if job is not None else None)
        back, source = _bring_back(disk, seen)
        # A source that was opened again has no bitmap: what was written before, nobody knows any more.
        bitmap = disk.mirror.bitmap if source == disk.mirror.source_node else None
        kept = msgspec.structs.replace(disk.mirror, source_node=source, bitmap=bitmap)
        if job is not None and job.caught_up and error is None and not window.held:
            mirrors.append(kept)
            continue
        steps += back
        if error is None and (seen.running or window.held):
            error = TOLD_TO_END if window.held else LET_RUN
        if error is not None:
            lost[disk.target] = error
            steps += close_job(kept)[1:]
        else:
            steps += [StartMirror.of(kept, "none"), AwaitReady(jobs=(kept.job,))]
            mirrors.append(kept)
    if window.resume:
        steps.append(Resume())
    return Way(steps=tuple(steps), mirrors=tuple(mirrors), lost=lost)


def as_it_is(window: Window, seen: Observation) -> Record:
    """The truth of a window that can't be left any more because the guest has run: each disk's present image."""
    if window.chain is not None:
        job = window.chain
        return Record(
            authoritative={job.target: job.top.file},
            formats={job.target: job.top.format},
            ended={job.target: "lost"},
            reason=STAYED,
        )
    on_destination = {disk.target: stands_on(disk, seen) == disk.mirror.node for disk in window.disks}
    return Record(
        authoritative={
            disk.target: disk.mirror.file if on_destination[disk.target] else disk.mirror.source
            for disk in window.disks
        },
        formats={disk.target: disk.mirror.format for disk in window.disks if on_destination[disk.target]},
        ended={disk.target: "pivoted" if on_destination[disk.target] else "lost" for disk in window.disks},
        reason=STAYED if window.held else "the guest was let run in the middle of the window",
    )


def settle_as_it_is(window: Window, seen: Observation, settle: tuple[Step, ...]) -> tuple[Step, ...]:
    """What settles `as_it_is`: the mirrors of disks that did not go over end, and what nothing uses is closed.

    Args:
        window: what was planned.
        seen: the domain as observed now.
        settle: the plan's own; it closes sources only where nothing uses them.
    """
    if window.chain is not None:
        return (CancelJob(job=window.chain.job), *(step for step in settle if isinstance(step, Resume)))
    stayed = [disk.mirror for disk in window.disks if stands_on(disk, seen) != disk.mirror.node]
    rest = (step for step in settle if not isinstance(step, FinalizeJobs | RequireRoots))
    return (*(step for mirror in stayed for step in close_job(mirror)), *rest)


def keeps_back(window: Window, seen: Observation) -> bool:
    """Whether a disk of a held window stays where it was although that is recorded otherwise: its job is over."""
    if not window.held or window.ends_on == "source":
        return False
    stayed = [disk.mirror.job for disk in window.disks if stands_on(disk, seen) != disk.mirror.node]
    if window.chain is not None and not has_ended(window.chain, seen):
        stayed.append(window.chain.job)
    return any(name not in seen.jobs or seen.jobs[name].over for name in stayed)


def stands_on(disk: WindowDisk, seen: Observation) -> str | None:
    """The node under the device now, filters left aside."""
    root = seen.graph.child(disk.backend, "root")
    return None if root is None else seen.graph.below_filters(root)


def _bring_back(disk: WindowDisk, seen: Observation) -> tuple[list[Step], str]:
    """The steps that put a disk on its source again, and the source's node from then on."""
    mirror = disk.mirror
    steps: list[Step] = [CancelJob(job=mirror.job)]
    now = stands_on(disk, seen)
    if now != mirror.node:
        # Also what an earlier bringing-back that was interrupted has left.
        return [CancelJob(job=disk.back_job), *steps], now or disk.source_node
    source = disk.source_node
    if source not in seen.graph.nodes or source.startswith("#"):
        # It was freed at the switch; its file can be opened again once the job that held it is dismissed.
        source = disk.back_node
        steps.append(AddNode(node=source, options=disk.source_options))
    steps += [
        StartMirror(
            target=disk.target,
            job=disk.back_job,
            device=mirror.device or mirror.node,
            node=source,
            filter_node=f"{disk.back_node}t",
            sync="none",
            replaces=mirror.node if mirror.device else None,
        ),
        AwaitReady(jobs=(disk.back_job,)),
        CompleteJobs(jobs=(disk.back_job,)),
        FinalizeJobs(jobs=(disk.back_job,)),
        RequireRoots(roots={disk.backend: source}),
        DismissJobs(jobs=(disk.back_job,)),
    ]
    return steps, source
