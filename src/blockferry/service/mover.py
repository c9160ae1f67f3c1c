"""One move, driven from where it stands to its end: its parts are operations like any others, and files that are copied."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Iterator

import msgspec

from blockferry import errors
from blockferry.engine.keeper import Keeper
from blockferry.engine.news import item
from blockferry.journal.records import OperationRecord
from blockferry.model.blockjob import BlockJob
from blockferry.model.domain import Observation
from blockferry.model.files import ImageFact
from blockferry.model.move import Layer, Move, MovedDisk
from blockferry.plan.destinations import is_uri
from blockferry.plan.disks import find_disk
from blockferry.plan.move import (
    COUNTED,
    going_over,
    layers_of,
    mirrors_of,
    next_of,
    plan_back,
    plan_end,
    plan_give_up,
    plan_given_up,
    plan_mirrors,
    waiting,
)
from blockferry.plan.placement import PAUSE_MS
from blockferry.plan.plan import Names
from blockferry.plan.window import plan_window
from blockferry.qemu.compare import Compared, CompareFailed, compare, forget, source_of
from blockferry.qemu.copier import AT_WORK_WORKERS, WORKERS, CopyFailed, FileCopy, Throttle, settled
from blockferry.qemu.nbd import inspect
from blockferry.qemu.paths import aliases, existing
from blockferry.service.desk import Desk
from blockferry.service.storages import Storages
from blockferry.service.usage import look_up, mentioned

# So often what is copied is looked at and said.
SAY_SECONDS = 1.0
# Mirrors are waited for without end; so often somebody looks whether they still work.
LOOK_SECONDS = 60.0


class Mover:
    """Drives one move.

    Args:
        desk: what the rooms share.
        operation: the move's number.
        storages: limits that all moves share.
        mirrored: the disks whose mirrors began with the move.
    """

    def __init__(self, desk: Desk, operation: int, storages: Storages, mirrored: Iterable[str] = ()) -> None:
        self._desk = desk
        self._operation = operation
        self._storages = storages
        self._throttle = Throttle(self._move.bandwidth)
        self.copying_to: str | None = None  # what is written outside QEMU now
        self.stands = False  # whether it has given in, with the reason in the journal
        self._mirrored = set(mirrored)

    @property
    def _move(self) -> Move:
        move = self._desk.journal.move(self._operation)
        if move is None:
            raise AssertionError(self._operation)
        return move

    def _jobs(self, move: Move) -> dict[str, BlockJob]:
        return {job.target: job for job in self._desk.journal.jobs(move.domain)}

    async def run(self) -> None:
        """Go on with the move until it is over, or stands still: then the reason is recorded and said."""
        try:
            await self._until_deadline()
            while not (move := self._move).over:
                await self._next(move)
        except (errors.BlockferryError, CopyFailed) as error:
            self.stand(error.message if isinstance(error, errors.BlockferryError) else str(error))

    async def _until_deadline(self) -> None:
        """Go on until the guest has gone over, or the move is to be given up: because its time is over, too."""
        move = self._move
        left = move.deadline - time.time() if move.deadline is not None else None
        try:
            # What it cancels is cancelled as by who gives a move up on request: an operation that was begun ends first.
            async with asyncio.timeout(left) as bound:
                while not move.pivoted and move.state == "working":
                    await self._next(move)
                    move = self._move
        except TimeoutError:
            if not bound.expired():
                raise
            move = self._move
            if not move.pivoted and move.state == "working":
                await self.give_up(self._too_late(move))

    def _too_late(self, move: Move) -> str:
        record = self._desk.journal.operation(move.operation)
        given = (move.deadline or 0.0) - (record.started if record is not None else 0.0)
        phase = next_of(move, self._jobs(move))
        return (
            f"its guest had not gone over within its deadline, {round(given, 1):g} s: it was at «{phase}». More time (--deadline), "
            "a higher --bandwidth, or --converge, which holds the guest's writes, would help"
        )

    async def _next(self, move: Move) -> None:
        match next_of(move, self._jobs(move)):
            case "copy":
                await self._copy(move)
            case "mirror":
                await self._mirror(move)
            case "pivot":
                await self._pivot(move)
            case "verify":
                await self._verify(move)
            case "end":
                await self._end(move)
            case "back":
                await self._back(move)

    def stand(self, reason: str) -> None:
        """Give in: what is done stays, the reason is recorded and said."""
        self.stands = True
        move = msgspec.structs.replace(self._move, reason=reason)
        self._desk.keep_move(move, "move-stands", phase=next_of(move, self._jobs(move)), reason=reason)

    def _keep(self, move: Move) -> None:
        self._desk.journal.put_move(move)

    def _say(self, kind: str, **data: object) -> None:
        self._desk.say(kind, self._move.domain, operation=self._operation, **data)

    # --- what is copied outside QEMU --------------------------------------------------------------------------

    async def _copy(self, move: Move) -> None:
        missing = [layer for layer in move.layers if layer.source not in move.methods]
        new = {layer.source: await settled(layer.source) for layer in missing if layer.source not in move.stamps}
        if new:
            self._keep(msgspec.structs.replace(self._move, stamps={**self._move.stamps, **new}))
        workers = AT_WORK_WORKERS if await self._guest_is_at_work(move) else WORKERS
        for layer in missing:
            await self._copy_layer(self._move, layer, workers)

    async def _guest_is_at_work(self, move: Move) -> bool:
        """Whether it reads or writes what is moved; not of one that can't be asked: copying goes on without it."""
        keeper = self._desk.keeper(move.domain)
        try:
            seen = await keeper.observe_work(await keeper.observe())
        except errors.BlockferryError:
            return False
        return not seen.at_work.isdisjoint(move.targets)

    async def _copy_layer(self, move: Move, layer: Layer, workers: int) -> None:
        journal, stamp = self._desk.journal, move.stamps[layer.source]
        claim = journal.claim(move.operation, layer.file)
        if claim is None:
            raise CopyFailed(f"{layer.file} is not there any more")
        done = journal.regions(move.operation, layer.file)
        throttles = (self._throttle, await self._storages.throttle(layer.file))
        copy = FileCopy(layer.source, stamp, layer.file, claim, done=done, throttles=throttles, workers=workers)
        self.copying_to = layer.file
        began = time.monotonic()
        ticker = asyncio.ensure_future(self._tick(move, layer, copy))
        try:
            method = await copy.run(lambda regions: journal.put_regions(move.operation, layer.file, regions))
        finally:
            ticker.cancel()
            self.copying_to = None
        move = msgspec.structs.replace(self._move, methods={**self._move.methods, layer.source: method})
        said = {"file": layer.file, "method": method, "bytes": copy.moved, "kept": copy.kept}
        self._desk.keep_move(move, "move-copied", **said, seconds=time.monotonic() - began)

    async def _tick(self, move: Move, layer: Layer, copy: FileCopy) -> None:
        """Say once a second how far a copy is; never recorded."""
        began, first = time.monotonic(), copy.moved
        while True:
            await asyncio.sleep(SAY_SECONDS)
            done = copy.moved - first
            self._say_far(move, began, done, copy.kept + copy.moved, layer.length, phase="copy", file=layer.file)

    def _say_far(self, move: Move, began: float, done: int, current: int, total: int, **where: str) -> None:
        """Say how far something is of which `done` bytes have been dealt with since it began; never recorded."""
        rate = done / max(time.monotonic() - began, 1e-9)
        data = {
            "operation": move.operation,
            **where,
            "current": current,
            "total": total,
            "rate": rate or None,
            "remaining_seconds": max(0, total - current) / rate if rate else None,
        }
        self._desk.bus.publish((item(move.domain, "move-progress", None, **data),))

    # --- what QEMU copies -------------------------------------------------------------------------------------

    async def _mirror(self, move: Move) -> None:
        """Start the mirrors that do not work."""
        for layer in layers_of(move, waiting(move, self._jobs(move))):
            if layer.backing is not None and await self._is_torn(layer):
                methods = {source: how for source, how in move.methods.items() if source != layer.source}
                self._desk.journal.begin_again(msgspec.structs.replace(self._move, methods=methods), layer.file)
                return
        async with self._desk.writing(move.domain, move=move.operation) as (keeper, seen):
            disks = waiting(move, self._jobs(move))
            # One that was lost since is not begun again and again: whoever has looked at its storage says when.
            self._require_none_lost(move, tuple(disk for disk in disks if disk.target in self._mirrored))
            paths = tuple(disk.file for disk in disks if not is_uri(disk.file))
            files = await look_up(self._desk, keeper, seen, paths, {})
            exports = {disk.file: await inspect(disk.file) for disk in disks if is_uri(disk.file)}
            claimed = {path for path, *_made in self._desk.journal.claims(move.domain, move.operation)}
            number, names = self._desk.names()
            plan = plan_mirrors(
                move,
                await keeper.observe_work(seen),
                disks,
                names=names,
                files=msgspec.structs.replace(files, exports=exports),
                claimed=frozenset(claimed),
                speeds=await self._speeds(move, disks),
            )
            await keeper.run(number, plan)
            self._mirrored.update(disk.target for disk in disks)

    def _require_none_lost(self, move: Move, disks: tuple[MovedDisk, ...]) -> None:
        """Refuse to go on without these, whose mirrors do not work any more; the first is named."""
        if disks:
            job = self._jobs(move).get(disks[0].target)
            reason = (job.reason if job is not None else None) or "its job has ended"
            raise errors.JobLost(domain=move.domain, disk=disks[0].target, reason=reason)

    async def _is_torn(self, layer: Layer) -> bool:
        """Whether a copy's header can't be read any more, as its source's can: the power failed while its backing was named."""
        (copy, *_bases) = await self._desk.images.chain(layer.file, layer.format)
        (source, *_bases) = await self._desk.images.chain(layer.source, layer.format)
        return copy.problem is not None and source.problem is None

    async def _pivot(self, move: Move) -> None:
        """Wait until the mirrors are ready and the pause is to be short enough, then let the guest go over."""
        keeper = self._desk.keeper(move.domain)
        # That one was lost is on record once somebody has the domain to himself, and so the phase in which the move stands then.
        with contextlib.suppress(errors.JobLost):
            await self._wait_ready(keeper, move)
        with contextlib.suppress(errors.JobNotReady):  # one fell behind again: it is waited for once more
            async with self._desk.writing(move.domain, move=move.operation) as (keeper, seen):
                await self._go_over(keeper, seen, move)

    async def _wait_ready(self, keeper: Keeper, move: Move) -> None:
        said = False
        while True:
            with contextlib.suppress(errors.JobNotReady):
                await keeper.wait_ready(move.targets, LOOK_SECONDS)
                allowed = self._move.max_pause_ms
                if allowed is None:
                    return
                expected = await self._expected_pause(keeper, move)
                if expected <= allowed:
                    return
                if not said:
                    said = True
                    self._say("move-waits", expected_ms=expected, max_pause_ms=allowed)
                await asyncio.sleep(SAY_SECONDS)

    async def _expected_pause(self, keeper: Keeper, move: Move) -> float:
        """Milliseconds: what is left to be copied at the rate of the last second, and what a pause takes anyway."""
        first = await keeper.observe()
        await asyncio.sleep(SAY_SECONDS)
        now = await keeper.observe()
        ids = [mirror.job for mirror in mirrors_of(move, self._jobs(move))]
        pairs = [(first.jobs[name], now.jobs[name]) for name in ids if name in first.jobs and name in now.jobs]
        left = sum(job.total - job.current for _before, job in pairs)
        rate = sum(job.current - before.current for before, job in pairs) / SAY_SECONDS
        return PAUSE_MS + (1000 * left / rate if left and rate else 0.0)

    async def _go_over(self, keeper: Keeper, seen: Observation, move: Move) -> None:
        jobs = self._jobs(move)
        # Lost since they were ready: nobody goes over without them.
        self._require_none_lost(move, waiting(move, jobs))
        mirrors = mirrors_of(move, jobs)
        bases: dict[str, tuple[ImageFact, ...]] = {
            mirror.target: await self._desk.images.chain(mirror.backing, mirror.backing_format)
            for mirror in mirrors
            if mirror.backing is not None and mirror.backing_format is not None
        }
        number, names = self._desk.names()
        move = self._move
        pivot = plan_window(move.domain, seen, mirrors, names=names, ends_on="destination", what="pivot", bases=bases)
        snapshots = self._desk.journal.snapshots(move.domain)
        plan = going_over(move, pivot, mirrors, names=names, operation=number, snapshots=snapshots)
        done = await keeper.run(number, plan)
        say_gone_over(self._desk, self._move, done)

    async def set_speed(self) -> None:
        """Limit what works already as the move says now."""
        move = self._move
        self._throttle.rate = move.bandwidth
        speeds = await self._speeds(move)
        for mirror in mirrors_of(move, self._jobs(move)):
            await self._desk.keeper(move.domain).set_speed(mirror, speeds[mirror.target])

    async def _speeds(self, move: Move, starting: tuple[MovedDisk, ...] = ()) -> dict[str, int]:
        """How fast each disk's mirror may go, with those that are about to be started."""
        files = {disk.target: disk.file for disk in move.disks}
        writing = [*writers(self._desk), *(disk.file for disk in starting)]
        return await self._storages.shares(files, move.bandwidth, writing)

    # --- afterwards -------------------------------------------------------------------------------------------

    async def _verify(self, move: Move) -> None:
        """Compare what the guest was on with what it is on, but for what it has written since; it runs meanwhile."""
        if move.pivot is None or move.verify == "none":
            raise AssertionError(move)
        keeper = self._desk.keeper(move.domain)
        names = Names(self._desk.journal.tag, move.pivot)
        seen = await keeper.observe()
        disks = tuple([await self._compared(move, disk, seen, names) for disk in move.disks])
        if any(disk.bitmap not in seen.graph.nodes[disk.node].bitmaps for disk in disks):
            # QEMU was started anew since: what the guest has written nobody knows any more, and never will.
            reason = "its guest was started anew before everything was compared, so that it can't be compared any more"
            forgo_comparison(self._desk, msgspec.structs.replace(self._move, reason=reason), reason)
            return
        session = await keeper.connect()
        await forget(session, disks, names)
        began = time.monotonic()
        try:
            verdict = await compare(
                session,
                disks,
                move.verify,
                images=self._desk.images,
                names=names,
                report=lambda done, total: self._say_far(move, began, done, done, total, phase="verify"),
                throttles=(self._throttle,),
            )
        except CompareFailed as failure:
            raise CopyFailed(f"source and destination could not be compared: {failure}") from failure
        verified = msgspec.structs.replace(self._move, verdict=verdict, reason=None)
        said = {"how": verdict.how, "compared": verdict.compared, "different": verdict.different}
        self._desk.keep_move(verified, "move-verified", **said)

    async def _compared(self, move: Move, moved: MovedDisk, seen: Observation, names: Names) -> Compared:
        disk = find_disk(move.domain, seen, moved.target)
        image_format = "qcow2" if moved.overlay is not None else moved.format
        return Compared(
            target=moved.target,
            node=disk.active.node,
            bitmap=names.of(moved.target, COUNTED),
            source=await source_of(self._desk.images, moved.stands_on, image_format),
            size=disk.active.virtual_size,
        )

    async def _end(self, move: Move) -> None:
        """Record the end, and remove the sources that nobody has a use for, if that was asked for."""
        different = move.verdict.different if move.verdict is not None else 0
        removed: tuple[str, ...] = ()
        if move.delete_source and not different:
            async with self._desk.holding(move.domain) as keeper:
                drop = await self._unused_sources(keeper, move)
                number, _names = self._desk.names()
                await keeper.run(number, plan_end(self._move, drop=drop))
            left = await existing(drop)
            removed = tuple(path for path in drop if path not in left)
        ended = msgspec.structs.replace(self._move, state="done", reason=None)
        self._desk.keep_move(ended, "move-done", pause_ms=move.pause_ms, removed=removed, different=different)

    async def _unused_sources(self, keeper: Keeper, move: Move) -> tuple[str, ...]:
        """The old images that nothing stands on, mentions or mirrors any more."""
        seen = await self._desk.seen_or_none(keeper)
        known = await mentioned(self._desk, keeper, seen, {}, but=move.operation)
        old = await aliases(path for path in sources_of(move) if path.startswith("/"))
        return tuple(path for path, names in old.items() if not known & set(names))

    # --- giving it up -----------------------------------------------------------------------------------------

    async def give_up(self, reason: str) -> None:
        """End the mirrors and remove the copies; what was written to overlays is written down into the sources by `run`.

        Raises:
            Refused: QEMU can't be asked, and is not known to be gone.
        """
        async with self._alone() as (keeper, _seen):
            move = self._move
            if move.state != "working":  # somebody else has, meanwhile
                return
            claims = self._desk.journal.claims(move.domain, move.operation)
            made = {path: (device, inode) for path, _number, device, inode in claims}
            mine = {path: made[path] for path in destinations_of(move) if path in made}
            number, _names = self._desk.names()
            await keeper.run(number, plan_give_up(move, mirrors_of(move, self._jobs(move)), mine, reason))

    async def _back(self, move: Move) -> None:
        """Write the overlays down, as far as there is a QEMU to do it."""
        async with self._alone() as (keeper, seen):
            number, names = self._desk.names()
            back = plan_back(move, seen, names=names, operation=number) if seen is not None else None
            if back is None:
                await keeper.run(number, plan_given_up(move, reason=_overlays_stay(move) if seen is None else None))
                self._say("move-cancelled", reason=self._move.reason)
                return
            await keeper.run(number, back)
        await keeper.wait_over(number)

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[tuple[Keeper, Observation | None]]:
        """The domain to oneself, and how it is; None for a guest that somebody else started, and that is gone."""
        domain = self._move.domain
        keeper = self._desk.keeper(domain)
        if not keeper.record.defined and await keeper.is_gone():
            async with self._desk.holding(domain) as keeper:
                yield keeper, None
        else:
            async with self._desk.writing(domain, move=self._operation) as (keeper, seen):
                yield keeper, seen


def _overlays_stay(move: Move) -> str | None:
    """What is left of a move that was given up when there was no QEMU any more that could write its overlays down."""
    overlays = [f"{disk.overlay} on {disk.source}" for disk in move.disks if disk.overlay is not None]
    return f"its guest is gone, and stays on the overlays that were laid: {', '.join(overlays)}" if overlays else None


def say_gone_over(desk: Desk, move: Move, done: OperationRecord) -> None:
    """Keep how long the guest stood still when it went over, and say so.

    Args:
        desk: what the rooms share.
        move: as recorded.
        done: the operation in which it went over.
    """
    desk.keep_move(msgspec.structs.replace(move, pause_ms=done.pause_ms), "move-pivoted", pause_ms=done.pause_ms)


def forgo_comparison(desk: Desk, move: Move, reason: str) -> None:
    """Keep that a move ends without source and destination being compared, so that the sources stay, and say why.

    Args:
        desk: what the rooms share.
        move: as it is to be recorded otherwise.
        reason: why.
    """
    unverified = msgspec.structs.replace(move, verify="none", delete_source=False)
    desk.keep_move(unverified, "move-unverified", reason=reason)


def writers(desk: Desk) -> list[str]:
    """The destinations that mirrors of moves write to now, of all domains."""
    return [
        job.file
        for name in desk.keepers
        for job in desk.journal.mirrors(name)
        if job.move is not None and job.state == "active"
    ]


def destinations_of(move: Move) -> tuple[str, ...]:
    """The images that a move makes."""
    return tuple(dict.fromkeys([*(layer.file for layer in move.layers), *(disk.file for disk in move.disks)]))


def sources_of(move: Move) -> Iterator[str]:
    """The images that a move leaves, those on top first."""
    for disk in move.disks:
        if disk.overlay is not None:
            yield disk.overlay
        yield from disk.chain
