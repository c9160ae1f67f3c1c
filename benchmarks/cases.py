"""The cases: what is prepared for a round, what a guest is asked, which figures come of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from figures import Figure
from sides import Guest, Image, targets

from blockferry.testing import QemuBinaries, make_image

MIB = 1024 * 1024
DISKS = 8
SMALL_BYTES = 64 * MIB
CHUNK_BYTES = 16 * MIB

Prepare = Callable[[QemuBinaries, Path], list[Image]]
Ask = Callable[[Guest, list[Image], Path], Awaitable[dict[str, float]]]


@dataclass(frozen=True)
class Case:
    """Something that both sides do.

    Attributes:
        name: for the command line.
        figures: what a round gives.
        prepare: makes the images of a round in a folder.
        ask: has it done.
        memory: in a folder in memory (tmpfs) rather than on a disk.
        writing: the guest is a Linux that writes and flushes to all disks, rather than a firmware that does nothing.
    """

    name: str
    figures: tuple[Figure, ...]
    prepare: Prepare
    ask: Ask
    memory: bool = False
    writing: bool = False


# --- images -----------------------------------------------------------------------------------------------------


def _empty(binaries: QemuBinaries, folder: Path) -> list[Image]:
    """Eight qcow2 images of 1 GiB with nothing in them."""
    paths = {target: folder / f"{target}.base" for target in targets(DISKS)}
    return [Image(target, make_image(binaries, path, "qcow2", 1024 * MIB), "qcow2") for target, path in paths.items()]


def small(_binaries: QemuBinaries, folder: Path) -> list[Image]:
    """Eight full raw images of 64 MiB."""
    images = [Image(target, folder / f"{target}.img", "raw") for target in targets(DISKS)]
    for image in images:
        fill(image.path, SMALL_BYTES)
    return images


def _full(image_format: str, size: int) -> Prepare:
    """One full image; and as much memory as a copy of it fills has just been used and given back.

    In a virtual machine memory that the guest's kernel takes for the first time costs the host's work, several times
    that of the copy itself: it is not to be paid for by whoever happens to get it.
    """

    def prepare(binaries: QemuBinaries, folder: Path) -> list[Image]:
        raw, disk = folder / "full", folder / f"disk.{image_format}"
        fill(raw, size)
        convert = [str(binaries.img), "convert", "-f", "raw", "-O", image_format, str(raw), str(disk)]
        subprocess.run(convert, check=True, stdin=subprocess.DEVNULL)
        raw.unlink()
        return [Image("vda", disk, image_format)]

    return prepare


def fill(path: Path, size: int) -> None:
    """Make a file without a hole, or anything that repeats."""
    with path.open("wb") as file:
        for _chunk in range(size // CHUNK_BYTES):
            file.write(os.urandom(CHUNK_BYTES))


# --- what is asked ----------------------------------------------------------------------------------------------


async def _snapshot(guest: Guest, images: list[Image], folder: Path) -> dict[str, float]:
    return await guest.snapshot({image.target: folder / f"{image.target}.s" for image in images})


async def _mirrored(guest: Guest, images: list[Image], folder: Path) -> dict[str, float]:
    overlays = {image.target: folder / f"{image.target}.s" for image in images}
    return await guest.mirrored(overlays, {image.target: folder / f"{image.target}.m" for image in images})


async def _pivot(guest: Guest, images: list[Image], folder: Path) -> dict[str, float]:
    return await guest.pivot({image.target: folder / f"{image.target}.copy" for image in images})


def _copy(key: str, size: int) -> Ask:
    async def ask(guest: Guest, images: list[Image], folder: Path) -> dict[str, float]:
        took = await guest.copy(images[0], folder / "copy")
        return {key: size / MIB / (took["copy"] / 1000)}

    return ask


def _copying(name: str, image_format: str, size: int, *, memory: bool) -> Case:
    where = "in tmpfs" if memory else "on disk"
    text = f"block copy of {size // MIB} MiB {where}, {image_format} to {image_format}"
    figure = Figure(name, text, "MiB/s", "ratio of at least 1")
    return Case(name, (figure,), _full(image_format, size), _copy(name, size), memory)


def _snapping(name: str, disks: str, *, writing: bool) -> Case:
    figure = Figure("snapshot", f"snapshot of {disks}: the whole call", target="ratio of at most 0.50")
    return Case(name, (figure,), _empty, _snapshot, writing=writing)


def _pivoting(name: str, disks: str, *, writing: bool) -> Case:
    figures = (
        Figure("split", f"pivot of {disks}: the guest's pause", target="at most 80", peer_text="[2]"),
        Figure("pivot", f"pivot of {disks}: the whole call", peer_text="[2]"),
    )
    return Case(name, figures, small, _pivot, writing=writing)


def all_cases(copy_bytes: int) -> tuple[Case, ...]:
    """Every case; `copy_bytes` is the size of the disk in those of the block copy."""
    return (
        _snapping("snapshot", "8 disks", writing=False),
        _snapping("snapshot-writing", "8 disks that are written to", writing=True),
        Case(
            "mirrored",
            (
                Figure(
                    "mirrored",
                    "mirrored snapshot of 8 disks: the whole call; no pause",
                    peer_text="[1]",
                ),
                Figure("mirrored-ready", "mirrored snapshot of 8 disks: until all mirrors are ready", peer_text="[1]"),
            ),
            _empty,
            _mirrored,
        ),
        _pivoting("pivot", "8 disks", writing=False),
        _pivoting("pivot-writing", "8 disks that are written to", writing=True),
        _copying("copy-raw", "raw", copy_bytes, memory=False),
        _copying("copy-qcow2", "qcow2", copy_bytes, memory=False),
        _copying("copy-tmpfs", "raw", copy_bytes, memory=True),
    )
