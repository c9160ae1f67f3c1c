"""Moves that are over at once: which may be, the order of what is done, and what an interruption becomes."""

from __future__ import annotations

import msgspec
import pytest
from test_recover import observed

from blockferry.model.files import FileFact
from blockferry.model.graph import Disk, Image
from blockferry.model.job import Job
from blockferry.model.move import Layer, Move, MovedDisk
from blockferry.model.operation import OperationState, StepState
from blockferry.model.request import MoveStorage
from blockferry.plan.atonce import plan_at_once
from blockferry.plan.destinations import Files
from blockferry.plan.files import ClaimFile, CreateImage, FlushFiles, ShareBlocks, SyncFiles
from blockferry.plan.placement import Placed, may_share
from blockferry.plan.plan import Names, Plan
from blockferry.plan.recover import Evidence, Interrupted, decide
from blockferry.plan.steps import AddNode, AwaitReady, Resume, StartMirror, Stop
from blockferry.plan.tracking import AddBitmap

SIZE = 8 << 20
TARGETS = ("vda", "vdb")
SEEN = observed({target: f"{target}-src" for target in TARGETS}, running=True)
MOVE = Move(
    domain="vm1",
    operation=7,
    disks=tuple(
        MovedDisk(
            target=target,
            source=f"/{target}-src",
            format="raw",
            file=f"/new/{target}",
            file_format="raw",
            strategy="offload",
            why="",
            layers=(f"/{target}-src",),
        )
        for target in TARGETS
    ),
    layers=tuple(
        Layer(source=f"/{target}-src", format="raw", file=f"/new/{target}", length=SIZE) for target in TARGETS
    ),
)
FILES = Files(
    facts={
        f"/new/{target}": FileFact(path=f"/new/{target}", real=f"/new/{target}", kind="absent") for target in TARGETS
    }
)


def planned(move: Move = MOVE, *, running: bool = True) -> Plan:
    seen = msgspec.structs.replace(SEEN, running=running)
    disks = tuple(zip(move.disks, SEEN.disks, strict=True))
    return plan_at_once(move, seen, disks, names=Names("abcd", 7), files=FILES, snapshots=())


def test_mirrors_begin_before_the_blocks_are_shared_and_the_guest_stops_last() -> None:
    plan = planned()
    kinds = [type(step) for step in plan.prepare]
    opening, going = [ClaimFile, CreateImage, AddNode], [StartMirror, ShareBlocks]
    opened, gone = ([kind for kind in each for _target in TARGETS] for each in (opening, going))
    assert kinds == [*opened, FlushFiles, *gone, SyncFiles]
    assert {step.sync for step in plan.prepare if isinstance(step, StartMirror)} == {"none"}
    assert plan.window is not None
    assert [type(step) for step in plan.window.steps][:2] == [AwaitReady, Stop]
    assert isinstance(plan.settle[0], Resume)


def test_what_is_true_afterwards() -> None:
    plan = planned()
    record = plan.record
    assert record.move is not None
    assert (record.move.pivot, record.move.methods) == (7, {f"/{target}-src": "reflink" for target in TARGETS})
    assert record.authoritative == {target: f"/new/{target}" for target in TARGETS}
    # Its mirrors are nobody's to know of: they end with it.
    assert (record.jobs, record.ended) == ((), {})
    assert not [step for step in (plan.window.steps if plan.window else ()) if isinstance(step, AddBitmap)]
    compared = planned(msgspec.structs.replace(MOVE, verify="full"))
    assert compared.window is not None
    assert [type(step) for step in compared.window.steps][-2:] == [AddBitmap, AddBitmap]


def test_a_paused_guest_stays_paused() -> None:
    plan = planned(running=False)
    steps = [*(plan.window.steps if plan.window else ()), *plan.settle]
    assert not [step for step in steps if isinstance(step, Stop | Resume)]


def left(state: OperationState, roots: str, status: str, *, running: bool, only: str = "") -> str:
    """The row for where the guest is found: each disk, or the `only` one, on that node, with a job in that state."""
    plan = planned()
    nodes = {target: (roots if only in ("", target) else "{}-src").format(target) for target in TARGETS}
    jobs = {name: Job(id=name, type="mirror", status=status) for name in (f"bfabcd-7-{each}-m" for each in TARGETS)}
    seen = msgspec.structs.replace(observed(nodes, running=running), jobs=jobs)
    return decide(Interrupted(state=state, plan=plan, steps=begun(plan)), Evidence(seen=seen)).row


def begun(plan: Plan) -> dict[int, StepState]:
    return dict.fromkeys(range(len(plan.prepare)), "done")


def test_an_interruption() -> None:
    source, copy = "{}-src", "bfabcd-7-{}-x"
    assert left("preparing", source, "ready", running=True) == "E"
    assert left("window", source, "ready", running=True) == "G"
    assert left("window", source, "ready", running=False) == "G"
    assert left("window", copy, "concluded", running=False) == "F"
    assert left("window", copy, "concluded", running=False, only="vda") == "G"
    assert left("window", copy, "concluded", running=True, only="vda") == "L"
    assert left("recorded", copy, "concluded", running=False) == "A"


def test_a_qemu_that_is_gone() -> None:
    plan = planned()
    gone = Evidence(seen=None, gone=True)
    for state, row in (("preparing", "H"), ("window", "J"), ("recorded", "K")):
        decision = decide(Interrupted(state=state, plan=plan, steps=begun(plan)), gone)
        assert decision.row == row
        assert decision.action == ("settle" if row == "K" else "undo")


SOURCE = FileFact(path="/a", real="/a", kind="file", size=SIZE, used=True)
FREE = FileFact(path="/new/a", real="/new/a", kind="absent")
IMAGE = Image(node="n", file="/a", format="raw", virtual_size=SIZE)
BASE = Image(node="b", file="/b", format="raw", virtual_size=SIZE)
ASKED = MoveStorage(domain="vm1", dest="/new")


def disk(*chain: Image) -> Disk:
    return Disk(target="vda", backend="d", qdev="d", drive="d", bus="virtio", root="n", chain=chain)


@pytest.mark.parametrize(
    ("request_", "chain", "source", "goes_to", "wanted"),
    [
        (ASKED, (IMAGE,), SOURCE, FREE, True),
        (msgspec.structs.replace(ASKED, strategy="offload"), (IMAGE,), SOURCE, FREE, True),
        (msgspec.structs.replace(ASKED, max_pause_ms=100), (IMAGE,), SOURCE, FREE, True),
        (msgspec.structs.replace(ASKED, max_pause_ms=10), (IMAGE,), SOURCE, FREE, False),
        (msgspec.structs.replace(ASKED, strategy="mirror"), (IMAGE,), SOURCE, FREE, False),
        (msgspec.structs.replace(ASKED, deadline=60.0), (IMAGE,), SOURCE, FREE, False),
        (ASKED, (IMAGE, BASE), SOURCE, FREE, False),
        (ASKED, (msgspec.structs.replace(IMAGE, format="qcow2"),), SOURCE, FREE, False),
        (ASKED, (IMAGE,), msgspec.structs.replace(SOURCE, used=False), FREE, False),
        # The disk is a part of the file, or it ends in the middle of a sector.
        (ASKED, (IMAGE,), msgspec.structs.replace(SOURCE, size=SIZE + 512), FREE, False),
        (ASKED, (IMAGE,), msgspec.structs.replace(SOURCE, size=SIZE - 100), FREE, False),
        (ASKED, (IMAGE,), msgspec.structs.replace(SOURCE, kind="block"), FREE, False),
        (ASKED, (IMAGE,), SOURCE, msgspec.structs.replace(FREE, kind="block"), False),
        (ASKED, (IMAGE,), SOURCE, msgspec.structs.replace(FREE, kind="file"), False),
    ],
)
def test_which_disks_may_be_moved_at_once(
    request_: MoveStorage, chain: tuple[Image, ...], source: FileFact, goes_to: FileFact, *, wanted: bool
) -> None:
    placed = Placed(disk=disk(*chain), file="/new/a", format=chain[0].format, overlay="/a.move7")
    files = Files(facts={"/a": source, "/new/a": goes_to})
    assert may_share(request_, placed, files) is wanted


def test_an_export_has_no_blocks_to_share() -> None:
    placed = Placed(disk=disk(IMAGE), file="nbd://host/x", format="raw", overlay="/a.move7")
    assert not may_share(ASKED, placed, Files(facts={"/a": SOURCE}))
