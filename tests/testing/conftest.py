from pathlib import Path

import pytest

from blockferry.testing import QemuBinaries, blockdev_disk, find_qemu, legacy_drive, make_image

MIB = 1024 * 1024


@pytest.fixture(params=["distribution", "qemu10"])
def qemu(request: pytest.FixtureRequest) -> QemuBinaries:
    return find_qemu(request.param)


@pytest.fixture
def disks(qemu: QemuBinaries, tmp_path: Path) -> list[str]:
    """A virtio disk `d0` with an iothread on qcow2, and a legacy drive on raw."""
    first = make_image(qemu, tmp_path / "a.qcow2", "qcow2", 64 * MIB)
    second = make_image(qemu, tmp_path / "b.raw", "raw", 64 * MIB)
    return [*blockdev_disk("d0", first, "qcow2", iothread="io0"), *legacy_drive(second, "raw")]
