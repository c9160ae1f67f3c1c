"""Snapshots: take, list, show, delete, and go over to their mirrors."""

from __future__ import annotations

import time

import msgspec

from blockferry import answers, errors
from blockferry.engine.keeper import Keeper
from blockferry.formats.names import valid_name
from blockferry.formats.snapshot import parse_snapshot
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.blockjob import ChainJob, Mirror
from blockferry.model.domain import ChainsNow, Observation
from blockferry.model.flags import SnapshotCreate, SnapshotDelete, require_flags
from blockferry.model.snapshot import Snapshot, SnapshotWish
from blockferry.plan import copy as copying
from blockferry.plan.chain import plan_merge
from blockferry.plan.history import after_forgetting, children, current_snapshot, not_current
from blockferry.plan.plan import Plan, Record
from blockferry.plan.redefine import remembered
from blockferry.plan.snapshot import choose, existing_files, files_of, plan_snapshot
from blockferry.qemu.agent import AgentRefused, AgentSilent
from blockferry.qemu.session import LostReply
from blockferry.service.desk import Desk, plan_view, require_path
from blockferry.service.redefinition import redefine
from blockferry.service.usage import look_up, standing
from blockferry.service.windows import run_window

# External snapshots of a running guest's disks are the only ones that are taken; XML is always validated.
CREATE = (
    SnapshotCreate.ATOMIC
    | SnapshotCreate.DISK_ONLY
    | SnapshotCreate.REUSE_EXT
    | SnapshotCreate.QUIESCE
    | SnapshotCreate.NO_METADATA
    | SnapshotCreate.VALIDATE
)
DELETE = (
    SnapshotDelete.METADATA_ONLY
    | SnapshotDelete.CHILDREN
    | SnapshotDelete.CHILDREN_ONLY
    | SnapshotDelete.REOPEN_MIRROR
    | SnapshotDelete.REMOVE_MIRROR
)


class Snapshots:
    """The room of snapshots.

    Args:
        desk: what the rooms share.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def create(self, request: ask.CreateSnapshot) -> view.View:
        """Take a snapshot, or remember one that was taken."""
        if request.flags & (SnapshotCreate.REDEFINE | SnapshotCreate.CURRENT):
            return await self._redefine(request)
        wish = self._wish(request)
        async with self._desk.writing(request.domain) as (keeper, seen):
            snapshots = self._desk.journal.snapshots(request.domain)
            name = wish.name or str(int(time.time()))
            flags = SnapshotCreate(request.flags)
            kept = not flags & SnapshotCreate.NO_METADATA
            if kept and any(snapshot.name == name for snapshot in snapshots):
                raise errors.SnapshotExists(domain=request.domain, snapshot=name)
            choices, _left_out = choose(request.domain, seen, wish, name, flags)
            operation, names = self._desk.names(dry_run=request.dry_run)
            plan = plan_snapshot(
                request.domain,
                seen,
                wish,
                names=names,
                operation=operation,
                name=name,
                files=await look_up(
                    self._desk, keeper, seen, files_of(choices), dict.fromkeys(existing_files(choices), "qcow2")
                ),
                now=time.time(),
                parent=current_snapshot(snapshots, seen.chains),
                flags=flags,
            )
            if flags & SnapshotCreate.QUIESCE:
                await self._require_agent(keeper, seen)
            if request.dry_run:
                return plan_view(request.domain, plan)
            await keeper.run(operation, plan)
            made = plan.record.snapshot
            if made is None:
                raise AssertionError(plan)
            if any(disk.mirror is not None for disk in made.disks):
                answer = await self._snapshot_view(keeper, made, operation)
            else:
                # Nothing is left to be asked: QEMU has just said that every disk is on its overlay, and nobody else writes.
                answer = answers.snapshot_view(made, {}, current=kept, operation=operation)
            frozen = answers.frozen_for(self._desk.journal.steps(operation))
            return msgspec.structs.replace(answer, left_out=plan.left_out, notes=plan.notes, frozen_ms=frozen)

    async def _require_agent(self, keeper: Keeper, seen: Observation) -> None:
        """Refuse to quiesce a guest whose agent can't be asked, or holds its file systems frozen for somebody else."""
        agent = keeper.agent()
        if agent is None:
            raise errors.AgentUnreachable(domain=keeper.name, reason="its socket is not known")
        if not seen.running:
            raise errors.AgentUnreachable(
                domain=keeper.name, reason=f"the guest is {seen.status}, and its agent with it"
            )
        try:
            frozen = await agent.is_frozen()
        except (AgentSilent, AgentRefused, LostReply) as failure:
            raise errors.AgentUnreachable(domain=keeper.name, reason=str(failure)) from failure
        if frozen:
            raise errors.AlreadyFrozen(domain=keeper.name)

    async def _redefine(self, request: ask.CreateSnapshot) -> view.View:
        keeper = self._desk.keeper(request.domain)
        operation, plan = await redefine(self._desk, request)
        if request.dry_run:
            return plan_view(request.domain, plan)
        answer = await self._snapshot_view(keeper, remembered(plan), operation)
        return msgspec.structs.replace(answer, notes=plan.notes)

    def _wish(self, request: ask.CreateSnapshot) -> SnapshotWish:
        require_flags("snapshot_create_xml", SnapshotCreate(request.flags), CREATE)
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
                if path is not None:
                    require_path(path)
        return wish

    async def _snapshot_view(
        self, keeper: Keeper, snapshot: Snapshot, operation: int | None = None
    ) -> view.SnapshotView:
        now = await self._desk.chains_or_none(keeper)
        return self._view(keeper, snapshot, self._desk.journal.snapshots(keeper.name), now, operation)

    def _view(
        self,
        keeper: Keeper,
        snapshot: Snapshot,
        snapshots: tuple[Snapshot, ...],
        now: ChainsNow | None,
        operation: int | None = None,
    ) -> view.SnapshotView:
        seen, chains = (now.seen, now.chains) if now is not None else (None, {})
        return answers.snapshot_view(
            snapshot,
            answers.mirror_views(self._desk.journal.mirrors(keeper.name), seen),
            current=current_snapshot(snapshots, chains) == snapshot.name,
            children=children(snapshot.name, snapshots),
            operation=operation,
        )

    async def list(self, request: ask.ListSnapshots) -> view.SnapshotList:
        """A domain's snapshots."""
        keeper = self._desk.keeper(request.domain)
        snapshots = self._desk.journal.snapshots(request.domain)
        now = await self._desk.chains_or_none(keeper)
        views = tuple(self._view(keeper, each, snapshots, now) for each in snapshots)
        internal = answers.internal_views(now.chains if now is not None else {})
        return view.SnapshotList(domain=request.domain, snapshots=views, internal=internal)

    async def show(self, request: ask.ShowSnapshot) -> view.SnapshotView:
        """One snapshot."""
        keeper = self._desk.keeper(request.domain)
        return await self._snapshot_view(keeper, await self._desk.snapshot(request.domain, request.snapshot))

    async def delete(self, request: ask.DeleteSnapshot) -> view.View:
        """Delete a snapshot: merge it, or what its flags say."""
        flags = SnapshotDelete(request.flags)
        require_flags("snapshot_delete", flags, DELETE)
        if len([*flags]) > 1:
            raise errors.BadRequest(reason=f"{flags!r} contradict each other: say one")
        snapshot = await self._desk.snapshot(request.domain, request.snapshot)
        if flags == SnapshotDelete.REOPEN_MIRROR:
            return await self._reopen(request, snapshot)
        if flags == SnapshotDelete.REMOVE_MIRROR:
            return await self._remove_mirrors(request, snapshot)
        mirrored = [job.snapshot for job in self._desk.keeper(request.domain).active() if isinstance(job, Mirror)]
        if snapshot.name in mirrored:
            raise errors.SnapshotHasMirrors(domain=request.domain, snapshot=request.snapshot)
        if flags == SnapshotDelete.METADATA_ONLY:
            return await self._forget(request, snapshot)
        return await self._merge(request, snapshot, flags)

    async def _forget(self, request: ask.DeleteSnapshot, snapshot: Snapshot) -> view.Done:
        keeper = self._desk.keeper(request.domain)
        async with keeper.turns.alone():
            operation, _names = self._desk.names()
            text = f"forget snapshot {snapshot.name}"
            changed = after_forgetting(snapshot, self._desk.journal.snapshots(request.domain))
            record = Record(forget=(snapshot.name,), changed=changed)
            done = await keeper.run(operation, Plan(what="forget", text=text, record=record))
        return view.Done(text=f"snapshot {snapshot.name} is forgotten; its images are as they were", operation=done.id)

    async def _merge(self, request: ask.DeleteSnapshot, snapshot: Snapshot, flags: SnapshotDelete) -> view.View:
        """Start the merges, one job a disk, and wait for them; other commands go on meanwhile."""
        async with self._desk.writing(request.domain) as (keeper, seen):
            operation, names = self._desk.names(dry_run=request.dry_run)
            plan = plan_merge(
                request.domain,
                seen,
                snapshot,
                self._desk.journal.snapshots(request.domain),
                names=names,
                operation=operation,
                children=bool(flags & SnapshotDelete.CHILDREN),
                only_children=bool(flags & SnapshotDelete.CHILDREN_ONLY),
                users=await standing(self._desk, keeper, seen),
            )
            if request.dry_run:
                return plan_view(request.domain, plan)
            await keeper.run(operation, plan)
        await keeper.wait_over(operation)
        merges = [job for job in plan.record.jobs if isinstance(job, ChainJob)]
        files = ", ".join(layer.file for job in merges for layer in job.leaving)
        deleted = tuple(dict.fromkeys(name for job in merges for name in job.deletes))
        which = f"snapshots {', '.join(deleted)} are" if len(deleted) > 1 else f"snapshot {deleted[0]} is"
        return view.Done(text=f"{which} deleted; merged down and removed: {files}", operation=operation)

    async def _reopen(self, request: ask.DeleteSnapshot, snapshot: Snapshot) -> view.Done:
        keeper = self._desk.keeper(request.domain)
        await self._check_reopen(keeper, snapshot)
        targets = tuple(disk.target for disk in snapshot.disks if disk.mirror)
        await keeper.wait_ready(targets, request.timeout)
        async with self._desk.writing(request.domain) as (keeper, seen):
            mirrors = await self._check_reopen(keeper, snapshot)
            done = await run_window(
                self._desk, keeper, seen, mirrors, ends_on="destination", what="reopen", forget=snapshot
            )
        files = ", ".join(f"{mirror.target} now on {mirror.file}" for mirror in mirrors)
        text = f"{files}; snapshot {snapshot.name} is deleted"
        return view.Done(text=text, operation=done.id, pause_ms=done.pause_ms)

    async def _check_reopen(self, keeper: Keeper, snapshot: Snapshot) -> tuple[Mirror, ...]:
        """The snapshot's mirrors, if the guest can go over to them: it is current, and none of them is lost."""
        names = {"domain": keeper.name, "snapshot": snapshot.name}
        wanted = [disk for disk in snapshot.disks if disk.mirror]
        if not wanted:
            raise errors.NoMirror(**names, reason="none was asked for when it was taken")
        reason = not_current(snapshot, (await keeper.observe()).chains)
        if reason:
            raise errors.SnapshotNotCurrent(**names, reason=reason)
        mirrors = []
        for disk in wanted:
            mirror = next((m for m in self._desk.journal.mirrors(keeper.name) if m.target == disk.target), None)
            if mirror is None or mirror.snapshot != snapshot.name or mirror.state != "active":
                why = f"that of {disk.target} is {mirror.state if mirror else 'gone'}"
                raise errors.NoMirror(**names, reason=why + (f": {mirror.reason}" if mirror and mirror.reason else ""))
            mirrors.append(mirror)
        return tuple(mirrors)

    async def _remove_mirrors(self, request: ask.DeleteSnapshot, snapshot: Snapshot) -> view.Done:
        async with self._desk.writing(request.domain) as (keeper, _seen):
            mirrors = tuple(
                mirror
                for mirror in self._desk.journal.mirrors(request.domain)
                if mirror.snapshot == snapshot.name and mirror.state in ("active", "lost")
            )
            if not mirrors:
                raise errors.NoMirror(domain=request.domain, snapshot=snapshot.name, reason="none is left")
            operation, _names = self._desk.names()
            done = await keeper.run(operation, copying.plan_cancel(mirrors, "remove-mirror", "removed"))
        files = ", ".join(mirror.file for mirror in mirrors)
        text = f"the mirrors of snapshot {snapshot.name} are dropped; left behind, not kept up any more: {files}"
        return view.Done(text=text, operation=done.id)
