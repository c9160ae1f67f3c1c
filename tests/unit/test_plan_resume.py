"""What a destination lacks, which rounds follow, and which bitmaps are of no more use."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_recover import GONE, observed

from blockferry.model.blockjob import ChainJob, Layer, Mirror
from blockferry.model.domain import Observation
from blockferry.model.files import FileStamp
from blockferry.model.graph import Bitmap, Graph
from blockferry.model.job import Job
from blockferry.plan.chain import has_ended, leave_window
from blockferry.plan.copy import close_job
from blockferry.plan.plan import Plan, Window
from blockferry.plan.recover import Evidence, Interrupted, decide, shows
from blockferry.plan.resume import (
    EXTENTS_MAX,
    LAST_ROUND_BYTES,
    LAST_ROUND_MAX_BYTES,
    Left,
    doubt,
    lacking,
    plan_round,
)
from blockferry.plan.steps import CancelJob, RemoveNode, Resume, StartBackup, StartMirror, Stop
from blockferry.plan.tracking import CHUNK, AddBitmap, LeaveDestination, OpenAgain

COPY = Mirror(
    domain="vm",
    target="vda",
    operation=7,
    job="bfabcd-7-vda-m",
    source_node="n",
    source="/n",
    node="x",
    file_node="xf",
    filter_node="t",
    file="/x",
    format="raw",
    bitmap="bfabcd-3-vda-k",
    exact=True,
)
ROUND = ChainJob(
    domain="vm",
    target="vda",
    operation=7,
    job="bfabcd-7-vda-f",
    type="resume",
    top=Layer(node="x", file="/x", format="raw"),
    base=None,
    then=COPY,
    lacking=1 << 30,
)


def counting(
    count: int, *, mirror: str | None = None, running: bool = True, name: str = "bfabcd-3-vda-k"
) -> Observation:
    """vda on node n, whose bitmap counts so many bytes; with the mirror job in that state."""
    seen = observed({"vda": "n"}, running=running)
    nodes = {
        key: msgspec.structs.replace(node, bitmaps={name: Bitmap(count=count)})
        for key, node in seen.graph.nodes.items()
    }
    jobs = {COPY.job: Job(id=COPY.job, type="mirror", status=mirror)} if mirror else {}
    return msgspec.structs.replace(seen, graph=Graph(nodes, seen.graph.edges), jobs=jobs)


# --- what a destination lacks ---------------------------------------------------------------------------------


def extents(size: int) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """Extents of data in multiples of 512 bytes, in their order, none touching another."""
    edges = st.lists(st.integers(0, size // 512), unique=True, max_size=60).map(sorted)
    return edges.map(
        lambda found: tuple(
            (start * 512, (stop - start) * 512) for start, stop in zip(found[::2], found[1::2], strict=False)
        )
    )


SIZE = 40 * CHUNK + 512


@given(extents(SIZE))
def test_property_all_that_is_not_wholly_data_is_lacking_and_nothing_else(data: tuple[tuple[int, int], ...]) -> None:
    found = lacking(data, SIZE)
    for start in range(0, SIZE, CHUNK):
        stop = min(start + CHUNK, SIZE)
        held = any(offset <= start and stop <= offset + length for offset, length in data)
        covered = any(offset <= start and stop <= offset + length for offset, length in found)
        assert covered is not held
    assert all(offset % CHUNK == 0 and 0 < length <= SIZE - offset for offset, length in found)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ((), ((0, SIZE),)),
        (((0, SIZE),), ()),
        (((0, SIZE - 512),), ((40 * CHUNK, 512),)),
        (((512, SIZE - 512),), ((0, CHUNK),)),
        (((CHUNK - 512, 512), (2 * CHUNK, CHUNK + 512)), ((0, 2 * CHUNK), (3 * CHUNK, SIZE - 3 * CHUNK))),
    ],
)
def test_lacking(data: tuple[tuple[int, int], ...], found: tuple[tuple[int, int], ...]) -> None:
    assert lacking(data, SIZE) == found


def test_many_extents_are_joined_where_least_lies_between() -> None:
    size = 4 * EXTENTS_MAX * CHUNK
    every_other = tuple((start, CHUNK) for start in range(0, size, 2 * CHUNK))
    wide = ((size, 100 * CHUNK), (size + 101 * CHUNK, CHUNK))
    found = lacking((*every_other[:-1], *wide), size + 102 * CHUNK)
    assert len(found) == EXTENTS_MAX
    assert found[-1] == (size + 100 * CHUNK, CHUNK), "the widest is not joined over"
    assert found[0][0] == CHUNK


# --- whether it is known --------------------------------------------------------------------------------------

STAMP = FileStamp(device=1, inode=2, size=3, modified=4, changed=5)
FRESH = msgspec.structs.replace(COPY, exact=False, stamps={"/x": STAMP})
GOOD = Left(stamp=STAMP, blank=True, claimed=(1, 2), unit=4096)


@pytest.mark.parametrize(
    ("copy", "left", "words"),
    [
        (FRESH, GOOD, None),
        (FRESH, msgspec.structs.replace(GOOD, claimed=None), None),
        (msgspec.structs.replace(FRESH, blank=True), msgspec.structs.replace(GOOD, blank=False), None),
        (msgspec.structs.replace(FRESH, stamps={}), GOOD, "is not known"),
        (FRESH, Left(), "touched"),
        (FRESH, msgspec.structs.replace(GOOD, stamp=msgspec.structs.replace(STAMP, changed=6)), "touched"),
        (FRESH, msgspec.structs.replace(GOOD, blank=False), "does not tell"),
        (FRESH, msgspec.structs.replace(GOOD, claimed=(1, 9)), "not the file that was made"),
        (FRESH, msgspec.structs.replace(GOOD, unit=2 * CHUNK), "allocates 131072 bytes"),
        (msgspec.structs.replace(FRESH, options={"granularity": 2048}), GOOD, "allocates 4096 bytes"),
        (msgspec.structs.replace(FRESH, options={"granularity": 1 << 20}), GOOD, None),
        (FRESH, msgspec.structs.replace(GOOD, problem="it is corrupt"), "corrupt"),
        # Of a copy that was resumed before all is counted: only that it is untouched is asked.
        (msgspec.structs.replace(FRESH, exact=True), Left(stamp=STAMP), None),
        (msgspec.structs.replace(FRESH, exact=True), Left(), "touched"),
    ],
)
def test_what_is_in_doubt(copy: Mirror, left: Left, words: str | None) -> None:
    found = doubt(copy, left)
    assert (found is None) if words is None else (found is not None and words in found)


# --- rounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "before", "last"),
    [
        (0, 1 << 30, True),
        (LAST_ROUND_BYTES, 1 << 30, True),
        (LAST_ROUND_BYTES + CHUNK, 1 << 30, False),
        (LAST_ROUND_BYTES + CHUNK, LAST_ROUND_BYTES + CHUNK, True),
        (LAST_ROUND_MAX_BYTES + CHUNK, LAST_ROUND_MAX_BYTES, False),
    ],
)
def test_the_last_round_is_the_one_with_little_left_or_no_less(left: int, before: int, *, last: bool) -> None:
    plan = plan_round(counting(left), msgspec.structs.replace(ROUND, lacking=before))
    assert (plan.window is not None) is last
    if last:
        assert plan.record.jobs == (COPY,)
    else:
        (again,) = plan.record.jobs
        assert isinstance(again, ChainJob)
        assert (again.job, again.round, again.lacking) == ("bfabcd-7-vda-f1", 1, left)


@pytest.mark.parametrize("running", [True, False])
def test_the_window(*, running: bool) -> None:
    plan = plan_round(counting(CHUNK, running=running), msgspec.structs.replace(ROUND, job="bfabcd-7-vda-f3", round=3))
    assert plan.window is not None
    steps = plan.window.steps
    assert isinstance(steps[0], Stop) is running
    (backup,) = [step for step in steps if isinstance(step, StartBackup)]
    (mirror,) = [step for step in steps if isinstance(step, StartMirror)]
    assert (backup.job, backup.speed, mirror.sync) == ("bfabcd-7-vda-f4", 0, "none")
    assert any(isinstance(step, Resume) for step in plan.settle) is running
    assert plan.window.resume is running


@pytest.mark.parametrize(
    ("seen", "row"),
    [
        (counting(0, mirror="ready", running=False), "M"),
        (counting(0, mirror="running", running=False), "N"),
        (counting(0, running=False), "N"),
        # Somebody let it run before it was a mirror: what was written then nobody copies.
        (counting(CHUNK, mirror="ready"), "N"),
    ],
)
def test_a_last_round_that_was_interrupted(seen: Observation, row: str) -> None:
    plan = plan_round(counting(CHUNK), ROUND)
    interrupted = Interrupted(state="window", plan=plan, steps={0: "done"})
    assert decide(interrupted, Evidence(seen=seen)).row == row
    assert has_ended(ROUND, seen) is (row == "M")
    assert decide(interrupted, GONE).row == "J"


def test_the_guest_runs_before_the_destination_is_closed() -> None:
    plan = plan_round(counting(CHUNK), ROUND)
    assert isinstance(plan.window, Window)
    steps = leave_window(ROUND, resume=True)
    assert steps == (
        CancelJob(job=COPY.job),
        CancelJob(job="bfabcd-7-vda-f1"),
        CancelJob(job=ROUND.job),
        Resume(),
        LeaveDestination(node="x", file="/x"),
    )
    assert Resume() not in leave_window(ROUND, resume=False)


def test_one_whose_mirror_works_is_only_recorded() -> None:
    plan = plan_round(counting(0, mirror="ready"), ROUND)
    assert (plan.prepare, plan.window, plan.record.jobs) == ((), None, (COPY,))
    assert Resume() not in plan.settle


def test_a_plan_survives_the_journal() -> None:
    for left in (0, 1 << 29):
        plan = plan_round(counting(left), ROUND)
        assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_what_is_seen_of_the_steps() -> None:
    seen = counting(0)
    assert shows(AddBitmap(node="n", bitmap="bfabcd-3-vda-k"), seen)
    assert not shows(AddBitmap(node="n", bitmap="other"), seen)
    assert not shows(AddBitmap(node="gone", bitmap="bfabcd-3-vda-k"), seen)
    assert not shows(OpenAgain(node="x", file="/x", options={}), seen)
    backup = StartBackup(job=COPY.job, device="n", node="x", bitmap="k", filter_node="t")
    assert not shows(backup, seen)
    assert shows(backup, counting(0, mirror="concluded"))


def test_a_destination_without_a_bitmap_is_only_closed() -> None:
    assert close_job(msgspec.structs.replace(COPY, bitmap=None))[1:] == (RemoveNode(node="x"),)
    assert close_job(ROUND) == (CancelJob(job=ROUND.job), LeaveDestination(node="x", file="/x"))
