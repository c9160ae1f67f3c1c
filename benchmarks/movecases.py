"""The cases of moves: which images go where, with what guest, by which ways."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import closed
from cases import fill, small
from sides import MIB, Image

from blockferry.testing import NbdServer, QemuBinaries, make_image

LAYERS = 4
GIB = 1024 * MIB
# One mebibyte of ten holds data.
SPARSE = 10

Place = Literal["disk", "xfs", "tmpfs", "nbd"]
PLACES: dict[Place, str] = {
    "disk": "to the same file system",
    "xfs": "within an XFS that shares blocks",
    "tmpfs": "to tmpfs",
    "nbd": "to an NBD export",
}

LIBVIRT, CONVERT, CP, PLAIN, MIRROR, OFFLOAD = "libvirt", "qemu-img", "cp", "plain copy", "mirror", "offload"
READ, WRITE = "read", "write"
# Of images that nobody has open.
CLOSED: dict[str, closed.Closed] = {
    READ: closed.read,
    WRITE: closed.write,
    CONVERT: closed.convert,
    CP: closed.cp,
    PLAIN: closed.plain,
}
# In the order in which they are shown.
WAYS = (READ, WRITE, CONVERT, CP, PLAIN, LIBVIRT, MIRROR, OFFLOAD)
COPIES = (CONVERT, CP, PLAIN)
MOVES = (LIBVIRT, MIRROR, OFFLOAD)


# A disk's images: the top one first, which the guest has.
Chain = tuple[Image, ...]
Make = Callable[[QemuBinaries, Path, int], list[Chain]]


@dataclass(frozen=True)
class MoveCase:
    """Images, a place, a guest, and the ways that are compared.

    Attributes:
        name: for the command line.
        images: what they are, for people.
        make: makes them in a folder, for a size in bytes.
        place: where they go.
        ways: those that take part.
        writing: the guest is a Linux that writes 50 MiB/s, rather than a firmware that does nothing.
    """

    name: str
    images: str
    make: Make
    place: Place
    ways: tuple[str, ...]
    writing: bool = False

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.images} {PLACES[self.place]}{', a guest that writes' if self.writing else ''}"


def full(_binaries: QemuBinaries, folder: Path, size: int) -> list[Chain]:
    """A raw image without a hole."""
    image = Image("vda", folder / "disk.img", "raw")
    fill(image.path, size)
    return [(image,)]


def sparse(_binaries: QemuBinaries, folder: Path, size: int) -> list[Chain]:
    """A raw image with data in every tenth mebibyte."""
    image = Image("vda", folder / "disk.img", "raw")
    with image.path.open("wb") as file:
        file.truncate(size)
        for at in range(0, size, SPARSE * MIB):
            file.seek(at)
            file.write(os.urandom(MIB))
    return [(image,)]


def chain(binaries: QemuBinaries, folder: Path, size: int) -> list[Chain]:
    """Four qcow2 images, one upon the other; each holds another quarter of the disk."""
    images: list[Image] = []
    part = folder / "part"
    fill(part, size // LAYERS)
    for number in range(LAYERS):
        path = folder / f"layer{number}.qcow2"
        below = images[0] if images else None
        under, under_format = (below.path, below.format) if below is not None else (None, None)
        make_image(binaries, path, "qcow2", size, backing=under, backing_fmt=under_format)
        source = f"driver=raw,offset=0,size={size // LAYERS},file.driver=file,file.filename={part}"
        target = (
            f"driver=raw,offset={number * (size // LAYERS)},size={size // LAYERS},"
            f"file.driver=qcow2,file.file.driver=file,file.file.filename={path}"
        )
        words = ["convert", "-n", "--image-opts", source, "--target-image-opts", target]
        subprocess.run([str(binaries.img), *words], check=True, stdin=subprocess.DEVNULL)
        images.insert(0, Image("vda", path, "qcow2"))
    part.unlink()
    return [tuple(images)]


def eight(binaries: QemuBinaries, folder: Path, _size: int) -> list[Chain]:
    """Eight full raw images of 64 MiB."""
    return [(image,) for image in small(binaries, folder)]


def move_cases(size: int) -> tuple[MoveCase, ...]:
    """Every case; `size` is that of a disk that is copied alone."""
    one = f"{size // GIB} GiB" if size >= GIB else f"{size // MIB} MiB"
    return (
        MoveCase("full", f"{one}, full,", full, "disk", WAYS),
        MoveCase("sparse", f"{one}, 10 % full,", sparse, "disk", (*COPIES, *MOVES)),
        MoveCase("chain", f"a chain of 4, {one},", chain, "disk", (*COPIES, *MOVES)),
        MoveCase("full-xfs", f"{one}, full,", full, "xfs", (*COPIES, *MOVES)),
        MoveCase("sparse-xfs", f"{one}, 10 % full,", sparse, "xfs", (*COPIES, *MOVES)),
        MoveCase("chain-xfs", f"a chain of 4, {one},", chain, "xfs", (*COPIES, *MOVES)),
        MoveCase("full-tmpfs", f"{one}, full,", full, "tmpfs", WAYS),
        MoveCase("full-nbd", f"{one}, full,", full, "nbd", (CONVERT, LIBVIRT, MIRROR)),
        MoveCase("full-writing", f"{one}, full,", full, "disk", MOVES, writing=True),
        MoveCase("full-xfs-writing", f"{one}, full,", full, "xfs", MOVES, writing=True),
        MoveCase("eight", "8 disks of 64 MiB", eight, "disk", MOVES),
        MoveCase("eight-writing", "8 disks of 64 MiB", eight, "disk", MOVES, writing=True),
    )


# --- places -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sharing(folder: Path, size: int) -> Iterator[Path]:
    """An XFS of its own in a file, whose files can share blocks. Its maker has to be root.

    The file is written in full before, and its loop device goes past the cache: what is written to the XFS costs what it
    does on a disk, neither the allocation of the file that it is in nor a second copy in memory.
    """
    image, mounted = folder / "xfs", folder / "mounted"
    _run("dd", "if=/dev/zero", f"of={image}", "bs=16M", f"count={size // (16 * MIB)}", "oflag=direct")
    mounted.mkdir()
    with contextlib.ExitStack() as stack:
        device = _run("losetup", "--find", "--show", "--direct-io=on", str(image)).strip()
        stack.callback(_run, "losetup", "--detach", device)
        _run("mkfs.xfs", "-q", "-K", "-m", "reflink=1", device)
        _run("mount", device, str(mounted))
        stack.callback(_run, "umount", str(mounted))
        mounted.chmod(0o711)
        yield mounted


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout


@contextlib.asynccontextmanager
async def exported(binaries: QemuBinaries, folder: Path, size: int) -> AsyncIterator[str]:
    """The URI of an export of an empty raw image, to every user."""
    image = make_image(binaries, folder / "exported.img", "raw", size)
    async with NbdServer(binaries, image, "raw", folder) as server:
        server.socket.chmod(0o666)
        yield server.uri
