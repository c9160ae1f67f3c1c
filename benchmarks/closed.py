"""Ways of copying an image that nobody has open: what the machine can do, and what others use; and our own copier."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from sides import MIB, Image

from blockferry.qemu.copier import FileCopy
from blockferry.qemu.images import stamp_of
from blockferry.testing import QemuBinaries

# How a chain of images, the top one first, is copied to a folder, or to an NBD export.
Closed = Callable[[QemuBinaries, Sequence[Image], Path, str | None], Awaitable[None]]


async def read(_binaries: QemuBinaries, chain: Sequence[Image], _folder: Path, _uri: str | None) -> None:
    """Read, one after the other, and keep nothing."""
    for image in chain:
        _run("dd", f"if={image.path}", "of=/dev/null", "bs=1M")


async def write(_binaries: QemuBinaries, chain: Sequence[Image], folder: Path, _uri: str | None) -> None:
    """Write as much, of zeroes, and sync."""
    for image in chain:
        count = image.path.stat().st_size // MIB
        _run("dd", "if=/dev/zero", f"of={folder / image.path.name}", "bs=1M", f"count={count}", "conv=fsync")


async def cp(_binaries: QemuBinaries, chain: Sequence[Image], folder: Path, _uri: str | None) -> None:
    """As people do it: it syncs nothing, and resumes nothing."""
    for image in chain:
        _run("cp", "--sparse=auto", "--reflink=auto", str(image.path), str(folder / image.path.name))


async def convert(binaries: QemuBinaries, chain: Sequence[Image], folder: Path, uri: str | None) -> None:
    """qemu-img's fastest: a chain becomes one image; it syncs nothing unless it is told to."""
    top = chain[0]
    to = (
        ["-n", "-O", "raw", str(top.path), uri]
        if uri
        else ["-O", top.format, *map(str, (top.path, folder / top.path.name))]
    )
    _run(str(binaries.img), "convert", "-W", "-m", "16", "-f", top.format, *to)


async def plain(_binaries: QemuBinaries, chain: Sequence[Image], folder: Path, _uri: str | None) -> None:
    """What an offload copies with: it syncs as it goes, and hands on what can be gone on from."""
    for image in chain:
        to = folder / image.path.name
        descriptor = os.open(to, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        made = os.fstat(descriptor)
        os.close(descriptor)
        stamp = stamp_of(str(image.path))
        assert stamp is not None, image
        await FileCopy(str(image.path), stamp, str(to), (made.st_dev, made.st_ino)).run(lambda _regions: None)


async def timed(way: Closed, binaries: QemuBinaries, chain: Sequence[Image], folder: Path, uri: str | None) -> float:
    """Milliseconds that a way takes."""
    began = time.perf_counter()
    await way(binaries, chain, folder, uri)
    return (time.perf_counter() - began) * 1000


def _run(*words: str) -> None:
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
