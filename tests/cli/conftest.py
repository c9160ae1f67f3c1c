"""A state directory and a guest to a test; the host process of the one ends with it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from commandkit import DISK_MIB, MIB, Command, stop

from blockferry.testing import TestQemu, blockdev_disk, find_qemu, legacy_drive, make_image, write_pattern


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "state"
    yield path
    stop(path)


@pytest.fixture
async def command(state_dir: Path) -> AsyncIterator[Command]:
    running = Command(state_dir)
    yield running
    await running.close()


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[TestQemu]:
    """A guest with a qcow2 disk (vda) full of data on a blockdev with an iothread, and a raw one (vdb) on a -drive."""
    qemu = find_qemu("distribution")
    first = make_image(qemu, tmp_path / "a.qcow2", "qcow2", DISK_MIB * MIB)
    second = make_image(qemu, tmp_path / "b.raw", "raw", DISK_MIB * MIB)
    write_pattern(qemu, first, "qcow2", 0, DISK_MIB * MIB, 0x5A)
    write_pattern(qemu, second, "raw", 0, MIB, 0xA5)
    disks = [*blockdev_disk("d0", first, "qcow2", iothread="io0"), *legacy_drive(second, "raw")]
    async with TestQemu(qemu, tmp_path, args=disks, paused=False) as running:
        yield running
