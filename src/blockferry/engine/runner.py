"""Walking a plan: intent, command, observe, outcome. The order of durable writes and commands is decided here.

A failure is an interruption like any other: the recovery table says what it means (`plan.recover`), from the journal
and from what is there now, whether we have just seen it or have died in between.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from blockferry import errors
from blockferry.engine.doing import Failure, attempt, do, do_in_time
from blockferry.engine.executor import Executor
from blockferry.engine.link import Link
from blockferry.engine.news import item, news
from blockferry.engine.rescue import Rescue
from blockferry.journal.journal import Journal
from blockferry.journal.records import OperationRecord, StepRecord
from blockferry.model.blockjob import ChainJob
from blockferry.model.domain import Observation
from blockferry.model.view import Event
from blockferry.plan import files, steps, tracking
from blockferry.plan.chain import leave_window
from blockferry.plan.plan import Plan, Record, Window
from blockferry.plan.recover import Decision, Evidence, Interrupted, decide, may_be_frozen, takes_back
from blockferry.plan.snapshot import in_part
from blockferry.plan.waves import Wave, waves
from blockferry.plan.window import Way, as_it_is, leave, settle_as_it_is, stands_on
from blockferry.qemu.images import Images
from blockferry.qemu.session import CommandRefused, LostReply
from blockferry.qemu.tool import ImageError

# A QEMU that was killed closes its sockets a moment before its process has ended.
DYING_SECONDS = 2.0

THAW = steps.Thaw().text
STAYS_FROZEN = "they may still be frozen, and whatever writes in the guest then hangs; thawing is tried again and again"

# These are in progress until the last job that they began has ended, or the move.
LASTING = frozenset({"copy", "rebase", "commit", "delete", "move", "move-back"})

Publish = Callable[[tuple[Event, ...]], None]


class Runner:
    """Runs, undoes and settles the operations of one domain; its caller holds the domain's lock.

    Args:
        link: the domain's connection.
        journal: the state directory's.
        images: the host's image files.
        publish: hands recorded events on.
        window_seconds: how long a guest may stand still.
    """

    def __init__(
        self, link: Link, journal: Journal, images: Images, publish: Publish, *, window_seconds: float
    ) -> None:
        self._link = link
        self._journal = journal
        self._images = images
        self._publish = publish
        self.in_window = False
        self._window_seconds = window_seconds
        self._rescue: Rescue | None = None
        # Operations whose guest may stand with frozen file systems, and why its agent does not thaw them.
        self.frozen: dict[int, str] = {}

    async def run(self, operation: int, plan: Plan) -> OperationRecord:
        """Run a plan that was just made.

        Returns:
            The operation as it ended: `done` or `in-progress`.

        Raises:
            OperationFailed: it was undone.
            OperationUnsettled: it could be neither done nor undone now.
        """
        self._journal.begin(operation, self._link.name, plan, *_first_intents(plan))
        self.in_window = plan.window is not None
        with self._watching(plan.window):
            return await self._run(operation, plan)

    async def _run(self, operation: int, plan: Plan) -> OperationRecord:
        try:
            with self._link.stopwatch(plan.window.holding if plan.window is not None else ()) as milliseconds:
                outcomes = await self._forwards(operation, plan)
                if not plan.settle:
                    # The end is written with the record: one durable write.
                    end = {"lasting": plan.what in LASTING, "pause_ms": milliseconds()}
                    self._record(operation, plan.record, outcomes, **end)
                    return self._get(operation)
                said = self._written(operation, plan.record, outcomes)
                with contextlib.ExitStack() as afterwards:
                    if plan.window is not None and plan.window.held:
                        afterwards.callback(self._publish, said)  # the disks are not there yet
                    else:
                        self._publish(said)
                    settled = await self._settle(plan)
                pause = milliseconds()
            self._finish(operation, plan, settled, pause_ms=pause)
        except (Failure, errors.JournalUnwritable) as error:
            step, reason = (
                (error.step, error.reason) if isinstance(error, Failure) else ("write the journal", str(error))
            )
            await self._interrupted(operation, step, reason)
        finally:
            self.in_window = False
        return self._get(operation)

    @contextlib.contextmanager
    def _watching(self, window: Window | None) -> Iterator[Rescue]:
        """Who frees the guest when that window takes too long; one for an operation and for settling it after a failure."""
        if self._rescue is not None:
            yield self._rescue
            return
        self._rescue = Rescue(self._link.session, self._link.record.pid, window, self._window_seconds)
        try:
            yield self._rescue
        finally:
            self._rescue.end()
            self._rescue = None

    async def _interrupted(self, operation: int, step: str, reason: str) -> None:
        """Settle an operation of which a step failed; return only if it turns out to have been done all the same."""
        # A journal that can't be written must not keep us from leaving a window.
        with contextlib.suppress(errors.JournalUnwritable):
            self._journal.note(operation, error=f"{step}: {reason}")
        try:
            decision = await self.resolve(operation)
        except errors.JournalUnwritable as full:
            # Leaving a window comes before its writes: the guest runs. The rest waits for a journal that can be written.
            raise errors.OperationUnsettled(
                domain=self._link.name, operation=operation, step=step, reason=f"{reason}; {full.reason}"
            ) from full
        after = self._get(operation)
        if operation in self.frozen:
            step, reason = THAW, f"{self.frozen[operation]}; {STAYS_FROZEN}; before that, «{step}»: {reason}"
        elif after.error not in (None, f"{step}: {reason}"):
            reason = f"{reason}; and then {after.error}"  # what keeps it from being settled
        if after.state == "undone":
            raise errors.OperationFailed(domain=self._link.name, operation=operation, step=step, reason=reason)
        if after.state == "done" and decision.action == "record-part":
            switched = ", ".join(self._kept(after))
            raise errors.SnapshotInPart(
                domain=self._link.name, operation=operation, step=step, reason=reason, switched=switched
            )
        if after.state == "done" and decision.action in ("leave-window", "record-as-is"):
            raise errors.OperationAsItIs(domain=self._link.name, operation=operation, step=step, reason=reason)
        if after.state not in ("done", "in-progress"):
            raise errors.OperationUnsettled(domain=self._link.name, operation=operation, step=step, reason=reason)

    async def _forwards(self, operation: int, plan: Plan) -> tuple[StepRecord, ...]:
        """Do what leads to the record; the outcomes that are to be written with it."""
        outcomes: tuple[StepRecord, ...] = ()
        # A plan that only forgets needs no QEMU: the guest may be gone.
        if plan.prepare or plan.window is not None:
            executor = self._link.nobody() if plan.offline else await self._executor("begin")
            outcomes = await self._prepare(operation, plan, executor)
            if plan.window is not None:
                outcomes = await self._pass_window(operation, plan.window, executor, outcomes)
        return outcomes

    async def _prepare(self, operation: int, plan: Plan, executor: Executor) -> tuple[StepRecord, ...]:
        """The outcomes of a wave are written together with what follows, the next one's intents: one durable write a wave.

        The first one's are written with the plan.
        """
        claims: dict[str, dict[str, Any]] = {}
        last: list[StepRecord] = []
        for number, wave in enumerate(waves(plan.prepare)):
            intents = _intents(wave)
            if number:
                self._journal.step(operation, *last, *intents)
            if isinstance(wave[0][1], steps.Freeze):
                last, failures = await self._pass_freeze(wave, intents, executor)
                if failures:
                    self._journal.step(operation, *last)
                    raise failures[0]
                continue
            results = await asyncio.gather(*(attempt(executor, step, claims) for _index, step in wave))
            last, failures = [], []
            for (_index, step), intent, result in zip(wave, intents, results, strict=True):
                if not isinstance(result, Failure):
                    last.append(intent.end("done", result))
                    if isinstance(step, files.ClaimFile):
                        claims[step.path] = result
                    continue
                failures.append(result)
                # No reply is no failure: the step stays an intent, and whoever looks decides.
                if not result.unknown:
                    last.append(intent.end("failed", error=result.reason))
            if failures:
                self._journal.step(operation, *last)
                raise min(failures, key=lambda failure: failure.unknown)
            if isinstance(wave[-1][1], steps.Launch):
                executor = await self._executor("connect")
        return tuple(last)

    async def _pass_freeze(
        self, wave: Wave, intents: list[StepRecord], executor: Executor
    ) -> tuple[list[StepRecord], list[Failure]]:
        """Freeze, do what is to be done meanwhile, and thaw whatever happened, also when we are cancelled.

        One after the other, without a durable write in between: it would lengthen the freeze, and may wait for the guest.

        Returns:
            The outcomes, and the failures, the first one first. Of what was not begun there is no outcome.
        """
        outcomes: list[StepRecord] = []
        failures: list[Failure] = []
        try:
            for (_index, step), intent in zip(wave[:-1], intents[:-1], strict=True):
                result = await attempt(executor, step, {})
                if isinstance(result, Failure):
                    failures.append(result)
                    outcomes += [] if result.unknown else [intent.end("failed", error=result.reason)]
                    break
                outcomes.append(intent.end("done", result))
        finally:
            # Not what somebody else has frozen, when the freeze was refused.
            thaw = steps.Thaw() if failures else wave[-1][1]
            thawed = {} if outcomes and outcomes[0].state == "failed" else await attempt(executor, thaw, {})
        if isinstance(thawed, Failure):
            failures.append(thawed)
        elif failures:
            # It was ended early: nobody is to take what is there for the quiesced snapshot that was asked for.
            outcomes = [
                each.end("undone") if each.state == "done" and each.index == wave[0][0] else each for each in outcomes
            ]
        else:
            outcomes.append(intents[-1].end("done", thawed))
        return outcomes, failures

    async def _pass_window(
        self, operation: int, window: Window, executor: Executor, prepared: tuple[StepRecord, ...]
    ) -> tuple[StepRecord, ...]:
        """One intent for the whole window: a durable write between two of its commands would lengthen the pause."""
        self._journal.step(operation, *prepared, state="window")
        outcomes: list[StepRecord] = []
        with self._watching(window) as rescue:
            rescue.begin()
            executor.deadline = asyncio.get_running_loop().time() + self._window_seconds
            for index, step in enumerate(window.steps):
                intent = StepRecord.begin(index, "window", step.text)
                try:
                    await do_in_time(executor, step, rescue)
                except Failure as failure:
                    outcomes.append(intent.end("failed", error=failure.reason))
                    self._journal.step(operation, *outcomes)
                    raise
                outcomes.append(intent.end("done"))
            rescue.end()
        return tuple(outcomes)

    def _record(self, operation: int, record: Record, outcomes: tuple[StepRecord, ...] = (), **end: Any) -> None:
        self._publish(self._written(operation, record, outcomes, **end))

    def _written(
        self, operation: int, record: Record, outcomes: tuple[StepRecord, ...] = (), **end: Any
    ) -> tuple[Event, ...]:
        """Write the point of no return; what is to be said of it."""
        events = news(self._link.name, operation, record, self._journal.jobs(self._link.name))
        return self._journal.record(operation, self._link.name, record, steps=outcomes, events=events, **end)

    async def _settle(self, plan: Plan) -> tuple[StepRecord, ...]:
        if not plan.settle:
            return ()
        executor = self._link.nobody() if plan.offline and not plan.prepare else await self._executor("settle")
        outcomes = []
        for wave in waves(plan.settle):
            results = await asyncio.gather(*(attempt(executor, step, {}) for _index, step in wave))
            for (index, step), outcome in zip(wave, results, strict=True):
                if isinstance(outcome, Failure):
                    raise outcome
                self.remember_left(step, outcome)
                outcomes.append(StepRecord.begin(index, "settle", step.text).end("done", outcome))
        return tuple(outcomes)

    def remember_left(self, step: steps.Step, outcome: Mapping[str, Any]) -> None:
        """Keep what the destination of a copy looked like when it was closed: only one untouched since can be resumed."""
        if not isinstance(step, tracking.LeaveDestination) or not outcome.get("left"):
            return
        for job in self._journal.jobs(self._link.name):
            if job.copy is not None and job.copy.file == step.file:
                copy = msgspec.structs.replace(job.copy, stamps=outcome["left"])
                left = msgspec.structs.replace(job, then=copy) if isinstance(job, ChainJob) else copy
                self._journal.lose_jobs(self._link.name, {}, (left,))

    def _finish(
        self,
        operation: int,
        plan: Plan,
        outcomes: tuple[StepRecord, ...],
        *,
        row: str | None = None,
        pause_ms: float | None = None,
    ) -> None:
        state = self._journal.end_of(operation, self._link.name, lasting=plan.what in LASTING)
        self._journal.finish(operation, state, outcomes, row=row, pause_ms=pause_ms)

    async def _executor(self, step: str) -> Executor:
        try:
            return await self._link.executor()
        except (errors.BlockferryError, LostReply) as error:
            raise Failure(step, str(error)) from error

    def _get(self, operation: int) -> OperationRecord:
        record = self._journal.operation(operation)
        if record is None:
            raise AssertionError(operation)
        return record

    # --- settling what was interrupted ------------------------------------------------------------------------

    async def resolve(self, operation: int, *, recovering: bool = False) -> Decision:
        """Look, decide by the table, and do what it says.

        Args:
            operation: one that is open.
            recovering: whether a process of ours died in between, so that the row is worth remembering.

        Returns:
            The row; when its steps failed, the operation stays open with the reason.
        """
        record = self._get(operation)
        with self._watching(record.plan.window) as rescue:
            if record.state == "window":
                rescue.begin()
            return await self._resolve(record, rescue, recovering=recovering)

    async def _resolve(self, record: OperationRecord, rescue: Rescue, *, recovering: bool) -> Decision:
        operation = record.id
        # Before anything is asked of QEMU, which may not answer: while it is frozen, whatever writes in the guest hangs.
        stays_frozen = await self._thaw(record)
        evidence, executor = await self._evidence(record, rescue)
        evidence = msgspec.structs.replace(evidence, frozen=stays_frozen is not None)
        decision = decide(self._interrupted_at(record), evidence)
        row = decision.row if recovering else None
        if decision.row == "T":
            self._say_frozen(operation, str(stays_frozen), row)
            return decision
        self.frozen.pop(operation, None)
        try:
            await self._act(record, decision, evidence, executor, row)
        except Failure as failure:
            self._journal.note(operation, error=f"{failure.step}: {failure.reason}", row=row)
        return decision

    def _interrupted_at(self, record: OperationRecord) -> Interrupted:
        begun = {index: step.state for index, step in self._begun(record.id).items()}
        return Interrupted(state=record.state, plan=record.plan, steps=begun)

    async def _thaw(self, record: OperationRecord) -> str | None:
        """Thaw what a freeze of this operation may still hold; why it may still hold, when that fails.

        An operation that needed this is undone: nobody knows whether the freeze held until its snapshots were taken.
        """
        if not may_be_frozen(self._interrupted_at(record)):
            return None
        try:
            await do(self._link.nobody(), steps.Thaw(), {})
        except Failure as failure:
            return failure.reason
        for index, step in self._begun(record.id).items():
            if isinstance(record.plan.prepare[index], steps.Freeze):
                self._journal.step(record.id, step.end("undone", step.outcome))
        return None

    def _say_frozen(self, operation: int, reason: str, row: str | None) -> None:
        """Say that a guest may stand with frozen file systems: once as an event, and in the operation."""
        said, self.frozen[operation] = operation in self.frozen, reason
        if not said:
            event = item(self._link.name, "domain-frozen", None, operation=operation, reason=reason)
            self._publish((self._journal.put_event(event),))
        self._journal.note(operation, error=f"{THAW}: {reason}; {STAYS_FROZEN}", row=row)

    def _begun(self, operation: int) -> dict[int, StepRecord]:
        return {step.index: step for step in self._journal.steps(operation) if step.stretch == "prepare"}

    async def _evidence(self, record: OperationRecord, rescue: Rescue) -> tuple[Evidence, Executor]:
        nobody = self._link.nobody()
        try:
            try:
                return await self._asked(record, rescue)
            except (errors.BlockferryError, LostReply):
                # A process of ours that died in the window may have left QEMU waiting for a server: nobody can ask it then.
                if record.state != "window":
                    raise
                await rescue.free()
                if not rescue.dead:
                    raise
                return await self._asked(record, rescue)
        except (errors.BlockferryError, LostReply, CommandRefused):
            if not await self._link.is_gone(DYING_SECONDS):
                return Evidence(seen=None), nobody
        written = frozenset(
            [path for path in record.plan.record.authoritative.values() if await self._was_written(record, path)]
        )
        return Evidence(seen=None, gone=True, written=written), nobody

    async def _asked(self, record: OperationRecord, rescue: Rescue) -> tuple[Evidence, Executor]:
        # The connection may have broken without our noticing: it is asked again on another.
        seen = await self._link.observe()
        executor = await self._link.executor()
        window = record.plan.window
        dead = dict(rescue.dead)
        if record.state == "window" and window is not None and not seen.running:
            on = {disk.target: disk.drive for disk in window.disks if stands_on(disk, seen) == disk.mirror.node}
            dead |= await executor.read_back({target: drive for target, drive in on.items() if target not in dead})
        return Evidence(seen=seen, dead=dead), executor

    async def _was_written(self, record: OperationRecord, path: str) -> bool:
        overlays = {step.path for step in record.plan.prepare if isinstance(step, files.ClaimFile)}
        try:
            return path in overlays and await self._images.holds_data(path)
        except ImageError:
            return False

    async def _act(
        self, record: OperationRecord, decision: Decision, evidence: Evidence, executor: Executor, row: str | None
    ) -> None:
        match decision.action:
            case "nothing":
                self._undone(record, row)
            case "undo":
                await self._undo(record, executor, gone=evidence.gone)
                self._undone(record, row)
            case "leave-window":
                if await self._leave_window(record, evidence, executor):
                    await self._undo(record, executor, gone=False)
                    self._undone(record, row)
            case "leave-chain":
                await self._leave_chain(record, executor)
                self._undone(record, row)
            case "record-part":
                seen = evidence.seen
                if seen is None:
                    raise AssertionError(record.id)
                await self._take_in_part(record, seen, executor, row)
            case "record-as-is":
                window, seen = record.plan.window, evidence.seen
                if window is None or seen is None:
                    raise AssertionError(record.id)
                await self._take_as_it_is(record, window, seen, decision.row)
            case "record" | "settle":
                if decision.action == "record":
                    await self._record_or_leave(record, evidence, executor)
                settled = () if evidence.gone else await self._settle(record.plan)
                self._finish(record.id, record.plan, settled, row=row)
            case "wait":
                pass

    async def _record_or_leave(self, record: OperationRecord, evidence: Evidence, executor: Executor) -> None:
        """Write the point of no return; where it can't be written the guest does not stand still until it can."""
        try:
            self._record(record.id, record.plan.record)
        except errors.JournalUnwritable:
            window = record.plan.window
            if window is not None and window.chain is not None and window.resume:
                await do(executor, steps.Resume(), {})  # it holds everything, and is found at its end again
            elif window is not None and evidence.seen is not None:
                await self._leave_window(record, evidence, executor)
            raise

    async def _undo(
        self, record: OperationRecord, executor: Executor, *, gone: bool, keep: frozenset[int] = frozenset()
    ) -> None:
        """Undo what was begun, but for the steps of `keep`, in reverse order; with QEMU gone only the files are left."""
        begun = self._begun(record.id)
        claims = {
            step.path: begun[index].outcome
            for index, step in enumerate(record.plan.prepare)
            if isinstance(step, files.ClaimFile) and index in begun and begun[index].outcome
        }
        refused = {index for index, step in begun.items() if step.state == "failed"}
        for index in sorted(begun, reverse=True):
            step = record.plan.prepare[index]
            # A claim that failed found a file of somebody else's.
            if (
                index in keep
                or begun[index].state == "undone"
                or (index in refused and isinstance(step, files.ClaimFile))
            ):
                continue
            for back in reversed(step.undo()):
                if takes_back(back, gone=gone):
                    self.remember_left(back, await do(executor, back, claims))
            was = begun[index]
            self._journal.step(record.id, was.end("undone", was.outcome, error=was.error))

    def _undone(self, record: OperationRecord, row: str | None) -> None:
        event = item(self._link.name, "operation-undone", None, operation=record.id, what=record.plan.what)
        # A commit that was begun may have written before it was cancelled.
        begun = [record.plan.prepare[index] for index, was in self._begun(record.id).items() if was.state != "failed"]
        changed = record.plan.record.changed if any(isinstance(step, steps.StartCommit) for step in begun) else ()
        self._publish(self._journal.finish(record.id, "undone", row=row, events=(event,), changed=changed))

    async def _leave_window(self, record: OperationRecord, evidence: Evidence, executor: Executor) -> bool:
        """Bring every disk back and let the guest run; whether that went.

        First with the mirrors kept, then without. If QEMU refuses that as well, the disks stay as they are, which is
        recorded before the guest runs: better a pivot that some disks have made than a guest that stands still.
        """
        window, seen = record.plan.window, evidence.seen
        if window is None or seen is None:
            raise AssertionError(record.id)
        dead = dict(evidence.dead)
        for _attempt in range(2):
            way = leave(window, seen, dead)
            try:
                for step in way.steps:
                    self.remember_left(step, await do(executor, step, {}))
            except Failure as failure:
                dead |= {disk.target: dead.get(disk.target, str(failure)) for disk in window.disks}
                seen = await self._look(executor)
            else:
                self._keep_jobs(record, way)
                return True
        await self._take_as_it_is(record, window, seen, "L")
        return False

    def _keep_jobs(self, record: OperationRecord, way: Way) -> None:
        """Write down how the mirrors are, the window being left; those that this very operation began end with it."""
        own = _began(record.plan)
        lost = {target: reason for target, reason in way.lost.items() if target not in own}
        kept = tuple(mirror for mirror in way.mirrors if mirror.target not in own)
        self._publish(self._journal.lose_jobs(self._link.name, lost, kept))

    async def _leave_chain(self, record: OperationRecord, executor: Executor) -> None:
        """Leave the window of a commit or rebase whose chain is the old one: nothing but the job is lost."""
        window = record.plan.window
        if window is None or window.chain is None:
            raise AssertionError(record.id)
        job = window.chain
        for step in leave_window(job, resume=window.resume):
            self.remember_left(step, await do(executor, step, {}))
        lost = {job.target: record.error or "its last instant was interrupted"}
        self._publish(self._journal.lose_jobs(self._link.name, lost))

    def _kept(self, record: OperationRecord) -> list[str]:
        """The disks whose switch was not undone, after `_take_in_part`."""
        begun = self._begun(record.id)
        return [
            pair.target
            for index, step in enumerate(record.plan.prepare)
            if isinstance(step, steps.TakeSnapshots) and index in begun and begun[index].state != "undone"
            for pair in step.pairs
        ]

    async def _take_in_part(
        self, record: OperationRecord, seen: Observation, executor: Executor, row: str | None
    ) -> None:
        """Record the disks that have switched one after the other, and undo what was prepared for the rest."""
        part = in_part(record.plan, seen)
        await self._undo(record, executor, gone=False, keep=part.keep)
        self._record(record.id, part.record)
        self._finish(record.id, record.plan, (), row=row)

    async def _take_as_it_is(self, record: OperationRecord, window: Window, seen: Observation, row: str | None) -> None:
        """Record where every disk is, then settle that."""
        found, own = as_it_is(window, seen), _began(record.plan)
        ended = {target: end for target, end in found.ended.items() if target not in own}
        self._record(record.id, msgspec.structs.replace(found, ended=ended))
        settle = settle_as_it_is(window, seen, record.plan.settle)
        outcomes = await self._settle(msgspec.structs.replace(record.plan, settle=settle))
        self._finish(record.id, record.plan, outcomes, row=row)

    async def _look(self, executor: Executor) -> Observation:
        try:
            return await executor.observe()
        except (LostReply, CommandRefused) as error:
            raise Failure("observe", str(error)) from error


def _began(plan: Plan) -> frozenset[str]:
    """The disks whose mirrors a plan with a window begins itself: they are never recorded."""
    return frozenset(step.target for step in plan.prepare if isinstance(step, steps.StartMirror))


def _intents(wave: Wave) -> list[StepRecord]:
    return [StepRecord.begin(index, "prepare", step.text) for index, step in wave]


def _first_intents(plan: Plan) -> list[StepRecord]:
    return [intent for wave in waves(plan.prepare)[:1] for intent in _intents(wave)]
