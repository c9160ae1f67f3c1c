"""Planning snapshots of several disks, with and without mirrors."""

from __future__ import annotations

import os
from collections.abc import Iterable

import msgspec

from blockferry import errors
from blockferry.model.blockjob import Mirror
from blockferry.model.domain import Observation
from blockferry.model.files import FileFact
from blockferry.model.flags import SnapshotCreate
from blockferry.model.graph import Disk, Node
from blockferry.model.snapshot import DiskWish, MirrorWish, Mode, Snapshot, SnapshotDisk, SnapshotWish
from blockferry.plan import destinations as dest
from blockferry.plan.destinations import Apart, Files, Room
from blockferry.plan.disks import find_disk, require_mirrorable, require_suitable, unsuitable
from blockferry.plan.files import ClaimFile, CreateImage, FlushFiles
from blockferry.plan.plan import Names, Plan, Record
from blockferry.plan.steps import AddNode, Freeze, Pair, StartMirror, Step, TakeSnapshots, Thaw


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A disk that takes part, its new files, and what their headers say of the backing."""

    disk: Disk
    file: str
    mode: Mode
    mirror: MirrorWish | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The overlay's path, and the mirror's."""
        return (self.file, *([self.mirror.file] if self.mirror else []))


def choose(
    domain: str, seen: Observation, wish: SnapshotWish, name: str, flags: SnapshotCreate
) -> tuple[tuple[Choice, ...], dict[str, str]]:
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
        mode = _mode(disk, entry_or_none, flags)
        if mirror is not None:
            require_mirrorable(domain, disk, seen)
        choices.append(Choice(disk=disk, file=file or _generated(domain, disk, name), mode=mode, mirror=mirror))
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


def _mode(disk: Disk, entry: DiskWish | None, flags: SnapshotCreate) -> Mode:
    said = entry.mode if entry is not None else None
    if not flags & SnapshotCreate.REUSE_EXT:
        return said or "absolute"
    if said not in (None, "existing"):
        raise errors.BadRequest(reason=f"REUSE_EXT takes existing files, and mode {said} of {disk.target} makes one")
    return "existing"


def files_of(choices: tuple[Choice, ...]) -> tuple[str, ...]:
    """Every file that is to be looked up before the plan is made."""
    backings = [choice.mirror.backing for choice in choices if choice.mirror and choice.mirror.backing]
    return (*(path for choice in choices for path in (*choice.files, choice.disk.active.file)), *backings)


def existing_files(choices: tuple[Choice, ...]) -> tuple[str, ...]:
    """Those of them whose headers are to be read."""
    return tuple(path for choice in choices if choice.mode == "existing" for path in choice.files)


def require_transaction(domain: str, seen: Observation, flags: SnapshotCreate, disks: int) -> bool:
    """Whether QEMU takes all disks at one instant; refuse what was asked to be so on one that can't.

    Raises:
        MissingCapability: REUSE_EXT, or ATOMIC for several disks, without `transaction`.
    """
    if "transaction" in seen.capabilities.commands:
        return True
    why = None
    if flags & SnapshotCreate.REUSE_EXT:
        why = "`transaction`, and existing files are only taken with it (REUSE_EXT)"
    elif flags & SnapshotCreate.ATOMIC and disks > 1:
        why = f"`transaction`, and {disks} disks at one instant or none (ATOMIC) can't be had without"
    if why:
        raise errors.MissingCapability(domain=domain, capability=why, version=seen.capabilities.version)
    return False


def plan_snapshot(
    domain: str,
    seen: Observation,
    wish: SnapshotWish,
    *,
    names: Names,
    operation: int,
    name: str,
    files: Files,
    now: float,
    parent: str | None,
    flags: int = 0,
) -> Plan:
    """The plan of one snapshot: all disks at one instant (with `transaction`), all mirrors or none, without a pause.

    Args:
        domain: its name.
        seen: the domain as observed.
        wish: what was asked for.
        names: of nodes and jobs.
        operation: its number.
        name: the snapshot's.
        files: of every path in `files_of`, with the headers of `existing_files`.
        now: seconds since 1970.
        parent: the current snapshot.
        flags: SnapshotCreate's.

    Raises:
        Refused: any of its kinds, with nothing done.
    """
    asked = SnapshotCreate(flags)
    choices, left_out = choose(domain, seen, wish, name, asked)
    together = require_transaction(domain, seen, asked, len(choices))
    _check_files(choices, files)
    steps = _switch(choices, names, files, seen, together=together, quiesce=bool(asked & SnapshotCreate.QUIESCE))
    # A snapshot's mirrors are ended by its name; without one they are ended as copies are.
    kept_name = None if asked & SnapshotCreate.NO_METADATA else name
    mirrors = tuple(
        _mirror(domain, choice, names=names, operation=operation, snapshot=kept_name, files=files)
        for choice in choices
        if choice.mirror
    )
    steps += [StartMirror.of(mirror, "top") for mirror in mirrors]
    snapshot = Snapshot(
        domain=domain,
        name=name,
        created=now,
        state=seen.status,
        parent=parent,
        description=wish.description,
        disks=tuple(_remembered(choice, files) for choice in choices),
        left_out=tuple(left_out),
    )
    targets = ", ".join(choice.disk.target for choice in choices)
    return Plan(
        what="snapshot",
        text=f"snapshot {name} of {targets}"
        + (f", mirrored: {', '.join(mirror.target for mirror in mirrors)}" if mirrors else ""),
        prepare=tuple(steps),
        record=Record(
            authoritative={choice.disk.target: choice.file for choice in choices},
            formats={choice.disk.target: "qcow2" for choice in choices},
            snapshot=snapshot,
            metadata=kept_name is not None,
            jobs=mirrors,
        ),
        left_out=left_out,
        notes=_notes(choices, files, kept_name),
        in_part=not together and len(choices) > 1,
    )


def _switch(
    choices: tuple[Choice, ...],
    names: Names,
    files: Files,
    seen: Observation,
    *,
    together: bool,
    quiesce: bool,
) -> list[Step]:
    """Make and open every image, then switch to them; with `quiesce` the guest's file systems rest while that is done."""
    images: list[Step] = []
    for choice in choices:
        images += _images(choice, names, files, seen.graph.nodes[seen.graph.protocol(choice.disk.active.node)])
    # One verb after the other, each for all disks at the same time.
    steps: list[Step] = [
        step for verb in (ClaimFile, CreateImage, AddNode) for step in images if isinstance(step, verb)
    ]
    disks = tuple(choice.disk for choice in choices)
    steps += written_out(disks, seen)
    pairs = tuple(pair_of(disk, names) for disk in disks)
    taken: list[Step] = [TakeSnapshots(pairs=(pair,), together=False) for pair in pairs]
    if together:
        taken = [TakeSnapshots(pairs=pairs)]
    return [*steps, Freeze(), *taken, Thaw(held=True)] if quiesce else steps + taken


def _notes(choices: tuple[Choice, ...], files: Files, kept_name: str | None) -> tuple[str, ...]:
    made = [choice for choice in choices if choice.mode != "existing"]
    blocks = [path for choice in made for path in choice.files if files.facts[path].kind == "block"]
    notes = [f"{path} is a block device: what was on it is overwritten" for path in blocks]
    notes += [
        f"{path} names no backing file: whoever opens it must say that it backs onto {choice.disk.active.file}"
        for choice in choices
        if choice.mode == "none"
        for path in choice.files
    ]
    notes += [] if kept_name else ["it is not remembered as a snapshot (NO_METADATA)"]
    return tuple(notes)


def written_out(disks: Iterable[Disk], seen: Observation) -> tuple[Step, ...]:
    """What makes it short to lay overlays over disks: QEMU flushes them then, and the guest's writes wait for that.

    Files are flushed before, while the guest writes: docs/adr/0023-flush-before-the-switch.md. None that QEMU was told never to flush.

    Args:
        disks: as observed.
        seen: their domain as observed.
    """
    graph = seen.graph
    actives = (disk.active for disk in disks)
    files = [
        each.file
        for each in actives
        if each.file.startswith("/") and not graph.nodes[graph.protocol(each.node)].no_flush
    ]
    return (FlushFiles(paths=tuple(files)),) if files else ()


def pair_of(disk: Disk, names: Names) -> Pair:
    """A disk and the node of its overlay, to be switched to."""
    target = disk.target
    return Pair(target=target, node=disk.active.node, overlay=names.of(target, "s"), job=names.of(target, "u"))


def _check_files(choices: tuple[Choice, ...], files: Files) -> None:
    apart, room = Apart(), Room()
    for choice in choices:
        dest.require_there(choice.disk.active.file, files.facts)
        for path in choice.files:
            fact = files.facts[path]
            apart.add(fact)
            if choice.mode == "existing":
                dest.require_existing(fact, files.users)
                _check_existing(choice, path, files)
            else:
                dest.require_new(fact, files.users)
                room.take(fact, dest.NEW_OVERLAY_BYTES)
    for choice in choices:
        backing = choice.mirror.backing if choice.mirror is not None else None
        if backing is not None and backing in files.facts:
            apart.require(files.facts[backing])


def _check_existing(choice: Choice, path: str, files: Files) -> None:
    """Refuse an existing overlay that is not one of the disk's present image; a mirror's may be of another's chain."""
    active = choice.disk.active
    head = dest.require_image(files.images.get(path, ()), path, "qcow2", active.virtual_size)
    if head.backing is None:
        raise errors.ImageUnsuitable(
            path=path, reason=f"it has no backing file, and is to be an overlay of {active.file}"
        )
    if path != choice.file:
        wanted = choice.mirror.backing if choice.mirror else None
        if wanted is not None and not dest.same_file(head.backing, wanted):
            raise errors.ImageUnsuitable(path=path, reason=f"it backs onto {head.backing}, not onto {wanted} as asked")
        asked = choice.mirror.backing_format if choice.mirror else None
        if asked not in (None, head.backing_format):
            raise errors.ImageUnsuitable(
                path=path, reason=f"it says that {head.backing} is {head.backing_format}, and {asked} was asked for"
            )
        return
    real = files.facts[active.file].real if active.file in files.facts else active.file
    if head.real_backing != real:
        raise errors.ImageUnsuitable(
            path=path, reason=f"it backs onto {head.backing}, not onto {active.file}, the disk's current image"
        )
    if head.backing_format != active.format:
        raise errors.ImageUnsuitable(
            path=path, reason=f"it says that {head.backing} is {head.backing_format}, and it is {active.format}"
        )


def _images(choice: Choice, names: Names, files: Files, like: Node) -> list[Step]:
    active, target = choice.disk.active, choice.disk.target
    steps = image_steps(
        fact=files.facts[choice.file],
        mode=choice.mode,
        size=active.virtual_size,
        backing=active.file,
        backing_format=active.format,
        node=names.of(target, "s"),
        file_node=names.of(target, "sf"),
        like=like,
    )
    if choice.mirror:
        backing, backing_format = mirror_backing(choice, files)
        steps += image_steps(
            fact=files.facts[choice.mirror.file],
            mode=choice.mode,
            size=active.virtual_size,
            backing=backing,
            backing_format=backing_format,
            node=names.of(target, "x"),
            file_node=names.of(target, "xf"),
            like=like,
        )
    return steps


def image_steps(
    *,
    fact: FileFact,
    mode: str,
    size: int,
    backing: str,
    backing_format: str,
    node: str,
    file_node: str,
    like: Node,
) -> list[Step]:
    """Make a qcow2 overlay, or take one that is there, and open it without its backing.

    Args:
        fact: of its path; a new file gets owner and mode of `like`'s.
        mode: what its header is to say.
        size: bytes.
        backing: what it backs onto.
        backing_format: and that one's format.
        node: the format node's name.
        file_node: the protocol node's.
        like: the protocol node of the image that it covers, whose cache mode it gets.
    """
    steps: list[Step] = []
    if mode != "existing":
        # A relative name leads from where the file really is: the system follows links before it goes up from them.
        name = dest.header_name(mode, backing, fact.real if fact.kind == "absent" else fact.path)
        if fact.kind == "absent":
            steps.append(ClaimFile(path=fact.path, like=dest.owner_like(like)))
        steps.append(
            CreateImage(
                path=fact.path,
                format="qcow2",
                size=size,
                backing=name,
                backing_format=backing_format if name else None,
                overwrites=fact.kind == "block",
            )
        )
    options = {**dest.image_options("qcow2", file_node, fact, like), "backing": None}
    return [*steps, AddNode(node=node, options=options)]


def mirror_backing(choice: Choice, files: Files) -> tuple[str, str]:
    """What the mirror backs onto, and its format: as asked, as an existing file says, or as the source's overlay."""
    active, wish = choice.disk.active, choice.mirror
    if wish is None:
        raise AssertionError(choice.disk.target)
    if choice.mode == "existing":
        head = files.images[wish.file][0]
        return str(head.backing), str(head.backing_format)
    return wish.backing or active.file, wish.backing_format or active.format


def _mirror(domain: str, choice: Choice, *, names: Names, operation: int, snapshot: str | None, files: Files) -> Mirror:
    target, wish = choice.disk.target, choice.mirror
    if wish is None:
        raise AssertionError(target)
    backing, backing_format = mirror_backing(choice, files)
    return Mirror(
        domain=domain,
        target=target,
        operation=operation,
        snapshot=snapshot,
        job=names.of(target, "m"),
        source_node=names.of(target, "s"),
        source=choice.file,
        device=choice.disk.filtered,
        node=names.of(target, "x"),
        file_node=names.of(target, "xf"),
        filter_node=names.of(target, "t"),
        file=wish.file,
        format="qcow2",
        backing=backing,
        backing_format=backing_format,
    )


def _remembered(choice: Choice, files: Files) -> SnapshotDisk:
    active = choice.disk.active
    return SnapshotDisk(
        target=choice.disk.target,
        file=choice.file,
        format="qcow2",
        backing=active.file,
        backing_format=active.format,
        block=files.facts[choice.file].kind == "block",
        mode=choice.mode if choice.mode != "absolute" else None,
        mirror=choice.mirror.file if choice.mirror else None,
        mirror_backing=choice.mirror.backing if choice.mirror else None,
        mirror_backing_format=choice.mirror.backing_format if choice.mirror else None,
    )


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What is left of a snapshot whose disks were switched one after the other: which, and the steps that made them."""

    record: Record
    keep: frozenset[int]


def in_part(plan: Plan, seen: Observation) -> Part:
    """The disks that have switched, when a snapshot without `transaction` failed or was interrupted between two.

    They stay on their overlays, without a snapshot of that name: the caller was to have all or to look.
    """
    opened = {step.node: step for step in plan.prepare if isinstance(step, AddNode)}
    switched: dict[str, str] = {}
    nodes: set[str] = set()
    for step in plan.prepare:
        for pair in step.pairs if isinstance(step, TakeSnapshots) else ():
            if seen.graph.child(pair.overlay, "backing") == pair.node:
                switched[pair.target] = str(opened[pair.overlay].filename)
                nodes.add(pair.overlay)
    keep = frozenset(
        index
        for index, step in enumerate(plan.prepare)
        if (isinstance(step, AddNode) and step.node in nodes)
        or (isinstance(step, ClaimFile | CreateImage) and step.path in switched.values())
        or (isinstance(step, TakeSnapshots) and all(pair.target in switched for pair in step.pairs))
    )
    record = Record(
        authoritative=switched,
        formats=dict.fromkeys(switched, "qcow2"),
        reason="one disk after the other, and one failed",
    )
    return Part(record=record, keep=keep)
