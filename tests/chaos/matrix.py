"""Cases: an operation and what goes wrong in it, chosen by a seed; and playing one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, get_args

from operations import OPERATIONS, REMOVE, REOPEN, Operation
from qemu.qmp import ExecInterruptedError, StateError
from verdict import (
    WORKING,
    Look,
    Standing,
    images_of,
    jobs,
    look,
    named,
    require_agreement,
    require_contents,
    require_nothing_left,
    require_settled,
    standing,
)
from worlds import TARGETS, OwnQemu, Stage, World, definition, open_world, serving, worked_out

from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.graph import JOB_FILTERS
from blockferry.service import Service
from blockferry.testing import Fault, FaultKind, TestQemu, sharing_file_system
from blockferry.testing.crash import WORK_SECONDS, Accident
from blockferry.testing.pen import Pen, PenPlan, Records
from blockferry.testing.sick import order

# At a boundary: the host process dies, QEMU is killed, the connection ends.
AtBoundary = Literal["die", "kill", "cut"]
# From a boundary on until the operation has ended: accesses to the disks' folder (src) or the destinations' (dst) fail.
Sick = Literal["read-src", "write-src", "flush-src", "full-src", "read-dst", "write-dst", "flush-dst", "full-dst"]
# From a boundary on the server fails writes, or holds all requests; or it is killed.
OfServer = Literal["nbd-fail", "nbd-hold", "nbd-die"]
# Of a command: it is refused, its reply is lost or late, the connection ends before or after it.
OfCommand = Literal["error", "drop", "late", "before", "after"]
FAULTS_AT_BOUNDARIES = ("cut", *get_args(Sick), *get_args(OfServer))
AT_BOUNDARIES = (*get_args(AtBoundary), *get_args(Sick))
KINDS = {
    "error": FaultKind.ERROR,
    "drop": FaultKind.DROP_REPLY,
    "late": FaultKind.LATE,
    "before": FaultKind.CUT_BEFORE,
    "after": FaultKind.CUT_AFTER,
}
# How often each is chosen.
WEIGHTS = {"die": 40, "kill": 16, "cut": 8, "error": 10, "drop": 3, "late": 3, "before": 4, "after": 6}
WEIGHTS |= dict.fromkeys(get_args(Sick), 4) | {"nbd-fail": 16, "nbd-hold": 6, "nbd-die": 16}
REPLY_SECONDS = 0.4  # for a reply that never comes; QEMU's are here within milliseconds
LATE_SECONDS = 0.7
SELDOM = 8  # boundaries between two writes of a pen's at least: each takes QEMU as long as three of them
WRITES = 12  # of a pen's, in an operation to whose end nothing happens; and one at each mishap
RECOVERY_BOUNDARIES = 30  # a recovery has some tens of them; one that has less is not hit


@dataclass(frozen=True)
class Mishap:
    """One thing that goes wrong: `die@17`, `kill@3`, `error@blockdev-add#2`; `again:die@4` in the recovery after it."""

    kind: str
    at: int = 0
    command: str = ""
    again: bool = False

    def __str__(self) -> str:
        where = f"{self.command}#{self.at}" if self.command else str(self.at)
        return f"{'again:' if self.again else ''}{self.kind}@{where}"

    @classmethod
    def parse(cls, text: str) -> Mishap:
        """What `str` makes of one."""
        found = re.fullmatch(r"(again:)?([\w-]+)@(?:([\w-]+)#)?(\d+)", text)
        if found is None or found[2] not in WEIGHTS:
            raise ValueError(
                f"{text!r} is no mishap: die@17, kill@3, cut@5, write-dst@4, error@blockdev-add#2, again:die@4"
            )
        return cls(found[2], int(found[4]), found[3] or "", again=found[1] is not None)


@dataclass(frozen=True)
class Case:
    """An operation, and what goes wrong in it: `pivot-3 die@17+again:kill@2`."""

    operation: str
    mishaps: tuple[Mishap, ...]

    @property
    def proxied(self) -> bool:
        """Whether a proxy is needed between the service and QEMU."""
        return any(mishap.command for mishap in self.mishaps)

    @property
    def playable(self) -> bool:
        """Behind the proxy the service can't see which process QEMU is, so it can't know that it was killed."""
        return not (self.proxied and any(mishap.kind == "kill" for mishap in self.mishaps))

    @property
    def sick(self) -> bool:
        """Whether storage fails in it."""
        return any(mishap.kind in get_args(Sick) for mishap in self.mishaps)

    @property
    def leaks(self) -> bool:
        """Whether clusters may be lost to use: QEMU writes that one is taken before it writes by what, and may get no further."""
        return self.sick or any(mishap.kind == "kill" for mishap in self.mishaps)

    @property
    def flushless(self) -> bool:
        """Whether an image may be left that QEMU flushes no more: it believes no page cache that a flush failed of."""
        return any(mishap.kind.startswith("flush-") for mishap in self.mishaps)

    def __str__(self) -> str:
        return f"{self.operation} {'+'.join(map(str, self.mishaps)) or 'nothing'}"

    @classmethod
    def parse(cls, text: str) -> Case:
        """What `str` makes of one."""
        operation, _, rest = text.partition(" ")
        parts = () if rest in ("", "nothing") else rest.split("+")
        return cls(operation, tuple(Mishap.parse(part) for part in parts))


@dataclass(frozen=True)
class Course:
    """How an operation goes when nothing goes wrong: its boundaries, its commands, and how things stand then.

    Attributes:
        copies: whether anything lies in the destinations' folder.
        served: at so many of the first boundaries the server may fail: not so soon before the guest goes over to it that nobody
            would see it; and what happens afterwards happens to the guest's own storage.
    """

    boundaries: tuple[str, ...]
    commands: tuple[str, ...]
    copies: bool
    before: Standing
    after: Standing
    served: int = 0


@dataclass
class Tally:
    """The figures."""

    cases: int = 0
    kills: int = 0
    faults: int = 0
    records: int = 0
    ends: Counter[str] = field(default_factory=Counter)  # how requests ended: `well`, `died` or an error's code

    def add(self, other: Tally) -> None:
        """Those of another session too."""
        self.cases += other.cases
        self.kills += other.kills
        self.faults += other.faults
        self.records += other.records
        self.ends += other.ends

    def __str__(self) -> str:
        return f"{self.cases:,} cases, {self.kills:,} kills, {self.faults:,} faults, 0 lost, 0 left over"


def every_mishap(course: Course) -> dict[str, list[Mishap]]:
    """By kind, all single things that can go wrong; no proxy stands before a QEMU that blockferry starts."""
    count: Counter[str] = Counter()
    kinds = [kind for kind in AT_BOUNDARIES if course.copies or not kind.endswith("-dst")]
    found = {kind: [Mishap(kind, at) for at in range(len(course.boundaries))] for kind in kinds}
    found |= {kind: [Mishap(kind, at) for at in range(course.served)] for kind in get_args(OfServer) if course.served}
    for command in course.commands:
        count[command] += 1
        for kind in get_args(OfCommand):
            found.setdefault(kind, []).append(Mishap(kind, count[command], command))
    return found


def choose(operation: str, course: Course, chance: random.Random) -> Iterator[Case]:
    """Cases without end, each single one but once: by the weights of the kinds, every sixth with a second mishap."""
    singles = every_mishap(course)
    for mishaps in singles.values():
        chance.shuffle(mishaps)
    kinds = sorted(singles)
    for number in itertools.count(1):
        kinds = [kind for kind in kinds if singles[kind]]
        if not kinds:
            return
        (kind,) = chance.choices(kinds, [WEIGHTS[kind] for kind in kinds])
        first = singles[kind].pop()
        if number % 6:
            yield Case(operation, (first,))
            continue
        second = Mishap(chance.choice(AT_BOUNDARIES), chance.randrange(RECOVERY_BOUNDARIES), again=True)
        if chance.random() < 0.5:
            second = Mishap(chance.choice(AT_BOUNDARIES), chance.randrange(len(course.boundaries)))
        case = Case(operation, (first, second))
        yield case if case.playable else Case(operation, (first,))


class Opens(Protocol):
    """Makes the world of a case: `open_world`, or another guest's."""

    def __call__(
        self, stage: Stage, folder: Path, *, proxied: bool, defined: bool, served: bool
    ) -> contextlib.AbstractAsyncContextManager[World]: ...


@contextlib.asynccontextmanager
async def world_of(
    operation: Operation, stage: Stage, folder: Path, *, opens: Opens = open_world, proxied: bool = True
) -> AsyncIterator[World]:
    """Where an operation is played; beside the folder is the image of its file system, if it has one of its own."""
    shares = sharing_file_system(folder.with_name(f"{folder.name}.xfs"), folder) if operation.shares else None
    with shares or contextlib.nullcontext():
        async with opens(stage, folder, proxied=proxied, defined=operation.defined, served=operation.served) as world:
            yield world


async def whole(stage: Stage, folder: Path, name: str) -> Course:
    """An operation without a mishap, which has to be done then."""
    operation = OPERATIONS[name]
    async with world_of(operation, stage, folder) as world:
        before, _images, _files = await set_up(world, operation)
        world.proxy.log.clear()
        result = await asyncio.to_thread(
            stage.crasher.run, world.state_dir, operation.itself(world), to_the_end=True, pen=world.pen()
        )
        assert result.error is None, result.error
        async with serving(world) as service:
            states = await require_settled(service)
            assert ("undone" in states) == operation.undoes
            after = await standing(service)
        assert world.records() != nothing_written(), "the guest has written nothing meanwhile"
        commands = tuple(world.proxy.commands()) if not operation.defined else ()
        copies = any((world.folder / "dst").iterdir())
        served = len(result.boundaries) if operation.served else 0
        if operation.served and "before job-finalize" in result.boundaries:
            served = result.boundaries.index("before job-finalize")
        return Course(result.boundaries, commands, copies, before, after, served)


async def set_up(world: World, operation: Operation) -> tuple[Standing, dict[str, tuple[str, str]], set[str]]:
    """What leads up to the operation; how things stand then."""
    known: ask.Request = ask.Attach(domain="vm", qmp=str(world.qmp))
    if isinstance(world.qemu, OwnQemu):
        known = ask.Define(xml=definition(world.folder, world.qemu.sockets))
    async with serving(world) as service:
        for request in (known, *operation.before(world)):
            await service.submit(request)
            if not isinstance(request, ask.MoveStorage):
                await worked_out(service)
        seen = await look(service)
        found = seen.standing, seen.images, world.files()
    if operation.crashed:
        await world.qemu.stop()
    if operation.forgets and (plan := world.pen()) is not None:
        pen = Pen(plan)
        for _each in range(6):
            pen.write()
        pen.close()
    return found


async def play(
    stage: Stage, folder: Path, case: Case, course: Course, tally: Tally, *, opens: Opens = open_world
) -> None:
    """Play a case, and look at what is left; whatever is not as it has to be is an AssertionError."""
    operation = OPERATIONS[case.operation]
    async with world_of(operation, stage, folder, opens=opens, proxied=case.proxied) as world:
        _before, images, files = await set_up(world, operation)
        for mishap in case.mishaps:
            if mishap.command:
                fault = Fault(mishap.command, KINDS[mishap.kind], nth=mishap.at, seconds=LATE_SECONDS)
                world.proxy.inject(fault)
        await have_accidents(world, operation, case, course, tally)
        world.proxy.clear()
        stage.heal()
        await world.heal()
        await let_go_on(world, case)
        tally.cases += 1
        tally.faults += len(world.proxy.fired) + sum(m.kind in FAULTS_AT_BOUNDARIES for m in case.mishaps)
        continuing = len(str(case)) % 2 == 0 and not case.flushless
        final = None
        if operation.defined:
            final = await stays_defined(world, operation, course, continuing=continuing)
        elif world.qemu.alive:
            final = await lives(world, operation, course, files, continuing=continuing, flushless=case.flushless)
        if final is None:
            await world.qemu.stop()
            if case.proxied:
                world.tell_whose()
            final = await is_gone(world, operation, course, images, files, leaks=case.leaks, continuing=continuing)
        if world.guest is not None and world.guest.qemu.alive and not case.flushless:
            await world.guest.progress()
        await world.qemu.stop()
        if world.guest is not None:
            await world.guest.stop()
        tally.records += require_contents(world, final, leaks=case.leaks)


async def let_go_on(world: World, case: Case) -> None:
    """A guest whose disk is full is stopped by QEMU (werror=enospc); whoever made room lets it go on.

    QEMU 7.2 may crash when a stream fails: then it is gone in a moment, as if it had been killed.
    """
    if not case.sick or not world.qemu.alive:
        return
    try:
        if (await world.command("query-status"))["status"] == "io-error":
            await world.command("cont")
    except (ExecInterruptedError, StateError):
        assert isinstance(world.qemu, TestQemu)
        async with asyncio.timeout(WORK_SECONDS):
            await world.qemu.process.wait()


async def have_accidents(world: World, operation: Operation, case: Case, course: Course, tally: Tally) -> None:
    """The operation, and the recovery after it if something goes wrong in that too, each in a process of its own."""
    for again in (False, True):
        accidents = accidents_of(world, [m for m in case.mishaps if m.again is again and not m.command])
        if again and not accidents:
            break
        result = await asyncio.to_thread(
            world.stage.crasher.run,
            world.state_dir,
            () if again else operation.itself(world),
            accidents=accidents,
            from_open=again,
            to_the_end=True,
            pen=None if operation.forgets else pen_of(world, case, course, again=again),
            reply_seconds=REPLY_SECONDS,
        )
        assert result.error is None or "Traceback" not in result.error, result.error
        guests = [each for each in accidents if each.what == "kill" and not each.target.isdigit()]
        killed = sum(each.at < len(result.boundaries) for each in guests)
        if killed and isinstance(world.qemu, TestQemu):
            # It takes a moment to be gone: a process that dies lets go of its sockets first.
            async with asyncio.timeout(WORK_SECONDS):
                await world.qemu.process.wait()
        tally.ends["died" if result.killed else result.error or "well"] += 1
        tally.kills += result.killed + killed


def pen_of(world: World, case: Case, course: Course, *, again: bool) -> PenPlan | None:
    """What the guest writes: as often in a long operation as in a short one, at other boundaries in each case."""
    if again:
        return world.pen()
    every = max(SELDOM, len(course.boundaries) // WRITES)
    return world.pen(every, zlib.crc32(str(case).encode()) % every)


def nothing_written() -> dict[str, Records]:
    return {target: Records(must={}, may={}) for target in TARGETS}


def accidents_of(world: World, mishaps: Sequence[Mishap]) -> tuple[Accident, ...]:
    found = []
    for mishap in mishaps:
        match mishap.kind.split("-"):
            case ["nbd", how]:
                found.append(world.server_accident(how, mishap.at))
            case [ailment, part]:
                what = order(ailment, world.folder / part)  # type: ignore[arg-type]  # one of Sick
                found.append(Accident(at=mishap.at, what="fail", target=what))
            case ["kill"]:
                found.append(Accident(at=mishap.at, what="kill", target=str(world.qemu.sockets["pen"])))
            case ["cut"]:
                found.append(Accident(at=mishap.at, what="cut", target=str(world.qmp)))
            case _:
                found.append(Accident(at=mishap.at, what="die"))
    # Whoever dies sees nothing more: what happens at the same moment comes first.
    return tuple(sorted(found, key=lambda accident: accident.what == "die"))


async def lives(
    world: World, operation: Operation, course: Course, files: set[str], *, continuing: bool, flushless: bool
) -> dict[str, tuple[str, str]] | None:
    """The guest runs: it was done, undone or is in progress, and what is in progress can be gone on with or cancelled.

    None when it can't be settled, or a disk not be gone on with, before its guest is started anew, and that is said.
    """
    async with serving(world) as service:
        await worked_out(service)
        await require_running(world)
        if world.server_was_gone:
            await world.notice()
        if flushless and await waits_for_its_end(service):
            return None
        states = await require_settled(service)
        seen = await look(service)
        if not operation.moves:
            require_one_of(seen.standing, course, operation)
            if "undone" in states and not operation.alone:
                assert world.files() - files == set(), "files are left of what was undone"
        await require_agreement(world, seen)
        await require_nothing_left(service, world, seen, flushless=operation.moves and flushless)
        if await forgot_a_filter(service, world):
            return None
        if operation.moves and flushless:
            # No overlay is written down into an image that QEMU can't flush; it stands still, and has said so.
            return seen.images
        await go_on_or_back(service, continuing=continuing)
        seen = await look(service)
        if operation.moves:
            await require_moved_or_not(service, world, operation, seen, course, files)
        assert await world.command("query-jobs") == []
        await require_nothing_left(service, world, seen)
        return seen.images


async def waits_for_its_end(service: Service) -> bool:
    """Whether what is undone is kept by an image that QEMU flushes no more: no overlay is written down into it."""
    listed = await service.submit(ask.ListOperations())
    assert isinstance(listed, view.OperationList)
    stuck = [each for each in listed.operations if each.state == "unsettled"]
    return bool(stuck) and all("stop the guest, then `blockferry recover`" in str(each.error) for each in stuck)


async def forgot_a_filter(service: Service, world: World) -> bool:
    """Whether QEMU 7.2 has left the filter of a job that failed while it drained: it starts no other on that disk."""
    nodes = await world.command("query-named-block-nodes", {"flat": True})
    left = {node["node-name"] for node in nodes if node["drv"] in JOB_FILTERS}
    if not left or await world.command("query-jobs"):
        return False
    assert world.stage.version == "distribution", left
    report = await service.submit(ask.Doctor(domain="vm"))
    assert isinstance(report, view.Findings)
    assert {each.text.split(",")[0] for each in report.findings if each.code == "filter-left"} == left
    return True


async def require_running(world: World) -> None:
    status = (await world.command("query-status"))["status"]
    assert status == "running", f"the guest is {status}"


def require_one_of(now: Standing, course: Course, operation: Operation) -> None:
    if not operation.alone:
        assert now in (course.before, course.after), f"neither before nor after: {now}"
        return
    for target, chain in now.chains.items():
        assert chain in (course.before.chains[target], course.after.chains[target]), f"{target}: {chain}"


async def require_moved_or_not(  # noqa: PLR0917 - what is looked at
    service: Service, world: World, operation: Operation, seen: Look, course: Course, files: set[str]
) -> None:
    """A move is over: the guest is where it was, with no file more or less, or where it was to go."""
    moves = [await service.submit(ask.ShowMove(operation=number)) for number in await moves_of(service, "done")]
    where = {Path(seen.images[target][0]).parent.name for target in operation.disks}
    if any(isinstance(each, view.MoveView) and each.state == "done" for each in moves):
        assert seen.standing == course.after, f"not as it goes: {seen.standing}"
        assert where == {"dst"}, where
        return
    assert seen.standing.snapshots == course.before.snapshots
    assert where == {"src"}, where
    assert world.files() - files == set(), "files are left of a move that was given up"


async def moves_of(service: Service, state: str) -> list[int]:
    listed = await service.submit(ask.ListOperations())
    assert isinstance(listed, view.OperationList)
    return [each.id for each in listed.operations if each.what == "move" and each.state == state]


async def go_on_or_back(service: Service, *, continuing: bool) -> None:
    """Do what is offered for what is in progress: go on with it, or cancel it.

    A snapshot goes over to its mirrors, all or none: not when one was lost.
    """
    for number in await moves_of(service, "in-progress"):
        shown = await service.submit(ask.ShowMove(operation=number))
        assert isinstance(shown, view.MoveView)
        if continuing or shown.pivoted:
            await service.submit(ask.SetMoveSpeed(operation=number, bandwidth=0))
            await service.submit(ask.ResumeOperation(operation=number))
            await worked_out(service)
        else:
            await service.submit(ask.CancelOperation(operation=number))
        after = await service.submit(ask.ShowMove(operation=number))
        assert number not in await moves_of(service, "in-progress"), after
    listed = (await jobs(service)).values()
    working = [job for job in listed if job.state in WORKING]
    copies = tuple(job.disk for job in working if job.snapshot is None)
    if copies:
        verb = ask.PivotJobs if continuing else ask.CancelJobs
        await service.submit(verb(domain="vm", disks=copies))
    if any(job.snapshot for job in working):
        whole = not any(job.snapshot and job.state == "lost" for job in listed)
        (request,) = (REOPEN if continuing and whole else REMOVE)(None)  # type: ignore[arg-type]  # they need nothing of a world
        await service.submit(request)


async def stays_defined(
    world: World, operation: Operation, course: Course, *, continuing: bool
) -> dict[str, tuple[str, str]]:
    """The guest runs or is shut off; it can be started, and what it has is gone on with."""
    async with serving(world) as service:
        await worked_out(service)
        await require_settled(service)
        seen = await look(service)
        state = seen.shown.state
        assert state in ("running", "shut off"), state
        assert (state == "running") == world.qemu.alive, "a QEMU that nobody lets run"
        now = seen.standing
        require_one_of_chains(now, course, operation)
        if operation.forgets and now.chains == course.after.chains != course.before.chains:
            world.log.unlink()
        if state == "shut off":
            await service.submit(ask.Start(domain="vm"))
            seen = await look(service)
        await require_running(world)
        await require_agreement(world, seen)
        await require_nothing_left(service, world, seen)
        await go_on_or_back(service, continuing=continuing)
        await require_nothing_left(service, world, await look(service))
        await service.submit(ask.Stop(domain="vm", force=True))
        assert not world.qemu.alive
        return await images_of(service)


async def is_gone(
    world: World,
    operation: Operation,
    course: Course,
    images: dict[str, tuple[str, str]],
    files: set[str],
    *,
    leaks: bool,
    continuing: bool,
) -> dict[str, tuple[str, str]]:
    """QEMU was killed: the images that doctor names hold everything, and the guest runs on them as if nothing had been."""
    async with serving(world) as service:
        await require_settled(service)
        now = named(await service.submit(ask.Doctor(domain="vm")), images)
    require_contents(world, now, leaks=leaks)
    await world.start_again(now)
    async with serving(world) as service:
        await service.submit(ask.Attach(domain="vm", qmp=str(world.qmp)))
        await require_settled(service)
        seen = await look(service)
        assert seen.images == now
        if operation.moves:
            await go_on_or_back(service, continuing=continuing)
            seen = await look(service)
            await require_moved_or_not(service, world, operation, seen, course, files)
            now = seen.images
        else:
            require_one_of_chains(seen.standing, course, operation)
        await require_agreement(world, seen)
        await require_nothing_left(service, world, seen)
    return now


def require_one_of_chains(now: Standing, course: Course, operation: Operation) -> None:
    """As before or as after; all disks alike, unless each is done for itself."""
    if operation.alone:
        require_one_of(now, course, operation)
    else:
        assert now.chains in (course.before.chains, course.after.chains), f"neither before nor after: {now.chains}"
