"""Planning snapshots of several disks, with and without mirrors."""

from __future__ import annotations

import os

import msgspec

from blockferry import errors
from blockferry.model.domain import Observation
from blockferry.model.files import FileFact
from blockferry.model.graph import Disk, Node
from blockferry.model.snapshot import DiskWish, Mirror, MirrorWish, Snapshot, SnapshotDisk, SnapshotWish
from blockferry.plan.disks import find_disk, require_new_file, require_suitable, unsuitable
from blockferry.plan.plan import Names, Plan, Record
from blockferry.plan.steps import AddNode, ClaimFile, CreateImage, Pair, StartMirror, Step, TakeSnapshots

# A new qcow2 with a backing file takes three clusters of 64 KiB; a fourth comes with its first write.
NEW_OVERLAY_BYTES = 4 * 64 * 1024


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A disk that takes part, and its new files."""

    disk: Disk
    file: str
    mirror: MirrorWish | None = None


def choose(domain: str, seen: Observation, wish: SnapshotWish, name: str) -> tuple[tuple[Choice, ...], dict[str, str]]:
    """Which disks take part and with which files; and who is left out, with the reason.

    Raises:
        NoSuchDisk, AmbiguousDisk, DiskUnsuitable, DiskBusy: for a disk that was named.
        BadRequest: a disk named twice, or none left to snapshot.
    """
    named: dict[str, DiskWish] = {}
    for entry in wish.disks:
        disk = find_disk(domain, seen, entry.name)
        if disk.target in named:
            raise errors.BadRequest(reason=f"disk {disk.target} is named twice ({entry.name})")
        if entry.snapshot != "no":
            require_suitable(domain, disk, seen)
        named[disk.target] = entry
    choices, left_out = [], {}
    for disk in seen.disks:
        entry_or_none = named.get(disk.target)
        if entry_or_none is None and wish.only_these:
            continue
        if entry_or_none is not None and entry_or_none.snapshot == "no":
            left_out[disk.target] = "as asked"
            continue
        if entry_or_none is None:
            reason = unsuitable(disk, seen.graph)
            if reason:
                left_out[disk.target] = reason
                continue
            require_suitable(domain, disk, seen)
        file = entry_or_none.file if entry_or_none is not None else None
        mirror = entry_or_none.mirror if entry_or_none is not None else None
        choices.append(Choice(disk=disk, file=file or _generated(domain, disk, name), mirror=mirror))
    if not choices:
        raise errors.BadRequest(reason="no disk is left to take a snapshot of")
    return tuple(choices), left_out


def _generated(domain: str, disk: Disk, name: str) -> str:
    """Libvirt's: the active image's name with its suffix replaced by the snapshot's name (virDomainSnapshotAlign)."""
    if not disk.active.file.startswith("/"):
        raise errors.DiskUnsuitable(
            domain=domain, disk=disk.target, reason=f"its image {disk.active.file} is no file: name the overlay's"
        )
    folder, base = os.path.split(disk.active.file)
    return os.path.join(folder, f"{os.path.splitext(base)[0]}.{name}")


def new_files(choices: tuple[Choice, ...]) -> tuple[str, ...]:
    """Every file that would be created, to be looked up before the plan is made."""
    return tuple(path for choice in choices for path in (choice.file, choice.mirror and choice.mirror.file) if path)


def plan_snapshot(
    domain: str,
    seen: Observation,
    wish: SnapshotWish,
    *,
    names: Names,
    operation: int,
    name: str,
    facts: dict[str, FileFact],
    now: float,
    parent: str | None,
) -> Plan:
    """The plan of one snapshot: all disks at one instant, all mirrors or none, without a pause.

    Args:
        domain: its name.
        seen: the domain as observed.
        wish: what was asked for.
        names: of nodes and jobs.
        operation: its number.
        name: the snapshot's.
        facts: of every path in `new_files`.
        now: seconds since 1970.
        parent: the current snapshot.

    Raises:
        Refused: any of its kinds, with nothing done.
    """
    choices, left_out = choose(domain, seen, wish, name)
    _check_files(choices, facts)
    steps: list[Step] = []
    for choice in choices:
        steps += _overlay(choice, names, seen.graph.nodes[seen.graph.protocol(choice.disk.active.node)])
    steps.append(TakeSnapshots(pairs=tuple(_pair(choice.disk, names) for choice in choices)))
    mirrors = tuple(_mirror(domain, choice, names, operation, name) for choice in choices if choice.mirror)
    steps += [StartMirror.of(mirror, "top") for mirror in mirrors]
    snapshot = Snapshot(
        domain=domain,
        name=name,
        created=now,
        state=seen.status,
        parent=parent,
        description=wish.description,
        disks=tuple(_remembered(choice) for choice in choices),
        left_out=tuple(left_out),
    )
    targets = ", ".join(choice.disk.target for choice in choices)
    return Plan(
        what="snapshot",
        text=f"snapshot {name} of {targets}"
        + (f", mirrored: {', '.join(mirror.target for mirror in mirrors)}" if mirrors else ""),
        prepare=tuple(steps),
        record=Record(
            authoritative={choice.disk.target: choice.file for choice in choices}, snapshot=snapshot, mirrors=mirrors
        ),
        left_out=left_out,
    )


def _pair(disk: Disk, names: Names) -> Pair:
    target = disk.target
    return Pair(target=target, node=disk.active.node, overlay=names.of(target, "s"), job=names.of(target, "u"))


def _check_files(choices: tuple[Choice, ...], facts: dict[str, FileFact]) -> None:
    seen: set[str] = set()
    wanted: dict[int, int] = {}
    for path in new_files(choices):
        fact = facts[path]
        if fact.real in seen:
            raise errors.DuplicateFile(path=path)
        seen.add(fact.real)
        require_new_file(fact)
        wanted[fact.device] = wanted.get(fact.device, 0) + NEW_OVERLAY_BYTES
        if wanted[fact.device] > fact.free:
            raise errors.NoRoom(path=path, needed=wanted[fact.device], available=fact.free)


def _overlay(choice: Choice, names: Names, like: Node) -> list[Step]:
    active = choice.disk.active
    target = choice.disk.target
    steps = image_steps(
        path=choice.file,
        size=active.virtual_size,
        backing=active.file,
        backing_format=active.format,
        node=names.of(target, "s"),
        file_node=names.of(target, "sf"),
        like=like,
    )
    if choice.mirror:
        steps += image_steps(
            path=choice.mirror.file,
            size=active.virtual_size,
            backing=choice.mirror.backing or active.file,
            backing_format=choice.mirror.backing_format or active.format,
            node=names.of(target, "x"),
            file_node=names.of(target, "xf"),
            like=like,
        )
    return steps


def image_steps(
    *, path: str, size: int, backing: str, backing_format: str, node: str, file_node: str, like: Node
) -> list[Step]:
    """Create a qcow2 overlay and open it without its backing, with the cache mode of the image that it covers.

    Args:
        path: the new file; gets owner and mode of `like`'s.
        size: bytes.
        backing: what its header is to name, absolute.
        backing_format: and that one's format.
        node: the format node's name.
        file_node: the protocol node's.
        like: the protocol node of the image that it covers.
    """
    cache = {"direct": like.direct, "no-flush": like.no_flush}
    return [
        ClaimFile(path=path, like=like.filename if like.driver == "file" else None),
        CreateImage(path=path, format="qcow2", size=size, backing=backing, backing_format=backing_format),
        AddNode(node=file_node, options={"driver": "file", "filename": path, "cache": cache, "discard": "unmap"}),
        AddNode(
            node=node,
            options={"driver": "qcow2", "file": file_node, "backing": None, "cache": cache, "discard": "unmap"},
        ),
    ]


def _mirror(domain: str, choice: Choice, names: Names, operation: int, snapshot: str) -> Mirror:
    target, wish = choice.disk.target, choice.mirror
    if wish is None:
        raise AssertionError(target)
    return Mirror(
        domain=domain,
        target=target,
        operation=operation,
        snapshot=snapshot,
        job=names.of(target, "m"),
        source_node=names.of(target, "s"),
        source=choice.file,
        node=names.of(target, "x"),
        file_node=names.of(target, "xf"),
        filter_node=names.of(target, "t"),
        file=wish.file,
        format="qcow2",
        backing=wish.backing or choice.disk.active.file,
        backing_format=wish.backing_format or choice.disk.active.format,
    )


def _remembered(choice: Choice) -> SnapshotDisk:
    active = choice.disk.active
    return SnapshotDisk(
        target=choice.disk.target,
        file=choice.file,
        format="qcow2",
        backing=active.file,
        backing_format=active.format,
        mirror=choice.mirror.file if choice.mirror else None,
        mirror_backing=choice.mirror.backing if choice.mirror else None,
        mirror_backing_format=choice.mirror.backing_format if choice.mirror else None,
    )
