"""Copying a file beside QEMU: holes, what is kept, what is copied again."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from blockferry.model.files import FileStamp
from blockferry.model.move import Region
from blockferry.qemu import copier
from blockferry.qemu.copier import CopyFailed, FileCopy, Throttle, data_bytes, region_bytes, settled
from blockferry.qemu.images import stamp_of

MIB = 1 << 20
SIZE = 24 * MIB


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file with data, holes, and more data that ends in the middle of a block."""
    path = tmp_path / "source"
    chance = random.Random(7)  # noqa: S311
    with path.open("wb") as file:
        for begin, length in ((0, 3 * MIB), (9 * MIB, 5 * MIB), (SIZE - MIB, MIB - 777)):
            file.seek(begin)
            file.write(chance.randbytes(length))
        file.truncate(SIZE - 100)
    return path


class Made:
    """A copy under test, claimed as an operation claims it."""

    def __init__(self, source: Path, path: Path) -> None:
        path.touch(exist_ok=False)
        found = path.stat()
        self.source, self.path, self.claim = source, path, (found.st_dev, found.st_ino)
        stamp = stamp_of(str(source))
        assert stamp is not None
        self.stamp: FileStamp = stamp
        self.regions: list[Region] = []

    def copy(self, *, throttles: tuple[Throttle, ...] = ()) -> FileCopy:
        return FileCopy(
            str(self.source), self.stamp, str(self.path), self.claim, done=tuple(self.regions), throttles=throttles
        )

    def keep(self, regions: tuple[Region, ...]) -> None:
        self.regions += regions

    def is_whole(self) -> bool:
        return self.path.read_bytes() == self.source.read_bytes()


@pytest.fixture(params=["copy_file_range", "read-write"])
def made(request: pytest.FixtureRequest, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A copy to the same file system, or to one to which the kernel does not copy."""
    monkeypatch.setattr(copier, "clone", lambda _source, _copy: False)
    if request.param == "read-write":
        monkeypatch.setattr(FileCopy, "_by_kernel", lambda _self, *_arguments: 0)
    return Made(source, tmp_path / "copy")


async def test_a_copy_is_equal_and_as_sparse(made: Made) -> None:
    copy = made.copy()
    await copy.run(made.keep)
    assert made.is_whole()
    assert copy.moved == data_bytes(str(made.source)) == data_bytes(str(made.path)) < SIZE // 2
    assert sum(region.length for region in made.regions) == SIZE - 100


async def test_what_is_on_disk_is_not_copied_again(made: Made) -> None:
    whole = made.copy()
    await whole.run(made.keep)
    first = made.regions[: len(made.regions) // 2]
    made.regions = list(first)
    again = made.copy()
    await again.run(made.keep)
    assert made.is_whole()
    assert again.moved < whole.moved
    assert again.kept == sum(region.length for region in first)


async def test_a_region_that_is_another_now_is_copied_again(made: Made) -> None:
    await made.copy().run(made.keep)
    with made.path.open("r+b") as file:
        file.seek(10 * MIB)
        file.write(b"not what was copied")
    again = made.copy()
    await again.run(made.keep)
    # The kernel's copies have no checksum: nobody has seen their bytes.
    checked = all(region.checksum is not None for region in made.regions)
    assert made.is_whole() is checked
    assert (again.moved > 0) is checked


async def test_a_copy_that_is_stopped_keeps_what_it_has_told(made: Made) -> None:
    throttle = Throttle(1)  # the first block goes at once, the next one in a million seconds
    copying = asyncio.ensure_future(made.copy(throttles=(throttle,)).run(made.keep))
    await asyncio.sleep(0)
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    assert not made.is_whole()
    again = made.copy()
    await again.run(made.keep)
    assert made.is_whole()


async def test_a_source_that_is_written_to_is_refused(made: Made) -> None:
    with made.source.open("r+b") as file:
        file.write(b"x")
    with pytest.raises(CopyFailed, match="somebody has touched"):
        await made.copy().run(made.keep)


async def test_a_file_that_is_not_the_one_that_was_made_is_left_alone(made: Made, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"somebody's")
    os.replace(other, made.path)
    with pytest.raises(CopyFailed, match="is not the file that was made"):
        await made.copy().run(made.keep)
    assert made.path.read_bytes() == b"somebody's"


async def test_a_link_is_not_followed(made: Made, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"somebody's")
    made.path.unlink()
    made.path.symlink_to(victim)
    with pytest.raises(CopyFailed):
        await made.copy().run(made.keep)
    assert victim.read_bytes() == b"somebody's"


async def test_a_limit_can_be_changed_while_it_is_waited_for() -> None:
    throttle, stop = Throttle(1), threading.Event()
    throttle.take(1 << 40, stop)
    waiting = asyncio.ensure_future(asyncio.to_thread(throttle.take, 1, stop))
    await asyncio.sleep(0)
    assert not waiting.done()
    throttle.rate = 0
    await waiting


async def test_who_waits_for_a_limit_can_be_stopped() -> None:
    throttle, stop = Throttle(1), threading.Event()
    throttle.take(1 << 40, stop)
    waiting = asyncio.ensure_future(asyncio.to_thread(throttle.take, 1, stop))
    stop.set()
    await waiting


@pytest.mark.parametrize(
    ("size", "region"), [(0, 4 * MIB), (1, 4 * MIB), (2048 * MIB, 4 * MIB), (1 << 40, 2 << 30 >> 1), (1 << 50, 1 << 30)]
)
def test_regions(size: int, region: int) -> None:
    assert region_bytes(size) == min(region, 1 << 30)


async def test_another_mode_or_name_is_no_writing(made: Made, tmp_path: Path) -> None:
    copy = made.copy()
    made.source.chmod(0o640)
    os.link(made.source, tmp_path / "another name")
    await copy.run(made.keep)
    assert made.is_whole()


async def test_what_cannot_be_settled(tmp_path: Path) -> None:
    with pytest.raises(CopyFailed, match="No such file"):
        await settled(str(tmp_path / "gone"))
    with pytest.raises(CopyFailed, match="no plain file"):
        await settled(str(tmp_path))


HANGS = """
import asyncio, os, sys, threading
from blockferry.qemu.copier import FileCopy, settled

HANGING = threading.Event()

def hang(*_arguments):
    HANGING.set()
    threading.Event().wait()

async def main(name, source, copy):
    stamp, made = await settled(source), os.stat(copy)
    setattr(os, name, hang)
    task = asyncio.ensure_future(FileCopy(source, stamp, copy, (made.st_dev, made.st_ino)).run(lambda regions: None))
    while not HANGING.is_set():
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("name", ["copy_file_range", "fdatasync", "fsync"])
def test_a_process_ends_while_a_file_system_hangs(made: Made, name: str) -> None:
    """Who is cancelled leaves the thread that hangs behind, and is not held up by it."""
    subprocess.run([sys.executable, "-c", HANGS, name, made.source, made.path], check=True, timeout=60)
