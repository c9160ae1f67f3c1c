"""What every room of the service shares: the domains, and the one way to write to one."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from blockferry import answers, errors
from blockferry.engine.bus import Bus
from blockferry.engine.keeper import Keeper
from blockferry.formats.defined import inactive_xml
from blockferry.formats.definition import parse_definition
from blockferry.formats.names import path_flaw
from blockferry.journal.journal import Journal
from blockferry.journal.records import OperationRecord
from blockferry.model import view
from blockferry.model.blockjob import BlockJob, Mirror
from blockferry.model.definition import Definition
from blockferry.model.domain import ChainsNow, Observation
from blockferry.model.files import ImageFact
from blockferry.model.job import Job
from blockferry.model.move import Move
from blockferry.model.snapshot import Snapshot
from blockferry.plan.move import Next, next_of
from blockferry.plan.plan import Names, Plan
from blockferry.qemu.images import Images
from blockferry.qemu.launch import Home
from blockferry.qemu.nbd import reachable
from blockferry.qemu.paths import block_devices

# What became of a guest that we start, as far as it ended: the newest of these events says it.
ENDS = frozenset({"domain-defined", "domain-started", "domain-stopped", "domain-crashed"})

Witness = Callable[[str, str], None]

# A QEMU is asked for all of its graph in some 10 ms; a busy host gets three hundred times that.
LATELY_SECONDS = 3.0


class Desk:
    """The domains of one state directory.

    Args:
        journal: the state directory's.
        images: the host's image files.
        witness: told of every QMP command.
        state_dir: the state directory.
        window_seconds: how long a guest may stand still.
    """

    def __init__(
        self, journal: Journal, images: Images, witness: Witness, state_dir: Path, window_seconds: float
    ) -> None:
        self.journal = journal
        self.state_dir = state_dir
        self.images = images
        self.bus = Bus()
        self.keepers: dict[str, Keeper] = {}
        self._witness = witness
        self._window_seconds = window_seconds
        self._asking: dict[str, asyncio.Task[Observation | None]] = {}

    def new_keeper(self, name: str) -> Keeper:
        """A keeper for a domain; the caller decides whether it is kept."""
        home = Home(self.state_dir / "run" / "domains", self.state_dir / "log" / "domains", name)
        return Keeper(
            name,
            self.journal,
            self.images,
            self.bus,
            self._witness,
            home=home,
            window_seconds=self._window_seconds,
        )

    def keeper(self, name: str) -> Keeper:
        """The keeper of a domain.

        Raises:
            NoSuchDomain: none of that name is attached.
        """
        keeper = self.keepers.get(name)
        if keeper is None:
            raise errors.NoSuchDomain(domain=name)
        return keeper

    def say(self, kind: str, domain: str, **data: Any) -> None:
        """Record an event and hand it on."""
        event = view.Event(seq=0, time=time.time(), type=kind, domain=domain, data=data)
        self.bus.publish((self.journal.put_event(event),))

    def keep_move(self, move: Move, kind: str, **data: Any) -> None:
        """Remember a move as it is now, with an event of it, and hand that on."""
        event = view.Event(
            seq=0, time=time.time(), type=kind, domain=move.domain, data={"operation": move.operation, **data}
        )
        self.bus.publish(self.journal.put_move(move, (event,)))

    @contextlib.asynccontextmanager
    async def holding(self, name: str) -> AsyncIterator[Keeper]:
        """The domain to oneself, with everything of before settled; it may be shut off."""
        keeper = self.keeper(name)
        async with keeper.turns.alone():
            if self.journal.open_operations(name):
                await keeper.reconcile()
            for operation in self.journal.open_operations(name):
                raise errors.Unsettled(domain=name, operation=operation.id)
            yield keeper

    @contextlib.asynccontextmanager
    async def writing(self, name: str, *, move: int | None = None) -> AsyncIterator[tuple[Keeper, Observation]]:
        """The domain to oneself, with everything of before settled, and how it is now.

        Args:
            name: the domain's.
            move: the move that this is part of, to which the disks belong that it holds.

        Raises:
            GuestGone: QEMU ended in the middle of what was done in here.
        """
        async with self.holding(name) as keeper:
            seen = await keeper.observe()
            if await keeper.check_jobs(seen):
                seen = await keeper.observe()
            seen = msgspec.structs.replace(seen, held=self._held(name, move))
            try:
                yield keeper, seen
            except errors.OperationFailed as failed:
                if not await keeper.is_gone():
                    raise
                reason = (
                    f"it ended at «{failed.step}» of operation {failed.operation}, which was undone: every disk is on "
                    "the image that it was on"
                )
                raise errors.GuestGone(domain=name, reason=reason) from failed

    def _held(self, name: str, own: int | None) -> dict[str, int]:
        moves = [each for each in self.journal.moves_under_way(name) if each.operation != own]
        return {target: each.operation for each in moves for target in each.targets}

    def require_no_move(self, name: str, what: str) -> None:
        """Refuse what concerns a whole domain while one of its moves is not over.

        Raises:
            MoveUnderWay: with that move.
        """
        moves = self.journal.moves_under_way(name)
        if moves:
            raise errors.MoveUnderWay(domain=name, operation=moves[0].operation, what=what)

    def phase_of(self, move: Move) -> Next:
        """What is done next or now with a move."""
        return next_of(move, {job.target: job for job in self.journal.jobs(move.domain)})

    def kept_of(self, move: Move) -> dict[str, int]:
        """By source, the bytes of a move's copies that are on disk."""
        return {
            layer.source: sum(region.length for region in self.journal.regions(move.operation, layer.file))
            for layer in move.layers
        }

    def following(self, record: OperationRecord) -> tuple[str, ...]:
        """What can be typed now: the commands that go on with an operation that is in progress, or cancel it."""
        move = self.journal.move(record.id)
        if move is not None:
            return answers.next_for(move)
        return answers.next_commands(record, self.journal.jobs(record.domain))

    def names(self, *, dry_run: bool = False) -> tuple[int, Names]:
        """The next operation's number and names."""
        operation = self.journal.next_operation() if dry_run else self.journal.reserve_operation()
        return operation, Names(self.journal.tag, operation)

    async def start_job(self, keeper: Keeper, operation: int, plan: Plan, *, dry_run: bool) -> view.View:
        """Run a plan that begins one job, and answer with that job; or only with the plan. The caller holds the domain."""
        if dry_run:
            return plan_view(keeper.name, plan)
        await keeper.run(operation, plan)
        (started,) = plan.record.jobs
        answer = answers.job_view(self.job(keeper, started.target), await self.jobs_or_none(keeper))
        return msgspec.structs.replace(answer, notes=plan.notes)

    def job(self, keeper: Keeper, target: str) -> BlockJob:
        """The newest job of a disk.

        Raises:
            NoSuchJob: it has had none.
        """
        found = next((each for each in self.journal.jobs(keeper.name) if each.target == target), None)
        if found is None:
            raise errors.NoSuchJob(domain=keeper.name, disk=target)
        return found

    # --- definitions ------------------------------------------------------------------------------------------

    async def inactive(self, name: str) -> str:
        """The XML of what is started next, of a domain that we start.

        Raises:
            NotDefined: somebody else starts it.
        """
        defined = self.journal.definition(name)
        if defined is None:
            raise errors.NotDefined(domain=name)
        devices = await block_devices(file for file, _format in defined.images.values())
        return inactive_xml(defined.xml, defined.images, devices)

    async def chains(self, definition: Definition) -> dict[str, tuple[ImageFact, ...]]:
        """Each disk's images as their headers say, top first; an export is taken as it is."""
        found: dict[str, tuple[ImageFact, ...]] = {}
        known = tuple(definition.images)
        for disk in definition.disks:
            source = disk.source
            if source is not None and source.kind == "network":
                found[disk.target] = (ImageFact(path=source.where, format=source.format),)
            elif source is not None:
                found[disk.target] = await self.images.chain(source.where, source.format, known)
        return found

    async def chains_to_start(self, definition: Definition) -> dict[str, tuple[ImageFact, ...]]:
        """As `chains`, with each export's server asked whether it is there."""
        found = await self.chains(definition)
        for target, chain in found.items():
            if not chain[0].path.startswith("/") and (why := await reachable(chain[0].path)) is not None:
                problem = f"its server can't be reached: {why}"
                found[target] = (msgspec.structs.replace(chain[0], problem=problem),)
        return found

    async def chains_now(self, keeper: Keeper) -> ChainsNow:
        """What the domain's disks are on, also of one that is shut off.

        Raises:
            GuestGone, QmpUnreachable, QmpBusy: it can't be asked.
        """
        try:
            seen = await keeper.observe()
        except errors.NotRunning:
            definition = parse_definition(await self.inactive(keeper.name))
            found = await self.chains(definition)
            chains = {disk.target: found.get(disk.target, ()) for disk in definition.disks}
            return ChainsNow(chains=chains, uuid=definition.uuid)
        return ChainsNow(chains=seen.chains, uuid=seen.uuid, seen=seen)

    async def chains_or_none(self, keeper: Keeper) -> ChainsNow | None:
        """As `chains_now`; None where it can't be asked."""
        try:
            return await self.chains_now(keeper)
        except errors.BlockferryError:
            return None

    def crash(self, keeper: Keeper) -> str | None:
        """How a guest that we start ended, when it is shut off and nobody ended it: its exit status and last words."""
        newest = self.journal.newest_event(keeper.name, ENDS)
        if newest is None or newest.type != "domain-crashed":
            return None
        return f"{newest.data.get('reason')} (its log is {keeper.home.log})"

    # --- mirrors that rest ------------------------------------------------------------------------------------

    def resting(self, domain: str) -> tuple[Mirror, ...]:
        """A domain's mirrors that rest until it is started."""
        return tuple(mirror for mirror in self.journal.mirrors(domain) if mirror.state == "resting")

    async def snapshot(self, domain: str, name: str) -> Snapshot:
        """A snapshot.

        Raises:
            NoSuchSnapshot: the domain has none of that name.
            SnapshotInternal: it is one inside an image.
        """
        keeper = self.keeper(domain)
        found = next((each for each in self.journal.snapshots(domain) if each.name == name), None)
        if found is not None:
            return found
        now = await self.chains_or_none(keeper)
        inside = [each for each in answers.internal_views(now.chains if now else {}) if each.name == name]
        if inside:
            images = ", ".join(dict.fromkeys(f"{each.file} ({each.target})" for each in inside))
            raise errors.SnapshotInternal(domain=domain, snapshot=name, images=images)
        raise errors.NoSuchSnapshot(domain=domain, snapshot=name)

    async def seen_lately(self, keeper: Keeper) -> Observation | None:
        """A domain that a request is not about: as it is now, or as it was seen last where its QEMU takes too long.

        So one that hangs holds up no other. It is asked once at a time, and not given up: a reply may come yet.
        """
        asked = self._asking.get(keeper.name)
        if asked is None or asked.done():
            asked = self._asking[keeper.name] = asyncio.create_task(self.seen_or_none(keeper))
        await asyncio.wait([asked], timeout=LATELY_SECONDS)
        return asked.result() if asked.done() else keeper.seen

    async def close(self) -> None:
        """Let go of everything; guests and their jobs go on."""
        self.bus.close()
        for asked in self._asking.values():
            asked.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)
        await asyncio.gather(*(keeper.close() for keeper in self.keepers.values()))
        self.journal.close()

    async def seen_or_none(self, keeper: Keeper) -> Observation | None:
        """The domain now, or None where it can't be asked."""
        try:
            return await keeper.observe()
        except errors.BlockferryError:
            return None

    async def jobs_or_none(self, keeper: Keeper) -> Mapping[str, Job]:
        """QEMU's jobs of a domain now; none where it can't be asked."""
        try:
            return await keeper.jobs()
        except errors.BlockferryError:
            return {}


def require_path(path: str) -> None:
    """Refuse a destination that can't be a path.

    Raises:
        DestinationUnusable: with the flaw.
    """
    flaw = path_flaw(path)
    if flaw:
        raise errors.DestinationUnusable(path=path, reason=f"it {flaw}")


def require_bandwidth(bandwidth: int) -> None:
    """Refuse a limit that is none.

    Raises:
        BadRequest: it is negative.
    """
    if bandwidth < 0:
        raise errors.BadRequest(reason="a bandwidth is bytes per second, 0 for no limit")


def plan_view(domain: str, plan: Plan) -> view.PlanView:
    """What would be done, for --dry-run."""
    return view.PlanView(
        domain=domain, operation=plan.text, steps=plan.lines(), left_out=plan.left_out, notes=plan.notes
    )
