"""Moves of a guest's storage: what was asked for, and how far each is."""

from __future__ import annotations

from typing import Literal

import msgspec

from blockferry.model.files import FileStamp

Strategy = Literal["mirror", "offload"]
Verify = Literal["none", "sample", "full"]
# How a file was copied: by sharing its blocks, within the kernel, or through us.
Method = Literal["reflink", "copy_file_range", "read-write"]
# A move that is given up is `cancelling` until its overlays are no more.
MoveEnd = Literal["working", "cancelling", "done", "cancelled"]
UNDER_WAY: tuple[MoveEnd, ...] = ("working", "cancelling")


class Region(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a file whose copy is on disk; `checksum` (XXH3, 64 bits) where its bytes went through us."""

    start: int
    length: int
    checksum: int | None = None


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """An image that is copied as a file, outside QEMU: that nobody writes, or whose blocks are shared under a mirror.

    Attributes:
        source: its path.
        format: its format, and that of its copy.
        file: the copy's path.
        length: the source's bytes, holes with them.
        backing: what the copy backs onto, another copy; None when it stands alone.
        backing_format: that one's format.
    """

    source: str
    format: str
    file: str
    length: int
    backing: str | None = None
    backing_format: str | None = None


class MovedDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk of a move.

    Attributes:
        target: the disk's.
        source: the image that the guest was on when the move began.
        format: its format.
        file: where the guest goes.
        file_format: that image's format.
        strategy: `offload`: an overlay is laid over the source, which is copied outside QEMU then, and only the overlay
            is mirrored, into that copy; or, without an overlay, the copy shares the source's blocks while a mirror is at work
            that carries over what is written meanwhile. `mirror`: QEMU copies.
        why: why that one.
        chain: the images that it was on when the move began, top first.
        overlay: the overlay's path, of an offload.
        layers: the sources of its images that are copied outside QEMU, top first.
        backing: what `file` backs onto; None when it stands alone.
        backing_format: that one's format.
    """

    target: str
    source: str
    format: str
    file: str
    file_format: str
    strategy: Strategy
    why: str
    chain: tuple[str, ...] = ()
    overlay: str | None = None
    layers: tuple[str, ...] = ()
    backing: str | None = None
    backing_format: str | None = None

    @property
    def shared(self) -> bool:
        """Whether the copy shares the blocks of the image that the guest is on."""
        return self.overlay is None and self.source in self.layers

    @property
    def stands_on(self) -> str:
        """The image that the guest is on until the pivot."""
        return self.overlay or self.source


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a disk that are not equal, and were not written since the pivot."""

    target: str
    offset: int
    length: int


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a comparison found.

    Attributes:
        how: `sample` or `full`.
        compared: bytes that were compared.
        written: bytes of them that differ because the guest has written there since the pivot.
        seconds: how long it took.
        different: bytes that differ otherwise; 0 when the copies are equal.
        differences: where, at most the first hundred places of a disk.
    """

    how: Verify
    compared: int
    written: int
    seconds: float
    different: int = 0
    differences: tuple[Difference, ...] = ()


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """A move that was begun. What is to be done next follows from this, from the jobs, and from what is copied.

    Attributes:
        domain: its domain's name.
        operation: its number; other operations carry out its parts.
        disks: those that are moved.
        layers: the images that are copied outside QEMU, those below first; each once, whoever stands on it.
        bandwidth: bytes per second of the whole move, 0 for no limit.
        max_pause_ms: it goes on mirroring while a longer pause is to be expected.
        verify: how source and destination are compared after the pivot.
        delete_source: whether the sources are removed at the end.
        converge: whether the guest's writes wait for the destination.
        deadline: when it is given up if the guest has not gone over by then, in seconds since the epoch; None for never.
        stamps: path -> what a layer's source looked like when its copying began: nobody may touch it.
        methods: path -> how a layer was copied; of those whose copies are whole.
        pivot: the number of the operation in which the guest went over; None before.
        pause_ms: how long it stood still then.
        verdict: what the comparison found.
        state: `working` until it has ended; then how.
        reason: why it stands still, or was cancelled.
    """

    domain: str
    operation: int
    disks: tuple[MovedDisk, ...]
    layers: tuple[Layer, ...] = ()
    bandwidth: int = 0
    max_pause_ms: int | None = None
    verify: Verify = "none"
    delete_source: bool = False
    converge: bool = False
    deadline: float | None = None
    stamps: dict[str, FileStamp] = {}
    methods: dict[str, Method] = {}
    pivot: int | None = None
    pause_ms: float | None = None
    verdict: Verdict | None = None
    state: MoveEnd = "working"
    reason: str | None = None

    @property
    def pivoted(self) -> bool:
        """Whether the guest is on the destinations."""
        return self.pivot is not None

    @property
    def over(self) -> bool:
        """Whether nothing is left to be done."""
        return self.state not in UNDER_WAY

    @property
    def images(self) -> dict[str, str]:
        """The images that it comes from and goes to, with their formats; of what is made one image the lower ones not."""
        found = {layer.source: layer.format for layer in self.layers} | {
            layer.file: layer.format for layer in self.layers
        }
        for disk in self.disks:
            found |= {disk.source: disk.format, disk.file: disk.file_format}
            found |= {disk.overlay: "qcow2"} if disk.overlay is not None else {}
        return {path: image_format for path, image_format in found.items() if path.startswith("/")}

    @property
    def targets(self) -> tuple[str, ...]:
        """The disks' targets."""
        return tuple(disk.target for disk in self.disks)
