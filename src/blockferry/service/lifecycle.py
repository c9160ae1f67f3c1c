"""Guests that we start: define, undefine, start, stop, revert; and suspend and resume, of all."""

from __future__ import annotations

import contextlib
import uuid

import msgspec

from blockferry import errors
from blockferry.engine.keeper import Keeper
from blockferry.formats import schema
from blockferry.formats.defined import with_uuid
from blockferry.formats.definition import parse_definition
from blockferry.journal.records import Defined, DomainRecord
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.blockjob import Mirror
from blockferry.model.definition import Definition
from blockferry.model.snapshot import Snapshot
from blockferry.plan import machine
from blockferry.plan.lifecycle import Start, mirror_of, plan_start
from blockferry.plan.machine import agent_socket
from blockferry.plan.plan import Plan
from blockferry.plan.resting import Ground, Look
from blockferry.plan.revert import overlay_of, plan_revert
from blockferry.plan.steps import Resume, Stop
from blockferry.qemu.launch import LaunchFailed, find_program
from blockferry.qemu.paths import real_paths
from blockferry.qemu.session import CommandRefused, LostReply
from blockferry.qemu.user import NoSuchUser, run_as
from blockferry.service.desk import Desk
from blockferry.service.domains import Domains
from blockferry.service.resting import look
from blockferry.service.usage import look_up


class Lifecycle:
    """The room of beginnings and ends.

    Args:
        desk: what the rooms share.
        domains: the room that shows them.
    """

    def __init__(self, desk: Desk, domains: Domains) -> None:
        self._desk = desk
        self._domains = domains

    async def define(self, request: ask.Define) -> view.DomainView:
        """Remember a guest, or another definition of one that is shut off."""
        definition = parse_definition(request.xml)
        # Devices that don't fit together are found now, not at the start.
        machine.arguments(definition, {})
        schema.require_valid(request.xml)
        name = definition.name
        keeper = self._desk.keepers.get(name)
        if keeper is None:
            keeper = self._desk.new_keeper(name)
        elif not keeper.record.defined:
            raise errors.DomainExists(domain=name, qmp=keeper.record.qmp)
        async with keeper.turns.alone():
            if keeper.home.taken():
                raise errors.AlreadyRunning(domain=name)
            self._desk.require_no_move(name, "the domain")
            moved = await self._moved(name, definition) if name in self._desk.keepers else ()
            xml = with_uuid(request.xml, str(uuid.uuid4()))
            targets = {disk.id: disk.target for disk in definition.disks}
            agent = agent_socket(definition)
            record = DomainRecord(
                name=name,
                qmp=str(keeper.home.qmp),
                gone=True,
                defined=True,
                agent=str(keeper.home.folder / agent) if agent is not None else None,
                targets=targets,
            )
            self._desk.journal.define(record, Defined(xml=xml))
            self._desk.keepers[name] = keeper
            self._desk.say("domain-defined", name)
        shown = await self._domains.show(ask.ShowDomain(domain=name))
        notes = tuple(f"<{path}> is kept, and not carried out" for path in definition.ignored)
        return msgspec.structs.replace(shown, notes=(*moved, *notes))

    async def _moved(self, name: str, definition: Definition) -> tuple[str, ...]:
        """What is to be said of disks that another definition puts on other images than they are on by now.

        Raises:
            ImageUnsuitable: on one that the present image stands on, which the guest would spoil by writing to it.
        """
        old = parse_definition(await self._desk.inactive(name))
        chains = await self._desk.chains(old)
        # With every name that a file has: the document may use another than the image above it.
        now = {disk.target: disk.source.where for disk in old.disks if disk.source is not None}
        then = [disk.source.where for disk in definition.disks if disk.source is not None]
        real = await real_paths([*now.values(), *then, *(image.path for chain in chains.values() for image in chain)])
        stands = {real[below.path]: chain[0].path for chain in chains.values() for below in chain[1:]}
        said = []
        for disk in definition.disks:
            if disk.source is None or disk.read_only:
                continue
            top, was = stands.get(real[disk.source.where]), now.get(disk.target)
            if top is not None:
                raise errors.ImageUnsuitable(
                    path=disk.source.where,
                    reason=f"{top}, which {name} is on by now, stands on it, and {disk.target} would be written to under it "
                    f"(`blockferry show {name} --xml --inactive` has the definition with the present images; "
                    f"`blockferry undefine {name}` forgets them)",
                )
            if was is not None and real[was] != real[disk.source.where]:
                said.append(f"{disk.target} was on {was}, and is on {disk.source.where} from now on")
        return tuple(said)

    async def undefine(self, request: ask.Undefine) -> view.Done:
        """Forget a guest that is shut off."""
        keeper = self._defined(request.domain)
        async with keeper.turns.alone():
            if keeper.home.taken():
                raise errors.AlreadyRunning(domain=request.domain)
            self._desk.require_no_move(request.domain, "the domain")
            await keeper.close()
            known = self._desk.journal.definition(request.domain)
            self._desk.journal.undefine(request.domain)
            del self._desk.keepers[request.domain]
            self._desk.say("domain-undefined", request.domain)
        # The document that it was defined from does not say so.
        moved = [f"{target} on {file}" for target, (file, _format) in sorted((known.images if known else {}).items())]
        text = f"{request.domain} is no longer defined; its images are as they were"
        return view.Done(text=f"{text}: {', '.join(moved)}" if moved else text)

    async def start(self, request: ask.Start) -> view.DomainView:
        """Start a guest."""
        async with self._settled(request.domain) as keeper:
            if keeper.home.taken():
                raise errors.AlreadyRunning(domain=request.domain)
            await self._start(keeper, request)
        return await self._domains.show(ask.ShowDomain(domain=request.domain))

    async def revert(self, request: ask.RevertSnapshot) -> view.DomainView:
        """Bring a guest back to what its disks were at a snapshot; one that runs is ended first."""
        async with self._settled(request.domain) as keeper:
            self._desk.require_no_move(request.domain, "the domain")
            snapshot = await self._desk.snapshot(request.domain, request.snapshot)
            # Refused before the guest is ended, if it is refused.
            await self._plan_revert(keeper, snapshot, self._desk.journal.next_operation())
            if keeper.home.taken():
                await keeper.end(f"it is reverted to snapshot {snapshot.name}")
            number, _names = self._desk.names()
            await keeper.run(number, await self._plan_revert(keeper, snapshot, number))
            self._desk.say("domain-reverted", request.domain, snapshot=snapshot.name)
            if request.start or request.pause:
                await self._start(keeper, ask.Start(domain=request.domain, paused=request.pause))
        return await self._domains.show(ask.ShowDomain(domain=request.domain))

    async def _plan_revert(self, keeper: Keeper, snapshot: Snapshot, number: int) -> Plan:
        paths = tuple(overlay_of(disk, snapshot, number) for disk in snapshot.disks)
        headers = {disk.backing: disk.backing_format for disk in snapshot.disks}
        return plan_revert(
            parse_definition(await self._desk.inactive(keeper.name)),
            snapshot,
            operation=number,
            files=await look_up(self._desk, keeper, None, paths, headers),
            resting=self._desk.resting(keeper.name),
        )

    def _settled(self, name: str) -> contextlib.AbstractAsyncContextManager[Keeper]:
        """A defined domain to oneself, running or shut off, with everything of before settled."""
        self._defined(name)
        return self._desk.holding(name)

    async def _start(self, keeper: Keeper, request: ask.Start) -> None:
        """Start it with its mirrors; one that can't be established is dropped, and it is tried without."""
        definition = parse_definition(await self._desk.inactive(keeper.name))
        try:
            program = find_program(definition.emulator, definition.arch)
            who = await run_as(program, definition.user, definition.relabel) if definition.user is not None else None
        except (LaunchFailed, NoSuchUser) as failure:
            raise errors.BadRequest(reason=str(failure)) from failure
        chains = await self._desk.chains_to_start(definition)
        disks = {disk.target: disk for disk in definition.disks}
        while True:
            resting: list[tuple[Mirror, Ground, Look]] = []
            gone: dict[str, str] = {}
            for mirror in self._desk.resting(keeper.name):
                ground = Ground.defined(disks.get(mirror.target), chains.get(mirror.target, ()))
                seen = await look(self._desk, mirror, ground)
                if ground is None or seen.problem is not None:
                    gone[mirror.target] = seen.problem or "there is no such disk any more"
                else:
                    resting.append((mirror, ground, seen))
            if gone:
                self._drop(keeper, request, gone)
                continue
            plan = plan_start(
                Start(
                    definition=definition,
                    program=program,
                    chains=chains,
                    resting=tuple(resting),
                    paused=request.paused,
                    run_as=who,
                )
            )
            number, _names = self._desk.names()
            try:
                await self._run(keeper, number, plan)
            except errors.OperationFailed as failure:
                failed = [each.index for each in self._desk.journal.steps(number) if each.error]
                targets = [target for index in failed if (target := mirror_of(plan, index)) is not None]
                if not targets:
                    raise
                self._drop(keeper, request, dict.fromkeys(targets, failure.reason))
            else:
                self._desk.say("domain-started", keeper.name)
                return

    async def _run(self, keeper: Keeper, number: int, plan: Plan) -> None:
        record = msgspec.structs.replace(keeper.record, pid=None, born=None, gone=False, ending=None)
        self._desk.journal.put_domain(record)
        try:
            await keeper.run(number, plan)
        except errors.OperationFailed:
            self._desk.journal.put_domain(msgspec.structs.replace(keeper.record, pid=None, born=None, gone=True))
            raise

    def _drop(self, keeper: Keeper, request: ask.Start, gone: dict[str, str]) -> None:
        """The mirrors that can't be established again are no more; or the guest is not started without them."""
        for target, words in gone.items():
            if request.require_mirrors:
                raise errors.MirrorGone(domain=keeper.name, disk=target, reason=words)
        self._desk.bus.publish(self._desk.journal.lose_jobs(keeper.name, gone))

    async def stop(self, request: ask.Stop) -> view.Done:
        """Shut a guest down."""
        keeper = self._defined(request.domain)
        async with self._desk.writing(request.domain) as (_keeper, seen):
            if request.force or seen.status == "shutdown":
                await keeper.end("on request, by force" if request.force else "the guest has shut down")
                return view.Done(text=f"{request.domain} is shut off" + (", by force" if request.force else ""))
            if not seen.running:
                raise errors.CannotShutDown(domain=request.domain, state=seen.status)
            await self._execute(keeper, "system_powerdown")
        # The guest takes its time, and other commands go on meanwhile.
        if not await keeper.wait_stopped(request.timeout):
            raise errors.StillRunning(domain=request.domain, seconds=request.timeout)
        return view.Done(text=f"{request.domain} is shut off")

    async def suspend(self, request: ask.Suspend) -> view.Done:
        """Pause a guest."""
        async with self._desk.writing(request.domain) as (keeper, _seen):
            await (await keeper.executor()).do(Stop(), {})
        return view.Done(text=f"{request.domain} is paused")

    async def resume(self, request: ask.Resume) -> view.Done:
        """Let a guest run."""
        async with self._desk.writing(request.domain) as (keeper, _seen):
            await (await keeper.executor()).do(Resume(first=True), {})
        return view.Done(text=f"{request.domain} runs")

    async def _execute(self, keeper: Keeper, command: str) -> None:
        session = await keeper.connect()
        try:
            await session.execute(command)
        except CommandRefused as refusal:
            raise errors.BadRequest(reason=refusal.words) from refusal
        except LostReply as lost:
            raise errors.GuestGone(domain=keeper.name, reason=lost.reason) from lost

    def _defined(self, name: str) -> Keeper:
        keeper = self._desk.keeper(name)
        if not keeper.record.defined:
            raise errors.NotDefined(domain=name)
        return keeper
