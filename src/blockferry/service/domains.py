"""Domains: attach, detach, list, show."""

from __future__ import annotations

import asyncio

import msgspec

from blockferry import answers, errors
from blockferry.engine.keeper import Keeper
from blockferry.formats.definition import parse_definition
from blockferry.formats.names import path_flaw, valid_name
from blockferry.journal.records import DomainRecord
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.blockjob import Mirror
from blockferry.model.domain import Observation
from blockferry.plan.history import current_snapshot
from blockferry.qemu.paths import real_paths
from blockferry.service.desk import Desk
from blockferry.service.resting import left, resume


class Domains:
    """The room of domains.

    Args:
        desk: what the rooms share.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def attach(self, request: ask.Attach) -> view.DomainView:
        """Take charge of a running guest."""
        if not valid_name(request.domain):
            raise errors.InvalidName(name=request.domain)
        flaw = path_flaw(request.qmp)
        if flaw:
            raise errors.QmpUnreachable(qmp=request.qmp, reason=f"it {flaw}")
        flaw = path_flaw(request.agent) if request.agent is not None else None
        if flaw:
            raise errors.AgentUnreachable(domain=request.domain, reason=f"the path of its socket {flaw}")
        records = self._desk.journal.domains()
        real = await real_paths([request.qmp, *(record.qmp for record in records)])
        for record in records:
            if (record.name == request.domain) != (real[record.qmp] == real[request.qmp]):
                raise errors.DomainExists(domain=record.name, qmp=record.qmp)
        known = request.domain in self._desk.keepers
        keeper = self._desk.keepers.get(request.domain) or self._desk.new_keeper(request.domain)
        if not known:
            self._desk.journal.put_domain(DomainRecord(name=request.domain, qmp=request.qmp))
        async with keeper.turns.alone():
            try:
                await keeper.connect(request.timeout)
                seen = await keeper.observe()
            except BaseException:
                if not known:
                    await keeper.close()
                    self._desk.journal.forget_domain(request.domain)
                raise
            self._desk.keepers[request.domain] = keeper
            if request.agent is not None:
                self._desk.journal.put_domain(msgspec.structs.replace(keeper.record, agent=request.agent))
            await keeper.reconcile()
            if not known:
                self._desk.say("domain-attached", request.domain, qmp=request.qmp)
            if request.resume_mirrors:
                notes = await resume(self._desk, keeper)
                seen = await keeper.observe()
            else:
                notes = tuple(
                    f"{mirror.target} was mirrored to {mirror.file} when its QEMU ended: --resume-mirrors goes on with it"
                    for mirror in left(self._desk, request.domain)
                )
        return msgspec.structs.replace(await self._domain_view(keeper, seen), notes=notes)

    async def detach(self, request: ask.Detach) -> view.Done:
        """Let go of a guest; it runs on."""
        keeper = self._desk.keeper(request.domain)
        if keeper.record.defined:
            raise errors.DomainInUse(domain=request.domain, what="it is defined here: `blockferry undefine` forgets it")
        async with keeper.turns.alone():
            await keeper.reconcile()
            working = [f"{job.type} of {job.target}" for job in keeper.active()]
            if working:
                raise errors.DomainInUse(domain=request.domain, what=f"a job works ({', '.join(working)})")
            self._desk.require_no_move(request.domain, "the domain")
            for operation in self._desk.journal.open_operations(request.domain):
                raise errors.DomainInUse(domain=request.domain, what=f"operation {operation.id} is not settled")
            gone = await keeper.is_gone()
            await keeper.let_go()
            self._desk.journal.forget_domain(request.domain)
            del self._desk.keepers[request.domain]
            self._desk.say("domain-detached", request.domain)
        return view.Done(text=f"{request.domain} is detached" + ("" if gone else "; the guest runs on"))

    async def list(self, _request: ask.ListDomains) -> view.DomainList:
        """All domains."""
        views = await asyncio.gather(*(self._view(keeper) for keeper in self._desk.keepers.values()))
        rows = tuple(
            view.DomainRow(
                name=each.name,
                state=each.state,
                qmp=each.qmp,
                pid=each.pid,
                disks=len(each.disks),
                mirrors=sum(isinstance(job, Mirror) for job in self._desk.keeper(each.name).active()),
            )
            for each in sorted(views, key=lambda each: each.name)
        )
        return view.DomainList(domains=rows)

    async def show(self, request: ask.ShowDomain) -> view.DomainView:
        """One domain."""
        keeper = self._desk.keeper(request.domain)
        shown = await self._view(keeper)
        return msgspec.structs.replace(shown, xml=await self._desk.inactive(keeper.name)) if request.inactive else shown

    async def _view(self, keeper: Keeper) -> view.DomainView:
        try:
            return await self._domain_view(keeper, await keeper.observe())
        except errors.NotRunning:
            return await self._shut_off(keeper)
        except errors.BlockferryError as problem:
            state = "gone" if await keeper.is_gone() else "unreachable"
            mirrors = self._desk.journal.mirrors(keeper.name)
            return answers.domain_view(keeper.record, None, mirrors, problem=(state, problem.message))

    async def _domain_view(self, keeper: Keeper, seen: Observation) -> view.DomainView:
        current = current_snapshot(self._desk.journal.snapshots(keeper.name), seen.chains)
        definition = await self._desk.inactive(keeper.name) if keeper.record.defined else None
        mirrors = self._desk.journal.mirrors(keeper.name)
        moving: dict[str, view.MovingView] = {}
        for move in self._desk.journal.moves_under_way(keeper.name):
            shown = answers.mirror_views(mirrors, seen)
            kept = self._desk.kept_of(move)
            moving |= answers.moving_views(move, shown, phase=self._desk.phase_of(move), kept=kept)
        return answers.domain_view(keeper.record, seen, mirrors, current=current, definition=definition, moving=moving)

    async def _shut_off(self, keeper: Keeper) -> view.DomainView:
        xml = await self._desk.inactive(keeper.name)
        definition = parse_definition(xml)
        chains = await self._desk.chains(definition)
        current = current_snapshot(self._desk.journal.snapshots(keeper.name), chains)
        mirrors = self._desk.journal.mirrors(keeper.name)
        return answers.shut_off_view(
            keeper.record, definition, chains, mirrors, xml=xml, crash=self._desk.crash(keeper), current=current
        )
