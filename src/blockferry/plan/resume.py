"""Planning to go on with a copy that was cancelled or lost: only what its destination lacks is moved.

What it lacks is what was written to the source since the copy began, which a bitmap on the source's node counts, and what
it had not copied yet, which the closed destination's allocation shows: it was empty at first. Both are counted in that one
bitmap, rounds of a backup move it until little is left, and a last one while the guest stands still; both images are the
same then, and a mirror goes on from there.
"""

from __future__ import annotations

import msgspec

from blockferry import errors
from blockferry.model.blockjob import BlockJob, ChainJob, Layer, Mirror
from blockferry.model.domain import Observation
from blockferry.model.files import FileStamp
from blockferry.model.flags import BlockCopy
from blockferry.model.graph import Disk
from blockferry.model.request import StartCopy
from blockferry.plan import destinations as dest
from blockferry.plan.copy import Wish, needed_bytes
from blockferry.plan.destinations import Files, is_uri
from blockferry.plan.files import SyncFiles
from blockferry.plan.plan import Names, Plan, Record, Window
from blockferry.plan.steps import (
    AddNode,
    AwaitReady,
    CancelJob,
    DismissJobs,
    FinalizeJobs,
    RemoveNode,
    RequireSize,
    Resume,
    StartBackup,
    StartMirror,
    Step,
    Stop,
)
from blockferry.plan.tracking import CHUNK, CountAsWritten, OpenAgain, RequireNothingWritten

# So much is moved while the guest stands still: some milliseconds.
LAST_ROUND_BYTES = 4 * 1024 * 1024
# So much at most, where the guest writes as fast as is copied; more waits for another round.
LAST_ROUND_MAX_BYTES = 64 * 1024 * 1024
# Each extent is a command to QEMU of a millisecond.
EXTENTS_MAX = 512
# A mirror's granularity, unless it was told another, for whatever allocates no more than this at once.
GRANULARITY = 64 * 1024


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """What is there of a destination that was left behind.

    Attributes:
        stamp: what its file looks like now; None when it is no file.
        blank: whether it is known to have held nothing when its copy began.
        claimed: device and inode of the file that was made for the copy; None when it was given.
        data: the extents (offset, length) that hold data.
        unit: how many bytes are allocated at once.
        problem: why it could not be looked at.
    """

    stamp: FileStamp | None = None
    blank: bool = False
    claimed: tuple[int, int] | None = None
    data: tuple[tuple[int, int], ...] = ()
    unit: int = 0
    problem: str | None = None


def resumed(domain: str, seen: Observation, disk: Disk, request: StartCopy, job: BlockJob | None) -> Mirror:
    """The copy that a request to resume is about, if QEMU still has account of it.

    Args:
        domain: its name.
        seen: the domain as observed.
        disk: whose.
        request: what was asked for.
        job: the newest of that disk.

    Raises:
        NotResumable: with the reason.
        BadRequest: contradictory wishes.
    """
    if request.base is not None or request.flags & (BlockCopy.REUSE_EXT | BlockCopy.CREATE_RAW | BlockCopy.SHALLOW):
        raise errors.BadRequest(reason="a copy that is resumed is what it was: no base and no other kind of DEST")
    copy = job.copy if job is not None else None
    reason = _flaw(seen, disk, request, job, copy)
    if reason is not None:
        raise errors.NotResumable(domain=domain, disk=disk.target, dest=request.dest, reason=reason)
    if copy is None:
        raise AssertionError(job)
    return copy


def _flaw(seen: Observation, disk: Disk, request: StartCopy, job: BlockJob | None, copy: Mirror | None) -> str | None:
    if job is None or copy is None or copy.snapshot is not None:
        return "it has no copy that was cancelled or lost"
    if job.state not in ("cancelled", "lost"):
        return f"its last copy was neither cancelled nor lost, but {job.state}"
    if not dest.same_file(copy.file, request.dest):
        return f"its last copy went to {copy.file}"
    if request.format not in (None, copy.format):
        return f"it is {copy.format}"
    if is_uri(copy.file):
        return "what an export holds of it can't be known"
    if copy.bitmap is None:
        return (
            f"it backs onto {copy.backing}, and only whole copies are resumed"
            if copy.backing is not None
            else "what it held when its copy began, or what was written since, is not known"
        )
    if disk.active.node != copy.source_node or disk.active.file != copy.source:
        return f"the disk is on {disk.active.file} now, and {copy.source} was copied"
    bitmap = seen.graph.nodes[copy.source_node].bitmaps.get(copy.bitmap)
    if bitmap is None or not bitmap.recording:
        return "QEMU has kept no account of what was written since: it was started anew, or somebody removed that"
    return "a job uses the account of what was written since" if bitmap.busy else None


def plan_resume(
    domain: str,
    seen: Observation,
    request: StartCopy,
    wish: Wish,
    copy: Mirror,
    *,
    left: Left,
    names: Names,
    operation: int,
    files: Files,
) -> Plan:
    """The plan of going on with a copy.

    Args:
        domain: its name.
        seen: the domain as observed.
        request: what was asked for.
        wish: the same, understood.
        copy: what `resumed` found.
        left: its destination.
        names: of nodes and jobs.
        operation: its number.
        files: facts of the destination and of every file in the chain, and the destination's header.

    Raises:
        Refused: any of its kinds, with nothing done.
    """
    disk, size = wish.disk, wish.disk.active.virtual_size
    fact = files.facts[copy.file]
    dest.require_existing(fact, files.users)
    head = dest.require_image(files.images.get(copy.file, ()), copy.file, copy.format, size)
    reason = doubt(copy, left) or (f"it backs onto {head.backing} now" if head.backing is not None else None)
    if reason is not None:
        raise errors.NotResumable(domain=domain, disk=disk.target, dest=copy.file, reason=reason)
    extents = () if copy.exact else lacking(left.data, size)
    dest.Room().take(fact, min(needed_bytes(wish, files), fact.allocated + sum(length for _offset, length in extents)))
    job = _job(wish, copy, names=names, operation=operation, speed=request.bandwidth)
    mirror = _copy(job)
    options = dest.image_options(mirror.format, mirror.file_node, fact, seen.graph.nodes[_file_node(seen, disk)])
    if mirror.format == "qcow2":
        options["backing"] = None
    scratch = names.of(disk.target, "n")
    nothing = {"driver": "null-co", "size": size, "read-zeroes": True}
    count = CountAsWritten(node=copy.source_node, bitmap=_bitmap(copy), scratch=scratch, extents=extents)
    return Plan(
        what="copy",
        text=f"resume the copy of {disk.target} to {copy.file}",
        prepare=(
            OpenAgain(node=mirror.node, file=mirror.file, options=options),
            RequireSize(node=mirror.node, size=size),
            *((AddNode(node=scratch, options=nothing), count) if extents else ()),
            _round(job, job.job),
        ),
        record=Record(authoritative={disk.target: disk.active.file}, jobs=(job,)),
        settle=(RemoveNode(node=scratch),) if extents else (),
    )


def _job(wish: Wish, copy: Mirror, *, names: Names, operation: int, speed: int) -> ChainJob:
    disk = wish.disk
    mirror = msgspec.structs.replace(
        copy,
        operation=operation,
        job=names.of(disk.target, "m"),
        node=names.of(disk.target, "x"),
        file_node=names.of(disk.target, "xf"),
        filter_node=names.of(disk.target, "t"),
        device=disk.filtered,
        options=wish.options,
        state="active",
        reason=None,
        stamps={},
        exact=True,
    )
    return ChainJob(
        domain=copy.domain,
        target=disk.target,
        operation=operation,
        job=names.of(disk.target, "f"),
        type="resume",
        top=Layer(node=mirror.node, file=mirror.file, format=mirror.format),
        base=None,
        then=mirror,
        lacking=disk.active.virtual_size,
        speed=speed,
    )


def _file_node(seen: Observation, disk: Disk) -> str:
    return seen.graph.protocol(disk.active.node)


def _bitmap(copy: Mirror) -> str:
    if copy.bitmap is None:
        raise AssertionError(copy)
    return copy.bitmap


def doubt(copy: Mirror, left: Left) -> str | None:
    """Why it is not known what the destination holds; None when it is."""
    was = copy.stamps.get(copy.file)
    if left.problem is not None:
        return left.problem
    if was is None:
        return "what it looked like when it was closed is not known"
    if left.stamp != was:
        return "it was touched since it was closed"
    if copy.exact:
        return None
    if not (copy.blank or left.blank):
        return "its file system does not tell what was written to a file"
    if left.claimed not in (None, (was.device, was.inode)):
        return "it is not the file that was made for the copy"
    # Of a unit that was written in part all is shown as held, so nothing less may have been written at once.
    if left.unit > min(CHUNK, int(copy.options.get("granularity", GRANULARITY))):
        return f"it allocates {left.unit} bytes at once, more than were copied at once"
    return None


def lacking(data: tuple[tuple[int, int], ...], size: int) -> tuple[tuple[int, int], ...]:
    """The extents (offset, length), in whole chunks, of all that is not wholly data; at most EXTENTS_MAX.

    Args:
        data: the extents that hold data, in their order, neighbours joined.
        size: the disk's, in bytes.
    """
    gaps: list[tuple[int, int]] = []
    begin = 0
    for offset, length in [*data, (size, 0)]:
        end = offset + length
        first = -(-offset // CHUNK) * CHUNK
        last = end if end >= size else end // CHUNK * CHUNK
        if offset < size and last <= first:
            continue
        if min(first, size) > begin:
            gaps.append((begin, min(first, size)))
        begin = max(begin, last)
    return tuple((start, stop - start) for start, stop in _joined(gaps))


def _joined(gaps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """At most EXTENTS_MAX of them, joined over what lies between where that is least."""
    if len(gaps) <= EXTENTS_MAX:
        return gaps
    between = sorted(range(1, len(gaps)), key=lambda index: gaps[index][0] - gaps[index - 1][1], reverse=True)
    kept = {0, *between[: EXTENTS_MAX - 1]}
    found: list[tuple[int, int]] = []
    for index, (start, stop) in enumerate(gaps):
        if index in kept:
            found.append((start, stop))
        else:
            found[-1] = (found[-1][0], stop)
    return found


# --- rounds ---------------------------------------------------------------------------------------------------


def _round(job: ChainJob, name: str, speed: int | None = None) -> StartBackup:
    copy = _copy(job)
    return StartBackup(
        job=name,
        device=copy.source_node,
        node=copy.node,
        bitmap=_bitmap(copy),
        # The mirror's comes when no backup has one any more.
        filter_node=copy.filter_node,
        speed=job.speed if speed is None else speed,
    )


def _copy(job: ChainJob) -> Mirror:
    if job.then is None:
        raise AssertionError(job)
    return job.then


def next_round(job: ChainJob) -> str:
    """The id of the backup after this one."""
    return f"{_copy(job).job.removesuffix('m')}f{job.round + 1}"


def is_mirrored(job: ChainJob, seen: Observation) -> bool:
    """Whether the mirror that a resume leads to is at work, and began with nothing left to be copied."""
    copy = _copy(job)
    mirror, source = seen.jobs.get(copy.job), seen.graph.nodes.get(copy.source_node)
    if mirror is None or not mirror.caught_up or source is None:
        return False
    bitmap = source.bitmaps.get(_bitmap(copy))
    return bitmap is not None and bitmap.count == 0


def plan_round(seen: Observation, job: ChainJob) -> Plan:
    """What follows a round: another one, or the last with the guest standing still, and the mirror."""
    copy = _copy(job)
    source = seen.graph.nodes.get(copy.source_node)
    bitmap = source.bitmaps.get(_bitmap(copy)) if source is not None else None
    left = bitmap.count if bitmap is not None else 0
    if left > LAST_ROUND_BYTES and (left < job.lacking or left > LAST_ROUND_MAX_BYTES):
        again = msgspec.structs.replace(job, job=next_round(job), round=job.round + 1, lacking=left)
        return Plan(
            what="job-end",
            text=f"{left} bytes of {job.target} were written meanwhile: copy them to {copy.file}",
            prepare=(_round(again, again.job),),
            record=Record(authoritative={job.target: copy.source}, jobs=(again,)),
            settle=(DismissJobs(jobs=(job.job,)),),
        )
    last = next_round(job)
    done = is_mirrored(job, seen)
    window = Window(
        ends_on="source",
        resume=seen.running,
        disks=(),
        steps=(
            *([Stop()] if seen.running else []),
            _round(job, last, 0),
            FinalizeJobs(jobs=(last,)),
            StartMirror.of(copy, "none"),
            AwaitReady(jobs=(copy.job,)),
            # Not before the mirror: what is written after a look, by a guest that somebody lets run, nobody would copy.
            RequireNothingWritten(node=copy.source_node, bitmap=_bitmap(copy)),
        ),
        chain=job,
    )
    return Plan(
        what="job-end",
        text=f"{copy.file} lacks {left} bytes of {job.target}: copy them at one instant, and mirror",
        prepare=() if done else (SyncFiles(paths=(copy.source, copy.file)),),
        window=None if done else window,
        record=Record(authoritative={job.target: copy.source}, jobs=(copy,)),
        settle=(*([Resume()] if seen.running and not done else []), DismissJobs(jobs=(job.job, last))),
    )


def leave_round(job: ChainJob) -> tuple[Step, ...]:
    """How to leave the last round: nothing but the copy is lost, and it can be resumed again."""
    return (CancelJob(job=_copy(job).job), CancelJob(job=next_round(job)))
