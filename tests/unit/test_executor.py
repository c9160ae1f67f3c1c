"""What is decided while a step is carried out."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blockferry.engine.executor import SHORT_FLUSH_SECONDS, SHORT_SYNC_SECONDS, SYNC_PASSES, Executor, until_short
from blockferry.plan.files import FlushFiles, SyncFiles
from blockferry.qemu.images import Images
from blockferry.qemu.launch import Home

SHORT, LONG = SHORT_SYNC_SECONDS / 2, SHORT_SYNC_SECONDS * 20


@pytest.mark.parametrize(
    ("takes", "passes"),
    [((SHORT,), 1), ((LONG, SHORT), 2), ((LONG, LONG / 10, SHORT), 3), ((LONG,) * 9, SYNC_PASSES)],
    ids=["nobody writes", "somebody writes", "much", "more than storage takes"],
)
async def test_files_are_written_out_until_that_is_short(takes: tuple[float, ...], passes: int) -> None:
    now, left, done = 0.0, list(takes), 0

    async def sync() -> None:
        nonlocal now, done
        now += left.pop(0)
        done += 1

    await until_short(sync, SHORT_SYNC_SECONDS, lambda: now)
    assert done == passes


class SlowImages(Images):
    """On storage on which nothing is short."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs = 0
        self.in_use = False

    async def sync(self, _paths: tuple[str, ...], _readable: tuple[str, ...] = (), *, in_use: bool = False) -> None:
        self.syncs += 1
        self.in_use = in_use
        await asyncio.sleep(LONG / 10)

    async def flush(self, paths: tuple[str, ...]) -> None:
        await self.sync(paths)


@pytest.mark.parametrize(("in_window", "passes"), [(False, SYNC_PASSES), (True, 1)])
async def test_in_a_window_they_are_written_out_once(tmp_path: Path, in_window: bool, passes: int) -> None:
    """The guest stands still, and for all of that time: nor in pieces, then."""
    images = SlowImages()
    executor = Executor("vm", None, None, images, Home(tmp_path, tmp_path, "vm"))
    if in_window:
        executor.deadline = asyncio.get_running_loop().time() + 2.0
    await executor.do(SyncFiles(paths=("/top",)), {})
    assert (images.syncs, images.in_use) == (passes, not in_window)


async def test_what_a_guest_writes_is_not_flushed_as_often_as_in_a_window(tmp_path: Path) -> None:
    images = SlowImages()
    assert SHORT_SYNC_SECONDS < LONG / 10 < SHORT_FLUSH_SECONDS
    await Executor("vm", None, None, images, Home(tmp_path, tmp_path, "vm")).do(FlushFiles(paths=("/top",)), {})
    assert images.syncs == 1


async def test_what_can_not_be_written_out_is_not_tried_again() -> None:
    tried = 0

    async def sync() -> None:
        nonlocal tried
        tried += 1
        raise OSError("the storage is ill")

    with pytest.raises(OSError, match="ill"):
        await until_short(sync, SHORT_SYNC_SECONDS)
    assert tried == 1
