"""What the graph and the jobs show of steps on chains, and the rows that rest on it."""

from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan_chain import ALL, ENDS, SEEN, fill
from test_recover import ALL_DONE, GONE, TARGETS, node, observed, row

from blockferry.model.blockjob import ChainJob
from blockferry.model.domain import Observation
from blockferry.model.graph import Edge, Graph
from blockferry.model.job import STATES, Job
from blockferry.model.operation import OPEN
from blockferry.plan.chain import has_ended, plan_end
from blockferry.plan.files import CreateImage, DropFile, SyncFiles
from blockferry.plan.plan import Plan
from blockferry.plan.recover import ROWS, Evidence, Interrupted, decide, shows
from blockferry.plan.steps import (
    AddNode,
    FinalizeJobs,
    FinalizeStream,
    Pair,
    RequireBacking,
    SetBacking,
    StartCommit,
    StartMirror,
    StartStream,
    Step,
    TakeSnapshots,
)


def seen(
    jobs: Mapping[str, tuple[str, str | None]] | None = None, backing: Mapping[str, str] | None = None
) -> Observation:
    """Jobs by id as (status, error), backing by node."""
    found = {name: Job(id=name, type="x", status=status, error=error) for name, (status, error) in (jobs or {}).items()}
    return msgspec.structs.replace(observed({"vda": "n"}, backing=backing), jobs=found)


COMMIT = StartCommit(job="j", device="n", top="n", base="b", backing_file=None, filter_node="t", active=True)
STREAM = StartStream(job="j", device="n", base="b", backing_file="/b", filter_node="t")
MIRROR = StartMirror(target="vda", job="j", device="n", node="x", filter_node="t", sync="top")
FINALIZE = FinalizeJobs(jobs=("j", "k"))
ON_B, ON_NOTHING = RequireBacking(node="n", backing="b"), RequireBacking(node="n", backing=None)


@pytest.mark.parametrize(
    ("step", "now", "shown"),
    [
        *((start, seen({"j": ("running", None)}), True) for start in (COMMIT, STREAM, MIRROR)),
        *((start, seen({"j": ("running", "EIO")}), False) for start in (COMMIT, STREAM, MIRROR)),
        *((start, seen({"k": ("running", None)}), False) for start in (COMMIT, STREAM, MIRROR)),
        # One that has done all there was to do at once; a mirror that is over is of no use.
        (COMMIT, seen({"j": ("concluded", None)}), True),
        (MIRROR, seen({"j": ("concluded", None)}), False),
        (FINALIZE, seen(), True),
        (FINALIZE, seen({"j": ("concluded", None)}), True),
        (FINALIZE, seen({"j": ("concluded", None), "k": ("pending", None)}), False),
        (FINALIZE, seen({"j": ("concluded", "EIO")}), False),
        (FinalizeStream(job="j"), seen(), True),
        (FinalizeStream(job="j"), seen({"j": ("pending", None)}), False),
        (FinalizeStream(job="j"), seen({"j": ("aborting", None)}), False),
        (ON_B, seen(backing={"n": "b"}), True),
        (ON_B, seen(backing={"n": "c"}), False),
        (ON_B, seen(), False),
        (ON_NOTHING, seen(), True),
        (ON_NOTHING, seen(backing={"n": "b"}), False),
        (SetBacking(node="n", format="qcow2", file_node="f", backing="b"), seen(backing={"n": "b"}), True),
        (AddNode(node="n", options={}), seen(), True),
        (AddNode(node="x", options={}), seen(), False),
        # These leave nothing in the graph.
        (CreateImage(path="/x", format="qcow2", size=1), seen(), True),
        (SyncFiles(paths=("/x",)), seen(), True),
        (DropFile(path="/x"), seen(), True),
    ],
)
def test_shows(step: Step, now: Observation, shown: bool) -> None:
    assert shows(step, now) is shown


def ending(job: ChainJob) -> Plan:
    made = plan_end(SEEN, job, ALL)
    assert made.window is not None
    return made


IN_WINDOWS = {what: ends for what, ends in ENDS.items() if what != "commit"}


@pytest.mark.parametrize("what", sorted(IN_WINDOWS))
@pytest.mark.parametrize("running", [False, True])
def test_window_of_a_chains_job(what: str, running: bool) -> None:
    """What the graph shows decides, whether or not the guest was let run: both chains hold everything."""
    job, after = IN_WINDOWS[what]
    for now, found in ((SEEN, ("N", "leave-chain")), (after, ("M", "record"))):
        evidence = Evidence(seen=msgspec.structs.replace(now, running=running))
        assert row("window", ending(job), evidence) == found
        assert row("preparing", ending(job), evidence, {0: "done"}) == ("E", "undo")
        assert row("planned", ending(job), evidence) == ("B", "nothing")
        assert row("recorded", ending(job), evidence) == ("A", "settle")
    assert row("window", ending(job), GONE) == ("J", "undo")
    assert row("recorded", ending(job), GONE) == ("K", "settle")


def test_end_of_a_commit_is_prepared_and_recorded() -> None:
    """It has no window: what the graph shows of its end is what it is."""
    job, after = ENDS["commit"]
    plan = plan_end(SEEN, job, ALL)
    begun = {0: "done", 1: "done", 2: "done", 3: "intent"}
    assert row("preparing", plan, Evidence(seen=after), begun) == ("C", "record")
    # The header may not be on disk: it is flushed when it is tried again.
    assert row("preparing", plan, Evidence(seen=after), {0: "done", 1: "done", 2: "intent"}) == ("D", "undo")
    assert row("preparing", plan, Evidence(seen=SEEN), begun) == ("D", "undo")
    failed = msgspec.structs.replace(SEEN, jobs={job.job: Job(id=job.job, type="commit", status="concluded")})
    assert row("preparing", plan, Evidence(seen=failed), begun) == ("D", "undo")
    assert row("preparing", plan, GONE, begun) == ("H", "undo")


def test_end_of_a_fill_is_recorded_once_its_mirror_works() -> None:
    plan = plan_end(SEEN, fill("/low.raw"), ())
    graph = Graph(SEEN.graph.nodes | {"x": node("x")}, SEEN.graph.edges | {Edge("x", "backing", "vda-n3")})
    filled = msgspec.structs.replace(SEEN, graph=graph)
    mirrored = msgspec.structs.replace(filled, jobs={"m": Job(id="m", type="mirror", status="running")})
    done: dict[int, str] = dict.fromkeys(range(4), "done")
    begun = done | {4: "intent"}
    assert row("preparing", plan, Evidence(seen=mirrored), begun) == ("C", "record")
    assert row("preparing", plan, Evidence(seen=filled), begun) == ("D", "undo")
    assert row("preparing", plan, Evidence(seen=mirrored), done) == ("D", "undo")


@given(
    st.sampled_from(sorted(IN_WINDOWS)),
    st.tuples(st.booleans(), st.booleans()),
    st.none() | st.tuples(st.sampled_from(sorted(STATES)), st.sampled_from([None, "EIO"])),
    st.sampled_from(sorted(OPEN)),
    st.dictionaries(st.integers(0, 1), st.sampled_from(["intent", "done", "failed", "undone"])),
)
def test_property_the_end_of_a_chains_job_is_recorded_only_where_the_graph_shows_it(
    what: str,
    now_is: tuple[bool, bool],
    status: tuple[str, str | None] | None,
    state: str,
    steps: Mapping[int, str],
) -> None:
    job, after = IN_WINDOWS[what]
    ended, running = now_is
    jobs = {job.job: Job(id=job.job, type="x", status=status[0], error=status[1])} if status else {}
    now = msgspec.structs.replace(after if ended else SEEN, running=running, jobs=jobs)
    decision = decide(Interrupted(state=state, plan=ending(job), steps=steps), Evidence(seen=now))
    assert decision.row in ROWS
    if decision.action == "record":
        assert has_ended(job, now)
    if state == "window":
        assert decision.action == ("record" if ended else "leave-chain")


# --- a snapshot without `transaction` -------------------------------------------------------------------------


def one_by_one(*, in_part: bool = True) -> Plan:
    pairs = [Pair(target=target, node=f"{target}-n", overlay=f"{target}-s", job="u") for target in TARGETS]
    return Plan(
        what="snapshot",
        text="",
        in_part=in_part,
        prepare=(
            *(AddNode(node=f"{target}-s", options={}) for target in TARGETS),
            *(TakeSnapshots(pairs=(pair,), together=False) for pair in pairs),
            StartMirror(target="vda", job="vda-m", device="vda-s", node="x", filter_node="t", sync="top"),
        ),
    )


@given(
    st.sets(st.sampled_from(TARGETS)),
    st.booleans(),
    st.dictionaries(st.integers(0, 4), st.sampled_from(["intent", "done", "failed", "undone"]), min_size=1),
    st.booleans(),
)
def test_property_a_disk_that_has_switched_stays_where_that_was_announced(
    switched: set[str], mirrored: bool, steps: Mapping[int, str], announced: bool
) -> None:
    now = observed(
        {target: f"{target}-{'s' if target in switched else 'n'}" for target in TARGETS},
        {"vda": ("ready", None)} if mirrored else {},
        nodes=tuple(f"{target}-s" for target in TARGETS),
        backing={f"{target}-s": f"{target}-n" for target in switched},
    )
    operation = Interrupted(state="preparing", plan=one_by_one(in_part=announced), steps=steps)
    found = decide(operation, Evidence(seen=now)).row
    whole = steps.keys() == ALL_DONE.keys() and set(steps.values()) <= {"intent", "done"}
    if whole and mirrored and switched == set(TARGETS):
        assert found == "C"
    else:
        assert found == ("P" if announced and switched else "D")
