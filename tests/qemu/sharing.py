"""A guest with raw disks on a file system whose files can share their blocks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from rig import MIB, SIZE, Rig, open_guest

from blockferry.testing import QemuBinaries, blockdev_disk, legacy_drive, make_image, write_pattern

DISKS = ("vda", "vdb")


@contextlib.asynccontextmanager
async def open_sharing(
    qemu: QemuBinaries, path: Path, *, paused: bool = False, proxy: bool = True, iothreads: bool = True
) -> AsyncIterator[Rig]:
    """vda of -blockdev with an iothread, vdb of the legacy -drive, both raw; between the service and QEMU a `proxy`."""
    contents = {}
    for number, target in enumerate(DISKS, start=1):
        image = make_image(qemu, path / f"{target}.img", "raw", SIZE)
        write_pattern(qemu, image, "raw", 0, MIB, 0x10 * number)
        contents[target] = bytearray(bytes([0x10 * number]) * MIB + bytes(SIZE - MIB))
    args = [
        *blockdev_disk("d0", path / "vda.img", "raw", iothread="io0" if iothreads else None),
        *legacy_drive(path / "vdb.img", "raw"),
    ]
    async with open_guest(qemu, path, args, contents, paused=paused, proxy=proxy) as rig:
        rig.iothreads = iothreads
        yield rig
