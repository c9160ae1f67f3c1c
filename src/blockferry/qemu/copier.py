"""Copying a file that no one writes, beside QEMU: by sharing its blocks, within the kernel, or by parallel reads and writes.

Holes stay holes. What is on disk is handed on region by region, so that whoever comes after us goes on from there.
Sources: copy_file_range(2), lseek(2) on SEEK_DATA.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import xxhash

from blockferry.model.files import FileStamp
from blockferry.model.move import Method, Region
from blockferry.qemu.bounded import apart
from blockferry.qemu.images import stamp_of
from blockferry.qemu.sharing import clone

# What is kept of a copy is kept in this many regions: few enough to be written down, small enough that those which a crash
# catches half done are little of it.
REGIONS = 512
REGION_BYTES_MIN, REGION_BYTES_MAX = 4 << 20, 1 << 30
# Of one read or one copy_file_range: what a cancel or a limit waits for.
BLOCK_BYTES = 1 << 20
# Two were as fast as more on two cores; more keep a storage busy that answers slowly.
WORKERS = 4
# Beside more of them a guest that is at work waits for its processors: docs/adr/0021-in-flight.md.
AT_WORK_WORKERS = 1
# Once so much has been written it is synced and handed on, while the copying goes on: what a crash costs.
SYNC_BYTES = 16 << 20
# Who waits for a limit looks this often whether he is to stop.
STOP_SECONDS = 0.25
_CANT_RANGE = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class CopyFailed(Exception):
    """A copy can't go on, with the reason in the system's words."""


class Throttle:
    """A limit in bytes per second that several copies share; 0 is none. It can be changed while they run."""

    def __init__(self, rate: int = 0) -> None:
        self._changed = threading.Condition()
        self._rate = rate
        self._next = 0.0

    @property
    def rate(self) -> int:
        """Bytes per second."""
        return self._rate

    @rate.setter
    def rate(self, rate: int) -> None:
        with self._changed:
            self._rate, self._next = rate, 0.0
            self._changed.notify_all()

    def take(self, length: int, stop: threading.Event) -> None:
        """Wait, in a thread, until that many bytes may go: until those before them have had their time.

        Args:
            length: bytes.
            stop: ends the wait.
        """
        with self._changed:
            while self._rate and (wait := self._next - time.monotonic()) > 0 and not stop.is_set():
                self._changed.wait(min(wait, STOP_SECONDS))
            if self._rate:
                self._next = time.monotonic() + length / self._rate


class FileCopy:
    """The copy of one file.

    Args:
        source: the file that nobody writes.
        stamp: what it looked like when its copying began.
        file: the copy: a regular file that we made.
        claim: device and inode of that one.
        done: regions that are on disk already, from before.
        throttles: limits that hold for it.
        workers: how many threads copy at once, at most.
    """

    def __init__(
        self,
        source: str,
        stamp: FileStamp,
        file: str,
        claim: tuple[int, int],
        *,
        done: Iterable[Region] = (),
        throttles: tuple[Throttle, ...] = (),
        workers: int = WORKERS,
    ) -> None:
        self._source, self._stamp, self._file, self._claim = source, stamp, file, claim
        self._done = tuple(done)
        self._throttles = throttles
        self._workers = workers
        self._stop = threading.Event()
        self._ending = threading.Lock()
        self._counting = threading.Lock()
        self._ranged = True  # whether copy_file_range has worked so far
        self.moved = 0  # bytes that were copied by this very object
        self.kept = sum(region.length for region in self._done)  # bytes that were there before, holes with them

    async def run(self, keep: Callable[[tuple[Region, ...]], None]) -> Method:
        """Copy what is missing, and return how it was done; then all of it is on disk.

        Args:
            keep: told which regions have reached the disk, from the caller's thread.

        Raises:
            CopyFailed: with the reason; what was handed to `keep` stays good.
        """
        try:
            with self._opened() as (source, copy):
                method = await self._run(source, copy, keep)
            self._require_untouched()
        except OSError as error:
            raise CopyFailed(f"{error.filename or self._file}: {error.strerror}") from error
        return method

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[int, int]]:
        with contextlib.ExitStack() as stack:
            self._require_untouched()
            source = os.open(self._source, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, source)
            copy = os.open(self._file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            stack.callback(os.close, copy)
            found = os.fstat(copy)
            if not stat.S_ISREG(found.st_mode) or (found.st_dev, found.st_ino) != self._claim:
                raise CopyFailed(f"{self._file} is not the file that was made there")
            # A thread that hangs in the file system is not waited for: it has descriptors of its own.
            stack.callback(self._end)
            yield source, copy

    def _end(self) -> None:
        with self._ending:
            self._stop.set()

    @contextlib.contextmanager
    def _own(self, *descriptors: int) -> Iterator[list[int]]:
        """What a thread works with."""
        with contextlib.ExitStack() as stack:
            with self._ending:
                if self._stop.is_set():
                    raise CopyFailed("it was stopped")
                own = [os.dup(each) for each in descriptors]
            for each in own:
                stack.callback(os.close, each)
            yield own

    def _require_untouched(self) -> None:
        if not self._stamp.holds(stamp_of(self._source)):
            raise CopyFailed(f"somebody has touched {self._source} since its copying began: nobody may write to it")

    async def _run(self, source: int, copy: int, keep: Callable[[tuple[Region, ...]], None]) -> Method:
        size = self._stamp.size
        if not self._done and await apart(self._cloned, source, copy):
            # Nothing of it is kept: done again after a crash, it takes as little as to look.
            await apart(self._synced, os.fsync, copy)
            self.moved = size
            return "reflink"
        os.ftruncate(copy, size)
        step = region_bytes(size)
        there = await apart(self._check_kept, source, copy, step)
        missing = [start for start in range(0, size, step) if start not in there]
        starts = iter(missing)
        over: asyncio.Queue[Region | asyncio.Future[None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hand_on(region: Region) -> None:
            loop.call_soon_threadsafe(over.put_nowait, region)

        workers = [
            asyncio.ensure_future(apart(self._work, source, copy, starts, step, hand_on))
            for _each in range(min(self._workers, len(missing)))
        ]
        for worker in workers:
            worker.add_done_callback(over.put_nowait)
            worker.add_done_callback(_heard)
        finished: list[Region] = []
        try:
            left = len(missing)
            while left:
                what = await over.get()
                if isinstance(what, asyncio.Future):
                    what.result()  # it has failed, or found nothing more to do
                    continue
                left -= 1
                finished.append(what)
                if not left or (over.empty() and step * len(finished) >= SYNC_BYTES):
                    await apart(self._synced, os.fdatasync, copy)
                    keep(tuple(finished))
                    finished.clear()
        finally:
            for worker in workers:
                worker.cancel()
        await apart(self._synced, os.fsync, copy)
        return "copy_file_range" if self._ranged else "read-write"

    def _cloned(self, source: int, copy: int) -> bool:
        with self._own(source, copy) as own:
            return clone(*own)

    def _synced(self, sync: Callable[[int], None], copy: int) -> None:
        with self._own(copy) as own:
            sync(*own)

    def _check_kept(self, source: int, copy: int, step: int) -> set[int]:
        """Where the regions begin that need no copying: those from before whose bytes are still what they were."""
        there: set[int] = set()
        self.kept = 0
        with self._own(source, copy) as own:
            source, copy = own
            for region in self._done:
                if region.checksum is None or _checksum(source, copy, region) == region.checksum:
                    there.update(range(region.start, region.start + region.length, step))
                    self.kept += region.length
        return there

    def _work(
        self, source: int, copy: int, starts: Iterator[int], step: int, hand_on: Callable[[Region], object]
    ) -> None:
        """Copy region after region, in a thread, until there is none left that nobody has begun."""
        with self._own(source, copy) as own:
            source, copy = own
            buffer = memoryview(bytearray(BLOCK_BYTES))
            while (start := self._next(starts)) is not None:
                hand_on(self._copied(source, copy, start, min(start + step, self._stamp.size), buffer))

    def _next(self, starts: Iterator[int]) -> int | None:
        with self._counting:
            return next(starts, None)

    def _copied(self, source: int, copy: int, start: int, end: int, buffer: memoryview) -> Region:
        checksum = xxhash.xxh3_64()
        ranged = False
        for begin, length in _data(source, start, end):
            at, stop = begin, begin + length
            while at < stop:
                self._wait(min(BLOCK_BYTES, stop - at))
                count = self._by_kernel(source, copy, at, min(BLOCK_BYTES, stop - at))
                ranged = ranged or count > 0
                if not count:
                    count = _by_hand(source, copy, at, buffer[: stop - at])
                    checksum.update(buffer[:count])
                at += count
                with self._counting:
                    self.moved += count
        # Of bytes that the kernel has copied we have seen none.
        return Region(start=start, length=end - start, checksum=None if ranged else checksum.intdigest())

    def _wait(self, length: int) -> None:
        for throttle in self._throttles:
            throttle.take(length, self._stop)
        if self._stop.is_set():
            raise CopyFailed("it was stopped")

    def _by_kernel(self, source: int, copy: int, at: int, length: int) -> int:
        """Have the kernel copy; 0 where it does not for these file systems."""
        if not self._ranged:
            return 0
        try:
            return os.copy_file_range(source, copy, length, at, at)
        except OSError as error:
            if error.errno not in _CANT_RANGE:
                raise
            self._ranged = False
            return 0


def region_bytes(size: int) -> int:
    """How long the regions are that a file of `size` bytes is copied in: a power of two."""
    wanted = 1 << max(0, (size // REGIONS - 1).bit_length())
    return min(max(wanted, REGION_BYTES_MIN), REGION_BYTES_MAX)


def _by_hand(source: int, copy: int, at: int, buffer: memoryview) -> int:
    count = os.preadv(source, [buffer], at)
    if not count:
        raise OSError(errno.EIO, "it ends before its size says so")
    written = 0
    while written < count:
        written += os.pwrite(copy, buffer[written:count], at + written)
    return count


def _data(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The extents (offset, length) of a part of a file that hold data; on a file system that can't tell, all of it."""
    at = start
    while at < end:
        try:
            begin = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data from there on
                raise
            return
        if begin >= end:
            return
        stop = min(os.lseek(descriptor, begin, os.SEEK_HOLE), end)
        yield begin, stop - begin
        at = stop


async def settled(source: str) -> FileStamp:
    """What a file that nobody writes looks like from now on, when the power has failed too: its times are on disk.

    QEMU's flushes (fdatasync) leave them out.

    Raises:
        CopyFailed: it can't be read, or is no file.
    """

    def settle() -> FileStamp | None:
        descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return stamp_of(source)

    try:
        stamp = await apart(settle)
    except OSError as error:
        raise CopyFailed(f"{source}: {error.strerror}") from error
    if stamp is None:
        raise CopyFailed(f"{source} is no plain file any more")
    return stamp


def data_bytes(path: str) -> int:
    """The bytes of a file that hold data: what its copying moves.

    Raises:
        OSError: it can't be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return sum(length for _begin, length in _data(descriptor, 0, os.fstat(descriptor).st_size))
    finally:
        os.close(descriptor)


def _checksum(source: int, copy: int, region: Region) -> int:
    """The checksum of a region of a copy, as of when its bytes went through us: of what is data in its source."""
    checksum = xxhash.xxh3_64()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for begin, length in _data(source, region.start, region.start + region.length):
        for at in range(begin, begin + length, BLOCK_BYTES):
            count = os.preadv(copy, [buffer[: min(BLOCK_BYTES, begin + length - at)]], at)
            checksum.update(buffer[:count])
    return checksum.intdigest()


def _heard(worker: asyncio.Future[None]) -> None:
    """One that failed or was cancelled after another had failed is nobody's to ask for."""
    if not worker.cancelled():
        worker.exception()
