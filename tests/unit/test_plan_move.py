"""What comes next in a move; where images go; what becomes of snapshots."""

from __future__ import annotations

import msgspec
import pytest

from blockferry.model.blockjob import BlockJob, Mirror
from blockferry.model.move import Layer, Move, MovedDisk, Verdict
from blockferry.model.snapshot import Snapshot, SnapshotDisk
from blockferry.plan.files import DropFile
from blockferry.plan.move import Next, going_over, moved_snapshots, next_of, plan_end, plan_give_up, waiting
from blockferry.plan.plan import Names, Plan, Window
from blockferry.plan.steps import CancelJob

DISKS = tuple(
    MovedDisk(
        target=target,
        source=f"/src/{target}.s1",
        format="qcow2",
        file=f"/dst/{target}.s1",
        file_format="qcow2",
        strategy="offload",
        why="as asked",
        chain=(f"/src/{target}.s1", "/src/base"),
        overlay=f"/src/{target}.s1.move7",
        layers=(f"/src/{target}.s1", "/src/base"),
        backing="/dst/base",
        backing_format="raw",
    )
    for target in ("vda", "vdb")
)
LAYERS = (
    Layer(source="/src/base", format="raw", file="/dst/base", length=10),
    *(
        Layer(source=disk.source, format="qcow2", file=disk.file, length=5, backing="/dst/base", backing_format="raw")
        for disk in DISKS
    ),
)
MOVE = Move(domain="vm", operation=7, disks=DISKS, layers=LAYERS, verify="full")
COPIED = msgspec.structs.replace(MOVE, methods=dict.fromkeys((layer.source for layer in LAYERS), "reflink"))


def mirror(target: str, **more: object) -> Mirror:
    found = Mirror(
        domain="vm",
        target=target,
        operation=7,
        move=7,
        job=f"bf-{target}-m",
        source_node="s",
        source=f"/src/{target}.s1.move7",
        node="x",
        file_node="xf",
        filter_node="t",
        file=f"/dst/{target}.s1",
        format="qcow2",
    )
    return msgspec.structs.replace(found, **more)


def jobs(*mirrors: Mirror) -> dict[str, BlockJob]:
    return {each.target: each for each in mirrors}


PIVOTED = msgspec.structs.replace(COPIED, pivot=9)
VERDICT = Verdict(how="full", compared=1, written=0, seconds=1.0)


@pytest.mark.parametrize(
    ("move", "found", "wanted"),
    [
        (MOVE, jobs(), "copy"),
        (msgspec.structs.replace(MOVE, methods={"/src/base": "reflink"}), jobs(), "copy"),
        (COPIED, jobs(), "mirror"),
        (COPIED, jobs(mirror("vda")), "mirror"),
        (COPIED, jobs(mirror("vda"), mirror("vdb", state="lost")), "mirror"),
        (COPIED, jobs(mirror("vda"), mirror("vdb", move=None)), "mirror"),
        (COPIED, jobs(mirror("vda"), mirror("vdb")), "pivot"),
        (PIVOTED, jobs(), "verify"),
        (msgspec.structs.replace(PIVOTED, verdict=VERDICT), jobs(), "end"),
        (msgspec.structs.replace(PIVOTED, verify="none"), jobs(), "end"),
        (msgspec.structs.replace(MOVE, state="cancelling"), jobs(), "back"),
    ],
)
def test_what_comes_next(move: Move, found: dict[str, BlockJob], wanted: Next) -> None:
    assert next_of(move, found) == wanted


def test_only_what_no_mirror_works_for_gets_one() -> None:
    assert waiting(COPIED, jobs(mirror("vda"))) == (DISKS[1],)


def test_snapshots_go_with_their_images() -> None:
    kept = SnapshotDisk(target="vda", file="/src/vda.s1", format="qcow2", backing="/src/base", backing_format="raw")
    elsewhere = SnapshotDisk(
        target="sda", file="/src/sda.s1", format="qcow2", backing="/src/sda.img", backing_format="raw"
    )
    snapshot = Snapshot(domain="vm", name="s1", created=1.0, state="running", disks=(kept, elsewhere))
    other = Snapshot(domain="vm", name="s0", created=0.5, state="running", disks=(elsewhere,))
    (changed,) = moved_snapshots(MOVE, (other, snapshot))
    assert [(disk.file, disk.backing) for disk in changed.disks] == [
        ("/dst/vda.s1", "/dst/base"),
        ("/src/sda.s1", "/src/sda.img"),
    ]


def test_snapshots_of_what_was_made_one_image_stay_where_they_were() -> None:
    flat = tuple(msgspec.structs.replace(disk, backing=None, layers=(), overlay=None) for disk in DISKS)
    kept = SnapshotDisk(target="vda", file="/src/vda.s1", format="qcow2", backing="/src/base", backing_format="raw")
    snapshot = Snapshot(domain="vm", name="s1", created=1.0, state="running", disks=(kept,))
    assert moved_snapshots(msgspec.structs.replace(MOVE, disks=flat, layers=()), (snapshot,)) == ()


def test_an_end_removes_what_it_is_told_and_is_recorded_first() -> None:
    plan = plan_end(PIVOTED, drop=("/src/base",))
    assert plan.record.move is not None
    assert plan.record.move.state == "done"
    assert plan.prepare == ()
    assert plan.settle == (DropFile(path="/src/base"),)


def test_giving_up_ends_mirrors_before_it_removes_what_they_write_to() -> None:
    plan = plan_give_up(COPIED, (mirror("vda"),), {"/dst/vda.s1": (1, 2)}, "on request")
    assert plan.record.move is not None
    assert plan.record.move.state == "cancelling"
    assert plan.record.ended == {"vda": "cancelled"}
    assert isinstance(plan.settle[0], CancelJob)
    assert plan.settle[-1].text == "remove /dst/vda.s1, which we created"


def test_nobody_goes_over_without_all_of_the_mirrors() -> None:
    window = Window(ends_on="destination", resume=True, disks=(), steps=())
    plan = Plan(what="pivot", text="pivot", window=window)
    with pytest.raises(AssertionError):
        going_over(COPIED, plan, (mirror("vda"),), names=Names("abcd", 9), operation=9, snapshots=())
    gone = going_over(COPIED, plan, (mirror("vda"), mirror("vdb")), names=Names("abcd", 9), operation=9, snapshots=())
    assert gone.record.move is not None
    assert gone.record.move.pivot == 9
