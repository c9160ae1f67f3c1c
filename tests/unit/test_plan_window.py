"""The instant: what is done in it, and the way out of it from wherever it was left."""

import msgspec
import pytest
from test_recover import TARGETS, mirror, observed, windowed

from blockferry import errors
from blockferry.model.domain import Observation
from blockferry.model.files import ImageFact
from blockferry.plan.files import SyncFiles
from blockferry.plan.plan import Names, Plan, Window
from blockferry.plan.steps import (
    AddNode,
    CancelJob,
    CheckServers,
    CompleteJobs,
    FinalizeJobs,
    ReadBack,
    RemoveNode,
    RequireReady,
    RequireRoots,
    Resume,
    SetBacking,
    StartMirror,
    Stop,
)
from blockferry.plan.window import as_it_is, leave, plan_window, settle_as_it_is

READY = dict.fromkeys(TARGETS, ("ready", None))
SOURCES = {target: f"{target}-src" for target in TARGETS}


def plan(seen: Observation, ends_on: str = "destination", **more: object) -> Plan:
    mirrors = more.pop("mirrors", tuple(mirror(target) for target in TARGETS))
    asked = {"names": Names("abcd", 9), "ends_on": ends_on, "what": "pivot", "bases": {}, **more}
    return plan_window("vm1", seen, mirrors, **asked)


def window(plan: Plan) -> Window:
    assert plan.window is not None
    return plan.window


def test_pivot_of_a_guest_that_runs() -> None:
    made = plan(observed(SOURCES, READY, running=True))
    kinds = [type(step) for step in window(made).steps]
    assert kinds == [Stop, RequireReady, CompleteJobs, FinalizeJobs, RequireRoots]
    assert window(made).resume
    assert isinstance(made.settle[0], Resume)  # before anything that could fail
    assert made.record.authoritative == {"vda": "/vda.dst", "vdb": "/vdb.dst"}
    assert made.record.ended == dict.fromkeys(TARGETS, "pivoted")


@pytest.mark.parametrize("ends_on", ["destination", "source"])
def test_a_guest_that_forgets_is_not_stopped(ends_on: str) -> None:
    seen = msgspec.structs.replace(observed(SOURCES, READY, running=True), forgets=True)
    made = plan(seen, ends_on)
    # What fails before they are told to end costs no mirror.
    assert isinstance(made.prepare[-1], RequireReady)
    (drain,) = window(made).steps
    assert isinstance(drain, CompleteJobs)
    assert drain.running
    assert drain.soft_cancel == (ends_on == "source")
    assert window(made).held
    assert window(made).holding == drain.jobs == ("vda-m", "vdb-m")
    # Nothing goes over before it is recorded, and nobody closes anything before all have.
    assert [type(step) for step in made.settle[:3]] == [FinalizeJobs, RequireRoots, Resume]
    on = "x" if ends_on == "destination" else "src"
    assert made.settle[:2] == (
        FinalizeJobs(jobs=drain.jobs, recorded=True),
        RequireRoots(roots={f"{target}-dev": f"{target}-{on}" for target in TARGETS}),
    )


@pytest.mark.parametrize("file", ["nbd://h/x", None])
@pytest.mark.parametrize("running", [True, False])
def test_a_guest_that_forgets_is_held_only_where_it_runs_and_on_files(file: str | None, *, running: bool) -> None:
    """What is on an export is read back before the record, and nobody else may be at it."""
    seen = msgspec.structs.replace(observed(SOURCES, READY, running=running), forgets=True)
    other = mirror("vdb") if file is None else msgspec.structs.replace(mirror("vdb"), file=file)
    made = plan(seen, mirrors=(mirror("vda"), other))
    held = running and file is None
    assert window(made).held == held
    assert any(isinstance(step, Stop) for step in window(made).steps) == (running and not held)


@pytest.mark.parametrize("running", [True, False])
def test_a_held_window_that_is_left_keeps_no_mirror(*, running: bool) -> None:
    """Also one that is ready still was told to end, and would hold the guest's requests when nobody waits for it."""
    seen = msgspec.structs.replace(observed(SOURCES, READY, running=True), forgets=True)
    jobs = {"vda": ("pending", None), "vdb": ("ready", None)}
    way = leave(window(plan(seen)), observed(SOURCES, jobs, running=running, nodes=("vda-x", "vdb-x")), {})
    assert set(way.lost) == set(TARGETS)
    assert way.mirrors == ()
    assert {step.job for step in way.steps if isinstance(step, CancelJob)} >= {"vda-m", "vdb-m"}
    assert not [step for step in way.steps if isinstance(step, StartMirror)]
    assert isinstance(way.steps[-1], Resume)


def test_what_a_held_window_did_not_bring_over_is_not_tried_again() -> None:
    seen = msgspec.structs.replace(observed(SOURCES, READY, running=True), forgets=True)
    made = plan(seen)
    split = observed({"vda": "vda-x", "vdb": "vdb-src"}, {"vdb": ("concluded", "Operation canceled")}, running=True)
    found = as_it_is(window(made), split)
    assert found.authoritative == {"vda": "/vda.dst", "vdb": "/vdb.src"}
    assert found.ended == {"vda": "pivoted", "vdb": "lost"}
    steps = settle_as_it_is(window(made), split, made.settle)
    assert not [step for step in steps if isinstance(step, FinalizeJobs | RequireRoots)]
    assert [step.job for step in steps if isinstance(step, CancelJob)] == ["vdb-m"]


@pytest.mark.parametrize("ends_on", ["destination", "source"])
def test_a_guest_that_is_paused_is_neither_stopped_nor_let_run(ends_on: str) -> None:
    made = plan(observed(SOURCES, READY), ends_on)
    steps = [*made.prepare, *window(made).steps, *made.settle]
    assert not [step for step in steps if isinstance(step, Stop | Resume)]
    assert not window(made).resume


def test_finish_stays_on_the_sources() -> None:
    made = plan(observed(SOURCES, READY, running=True), "source")
    (complete,) = [step for step in window(made).steps if isinstance(step, CompleteJobs)]
    (roots,) = [step for step in window(made).steps if isinstance(step, RequireRoots)]
    assert complete.soft_cancel
    assert roots.roots == {"vda-dev": "vda-src", "vdb-dev": "vdb-src"}
    assert made.record.authoritative == {"vda": "/vda.src", "vdb": "/vdb.src"}
    assert made.record.ended == dict.fromkeys(TARGETS, "finished")


@pytest.mark.parametrize(
    ("jobs", "kind", "match"),
    [
        ({"vda": ("ready", None)}, errors.JobLost, "vdb"),
        ({"vda": ("ready", None), "vdb": ("concluded", None)}, errors.JobLost, "concluded"),
        ({"vda": ("ready", "EIO"), "vdb": ("ready", None)}, errors.JobLost, "vda.*EIO"),
        ({"vda": ("running", None), "vdb": ("ready", None)}, errors.JobNotReady, "vda"),
        ({"vda": ("ready", None), "vdb": ("pending", None)}, errors.JobNotReady, "vdb"),
    ],
)
def test_job_that_is_not_ready(jobs: dict[str, tuple[str, str | None]], kind: type[errors.Refused], match: str) -> None:
    with pytest.raises(kind, match=match):
        plan(observed(SOURCES, jobs, running=True))


def test_disk_that_is_not_what_was_mirrored() -> None:
    with pytest.raises(errors.JobLost, match=r"no longer stands on /vdb\.src"):
        plan(observed({"vda": "vda-src", "vdb": "other"}, READY))
    with pytest.raises(errors.NoSuchDisk, match="vdb"):
        plan(observed({"vda": "vda-src"}, READY))


def test_servers_are_asked_before_the_guest_is_stopped() -> None:
    remote = msgspec.structs.replace(mirror("vdb"), file="nbd://h/x")
    made = plan(observed(SOURCES, READY, running=True), mirrors=(mirror("vda"), remote))
    (check,) = [step for step in made.prepare if isinstance(step, CheckServers)]
    assert (check.uris, check.flush) == ({"vdb": "nbd://h/x"}, ())
    # A server is read from in the window as well; a file before it.
    (back,) = [step for step in window(made).steps if isinstance(step, ReadBack)]
    assert list(back.disks) == ["vdb"]
    (sync,) = [step for step in made.prepare if isinstance(step, SyncFiles)]
    assert (sync.paths, sync.readable) == (("/vda.src", "/vda.dst", "/vdb.src"), ("/vda.dst",))
    made = plan(
        observed(SOURCES, READY, running=True),
        mirrors=(mirror("vda"), msgspec.structs.replace(remote, multi_conn=True)),
    )
    assert [step.flush for step in made.prepare if isinstance(step, CheckServers)] == [("vdb",)]


# --- a destination's own chain --------------------------------------------------------------------------------

BACKED = msgspec.structs.replace(mirror("vda"), backing="/base.copy", backing_format="qcow2")
CHAIN = observed({"vda": "vda-src"}, {"vda": ("ready", None)}, backing={"vda-src": "low"})


def image(path: str, **more: object) -> ImageFact:
    return ImageFact(**{"path": path, "format": "qcow2", "virtual_size": 1 << 20, **more})


def test_shared_base_is_the_node_that_is_there() -> None:
    shared = msgspec.structs.replace(BACKED, backing="/low")
    made = plan(CHAIN, mirrors=(shared,), bases={"vda": (image("/low"),)})
    assert [step.backing for step in made.prepare if isinstance(step, SetBacking)] == ["low"]
    assert not [step for step in made.prepare if isinstance(step, AddNode)]


def test_own_chain_is_opened_from_the_bottom_read_only() -> None:
    made = plan(CHAIN, mirrors=(BACKED,), bases={"vda": (image("/base.copy"), image("/deep", format="raw"))})
    added = [
        (step.node, step.options["file"]["node-name"], step.filename, step.options["read-only"])
        for step in made.prepare
        if isinstance(step, AddNode)
    ]
    assert added == [
        ("bfabcd-9-vda-y1", "bfabcd-9-vda-z1", "/deep", True),
        ("bfabcd-9-vda-y0", "bfabcd-9-vda-z0", "/base.copy", True),
    ]
    top = next(step for step in made.prepare if isinstance(step, AddNode) and step.node.endswith("y0"))
    assert top.options["backing"] == "bfabcd-9-vda-y1"
    (give,) = [step for step in made.prepare if isinstance(step, SetBacking)]
    assert (give.node, give.backing) == ("vda-x", "bfabcd-9-vda-y0")
    assert give.undo() == (msgspec.structs.replace(give, backing=None, if_possible=True),)


@pytest.mark.parametrize(
    ("bases", "match"),
    [
        ((), "not looked at"),
        ((image("/base.copy", problem="No such file"),), "No such file"),
        ((image("/base.copy"), image("/deep", problem="a loop")), "/deep can't be used: a loop"),
        (
            (image("/base.copy", virtual_size=4096),),
            "not whole: 4096 bytes, and /low, which it stands for, has 1048576",
        ),
        ((image("/base.copy", virtual_size=1 << 21),), "not whole"),
    ],
)
def test_chain_that_is_not_whole(bases: tuple[ImageFact, ...], match: str) -> None:
    with pytest.raises(errors.ImageUnsuitable, match=match):
        plan(CHAIN, mirrors=(BACKED,), bases={"vda": bases})


# --- the way out ----------------------------------------------------------------------------------------------


def kinds(
    seen: Observation, dead: dict[str, str] | None = None, resume: bool = True
) -> tuple[list[str], set[str], dict[str, str]]:
    way = leave(msgspec.structs.replace(window(windowed()), resume=resume), seen, dead or {})
    return [type(step).__name__ for step in way.steps], {kept.target for kept in way.mirrors}, way.lost


def test_leave_when_nothing_was_begun() -> None:
    assert kinds(observed(SOURCES, READY)) == (["Resume"], set(TARGETS), {})
    assert kinds(observed(SOURCES, READY), resume=False) == ([], set(TARGETS), {})


def test_leave_when_drained() -> None:
    """A drained mirror holds the guest's I/O: cancelled, and started again, before the guest is let run."""
    jobs = {"vda": ("pending", None), "vdb": ("ready", None)}
    steps, kept, lost = kinds(observed(SOURCES, jobs))
    assert (kept, lost) == (set(TARGETS), {})
    assert steps.index("CancelJob") < steps.index("StartMirror") < steps.index("Resume")
    way = leave(window(windowed()), observed(SOURCES, jobs), {})
    (again,) = [step for step in way.steps if isinstance(step, StartMirror)]
    assert (again.job, again.device, again.node, again.sync) == ("vda-m", "vda-src", "vda-x", "none")


def test_leave_when_one_is_switched() -> None:
    seen = observed(
        {"vda": "vda-x", "vdb": "vdb-src"}, {"vda": ("concluded", None), "vdb": ("pending", None)}, nodes=("vda-src",)
    )
    way = leave(window(windowed()), seen, {})
    starts = [(step.job, step.device, step.node) for step in way.steps if isinstance(step, StartMirror)]
    assert starts == [("vda-b", "vda-x", "vda-src"), ("vda-m", "vda-src", "vda-x"), ("vdb-m", "vdb-src", "vdb-x")]
    assert way.lost == {}
    assert isinstance(way.steps[-1], Resume)
    roots = [step.roots for step in way.steps if isinstance(step, RequireRoots)]
    assert roots == [{"vda-dev": "vda-src"}]


def test_leave_when_the_sources_node_was_freed() -> None:
    """A legacy disk's node goes with its last user: its file is opened again under a name of ours."""
    seen = observed({"vda": "vda-x", "vdb": "vdb-x"}, dict.fromkeys(TARGETS, ("concluded", None)))
    way = leave(window(windowed()), seen, {})
    assert [step.node for step in way.steps if isinstance(step, AddNode)] == ["vda-r", "vdb-r"]
    assert {kept.source_node for kept in way.mirrors} == {"vda-r", "vdb-r"}


def test_leave_when_a_destination_is_dead() -> None:
    seen = observed(SOURCES, {"vda": ("concluded", "EIO"), "vdb": ("ready", None)})
    way = leave(window(windowed()), seen, {})
    assert way.lost == {"vda": "EIO"}
    assert [kept.target for kept in way.mirrors] == ["vdb"]
    removed = {step.node for step in way.steps if isinstance(step, RemoveNode)}
    assert removed == {"vda-x"}
    assert CancelJob(job="vda-m") in way.steps
    dead = leave(window(windowed()), observed(SOURCES, READY), {"vdb": "a read fails"})
    assert dead.lost == {"vdb": "a read fails"}


def test_leave_when_a_job_has_vanished() -> None:
    way = leave(window(windowed()), observed(SOURCES, {"vdb": ("ready", None)}), {})
    assert {kept.target for kept in way.mirrors} | set(way.lost) == set(TARGETS)


def test_a_mirror_is_not_taken_up_again_when_the_guest_has_run() -> None:
    """`sync none` holds only while both images are the same."""
    seen = observed(SOURCES, {"vda": ("pending", None), "vdb": ("ready", None)}, running=True)
    way = leave(window(windowed()), seen, {})
    assert set(way.lost) == {"vda"}
    assert not [step for step in way.steps if isinstance(step, StartMirror)]


def test_as_it_is() -> None:
    seen = observed({"vda": "vda-x", "vdb": "vdb-src"}, {"vda": ("concluded", None)}, running=True)
    truth = as_it_is(window(windowed()), seen)
    assert truth.authoritative == {"vda": "/vda.dst", "vdb": "/vdb.src"}
    assert truth.ended == {"vda": "pivoted", "vdb": "lost"}
    assert truth.forget == ()
