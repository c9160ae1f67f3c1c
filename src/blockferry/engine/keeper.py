"""One domain: its lock, its runner, and what becomes of its jobs and its guest while nobody asks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import msgspec

from blockferry import errors
from blockferry.engine.bus import Bus
from blockferry.engine.filling import Filling
from blockferry.engine.jobsteps import StepFailed
from blockferry.engine.link import Link
from blockferry.engine.progress import Sampler, state_of
from blockferry.engine.runner import DYING_SECONDS, Runner
from blockferry.engine.turns import Turns
from blockferry.journal.journal import Journal
from blockferry.journal.records import OperationRecord
from blockferry.model.blockjob import BlockJob, ChainJob, Mirror
from blockferry.model.domain import Observation
from blockferry.model.job import CAUGHT_UP
from blockferry.model.view import Event
from blockferry.plan.chain import has_ended, plan_end
from blockferry.plan.copy import close_job
from blockferry.plan.leftovers import unused_bitmaps, unused_jobs, unused_nodes
from blockferry.plan.lifecycle import plan_stop
from blockferry.plan.move import names_kept
from blockferry.plan.plan import Plan, is_ours
from blockferry.plan.recover import Decision
from blockferry.plan.resting import GONE, stamped_files, to_rest
from blockferry.plan.steps import Step
from blockferry.qemu.images import Images
from blockferry.qemu.launch import Home
from blockferry.qemu.process import ends, status_of
from blockferry.qemu.replies import shorten
from blockferry.qemu.session import CommandRefused, LostReply, Session, Witness
from blockferry.qemu.tool import ImageError

# So often somebody who waits for jobs looks whether the connection still stands.
LOOK_SECONDS = 1.0
# So often a guest whose agent did not thaw its file systems is asked again.
THAW_AGAIN_SECONDS = 3.0
# So long after a look at ended jobs that failed (QEMU refused a query, the connection broke) it is tried again.
AGAIN_SECONDS = (0.1, 1.0, 5.0, 20.0)
WATCHED = (
    "JOB_STATUS_CHANGE",
    "BLOCK_JOB_COMPLETED",
    "BLOCK_JOB_CANCELLED",
    "BLOCK_JOB_ERROR",
    "STOP",
    "RESUME",
    "SHUTDOWN",
)
# Why a copy that is asked for is no mirror yet.
WAITS_FOR = {
    "fill": "its lower layers are pulled into the destination",
    "resume": "what the destination lacks is copied",
}


class Keeper(Link):
    """Keeps one domain.

    Args:
        name: the domain's.
        journal: the state directory's.
        images: the host's image files.
        bus: where events go.
        witness: told of every QMP command.
        home: where its QEMU lives, when it is one that we start.
        window_seconds: how long its guest may stand still.
    """

    def __init__(
        self,
        name: str,
        journal: Journal,
        images: Images,
        bus: Bus,
        witness: Witness,
        *,
        home: Home,
        window_seconds: float,
    ) -> None:
        super().__init__(name, journal, images, witness, home=home)
        self.turns = Turns(name, journal)
        self._bus = bus
        self._tasks: set[asyncio.Task[None]] = set()
        self._sampler = Sampler(name)
        self._fills = Filling(self._filling, self._spawn)
        self._said_ready: set[str] = set()
        self._last_words: dict[str, str] = {}
        self._thawing = False
        self._check_waits = False
        self._looks_again = False
        self.runner = Runner(self, journal, images, bus.publish, window_seconds=window_seconds)

    def _connected(self, session: Session, started: int | None) -> None:
        self._spawn(self._watch(session))
        if self.record.defined and session.pid is not None:
            self._spawn(self._await_end(session.pid, started))
        self.sample()

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def sample(self) -> None:
        """See to it that progress is read and destinations are written out; to be called when a job may have begun."""
        if self._session is not None and self.active() and not self._sampler.running:
            self._spawn(self._sampler.run(self._session, self.active, self._bus))
        self._fills.look()

    def _filling(self) -> frozenset[str]:
        """The files of copies that lack something of their disks, and the exports that we may use beside QEMU."""
        copies = (job.copy for job in self.active() if job.job not in self._said_ready)
        return frozenset(
            copy.file for copy in copies if copy is not None and (copy.file.startswith("/") or copy.multi_conn)
        )

    async def close(self) -> None:
        """Let go; the guest and its jobs go on."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def reconcile(self) -> list[tuple[int, Decision]]:
        """Settle what was interrupted, by the table, and find out what happened while nobody looked.

        The caller holds the lock. A domain that can't be asked keeps its problem in `problem`.

        Returns:
            The operations that were open, with the rows that they fell into.
        """
        found = [
            (operation.id, await self.runner.resolve(operation.id, recovering=True))
            for operation in self._journal.open_operations(self.name)
        ]
        self._see_to_thawing()
        if self._journal.open_operations(self.name):
            return found
        with contextlib.suppress(errors.BlockferryError):
            if await self.is_gone():
                self._guest_gone("its process has ended")
            seen = await self.observe()
            await self.check_jobs(seen)
            await self._end_if_shut_down(seen)
        return found

    # --- the end of a guest that we start ---------------------------------------------------------------------

    async def end(self, reason: str) -> None:
        """End the QEMU of a domain that we start, whatever its guest does; the caller holds the lock."""
        seen = await self.observe()
        self._journal.put_domain(msgspec.structs.replace(self.record, ending=reason))
        files = {mirror.target: stamped_files(mirror, seen) for mirror in self.active() if isinstance(mirror, Mirror)}
        done = await self.run(self._journal.reserve_operation(), plan_stop(self.name, seen, self.active()))
        await self._stamp(done.id, files)
        self._guest_gone("QEMU was ended")

    async def _stamp(self, operation: int, files: dict[str, tuple[str, ...]]) -> None:
        """Remember what the files of mirrors look like that were closed equal, once QEMU has let go of them."""
        outcomes = [step.outcome.get("equal", ()) for step in self._journal.steps(operation)]
        equal = {target for targets in outcomes for target in targets}
        stamped = []
        for mirror in self._journal.mirrors(self.name):
            if mirror.state == "resting" and mirror.target in equal and files.get(mirror.target):
                try:
                    # With cache='unsafe' QEMU has closed them without: equal is what will be so after a power failure too.
                    await self._images.sync(files[mirror.target])
                except ImageError:
                    continue
                stamps = await self._images.stamps(files[mirror.target])
                if len(stamps) == len(set(files[mirror.target])):
                    stamped.append(msgspec.structs.replace(mirror, stamps=stamps))
        if stamped:
            self._journal.lose_jobs(self.name, {}, tuple(stamped))

    async def _end_if_shut_down(self, seen: Observation) -> None:
        """A guest that has shut down by itself leaves its QEMU standing (-no-shutdown), for us to end in good order."""
        if self.record.defined and seen.status == "shutdown":
            await self.end("the guest has shut down")

    async def wait_stopped(self, timeout: float) -> bool:
        """Wait until the domain is shut off; whether it is, after `timeout` seconds."""
        with self._bus.listen() as heard, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not self.record.gone and await heard.get() is not None:
                    pass
        return self.record.gone

    # --- jobs -------------------------------------------------------------------------------------------------

    def active(self) -> tuple[BlockJob, ...]:
        """The jobs that work, as far as the journal knows."""
        return tuple(job for job in self._journal.jobs(self.name) if job.state == "active")

    async def wait_ready(self, targets: tuple[str, ...], timeout: float) -> None:
        """Wait until the mirrors of these disks are ready; the domain's lock is not held meanwhile.

        Args:
            targets: disks with an active mirror.
            timeout: seconds.

        Raises:
            JobNotReady: one is not, in time.
            JobLost: one was lost.
        """
        session = await self.connect()
        pending = ""

        async def met() -> bool:
            nonlocal pending
            # What is recorded to work before we look has to be seen then; what begins in between has not.
            recorded = [job for job in self._journal.jobs(self.name) if job.target in targets]
            jobs = await self.jobs()
            for mirror in recorded:
                if isinstance(mirror, ChainJob) and mirror.state == "active":
                    pending = f"{mirror.target}: {WAITS_FOR[mirror.type]}"
                    return False
                job = jobs.get(mirror.job)
                if job is None or job.over or mirror.state != "active":
                    reason = mirror.reason or (job.error if job else None) or "its job has ended"
                    raise errors.JobLost(domain=self.name, disk=mirror.target, reason=reason)
                # Not on standby: that is a moment, after which there is an event, or somebody has paused the job.
                if job.status != "ready":
                    pending = f"{mirror.target}: {state_of(mirror, job)}, {job.current} of {job.total} bytes"
                    return False
            return True

        names = ("JOB_STATUS_CHANGE", "BLOCK_JOB_READY")
        try:
            await session.wait_until(met, names, what="wait", seconds=timeout)
        except LostReply as lost:
            if not session.alive:
                raise errors.GuestGone(domain=self.name, reason=lost.reason) from lost
            target, _, state = pending.partition(": ")
            raise errors.JobNotReady(domain=self.name, disk=target, seconds=timeout, state=state) from lost

    async def set_speed(self, job: BlockJob, bandwidth: int) -> None:
        """Limit a job to `bandwidth` bytes per second, 0 for no limit.

        Raises:
            SpeedRefused: QEMU refuses, in its words.
            GuestGone: QEMU went away.
        """

        async def limited() -> None:
            session = await self.connect()
            await session.execute("block-job-set-speed", device=job.job, speed=bandwidth)

        try:
            await self._twice(limited)
        except CommandRefused as refusal:
            raise errors.SpeedRefused(
                domain=self.name, disk=job.target, what=job.type, reason=refusal.words
            ) from refusal

    async def check_jobs(self, seen: Observation) -> bool:
        """Find jobs that have ended without us, say so once, close what is left of them, and do what follows an end.

        The caller holds the lock, and no operation is open: what an operation does to its jobs it records itself.

        Args:
            seen: the domain as observed under that lock.

        Returns:
            Whether the graph may be another now.
        """
        lost: dict[str, str] = {}
        ended: list[ChainJob] = []
        for job in self.active():
            now = seen.jobs.get(job.job)
            if isinstance(job, ChainJob) and has_ended(job, seen):
                ended.append(job)
            elif now is None:
                lost[job.target] = self._last_words.get(job.job) or (
                    "its job has vanished from QEMU: somebody else ended it, or QEMU was started anew"
                )
            elif isinstance(job, ChainJob):
                if now.error is not None:
                    lost[job.target] = now.error
                elif now.status in (*CAUGHT_UP, "pending", "concluded"):
                    ended.append(job)
            # Ended, it waits for whoever did that to finalize it, and QEMU holds the guest's requests to the disk until then.
            elif now.over or now.status == "pending":
                lost[job.target] = now.error or "somebody else ended its job"
            elif now.caught_up:
                self._say_ready(job)
        if lost:
            await self._lose(lost, seen)
        for job in ended:
            await self._follow(job)
        await self._clear(seen, self._journal.jobs(self.name))
        return bool(lost or ended)

    async def let_go(self) -> None:
        """Leave nothing of ours in a guest without jobs; the caller holds the lock."""
        with contextlib.suppress(errors.BlockferryError):
            await self._clear(await self.observe(), ())
        await self.close()

    async def _clear(self, seen: Observation, jobs: tuple[BlockJob, ...]) -> None:
        """End the jobs and close the nodes of ours that nothing uses, remove bitmaps that none of these is resumed with."""
        tag = self._journal.tag
        stale = unused_jobs(seen, tag, jobs)
        if stale:
            await self._try_all(stale)
            seen = await self.observe()  # what they used is free
        kept = names_kept(self._journal.moves_under_way(self.name), tag)
        await self._try_all((*unused_nodes(seen, tag, jobs, kept), *unused_bitmaps(seen, tag, jobs, kept)))

    async def _try_all(self, unused: tuple[Step, ...]) -> None:
        if not unused:
            return
        executor = await self.executor()
        for step in unused:
            # What is busy or can't be asked about is looked at again with the next request.
            with contextlib.suppress(CommandRefused, StepFailed, LostReply):
                self.runner.remember_left(step, await executor.do(step, {}))

    async def _lose(self, lost: dict[str, str], seen: Observation) -> None:
        gone = [job for job in self.active() if job.target in lost]
        self._bus.publish(self._journal.lose_jobs(self.name, lost))
        self._fills.look()
        images = {image.node for disk in seen.disks for image in disk.chain}
        for job in gone:
            # Somebody who ended the job by a pivot has put the guest onto the destination: don't close that.
            if isinstance(job, Mirror) and job.node in images:
                continue
            # What stays open is ours by name: the next look closes it (`_clear`).
            await self._try_all(close_job(job))

    async def _follow(self, job: ChainJob) -> None:
        """Do what follows a commit or stream that has ended; one whose end can't be carried out is lost."""
        problem = ""
        seen = await self.observe()
        # A failure may have come after the job had ended, its reply being lost: then the second plan only records that.
        for attempt in range(2):
            if attempt and not has_ended(job, seen):
                break
            try:
                end = plan_end(seen, job, self._journal.snapshots(self.name))
                await self.run(self._journal.reserve_operation(), end)
            except (errors.Refused, errors.OperationFailed) as failure:
                problem = failure.message
                seen = await self.observe()
            else:
                return
        if not any(each == job for each in self.active()):
            return
        if job.type not in ("fill", "resume") and has_ended(job, seen):
            # The graph is what counts; only a flush can have failed, of storage that is ill.
            kept = f"QEMU has done it, but not all of it is on disk, and so no image was removed: {problem}"
            plan = plan_end(seen, job, self._journal.snapshots(self.name), unflushed=kept)
            with contextlib.suppress(errors.Refused, errors.OperationFailed):
                await self.run(self._journal.reserve_operation(), plan)
                return
        await self._lose({job.target: problem}, seen)

    async def run(self, operation: int, plan: Plan) -> OperationRecord:
        """Run a plan that was just made; the caller holds the lock. See `Runner.run`."""
        self.turns.in_flight.add(operation)
        undone = False
        try:
            return await self._to_its_end(operation, plan)
        except errors.OperationFailed:
            undone = True
            raise
        finally:
            self.turns.in_flight.discard(operation)
            self.sample()
            self._see_to_thawing()
            # A job may have caught up before it was recorded, when its event said nothing to us yet. What was undone
            # recorded none: to look then, after the end of a job that can't be carried out, would be to try it for ever.
            with contextlib.suppress(errors.BlockferryError):
                if not undone and not self._journal.open_operations(self.name):
                    now = await self.jobs() if plan.record.jobs else {}
                    for job in plan.record.jobs:
                        if job.job in now and now[job.job].caught_up and isinstance(job, Mirror):
                            self._say_ready(job)
                        elif job.job not in now or not now[job.job].busy:
                            await self.check_jobs(await self.observe())
                            break

    async def _to_its_end(self, operation: int, plan: Plan) -> OperationRecord:
        """Run it; whoever is cancelled meanwhile (Ctrl-C, the end of the process) waits for the end of a window.

        The guest would stand still until somebody recovers. Of any other plan nothing of the kind depends on us.
        """
        work = asyncio.ensure_future(self.runner.run(operation, plan))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            if not self.runner.in_window:
                work.cancel()
            await asyncio.wait([work])
            if not work.cancelled():
                work.exception()  # recorded; who was cancelled has no use for it
            raise

    def _see_to_thawing(self) -> None:
        if self.runner.frozen and not self._thawing:
            self._thawing = True
            self._spawn(self._keep_thawing())

    async def _keep_thawing(self) -> None:
        """Try to thaw a guest until it is thawed: nobody may come and ask for it, and it stands."""
        try:
            while self.runner.frozen:
                await asyncio.sleep(THAW_AGAIN_SECONDS)
                with contextlib.suppress(errors.BlockferryError, LostReply):
                    async with self.turns.lock:
                        await self.reconcile()
        finally:
            self._thawing = False

    async def wait_over(self, operation: int) -> None:
        """Wait until the jobs of an operation have ended and what follows has been done; without the domain's lock.

        Raises:
            JobFailed: one was lost or cancelled.
            QmpUnreachable, QmpBusy, GuestGone: QEMU can't be asked any more; the jobs may go on.
        """
        with self._bus.listen() as heard:
            while any(job.operation == operation and job.state == "active" for job in self._journal.jobs(self.name)):
                try:
                    async with asyncio.timeout(LOOK_SECONDS):
                        if await heard.get() is None:
                            break
                except TimeoutError:
                    # Not that it has ended, but that nobody could have told us: the connection broke meanwhile.
                    if not self._connects():
                        await self._check()
        # What follows an end is recorded first and settled then, under the lock.
        async with self.turns.lock:
            pass
        for job in self._journal.jobs(self.name):
            if job.operation == operation and job.state in ("lost", "cancelled"):
                reason = job.reason or "no reason is known"
                if isinstance(job, ChainJob) and job.written:
                    reason += (
                        f" ({job.written} is written in part: until that is done it is of use only under this disk)"
                    )
                raise errors.JobFailed(domain=self.name, disk=job.target, what=job.type, reason=reason)

    def _guest_gone(self, reason: str) -> None:
        """The domain's QEMU has ended without our doing, its jobs with it: said once."""
        record = self.record
        if record.gone:
            return
        resting: tuple[Mirror, ...] = ()
        ended = self.active()
        if record.defined:
            words = (status_of(record.pid) if record.pid is not None else None, self.home.last_words())
            reason = record.ending or ": ".join([reason, *(each for each in words if each)])
            resting, ended = to_rest(ended)
        lost = {job.target: f"{GONE}: {reason}" for job in ended}
        if lost or resting:
            self._bus.publish(self._journal.lose_jobs(self.name, lost, resting))
            self._fills.look()
        kind = "domain-gone" if not record.defined else "domain-stopped" if record.ending else "domain-crashed"
        self._say(kind, None, reason=reason)
        record = msgspec.structs.replace(record, gone=True, ending=None)
        self._journal.put_domain(msgspec.structs.replace(record, pid=None, born=None) if record.defined else record)

    def _say(self, kind: str, disk: str | None, **data: Any) -> None:
        event = Event(seq=0, time=time.time(), type=kind, domain=self.name, disk=disk, data=data)
        self._bus.publish((self._journal.put_event(event),))

    def _say_ready(self, mirror: Mirror) -> None:
        """Say that a mirror has caught up, once: it goes to standby and back whenever the guest is drained."""
        if mirror.job in self._said_ready:
            return
        self._said_ready.add(mirror.job)
        self._fills.look()
        if not self._journal.was_said(self.name, "mirror-ready", mirror.job):
            self._say("mirror-ready", mirror.target, file=mirror.file, job=mirror.job)

    # --- what happens while nobody asks -----------------------------------------------------------------------

    async def _watch(self, session: Session) -> None:
        """Follow one connection's events to its end."""
        async for event in session.events(WATCHED):
            # What can't be recorded now is found by the next look at the jobs and the guest.
            with contextlib.suppress(errors.JournalUnwritable):
                await self._heard(event)
        if self._session is session:
            await self._lost_connection()

    async def _heard(self, event: dict[str, Any]) -> None:
        data = event.get("data", {})
        match event["event"]:
            # A window of ours says itself how long it was; and a durable write now would lengthen it.
            case "STOP" | "RESUME" if self.runner.in_window:
                pass
            case "STOP":
                self._say("domain-paused", None)
            case "RESUME":
                self._say("domain-resumed", None)
            case "SHUTDOWN":
                self._say("domain-shutdown", None, reason=shorten(data.get("reason", "")))
                if self.record.defined:
                    self._spawn(self._check_soon())
            # A stream is forgotten by QEMU with its end: this is all that is ever said of it.
            case "BLOCK_JOB_COMPLETED" if data.get("error") and is_ours(data["device"], self._journal.tag):
                self._last_words[data["device"]] = shorten(data["error"])
            case "BLOCK_JOB_CANCELLED" if is_ours(data["device"], self._journal.tag):
                self._last_words[data["device"]] = "somebody else cancelled its job"
            case "JOB_STATUS_CHANGE" if is_ours(str(data.get("id", "")), self._journal.tag):
                job = next((each for each in self.active() if each.job == data["id"]), None)
                if isinstance(job, Mirror) and data["status"] == "ready":
                    self._say_ready(job)
                ends = ("pending", "concluded", "null", "aborting", *(("ready",) if isinstance(job, ChainJob) else ()))
                # One that waits for the lock sees this as well: every commit that is ready says so again whenever the
                # guest is drained, and twenty at once said it a thousand times.
                if job is not None and data["status"] in ends and not self._check_waits:
                    self._check_waits = True
                    self._spawn(self._check_soon())

    async def _check_soon(self) -> None:
        """Look at the jobs, and again where that fails: no more events may come, and nobody else may ask soon.

        What can't be asked or settled by then is looked at by the next request.
        """
        for pause in AGAIN_SECONDS:
            if await self._checked() or self._looks_again or not self.active():
                return
            self._looks_again = True
            try:
                await asyncio.sleep(pause)
            finally:
                self._looks_again = False
        await self._checked()

    async def _checked(self) -> bool:
        try:
            await self._check()
        except (errors.BlockferryError, LostReply):
            return False
        return not self._journal.open_operations(self.name)

    async def _check(self) -> None:
        async with self.turns.lock:
            self._check_waits = False
            if self._journal.open_operations(self.name):
                await self.reconcile()
                # What can't be settled because nobody can be asked is said, as by whoever observes.
                if self.problem is not None and self._journal.open_operations(self.name):
                    raise self.problem
            else:
                seen = await self.observe()
                await self.check_jobs(seen)
                await self._end_if_shut_down(seen)

    async def _await_end(self, pid: int, started: int | None) -> None:
        """Follow the process of a guest that we started to its end, whatever becomes of the connection."""
        await ends(pid, started, None)
        async with self.turns.lock:
            if (self.record.pid, self.record.born) == (pid, started) and await self.is_gone():
                with contextlib.suppress(errors.BlockferryError):
                    await self.reconcile()

    async def _lost_connection(self) -> None:
        async with self.turns.lock:
            if self._connects():
                return
            self._session = None
            if await self.is_gone(DYING_SECONDS):
                self.problem = errors.GuestGone(domain=self.name, reason="its process has ended")
                with contextlib.suppress(errors.JournalUnwritable):
                    if not self._journal.open_operations(self.name):
                        self._guest_gone("its process has ended")
                return
        if self.active():
            # Jobs go on without us, and nobody else may ask for the domain soon.
            await self._check_soon()
