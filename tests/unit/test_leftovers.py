"""What is ours and nobody needs: found by its name, and nothing else is touched."""

import msgspec
import pytest
from test_plan_resume import COPY, ROUND, counting
from test_recover import observed

from blockferry.model.blockjob import BlockJob, JobEnd
from blockferry.plan.leftovers import unused_bitmaps, unused_jobs, unused_nodes
from blockferry.plan.steps import CancelJob, RemoveNode
from blockferry.plan.tracking import LeaveDestination, RemoveBitmap


def test_a_job_that_nobody_knows_as_working() -> None:
    seen = counting(1, mirror="ready")
    assert unused_jobs(seen, "abcd", ()) == (CancelJob(job=COPY.job),)
    assert unused_jobs(seen, "abcd", (msgspec.structs.replace(COPY, state="lost"),)) == (CancelJob(job=COPY.job),)
    assert unused_jobs(seen, "abcd", (COPY,)) == ()
    assert unused_jobs(seen, "1234", ()) == ()


def test_nodes_that_nothing_uses_are_closed_from_the_top() -> None:
    seen = observed(
        {"vda": "bfabcd-1-vda-s"},
        nodes=("bf1234-1-vda-x", "disk0", "bfabcd-3-vdb-x"),
        backing={"bfabcd-2-vda-x": "bfabcd-2-vda-y0", "bfabcd-2-vda-y0": "bfabcd-2-vda-y1"},
    )
    lower = ("bfabcd-2-vda-x", "bfabcd-2-vda-y0", "bfabcd-2-vda-y1")
    steps = unused_nodes(seen, "abcd", ())
    assert all(isinstance(step, RemoveNode) and step.if_unused for step in steps)
    names = [step.node for step in steps if isinstance(step, RemoveNode)]
    assert sorted(names) == sorted((*lower, "bfabcd-3-vdb-x"))
    assert [name for name in names if name in lower] == list(lower)


def test_nodes_in_use_are_left() -> None:
    seen = observed({"vda": "bfabcd-1-vda-s"}, backing={"bfabcd-1-vda-s": "bfabcd-2-vda-s", "mine": "bfabcd-4-vdb-s"})
    assert unused_nodes(seen, "abcd", ()) == ()


def test_a_destination_that_may_be_gone_on_with_is_left_as_such() -> None:
    seen = observed({"vda": "n"}, nodes=("x", "bfabcd-7-vda-x"))
    lost = msgspec.structs.replace(COPY, state="lost", node="bfabcd-7-vda-x")
    assert unused_nodes(seen, "abcd", (lost,)) == (LeaveDestination(node="bfabcd-7-vda-x", file="/x"),)


OUR_COPY = msgspec.structs.replace(COPY, node="bfabcd-7-vda-x")


@pytest.mark.parametrize("job", [OUR_COPY, msgspec.structs.replace(ROUND, then=OUR_COPY)])
def test_a_destination_that_a_working_job_needs(job: BlockJob) -> None:
    """Its round has ended between the two questions: nothing uses the node, and the next round will."""
    seen = observed({"vda": "n"}, nodes=(OUR_COPY.node,))
    assert unused_nodes(seen, "abcd", (job,)) == ()
    assert unused_nodes(seen, "abcd", (msgspec.structs.replace(job, state="lost"),)) != ()


@pytest.mark.parametrize(
    ("state", "kept"), [("active", True), ("cancelled", True), ("lost", True), ("pivoted", False), ("finished", False)]
)
def test_a_bitmap_that_may_be_used(state: JobEnd, *, kept: bool) -> None:
    ours = RemoveBitmap(node="n", bitmap="bfabcd-3-vda-k")
    for job in (msgspec.structs.replace(COPY, state=state), msgspec.structs.replace(ROUND, state=state)):
        assert unused_bitmaps(counting(1), "abcd", (job,)) == (() if kept else (ours,))
        assert unused_bitmaps(counting(1, name="bfabcd-2-vda-k"), "abcd", (job,)) != ()
    elsewhere = msgspec.structs.replace(COPY, state=state, source_node="another")
    assert unused_bitmaps(counting(1), "abcd", (elsewhere,)) == (() if state == "active" else (ours,))


def test_bitmaps_of_others_are_left() -> None:
    for name in ("backup", "bf1234-3-vda-k"):
        assert unused_bitmaps(counting(1, name=name), "abcd", ()) == ()
