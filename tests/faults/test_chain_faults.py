"""Every QMP command of every operation on chains and files: it answers an error, its reply is lost, the connection breaks.

Each operation is carried out once without a fault, which tells what it sends. Then come the cases, one fault each. Every
command that changes something, each time that it is sent: it answers an error, breaks the connection before and after it is
carried out, and is never answered. A command that only reads: the first time it answers an error and breaks the connection;
then it does one of these in its first place after a change of another kind, every other such place.

After each case the answer, the journal and QEMU's own graph have to agree: done, or undone, or (where an operation has
several disks and says so) which of them. The guest runs and can write, nothing of ours is left, and what it wrote is there
in the end, through every chain that the cases have left it on. No case is brought back to where it began: images are put on
top until each disk has as many as the operation takes.

QEMU 10 does all of it; QEMU 7.2 two of the four faults of each command that changes something, by turns: what it answers
then is what may differ.
"""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rig import ALL, FORMATS, KIB, MIB, OURS, SIZE, Rig, open_rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.flags import BlockCommit, BlockCopy, SnapshotCreate, SnapshotDelete
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.qemu.session import Session
from blockferry.testing import Fault, FaultKind, QemuBinaries, check_image, find_qemu, make_image

# Those that change something. Their reply can be lost while the connection stands; to the others a cut is the same.
CHANGING = frozenset(
    [
        "blockdev-add",
        "blockdev-del",
        "blockdev-reopen",
        "blockdev-snapshot",
        "block-dirty-bitmap-add",
        "block-dirty-bitmap-remove",
        "transaction",
        "blockdev-mirror",
        "block-commit",
        "block-stream",
        "block-job-cancel",
        "job-complete",
        "job-finalize",
        "job-dismiss",
        "job-cancel",
        "stop",
        "cont",
    ]
)
TO_CHANGES = (FaultKind.ERROR, FaultKind.CUT_BEFORE, FaultKind.CUT_AFTER, FaultKind.DROP_REPLY)
TO_READS = (FaultKind.ERROR, FaultKind.CUT_BEFORE)
REPLY_SECONDS = 0.5  # for a reply that never comes; QEMU's are here within milliseconds
DEEPEST = 5  # images of a disk
SOON_SECONDS = 20.0  # what is waited for comes within some tenths of a second

Chains = dict[str, list[str]]
# What the snapshots keep: snapshot -> disk -> image.
Kept = dict[str, dict[str, str]]


@dataclass
class Scene:
    """A rig as it was before the present case: its number, the newest event and operation, chains, snapshots, files."""

    rig: Rig
    number: int = -1
    event: int = 0
    operation: int = 0
    chains: Chains = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)
    files: frozenset[str] = frozenset()

    def overlay_of(self, target: str, level: int) -> str:
        """The snapshot whose overlay is that image of the disk, counted from the top."""
        below = self.chains[target][level + 1]
        return next(name for name, disks in self.kept.items() if disks.get(target) == below)

    def new(self, target: str) -> str:
        return str(self.rig.dst / f"{target}.new{self.number}")


TWO = ("vda", "vdb")
QDEVS = {"vda": "/d0-dev/", "vdb": "/peripheral-anon/", "sda": "d2-dev"}  # what their names in QEMU have in them
Before = Callable[[Scene], Awaitable[None]]


@dataclass(frozen=True)
class Operation:
    """An operation and what it comes to.

    Attributes:
        what: its name in the journal.
        request: itself.
        chain: a disk's chain once it is done, from the one before and the scene's new image of the disk.
        kept: what snapshots keep of a disk that they kept otherwise before; None: nothing any more.
        disks: those that it is about.
        depth: how many images they have before.
        before: what leads up to it.
        hidden: a command that its QEMU does not have.
        copied: whether a copy works on its disks before, and not any more once it is done.
        lasts: whether a job goes on once it is done.
        removes: whether the images that leave the chain are removed.
        end: the state of its jobs once it is done.
        sampled: whether half of the changes will do on every QEMU: another operation sends the same commands.
    """

    what: str
    request: Callable[[Scene], ask.Request]
    chain: Callable[[list[str], str], list[str]]
    kept: Callable[[Scene, str], dict[str, str | None]] = lambda _scene, _target: {}
    disks: tuple[str, ...] = ("vda",)
    depth: int = 3
    before: Before | None = None
    hidden: str | None = None
    copied: bool = False
    lasts: bool = False
    removes: bool = False
    end: str | None = "done"
    sampled: bool = False


def on_vda(request: type[Any], **more: Any) -> Callable[[Scene], ask.Request]:
    """Such a request on vda; values that are functions get its chain."""

    def ask_for(scene: Scene) -> ask.Request:
        chain = scene.chains["vda"]
        given = {name: say(chain) if callable(say) else say for name, say in more.items()}
        return request(domain="vm1", disk="vda", **given)

    return ask_for


def copying(base: Callable[[list[str]], str] | None, *, reuse: bool = False) -> Callable[[Scene], ask.Request]:
    """A copy of vda, onto that image of its chain, or onto none."""

    def ask_for(scene: Scene) -> ask.Request:
        below = base(scene.chains["vda"]) if base is not None else None
        flags = BlockCopy.REUSE_EXT if reuse else 0
        dest = scene.new("vda")
        return ask.StartCopy(domain="vm1", disk="vda", dest=dest, base=below, flags=int(flags), format="qcow2")

    return ask_for


def deleting(level: int, flags: int = 0) -> Callable[[Scene], ask.Request]:
    """The delete of the snapshot whose overlay is that image, counted from the top."""
    return lambda scene: ask.DeleteSnapshot(domain="vm1", snapshot=scene.overlay_of("vda", level), flags=int(flags))


def taking(*, mirrored: bool = False, flags: int = 0) -> Callable[[Scene], ask.Request]:
    """A snapshot of two disks."""

    def ask_for(scene: Scene) -> ask.Request:
        disks = tuple(
            DiskWish(
                name=target,
                file=scene.new(target),
                mirror=MirrorWish(file=f"{scene.new(target)}.mirror") if mirrored else None,
            )
            for target in TWO
        )
        wish = SnapshotWish(name=f"n{scene.number}", only_these=True, disks=disks)
        return ask.CreateSnapshot(domain="vm1", wish=wish, flags=int(flags))

    return ask_for


def make(backing: Callable[[list[str]], str] | None, *targets: str, mirrored: bool = False) -> Before:
    """Images that are there already."""

    async def before(scene: Scene) -> None:
        chains = await shown(scene.rig)
        for target in targets:
            below = Path(backing(chains[target])) if backing is not None else None
            fmt = FORMATS[target] if below == scene.rig.source(target) else "qcow2"
            over = {"backing": below, "backing_fmt": fmt} if below is not None else {}
            for path in (scene.new(target), *([f"{scene.new(target)}.mirror"] if mirrored else [])):
                make_image(scene.rig.qemu, Path(path), "qcow2", SIZE, **over)

    return before


def start_copy(base: int) -> Before:
    """A copy of vda that is ready, onto that image of its chain."""

    async def before(scene: Scene) -> None:
        scene.chains = await shown(scene.rig)
        await scene.rig.ask(copying(lambda chain: chain[base])(scene))
        await scene.rig.ready("vda")

    return before


def pivot(_scene: Scene) -> ask.Request:
    return ask.PivotJobs(domain="vm1", disks=("vda",))


def cancel(_scene: Scene) -> ask.Request:
    return ask.CancelJobs(domain="vm1", disks=("vda",))


MIDDLE: dict[str, Any] = {
    "chain": lambda c, _new: [c[0], c[2]],
    "kept": lambda s, t: {s.overlay_of(t, 1): None, s.overlay_of(t, 0): s.chains[t][2]},
}
NEWEST: dict[str, Any] = {"chain": lambda c, _new: c[1:], "kept": lambda s, t: {s.overlay_of(t, 0): None}}
BOTH: dict[str, Any] = {
    "chain": lambda c, _new: c[2:],
    "kept": lambda s, t: {s.overlay_of(t, 0): None, s.overlay_of(t, 1): None},
}
COPY: dict[str, Any] = {"chain": lambda c, _new: c, "lasts": True, "end": "ready"}
TAKE: dict[str, Any] = {
    "chain": lambda c, new: [new, *c],
    "kept": lambda s, t: {f"n{s.number}": s.chains[t][0]},
    "disks": TWO,
    "depth": 1,
    "end": None,
}

OPERATIONS = {
    "rebase": Operation("rebase", on_vda(ask.Rebase, base=lambda c: c[-1]), lambda c, _new: [c[0], c[-1]]),
    "rebase-all": Operation("rebase", on_vda(ask.Rebase), lambda c, _new: c[:1]),
    "commit-middle": Operation("commit", on_vda(ask.Commit, top=lambda c: c[1]), **MIDDLE),
    "commit-active": Operation("commit", on_vda(ask.Commit, flags=int(BlockCommit.SHALLOW)), **NEWEST),
    "delete": Operation("delete", deleting(1), disks=TWO, removes=True, **MIDDLE),
    "delete-newest": Operation("delete", deleting(0), removes=True, **NEWEST),
    "delete-children": Operation("delete", deleting(1, SnapshotDelete.CHILDREN), removes=True, **BOTH),
    "copy-whole": Operation("copy", copying(None), depth=1, **COPY),
    "copy-shallow": Operation("copy", copying(lambda c: c[1]), **COPY),
    "copy-base": Operation("copy", copying(lambda c: c[-1]), **COPY),
    "copy-reuse-ext": Operation(
        "copy", copying(lambda c: c[-1], reuse=True), before=make(lambda c: c[-1], "vda"), **COPY
    ),
    "pivot-shallow": Operation(
        "pivot", pivot, lambda c, new: [new, *c[1:]], before=start_copy(1), copied=True, end="pivoted", sampled=True
    ),
    "pivot-base": Operation(
        "pivot", pivot, lambda c, new: [new, c[-1]], before=start_copy(-1), copied=True, end="pivoted"
    ),
    "cancel-copy": Operation("cancel", cancel, lambda c, _new: c, before=start_copy(-1), copied=True, end="cancelled"),
    "snapshot-reuse-ext": Operation(
        "snapshot", taking(flags=SnapshotCreate.REUSE_EXT), before=make(lambda c: c[0], *TWO), **TAKE
    ),
    "snapshot-one-by-one": Operation("snapshot", taking(), hidden="transaction", **TAKE),
}


# --- one case -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The `nth` time that a command is sent; of one that reads, the first after so many changes."""

    command: str
    kind: FaultKind
    nth: int = 1
    changes: int | None = None

    def fault(self, rig: Rig) -> Fault:
        if self.changes is None:
            return Fault(self.command, self.kind, nth=self.nth)
        begun = len(rig.proxy.log)
        return Fault(self.command, self.kind, when=lambda _arguments: changes(rig, begun) == self.changes)


def changes(rig: Rig, begun: int) -> int:
    return sum(command in CHANGING for command, _arguments in rig.proxy.log[begun:])


def cases(sent: list[str], *, every: bool) -> list[Case]:
    """The faults to come, in the order of what was sent: all of them, for the newest QEMU, or half of the changes."""
    found: list[Case] = []
    count: Counter[str] = Counter()
    places: dict[str, list[str]] = {}
    last = ""
    for command in sent:
        if command in CHANGING:
            count[command] += 1
            last = command
            found += [
                Case(command, kind, nth=count[command])
                for index, kind in enumerate(TO_CHANGES)
                if every or (index + count.total()) % 2
            ]
        elif every and last not in places.setdefault(command, []):
            place, turn = len(places[command]), len(places)
            places[command].append(last)
            kinds = TO_READS if place == 0 else TO_READS[place // 2 % 2 :][: (place + turn) % 2]
            found += [Case(command, kind, changes=count.total()) for kind in kinds]
    return found


async def set_up(scene: Scene, operation: Operation) -> None:
    """Each disk with as many images as the operation takes, and in each something that is in no other."""
    rig = scene.rig
    scene.number += 1
    depth = {target: len(chain) for target, chain in (await shown(rig)).items()}
    level = 0
    while low := [target for target in operation.disks if depth[target] < operation.depth]:
        level += 1
        await rig.snapshot(f"s{scene.number}-{level}", only=low)
        for target in low:
            depth[target] += 1
            await rig.write(target, 1 + (scene.number + 50 * level) % 255, (scene.number + 5 * level) % 13 * 512 * KIB)
            await rig.write(target, 1 + (scene.number + 90 * level) % 255, 7 * MIB)
    if operation.before is not None:
        await operation.before(scene)
    scene.chains, scene.kept, scene.files = await shown(rig), await kept(rig), rig.files()
    scene.event = (await rig.ask(ask.ListEvents(since=2**62))).last
    scene.operation = max((each.id for each in await begun(scene)), default=scene.operation)


async def begun(scene: Scene) -> list[view.OperationView]:
    """The operations since; a request that was refused has taken a number."""
    found: list[view.OperationView] = []
    number = scene.operation
    while number < max([scene.operation, *(each.id for each in found)]) + 4:
        number += 1
        with contextlib.suppress(errors.NoSuchOperation):
            found.append(await scene.rig.operation(number))
    return found


async def own(scene: Scene, operation: Operation) -> list[view.OperationView]:
    """The operation as the journal has it, without those that follow it."""
    return [each for each in await begun(scene) if each.what == operation.what]


async def shown(rig: Rig) -> Chains:
    """The chains, as QEMU shows them; not by what is tested."""
    chains: Chains = {}
    for drive in await rig.guest.command("query-block"):
        image = drive["inserted"]["image"]
        (target,) = [target for target, part in QDEVS.items() if part in drive["qdev"]]
        chains[target] = []
        while image:
            # The filter of a mirror has the file's name as well.
            if image["format"] in ("qcow2", "raw"):
                chains[target].append(image["filename"])
            image = image.get("backing-image")
    return chains


async def kept(rig: Rig) -> Kept:
    return {name: {disk.target: disk.backing for disk in each.disks} for name, each in (await rig.snapshots()).items()}


async def attempt(scene: Scene, operation: Operation) -> errors.BlockferryError | None:
    """Carry it out, with whatever faults are set, until its jobs work no more or have caught up; what was answered."""
    try:
        await scene.rig.ask(operation.request(scene))
        answer = None
    except errors.BlockferryError as error:
        answer = error
    async with asyncio.timeout(SOON_SECONDS):
        async for event in scene.rig.service.watch("vm1", scene.event - 1):
            states = {each.state for each in await own(scene, operation)}
            if not states & {"running", "in-progress"} or (
                operation.lasts and event.seq > scene.event and event.type == "mirror-ready"
            ):
                break
        # What follows an end is recorded first and settled then; recovery waits for that.
        await scene.rig.settled()
    return answer


async def consistent(scene: Scene, operation: Operation, answer: errors.BlockferryError | None) -> None:
    """Done or undone, as the answer and the journal say and QEMU shows; and nothing of ours that nobody uses."""
    rig = scene.rig
    report = await rig.ask(ask.Recover())
    assert report.unreachable == {}
    assert {row.state for row in report.operations} <= {"done", "undone", "in-progress"}, "nothing is left to settle"
    chains = await shown(rig)
    done, whole = await which_are_done(scene, operation, answer, chains)
    assert chains == {
        target: operation.chain(chain, scene.new(target)) if target in done else chain
        for target, chain in scene.chains.items()
    }
    assert {target: [image.file for image in disk.chain] for target, disk in (await rig.disks()).items()} == chains
    assert await kept(rig) == (kept_after(scene, operation, done) if whole else scene.kept)
    assert await rig.status() == "running"
    lost = {target for target, end in (await rig.states()).items() if end == "lost"}
    working = tuple(target for target in still_working(operation, done) if target not in lost)
    assert len(await rig.qemu_jobs()) == len(working)
    await nothing_is_left(scene, operation, chains, working)
    await rig.write("vda", 1 + scene.number % 255, 6 * MIB, 4 * KIB)


async def which_are_done(
    scene: Scene, operation: Operation, answer: errors.BlockferryError | None, chains: Chains
) -> tuple[tuple[str, ...], bool]:
    """The disks that it was done to, by what the answer and the journal say, which may not contradict each other.

    And whether it is what it was to be, rather than a snapshot in part.
    """
    records = await own(scene, operation)
    assert len(records) <= 1
    outcome = answer.outcome if answer is not None else "done"
    if not records:
        assert outcome == "refused" or isinstance(answer, errors.GuestGone)
        return (), True
    (record,) = records
    ends = {
        target: job.state
        for target, job in (await scene.rig.jobs()).items()
        if target in operation.disks and (operation.copied or job.operation == record.id)
    }
    if record.state == "undone":
        assert outcome in ("failed", "unknown")
        # One that was told to end can't go on, where the guest was not stopped for it.
        kept = {"ready", "lost"} if scene.rig.is_held and operation.end == "pivoted" else {"ready"}
        assert set(ends.values()) <= (kept if operation.copied else set())
        return (), True
    lost = {target for target, end in ends.items() if end == "lost"}
    # A copy whose lower layers could not be brought to their end is lost, and nothing of it works any more.
    assert record.state == ("in-progress" if operation.lasts and not lost else "done")
    if isinstance(answer, errors.SnapshotInPart) or record.row == "P":
        switched = tuple(target for target in operation.disks if chains[target] != scene.chains[target])
        assert isinstance(answer, errors.OperationUnsettled) or set(answer.switched.split(", ")) == set(switched)
        return switched, False
    if operation.end is None:
        assert outcome in ("done", "unknown")
        return tuple(target for target in operation.disks if target not in lost), True
    assert set(ends) == set(operation.disks)
    assert set(ends.values()) <= {operation.end, "lost"}
    assert outcome in ("done", "unknown") or (isinstance(answer, errors.JobFailed) and lost)
    return tuple(target for target in operation.disks if target not in lost), True


def kept_after(scene: Scene, operation: Operation, done: tuple[str, ...]) -> Kept:
    """What the snapshots keep once it is done to these disks; one that keeps nothing is no more."""
    after = {name: dict(disks) for name, disks in scene.kept.items()}
    for target in done:
        for name, image in operation.kept(scene, target).items():
            if image is None:
                del after[name][target]
            else:
                after.setdefault(name, {})[target] = image
    return {name: disks for name, disks in after.items() if disks}


def still_working(operation: Operation, done: tuple[str, ...]) -> tuple[str, ...]:
    """The disks that a job of ours works on."""
    if operation.copied:
        return tuple(target for target in operation.disks if target not in done)
    return done if operation.lasts else ()


async def nothing_is_left(scene: Scene, operation: Operation, chains: Chains, working: tuple[str, ...]) -> None:
    """Of our nodes and new files only those that are in a chain or that a job writes to; and no other file is gone.

    A lost copy's file stays, and its job names it.
    """
    rig = scene.rig
    used = {file for chain in chains.values() for file in chain} | {scene.new(target) for target in working}
    assert {opened(node) for name, node in (await rig.nodes()).items() if OURS.match(name)} <= used
    before, now = ({str(rig.path / name.split()[0]) for name in files} for files in (scene.files, rig.files()))
    lost = {job.dest for job in (await rig.jobs()).values() if job.state == "lost" and job.type in ("copy", "fill")}
    assert now - before <= used | lost
    left = {file for chain in scene.chains.values() for file in chain} - used
    assert before - now == (left if operation.removes else set())


def opened(node: dict[str, Any]) -> str:
    """A node's file; QEMU names one that was opened without the backing of its header by its options."""
    name = str(node["file"])
    return str(json.loads(name.removeprefix("json:"))["file"]["filename"]) if name.startswith("json:") else name


async def clear_up(scene: Scene, operation: Operation) -> None:
    """Without faults: the guest goes over to copies that work; chains that have grown or differ are made one image each."""
    rig = scene.rig
    ready = [target for target, state in (await rig.states()).items() if state == "ready"]
    if ready:
        await rig.pivot(*ready)
    chains = await shown(rig)
    depths = {len(chains[target]) for target in operation.disks}
    for target in operation.disks if len(depths) > 1 or max(depths) > DEEPEST else ():
        if len(chains[target]) > 1:
            await rig.commit(target)
            await rig.ended(target)
    used = {file for chain in (await shown(rig)).values() for file in chain}
    for path in (*rig.path.glob("*.s*-*"), *rig.dst.iterdir()):
        if str(path) not in used:
            path.unlink()


async def carry_out(scene: Scene, operation: Operation, case: Case | None) -> list[str]:
    """One case; the commands that it sent."""
    rig = scene.rig
    await set_up(scene, operation)
    sent, fired = len(rig.proxy.log), len(rig.proxy.fired)
    fault = case.fault(rig) if case is not None else None
    with faults(rig, operation, fault):
        answer = await attempt(scene, operation)
    log = rig.proxy.commands()[sent:]
    try:
        assert rig.proxy.fired[fired:] == ([fault] if fault is not None else []), "the fault struck"
        assert case is not None or answer is None
        await consistent(scene, operation, answer)
        await clear_up(scene, operation)
    except (AssertionError, errors.BlockferryError, TimeoutError) as problem:
        recorded = [(each.what, each.state, each.row, each.error) for each in await begun(scene)]
        raise AssertionError(f"{scene.number}: {case}, answered {answer!r}, recorded {recorded}") from problem
    return log


@contextlib.contextmanager
def faults(rig: Rig, operation: Operation, fault: Fault | None) -> Iterator[None]:
    """With this fault; and with a shorter wait for a reply that never comes."""
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            rig.proxy.inject(fault)
            if fault.kind is FaultKind.DROP_REPLY:
                patch.setattr(Session, "COMMAND_SECONDS", REPLY_SECONDS)
        yield
    rig.proxy.clear()
    if operation.hidden is not None:
        rig.proxy.inject(Fault(operation.hidden, FaultKind.HIDE))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OPERATIONS)
async def test_every_command(qemu: QemuBinaries, tmp_path: Path, name: str) -> None:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
    operation = OPERATIONS[name]
    async with open_rig(qemu, tmp_path, proxy=True) as rig:
        scene = Scene(rig)
        if operation.hidden is not None:
            rig.proxy.inject(Fault(operation.hidden, FaultKind.HIDE))
            await rig.reopen_service()
        sent = await carry_out(scene, operation, None)
        for case in cases(sent, every=qemu == find_qemu("qemu10") and not operation.sampled):
            await carry_out(scene, operation, case)
        assert problems == [], "nothing that works by itself has died"
        active = {target: (await rig.disks())[target].chain[0] for target in ALL}
        await rig.guest.stop()
        for target, image in active.items():
            assert rig.holds(target, Path(image.file), image.format)
            check_image(rig.qemu, Path(image.file), image.format)
