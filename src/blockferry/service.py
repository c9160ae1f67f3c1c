"""The one door: a request comes in, a view goes out. One writer per domain; recovery before anything is answered."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from blockferry import answers, errors
from blockferry.engine.bus import Bus
from blockferry.engine.keeper import Keeper
from blockferry.formats.names import path_flaw, valid_name
from blockferry.formats.snapshot import parse_snapshot
from blockferry.journal.journal import DomainRecord, Journal, OperationRecord
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.domain import Observation
from blockferry.model.files import FileFact, ImageFact
from blockferry.model.flags import BlockCopy, SnapshotCreate, SnapshotDelete, require_flags
from blockferry.model.snapshot import Mirror, Snapshot, SnapshotWish
from blockferry.plan import copy as copying
from blockferry.plan.disks import find_disk
from blockferry.plan.plan import Names, Plan, Record
from blockferry.plan.snapshot import choose, new_files, plan_snapshot
from blockferry.plan.window import plan_window
from blockferry.qemu.images import Images

Witness = Callable[[str, str], None]


def _nobody(_when: str, _what: str) -> None:
    pass


class Service:
    """What one state directory can do. Made by `open`; the caller holds the directory's lock.

    Args:
        journal: the state directory's.
        images: the host's image files.
        witness: told of every QMP command.
    """

    def __init__(self, journal: Journal, images: Images, witness: Witness) -> None:
        self._journal = journal
        self._images = images
        self._witness = witness
        self._bus = Bus()
        self._keepers: dict[str, Keeper] = {}
        self._in_flight: set[int] = set()
        self._next_operation = journal.next_operation()

    @classmethod
    async def open(cls, state_dir: Path, *, witness: Witness = _nobody) -> Service:
        """Open the journal, connect to the domains, and settle what was interrupted.

        Args:
            state_dir: an absolute path that exists and is ours.
            witness: told before and after every durable write and QMP command; for logs and tests.

        Raises:
            StateDirUnusable: the journal can't be opened.
        """
        service = cls(Journal(state_dir / "journal.sqlite", witness), Images(), witness)
        for record in service._journal.domains():
            service._keepers[record.name] = service._keeper(record.name)
        await service._recover(ask.Recover())
        return service

    def _keeper(self, name: str) -> Keeper:
        return Keeper(name, self._journal, self._images, self._bus, self._witness)

    async def close(self) -> None:
        """Let go of everything; guests and their jobs go on."""
        self._bus.close()
        await asyncio.gather(*(keeper.close() for keeper in self._keepers.values()))
        self._journal.close()

    def has_work(self) -> bool:
        """Whether there is something to watch: an operation, or a mirror that works."""
        return bool(self._in_flight) or any(keeper.active() for keeper in self._keepers.values())

    async def submit(self, request: ask.Request) -> view.View:
        """Do what is asked, and answer.

        Raises:
            BlockferryError: what happened, what state things are in, and what to do next.
        """
        doors: dict[type, Callable[[Any], Coroutine[Any, Any, view.View]]] = {
            ask.Attach: self._attach,
            ask.Detach: self._detach,
            ask.ListDomains: self._list,
            ask.ShowDomain: self._show,
            ask.CreateSnapshot: self._create_snapshot,
            ask.ListSnapshots: self._list_snapshots,
            ask.ShowSnapshot: self._show_snapshot,
            ask.DeleteSnapshot: self._delete_snapshot,
            ask.StartCopy: self._start_copy,
            ask.ListJobs: self._list_jobs,
            ask.PivotJobs: self._pivot,
            ask.FinishJobs: self._finish,
            ask.CancelJobs: self._cancel,
            ask.SetJobSpeed: self._set_speed,
            ask.ListEvents: self._list_events,
            ask.ListOperations: self._list_operations,
            ask.ShowOperation: self._show_operation,
            ask.Recover: self._recover,
        }
        return await doors[type(request)](request)

    async def watch(self, domain: str | None, since: int | None) -> AsyncIterator[view.Event]:
        """Events as they happen, progress among them; first the recorded ones after number `since`, if it is given."""
        with self._bus.listen() as queue:
            last = self._journal.last_event()
            if since is not None:
                for event in self._journal.events(domain, since):
                    yield event
            while (heard := await queue.get()) is not None:
                if (heard.seq == 0 or heard.seq > last) and domain in (None, heard.domain):
                    yield heard

    # --- domains ----------------------------------------------------------------------------------------------

    def _get(self, name: str) -> Keeper:
        keeper = self._keepers.get(name)
        if keeper is None:
            raise errors.NoSuchDomain(domain=name)
        return keeper

    async def _attach(self, request: ask.Attach) -> view.DomainView:
        if not valid_name(request.domain):
            raise errors.InvalidName(name=request.domain)
        flaw = path_flaw(request.qmp)
        if flaw:
            raise errors.QmpUnreachable(qmp=request.qmp, reason=f"it {flaw}")
        for record in self._journal.domains():
            if (record.name == request.domain) != (record.qmp == request.qmp):
                raise errors.DomainExists(domain=record.name, qmp=record.qmp)
        known = request.domain in self._keepers
        keeper = self._keepers.get(request.domain) or self._keeper(request.domain)
        if not known:
            self._journal.put_domain(DomainRecord(name=request.domain, qmp=request.qmp))
        async with keeper.lock:
            try:
                await keeper.connect(request.timeout)
                seen = await keeper.observe()
            except BaseException:
                if not known:
                    await keeper.close()
                    self._journal.forget_domain(request.domain)
                raise
            self._keepers[request.domain] = keeper
            await keeper.reconcile()
            if not known:
                self._say("domain-attached", request.domain, qmp=request.qmp)
        return self._domain_view(keeper, seen)

    def _say(self, kind: str, domain: str, **data: Any) -> None:
        event = view.Event(seq=0, time=time.time(), type=kind, domain=domain, data=data)
        self._bus.publish((self._journal.put_event(event),))

    async def _detach(self, request: ask.Detach) -> view.Done:
        keeper = self._get(request.domain)
        async with keeper.lock:
            await keeper.reconcile()
            working = [mirror.target for mirror in keeper.active()]
            if working:
                raise errors.DomainInUse(domain=request.domain, what=f"a mirror of {', '.join(working)} works")
            for operation in self._journal.open_operations(request.domain):
                raise errors.DomainInUse(domain=request.domain, what=f"operation {operation.id} is not settled")
            await keeper.close()
            self._journal.forget_domain(request.domain)
            del self._keepers[request.domain]
            self._say("domain-detached", request.domain)
        return view.Done(text=f"{request.domain} is detached; the guest runs on")

    async def _list(self, _request: ask.ListDomains) -> view.DomainList:
        views = await asyncio.gather(*(self._view(keeper) for keeper in self._keepers.values()))
        rows = tuple(
            view.DomainRow(
                name=each.name,
                state=each.state,
                qmp=each.qmp,
                pid=each.pid,
                disks=len(each.disks),
                mirrors=len(self._get(each.name).active()),
            )
            for each in sorted(views, key=lambda each: each.name)
        )
        return view.DomainList(domains=rows)

    async def _show(self, request: ask.ShowDomain) -> view.DomainView:
        return await self._view(self._get(request.domain))

    async def _view(self, keeper: Keeper) -> view.DomainView:
        try:
            return self._domain_view(keeper, await keeper.observe())
        except errors.BlockferryError as problem:
            state = "gone" if await keeper.is_gone() else "unreachable"
            mirrors = self._journal.mirrors(keeper.name)
            return answers.domain_view(keeper.record, None, mirrors, problem=(state, problem.message))

    def _domain_view(self, keeper: Keeper, seen: Observation) -> view.DomainView:
        current = answers.current_snapshot(self._journal.snapshots(keeper.name), seen)
        return answers.domain_view(keeper.record, seen, self._journal.mirrors(keeper.name), current=current)

    # --- operations -------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _writing(self, name: str) -> AsyncIterator[tuple[Keeper, Observation]]:
        """The domain to oneself, with everything of before settled, and how it is now."""
        keeper = self._get(name)
        async with keeper.lock:
            if self._journal.open_operations(name):
                await keeper.reconcile()
            for operation in self._journal.open_operations(name):
                raise errors.Unsettled(domain=name, operation=operation.id)
            seen = await keeper.observe()
            await keeper.check_mirrors(seen)
            yield keeper, seen

    async def _run(self, keeper: Keeper, operation: int, plan: Plan) -> OperationRecord:
        self._in_flight.add(operation)
        try:
            return await keeper.runner.run(operation, plan)
        finally:
            self._in_flight.discard(operation)
            keeper.sample()
            # A mirror may have caught up before it was recorded, when its event said nothing to us yet.
            with contextlib.suppress(errors.BlockferryError):
                if plan.record.mirrors and not self._journal.open_operations(keeper.name):
                    await keeper.check_mirrors(await keeper.observe())

    def _names(self, *, dry_run: bool = False) -> tuple[int, Names]:
        """The next operation's number and names; reserved at once, for another domain's request may come in between."""
        operation = self._next_operation
        if not dry_run:
            self._next_operation += 1
        return operation, Names(self._journal.tag, operation)

    # --- snapshots --------------------------------------------------------------------------------------------

    async def _create_snapshot(self, request: ask.CreateSnapshot) -> view.View:
        wish = self._wish(request)
        async with self._writing(request.domain) as (keeper, seen):
            snapshots = self._journal.snapshots(request.domain)
            name = wish.name or str(int(time.time()))
            if any(snapshot.name == name for snapshot in snapshots):
                raise errors.SnapshotExists(domain=request.domain, snapshot=name)
            choices, _left_out = choose(request.domain, seen, wish, name)
            operation, names = self._names(dry_run=request.dry_run)
            plan = plan_snapshot(
                request.domain,
                seen,
                wish,
                names=names,
                operation=operation,
                name=name,
                facts=await self._images.facts(new_files(choices)),
                now=time.time(),
                parent=answers.current_snapshot(snapshots, seen),
            )
            if request.dry_run:
                return _plan_view(request.domain, plan)
            await self._run(keeper, operation, plan)
            answer = await self._snapshot_view(keeper, name, operation)
            return msgspec.structs.replace(answer, left_out=plan.left_out)

    def _wish(self, request: ask.CreateSnapshot) -> SnapshotWish:
        # External snapshots of a running guest's disks, all at one instant, are the only ones that are taken.
        carried_out = SnapshotCreate.ATOMIC | SnapshotCreate.DISK_ONLY
        require_flags("snapshot_create_xml", SnapshotCreate(request.flags), carried_out)
        if (request.xml is None) == (request.wish is None):
            raise errors.BadRequest(reason="a snapshot is asked for by XML or by a wish, one of them")
        wish = request.wish if request.xml is None else parse_snapshot(request.xml)
        if wish is None:
            raise AssertionError(request)
        for field in ("name", "description"):
            said, inside = getattr(request, field), getattr(wish, field)
            if said is not None and inside not in (None, said):
                raise errors.BadRequest(reason=f"the XML's {field} is {inside!r}, and the request says {said!r}")
            wish = msgspec.structs.replace(wish, **{field: said if said is not None else inside})
        if wish.name is not None and not valid_name(wish.name):
            raise errors.InvalidName(name=wish.name)
        for disk in wish.disks:
            mirror = disk.mirror
            for path in (disk.file, mirror.file if mirror else None, mirror.backing if mirror else None):
                flaw = path_flaw(path) if path is not None else None
                if path is not None and flaw:
                    raise errors.DestinationUnusable(path=path[:200], reason=f"it {flaw}")
        return wish

    def _snapshot(self, domain: str, name: str) -> Snapshot:
        found = next((each for each in self._journal.snapshots(domain) if each.name == name), None)
        if found is None:
            raise errors.NoSuchSnapshot(domain=domain, snapshot=name)
        return found

    async def _snapshot_view(self, keeper: Keeper, name: str, operation: int | None = None) -> view.SnapshotView:
        snapshot = self._snapshot(keeper.name, name)
        seen = await self._seen_or_none(keeper)
        current = answers.current_snapshot(self._journal.snapshots(keeper.name), seen)
        mirrors = answers.mirror_views(self._journal.mirrors(keeper.name), seen)
        return answers.snapshot_view(snapshot, mirrors, current=current == name, operation=operation)

    async def _seen_or_none(self, keeper: Keeper) -> Observation | None:
        try:
            return await keeper.observe()
        except errors.BlockferryError:
            return None

    async def _list_snapshots(self, request: ask.ListSnapshots) -> view.SnapshotList:
        keeper = self._get(request.domain)
        snapshots = self._journal.snapshots(request.domain)
        seen = await self._seen_or_none(keeper)
        current = answers.current_snapshot(snapshots, seen)
        mirrors = answers.mirror_views(self._journal.mirrors(request.domain), seen)
        views = tuple(answers.snapshot_view(each, mirrors, current=each.name == current) for each in snapshots)
        return view.SnapshotList(domain=request.domain, snapshots=views)

    async def _show_snapshot(self, request: ask.ShowSnapshot) -> view.SnapshotView:
        return await self._snapshot_view(self._get(request.domain), request.snapshot)

    async def _delete_snapshot(self, request: ask.DeleteSnapshot) -> view.Done:
        flags = SnapshotDelete(request.flags)
        carried_out = SnapshotDelete.METADATA_ONLY | SnapshotDelete.REOPEN_MIRROR | SnapshotDelete.REMOVE_MIRROR
        require_flags("snapshot_delete", flags, carried_out)
        if len(list(flags)) > 1:
            raise errors.BadRequest(reason=f"{flags!r} contradict each other: say one")
        snapshot = self._snapshot(request.domain, request.snapshot)
        names = {"domain": request.domain, "snapshot": request.snapshot}
        mirrored = any(m.snapshot == snapshot.name for m in self._get(request.domain).active())
        if mirrored and flags in (SnapshotDelete(0), SnapshotDelete.METADATA_ONLY):
            raise errors.SnapshotHasMirrors(**names)
        if flags == SnapshotDelete.REOPEN_MIRROR:
            return await self._reopen(request, snapshot)
        if flags == SnapshotDelete.REMOVE_MIRROR:
            return await self._remove_mirrors(request, snapshot)
        if flags != SnapshotDelete.METADATA_ONLY:
            raise errors.DeleteNeedsChoice(**names)
        keeper = self._get(request.domain)
        async with keeper.lock:
            operation, _names = self._names()
            text = f"forget snapshot {snapshot.name}"
            plan = Plan(what="forget", text=text, record=Record(forget_snapshot=snapshot.name))
            done = await self._run(keeper, operation, plan)
        return view.Done(text=f"snapshot {snapshot.name} is forgotten; its images are as they were", operation=done.id)

    async def _reopen(self, request: ask.DeleteSnapshot, snapshot: Snapshot) -> view.Done:
        keeper = self._get(request.domain)
        await self._check_reopen(keeper, snapshot)
        targets = tuple(disk.target for disk in snapshot.disks if disk.mirror)
        await keeper.wait_ready(targets, request.timeout)
        async with self._writing(request.domain) as (keeper, seen):
            mirrors = await self._check_reopen(keeper, snapshot)
            done = await self._window(keeper, seen, mirrors, ends_on="destination", what="reopen", forget=snapshot.name)
        files = ", ".join(f"{mirror.target} now on {mirror.file}" for mirror in mirrors)
        text = f"{files}; snapshot {snapshot.name} is deleted"
        return view.Done(text=text, operation=done.id, pause_ms=done.pause_ms)

    async def _check_reopen(self, keeper: Keeper, snapshot: Snapshot) -> tuple[Mirror, ...]:
        """The snapshot's mirrors, if the guest can go over to them: it is current, and none of them is lost."""
        names = {"domain": keeper.name, "snapshot": snapshot.name}
        wanted = [disk for disk in snapshot.disks if disk.mirror]
        if not wanted:
            raise errors.NoMirror(**names, reason="none was asked for when it was taken")
        reason = answers.not_current(snapshot, await keeper.observe())
        if reason:
            raise errors.SnapshotNotCurrent(**names, reason=reason)
        mirrors = []
        for disk in wanted:
            mirror = next((m for m in self._journal.mirrors(keeper.name) if m.target == disk.target), None)
            if mirror is None or mirror.snapshot != snapshot.name or mirror.state != "active":
                why = f"that of {disk.target} is {mirror.state if mirror else 'gone'}"
                raise errors.NoMirror(**names, reason=why + (f": {mirror.reason}" if mirror and mirror.reason else ""))
            mirrors.append(mirror)
        return tuple(mirrors)

    async def _remove_mirrors(self, request: ask.DeleteSnapshot, snapshot: Snapshot) -> view.Done:
        async with self._writing(request.domain) as (keeper, _seen):
            mirrors = tuple(
                mirror
                for mirror in self._journal.mirrors(request.domain)
                if mirror.snapshot == snapshot.name and mirror.state in ("active", "lost")
            )
            if not mirrors:
                raise errors.NoMirror(domain=request.domain, snapshot=snapshot.name, reason="none is left")
            operation, _names = self._names()
            done = await self._run(keeper, operation, copying.plan_cancel(mirrors, "remove-mirror", "removed"))
        files = ", ".join(mirror.file for mirror in mirrors)
        text = f"the mirrors of snapshot {snapshot.name} are dropped; left behind, not kept up any more: {files}"
        return view.Done(text=text, operation=done.id)

    # --- copies -----------------------------------------------------------------------------------------------

    async def _start_copy(self, request: ask.StartCopy) -> view.View:
        if request.base is not None:
            raise errors.UnsupportedFlag(call="block_copy", flag="a base")
        if request.bandwidth < 0:
            raise errors.BadRequest(reason="a bandwidth is bytes per second, 0 for no limit")
        flaw = None if copying.is_uri(request.dest) else path_flaw(request.dest)
        if flaw:
            raise errors.DestinationUnusable(path=request.dest[:200], reason=f"it {flaw}")
        async with self._writing(request.domain) as (keeper, seen):
            operation, names = self._names(dry_run=request.dry_run)
            plan = copying.plan_copy(
                request.domain,
                seen,
                disk_name=request.disk,
                dest=request.dest,
                names=names,
                operation=operation,
                facts=await self._copy_facts(request, seen),
                wanted=request.format,
                bandwidth=request.bandwidth,
                flags=BlockCopy(request.flags),
            )
            if request.dry_run:
                return _plan_view(request.domain, plan)
            await self._run(keeper, operation, plan)
            (mirror,) = plan.record.mirrors
            return answers.job_view(self._mirror(keeper, mirror.target), await self._seen_or_none(keeper))

    async def _copy_facts(self, request: ask.StartCopy, seen: Observation) -> dict[str, FileFact]:
        disk = find_disk(request.domain, seen, request.disk)
        files = [image.file for image in disk.chain if image.file.startswith("/")]
        if not copying.is_uri(request.dest):
            files.append(request.dest)
        return await self._images.facts(tuple(files))

    def _mirror(self, keeper: Keeper, target: str) -> Mirror:
        found = next((each for each in self._journal.mirrors(keeper.name) if each.target == target), None)
        if found is None:
            raise errors.NoSuchJob(domain=keeper.name, disk=target)
        return found

    def _mirrors(self, keeper: Keeper, seen: Observation, disks: tuple[str, ...]) -> tuple[Mirror, ...]:
        """The working mirrors of these disks, each once."""
        targets = dict.fromkeys(find_disk(keeper.name, seen, disk).target for disk in disks)
        if not targets:
            raise errors.BadRequest(reason="name at least one disk")
        found = tuple(self._mirror(keeper, target) for target in targets)
        for mirror in found:
            if mirror.state == "lost":
                raise errors.JobLost(
                    domain=keeper.name, disk=mirror.target, reason=mirror.reason or "no reason is known"
                )
            if mirror.state != "active":
                raise errors.NoSuchJob(domain=keeper.name, disk=mirror.target)
        return found

    async def _list_jobs(self, request: ask.ListJobs) -> view.JobList:
        keeper = self._get(request.domain)
        seen = await self._seen_or_none(keeper)
        jobs = tuple(answers.job_view(mirror, seen) for mirror in self._journal.mirrors(request.domain))
        return view.JobList(domain=request.domain, jobs=jobs)

    async def _pivot(self, request: ask.PivotJobs) -> view.Done:
        done, mirrors = await self._end(request, what="pivot")
        files = ", ".join(f"{mirror.target} now on {mirror.file}" for mirror in mirrors)
        return view.Done(text=files, operation=done.id, pause_ms=done.pause_ms)

    async def _finish(self, request: ask.FinishJobs) -> view.Done:
        done, mirrors = await self._end(request, what="finish")
        files = ", ".join(f"{mirror.file} is {mirror.target} as of one instant" for mirror in mirrors)
        return view.Done(text=files, operation=done.id, pause_ms=done.pause_ms)

    async def _end(
        self, request: ask.PivotJobs | ask.FinishJobs, *, what: str
    ) -> tuple[OperationRecord, tuple[Mirror, ...]]:
        keeper = self._get(request.domain)
        waiting = self._mirrors(keeper, await keeper.observe(), request.disks)
        for mirror in waiting:
            if mirror.snapshot is not None:
                raise errors.BadRequest(
                    reason=f"the mirror of {mirror.target} belongs to snapshot {mirror.snapshot}: use `blockferry "
                    f"snapshot delete {request.domain} {mirror.snapshot} --reopen-mirror` or --remove-mirror"
                )
        await keeper.wait_ready(tuple(mirror.target for mirror in waiting), request.timeout)
        async with self._writing(request.domain) as (keeper, seen):
            mirrors = self._mirrors(keeper, seen, request.disks)
            ends_on = "destination" if what == "pivot" else "source"
            done = await self._window(keeper, seen, mirrors, ends_on=ends_on, what=what)
        return done, mirrors

    async def _window(
        self,
        keeper: Keeper,
        seen: Observation,
        mirrors: tuple[Mirror, ...],
        *,
        ends_on: Any,
        what: str,
        forget: str | None = None,
    ) -> OperationRecord:
        bases: dict[str, tuple[ImageFact, ...]] = {
            mirror.target: await self._images.chain(mirror.backing, mirror.backing_format)
            for mirror in mirrors
            if mirror.backing is not None and mirror.backing_format is not None
        }
        operation, names = self._names()
        plan = plan_window(
            keeper.name,
            seen,
            mirrors,
            names=names,
            ends_on=ends_on,
            what=what,
            bases=bases,
            forget_snapshot=forget,
        )
        return await self._run(keeper, operation, plan)

    async def _cancel(self, request: ask.CancelJobs) -> view.Done:
        async with self._writing(request.domain) as (keeper, seen):
            mirrors = self._mirrors(keeper, seen, request.disks)
            operation, _names = self._names()
            done = await self._run(keeper, operation, copying.plan_cancel(mirrors, "cancel", "cancelled"))
        files = ", ".join(mirror.file for mirror in mirrors)
        return view.Done(text=f"cancelled; left behind, incomplete: {files}", operation=done.id)

    async def _set_speed(self, request: ask.SetJobSpeed) -> view.Done:
        if request.bandwidth < 0:
            raise errors.BadRequest(reason="a bandwidth is bytes per second, 0 for no limit")
        keeper = self._get(request.domain)
        # Not under the domain's lock: it changes nothing that a plan depends on, and must work while others wait.
        (mirror,) = self._mirrors(keeper, await keeper.observe(), (request.disk,))
        await keeper.set_speed(mirror, request.bandwidth)
        limit = f"limited to {request.bandwidth} bytes/s" if request.bandwidth else "not limited any more"
        return view.Done(text=f"the copy of {mirror.target} is {limit}")

    # --- what was done ----------------------------------------------------------------------------------------

    async def _list_events(self, request: ask.ListEvents) -> view.EventList:
        events = self._journal.events(request.domain, request.since)
        return view.EventList(events=events, last=self._journal.last_event())

    async def _list_operations(self, request: ask.ListOperations) -> view.OperationList:
        records = self._journal.operations(request.domain)
        return view.OperationList(operations=tuple(self._operation_view(record) for record in records))

    async def _show_operation(self, request: ask.ShowOperation) -> view.OperationView:
        record = self._journal.operation(request.operation)
        if record is None:
            raise errors.NoSuchOperation(operation=request.operation)
        return self._operation_view(record, steps=True)

    def _operation_view(self, record: OperationRecord, *, steps: bool = False) -> view.OperationView:
        return answers.operation_view(
            record,
            self._journal.steps(record.id) if steps else (),
            self._journal.mirrors(record.domain),
            in_flight=record.id in self._in_flight,
        )

    async def _recover(self, _request: ask.Recover) -> view.RecoveryReport:
        reports = await asyncio.gather(*(self._recover_domain(keeper) for keeper in self._keepers.values()))
        operations = tuple(each for report in reports for each in report)
        unreachable = {
            keeper.name: keeper.problem.message for keeper in self._keepers.values() if keeper.problem is not None
        }
        return view.RecoveryReport(operations=operations, unreachable=unreachable)

    async def _recover_domain(self, keeper: Keeper) -> list[view.RecoveredOperation]:
        async with keeper.lock:
            rows = dict(await keeper.reconcile())
        mirrors = self._journal.mirrors(keeper.name)
        found = []
        for record in self._journal.operations(keeper.name):
            if record.id not in rows and record.state != "in-progress":
                continue
            decision = rows.get(record.id)
            shown = self._operation_view(record)
            found.append(
                view.RecoveredOperation(
                    operation=record.id,
                    domain=keeper.name,
                    what=record.plan.what,
                    row=decision.row if decision else "-",
                    why=decision.why if decision else "Its copy works: nothing to settle.",
                    state=shown.state,
                    next=answers.next_commands(record, mirrors, unsettled=shown.state == "unsettled"),
                )
            )
        return found


def _plan_view(domain: str, plan: Plan) -> view.PlanView:
    return view.PlanView(domain=domain, operation=plan.text, steps=plan.lines(), left_out=plan.left_out)
