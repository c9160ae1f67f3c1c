"""Planning how a move begins: where each image goes, which way each disk, what is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import msgspec

from blockferry import errors
from blockferry.model.domain import Observation
from blockferry.model.files import FileFact
from blockferry.model.graph import Disk, Image
from blockferry.model.move import Layer, Move, MovedDisk, Strategy
from blockferry.model.request import MoveStorage
from blockferry.model.snapshot import Snapshot
from blockferry.plan import destinations as dest
from blockferry.plan.atonce import plan_at_once
from blockferry.plan.destinations import Apart, Files, Room, is_uri
from blockferry.plan.disks import find_disk, require_mirrorable, require_suitable, unsuitable
from blockferry.plan.files import ClaimFile, CreateImage
from blockferry.plan.move import start_mirrors
from blockferry.plan.plan import Names, Plan, Record
from blockferry.plan.snapshot import image_steps, pair_of, written_out
from blockferry.plan.steps import AddNode, Step, TakeSnapshots

# What a pause takes beside what is left to be copied: stop, drain, switch and read back took 40 ms for eight disks.
PAUSE_MS = 40.0
# A file is copied by its path, and QEMU has open what was there once: of another one a comparison would say that it is equal.
NOT_OPEN = "is locked by no QEMU: it may be another file than the one that the guest has open"
SHARED = "its copy shares its blocks, and what is written meanwhile is mirrored"


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """A disk of a request, and where its images are to go.

    Attributes:
        disk: as observed.
        file: the path or URI that the guest goes over to.
        format: that image's.
        below: source -> copy, of the images under the active one that are copied with it, from the top.
        overlay: the path of an overlay, should one be laid.
    """

    disk: Disk
    file: str
    format: str
    below: dict[str, str] = {}
    overlay: str

    @property
    def paths(self) -> tuple[str, ...]:
        """Everything that has to be looked up."""
        made = [*self.below.values(), self.overlay, *([] if is_uri(self.file) else [self.file])]
        return (*(image.file for image in self.disk.chain if image.file.startswith("/")), *made)


def place(
    domain: str, seen: Observation, request: MoveStorage, operation: int, sources: Mapping[str, FileFact]
) -> tuple[tuple[Placed, ...], dict[str, str]]:
    """Where each image of each disk is to go; and the disks that stay, with the reason.

    Args:
        domain: its name.
        seen: the domain as observed.
        request: what was asked for.
        operation: the move's number.
        sources: of the disks' images: an image that goes by two names is copied once.

    Raises:
        NoSuchDisk, AmbiguousDisk, DiskUnsuitable, DiskBusy: of a disk.
        BadRequest: contradictory wishes.
    """
    named = {find_disk(domain, seen, name).target: file for name, file in request.disks.items()}
    if len(named) < len(request.disks):
        raise errors.BadRequest(reason="a disk is named twice")
    placed: list[Placed] = []
    left_out: dict[str, str] = {}
    names = {file: fact.identity or fact.real for file, fact in sources.items()}
    taken: dict[str, str] = {}
    for disk in seen.disks:
        if named and disk.target not in named:
            continue
        reason = unsuitable(disk, seen.graph)
        if reason and disk.target not in named:
            left_out[disk.target] = reason
            continue
        require_suitable(domain, disk, seen)
        placed.append(_place(disk, request, named.get(disk.target), taken, names=names, operation=operation))
    if not placed:
        raise errors.BadRequest(reason=f"{domain} has no disk that could be moved")
    return tuple(placed), left_out


def _place(
    disk: Disk,
    request: MoveStorage,
    said: str | None,
    taken: dict[str, str],
    *,
    names: Mapping[str, str],
    operation: int,
) -> Placed:
    """Place a disk's images; `taken` has the copies of those before, by the one of `names` that all names of a file share."""
    active, below = disk.chain[0], disk.chain[1:]
    file = said if said is not None and is_uri(said) else None
    if file is None:
        file = os.path.join(request.dest, said) if said is not None else _free(request.dest, active, disk.target, taken)
    wanted = "raw" if is_uri(file) else active.format if request.format == "keep" else request.format
    if below and request.chain == "keep" and wanted == "raw":
        raise errors.BadRequest(
            reason=f"{disk.target} has {len(below)} images under its active one, and a raw image backs onto none: "
            "--chain flatten makes one image of them"
        )
    taken[names.get(active.file, active.file)] = file
    kept: dict[str, str] = {}
    for image in below if request.chain == "keep" else ():
        name = names.get(image.file, image.file)
        if name not in taken:
            taken[name] = _free(request.dest, image, disk.target, taken)
        kept[image.file] = taken[name]
    overlay = f"{active.file}.move{operation}"
    return Placed(disk=disk, file=file, format=wanted, below=kept, overlay=overlay)


def _free(folder: str, image: Image, target: str, taken: Mapping[str, str]) -> str:
    """The image's own name in the folder, unless another image of the move has it there."""
    name = os.path.basename(image.file) or target
    path = os.path.join(folder, name)
    return path if path not in taken.values() else os.path.join(folder, f"{target}-{name}")


def plan_move(
    domain: str,
    seen: Observation,
    request: MoveStorage,
    placed: tuple[Placed, ...],
    *,
    names: Names,
    operation: int,
    files: Files,
    left_out: Mapping[str, str],
    data: Mapping[str, int],
    speeds: Mapping[str, int],
    now: float,
    shared: frozenset[str] = frozenset(),
    snapshots: tuple[Snapshot, ...] = (),
) -> Plan:
    """The plan of a move's beginning: overlays where disks are offloaded, and the files of what is copied outside QEMU.

    Where nothing is, its mirrors begin.

    Args:
        domain: its name.
        seen: the domain as observed, with which disks are at work.
        request: what was asked for.
        placed: of `place`.
        names: of nodes and jobs.
        operation: its number.
        files: of all `Placed.paths`, and the exports.
        left_out: disks that stay, with the reason.
        data: by source, the bytes of it that hold data.
        speeds: target -> bytes per second of its mirror, 0 for no limit.
        now: seconds since the epoch, when it begins.
        shared: of those that `may_share`, the sources that can.
        snapshots: the domain's.

    Raises:
        Refused: any of its kinds, with nothing done.
    """
    disks = tuple(_choose(domain, seen, request, each, files) for each in placed)
    at_once = all(disk.strategy == "offload" and disk.source in shared for disk in disks)
    if at_once:
        disks = tuple(msgspec.structs.replace(disk, overlay=None, why=SHARED) for disk in disks)
    layers = _layers(disks, placed, files)
    for disk, each in zip(disks, placed, strict=True):
        _check_source(domain, request, disk, each, files)
    _check(disks, placed, layers, files, data)
    move = _move(domain, request, disks, layers, operation=operation, now=now)
    notes = tuple(f"{disk.target}: {disk.strategy}, {disk.why}" for disk in disks)
    observed = tuple((disk, each.disk) for disk, each in zip(disks, placed, strict=True))
    if at_once:
        plan = plan_at_once(move, seen, observed, names=names, files=files, snapshots=snapshots)
        return msgspec.structs.replace(plan, left_out=dict(left_out), notes=notes)
    overlays = [each for each, disk in zip(placed, disks, strict=True) if disk.overlay is not None]
    begun = () if layers else observed
    mirrors, starting = start_mirrors(move, seen, begun, names=names, files=files, speeds=speeds)
    return Plan(
        what="move",
        text=f"move {', '.join(f'{disk.target} to {disk.file} ({disk.strategy})' for disk in disks)}",
        prepare=(*_claims(layers, placed, seen), *_overlay_steps(overlays, seen, names, files), *starting),
        record=Record(
            authoritative={disk.target: disk.stands_on for disk in disks},
            formats={disk.target: "qcow2" for disk in disks if disk.overlay is not None},
            jobs=mirrors,
            move=move,
        ),
        left_out=dict(left_out),
        notes=notes,
    )


def _move(
    domain: str,
    request: MoveStorage,
    disks: tuple[MovedDisk, ...],
    layers: tuple[Layer, ...],
    *,
    operation: int,
    now: float,
) -> Move:
    return Move(
        domain=domain,
        operation=operation,
        disks=disks,
        layers=layers,
        bandwidth=request.bandwidth,
        max_pause_ms=request.max_pause_ms,
        verify=request.verify,
        delete_source=request.delete_source,
        converge=request.converge,
        deadline=now + request.deadline if request.deadline is not None else None,
    )


# --- which way ------------------------------------------------------------------------------------------------


def _choose(domain: str, seen: Observation, request: MoveStorage, placed: Placed, files: Files) -> MovedDisk:
    """Which way a disk goes, and why."""
    disk = placed.disk
    active = disk.active
    obstacle = _no_offload(seen, request, placed, files)
    if request.strategy == "offload" and obstacle:
        raise errors.DiskUnsuitable(domain=domain, disk=disk.target, reason=f"it can't be offloaded: {obstacle}")
    strategy: Strategy = "mirror" if obstacle or request.strategy == "mirror" else "offload"
    if strategy == "offload":
        why = "its image is copied outside QEMU, and only what is written meanwhile is mirrored"
    else:
        require_mirrorable(domain, disk, seen)
        why = f"QEMU copies: {obstacle or 'as asked'}"
    if request.strategy == "offload":
        why = "as asked"
    below = tuple(placed.below)
    return MovedDisk(
        target=disk.target,
        source=active.file,
        format=active.format,
        file=placed.file,
        file_format=placed.format,
        strategy=strategy,
        why=why,
        chain=tuple(image.file for image in disk.chain),
        overlay=placed.overlay if strategy == "offload" else None,
        layers=(*([active.file] if strategy == "offload" else []), *below),
        backing=placed.below[below[0]] if below else None,
        backing_format=disk.chain[1].format if below else None,
    )


def may_share(request: MoveStorage, placed: Placed, files: Files) -> bool:
    """Whether a disk may be moved at once (`plan.atonce`), if its file can share its blocks with its destination.

    What is to be waited for, or given up in between, goes the longer way.
    """
    disk = placed.disk
    active = disk.active
    if is_uri(placed.file) or active.file not in files.facts:
        return False
    fact, goes_to = files.facts[active.file], files.facts[placed.file]
    return (
        request.strategy != "mirror"
        and request.deadline is None
        and (request.max_pause_ms is None or request.max_pause_ms >= PAUSE_MS)
        and (active.format, placed.format, len(disk.chain)) == ("raw", "raw", 1)
        and fact.used  # see NOT_OPEN
        # What the disk holds is the file's bytes, all of them.
        and (fact.kind, goes_to.kind, fact.size) == ("file", "absent", active.virtual_size)
    )


def _no_offload(seen: Observation, request: MoveStorage, placed: Placed, files: Files) -> str | None:
    """Why a disk can't be offloaded; None when it can."""
    disk = placed.disk
    for image in disk.chain[: 1 + len(placed.below)]:
        kind = files.facts[image.file].kind if image.file in files.facts else "other"
        if kind != "file":
            return f"{image.file} is no regular file"
        if not files.facts[image.file].used:
            return f"{image.file} {NOT_OPEN}"
        if seen.graph.child(image.node, "data-file") is not None:
            return f"{image.file} keeps its data in another file"
    if is_uri(placed.file) or files.facts[placed.file].kind == "block":
        return f"{placed.file} is no file"
    if placed.format != disk.active.format:
        return f"{placed.file} is to be {placed.format}, and {disk.active.file} is {disk.active.format}"
    if len(disk.chain) > 1 and request.chain == "flatten":
        return f"one image is made of {len(disk.chain)}"
    if "transaction" not in seen.capabilities.commands:
        return "this QEMU has no `transaction`"
    return None


def _layers(disks: tuple[MovedDisk, ...], placed: tuple[Placed, ...], files: Files) -> tuple[Layer, ...]:
    """The images that are copied outside QEMU, those below first, each once, whatever names it goes by."""
    found: dict[str, Layer] = {}
    for disk, where in zip(disks, placed, strict=True):
        chain = where.disk.chain
        copies = {disk.source: disk.file, **where.below}
        for index in reversed(range(len(chain))):
            image = chain[index]
            fact = files.facts[image.file] if image.file in disk.layers else None
            if fact is None or any(fact.is_same(files.facts[layer.source]) for layer in found.values()):
                continue
            below = chain[index + 1] if index + 1 < len(chain) else None
            found[image.file] = Layer(
                source=image.file,
                format=image.format,
                file=copies[image.file],
                length=fact.size,
                backing=copies[below.file] if below is not None else None,
                backing_format=below.format if below is not None else None,
            )
    return tuple(found.values())


# --- what is refused ------------------------------------------------------------------------------------------


def _check_source(domain: str, request: MoveStorage, disk: MovedDisk, placed: Placed, files: Files) -> None:
    """What is copied or removed by its path has to be what the guest has open, and what is to be compared, readable."""
    for image in placed.disk.chain:
        fact = files.facts.get(image.file)
        if request.delete_source and (fact is None or fact.kind not in ("file", "absent")):
            raise errors.ImageUnsuitable(path=image.file, reason="it is no file that could be removed afterwards")
        if fact is not None:
            dest.require_there(image.file, files.facts)
            if (request.delete_source or image.file in disk.layers) and not fact.used:
                raise errors.ImageUnsuitable(path=image.file, reason=f"it {NOT_OPEN}")
    for source in files.images.get(disk.source, ()):
        if source.problem is not None:
            reason = f"it could not be compared afterwards: {source.path}: {source.problem}; --verify none goes without"
            raise errors.DiskUnsuitable(domain=domain, disk=disk.target, reason=reason)


def _check(
    disks: tuple[MovedDisk, ...],
    placed: tuple[Placed, ...],
    layers: tuple[Layer, ...],
    files: Files,
    data: Mapping[str, int],
) -> None:
    apart, room = Apart(), Room()
    for layer in layers:
        fact = files.facts[layer.file]
        apart.add(fact)
        dest.require_new(fact, files.users)
        room.take(fact, data.get(layer.source, layer.length))
    for disk, each in zip(disks, placed, strict=True):
        if disk.overlay is not None:
            fact = files.facts[disk.overlay]
            apart.add(fact)
            dest.require_new(fact, files.users)
            room.take(fact, dest.NEW_OVERLAY_BYTES)
        elif not disk.shared:
            _check_mirrored(disk, each, files, apart, room)


def _check_mirrored(disk: MovedDisk, placed: Placed, files: Files, apart: Apart, room: Room) -> None:
    size = placed.disk.active.virtual_size
    if is_uri(disk.file):
        if disk.file in files.users:
            raise errors.ImageUnsuitable(path=disk.file, reason=f"it is in use: {files.users[disk.file]}")
        dest.require_export(disk.file, files, size)
    else:
        fact = files.facts[disk.file]
        apart.add(fact)
        dest.require_new(fact, files.users)
        copied = placed.disk.chain[:1] if placed.below else placed.disk.chain
        room.take(fact, sum(files.facts[image.file].allocated for image in copied if image.file in files.facts))
        if fact.kind == "block" and disk.file_format == "raw":
            dest.require_same_size(disk.file, fact.size, size)


# --- the operations -------------------------------------------------------------------------------------------


def _claims(layers: tuple[Layer, ...], placed: tuple[Placed, ...], seen: Observation) -> list[Step]:
    """The files of the copies, with owner and mode of what they are copies of."""
    nodes = {image.file: image.node for each in placed for image in each.disk.chain}
    return [
        ClaimFile(path=layer.file, like=dest.owner_like(seen.graph.nodes[seen.graph.protocol(nodes[layer.source])]))
        for layer in layers
    ]


def _overlay_steps(placed: Sequence[Placed], seen: Observation, names: Names, files: Files) -> list[Step]:
    """Lay an overlay over each of these disks, all at one instant."""
    images: list[Step] = []
    disks = [each.disk for each in placed]
    for each in placed:
        active, target = each.disk.active, each.disk.target
        images += image_steps(
            fact=files.facts[each.overlay],
            mode="absolute",
            size=active.virtual_size,
            backing=active.file,
            backing_format=active.format,
            node=names.of(target, "s"),
            file_node=names.of(target, "sf"),
            like=seen.graph.nodes[seen.graph.protocol(active.node)],
        )
    steps = [step for verb in (ClaimFile, CreateImage, AddNode) for step in images if isinstance(step, verb)]
    taken = TakeSnapshots(pairs=tuple(pair_of(disk, names) for disk in disks))
    return [*steps, *written_out(disks, seen), taken] if disks else []
