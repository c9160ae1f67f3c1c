import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from blockferry.testing import QemuBinaries, find_qemu, sharing_file_system

# Test folders are not packages; what tests/qemu and tests/faults share lies in tests/qemu/rig.py, and what tests/power and
# tests/chaos share, an operation's setting and the verdict, in tests/chaos.
sys.path.insert(0, str(Path(__file__).parent / "qemu"))
sys.path.insert(0, str(Path(__file__).parent / "chaos"))
from matrix import Tally  # found by the lines before
from rig import MIB, Rig, open_rig
from sharing import open_sharing

# A loaded two-core machine is slow now and then; that is no failure of what is tested.
settings.register_profile("blockferry", deadline=None)
settings.load_profile("blockferry")


@pytest.fixture(params=["distribution", "qemu10"])
def qemu(request: pytest.FixtureRequest) -> QemuBinaries:
    return find_qemu(request.param)


@pytest.fixture
async def rig(qemu: QemuBinaries, tmp_path: Path) -> AsyncIterator[Rig]:
    """A guest that runs, with three disks of different kinds, attached as vm1."""
    async with open_rig(qemu, tmp_path) as rig:
        yield rig


@pytest.fixture(params=["running", "paused"])
async def either(request: pytest.FixtureRequest, qemu: QemuBinaries, tmp_path: Path) -> AsyncIterator[Rig]:
    """As `rig`, with a guest that runs, and with one that was never started."""
    async with open_rig(qemu, tmp_path, paused=request.param == "paused") as rig:
        yield rig


@pytest.fixture
async def faulty(qemu: QemuBinaries, tmp_path: Path) -> AsyncIterator[Rig]:
    """As `rig`, with a fault-injecting proxy between the service and QEMU."""
    async with open_rig(qemu, tmp_path, proxy=True) as rig:
        yield rig


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 12 MiB, with something on it."""
    backing = tmp_path / "device"
    backing.write_bytes(b"\xee" * 12 * MIB)
    done = subprocess.run(["losetup", "-f", "--show", backing], capture_output=True, text=True, check=True, timeout=20)
    name = done.stdout.strip()
    try:
        yield Path(name)
    finally:
        subprocess.run(["losetup", "-d", name], check=True, timeout=20)


@pytest.fixture
def reflinks(tmp_path: Path) -> Iterator[Path]:
    """A file system whose files can share blocks: XFS."""
    with sharing_file_system(tmp_path / "xfs", tmp_path / "mounted") as folder:
        yield folder


@pytest.fixture
async def sharing(qemu: QemuBinaries, reflinks: Path) -> AsyncIterator[Rig]:
    """Two raw disks on such a file system, with a fault-injecting proxy: vda of -blockdev, vdb of the legacy -drive."""
    async with open_sharing(qemu, reflinks) as rig:
        yield rig


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line of a run with cases of the matrix: what was played. Here, as pytest's own process reads no conftest below."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or reporter.getreports("failed") or reporter.getreports("error"):
        return
    total = Tally()
    for report in reporter.getreports("passed"):
        for name, value in getattr(report, "user_properties", ()):
            if name == "chaos":
                cases, kills, faults = value
                total.add(Tally(cases=cases, kills=kills, faults=faults))
    if total.cases:
        reporter.write_line(str(total))
