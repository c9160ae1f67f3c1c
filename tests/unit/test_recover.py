"""The recovery table, a test a row, and what holds for all of it."""

from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockferry.model.blockjob import ChainJob, Layer, Mirror
from blockferry.model.domain import Capabilities, Observation
from blockferry.model.graph import Disk, Edge, Graph, Node
from blockferry.model.job import STATES, Job
from blockferry.model.operation import OPEN
from blockferry.plan.copy import plan_cancel
from blockferry.plan.files import ClaimFile, CreateImage, SyncFiles
from blockferry.plan.plan import Plan, Record, Window, WindowDisk
from blockferry.plan.recover import ROWS, Evidence, Interrupted, decide
from blockferry.plan.steps import AddNode, Pair, SetBacking, StartMirror, TakeSnapshots

TARGETS = ("vda", "vdb")


def node(name: str) -> Node:
    return Node(name=name, driver="qcow2", filename=f"/{name}", virtual_size=1 << 20, read_only=False)


def observed(
    roots: Mapping[str, str],
    jobs: Mapping[str, tuple[str, str | None]] | None = None,
    *,
    running: bool = False,
    nodes: tuple[str, ...] = (),
    backing: Mapping[str, str] | None = None,
) -> Observation:
    """Roots by target, jobs by target as (status, error), backing by node."""
    names = {*roots.values(), *nodes, *(backing or {}), *(backing or {}).values()}
    edges = {Edge(f"{target}-dev", "root", root) for target, root in roots.items()}
    edges |= {Edge(above, "backing", below) for above, below in (backing or {}).items()}
    graph = Graph({name: node(name) for name in names}, frozenset(edges))
    return Observation(
        status="running" if running else "paused",
        running=running,
        graph=graph,
        disks=tuple(
            Disk(
                target=t,
                backend=f"{t}-dev",
                qdev=f"{t}-dev",
                drive=f"{t}-dev",
                bus="virtio",
                root=r,
                chain=graph.chain(r),
            )
            for t, r in roots.items()
        ),
        jobs={
            f"{target}-m": Job(id=f"{target}-m", type="mirror", status=status, error=error)
            for target, (status, error) in (jobs or {}).items()
        },
        capabilities=Capabilities(version="0", commands=frozenset()),
    )


def mirror(target: str) -> Mirror:
    return Mirror(
        domain="vm1",
        target=target,
        operation=1,
        job=f"{target}-m",
        source_node=f"{target}-src",
        source=f"/{target}.src",
        node=f"{target}-x",
        file_node=f"{target}-xf",
        filter_node=f"{target}-t",
        file=f"/{target}.dst",
        format="qcow2",
    )


def windowed(ends_on: str = "destination", *, held: bool = False) -> Plan:
    disks = tuple(
        WindowDisk(
            target=target,
            backend=f"{target}-dev",
            drive=f"{target}-dev",
            source_node=f"{target}-src",
            source_options={},
            back_node=f"{target}-r",
            back_job=f"{target}-b",
            mirror=mirror(target),
        )
        for target in TARGETS
    )
    window = Window(ends_on=ends_on, resume=True, disks=disks, steps=(), held=held)
    return Plan(what="pivot", text="", prepare=(SyncFiles(paths=("/x",)),), window=window, record=Record())


OVERLAY = "/vda.s1"
SNAPSHOT = Plan(
    what="snapshot",
    text="",
    prepare=(
        ClaimFile(path=OVERLAY),
        CreateImage(path=OVERLAY, format="qcow2", size=1),
        AddNode(node="s", options={}),
        TakeSnapshots(pairs=(Pair(target="vda", node="vda-src", overlay="s", job="u"),)),
        StartMirror(target="vda", job="vda-m", device="s", node="x", filter_node="t", sync="top"),
    ),
    record=Record(authoritative={"vda": OVERLAY}),
)
ALL_DONE = dict.fromkeys(range(5), "done")
SWITCHED = observed({t: f"{t}-x" for t in TARGETS}, dict.fromkeys(TARGETS, ("concluded", None)))
HALF = observed({"vda": "vda-x", "vdb": "vdb-src"}, {"vda": ("concluded", None), "vdb": ("pending", None)})
NONE = observed({t: f"{t}-src" for t in TARGETS}, dict.fromkeys(TARGETS, ("ready", None)))
TAKEN = observed({"vda": "s"}, {"vda": ("ready", None)}, running=True, backing={"s": "vda-src"})
RUNNING = {"running": True}


def row(state: str, plan: Plan, evidence: Evidence, steps: Mapping[int, str] | None = None) -> tuple[str, str]:
    decision = decide(Interrupted(state=state, plan=plan, steps=steps or {}), evidence)
    assert decision.why == ROWS[decision.row].why
    return decision.row, decision.action


@pytest.mark.parametrize("plan", [SNAPSHOT, windowed(), plan_cancel((mirror("vda"),), "cancel", "cancelled")])
def test_a_recorded_is_settled(plan: Plan) -> None:
    assert row("recorded", plan, Evidence(seen=NONE)) == ("A", "settle")


@pytest.mark.parametrize("plan", [SNAPSHOT, windowed(), plan_cancel((mirror("vda"),), "cancel", "cancelled")])
@pytest.mark.parametrize("evidence", [Evidence(seen=NONE), Evidence(seen=None, gone=True)])
def test_b_nothing_was_begun(plan: Plan, evidence: Evidence) -> None:
    assert row("planned", plan, evidence) == ("B", "nothing")


@pytest.mark.parametrize("last", ["intent", "done"])
def test_c_all_shows(last: str) -> None:
    assert row("preparing", SNAPSHOT, Evidence(seen=TAKEN), {**ALL_DONE, 4: last}) == ("C", "record")


def test_d_a_step_does_not_show() -> None:
    no_job = observed({"vda": "s"}, running=True, backing={"s": "vda-src"})
    failed = observed({"vda": "s"}, {"vda": ("concluded", "No space left")}, running=True, backing={"s": "vda-src"})
    not_taken = observed({"vda": "vda-src"}, running=True, nodes=("s",))
    for seen in (no_job, failed, not_taken):
        assert row("preparing", SNAPSHOT, Evidence(seen=seen), ALL_DONE) == ("D", "undo")


@pytest.mark.parametrize(
    "steps",
    [
        {0: "intent"},
        dict.fromkeys(range(4), "done"),
        {**ALL_DONE, 1: "intent"},  # the image's header may be torn
        {**ALL_DONE, 4: "undone"},  # it was being undone
        {**ALL_DONE, 4: "failed"},
    ],
)
def test_d_not_all_was_begun_or_done(steps: Mapping[int, str]) -> None:
    assert row("preparing", SNAPSHOT, Evidence(seen=TAKEN), steps) == ("D", "undo")


def test_d_a_backing_that_does_not_show() -> None:
    step = SetBacking(node="x", format="qcow2", file_node="xf", backing="y")
    plan = Plan(what="copy", text="", prepare=(step,))
    seen = observed({"vda": "vda-src"}, nodes=("x", "y"))
    assert row("preparing", plan, Evidence(seen=seen), {0: "intent"}) == ("D", "undo")
    shown = observed({"vda": "vda-src"}, backing={"x": "y"})
    assert row("preparing", plan, Evidence(seen=shown), {0: "intent"}) == ("C", "record")


@pytest.mark.parametrize("seen", [NONE, SWITCHED, HALF])
def test_e_the_window_had_not_begun(seen: Observation) -> None:
    assert row("preparing", windowed(), Evidence(seen=seen), {0: "done"}) == ("E", "undo")


@pytest.mark.parametrize("ends_on", ["destination", "source"])
def test_f_every_disk_is_switched(ends_on: str) -> None:
    on = "x" if ends_on == "destination" else "src"
    seen = observed({t: f"{t}-{on}" for t in TARGETS}, dict.fromkeys(TARGETS, ("concluded", None)))
    assert row("window", windowed(ends_on), Evidence(seen=seen)) == ("F", "record")


def test_f_also_when_the_guest_was_let_run() -> None:
    seen = observed({t: f"{t}-x" for t in TARGETS}, dict.fromkeys(TARGETS, ("concluded", None)), running=True)
    assert row("window", windowed(), Evidence(seen=seen)) == ("F", "record")


@pytest.mark.parametrize(
    "evidence",
    [
        Evidence(seen=NONE),
        Evidence(seen=HALF),
        Evidence(seen=SWITCHED, dead={"vda": "a read fails"}),
        Evidence(seen=observed({t: f"{t}-x" for t in TARGETS}, {"vda": ("concluded", None)})),  # vdb's job vanished
        Evidence(
            seen=observed({t: f"{t}-x" for t in TARGETS}, {"vda": ("concluded", None), "vdb": ("concluded", "EIO")})
        ),
        Evidence(seen=observed({t: f"{t}-src" for t in TARGETS}, dict.fromkeys(TARGETS, ("ready", None)), **RUNNING)),
    ],
)
def test_g_is_brought_back(evidence: Evidence) -> None:
    assert row("window", windowed(), evidence) == ("G", "leave-window")


GONE = Evidence(seen=None, gone=True)


def test_h_qemu_is_gone_and_nothing_was_switched() -> None:
    assert row("preparing", SNAPSHOT, GONE, ALL_DONE) == ("H", "undo")
    other = Evidence(seen=None, gone=True, written=frozenset({"/other"}))
    assert row("preparing", SNAPSHOT, other, ALL_DONE) == ("H", "undo")
    copy = Plan(what="copy", text="", prepare=SNAPSHOT.prepare[:3], record=SNAPSHOT.record)
    written = Evidence(seen=None, gone=True, written=frozenset({OVERLAY}))
    assert row("preparing", copy, written, {0: "done"}) == ("H", "undo")


def test_i_qemu_is_gone_and_overlays_hold_data() -> None:
    evidence = Evidence(seen=None, gone=True, written=frozenset({OVERLAY}))
    assert row("preparing", SNAPSHOT, evidence, ALL_DONE) == ("I", "record")


def test_j_qemu_is_gone_in_the_window() -> None:
    assert row("window", windowed(), GONE, {0: "done"}) == ("J", "undo")


def test_k_qemu_is_gone_after_the_record() -> None:
    assert row("recorded", windowed(), GONE, {0: "done"}) == ("K", "settle")


def test_l_the_guest_runs_with_a_disk_switched() -> None:
    seen = observed(
        {"vda": "vda-x", "vdb": "vdb-src"}, {"vda": ("concluded", None), "vdb": ("pending", None)}, running=True
    )
    assert row("window", windowed(), Evidence(seen=seen)) == ("L", "record-as-is")


@pytest.mark.parametrize("state", sorted(OPEN))
@pytest.mark.parametrize("plan", [SNAPSHOT, windowed()])
def test_w_it_can_not_be_asked(state: str, plan: Plan) -> None:
    assert row(state, plan, Evidence(seen=None), ALL_DONE) == ("W", "wait")


def test_t_it_may_be_frozen() -> None:
    assert row("preparing", SNAPSHOT, Evidence(seen=TAKEN, frozen=True), ALL_DONE) == ("T", "wait")
    assert row("preparing", SNAPSHOT, Evidence(seen=None, frozen=True), ALL_DONE) == ("T", "wait")


COMMIT = ChainJob(
    domain="vm1",
    target="vda",
    operation=1,
    job="c",
    type="commit",
    top=Layer(node="mid", file="/mid", format="qcow2"),
    base=Layer(node="low", file="/low", format="qcow2"),
    above="top",
)
IN_CHAIN = Plan(
    what="job-end", text="", window=Window(ends_on="destination", resume=True, disks=(), steps=(), chain=COMMIT)
)


def chain_seen(backing: str) -> Evidence:
    node = Node(name="top", driver="qcow2", filename="/top", virtual_size=1, read_only=False)
    seen = msgspec.structs.replace(
        observed({}, {}), graph=Graph({"top": node}, frozenset({Edge("top", "backing", backing)}))
    )
    return Evidence(seen=seen)


def test_m_the_graph_shows_the_end_of_a_commit() -> None:
    assert row("window", IN_CHAIN, chain_seen("low")) == ("M", "record")


def test_n_the_chain_is_the_old_one() -> None:
    assert row("window", IN_CHAIN, chain_seen("mid")) == ("N", "leave-chain")


def test_p_some_disks_have_switched_one_after_the_other() -> None:
    pairs = [Pair(target=t, node=f"{t}-n", overlay=f"{t}-s", job="u") for t in TARGETS]
    plan = Plan(
        what="snapshot",
        text="",
        in_part=True,
        prepare=tuple(TakeSnapshots(pairs=(pair,), together=False) for pair in pairs),
    )
    one = msgspec.structs.replace(observed({}, {}), graph=Graph({}, frozenset({Edge("vda-s", "backing", "vda-n")})))
    steps = {0: "done", 1: "failed"}
    assert row("preparing", plan, Evidence(seen=one), steps) == ("P", "record-part")
    assert row("preparing", plan, Evidence(seen=observed({}, {})), steps) == ("D", "undo")


HELD = windowed(held=True)
SPLIT = {"vda": "vda-x", "vdb": "vdb-src"}


@pytest.mark.parametrize("job", [("concluded", "Operation canceled"), ("concluded", None), None])
def test_q_it_is_recorded_that_a_disk_goes_over_and_its_job_is_over(job: tuple[str, str | None] | None) -> None:
    jobs = {"vda": ("concluded", None), **({"vdb": job} if job else {})}
    assert row("recorded", HELD, Evidence(seen=observed(SPLIT, jobs, running=True))) == ("Q", "record-as-is")


@pytest.mark.parametrize(
    ("plan", "roots", "vdb"),
    [
        (HELD, SPLIT, ("pending", None)),  # it is finalized now
        (HELD, {t: f"{t}-x" for t in TARGETS}, ("concluded", None)),
        (windowed(), SPLIT, ("concluded", None)),  # finalized before the record
        (windowed("source", held=True), {t: f"{t}-src" for t in TARGETS}, ("concluded", None)),
    ],
)
def test_a_also_where_no_disk_is_kept_back(plan: Plan, roots: Mapping[str, str], vdb: tuple[str, str | None]) -> None:
    seen = observed(roots, {"vda": ("concluded", None), "vdb": vdb}, running=True)
    assert row("recorded", plan, Evidence(seen=seen)) == ("A", "settle")


def test_k_also_where_the_requests_were_held() -> None:
    """All that a destination lacks, nobody was told of."""
    assert row("recorded", HELD, GONE, {0: "done"}) == ("K", "settle")
    assert row("window", HELD, GONE, {0: "done"}) == ("J", "undo")


def test_every_row_has_a_test() -> None:
    tests = {name.split("_")[1].upper() for name in globals() if name.startswith("test_")}
    assert set(ROWS) <= tests


# --- what holds for all of it ---------------------------------------------------------------------------------

statuses = st.sampled_from(sorted(STATES))
words = st.sampled_from([None, "No space left on device"])
jobs = st.dictionaries(st.sampled_from(TARGETS), st.tuples(statuses, words))
roots = st.fixed_dictionaries({t: st.sampled_from([f"{t}-src", f"{t}-x"]) for t in TARGETS})
seen_any = st.builds(observed, roots, jobs, running=st.booleans(), nodes=st.just(("s", "x")))
dead_any = st.dictionaries(st.sampled_from(TARGETS), st.just("dead"))
evidence_any = st.builds(
    Evidence,
    seen=st.none() | seen_any,
    gone=st.booleans(),
    written=st.frozensets(st.sampled_from([OVERLAY, "/vda.dst", "/vda.src"])),
    dead=dead_any,
)
steps_any = st.dictionaries(st.integers(0, 4), st.sampled_from(["intent", "done", "failed", "undone"]))
plans = st.sampled_from([windowed(on, held=held) for on in ("destination", "source") for held in (False, True)])


@given(plans, evidence_any, steps_any, st.sampled_from(["planned", "preparing"]))
def test_property_a_window_that_had_not_begun_is_never_recorded(
    plan: Plan, evidence: Evidence, steps: Mapping[int, str], state: str
) -> None:
    decision = decide(Interrupted(state=state, plan=plan, steps=steps), evidence)
    assert decision.action in ("nothing", "undo", "wait")


@given(plans, evidence_any, steps_any)
def test_property_a_window_is_recorded_only_when_every_disk_is_where_it_was_to_go(
    plan: Plan, evidence: Evidence, steps: Mapping[int, str]
) -> None:
    decision = decide(Interrupted(state="window", plan=plan, steps=steps), evidence)
    if decision.action != "record":
        return
    assert evidence.seen is not None
    assert not evidence.dead
    assert plan.window is not None
    on = "x" if plan.window.ends_on == "destination" else "src"
    assert {disk.target: disk.root for disk in evidence.seen.disks} == {t: f"{t}-{on}" for t in TARGETS}
    assert {(job.status, job.error) for job in evidence.seen.jobs.values()} == {("concluded", None)}


@given(plans, seen_any, dead_any)
def test_property_a_guest_that_has_run_on_a_destination_is_never_taken_off_it(
    plan: Plan, seen: Observation, dead: Mapping[str, str]
) -> None:
    """Its source is stale by then."""
    decision = decide(Interrupted(state="window", plan=plan, steps={}), Evidence(seen=seen, dead=dead))
    if seen.running and any(disk.root == f"{disk.target}-x" for disk in seen.disks):
        assert decision.action != "leave-window"


@given(st.sampled_from([SNAPSHOT, windowed()]), evidence_any, steps_any, st.sampled_from(sorted(OPEN)))
def test_property_a_decision_is_total_and_repeatable(
    plan: Plan, evidence: Evidence, steps: Mapping[int, str], state: str
) -> None:
    operation = Interrupted(state=state, plan=plan, steps=steps)
    decision = decide(operation, evidence)
    assert decision == decide(operation, evidence)
    assert decision.row in ROWS
    if evidence.seen is None and not evidence.gone:
        assert decision.row == "W"
    if state == "recorded" and decision.row != "W":
        assert decision.action == "settle"


@given(
    evidence_any,
    st.dictionaries(st.integers(0, 4), st.sampled_from(["intent", "done", "failed", "undone"]), max_size=4),
)
def test_property_a_snapshot_that_was_not_begun_to_the_end_is_never_recorded_while_qemu_lives(
    evidence: Evidence, steps: Mapping[int, str]
) -> None:
    decision = decide(Interrupted(state="preparing", plan=SNAPSHOT, steps=steps), evidence)
    if evidence.seen is not None:
        assert decision.action in ("nothing", "undo")
