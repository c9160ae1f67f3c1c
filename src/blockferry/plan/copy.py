"""Planning block copies: the start of one, and its cancel."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from blockferry import errors
from blockferry.formats.names import NBD_EXPORT_NAME_MAX, NBD_PORT
from blockferry.model.blockjob import BlockJob, ChainJob, JobEnd, Layer, Mirror
from blockferry.model.domain import Observation
from blockferry.model.flags import BlockCopy, require_flags
from blockferry.model.graph import Disk, Image, Node
from blockferry.model.request import StartCopy
from blockferry.plan import destinations as dest
from blockferry.plan.destinations import Files, buffer_of, is_uri
from blockferry.plan.disks import find_disk, require_mirrorable, require_suitable
from blockferry.plan.files import ClaimFile, CreateImage
from blockferry.plan.plan import Names, Plan, Record
from blockferry.plan.steps import AddNode, CancelJob, RemoveNode, RequireSize, StartMirror, StartStream, Step
from blockferry.plan.tracking import AddBitmap, LeaveDestination, RemoveBitmap

# QEMU's of a mirror's granularity (blockdev.c, blockdev_mirror_common): a power of two of 512 B to 64 MiB.
GRANULARITY_MIN, GRANULARITY_MAX = 512, 64 * 1024 * 1024
CARRIED_OUT = (
    BlockCopy.CREATE_RAW
    | BlockCopy.REUSE_EXT
    | BlockCopy.SHALLOW
    | BlockCopy.SYNCHRONOUS_WRITES
    | BlockCopy.TRANSIENT_JOB  # no attached domain has a definition that a copy could be at odds with
)
# Without these a copy works as well; it can't be resumed.
TRACKING = frozenset({"block-dirty-bitmap-add", "block-dirty-bitmap-remove", "block-dirty-bitmap-merge"})
# A qcow2's own tables: 64 KiB clusters take 1/8192 for L2 and 1/32768 for the refcounts; what is fixed is in clusters.
_QCOW2_FIXED_BYTES = 5 * 64 * 1024


def nbd_options(uri: str) -> dict[str, Any]:
    """QAPI BlockdevOptionsNbd of `nbd+unix:///EXPORT?socket=PATH` or `nbd://HOST[:PORT]/EXPORT`.

    Raises:
        DestinationUnusable: it is neither.
    """
    try:
        parts = urlsplit(uri)
        port = parts.port or NBD_PORT
    except ValueError as error:
        raise errors.DestinationUnusable(path=uri, reason=str(error)) from error
    if parts.username is not None or parts.password is not None:
        # NBD has no users; whoever writes one writes a password next, which would be kept and shown.
        hidden = f"{parts.scheme}://***@{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise errors.DestinationUnusable(path=hidden, reason="an NBD URI has no user and no password")
    export = unquote(parts.path.removeprefix("/"))
    if len(export) > NBD_EXPORT_NAME_MAX:
        raise errors.DestinationUnusable(path=uri, reason="its export name is over 4096 bytes")
    if parts.scheme == "nbd+unix":
        sockets = parse_qs(parts.query).get("socket", [])
        if len(sockets) != 1 or not sockets[0].startswith("/") or parts.netloc:
            raise errors.DestinationUnusable(path=uri, reason="write nbd+unix:///EXPORT?socket=/ABSOLUTE/PATH")
        return {"driver": "nbd", "server": {"type": "unix", "path": sockets[0]}, "export": export}
    if not parts.hostname or parts.query:
        raise errors.DestinationUnusable(path=uri, reason="write nbd://HOST[:PORT]/EXPORT")
    return {"driver": "nbd", "server": {"type": "inet", "host": parts.hostname, "port": str(port)}, "export": export}


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """A copy as it is carried out, from what was asked for.

    Attributes:
        disk: whose.
        file: the destination's path or URI.
        format: the destination's.
        base: the image of the chain that the destination backs onto; None for a whole copy.
        reuse: whether the destination is an image that is there.
        options: more arguments of blockdev-mirror.
    """

    disk: Disk
    file: str
    format: str
    base: Image | None
    reuse: bool
    options: dict[str, Any]

    @property
    def layers(self) -> tuple[Image, ...]:
        """The images that are copied, top first."""
        chain = self.disk.chain
        return chain if self.base is None else chain[: chain.index(self.base)]


def understand(domain: str, seen: Observation, request: StartCopy) -> Wish:
    """What a request for a copy comes to.

    Raises:
        NoSuchDisk, AmbiguousDisk, DiskUnsuitable, DiskBusy: of the disk.
        BadRequest: contradictory wishes.
        DestinationUnusable: of an NBD export.
        ImageUnsuitable: the base is none of the chain.
        UnsupportedFlag: a flag that is not carried out.
    """
    flags = BlockCopy(request.flags)
    require_flags("block_copy", flags, CARRIED_OUT)
    disk = find_disk(domain, seen, request.disk)
    require_suitable(domain, disk, seen)
    require_mirrorable(domain, disk, seen)
    base = _base(disk, request.base, flags)
    image_format = _format(disk, request, flags)
    if base is not None and image_format == "raw":
        raise errors.BadRequest(reason=f"a raw image can't back onto a base, and {base.file} was asked for")
    return Wish(
        disk=disk,
        file=request.dest,
        format=image_format,
        base=base,
        reuse=bool(flags & BlockCopy.REUSE_EXT),
        options=_options(disk, request, flags, seen.at_work),
    )


def _base(disk: Disk, name: str | None, flags: BlockCopy) -> Image | None:
    below = disk.chain[1:]
    if name is None:
        return below[0] if flags & BlockCopy.SHALLOW and below else None
    if flags & BlockCopy.SHALLOW:
        raise errors.BadRequest(reason="SHALLOW says which base, and a base was named as well: say one")
    return image_below(disk, name)


def image_below(disk: Disk, name: str) -> Image:
    """The image of that file under the disk's active one.

    Raises:
        ImageUnsuitable: there is none.
    """
    found = next((image for image in disk.chain[1:] if dest.same_file(image.file, name)), None)
    if found is None:
        chain = " <- ".join(image.file for image in reversed(disk.chain))
        raise errors.ImageUnsuitable(path=name, reason=f"it is no image under {disk.target}'s active one ({chain})")
    return found


def _format(disk: Disk, request: StartCopy, flags: BlockCopy) -> str:
    """The destination's format: as asked, raw for CREATE_RAW and NBD, else the source's."""
    wanted = request.format
    if flags & BlockCopy.CREATE_RAW:
        if wanted not in (None, "raw"):
            raise errors.BadRequest(reason=f"CREATE_RAW and format {wanted} contradict each other")
        if flags & BlockCopy.REUSE_EXT:
            raise errors.BadRequest(reason="CREATE_RAW makes an image, and REUSE_EXT takes one that is there: say one")
        return "raw"
    if is_uri(request.dest):
        if wanted not in (None, "raw"):
            raise errors.DestinationUnusable(
                path=request.dest,
                reason="an NBD export can't grow: it is written as raw (qemu-nbd gives it a format)",
            )
        return "raw"
    if wanted not in (None, "qcow2", "raw"):
        raise errors.BadRequest(reason=f"format {wanted!r} is not carried out: qcow2 or raw of {disk.target}")
    return wanted or disk.active.format


def _options(disk: Disk, request: StartCopy, flags: BlockCopy, at_work: frozenset[str]) -> dict[str, Any]:
    size = disk.active.virtual_size
    options: dict[str, Any] = buffer_of(
        request.dest, size, size, at_work=disk.target in at_work and not flags & BlockCopy.SYNCHRONOUS_WRITES
    )
    if request.granularity is not None:
        unit = request.granularity
        if unit & (unit - 1) or not GRANULARITY_MIN <= unit <= GRANULARITY_MAX:
            raise errors.BadRequest(reason=f"a granularity is a power of two of 512 to 67108864 bytes, not {unit}")
        options["granularity"] = unit
    if request.buf_size is not None:
        if request.buf_size <= 0:
            raise errors.BadRequest(reason="a buffer's size is bytes, at least one")
        options["buf-size"] = request.buf_size
    if flags & BlockCopy.SYNCHRONOUS_WRITES:
        options["copy-mode"] = "write-blocking"
    return options


def plan_copy(
    domain: str, seen: Observation, request: StartCopy, *, names: Names, operation: int, files: Files
) -> Plan:
    """The plan of starting a copy; the pivot or finish is another operation.

    Onto a base further down than the immediate backing, what lies between is pulled into the destination first (QEMU
    has no such mirror); its mirror begins when that has ended.

    Args:
        domain: its name.
        seen: the domain as observed.
        request: what was asked for.
        names: of nodes and jobs.
        operation: its number.
        files: facts of the destination (when it is a path) and of every file in the chain.

    Raises:
        Refused: any of its kinds, with nothing done.
    """
    wish = understand(domain, seen, request)
    disk = wish.disk
    like = seen.graph.nodes[seen.graph.protocol(disk.active.node)]
    backing = _check_destination(wish, files)
    mirror = _mirror(domain, wish, backing, names=names, operation=operation, files=files)
    if _resumable(wish, seen, files):
        mirror = msgspec.structs.replace(
            mirror, bitmap=names.of(disk.target, "k"), blank=wish.reuse and wish.file in files.blank
        )
    steps = open_export(mirror, disk) if is_uri(wish.file) else _open_file(mirror, wish, files, like)
    whole, shallow = wish.base is None, wish.base is not None and wish.base == disk.chain[1]
    job: BlockJob = mirror
    if mirror.bitmap is not None:
        # Before the mirror: from then on nothing that is written goes uncounted.
        steps.append(AddBitmap(node=mirror.source_node, bitmap=mirror.bitmap))
    if whole or shallow:
        steps.append(StartMirror.of(mirror, "full" if whole else "top", request.bandwidth))
    else:
        fill = _fill(mirror, wish, names, request.bandwidth)
        steps.append(_stream(fill, backing[0] if backing else None))
        job = fill
    onto = f", backing onto {backing[0]}" if backing else ""
    kind = (
        "an NBD export" if is_uri(wish.file) else "a block device" if files.facts[wish.file].kind == "block" else None
    )
    notes = (f"{wish.file} is {kind}: what was on it is overwritten",) if kind is not None else ()
    return Plan(
        what="copy",
        text=f"copy {disk.target} to {wish.file} ({wish.format}{onto})",
        prepare=tuple(steps),
        record=Record(authoritative={disk.target: disk.active.file}, jobs=(job,)),
        notes=notes,
    )


def _resumable(wish: Wish, seen: Observation, files: Files) -> bool:
    """Whether it can be known one day what a copy that was interrupted lacks: of a whole one in a file that was empty."""
    if wish.base is not None or is_uri(wish.file) or not seen.capabilities.commands >= TRACKING:
        return False
    return files.facts[wish.file].kind == "absent" or wish.file in files.blank


def _mirror(
    domain: str, wish: Wish, backing: tuple[str, str] | None, *, names: Names, operation: int, files: Files
) -> Mirror:
    disk, export = wish.disk, files.exports.get(wish.file)
    return Mirror(
        domain=domain,
        target=disk.target,
        operation=operation,
        job=names.of(disk.target, "m"),
        source_node=disk.active.node,
        source=disk.active.file,
        device=disk.filtered,
        node=names.of(disk.target, "x"),
        file_node=names.of(disk.target, "xf"),
        filter_node=names.of(disk.target, "t"),
        file=wish.file,
        format=wish.format,
        backing=backing[0] if backing else None,
        backing_format=backing[1] if backing else None,
        stands_for=wish.base.file if wish.base is not None else None,
        options=wish.options,
        multi_conn=export is not None and export.multi_conn,
    )


def _fill(mirror: Mirror, wish: Wish, names: Names, speed: int) -> ChainJob:
    if wish.base is None:
        raise AssertionError(wish)
    base = Layer(node=wish.base.node, file=wish.base.file, format=wish.base.format)
    return ChainJob(
        domain=mirror.domain,
        target=mirror.target,
        operation=mirror.operation,
        job=names.of(mirror.target, "f"),
        type="fill",
        top=Layer(node=mirror.node, file=mirror.file, format=mirror.format),
        base=base,
        above=mirror.node,
        then=mirror,
        speed=speed,
    )


def _stream(fill: ChainJob, header: str | None) -> Step:
    return StartStream(
        job=fill.job,
        device=fill.top.node,
        base=fill.base.node if fill.base else None,
        backing_file=header,
        filter_node=f"{fill.job}t",
        speed=fill.speed,
    )


# --- the destination ------------------------------------------------------------------------------------------


def _check_destination(wish: Wish, files: Files) -> tuple[str, str] | None:
    """Refuse a destination that won't do; what it backs onto and that one's format, None when it stands alone."""
    disk, base = wish.disk, wish.base
    backing = (base.file, base.format) if base is not None else None
    if is_uri(wish.file):
        if wish.file in files.users:
            raise errors.ImageUnsuitable(path=wish.file, reason=f"it is in use: {files.users[wish.file]}")
        dest.require_export(wish.file, files, wish.disk.active.virtual_size)
        return backing
    fact = files.facts[wish.file]
    if any(files.facts[image.file].is_same(fact) for image in disk.chain if image.file in files.facts):
        raise errors.DestinationUnusable(path=wish.file, reason=f"it is in the chain of {disk.target}")
    size = disk.active.virtual_size
    if wish.reuse:
        dest.require_existing(fact, files.users)
        backing = _existing_backing(wish, files)
    else:
        dest.require_new(fact, files.users)
    if fact.kind == "block" and wish.format == "raw" and fact.size != size:
        raise errors.DestinationUnusable(path=wish.file, reason=f"it has {fact.size} bytes, and the disk has {size}")
    dest.Room().take(fact, needed_bytes(wish, files))
    return backing


def needed_bytes(wish: Wish, files: Files) -> int:
    """What the copy takes up when it begins: what its layers take up, holes left out, and a qcow2's own tables."""
    allocated = sum(files.facts[image.file].allocated for image in wish.layers if image.file in files.facts)
    data = min(wish.disk.active.virtual_size, allocated)
    return data if wish.format == "raw" else data + data // 8192 + data // 32768 + _QCOW2_FIXED_BYTES


def _existing_backing(wish: Wish, files: Files) -> tuple[str, str] | None:
    size = wish.disk.active.virtual_size
    head = dest.require_image(files.images.get(wish.file, ()), wish.file, wish.format, size)
    if wish.base is None:
        if head.backing is not None:
            raise errors.ImageUnsuitable(
                path=wish.file, reason=f"it backs onto {head.backing}, and a whole copy stands alone (or name a --base)"
            )
        return None
    if head.backing is None:
        raise errors.ImageUnsuitable(
            path=wish.file, reason=f"it has no backing file, and the copy is to back onto {wish.base.file}"
        )
    if head.real_backing == files.facts[wish.base.file].real:
        return wish.base.file, wish.base.format
    # The destination's own chain: the caller says that it holds what the base holds, or will at the pivot. What can't any
    # more is refused now: a raw file that is still being copied grows, anything else has its size from the beginning.
    for own in files.images[wish.file][1:2]:
        if not own.problem and (own.format != "raw" or own.virtual_size > wish.base.virtual_size):
            dest.require_size_of(own, wish.base)
    return head.backing, str(head.backing_format)


def open_export(mirror: Mirror, disk: Disk) -> list[Step]:
    """Open an NBD export as a destination, if it has the disk's size."""
    export = {**nbd_options(mirror.file), "node-name": mirror.file_node}
    return [
        AddNode(node=mirror.node, options={"driver": "raw", "file": export, "discard": "unmap"}),
        RequireSize(node=mirror.node, size=disk.active.virtual_size),
    ]


def _open_file(mirror: Mirror, wish: Wish, files: Files, like: Node) -> list[Step]:
    fact, disk = files.facts[mirror.file], wish.disk
    steps: list[Step] = []
    if fact.kind == "absent":
        steps.append(ClaimFile(path=mirror.file, like=dest.owner_like(like)))
    if fact.kind == "absent" or (fact.kind == "block" and mirror.format == "qcow2" and not wish.reuse):
        steps.append(
            CreateImage(
                path=mirror.file,
                format=mirror.format,
                size=disk.active.virtual_size,
                backing=dest.header_name(None, mirror.backing, mirror.file) if mirror.backing else None,
                backing_format=mirror.backing_format,
                overwrites=fact.kind == "block",
            )
        )
    top = dest.image_options(mirror.format, mirror.file_node, fact, like)
    if mirror.format == "qcow2":
        # While it is filled it stands on what the disk stands on; else it is given its chain before the switch.
        fills = wish.base is not None and wish.base != disk.chain[1]
        top["backing"] = disk.chain[1].node if fills else None
    return [*steps, AddNode(node=mirror.node, options=top)]


# --- ends -----------------------------------------------------------------------------------------------------


def close_job(job: BlockJob) -> tuple[Step, ...]:
    """Forget a job that is over without having switched anything: the job, and a destination's nodes. Files stay."""
    return (CancelJob(job=job.job), *([close(job.copy)] if job.copy is not None else []))


def close(copy: Mirror) -> Step:
    """Close a copy's destination; what it looks like then is kept, if it may be gone on with."""
    if copy.bitmap is None:
        return RemoveNode(node=copy.node)
    return LeaveDestination(node=copy.node, file=copy.file)


def forget_bitmap(copy: Mirror) -> tuple[Step, ...]:
    """Remove the bitmap of a copy that will not be resumed."""
    return () if copy.bitmap is None else (RemoveBitmap(node=copy.source_node, bitmap=copy.bitmap),)


def plan_cancel(jobs: tuple[BlockJob, ...], what: str, ended: JobEnd) -> Plan:
    """The plan of cancelling jobs or dropping a snapshot's mirrors; the guest stays on its sources.

    Args:
        jobs: those that are to end.
        what: `cancel` or `remove-mirror`.
        ended: `cancelled` or `removed`.
    """
    names = ", ".join(f"{job.type} of {job.target}" for job in jobs)
    return Plan(
        what=what,
        text=f"{'cancel' if what == 'cancel' else 'remove'} the {names}",
        record=Record(
            authoritative={job.target: job.source for job in jobs if isinstance(job, Mirror)},
            ended={job.target: ended for job in jobs},
            reason="on request",
        ),
        settle=tuple(step for job in jobs for step in close_job(job)),
    )
