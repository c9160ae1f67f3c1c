"""Moves of a guest's storage: begin, show, go on, give up."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Mapping

import msgspec

from blockferry import answers, errors
from blockferry.journal.records import OperationRecord
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.blockjob import Mirror
from blockferry.model.files import ImageFact
from blockferry.model.move import Move
from blockferry.plan.destinations import Files, is_uri
from blockferry.plan.placement import PAUSE_MS, Placed, may_share, place, plan_move
from blockferry.plan.plan import Plan
from blockferry.qemu.bounded import apart
from blockferry.qemu.compare import source_of
from blockferry.qemu.copier import data_bytes
from blockferry.qemu.nbd import inspect
from blockferry.qemu.paths import directories, existing, real_paths
from blockferry.qemu.sharing import can_share
from blockferry.service.desk import Desk, plan_view, require_bandwidth, require_path
from blockferry.service.jobs import Jobs
from blockferry.service.mover import Mover, forgo_comparison, say_gone_over, sources_of, writers
from blockferry.service.storages import Storages
from blockferry.service.usage import look_up

# A copy of less tells nothing about how long one of more takes.
TELLING_BYTES = 16 << 20
# As long as that a copy takes at least, whatever a clock says.
TELLING_SECONDS = 0.001
# A year: far beyond any move, and within what clocks and timers take.
DEADLINE_MAX_SECONDS = 365 * 86400


class Moves:
    """The room of moves, with those that are under way.

    Args:
        desk: what the rooms share.
        jobs: the room of copies, which can be gone on with and given up by their operation's number too.
    """

    def __init__(self, desk: Desk, jobs: Jobs) -> None:
        self._desk = desk
        self._jobs = jobs
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._movers: dict[int, Mover] = {}
        self._storages = Storages(desk.journal)

    def at_work(self) -> bool:
        """Whether a move is under way."""
        return bool(self._tasks)

    def drives(self, operation: int) -> bool:
        """Whether a move is being gone on with, by itself."""
        return operation in self._movers and not self._movers[operation].stands

    async def close(self) -> None:
        """Let go; what is recorded can be gone on with."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def move(self, request: ask.MoveStorage) -> view.View:
        """Begin a move; it goes on by itself."""
        require_bandwidth(request.bandwidth)
        require_path(request.dest)
        for file in request.disks.values():
            if file is not None and not is_uri(file):
                require_path(os.path.join(request.dest, file))
        if request.delete_source and request.verify == "sample":
            raise errors.BadRequest(
                reason="sources are removed after everything was compared (verify full), or with verify none said out loud"
            )
        if request.deadline is not None and not 0 < request.deadline <= DEADLINE_MAX_SECONDS:
            raise errors.BadRequest(reason=f"a deadline is more than 0 and at most {DEADLINE_MAX_SECONDS} seconds")
        async with self._desk.writing(request.domain) as (keeper, seen):
            operation, names = self._desk.names(dry_run=request.dry_run)
            sources = {image.file for disk in seen.disks for image in disk.chain if image.file.startswith("/")}
            facts = await self._desk.images.facts(tuple(sources))
            placed, left_out = place(request.domain, seen, request, operation, facts)
            paths = tuple(path for each in placed for path in each.paths)
            files = await look_up(self._desk, keeper, seen, paths, {})
            files = msgspec.structs.replace(
                files,
                exports={uri: await inspect(uri) for uri in _uris(placed)},
                images=await self._sources(placed) if request.verify != "none" else {},
            )
            goes_to = {each.disk.target: each.file for each in placed}
            writing = [*writers(self._desk), *goes_to.values()]
            data, shared, speeds, at_work = await asyncio.gather(
                _data(placed, files),
                _shared(request, placed, files),
                self._storages.shares(goes_to, request.bandwidth, writing),
                keeper.observe_work(seen),
            )
            plan = plan_move(
                request.domain,
                at_work,
                request,
                placed,
                names=names,
                operation=operation,
                files=files,
                left_out=left_out,
                data=data,
                speeds=speeds,
                now=time.time(),
                shared=shared,
                snapshots=self._desk.journal.snapshots(request.domain),
            )
            if request.dry_run:
                return self._planned(request, plan, placed, files, data)
            done = await keeper.run(operation, plan)
            move = self._get(operation)
            if move.pivoted:
                say_gone_over(self._desk, move, done)
        self._go_on(operation, mirrored=[job.target for job in plan.record.jobs])
        return await self._view(self._get(operation), left_out=left_out)

    async def _sources(self, placed: tuple[Placed, ...]) -> dict[str, tuple[ImageFact, ...]]:
        """By the active images, what they can be read from once the guest has left them."""
        actives = [each.disk.active for each in placed]
        # Each waits for a thread of its own, as in `look_up`.
        found = await asyncio.gather(*(source_of(self._desk.images, each.file, each.format) for each in actives))
        return {each.file: chain for each, chain in zip(actives, found, strict=True)}

    def _planned(
        self,
        request: ask.MoveStorage,
        plan: Plan,
        placed: tuple[Placed, ...],
        files: Files,
        data: Mapping[str, int],
    ) -> view.PlanView:
        """What a move would make, how long it is to take, and the pause to expect."""
        move = plan.record.move
        if move is None:
            raise AssertionError(plan)
        planned = answers.planned_files(move, placed, files, data)
        rates = [rate for rate in (request.bandwidth, self._rate_seen()) if rate]
        seconds = sum(each.bytes for each in planned) / min(rates) if rates else None
        shown = plan_view(request.domain, plan)
        notes = shown.notes
        if request.deadline is not None and seconds is not None and seconds > request.deadline:
            notes += (
                f"it would be given up: the copying alone takes longer than the deadline, {request.deadline:g} s",
            )
        return msgspec.structs.replace(
            shown,
            notes=notes,
            files=planned,
            room=answers.room_by_place(planned, files),
            seconds=seconds,
            pause_ms=PAUSE_MS,
        )

    def _rate_seen(self) -> float | None:
        """Bytes per second of the newest copy that was long enough to tell, and not limited."""
        for event in self._desk.journal.newest_first("move-copied"):
            data = event.data
            move = self._desk.journal.move(data["operation"])
            if move is not None and not move.bandwidth and data["bytes"] >= TELLING_BYTES:
                return float(data["bytes"] / max(data["seconds"], TELLING_SECONDS))
        return None

    async def show(self, request: ask.ShowMove) -> view.MoveView:
        """A move as it is now."""
        return await self._view(self._get(request.operation))

    async def set_speed(self, request: ask.SetMoveSpeed) -> view.Done:
        """Limit a move, also one that stands still."""
        require_bandwidth(request.bandwidth)
        move = self._get(request.operation)
        if move.over:
            raise errors.MoveNotPossible(domain=move.domain, operation=move.operation, reason="is over")
        self._desk.journal.put_move(msgspec.structs.replace(move, bandwidth=request.bandwidth))
        mover = self._movers.get(move.operation)
        if mover is not None:
            await mover.set_speed()
        limit = f"limited to {request.bandwidth} bytes/s" if request.bandwidth else "not limited any more"
        return view.Done(text=f"move {move.operation} is {limit}", operation=move.operation)

    async def set_storage_speed(self, request: ask.SetStorageSpeed) -> view.Done:
        """Limit a storage for all moves, those under way too."""
        require_bandwidth(request.bandwidth)
        require_path(request.folder)
        real = (await real_paths([request.folder]))[request.folder]
        if not await directories([real]):
            raise errors.BadRequest(reason=f"{request.folder} is no directory")
        await self._storages.set_limit(real, request.bandwidth)
        for mover in list(self._movers.values()):
            await mover.set_speed()
        limit = f"limited to {request.bandwidth} bytes/s" if request.bandwidth else "not limited any more"
        return view.Done(text=f"what moves write to the file system of {request.folder} is {limit}")

    async def list_storages(self, _request: ask.ListStorages) -> view.StorageList:
        """The storages that have a limit."""
        busy = [mover.copying_to for mover in self._movers.values() if mover.copying_to is not None]
        busy_on = await self._storages.writers([*writers(self._desk), *busy])
        return view.StorageList(
            storages=tuple(
                view.StorageRow(folder=folder, bandwidth=bandwidth, writers=busy_on.get(folder, 0))
                for folder, bandwidth in self._desk.journal.storages().items()
            )
        )

    async def resume(self, request: ask.ResumeOperation) -> view.View:
        """Go on with a move that stands still, or a copy that was cancelled or lost."""
        record = self._operation(request.operation)
        move = self._desk.journal.move(record.id)
        if move is None:
            if request.verify is not None:
                raise errors.BadRequest(reason=f"operation {record.id} is a copy, and nothing is compared with that")
            copy = self._copies(record, "cancelled", "lost")[0]
            return await self._jobs.copy(
                ask.StartCopy(domain=record.domain, disk=copy.target, dest=copy.file, resume=True)
            )
        if request.verify is not None and not move.over:
            await self._halt(move.operation)
            move = self._get(move.operation)
        if move.over:
            raise errors.MoveNotPossible(domain=move.domain, operation=move.operation, reason="is over")
        notes: tuple[str, ...] = ()
        if move.deadline is not None and move.deadline <= time.time() and not move.pivoted:
            move = msgspec.structs.replace(move, deadline=None)
            notes = ("its deadline has passed, and holds no more: it goes on until it is done or given up",)
        move = msgspec.structs.replace(move, reason=None)
        if request.verify is not None and move.verify != "none" and move.verdict is None:
            forgo_comparison(self._desk, move, "as asked")
            notes += ("source and destination are not compared, and the source stays where it is",)
        else:
            self._desk.journal.put_move(move)
        # Refused now, rather than by a task that nobody asks: its QEMU has to be there for all but the copying.
        async with self._desk.writing(move.domain, move=move.operation):
            pass
        self._go_on(move.operation)
        return await self._view(self._get(move.operation), notes=notes)

    async def cancel(self, request: ask.CancelOperation) -> view.View:
        """Give up a move, or a copy."""
        record = self._operation(request.operation)
        move = self._desk.journal.move(record.id)
        if move is None:
            copies = self._copies(record, "active")
            return await self._jobs.cancel(
                ask.CancelJobs(domain=record.domain, disks=tuple(copy.target for copy in copies))
            )
        if move.over or move.pivoted:
            reason = "is over" if move.over else "can't be given up: the guest is on the destinations"
            raise errors.MoveNotPossible(domain=move.domain, operation=move.operation, reason=reason)
        if move.state == "working":
            await self._give_up(move.operation)
        # It goes on also when whoever asked for it goes away.
        await asyncio.shield(self._go_on(move.operation))
        move = self._get(move.operation)
        if not move.over:
            raise errors.MoveStands(
                domain=move.domain, operation=move.operation, phase="back", reason=move.reason or "no reason is known"
            )
        return await self._view(move)

    def _copies(self, record: OperationRecord, *states: str) -> tuple[Mirror, ...]:
        found = tuple(
            job.copy
            for job in self._desk.journal.jobs(record.domain)
            if job.operation == record.id and job.state in states and job.copy is not None
        )
        if not found:
            raise errors.NothingToResume(operation=record.id, what=record.plan.what, state=record.state)
        return found

    # --- those that are under way -----------------------------------------------------------------------------

    def _go_on(self, operation: int, *, mirrored: Iterable[str] = ()) -> asyncio.Future[None]:
        """Have a move gone on with, unless it is already; until that has ended."""
        if operation in self._tasks and self.drives(operation):
            return self._tasks[operation]
        if not self.drives(operation):
            self._movers[operation] = Mover(self._desk, operation, self._storages, mirrored)
        mover = self._movers[operation]
        task = self._tasks[operation] = asyncio.ensure_future(mover.run())
        task.add_done_callback(lambda done: self._forget(mover, operation, done))
        return task

    async def _give_up(self, operation: int) -> None:
        """Have a move given up; what was written to its overlays is still there."""
        # Who follows the move does not see it stand still meanwhile.
        mover = self._movers[operation] = Mover(self._desk, operation, self._storages)
        await self._halt(operation)
        move = self._get(operation)
        if move.pivoted:
            self._go_on(operation)
            raise errors.MoveNotPossible(
                domain=move.domain, operation=operation, reason="went over to the destinations meanwhile"
            )
        try:
            await mover.give_up("on request")
        except BaseException:
            if self._movers.get(operation) is mover and operation not in self._tasks:
                del self._movers[operation]
            raise

    def _forget(self, mover: Mover, operation: int, task: asyncio.Task[None]) -> None:
        if self._tasks.get(operation) is task:
            del self._tasks[operation]
        if self._movers.get(operation) is mover:
            del self._movers[operation]
        bug = None if task.cancelled() else task.exception()
        if bug is not None:
            # Whoever follows the move is told; the process goes on, and its log has the traceback.
            task.get_loop().call_exception_handler({"message": f"move {operation}", "exception": bug, "task": task})
            mover.stand(errors.InternalError(detail=repr(bug)).message)

    async def _halt(self, operation: int) -> None:
        task = self._tasks.get(operation)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _operation(self, number: int) -> OperationRecord:
        record = self._desk.journal.operation(number)
        if record is None:
            raise errors.NoSuchOperation(operation=number)
        return record

    def _get(self, operation: int) -> Move:
        record = self._operation(operation)
        move = self._desk.journal.move(operation)
        if move is None:
            raise errors.NothingToResume(operation=operation, what=record.plan.what, state=record.state)
        return move

    async def _view(
        self, move: Move, *, left_out: Mapping[str, str] | None = None, notes: tuple[str, ...] = ()
    ) -> view.MoveView:
        there = await existing(sources_of(move)) if move.pivoted else frozenset()
        left = tuple(path for path in dict.fromkeys(sources_of(move)) if path in there)
        return answers.move_view(
            move,
            phase=self._desk.phase_of(move),
            at_work=self.drives(move.operation),
            kept=self._desk.kept_of(move),
            left=left,
            left_out=dict(left_out or {}),
            notes=notes,
        )


def _uris(placed: tuple[Placed, ...]) -> tuple[str, ...]:
    return tuple(each.file for each in placed if is_uri(each.file))


async def _data(placed: tuple[Placed, ...], files: Files) -> dict[str, int]:
    """By source, the bytes that its copying moves: holes left out."""
    found: dict[str, int] = {}
    for each in placed:
        for image in each.disk.chain:
            if image.file in files.facts and files.facts[image.file].kind == "file":
                found[image.file] = await apart(data_bytes, image.file)
    return found


async def _shared(request: ask.MoveStorage, placed: tuple[Placed, ...], files: Files) -> frozenset[str]:
    """The sources, if all of these disks can be moved at once; none where one can't."""
    for each in placed:
        folder = os.path.dirname(each.file)
        if not may_share(request, each, files) or not await apart(can_share, each.disk.active.file, folder):
            return frozenset()
    return frozenset(each.disk.active.file for each in placed)
