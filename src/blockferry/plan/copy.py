"""Planning block copies: the start of one, and its cancel."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from blockferry import errors
from blockferry.model.domain import Observation
from blockferry.model.files import FileFact
from blockferry.model.flags import BlockCopy, require_flags
from blockferry.model.graph import Disk
from blockferry.model.snapshot import Mirror, MirrorEnd
from blockferry.plan.disks import find_disk, require_new_file, require_suitable
from blockferry.plan.plan import Names, Plan, Record
from blockferry.plan.steps import AddNode, CancelJob, ClaimFile, CreateImage, RemoveNode, RequireSize, StartMirror, Step

# QEMU's own limit of an NBD export name (include/block/nbd.h, NBD_MAX_STRING_SIZE).
NBD_EXPORT_NAME_MAX = 4096


def is_uri(dest: str) -> bool:
    """Whether a destination is an NBD export rather than a file."""
    return dest.startswith(("nbd+unix://", "nbd://"))


def nbd_options(uri: str) -> dict[str, Any]:
    """QAPI BlockdevOptionsNbd of `nbd+unix:///EXPORT?socket=PATH` or `nbd://HOST[:PORT]/EXPORT`.

    Raises:
        DestinationUnusable: it is neither.
    """
    parts = urlsplit(uri)
    export = unquote(parts.path.removeprefix("/"))
    if len(export) > NBD_EXPORT_NAME_MAX:
        raise errors.DestinationUnusable(path=uri, reason="its export name is over 4096 bytes")
    if parts.scheme == "nbd+unix":
        sockets = parse_qs(parts.query).get("socket", [])
        if len(sockets) != 1 or not sockets[0].startswith("/") or parts.netloc:
            raise errors.DestinationUnusable(path=uri, reason="write nbd+unix:///EXPORT?socket=/ABSOLUTE/PATH")
        return {"driver": "nbd", "server": {"type": "unix", "path": sockets[0]}, "export": export}
    try:
        port = parts.port or 10809
    except ValueError as error:
        raise errors.DestinationUnusable(path=uri, reason=str(error)) from error
    if not parts.hostname or parts.query:
        raise errors.DestinationUnusable(path=uri, reason="write nbd://HOST[:PORT]/EXPORT")
    return {"driver": "nbd", "server": {"type": "inet", "host": parts.hostname, "port": str(port)}, "export": export}


def destination_format(domain: str, disk: Disk, dest: str, wanted: str | None, flags: BlockCopy) -> str:
    """The destination's format: as asked, raw for CREATE_RAW and NBD, else the source's.

    Raises:
        BadRequest: contradictory wishes.
        UnsupportedFlag: a flag that is not carried out.
    """
    require_flags("block_copy", flags, BlockCopy.CREATE_RAW)
    if flags & BlockCopy.CREATE_RAW:
        if wanted not in (None, "raw"):
            raise errors.BadRequest(reason=f"CREATE_RAW and format {wanted} contradict each other")
        return "raw"
    if is_uri(dest):
        if wanted not in (None, "raw"):
            raise errors.DestinationUnusable(
                path=dest, reason="an NBD export can't grow: it is written as raw (qemu-nbd gives it a format)"
            )
        return "raw"
    if wanted not in (None, "qcow2", "raw"):
        raise errors.BadRequest(
            reason=f"format {wanted!r} is not carried out: qcow2 or raw of {domain}'s {disk.target}"
        )
    return wanted or disk.active.format


def plan_copy(
    domain: str,
    seen: Observation,
    *,
    disk_name: str,
    dest: str,
    names: Names,
    operation: int,
    facts: dict[str, FileFact],
    wanted: str | None,
    bandwidth: int,
    flags: BlockCopy,
) -> Plan:
    """The plan of starting a copy of a whole chain; the pivot or finish is another operation.

    Args:
        domain: its name.
        seen: the domain as observed.
        disk_name: target, qdev id or image path.
        dest: an absolute path that must not exist, or an NBD URI.
        names: of nodes and jobs.
        operation: its number.
        facts: of `dest` (when it is a path) and of every file in the chain.
        wanted: the destination's format, None for the source's.
        bandwidth: bytes per second, 0 for no limit.
        flags: BlockCopy's.

    Raises:
        Refused: any of its kinds, with nothing done.
    """
    disk = find_disk(domain, seen, disk_name)
    require_suitable(domain, disk, seen)
    image_format = destination_format(domain, disk, dest, wanted, flags)
    mirror = Mirror(
        domain=domain,
        target=disk.target,
        operation=operation,
        job=names.of(disk.target, "m"),
        source_node=disk.active.node,
        source=disk.active.file,
        node=names.of(disk.target, "x"),
        file_node=names.of(disk.target, "xf"),
        filter_node=names.of(disk.target, "t"),
        file=dest,
        format=image_format,
    )
    if is_uri(dest):
        steps = _open_export(mirror, disk)
    else:
        _check_room(disk, facts, dest)
        steps = _create_file(mirror, disk, seen)
    return Plan(
        what="copy",
        text=f"copy {disk.target} to {dest} ({image_format})",
        prepare=(*steps, StartMirror.of(mirror, "full", bandwidth)),
        record=Record(authoritative={disk.target: disk.active.file}, mirrors=(mirror,)),
    )


def _check_room(disk: Disk, facts: dict[str, FileFact], dest: str) -> None:
    fact = facts[dest]
    require_new_file(fact)
    layers = [facts[image.file] for image in disk.chain if image.file in facts]
    if any(layer.real == fact.real for layer in layers):
        raise errors.DestinationUnusable(path=dest, reason=f"it is in the chain of {disk.target}")
    needed = min(disk.active.virtual_size, sum(layer.allocated for layer in layers))
    if needed > fact.free:
        raise errors.NoRoom(path=dest, needed=needed, available=fact.free)


def _open_export(mirror: Mirror, disk: Disk) -> list[Step]:
    return [
        AddNode(node=mirror.file_node, options=nbd_options(mirror.file)),
        AddNode(node=mirror.node, options={"driver": "raw", "file": mirror.file_node, "discard": "unmap"}),
        RequireSize(node=mirror.node, size=disk.active.virtual_size),
    ]


def _create_file(mirror: Mirror, disk: Disk, seen: Observation) -> list[Step]:
    like = seen.graph.nodes[seen.graph.protocol(disk.active.node)]
    cache = {"direct": like.direct, "no-flush": like.no_flush}
    top: dict[str, Any] = {"driver": mirror.format, "file": mirror.file_node, "cache": cache, "discard": "unmap"}
    if mirror.format == "qcow2":
        top["backing"] = None
    return [
        ClaimFile(path=mirror.file, like=like.filename if like.driver == "file" else None),
        CreateImage(path=mirror.file, format=mirror.format, size=disk.active.virtual_size),
        # discard=unmap on both nodes: the mirror then keeps holes, also in a raw file.
        AddNode(
            node=mirror.file_node,
            options={"driver": "file", "filename": mirror.file, "cache": cache, "discard": "unmap"},
        ),
        AddNode(node=mirror.node, options=top),
    ]


def close_mirror(mirror: Mirror) -> tuple[Step, ...]:
    """Forget a mirror that ended on its source: the job, the destination's nodes. Its file stays."""
    return (
        CancelJob(job=mirror.job),
        RemoveNode(node=mirror.node),
        RemoveNode(node=mirror.file_node),
    )


def plan_cancel(mirrors: tuple[Mirror, ...], what: str, ended: MirrorEnd) -> Plan:
    """The plan of cancelling copies or dropping a snapshot's mirrors; the guest stays on its sources.

    Args:
        mirrors: those that are to end.
        what: `cancel` or `remove-mirror`.
        ended: `cancelled` or `removed`.
    """
    targets = ", ".join(mirror.target for mirror in mirrors)
    return Plan(
        what=what,
        text=f"{'cancel' if what == 'cancel' else 'remove'} the mirror of {targets}",
        record=Record(
            authoritative={mirror.target: mirror.source for mirror in mirrors},
            ended={mirror.target: ended for mirror in mirrors},
            reason="on request",
        ),
        settle=tuple(step for mirror in mirrors for step in close_mirror(mirror)),
    )
