"""Judging the files that a request is to write to: new ones, existing ones, block devices. Nothing is touched here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from blockferry import errors
from blockferry.model.files import ExportFact, FileFact, ImageFact
from blockferry.model.graph import Image, Node

# A new qcow2 with a backing file takes three clusters of 64 KiB; a fourth comes with its first write.
NEW_OVERLAY_BYTES = 4 * 64 * 1024
# The qcow2 format's own limit (docs/interop/qcow2.rst).
HEADER_NAME_MAX = 1023
MIB = 1 << 20
# What all mirrors of one request have in flight, and what each has at most and at least: docs/adr/0021-in-flight.md. QEMU copies a
# mebibyte at a time (block/mirror.c, MAX_IO_BYTES); less than one is smaller pieces, which a guest that is at work is the better for.
IN_FLIGHT, MOST_IN_FLIGHT, LEAST_IN_FLIGHT, AT_WORK_IN_FLIGHT = 8 * MIB, 4 * MIB, MIB, MIB // 2
_KINDS = {"directory": "it is a directory", "other": "it is neither a file nor a block device"}


class Files(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the files that a request names.

    Attributes:
        facts: by path, as asked for.
        images: by path, the header and the chain of images that are there already.
        users: real path, or identity, -> the domain and disk that has it open, of all domains that are attached.
        exports: by URI, what their servers say.
        blank: those that are known to hold nothing yet.
    """

    facts: Mapping[str, FileFact]
    images: Mapping[str, tuple[ImageFact, ...]] = {}
    users: Mapping[str, str] = {}
    exports: Mapping[str, ExportFact] = {}
    blank: frozenset[str] = frozenset()


class Room:
    """Adds up what goes onto each file system, and refuses what does not fit."""

    def __init__(self) -> None:
        self._needed: dict[int, int] = {}

    def take(self, fact: FileFact, needed: int) -> None:
        """Reserve `needed` bytes where the file is.

        Raises:
            NoRoom: with the sum of all that is to go there.
        """
        if fact.kind == "block":
            if needed > fact.size:
                raise errors.NoRoom(path=fact.path, needed=needed, available=fact.size)
            return
        total = self._needed.get(fact.device, 0) + needed
        self._needed[fact.device] = total
        # What it takes up already is written over.
        if total - fact.allocated > fact.free:
            raise errors.NoRoom(path=fact.path, needed=total - fact.allocated, available=fact.free)


class Apart:
    """Sees to it that no two images of a request are one file."""

    def __init__(self) -> None:
        self._facts: list[FileFact] = []

    def add(self, fact: FileFact) -> None:
        """Take a file.

        Raises:
            DuplicateFile: it was taken before, under whichever name.
        """
        self.require(fact)
        self._facts.append(fact)

    def require(self, fact: FileFact) -> None:
        """Refuse a file that was taken.

        Raises:
            DuplicateFile: it was, under whichever name.
        """
        if any(fact.is_same(other) for other in self._facts):
            raise errors.DuplicateFile(path=fact.path)


def require_new(fact: FileFact, users: Mapping[str, str]) -> None:
    """Refuse a destination that exists as a regular file or can't be written; a block device always exists.

    Raises:
        DestinationExists: a file is there.
        DestinationUnusable: with the reason, or the system's words.
    """
    if fact.kind == "file":
        raise errors.DestinationExists(path=fact.path)
    if fact.kind in _KINDS:
        raise errors.DestinationUnusable(path=fact.path, reason=fact.problem or _KINDS[fact.kind])
    if fact.problem:
        raise errors.DestinationUnusable(path=fact.path, reason=fact.problem)
    require_unused(fact, users)


def require_existing(fact: FileFact, users: Mapping[str, str]) -> None:
    """Refuse what is to be used as it is and is not there, no image, or used by somebody.

    Raises:
        ImageUnsuitable: with the reason.
    """
    if fact.kind == "absent":
        raise errors.ImageUnsuitable(path=fact.path, reason="it does not exist, and existing files were asked for")
    if fact.kind in _KINDS:
        raise errors.ImageUnsuitable(path=fact.path, reason=fact.problem or _KINDS[fact.kind])
    require_unused(fact, users)
    if fact.problem:
        raise errors.ImageUnsuitable(path=fact.path, reason=fact.problem)


def require_there(path: str, facts: Mapping[str, FileFact]) -> None:
    """Refuse to lay an overlay over a file that has no name any more: the overlay would back onto nothing.

    Raises:
        ImageUnsuitable: it was deleted, or is a temporary one of QEMU's.
    """
    if path.startswith("/") and path in facts and facts[path].kind == "absent":
        reason = (
            "it is not there any more (deleted while QEMU has it open, or a temporary one of snapshot=on), and an overlay "
            "would back onto nothing; `blockferry copy` and a pivot save the disk"
        )
        raise errors.ImageUnsuitable(path=path, reason=reason)


def require_unused(fact: FileFact, users: Mapping[str, str]) -> None:
    """Refuse an image that somebody has open.

    Raises:
        ImageUnsuitable: with who it is, where that is known.
    """
    user = users.get(fact.real) or users.get(fact.identity)
    if user is not None:
        raise errors.ImageUnsuitable(path=fact.path, reason=f"it is in use: {user}")
    if fact.used:
        raise errors.ImageUnsuitable(path=fact.path, reason="it is in use: a QEMU or qemu-img holds a lock on it")


def require_image(chain: tuple[ImageFact, ...], path: str, image_format: str, size: int) -> ImageFact:
    """The header of an existing image, if it is what was said of it; what QEMU does not check is checked here.

    Args:
        chain: the image and what it backs onto, as far as it could be followed.
        path: its path.
        image_format: what it is to be.
        size: what its virtual size is to be, in bytes. QEMU takes another one and gives the guest a disk of that size.

    Raises:
        ImageUnsuitable: with the reason.
    """
    if not chain:
        raise errors.ImageUnsuitable(path=path, reason="it was not looked at")
    head = chain[0]
    if head.problem:
        raise errors.ImageUnsuitable(path=path, reason=head.problem)
    if head.virtual_size != size:
        raise errors.ImageUnsuitable(
            path=path, reason=f"its virtual size is {head.virtual_size} bytes, and the disk's is {size}"
        )
    if image_format == "qcow2" and head.backing is not None and head.backing_format is None:
        raise errors.ImageUnsuitable(
            path=path,
            reason=f"its header names no format for its backing {head.backing}, and formats are never probed: "
            f"`qemu-img rebase -u -b BACKING -F FORMAT` adds it",
        )
    return head


def require_size_of(own: ImageFact, base: Image) -> None:
    """Refuse a base of the destination's own that is not as large as the image that it stands for.

    Raises:
        ImageUnsuitable: with both sizes.
    """
    if own.virtual_size != base.virtual_size:
        raise errors.ImageUnsuitable(
            path=own.path,
            reason=f"it is not whole: {own.virtual_size} bytes, and {base.file}, which it stands for, has {base.virtual_size}",
        )


def require_export(uri: str, files: Files, size: int) -> None:
    """Refuse an export by what its server says; the step RequireSize looks again at what QEMU has opened.

    Raises:
        DestinationUnusable: something is wrong with it, or it is of another size.
    """
    export = files.exports.get(uri)
    if export is None:
        return
    if export.problem:
        raise errors.DestinationUnusable(path=uri, reason=export.problem)
    require_same_size(uri, export.size, size)


def require_same_size(path: str, found: int | None, size: int) -> None:
    """Refuse a destination without a format of `found` bytes, None for unknown, for a disk of `size`.

    Raises:
        DestinationUnusable: it is of another size.
    """
    if found not in (None, size):
        raise errors.DestinationUnusable(
            path=path, reason=f"it has {found} bytes, and the disk has {size}: a copy is of the same size"
        )


def same_file(one: str, other: str) -> bool:
    """Whether two names say the same image; links are resolved by whoever looked the files up."""
    return one == other or os.path.normpath(one) == os.path.normpath(other)


def image_options(image_format: str, file_node: str, fact: FileFact, like: Node) -> dict[str, Any]:
    """How to open a destination (QAPI BlockdevOptions), with the cache mode of the image that it stands for.

    discard=unmap on the file and on the format above it: holes stay holes, also in a raw file.
    """
    driver = "host_device" if fact.kind == "block" else "file"
    common = {**cache_of(like), "discard": "unmap"}
    return {
        "driver": image_format,
        "file": {"driver": driver, "node-name": file_node, "filename": fact.path, **common},
        **common,
    }


def is_uri(dest: str) -> bool:
    """Whether a destination is an NBD export rather than a file."""
    return dest.startswith(("nbd+unix://", "nbd://"))


def buffer_of(dest: str, size: int, together: int, *, at_work: bool) -> dict[str, int]:
    """How much a mirror may have in flight, as an argument of blockdev-mirror; nothing where it is QEMU's own, 16 MiB.

    Each request in flight has a thread of QEMU's and memory of its own: beside many of them a guest's processors wait for their turn,
    and so do its writes. An export may be far away: there it is what is in flight that makes it fast.

    Args:
        dest: the destination's path or URI.
        size: of its disk, bytes.
        together: of all disks that are mirrored by the same request, bytes.
        at_work: whether the guest reads or writes the disk.
    """
    if is_uri(dest):
        return {}
    if at_work:
        return {"buf-size": AT_WORK_IN_FLIGHT}
    share = IN_FLIGHT * size // max(together, 1) // MIB * MIB
    return {"buf-size": max(LEAST_IN_FLIGHT, min(MOST_IN_FLIGHT, share))}


def cache_of(like: Node) -> dict[str, Any]:
    """The cache mode of a node (QAPI BlockdevOptions); nothing where it is QEMU's own.

    QEMU reads its commands byte by byte, with seven system calls for each (docs/adr/0020-short-commands.md).
    """
    said = {name: True for name, on in (("direct", like.direct), ("no-flush", like.no_flush)) if on}
    return {"cache": said} if said else {}


def owner_like(like: Node) -> str | None:
    """The file whose owner and mode a new one gets: QEMU runs as whoever owns its images."""
    return like.filename if like.driver == "file" else None


def header_name(mode: str | None, backing: str, path: str) -> str | None:
    """What an overlay's header calls its backing file.

    Args:
        mode: `absolute` (or None), `relative` to the overlay's directory, or `none`.
        backing: the backing's absolute path or URI.
        path: the overlay's.

    Raises:
        DestinationUnusable: the name does not fit into a header.
    """
    if mode == "none":
        return None
    relative = mode == "relative" and backing.startswith("/")
    name = os.path.relpath(backing, os.path.dirname(path)) if relative else backing
    if len(name.encode()) > HEADER_NAME_MAX:
        raise errors.DestinationUnusable(
            path=path,
            reason=f"its header has {HEADER_NAME_MAX} bytes for the name of its backing file, and {backing} is longer "
            "(modes relative and none name it shorter or not at all)",
        )
    return name
