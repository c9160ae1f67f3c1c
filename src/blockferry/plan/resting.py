"""Mirrors of a guest that is shut off: how they are brought to rest with it, and established again before it runs.

What they cost then is what changed: nothing for two images that were closed equal and have not been touched since; the
active overlay for a snapshot's mirror whose guest ended otherwise; all of it only for a whole copy.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from blockferry.model.blockjob import BlockJob, Mirror
from blockferry.model.definition import DiskDef
from blockferry.model.domain import Observation
from blockferry.model.files import FileFact, FileStamp, ImageFact
from blockferry.plan.copy import is_uri, nbd_options
from blockferry.plan.plugs import cache_options, node_name
from blockferry.plan.steps import AddNode, CreateImage, StartMirror, Step


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
    """Working jobs of a guest whose QEMU ends: the mirrors, resting, and the others, which end with it."""
    mirrors = tuple(msgspec.structs.replace(job, state="resting", stamps={}) for job in jobs if isinstance(job, Mirror))
    return mirrors, tuple(job for job in jobs if not isinstance(job, Mirror))


def stamped_files(mirror: Mirror, seen: Observation) -> tuple[str, ...]:
    """The files that have to stay as they are for a mirror to be still equal to its source: none when one is no file."""
    disk = seen.disk(mirror.target)
    files = (*(image.file for image in disk.chain), mirror.file) if disk is not None else ()
    return files if all(file.startswith("/") for file in files) else ()


def flaw(mirror: Mirror, disk: DiskDef | None, fact: FileFact | None) -> str | None:
    """Why a resting mirror can't be established again; None when it can, as far as its disk and destination show.

    Args:
        mirror: resting.
        disk: whose, as the definition has it now.
        fact: of the destination's path; None for an export.
    """
    if disk is None or disk.source is None:
        return "the definition has no such disk any more"
    if disk.source.where != mirror.source:
        return f"the disk is on {disk.source.where} now, and {mirror.source} was mirrored"
    if fact is None:
        return None
    if fact.kind not in ("file", "block"):
        return "it is not there any more" if fact.kind == "absent" else "it is neither a file nor a block device now"
    return fact.problem or ("somebody else has it open" if fact.used else None)


def establish(mirror: Mirror, disk: DiskDef, chain: tuple[ImageFact, ...], look: Look) -> tuple[Mirror, list[Step]]:
    """A resting mirror at work again, and the steps that bring it there; the guest has not run yet.

    Args:
        mirror: resting.
        disk: whose.
        chain: the disk's images, top first.
        look: at the destination.
    """
    again = msgspec.structs.replace(
        mirror,
        state="active",
        source_node=node_name(disk, 0),
        device=None,
        stamps={},
        again=True,
        reason=None,
        bitmap=None,
    )
    if mirror.stamps and all(look.stamps.get(path) == stamp for path, stamp in mirror.stamps.items()):
        return again, [_open(again, disk, look), StartMirror.of(again, "none")]
    # A destination that stands on the source's own backing, or on a copy of it, holds the active overlay alone.
    shallow = mirror.snapshot is not None and len(chain) > 1
    steps: list[Step] = []
    if shallow and look.fact is not None:
        # It may hold what the source has lost (its last writes were not flushed): nothing of it is believed.
        steps.append(
            CreateImage(
                path=mirror.file,
                format=mirror.format,
                size=chain[0].virtual_size,
                backing=mirror.backing,
                backing_format=mirror.backing_format,
                overwrites=True,
            )
        )
    return again, [*steps, _open(again, disk, look), StartMirror.of(again, "top" if shallow else "full")]


def _open(mirror: Mirror, disk: DiskDef, look: Look) -> AddNode:
    common = cache_options(disk)
    if is_uri(mirror.file) or look.fact is None:
        file = {**nbd_options(mirror.file), "node-name": mirror.file_node}
        return AddNode(node=mirror.node, options={"driver": mirror.format, "file": file, "discard": "unmap"})
    driver = "host_device" if look.fact.kind == "block" else "file"
    file = {"driver": driver, "node-name": mirror.file_node, "filename": mirror.file, "discard": "unmap", **common}
    options = {"driver": mirror.format, "file": file, "discard": "unmap", **common}
    if mirror.format == "qcow2":
        options["backing"] = None
    return AddNode(node=mirror.node, options=options)
