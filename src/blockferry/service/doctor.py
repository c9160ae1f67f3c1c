"""Doctor: looking at everything that plan.findings and plan.installed judge. Nothing is changed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import stat
from collections.abc import AsyncIterator, Iterable

import msgspec

from blockferry import answers, errors
from blockferry.engine.keeper import Keeper
from blockferry.formats.definition import parse_definition
from blockferry.model import request as ask
from blockferry.model.blockjob import Mirror
from blockferry.model.definition import Definition
from blockferry.model.domain import Observation
from blockferry.model.files import FileFact, ImageFact
from blockferry.model.view import Finding, Findings
from blockferry.plan.findings import Belief, Case, Made, Open, examine, ok, problem
from blockferry.plan.installed import Host, inspect
from blockferry.plan.lifecycle import Start, plan_start
from blockferry.plan.resting import Ground
from blockferry.qemu.launch import LaunchFailed, find_program
from blockferry.qemu.probe import ask_qemu, ask_qemu_img, find_qemus
from blockferry.service.desk import Desk
from blockferry.service.resting import look
from blockferry.service.usage import mentioned

# Where libvirt0 puts its schemas, unless BLOCKFERRY_LIBVIRT_SCHEMAS names another folder.
SCHEMAS = "/usr/share/libvirt/schemas"
# A domain that is in somebody's hands for longer is looked at all the same: to find out why is what doctor is for.
LOCK_SECONDS = 10.0
# After one of these rows of the recovery table disks are where they were found, not where the plan says.
AS_FOUND = frozenset({"L", "P"})


class Doctor:
    """The room of finding out what is wrong.

    Args:
        desk: what the rooms share.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def examine(self, request: ask.Doctor) -> Findings:
        """What is wrong with a domain, or with the host."""
        if request.domain is None:
            found = await self._host()
        else:
            found = examine(await self._case(self._desk.keeper(request.domain)))
        problems = sum(finding.severity == "problem" for finding in found)
        return Findings(domain=request.domain, findings=found, problems=problems)

    # --- the host ---------------------------------------------------------------------------------------------

    async def _host(self) -> tuple[Finding, ...]:
        keepers = sorted(self._desk.keepers.values(), key=lambda keeper: keeper.name)
        definitions = [
            parse_definition(await self._desk.inactive(each.name)) for each in keepers if each.record.defined
        ]
        programs: list[str] = [*find_qemus(platform.machine())]
        missing = []
        for definition in definitions:
            try:
                programs.append(find_program(definition.emulator, definition.arch))
            except LaunchFailed:
                missing.append((definition.name, definition.emulator or f"qemu-system-{definition.arch}"))
        folder = self._desk.state_dir
        state, room = os.stat(folder), os.statvfs(folder)
        schema = os.path.join(os.environ.get("BLOCKFERRY_LIBVIRT_SCHEMAS") or SCHEMAS, "domain.rng")
        host = Host(
            state_dir=str(folder),
            mode=stat.S_IMODE(state.st_mode),
            owner=state.st_uid,
            user=os.geteuid(),
            journal=self._desk.journal.version,
            free=room.f_bavail * room.f_frsize,
            qemus=tuple([await ask_qemu(path) for path in dict.fromkeys(programs)]),
            qemu_img=await ask_qemu_img(self._desk.images.program),
            schema=(schema, os.access(schema, os.R_OK)),
            missing=tuple(missing),
            kvm=os.access("/dev/kvm", os.R_OK | os.W_OK) if os.path.exists("/dev/kvm") else None,
            kvm_guests=tuple(definition.name for definition in definitions if definition.kvm),
        )
        return (*inspect(host), *[_line(await self._case(keeper)) for keeper in keepers])

    # --- a domain ---------------------------------------------------------------------------------------------

    async def _case(self, keeper: Keeper) -> Case:
        async with _undisturbed(keeper):
            seen, case = await self._reached(keeper)
            jobs, snapshots = self._desk.journal.jobs(keeper.name), self._desk.journal.snapshots(keeper.name)
            case = msgspec.structs.replace(
                case,
                seen=seen,
                beliefs=self._beliefs(keeper.name),
                operations=self._operations(keeper),
                jobs=jobs,
                snapshots=snapshots,
                made=tuple(
                    Made(path=path, operation=operation, identity=f"{device}:{inode}")
                    for path, operation, device, inode in self._desk.journal.claims(keeper.name)
                ),
            )
            if keeper.record.defined and seen is None and case.problem is None:
                case = await self._shut_off(keeper, case)
            return msgspec.structs.replace(
                case,
                facts=await self._facts(case),
                headers=await self._headers(seen),
                # What holds a disk's data by the journal's belief is nothing to remove, wherever the guest is now.
                mentioned=await mentioned(
                    self._desk, keeper, seen, {each.file: each.format for each in case.beliefs.values()}
                ),
            )

    async def _reached(self, keeper: Keeper) -> tuple[Observation | None, Case]:
        """The domain now; where it can't be asked, what is known of why."""
        about = Case(
            domain=keeper.name, qmp=keeper.record.qmp, tag=self._desk.journal.tag, defined=keeper.record.defined
        )
        try:
            return await keeper.observe(), about
        except errors.NotRunning:
            return None, msgspec.structs.replace(about, gone=self._desk.crash(keeper))
        except errors.BlockferryError as found:
            gone = f"its QEMU has ended ({self._end(keeper.name)})" if await keeper.is_gone() else None
            return None, msgspec.structs.replace(about, gone=gone, problem=found.message)

    def _end(self, name: str) -> str:
        newest = self._desk.journal.newest_event(name, frozenset({"domain-gone"}))
        return str(newest.data.get("reason")) if newest is not None else "its process is not there any more"

    async def _shut_off(self, keeper: Keeper, case: Case) -> Case:
        definition = parse_definition(await self._desk.inactive(keeper.name))
        chains = await self._desk.chains_to_start(definition)
        disks = {disk.target: disk for disk in definition.disks}
        dropped = {}
        for mirror in self._desk.resting(keeper.name):
            ground = Ground.defined(disks.get(mirror.target), chains.get(mirror.target, ()))
            dropped[mirror.target] = (await look(self._desk, mirror, ground)).problem
        return msgspec.structs.replace(
            case,
            definition=definition,
            closed=chains,
            refusal=_refusal(definition, chains),
            dropped={target: why for target, why in dropped.items() if why is not None},
        )

    def _beliefs(self, name: str) -> dict[str, Belief]:
        attached = self._desk.journal.newest_event(name, frozenset({"domain-attached"}))
        since = attached.time if attached is not None else 0.0
        found: dict[str, Belief] = {}
        for record in self._desk.journal.operations(name, states=frozenset({"done", "in-progress"})):
            for target, file in record.plan.record.authoritative.items():
                if record.row in AS_FOUND:
                    found.pop(target, None)
                else:
                    image_format = record.plan.record.formats.get(target)
                    old = record.started < since
                    found[target] = Belief(file=file, operation=record.id, format=image_format, old=old)
        return found

    def _operations(self, keeper: Keeper) -> tuple[Open, ...]:
        found = []
        for record in self._desk.journal.operations(keeper.name):
            shown = answers.operation_view(
                record, (), self._desk.following(record), in_flight=record.id in keeper.turns.in_flight
            )
            if shown.state in ("unsettled", "running", "in-progress"):
                unsettled = shown.state == "unsettled"
                found.append(Open(operation=record.id, text=shown.text, unsettled=unsettled, next=shown.next))
        return tuple(found)

    async def _headers(self, seen: Observation | None) -> dict[str, ImageFact]:
        """What the header of each image of each chain says, whatever the one above it names."""
        found: dict[str, ImageFact] = {}
        for disk in seen.disks if seen is not None else ():
            known = [image.file for image in disk.chain]
            for image in disk.chain:
                if image.file.startswith("/") and image.file not in found and image.format in ("qcow2", "raw"):
                    found = {
                        fact.path: fact for fact in await self._desk.images.chain(image.file, image.format, known)
                    } | found
        return found

    async def _facts(self, case: Case) -> dict[str, FileFact]:
        return await self._desk.images.facts(tuple(sorted({path for path in _spoken_of(case) if path[:1] == "/"})))


def _spoken_of(case: Case) -> Iterable[str]:
    """Every file that a finding may be about."""
    for disk in case.seen.disks if case.seen is not None else ():
        yield from (image.file for image in disk.chain)
    for chain in case.closed.values():
        # What only a header names, and nothing may follow, is not looked at here either.
        yield from (image.path for depth, image in enumerate(chain) if depth == 0 or image.problem is None)
    yield from (belief.file for belief in case.beliefs.values())
    yield from (made.path for made in case.made)
    for snapshot in case.snapshots:
        for each in snapshot.disks:
            yield from (each.file, each.backing)
    for job in case.jobs:
        if isinstance(job, Mirror):
            yield from (job.file, job.source)
    if case.definition is not None:
        boot = case.definition.boot
        yield from (path or "" for path in (boot.kernel, boot.initrd, boot.loader, boot.nvram, boot.template))


def _refusal(definition: Definition, chains: dict[str, tuple[ImageFact, ...]]) -> str | None:
    """Why a start would be refused before anything is done."""
    try:
        program = find_program(definition.emulator, definition.arch)
        plan_start(Start(definition=definition, program=program, chains=chains))
    except LaunchFailed as failure:
        return str(failure)
    except errors.Refused as refusal:
        return refusal.message
    return None


def _line(case: Case) -> Finding:
    """A domain in one line."""
    count = sum(finding.severity == "problem" for finding in examine(case))
    state = case.seen.status if case.seen is not None else "shut off" if case.definition is not None else "out of reach"
    kind = "defined" if case.defined else "attached"
    words = f"{kind}, {state}, " + (f"{count} problem{'s' if count > 1 else ''}" if count else "no problems")
    found = problem("domain", words, f"blockferry doctor {case.domain}") if count else ok("domain", words)
    return msgspec.structs.replace(found, domain=case.domain)


@contextlib.asynccontextmanager
async def _undisturbed(keeper: Keeper) -> AsyncIterator[None]:
    """The domain while nobody else does anything to it, if that can be had soon."""
    taken = False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LOCK_SECONDS):
            taken = await keeper.turns.lock.acquire()
    try:
        yield
    finally:
        if taken:
            keeper.turns.lock.release()
