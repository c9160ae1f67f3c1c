"""Planning jobs on backing chains: rebase, commit, the merge of deleted snapshots, and what follows when one ends."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from blockferry import errors
from blockferry.model.blockjob import BlockJob, ChainJob, Layer
from blockferry.model.domain import Observation
from blockferry.model.files import Renamed
from blockferry.model.flags import BlockCommit, BlockRebase, require_flags
from blockferry.model.graph import Disk, Image
from blockferry.model.request import Commit, Rebase
from blockferry.model.snapshot import Snapshot
from blockferry.plan.copy import close_job, image_below
from blockferry.plan.destinations import same_file
from blockferry.plan.disks import close_images, find_disk, require_suitable
from blockferry.plan.files import DropFile, SyncFiles
from blockferry.plan.history import after_commit, descendants, while_committed
from blockferry.plan.plan import Names, Plan, Record, Window
from blockferry.plan.resume import is_mirrored, leave_round, plan_round
from blockferry.plan.steps import (
    CompleteJobs,
    DismissJobs,
    FinalizeJobs,
    FinalizeStream,
    RequireBacking,
    RequireReady,
    RequireRoots,
    Resume,
    StartCommit,
    StartMirror,
    StartStream,
    Step,
    Stop,
)

# By the file of an image in one of the domain's chains, whoever stands on it, under that name or another: targets, disks of
# other domains, copies.
Users = Mapping[str, tuple[str, ...]]
NOBODY: Users = {}


def joined(domain: str, seen: Observation, request: Rebase, jobs: tuple[BlockJob, ...]) -> BlockJob | None:
    """The copy that a rebase of its disk joins: the one that works, onto the same base. None where there is none.

    Once the guest has gone over to the copy its chain is the one that the rebase was to make.

    Raises:
        RebaseElsewhere: the copy is onto another base.
    """
    disk = find_disk(domain, seen, request.disk)
    job = next((job for job in jobs if job.target == disk.target and job.state == "active"), None)
    copy = job.copy if job is not None else None
    if copy is None:
        return None
    if copy.snapshot is None and (
        request.base == copy.backing or (request.base and copy.backing and same_file(request.base, copy.backing))
    ):
        return job
    raise errors.RebaseElsewhere(
        domain=domain,
        disk=disk.target,
        dest=copy.file,
        base=copy.backing or "no base",
        asked=request.base or "no base",
    )


def plan_rebase(domain: str, seen: Observation, request: Rebase, *, names: Names, operation: int) -> Plan:
    """The plan of starting a stream into a disk's active image.

    Raises:
        Refused: any of its kinds, with nothing done.
    """
    require_flags("block_rebase", BlockRebase(request.flags), BlockRebase.BANDWIDTH_BYTES)
    disk = find_disk(domain, seen, request.disk)
    require_suitable(domain, disk, seen)
    base = image_below(disk, request.base) if request.base is not None else None
    leaving = disk.chain[1 : disk.chain.index(base)] if base is not None else disk.chain[1:]
    if not leaving:
        onto = f"it backs onto {base.file} already" if base is not None else "it has no backing file"
        raise errors.DiskUnsuitable(domain=domain, disk=disk.target, reason=onto)
    if disk.active.format == "raw":
        raise errors.DiskUnsuitable(domain=domain, disk=disk.target, reason="its image is raw and backs onto nothing")
    job = ChainJob(
        domain=domain,
        target=disk.target,
        operation=operation,
        job=names.of(disk.target, "r"),
        type="rebase",
        top=_layer(disk.active),
        base=_layer(base) if base is not None else None,
        above=disk.active.node,
        leaving=tuple(_layer(image) for image in leaving),
        speed=request.bandwidth,
    )
    start = StartStream(
        job=job.job,
        # Under a filter it is the image itself that QEMU takes here, unlike for a mirror or a commit.
        device=disk.active.node,
        base=base.node if base is not None else None,
        backing_file=base.file if base is not None else None,
        filter_node=f"{job.job}t",
        speed=request.bandwidth,
    )
    return Plan(
        what="rebase",
        text=f"rebase {disk.target} onto {base.file if base is not None else 'nothing: it holds everything itself'}",
        prepare=(start,),
        record=Record(authoritative={disk.target: disk.active.file}, jobs=(job,)),
        notes=(f"left as they are: {', '.join(layer.file for layer in job.leaving)}",),
    )


def plan_commit(
    domain: str,
    seen: Observation,
    request: Commit,
    snapshots: tuple[Snapshot, ...],
    *,
    names: Names,
    operation: int,
    users: Users = NOBODY,
) -> Plan:
    """The plan of starting a commit.

    Args:
        domain: its name.
        seen: the domain as observed.
        request: what was asked for.
        snapshots: the domain's.
        names: of nodes and jobs.
        operation: its number.
        users: who stands on which image.

    Raises:
        Refused: any of its kinds, with nothing done.
    """
    flags = BlockCommit(request.flags)
    carried_out = BlockCommit.SHALLOW | BlockCommit.DELETE | BlockCommit.ACTIVE | BlockCommit.BANDWIDTH_BYTES
    require_flags("block_commit", flags, carried_out)
    disk = find_disk(domain, seen, request.disk)
    require_suitable(domain, disk, seen)
    top = disk.active if _is_active(disk, request.top) else image_below(disk, str(request.top))
    rest = disk.chain[disk.chain.index(top) + 1 :]
    if not rest:
        raise errors.DiskUnsuitable(
            domain=domain, disk=disk.target, reason=f"{top.file} backs onto nothing that it could be written into"
        )
    if request.base is not None and flags & BlockCommit.SHALLOW:
        raise errors.BadRequest(reason="SHALLOW says which base, and a base was named as well: say one")
    if request.base is None:
        base = rest[0] if flags & BlockCommit.SHALLOW else rest[-1]
    else:
        base = image_below(disk, request.base)
        if base not in rest:
            raise errors.ImageUnsuitable(path=request.base, reason=f"it is not under {top.file}")
    _require_unshared(domain, seen, disk, base, users)
    if flags & BlockCommit.DELETE:
        _require_empty(domain, seen, disk, top, base)
    job = commit_job(domain, disk, top, base, names=names, operation=operation, remove=bool(flags & BlockCommit.DELETE))
    job = msgspec.structs.replace(job, speed=request.bandwidth)
    changed, forgotten = after_commit(snapshots, job, _above(disk, job))
    return Plan(
        what="commit",
        text=f"commit {_span(job)} of {disk.target} into {base.file}",
        prepare=(start_of(job, disk),),
        record=Record(
            authoritative={disk.target: disk.active.file},
            jobs=(job,),
            changed=while_committed(snapshots, {disk.target: job}, {disk.target: _above(disk, job)}),
        ),
        notes=(
            *(f"snapshot {name} will be no more: what it kept is written over" for name in forgotten),
            *(
                f"snapshot {each.name} will keep nothing of {disk.target} any more: that is written over"
                for each in changed
                if all(kept.target != disk.target for kept in each.disks)
            ),
        ),
    )


def plan_merge(
    domain: str,
    seen: Observation,
    snapshot: Snapshot,
    snapshots: tuple[Snapshot, ...],
    *,
    names: Names,
    operation: int,
    children: bool = False,
    only_children: bool = False,
    users: Users = NOBODY,
) -> Plan:
    """The plan of deleting a snapshot by merging its overlays down: O(what was written since), one job a disk.

    Args:
        domain: its name.
        seen: the domain as observed.
        snapshot: the one that is deleted.
        snapshots: all of the domain's.
        names: of nodes and jobs.
        operation: its number.
        children: whether its descendants are deleted with it.
        only_children: or they alone.
        users: who stands on which image.

    Raises:
        Refused: any of its kinds, with nothing done.
    """
    below = descendants(snapshot.name, snapshots)
    doomed = below if only_children else (snapshot, *below) if children else (snapshot,)
    if not doomed:
        raise errors.SnapshotNotMergeable(domain=domain, snapshot=snapshot.name, reason="it has no children")
    jobs: dict[str, ChainJob] = {}
    above: dict[str, str | None] = {}
    starts: list[Step] = []
    for target in dict.fromkeys(disk.target for each in doomed for disk in each.disks):
        disk = find_disk(domain, seen, target)
        require_suitable(domain, disk, seen)
        top, base = _merged_span(domain, disk, doomed)
        _require_unshared(domain, seen, disk, base, users)
        _require_empty(domain, seen, disk, top, base)
        job = commit_job(domain, disk, top, base, names=names, operation=operation, remove=True)
        jobs[target] = msgspec.structs.replace(job, deletes=tuple(each.name for each in doomed))
        above[target] = _above(disk, job)
        starts.append(start_of(jobs[target], disk))
    which = ", ".join(each.name for each in doomed)
    removed = ", ".join(layer.file for job in jobs.values() for layer in job.leaving)
    return Plan(
        what="delete",
        text=f"delete snapshot{'s' if len(doomed) > 1 else ''} {which}: "
        + "; ".join(f"merge {_span(job)} into {_base(job).file}" for job in jobs.values()),
        prepare=tuple(starts),
        record=Record(
            authoritative={target: find_disk(domain, seen, target).active.file for target in jobs},
            jobs=tuple(jobs.values()),
            changed=while_committed(snapshots, jobs, above),
        ),
        notes=(f"removed once they are merged: {removed}",),
    )


def _merged_span(domain: str, disk: Disk, doomed: tuple[Snapshot, ...]) -> tuple[Image, Image]:
    """The layers of a disk that go: from the topmost overlay of these snapshots to the image under their lowest."""
    indexes: list[int] = []
    for snapshot in doomed:
        for kept in snapshot.disks:
            if kept.target != disk.target:
                continue
            index = next((i for i, image in enumerate(disk.chain) if same_file(image.file, kept.file)), None)
            if index is None:
                reason = f"{kept.file} is not in the chain of {disk.target} any more"
            elif index + 1 >= len(disk.chain) or not same_file(disk.chain[index + 1].file, kept.backing):
                reason = f"{kept.file} does not back onto {kept.backing} any more"
            else:
                indexes.append(index)
                continue
            raise errors.SnapshotNotMergeable(domain=domain, snapshot=snapshot.name, reason=reason)
    indexes.sort()
    if indexes != list(range(indexes[0], indexes[-1] + 1)):
        between = next(i for i in range(indexes[0], indexes[-1]) if i not in indexes)
        raise errors.SnapshotNotMergeable(
            domain=domain,
            snapshot=doomed[0].name,
            reason=f"{disk.chain[between].file}, which is of none of these snapshots, lies between: one at a time",
        )
    return disk.chain[indexes[0]], disk.chain[indexes[-1] + 1]


def commit_job(
    domain: str, disk: Disk, top: Image, base: Image, *, names: Names, operation: int, remove: bool
) -> ChainJob:
    """A commit of a disk's layers from `top` to above `base`, with `remove` of their files too.

    Raises:
        DiskUnsuitable: the guest's disk would grow by it.
    """
    first, last = disk.chain.index(top), disk.chain.index(base)
    if base.virtual_size > top.virtual_size:
        # A smaller one QEMU grows (the guest's disk was); on a larger one the guest's disk would grow unasked.
        raise errors.DiskUnsuitable(
            domain=domain,
            disk=disk.target,
            reason=f"{base.file} has {base.virtual_size} bytes, and {top.file} has {top.virtual_size}",
        )
    return ChainJob(
        domain=domain,
        target=disk.target,
        operation=operation,
        job=names.of(disk.target, "c"),
        type="commit" if first else "active-commit",
        top=_layer(top),
        base=_layer(base),
        above=disk.chain[first - 1].node if first else None,
        leaving=tuple(_layer(image) for image in disk.chain[first:last]),
        remove_files=remove,
    )


def _require_empty(domain: str, seen: Observation, disk: Disk, top: Image, base: Image) -> None:
    """Refuse to remove an image with an internal snapshot: nobody else has what that holds."""
    for image in disk.chain[disk.chain.index(top) : disk.chain.index(base)]:
        for inside in seen.graph.nodes[image.node].snapshots:
            raise errors.DiskUnsuitable(
                domain=domain,
                disk=disk.target,
                reason=f"{image.file} would be removed, and it has an internal snapshot {inside.name!r} in it",
            )


def _require_unshared(domain: str, seen: Observation, disk: Disk, base: Image, users: Users) -> None:
    """Refuse to write into an image that somebody else stands on as well: what is there would change under them."""
    named = [other.target for other in seen.disks if any(same_file(image.file, base.file) for image in other.chain)]
    for other in (*named, *users.get(base.file, ())):
        if other != disk.target:
            raise errors.DiskUnsuitable(
                domain=domain,
                disk=disk.target,
                reason=f"{other} stands on {base.file} as well, which a commit would change",
            )


def start_of(job: ChainJob, disk: Disk) -> StartCommit:
    """The step that starts a commit."""
    base = _base(job)
    return StartCommit(
        job=job.job,
        device=disk.filtered or disk.active.node,
        top=job.top.node,
        base=base.node,
        backing_file=base.file if job.above is not None else None,
        filter_node=f"{job.job}t",
        active=job.above is None,
        speed=job.speed,
    )


def _base(job: ChainJob) -> Layer:
    if job.base is None:
        raise AssertionError(job)
    return job.base


def _above(disk: Disk, job: ChainJob) -> str | None:
    """The file of the overlay of a commit's topmost layer."""
    return next((image.file for image in disk.chain if image.node == job.above), None)


def _is_active(disk: Disk, name: str | None) -> bool:
    return name is None or same_file(name, disk.active.file)


def _layer(image: Image) -> Layer:
    return Layer(node=image.node, file=image.file, format=image.format)


def _span(job: ChainJob) -> str:
    return ", ".join(layer.file for layer in job.leaving)


# --- what follows when a job has ended ------------------------------------------------------------------------


def has_ended(job: ChainJob, seen: Observation) -> bool:
    """Whether the graph shows what the job was to bring about."""
    if job.type == "resume":
        return is_mirrored(job, seen)
    base = job.base.node if job.base is not None else None
    if job.above is not None:
        return job.above in seen.graph.nodes and seen.graph.child(job.above, "backing") == base
    disk = seen.disk(job.target)
    return disk is not None and bool(disk.chain) and disk.active.node == base


def plan_end(
    seen: Observation, job: ChainJob, snapshots: tuple[Snapshot, ...], *, unflushed: str | None = None
) -> Plan:
    """What follows a job that has done its work: it is pending, or ready, or the graph shows its end already.

    Args:
        seen: the domain as observed.
        job: the job.
        snapshots: the domain's.
        unflushed: why what the graph shows can't be flushed. It is recorded nevertheless, as a job that was lost, for that
            reason; no image is removed: a header on disk may still name it, and it holds what it held.
    """
    if job.type == "fill":
        return _end_fill(job)
    if job.type == "resume":
        return plan_round(seen, job)
    disk = find_disk(job.domain, seen, job.target)
    changed, forgotten = after_commit(snapshots, job, _above(disk, job)) if job.type != "rebase" else ((), ())
    active = _base(job).file if job.type == "active-commit" else disk.active.file
    done = has_ended(job, seen)
    if unflushed is not None and not done:
        raise AssertionError(job)
    window = None if done or job.type == "commit" else _window(seen, job, disk)
    return Plan(
        what="job-end",
        text=f"the {job.type} of {job.target} has ended"
        + (f": the guest goes over to {active}" if window and job.type == "active-commit" else ""),
        prepare=_before(job, disk, done=done) if unflushed is None else (),
        window=window,
        record=Record(
            authoritative={job.target: active},
            formats={job.target: _base(job).format} if job.type == "active-commit" else {},
            changed=changed,
            forget=forgotten,
            ended={job.target: "done" if unflushed is None else "lost"},
            reason=unflushed,
        ),
        settle=(
            *(_switch(job, disk, recorded=True) if window is not None and window.held else ()),
            *([Resume()] if window is not None and window.resume else []),
            DismissJobs(jobs=(job.job,)),
            *close_images(seen.graph, (layer.node for layer in job.leaving)),
            *(_drop(job) if unflushed is None else ()),
        ),
    )


def _before(job: ChainJob, disk: Disk, *, done: bool) -> tuple[Step, ...]:
    """What precedes the record, so that a power loss after it finds what it says.

    QEMU finalizes a commit by writing the base's name into the header of the image above, which may reach the disk before
    what it has written into the base and its tables; those are flushed before. The header is before the record: files that
    have left the chain are removed after it.
    """
    above = _above(disk, job) if job.type == "commit" else disk.active.file
    base = job.base.file if job.base is not None and job.type != "rebase" else None
    files = tuple(file for file in dict.fromkeys((above, base)) if file and file.startswith("/"))
    synced = SyncFiles(paths=files)
    renamed = _renamed(job, above)
    if done or job.type != "commit":
        return (msgspec.structs.replace(synced, renamed=renamed),)
    flushed = SyncFiles(paths=files, nodes=(_base(job).node,), renamed=renamed)
    return (flushed, FinalizeJobs(jobs=(job.job,)), synced, _require_end(job))


def _renamed(job: ChainJob, above: str | None) -> Renamed | None:
    """The image above those that leave the chain; an active commit has none."""
    if job.type == "active-commit" or above is None or not above.startswith("/"):
        return None
    was, base = job.leaving[0], job.base
    becomes = (base.file, base.format) if base is not None else (None, None)
    return Renamed(path=above, was=(was.file, was.format), becomes=becomes)


def _require_end(job: ChainJob) -> Step:
    return RequireBacking(node=str(job.above), backing=job.base.node if job.base is not None else None)


def _window(seen: Observation, job: ChainJob, disk: Disk) -> Window:
    """The instant in which an active commit or a rebase ends.

    A commit's base and overlay are the same while the guest stands still. A rebased image's header changes at the
    finalize, and QEMU does not flush what was pulled in before: `stop` does, also on a guest that is paused already
    (without it, QEMU killed right afterwards lost clusters, on 7.2 and 10.0). The header is on disk before the record,
    after which nobody keeps the images that it named.

    A guest that forgets is stopped for neither (plan.window): a commit's job holds its requests until it is on the base, and what
    was pulled in is flushed by itself.
    """
    jobs, runs_on = (job.job,), seen.running and seen.forgets
    if job.type == "rebase":
        header = SyncFiles(paths=(disk.active.file,) if disk.active.file.startswith("/") else ())
        flushed = SyncFiles(paths=(), nodes=(disk.active.node,)) if runs_on else Stop()
        steps: tuple[Step, ...] = (flushed, FinalizeStream(job=job.job), header, _require_end(job))
    elif runs_on:
        steps = (CompleteJobs(jobs=jobs, running=True),)
    else:
        stop: list[Step] = [Stop()] if seen.running else []
        steps = (*stop, RequireReady(jobs=jobs), CompleteJobs(jobs=jobs), *_switch(job, disk, recorded=False))
    held = runs_on and job.type != "rebase"
    return Window(ends_on="destination", resume=seen.running, disks=(), steps=steps, chain=job, held=held)


def _switch(job: ChainJob, disk: Disk, *, recorded: bool) -> tuple[Step, ...]:
    """A drained active commit's guest goes over to the base."""
    roots = RequireRoots(roots={disk.backend: _base(job).node})
    return (FinalizeJobs(jobs=(job.job,), recorded=recorded), roots)


def _end_fill(job: ChainJob) -> Plan:
    """The destination holds what lay between: its mirror begins."""
    mirror = job.then
    if mirror is None:
        raise AssertionError(job)
    # As in a rebase, what was pulled in is on disk before the header that says so, and that before anybody relies on it.
    files = (job.top.file,) if job.top.file.startswith("/") else ()
    return Plan(
        what="job-end",
        text=f"the lower layers of {job.target} are in {job.top.file}: mirror the active one",
        prepare=(
            SyncFiles(paths=files, nodes=(job.top.node,)),
            FinalizeStream(job=job.job),
            SyncFiles(paths=files),
            _require_end(job),
            StartMirror.of(mirror, "top", job.speed),
        ),
        record=Record(authoritative={job.target: mirror.source}, jobs=(mirror,)),
    )


def leave_window(job: ChainJob, *, resume: bool) -> tuple[Step, ...]:
    """How to leave the window of a job whose chain is the old one: nothing but the job is lost.

    Args:
        job: whose window.
        resume: whether the guest ran before.
    """
    rounds = leave_round(job) if job.type == "resume" else ()
    first, *close = close_job(job)
    # The guest does not wait for a destination to be closed.
    return (*rounds, first, *([Resume()] if resume else []), *close)


def _drop(job: ChainJob) -> list[Step]:
    return [DropFile(path=layer.file) for layer in job.leaving if job.remove_files and layer.file.startswith("/")]
