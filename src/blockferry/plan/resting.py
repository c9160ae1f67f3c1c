"""Mirrors of a guest that is shut off: how they are brought to rest with it, and established again before it runs.

What they cost then is what changed: nothing for two images that were closed equal and have not been touched since; the
active overlay for a snapshot's mirror whose guest ended otherwise; all of it only for a whole copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from blockferry.model.blockjob import BlockJob, Mirror
from blockferry.model.definition import DiskDef
from blockferry.model.domain import Observation
from blockferry.model.files import FileFact, FileStamp, ImageFact
from blockferry.model.graph import Disk, Graph
from blockferry.plan.copy import nbd_options
from blockferry.plan.destinations import cache_of, is_uri
from blockferry.plan.files import CreateImage
from blockferry.plan.plan import Plan, Record
from blockferry.plan.plugs import cache_options, node_name
from blockferry.plan.steps import AddNode, StartMirror, Step

# How the reason of a job begins that ended because its QEMU did, nobody having ended it.
GONE = "QEMU is gone"


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What is there of a resting mirror's destination.

    Attributes:
        fact: of its path; None for an export.
        stamps: of its file and its source's files, those that are there.
        problem: why it can't be used, when that is known already.
    """

    fact: FileFact | None
    stamps: Mapping[str, FileStamp] = {}
    problem: str | None = None


def to_rest(jobs: tuple[BlockJob, ...]) -> tuple[tuple[Mirror, ...], tuple[BlockJob, ...]]:
    """Working jobs of a guest whose QEMU ends: the mirrors, resting, and the others, which end with it.

    A move's mirrors are started anew when the move is gone on with.
    """
    rests = [job for job in jobs if isinstance(job, Mirror) and job.move is None]
    mirrors = tuple(msgspec.structs.replace(job, state="resting", stamps={}) for job in rests)
    return mirrors, tuple(job for job in jobs if job not in rests)


def lost_with_guest(mirror: Mirror) -> bool:
    """Whether a mirror was lost because the QEMU of an attached guest ended: it can be established again."""
    return mirror.state == "lost" and (mirror.reason or "").startswith(GONE)


def stamped_files(mirror: Mirror, seen: Observation) -> tuple[str, ...]:
    """The files that have to stay as they are for a mirror to be still equal to its source: none when one is no file."""
    disk = seen.disk(mirror.target)
    files = (*(image.file for image in disk.chain), mirror.file) if disk is not None else ()
    return files if all(file.startswith("/") for file in files) else ()


class Ground(msgspec.Struct, frozen=True, kw_only=True):
    """What a mirror is established on.

    Attributes:
        node: the disk's active node.
        device: the topmost filter above it, when there is one.
        file: the active image's.
        size: bytes.
        layers: how many images the disk's chain has.
        cache: its cache mode, as an option of every node.
    """

    node: str
    device: str | None = None
    file: str
    size: int
    layers: int
    cache: dict[str, Any]

    @classmethod
    def defined(cls, disk: DiskDef | None, chain: tuple[ImageFact, ...]) -> Ground | None:
        """Of a disk of a guest that is about to be started; None when there is no such disk, or it is empty."""
        if disk is None or disk.source is None or not chain:
            return None
        cache = cache_options(disk)
        size = chain[0].virtual_size
        return cls(node=node_name(disk, 0), file=disk.source.where, size=size, layers=len(chain), cache=cache)

    @classmethod
    def running(cls, disk: Disk | None, graph: Graph) -> Ground | None:
        """Of a disk of a guest that runs."""
        if disk is None or not disk.chain:
            return None
        like = graph.nodes[graph.protocol(disk.active.node)]
        return cls(
            node=disk.active.node,
            device=disk.filtered,
            file=disk.active.file,
            size=disk.active.virtual_size,
            layers=len(disk.chain),
            cache=cache_of(like),
        )


def flaw(mirror: Mirror, ground: Ground | None, fact: FileFact | None) -> str | None:
    """Why a mirror can't be established again; None when it can, as far as its disk and destination show.

    Args:
        mirror: resting, or lost with its guest.
        ground: of its disk, as it is now.
        fact: of the destination's path; None for an export.
    """
    if ground is None:
        return "there is no such disk any more"
    if ground.file != mirror.source:
        return f"the disk is on {ground.file} now, and {mirror.source} was mirrored"
    if fact is None:
        return None
    if fact.kind not in ("file", "block"):
        return "it is not there any more" if fact.kind == "absent" else "it is neither a file nor a block device now"
    return fact.problem or ("somebody else has it open" if fact.used else None)


def establish(mirror: Mirror, ground: Ground, look: Look) -> tuple[Mirror, list[Step]]:
    """A mirror at work again, and the steps that bring it there.

    Args:
        mirror: resting, or lost with its guest.
        ground: of its disk.
        look: at the destination.
    """
    again = msgspec.structs.replace(
        mirror,
        state="active",
        source_node=ground.node,
        device=ground.device,
        stamps={},
        again=True,
        reason=None,
        bitmap=None,
    )
    if mirror.stamps and all(look.stamps.get(path) == stamp for path, stamp in mirror.stamps.items()):
        return again, [_open(again, ground, look), StartMirror.of(again, "none")]
    # A destination that stands on the source's own backing, or on a copy of it, holds the active overlay alone.
    shallow = mirror.snapshot is not None and ground.layers > 1
    steps: list[Step] = []
    if shallow and look.fact is not None:
        # It may hold what the source has lost (its last writes were not flushed): nothing of it is believed.
        steps.append(
            CreateImage(
                path=mirror.file,
                format=mirror.format,
                size=ground.size,
                backing=mirror.backing,
                backing_format=mirror.backing_format,
                overwrites=True,
            )
        )
    return again, [*steps, _open(again, ground, look), StartMirror.of(again, "top" if shallow else "full")]


def plan_again(mirror: Mirror, ground: Ground, look: Look) -> Plan:
    """The plan of establishing a mirror again whose guest runs already, started anew by somebody else."""
    again, made = establish(msgspec.structs.replace(mirror, stamps={}), ground, look)
    return Plan(
        what="mirror",
        text=f"mirror {mirror.target} to {mirror.file} again",
        prepare=tuple(made),
        record=Record(authoritative={mirror.target: mirror.source}, jobs=(again,)),
    )


def _open(mirror: Mirror, ground: Ground, look: Look) -> AddNode:
    if is_uri(mirror.file) or look.fact is None:
        file = {**nbd_options(mirror.file), "node-name": mirror.file_node}
        return AddNode(node=mirror.node, options={"driver": mirror.format, "file": file, "discard": "unmap"})
    driver = "host_device" if look.fact.kind == "block" else "file"
    common = {"discard": "unmap", **ground.cache}
    file = {"driver": driver, "node-name": mirror.file_node, "filename": mirror.file, **common}
    options = {"driver": mirror.format, "file": file, **common}
    if mirror.format == "qcow2":
        options["backing"] = None
    return AddNode(node=mirror.node, options=options)
