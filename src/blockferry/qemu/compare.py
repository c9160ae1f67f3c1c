"""Comparing what a guest was moved from with what it is on now, while it runs.

Both sides are read at once, QEMU's over its NBD server, the source's from a qemu-nbd. A bitmap counts what was written to
the destination since the pivot. It is looked at after everything was read: what differs where it counts nothing was not
written by the guest, neither before it was read nor while. So the answer is exact, at the bitmap's granularity of 64 KiB: in a
chunk that the guest has written to, nothing is compared.

The destination is read through QEMU, unless the guest would not survive that (`serving.can_export`). Then it is read beside
it, as the source is: the mirror has flushed it before the guest went over, what it held then is in the files; what QEMU has
in its own caches since is in the bitmap.

What it costs the guest: QEMU reads the destination once (a hundredth of it for a sample), in pieces of 512 KiB and at most four
at a time, in the thread that does the disk's own I/O; throttles limit it. It is not stopped. Where something differs, its
requests under way are waited for once a disk, as for any transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import msgspec

from blockferry.model.files import ImageFact
from blockferry.model.move import Difference, Verdict
from blockferry.plan.destinations import is_uri
from blockferry.plan.move import COPIED
from blockferry.plan.plan import Names
from blockferry.plan.tracking import CHUNK
from blockferry.qemu import chunks
from blockferry.qemu import nbdwire as wire
from blockferry.qemu.chunks import Chunks
from blockferry.qemu.copier import Throttle
from blockferry.qemu.images import Images
from blockferry.qemu.nbdclient import NbdClient, NbdFailed
from blockferry.qemu.serving import (
    ClosedChain,
    ServingFailed,
    bitmaps_of,
    can_export,
    closed,
    end_serving,
    exported,
    frozen,
    images_of,
    remove_node,
    serving,
)
from blockferry.qemu.session import CommandRefused, LostReply, Session

# What is read at once. On QEMU 7.2 twice of it costs twice the CPU (its buffers are new memory each time), a quarter of it
# half as much again.
PIECE_BYTES = 8 * CHUNK
# Pairs of connections that read: one keeps two cores busy from the page cache, and four a storage that answers slowly.
READERS = 4
# A server is asked about so much of its blocks at once: QEMU answers from its tables, in the thread of the disk's I/O.
STATUS_BYTES = 256 << 20
# So many differences of a disk are named; all of them are counted.
NAMED_MAX = 100
REPORT_SECONDS = 0.5
# The role of an export's name (ARCHITECTURE.md).
_EXPORT = "e"


class CompareFailed(Exception):
    """It could not be found out whether the copies are equal, with the reason."""


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """A disk whose source and destination are to be compared.

    Attributes:
        target: the disk's.
        node: the destination's format node, which the guest is on now.
        bitmap: a dirty bitmap of that node that has counted since before the guest's first write to it.
        source: the chain that the guest was on, top first; nobody has it open, nor writes to it.
        size: bytes of the disk.
    """

    target: str
    node: str
    bitmap: str
    source: tuple[ImageFact, ...]
    size: int


class _Side(msgspec.Struct, kw_only=True):
    """A server of one side of a disk.

    Attributes:
        socket: where it listens.
        export: the name there.
        who: for messages: who serves what.
        chain: the qemu-nbd, where it is one.
    """

    socket: str
    export: str
    who: str
    chain: ClosedChain | None = None


class _Open(msgspec.Struct, kw_only=True):
    """A disk with both sides open, and what is known of it."""

    disk: Compared
    source: _Side
    destination: _Side
    chunks: Chunks


async def source_of(images: Images, file: str, image_format: str) -> tuple[ImageFact, ...]:
    """What a disk can be read from that no guest has open: its chain, or the export that it is on; a fact tells why not.

    Args:
        images: the host's.
        file: path or URI of the disk's active image.
        image_format: that one's.
    """
    if not is_uri(file):
        return await images.chain(file, image_format)
    problem = (
        None if image_format == "raw" else f"it is {image_format} on an export, and what it backs onto is not known"
    )
    return (ImageFact(path=file, format=image_format, problem=problem),)


async def compare(
    session: Session,
    disks: tuple[Compared, ...],
    how: Literal["sample", "full"],
    *,
    images: Images,
    names: Names,
    report: Callable[[int, int], None],
    throttles: tuple[Throttle, ...] = (),
) -> Verdict:
    """Compare sources that nobody writes any more with the destinations that a guest is on.

    The guest runs; its disks are read besides. Nothing is left in QEMU, whatever the end; only if the connection to it
    is lost, the server remains until `forget`, or another comparison with the same names.

    Args:
        session: to the guest's QEMU, whose NBD server must not be in use.
        disks: which.
        how: `full`, or `sample`: a hundredth of what is not zero, at least 16 MiB a disk (`Chunks.sample`).
        images: tells which qemu-nbd to run.
        names: of the export and the bitmap that it makes for a while.
        report: told, in bytes, how much is compared and how much there is, about twice a second.
        throttles: limits that hold for it, in bytes of the disk.

    Raises:
        CompareFailed: it could not be found out, with the reason.
    """
    began = time.monotonic()
    try:
        for disk in disks:
            await _require_counted(session, disk)
        async with (
            serving(session, names) as folder,
            _opened(session, folder, disks, images, names) as found,
        ):
            await asyncio.gather(*(_survey(each) for each in found))
            if how == "sample":
                for each in found:
                    each.chunks.sample(f"{names.stem}-{each.disk.target}")
            total = await _read(found, how, report, throttles)
            for each in found:
                await _explain(session, each, folder, names)
    except ServingFailed as error:
        raise CompareFailed(str(error)) from error
    except CommandRefused as error:
        raise CompareFailed(f"QEMU refuses {error}") from error
    except LostReply as error:
        raise CompareFailed(f"QEMU gives no answer to {error}") from error
    return Verdict(
        how=how,
        compared=total,
        written=sum(each.chunks.bytes_in(chunks.WRITTEN) for each in found),
        different=sum(each.chunks.bytes_in(chunks.DIFFERENT) for each in found),
        differences=tuple(difference for each in found for difference in _differences(each)),
        seconds=time.monotonic() - began,
    )


async def forget(session: Session, disks: tuple[Compared, ...], names: Names) -> None:
    """Remove what a comparison has left in QEMU whose process died, or lost the connection; the guest notices nothing.

    Raises:
        CommandRefused, LostReply: as of the session.
    """
    await end_serving(session, names)
    for disk in disks:
        await remove_node(session, names.of(disk.target, COPIED))


async def _require_counted(session: Session, disk: Compared) -> None:
    """Fail unless it is known what the guest has written."""
    bitmap = (await bitmaps_of(session, disk.node)).get(disk.bitmap)
    if bitmap is None or not bitmap["recording"] or bitmap.get("inconsistent"):
        state = "is not there" if bitmap is None else "does not count"
        raise CompareFailed(
            f"{disk.target}: nobody knows what the guest has written since the pivot: "
            f"bitmap {disk.bitmap} of node {disk.node} {state}"
        )


@contextlib.asynccontextmanager
async def _opened(
    session: Session, folder: str, disks: tuple[Compared, ...], images: Images, names: Names
) -> AsyncIterator[tuple[_Open, ...]]:
    """Both sides of each disk, to be read."""
    through_qemu = await can_export(session)
    async with contextlib.AsyncExitStack() as stack:

        async def read_beside(disk: Compared, chain: tuple[ImageFact, ...], path: str, *, shared: bool) -> _Side:
            try:
                server = await stack.enter_async_context(closed(images.server, chain, path, shared=shared))
            except ServingFailed as error:
                side = "destination" if shared else "source"
                raise CompareFailed(f"{disk.target}: its {side} can't be read: {error}") from error
            return _Side(socket=path, export="", who=f"qemu-nbd, which reads {chain[0].path},", chain=server)

        async def read_node(disk: Compared, path: str) -> _Side:
            if not through_qemu:
                return await read_beside(disk, await images_of(session, disk.node), path, shared=True)
            export = names.of(disk.target, _EXPORT)
            server = await stack.enter_async_context(exported(session, folder, disk.node, export))
            return _Side(socket=server, export=export, who=f"QEMU, of node {disk.node},")

        found = []
        for number, disk in enumerate(disks):
            source = await read_beside(disk, disk.source, os.path.join(folder, f"s{number}.sock"), shared=False)
            destination = await read_node(disk, os.path.join(folder, f"d{number}.sock"))
            found.append(_Open(disk=disk, source=source, destination=destination, chunks=Chunks(disk.size)))
        yield tuple(found)


@contextlib.contextmanager
def _asking(each: _Open, side: _Side, at: int | None = None) -> Iterator[None]:
    """Say of a server that fails which one it is."""
    try:
        yield
    except NbdFailed as error:
        where = f" at offset {at}" if at is not None else ""
        raise CompareFailed(f"{each.disk.target} can't be compared{where}: {side.who} {error}") from error


async def _completed(each: _Open, failure: CompareFailed) -> CompareFailed:
    """A failure, with what a qemu-nbd has to say that has ended."""
    for side in (each.source, each.destination):
        words = await side.chain.last_words() if side.chain is not None else None
        if words:
            return CompareFailed(f"{failure}; it {words}")
    return failure


# --- what is to be read ---------------------------------------------------------------------------------------


async def _survey(each: _Open) -> None:
    """Find out what is not zero on both sides: that is to be read.

    The guest may write where both were zero: then that is in the bitmap.
    """
    sides = (each.source, each.destination)
    tasks = [asyncio.to_thread(_survey_side, each, side) for side in sides]
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, CompareFailed):
            raise await _completed(each, result)
        if result is not None:
            raise result


def _survey_side(each: _Open, side: _Side) -> None:
    with _asking(each, side), NbdClient.connect(side.socket, side.export) as client:
        if client.size != each.disk.size:
            what = f"{each.disk.target} can't be compared: it has {each.disk.size} bytes"
            raise CompareFailed(f"{what}, and {side.who} has {client.size}")
        for start, length, flags in client.ranges(0, client.size, STATUS_BYTES):
            if not flags & wire.ZERO:
                each.chunks.mark(start, length, chunks.UNREAD)


# --- reading --------------------------------------------------------------------------------------------------


async def _read(
    found: tuple[_Open, ...],
    how: Literal["sample", "full"],
    report: Callable[[int, int], None],
    throttles: tuple[Throttle, ...],
) -> int:
    """Read and compare disk after disk; the bytes that were compared then."""
    # What is zero on both sides is compared, in a full one.
    done = sum(each.chunks.bytes_in(chunks.ZERO) for each in found) if how == "full" else 0
    total = done + sum(each.chunks.bytes_in(chunks.UNREAD) for each in found)
    for each in found:
        reading = _Reading(each, throttles)
        await reading.run(lambda moved, before=done: report(before + moved, total))  # type: ignore[misc]
        done += reading.moved
    report(done, total)
    return total


class _Reading:
    """The reading of one disk, in threads.

    Args:
        each: the disk.
        throttles: limits that hold for it.
    """

    def __init__(self, each: _Open, throttles: tuple[Throttle, ...]) -> None:
        self._each = each
        self._throttles = throttles
        self._pieces = each.chunks.runs(chunks.UNREAD, PIECE_BYTES)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._clients: list[NbdClient] = []
        self._failure: CompareFailed | None = None
        self.moved = 0  # bytes that were read on both sides

    async def run(self, report: Callable[[int], None]) -> None:
        """Compare what is unread; what differs is marked.

        Raises:
            CompareFailed: a side can't be read.
        """
        pool = ThreadPoolExecutor(READERS, thread_name_prefix="compare")
        loop = asyncio.get_running_loop()
        tasks = {loop.run_in_executor(pool, self._work) for _ in range(READERS)}
        try:
            while any(not task.done() for task in tasks):
                report(self.moved)
                await asyncio.wait(tasks, timeout=REPORT_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            self._end()
            await asyncio.wait(tasks)
            pool.shutdown()
        for task in tasks:
            task.result()
        if self._failure is not None:
            raise await _completed(self._each, self._failure)

    def _end(self) -> None:
        """Have all threads end: whoever waits for an answer gets none."""
        self._stop.set()
        with self._lock:
            for client in self._clients:
                client.close()

    def _work(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                source = stack.enter_context(self._client(self._each.source))
                destination = stack.enter_context(self._client(self._each.destination))
                self._compare(source, destination)
        except CompareFailed as error:
            with self._lock:
                # What comes after the stop is its consequence.
                if self._failure is None and not self._stop.is_set():
                    self._failure = error
            self._end()

    def _client(self, side: _Side) -> NbdClient:
        with _asking(self._each, side):
            client = NbdClient.connect(side.socket, side.export)
        with self._lock:
            self._clients.append(client)
        return client

    def _compare(self, source: NbdClient, destination: NbdClient) -> None:
        ours, theirs = bytearray(PIECE_BYTES), bytearray(PIECE_BYTES)
        while (piece := self._next()) is not None:
            start, length = piece
            with _asking(self._each, self._each.source, start):
                source.ask(start, length)
            with _asking(self._each, self._each.destination, start):
                destination.ask(start, length)
            with _asking(self._each, self._each.source, start):
                source.receive(memoryview(ours)[:length])
            with _asking(self._each, self._each.destination, start):
                destination.receive(memoryview(theirs)[:length])
            # A memcmp, of whole bytearrays only. Where a piece is shorter, what is left of the last one is in none of the
            # chunks that are looked at below.
            if ours != theirs:
                for at in range(0, length, CHUNK):
                    end = min(at + CHUNK, length)
                    if ours[at:end] != theirs[at:end]:
                        self._each.chunks.mark(start + at, end - at, chunks.DIFFERENT)
            with self._lock:
                self.moved += length

    def _next(self) -> tuple[int, int] | None:
        with self._lock:
            piece = next(self._pieces, None)
        if piece is not None:
            for throttle in self._throttles:
                throttle.take(piece[1], self._stop)
        return None if self._stop.is_set() else piece


# --- what differs ---------------------------------------------------------------------------------------------


async def _explain(session: Session, each: _Open, folder: str, names: Names) -> None:
    """Tell what the guest has written from what else differs."""
    disk = each.disk
    await _require_counted(session, disk)
    span = each.chunks.span(chunks.DIFFERENT)
    if span is None:
        return
    copy = names.of(disk.target, COPIED)
    async with (
        frozen(session, disk.node, disk.bitmap, copy, disk.size),
        exported(session, folder, copy, copy, copy) as path,
    ):
        side = _Side(socket=path, export=copy, who=f"QEMU, of bitmap {disk.bitmap},")
        await asyncio.to_thread(_mark_written, each, side, span)


def _mark_written(each: _Open, side: _Side, span: tuple[int, int]) -> None:
    context = wire.dirty_bitmap(side.export)
    with _asking(each, side), NbdClient.connect(side.socket, side.export, context) as client:
        for start, length, flags in client.ranges(*span, STATUS_BYTES):
            if flags & wire.DIRTY:
                each.chunks.change(start, length, chunks.DIFFERENT, chunks.WRITTEN)


def _differences(each: _Open) -> Iterator[Difference]:
    for number, (offset, length) in enumerate(each.chunks.runs(chunks.DIFFERENT)):
        if number == NAMED_MAX:
            return
        yield Difference(target=each.disk.target, offset=offset, length=length)
