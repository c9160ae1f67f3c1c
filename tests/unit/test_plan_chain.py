"""Jobs on backing chains: rebase, commit, merge, and what follows when one has ended."""

from typing import Any

import msgspec
import pytest
from test_plan_snapshot import SIZE, Plug, observed

from blockferry import errors
from blockferry.model.blockjob import ChainJob, Layer, Mirror
from blockferry.model.domain import Observation
from blockferry.model.files import Renamed
from blockferry.model.flags import BlockCommit, BlockRebase
from blockferry.model.graph import Edge, Graph
from blockferry.model.job import Job
from blockferry.model.request import Commit, Rebase
from blockferry.model.snapshot import Snapshot, SnapshotDisk
from blockferry.plan.chain import (
    NOBODY,
    Users,
    has_ended,
    joined,
    plan_commit,
    plan_end,
    plan_merge,
    plan_rebase,
)
from blockferry.plan.files import DropFile, SyncFiles
from blockferry.plan.plan import Names, Plan
from blockferry.plan.steps import (
    CancelJob,
    CompleteJobs,
    DismissJobs,
    FinalizeJobs,
    FinalizeStream,
    RemoveNode,
    RequireBacking,
    RequireReady,
    RequireRoots,
    Resume,
    StartCommit,
    StartMirror,
    StartStream,
    Stop,
)
from blockferry.plan.window import as_it_is, keeps_back, settle_as_it_is

# /top on /two on /one on /low.raw, in nodes vda-n, -n1, -n2, -n3.
CHAIN = ("/top", "/two", "/one", "/low.raw")
NODES = dict(zip(CHAIN, ("vda-n", "vda-n1", "vda-n2", "vda-n3"), strict=True))
NAMES = Names("abcd", 5)


def vda(**more: Any) -> Plug:
    return Plug("vda", file="/top", **{"below": tuple((path, SIZE) for path in CHAIN[1:]), **more})


SEEN = observed(vda(), Plug("vdb", fmt="raw"))


def layers(*files: str) -> tuple[Layer, ...]:
    return tuple(
        Layer(node=NODES[file], file=file, format="raw" if file.endswith(".raw") else "qcow2") for file in files
    )


def job_of(plan: Plan) -> ChainJob:
    (job,) = plan.record.jobs
    assert isinstance(job, ChainJob)
    return job


# --- rebase ---------------------------------------------------------------------------------------------------


def rebase(base: str | None = None, seen: Observation = SEEN, disk: str = "vda", **more: Any) -> Plan:
    return plan_rebase("vm1", seen, Rebase(domain="vm1", disk=disk, base=base, **more), names=NAMES, operation=5)


@pytest.mark.parametrize(
    ("base", "node", "leaving"),
    [
        (None, None, ("/two", "/one", "/low.raw")),
        ("/low.raw", "vda-n3", ("/two", "/one")),
        ("/one", "vda-n2", ("/two",)),
    ],
)
def test_rebase(base: str | None, node: str | None, leaving: tuple[str, ...]) -> None:
    made = rebase(base, bandwidth=9)
    (start,) = made.prepare
    assert start == StartStream(
        job="bfabcd-5-vda-r",
        device="vda-n",
        base=node,
        backing_file=base,
        filter_node="bfabcd-5-vda-rt",
        speed=9,
    )
    job = job_of(made)
    assert (job.type, job.top, job.base) == ("rebase", *layers("/top"), layers(base)[0] if base else None)
    assert (job.above, job.leaving, job.remove_files, job.speed) == ("vda-n", layers(*leaving), False, 9)
    assert made.window is None
    assert made.record.authoritative == {"vda": "/top"}
    assert made.notes == (f"left as they are: {', '.join(leaving)}",)


@pytest.mark.parametrize(
    ("asked", "kind", "match"),
    [
        ({"base": "/two"}, errors.DiskUnsuitable, "it backs onto /two already"),
        ({"disk": "vdb"}, errors.DiskUnsuitable, "it has no backing file"),
        ({"base": "/top"}, errors.ImageUnsuitable, "no image under vda's active one"),
        ({"base": "/else"}, errors.ImageUnsuitable, "no image under"),
        ({"disk": "vdz"}, errors.NoSuchDisk, "vdz"),
        ({"flags": int(BlockRebase.COPY)}, errors.UnsupportedFlag, "COPY"),
        ({"flags": int(BlockRebase.RELATIVE)}, errors.UnsupportedFlag, "RELATIVE"),
        ({"seen": observed(vda(filter="mirror_top"))}, errors.DiskBusy, "vda-flt"),
        ({"seen": observed(vda(read_only=True))}, errors.DiskUnsuitable, "read-only"),
    ],
)
def test_rebase_that_won_t_do(asked: dict[str, Any], kind: type[errors.Refused], match: str) -> None:
    with pytest.raises(kind, match=match):
        rebase(**asked)


def test_under_a_filter_a_stream_takes_the_image_and_a_commit_the_filter() -> None:
    seen = observed(vda(filter="throttle"))
    (stream,), (start,) = rebase(seen=seen).prepare, commit(seen=seen).prepare
    assert isinstance(stream, StartStream)
    assert isinstance(start, StartCommit)
    assert (stream.device, start.device) == ("vda-n", "vda-flt")


def mirror(backing: str | None = None, **more: Any) -> Mirror:
    named = {"source_node": "vda-n", "source": "/top", "node": "x", "file_node": "xf", "filter_node": "t"}
    return Mirror(
        **{
            "domain": "vm1", "target": "vda", "operation": 1, "job": "m", "file": "/copy", "format": "qcow2",
            "backing": backing, **named, **more,
        }
    )  # fmt: skip


def fill(backing: str) -> ChainJob:
    top = Layer(node="x", file="/copy", format="qcow2")
    return ChainJob(
        domain="vm1",
        target="vda",
        operation=1,
        job="f",
        type="fill",
        top=top,
        base=layers(backing)[0],
        above="x",
        then=mirror(backing),
        speed=3,
    )


def commit_job() -> ChainJob:
    return job_of(commit(top="/two", base="/one"))


@pytest.mark.parametrize(
    ("jobs", "base", "joins"),
    [
        ((), "/one", False),
        ((mirror("/one"),), "/one", True),
        ((mirror("/one"),), "/./one", True),
        ((mirror(),), None, True),
        ((fill("/low.raw"),), "/low.raw", True),
        ((mirror("/one", state="cancelled"),), "/one", False),
        ((mirror("/one", state="lost"), mirror("/two")), "/two", True),
        ((mirror("/one", target="vdb"),), "/one", False),
    ],
)
def test_rebase_joins_the_copy_that_comes_to_the_same(jobs: tuple[Any, ...], base: str | None, joins: bool) -> None:
    found = joined("vm1", SEEN, Rebase(domain="vm1", disk="vda", base=base), jobs)
    assert found == (jobs[-1] if joins else None)


@pytest.mark.parametrize(
    ("job", "base", "match"),
    [
        (mirror("/one"), "/two", "backs onto /one; a rebase onto /two"),
        (mirror("/one"), None, "backs onto /one; a rebase onto no base"),
        (mirror(), "/one", "backs onto no base; a rebase onto /one"),
        (fill("/low.raw"), "/one", "backs onto /low.raw"),
        (mirror("/one", snapshot="s1"), "/one", "backs onto /one"),  # it ends with its snapshot
    ],
)
def test_rebase_elsewhere_than_the_copy(job: Any, base: str | None, match: str) -> None:
    with pytest.raises(errors.RebaseElsewhere, match=match):
        joined("vm1", SEEN, Rebase(domain="vm1", disk="vda", base=base), (job,))


def test_rebase_joins_no_commit() -> None:
    assert joined("vm1", SEEN, Rebase(domain="vm1", disk="vda", base="/low.raw"), (commit_job(),)) is None


# --- commit ---------------------------------------------------------------------------------------------------


def commit(
    top: str | None = None,
    base: str | None = None,
    flags: int = 0,
    *,
    seen: Observation = SEEN,
    disk: str = "vda",
    snapshots: tuple[Snapshot, ...] = (),
    bandwidth: int = 0,
    users: Users = NOBODY,
) -> Plan:
    request = Commit(domain="vm1", disk=disk, top=top, base=base, flags=flags, bandwidth=bandwidth)
    return plan_commit("vm1", seen, request, snapshots, names=NAMES, operation=5, users=users)


SHALLOW, DELETE, ACTIVE = (int(flag) for flag in (BlockCommit.SHALLOW, BlockCommit.DELETE, BlockCommit.ACTIVE))


@pytest.mark.parametrize(
    ("asked", "kind", "leaving", "base", "above"),
    [
        ((None, None), "active-commit", ("/top", "/two", "/one"), "/low.raw", None),
        (("/top", None), "active-commit", ("/top", "/two", "/one"), "/low.raw", None),
        (("/./top", "/two"), "active-commit", ("/top",), "/two", None),
        ((None, None, SHALLOW), "active-commit", ("/top",), "/two", None),
        ((None, "/one", DELETE | ACTIVE), "active-commit", ("/top", "/two"), "/one", None),
        (("/two", None), "commit", ("/two", "/one"), "/low.raw", "vda-n"),
        (("/two", None, SHALLOW | DELETE), "commit", ("/two",), "/one", "vda-n"),
        (("/one", "/low.raw"), "commit", ("/one",), "/low.raw", "vda-n1"),
    ],
)
def test_commit(asked: tuple[Any, ...], kind: str, leaving: tuple[str, ...], base: str, above: str | None) -> None:
    made = commit(*asked, bandwidth=9)
    job = job_of(made)
    assert (job.type, job.leaving, job.base) == (kind, layers(*leaving), *layers(base))
    assert (job.top, job.above, job.speed) == (*layers(leaving[0]), above, 9)
    assert job.remove_files == bool(asked[2:] and asked[2] & DELETE)
    (start,) = made.prepare
    assert start == StartCommit(
        job="bfabcd-5-vda-c",
        device="vda-n",
        top=NODES[leaving[0]],
        base=NODES[base],
        # QEMU takes a name for the header only where a header stays that has one.
        backing_file=base if above else None,
        filter_node="bfabcd-5-vda-ct",
        active=above is None,
        speed=9,
    )
    assert made.record.authoritative == {"vda": "/top"}  # until it has ended


@pytest.mark.parametrize(
    ("asked", "kind", "match"),
    [
        ({"top": "/low.raw"}, errors.DiskUnsuitable, "/low.raw backs onto nothing"),
        ({"disk": "vdb"}, errors.DiskUnsuitable, "/img/vdb.img backs onto nothing"),
        ({"top": "/else"}, errors.ImageUnsuitable, "no image under vda's active one"),
        ({"base": "/else"}, errors.ImageUnsuitable, "no image under vda's active one"),
        ({"base": "/top"}, errors.ImageUnsuitable, "no image under vda's active one"),
        ({"top": "/one", "base": "/two"}, errors.ImageUnsuitable, "not under /one"),
        ({"top": "/one", "base": "/one"}, errors.ImageUnsuitable, "not under /one"),
        ({"base": "/one", "flags": SHALLOW}, errors.BadRequest, "say one"),
        ({"flags": int(BlockCommit.RELATIVE)}, errors.UnsupportedFlag, "RELATIVE"),
        ({"flags": 1 << 9}, errors.UnsupportedFlag, "0x200"),
        ({"seen": observed(vda(filter="commit_top"))}, errors.DiskBusy, "vda-flt"),
    ],
)
def test_commit_that_won_t_do(asked: dict[str, Any], kind: type[errors.Refused], match: str) -> None:
    with pytest.raises(kind, match=match):
        commit(**asked)


@pytest.mark.parametrize(("size", "grows"), [(SIZE, False), (SIZE // 2, False), (SIZE + 512, True)])
def test_commit_never_grows_the_guests_disk(size: int, grows: bool) -> None:
    seen = observed(vda(below=(("/two", SIZE), ("/one", size))))
    if grows:
        with pytest.raises(errors.DiskUnsuitable, match=f"/one has {size} bytes, and /top has {SIZE}"):
            commit(seen=seen)
        assert commit(base="/two", seen=seen)
    else:
        assert commit(seen=seen)


@pytest.mark.parametrize(("base", "shared"), [("/low.raw", True), ("/one", True), ("/two", False)])
def test_commit_into_what_another_disk_stands_on(base: str, shared: bool) -> None:
    other = Plug("vdb", file="/other", below=(("/./one", SIZE), ("/low.raw", SIZE)))
    seen = observed(vda(), other)
    if not shared:
        assert commit(base=base, seen=seen)
        return
    with pytest.raises(errors.DiskUnsuitable, match=f"vdb stands on {base} as well"):
        commit(base=base, seen=seen)


@pytest.mark.parametrize("who", ["vdb", "vm2's vda", "the copy of vdb"])
def test_commit_into_what_somebody_stands_on_under_another_name(who: str) -> None:
    users = {"/low.raw": ("vda", who), "/one": ("vda",), "/two": ("vda",), "/top": ("vda",)}
    assert commit(base="/one", users=users)
    with pytest.raises(errors.DiskUnsuitable, match=f"{who} stands on /low.raw as well"):
        commit(base="/low.raw", users=users)


def snapshot(name: str, *disks: tuple[str, str, str], parent: str | None = None) -> Snapshot:
    """Disks as target, overlay, what it was laid over."""
    return Snapshot(
        domain="vm1",
        name=name,
        created=1,
        state="running",
        parent=parent,
        disks=tuple(
            SnapshotDisk(target=target, file=file, format="qcow2", backing=backing, backing_format="qcow2")
            for target, file, backing in disks
        ),
    )


# Three snapshots, the first of both disks.
S1 = snapshot("s1", ("vda", "/one", "/low.raw"), ("vdb", "/b.one", "/b.low"))
S2 = snapshot("s2", ("vda", "/two", "/one"), parent="s1")
S3 = snapshot("s3", ("vda", "/top", "/two"), parent="s2")
ALL = (S1, S2, S3)
BOTH = observed(vda(), Plug("vdb", file="/b.one", below=(("/b.low", SIZE),)))


def test_commit_says_what_snapshots_lose_by_it() -> None:
    made = commit(top="/two", base="/low.raw", seen=BOTH, snapshots=ALL)
    assert made.notes == (
        "snapshot s2 will be no more: what it kept is written over",
        "snapshot s1 will keep nothing of vda any more: that is written over",
    )
    assert commit(seen=BOTH).notes == ()


# --- merge ----------------------------------------------------------------------------------------------------


def merge(which: Snapshot, seen: Observation = BOTH, snapshots: tuple[Snapshot, ...] = ALL, **how: bool) -> Plan:
    return plan_merge("vm1", seen, which, snapshots, names=NAMES, operation=5, **how)


@pytest.mark.parametrize(
    ("which", "how", "deletes", "spans"),
    [
        (S3, {}, ("s3",), {"vda": (("/top",), "/two")}),
        (S2, {}, ("s2",), {"vda": (("/two",), "/one")}),
        (S1, {}, ("s1",), {"vda": (("/one",), "/low.raw"), "vdb": (("/b.one",), "/b.low")}),
        (S2, {"children": True}, ("s2", "s3"), {"vda": (("/top", "/two"), "/one")}),
        (S3, {"children": True}, ("s3",), {"vda": (("/top",), "/two")}),
        (
            S1,
            {"children": True},
            ("s1", "s2", "s3"),
            {"vda": (("/top", "/two", "/one"), "/low.raw"), "vdb": (("/b.one",), "/b.low")},
        ),
        (S1, {"only_children": True}, ("s2", "s3"), {"vda": (("/top", "/two"), "/one")}),
        (S2, {"only_children": True}, ("s3",), {"vda": (("/top",), "/two")}),
    ],
)
def test_merge(
    which: Snapshot, how: dict[str, bool], deletes: tuple[str, ...], spans: dict[str, tuple[tuple[str, ...], str]]
) -> None:
    made = merge(which, **how)
    jobs = {job.target: job for job in made.record.jobs if isinstance(job, ChainJob)}
    found = {
        target: (tuple(layer.file for layer in job.leaving), job.base.file if job.base else None)
        for target, job in jobs.items()
    }
    assert found == spans
    assert [type(step) for step in made.prepare] == [StartCommit] * len(spans)
    for job in jobs.values():
        assert (job.deletes, job.remove_files) == (deletes, True)
        assert job.type == ("active-commit" if job.leaving[0].file in ("/top", "/b.one") else "commit")
    removed = ", ".join(file for leaving, _base in spans.values() for file in leaving)
    assert made.notes == (f"removed once they are merged: {removed}",)
    assert made.record.authoritative == {t: "/top" if t == "vda" else "/b.one" for t in spans}
    assert not made.record.forget  # once it has ended


@pytest.mark.parametrize(
    ("which", "below", "how", "reason"),
    [
        (S3, ("/two", "/one"), {"only_children": True}, "it has no children"),
        (S2, ("/one", "/low.raw"), {}, "/two is not in the chain of vda any more"),
        (S2, ("/two",), {}, "/two does not back onto /one any more"),
        (S2, ("/two", "/else"), {}, "/two does not back onto /one any more"),
        (S2, ("/more", "/two", "/one"), {"children": True}, "/top does not back onto /two any more"),
    ],
)
def test_merge_of_a_chain_that_is_another(
    which: Snapshot, below: tuple[str, ...], how: dict[str, bool], reason: str
) -> None:
    seen = observed(vda(below=tuple((path, SIZE) for path in below)))
    with pytest.raises(errors.SnapshotNotMergeable, match=reason):
        merge(which, seen, **how)


def test_merge_over_an_overlay_of_no_snapshot() -> None:
    """s3 was taken on an overlay that is not remembered."""
    above = snapshot("s3", ("vda", "/top", "/more"), parent="s2")
    seen = observed(vda(below=tuple((path, SIZE) for path in ("/more", "/two", "/one"))))
    known = (S2, above)
    with pytest.raises(errors.SnapshotNotMergeable, match="/more, which is of none of these snapshots, lies between"):
        merge(S2, seen, known, children=True)
    assert [layer.file for layer in job_of(merge(S2, seen, known)).leaving] == ["/two"]
    assert [layer.file for layer in job_of(merge(above, seen, known)).leaving] == ["/top"]


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        (observed(vda()), errors.NoSuchDisk),  # vdb was unplugged
        (observed(vda(), Plug("vdb", file="/b.one", below=(("/b.low", SIZE),), filter="mirror_top")), errors.DiskBusy),
        (observed(vda(), Plug("vdb", file="/b.one", below=(("/b.low", 2 * SIZE),))), errors.DiskUnsuitable),
    ],
)
def test_merge_is_of_all_disks_or_none(seen: Observation, kind: type[errors.Refused]) -> None:
    with pytest.raises(kind, match="vdb"):
        merge(S1, seen)


# --- what follows an end --------------------------------------------------------------------------------------


def rewired(seen: Observation, **edges: str | None) -> Observation:
    """With other backings, by parent in nodes of vda (n, n1...)."""
    parents = {f"vda-{name}" for name in edges}
    kept = {edge for edge in seen.graph.edges if not (edge.parent in parents and edge.role == "backing")}
    new = {Edge(f"vda-{name}", "backing", f"vda-{below}") for name, below in edges.items() if below}
    return again(seen, Graph(seen.graph.nodes, frozenset(kept | new)))


def moved(seen: Observation, node: str) -> Observation:
    """With vda on another node."""
    kept = {edge for edge in seen.graph.edges if edge.parent != "vda-dev"}
    return again(seen, Graph(seen.graph.nodes, frozenset(kept | {Edge("vda-dev", "root", node)})))


def again(seen: Observation, graph: Graph) -> Observation:
    disks = []
    for disk in seen.disks:
        root = graph.child(disk.backend, "root")
        assert root is not None
        disks.append(msgspec.structs.replace(disk, root=root, chain=graph.chain(root)))
    return msgspec.structs.replace(seen, graph=graph, disks=tuple(disks))


PAUSED = msgspec.structs.replace(SEEN, running=False, status="paused")


def close(*roots: str) -> list[RemoveNode]:
    return [RemoveNode(node=f"vda-{kind}{n}", if_unused=True) for n in roots for kind in ("n", "f")]


def test_end_of_a_commit_needs_no_instant() -> None:
    job = job_of(commit("/two", "/low.raw", DELETE))
    made = plan_end(SEEN, job, ())
    files = ("/top", "/low.raw")
    renamed = Renamed(path="/top", was=("/two", "qcow2"), becomes=("/low.raw", "raw"))
    assert made.prepare == (
        SyncFiles(paths=files, nodes=("vda-n3",), renamed=renamed),
        FinalizeJobs(jobs=(job.job,)),
        SyncFiles(paths=files),
        RequireBacking(node="vda-n", backing="vda-n3"),
    )
    assert made.window is None
    assert (made.record.authoritative, made.record.ended) == ({"vda": "/top"}, {"vda": "done"})
    assert list(made.settle) == [
        DismissJobs(jobs=(job.job,)),
        *close("1", "2"),
        DropFile(path="/two"),
        DropFile(path="/one"),
    ]


@pytest.mark.parametrize("seen", [SEEN, PAUSED])
def test_end_of_an_active_commit_is_an_instant(seen: Observation) -> None:
    job = job_of(commit())
    made = plan_end(seen, job, ())
    assert made.prepare == (SyncFiles(paths=("/top", "/low.raw")),)
    assert made.window is not None
    jobs = (job.job,)
    steps = (
        RequireReady(jobs=jobs),
        CompleteJobs(jobs=jobs),
        FinalizeJobs(jobs=jobs),
        RequireRoots(roots={"vda-dev": "vda-n3"}),
    )
    assert made.window.steps == ((Stop(), *steps) if seen.running else steps)
    assert (made.window.resume, made.window.chain) == (seen.running, job)
    assert made.record.authoritative == {"vda": "/low.raw"}
    resume = [Resume()] if seen.running else []
    assert list(made.settle) == [*resume, DismissJobs(jobs=jobs), *close("", "1", "2")]
    assert "the guest goes over to /low.raw" in made.text


FORGETS, FORGETS_PAUSED = (msgspec.structs.replace(seen, forgets=True) for seen in (SEEN, PAUSED))


def test_end_of_an_active_commit_of_a_guest_that_forgets_holds_its_requests() -> None:
    job = job_of(commit())
    made = plan_end(FORGETS, job, ())
    jobs = (job.job,)
    assert made.window is not None
    assert made.window.steps == (CompleteJobs(jobs=jobs, running=True),)
    assert (made.window.held, made.window.holding, made.window.resume) == (True, jobs, True)
    roots = RequireRoots(roots={"vda-dev": "vda-n3"})
    switch = [FinalizeJobs(jobs=jobs, recorded=True), roots]
    assert list(made.settle) == [*switch, Resume(), DismissJobs(jobs=jobs), *close("", "1", "2")]
    stopped = plan_end(FORGETS_PAUSED, job, ())
    assert stopped == plan_end(PAUSED, job, ())


def test_an_active_commit_that_was_held_back_for_nothing() -> None:
    """Recorded, and then somebody cancelled it: the guest is where it was, and nothing of the chain goes."""
    job = job_of(commit())
    made = plan_end(FORGETS, job, ())
    assert made.window is not None
    over = msgspec.structs.replace(FORGETS, jobs={})
    assert keeps_back(made.window, over)
    waits = {job.job: Job(id=job.job, type="commit", status="pending")}
    assert not keeps_back(made.window, msgspec.structs.replace(FORGETS, jobs=waits))
    found = as_it_is(made.window, over)
    assert (found.authoritative, found.ended) == ({"vda": "/top"}, {"vda": "lost"})
    assert settle_as_it_is(made.window, over, made.settle) == (CancelJob(job=job.job), Resume())


def test_end_of_a_rebase_of_a_guest_that_forgets_flushes_by_itself() -> None:
    job = job_of(rebase(None))
    made = plan_end(FORGETS, job, ALL)
    assert made.window is not None
    assert made.window.steps[:2] == (SyncFiles(paths=(), nodes=("vda-n",)), FinalizeStream(job=job.job))
    assert not made.window.held
    paused = plan_end(FORGETS_PAUSED, job, ALL)
    assert paused.window is not None
    assert isinstance(paused.window.steps[0], Stop)


@pytest.mark.parametrize("seen", [SEEN, PAUSED])
@pytest.mark.parametrize(("base", "node"), [(None, None), ("/low.raw", "vda-n3")])
def test_end_of_a_rebase_flushes_before_the_header_changes(
    seen: Observation, base: str | None, node: str | None
) -> None:
    """By `stop`, also on a guest that is paused."""
    job = job_of(rebase(base))
    made = plan_end(seen, job, ALL)
    renamed = Renamed(path="/top", was=("/two", "qcow2"), becomes=(base, base and "raw"))
    assert made.prepare == (SyncFiles(paths=("/top",), renamed=renamed),)
    assert made.window is not None
    assert made.window.steps == (
        Stop(),
        FinalizeStream(job=job.job),
        SyncFiles(paths=("/top",)),
        RequireBacking(node="vda-n", backing=node),
    )
    assert made.window.resume == seen.running
    assert [step for step in made.settle if isinstance(step, Resume)] == ([Resume()] if seen.running else [])
    # What snapshots keep is in files that are left as they are.
    assert (made.record.changed, made.record.forget) == ((), ())
    assert not [step for step in made.settle if isinstance(step, DropFile)]
    assert made.record.authoritative == {"vda": "/top"}


def test_end_of_a_fill_is_the_begin_of_its_mirror() -> None:
    job = fill("/low.raw")
    made = plan_end(SEEN, job, ALL)
    assert job.then is not None
    assert made.prepare == (
        SyncFiles(paths=(job.top.file,), nodes=("x",)),
        FinalizeStream(job="f"),
        SyncFiles(paths=(job.top.file,)),
        RequireBacking(node="x", backing="vda-n3"),
        StartMirror.of(job.then, "top", 3),
    )
    assert (made.record.jobs, made.record.ended) == ((job.then,), {})
    assert (made.window, made.settle) == (None, ())


ENDS = {
    "commit": (job_of(commit("/two", "/low.raw")), rewired(SEEN, n="n3")),
    "active-commit": (job_of(commit()), moved(SEEN, "vda-n3")),
    "rebase": (job_of(rebase("/one")), rewired(SEEN, n="n2")),
    "rebase of all": (job_of(rebase()), rewired(SEEN, n=None)),
}


@pytest.mark.parametrize("what", sorted(ENDS))
def test_an_end_that_the_graph_shows_is_only_flushed_and_recorded(what: str) -> None:
    """A crash or a lost reply came after it: the record is the one that it would have been."""
    job, after = ENDS[what]
    assert not has_ended(job, SEEN)
    assert has_ended(job, after)
    made, before = plan_end(after, job, ALL), plan_end(SEEN, job, ALL)
    files = {"commit": ("/top", "/low.raw"), "active-commit": ("/low.raw",)}.get(what, ("/top",))
    becomes = {"commit": ("/low.raw", "raw"), "rebase": ("/one", "qcow2")}.get(what, (None, None))
    renamed = Renamed(path="/top", was=("/two", "qcow2"), becomes=becomes) if what != "active-commit" else None
    assert (made.prepare, made.window) == ((SyncFiles(paths=files, renamed=renamed),), None)
    assert made.record == before.record
    assert [step for step in before.settle if not isinstance(step, Resume)] == list(made.settle)


@pytest.mark.parametrize("what", sorted(ENDS))
def test_an_end_that_can_t_be_flushed_is_recorded_and_removes_nothing(what: str) -> None:
    job, after = ENDS[what]
    flushed, made = plan_end(after, job, ALL), plan_end(after, job, ALL, unflushed="it is ill")
    assert (made.prepare, made.window) == ((), None)
    lost = msgspec.structs.replace(flushed.record, ended={"vda": "lost"}, reason="it is ill")
    assert made.record == lost
    assert list(made.settle) == [step for step in flushed.settle if not isinstance(step, DropFile)]
    with pytest.raises(AssertionError):
        plan_end(SEEN, job, ALL, unflushed="it is ill")


def test_the_end_is_not_shown_when_the_disk_or_the_overlay_is_gone() -> None:
    without = observed(Plug("vdb"))
    for job, _after in ENDS.values():
        assert not has_ended(job, without)


def test_end_of_nodes_that_nobody_named() -> None:
    """QEMU frees them itself."""
    job = job_of(commit("/two", "/one"))
    anonymous = msgspec.structs.replace(job, leaving=(Layer(node="#block123", file="/two", format="qcow2"),))
    assert plan_end(SEEN, anonymous, ()).settle == (DismissJobs(jobs=(job.job,)),)


def test_what_is_no_file_is_not_removed() -> None:
    job = job_of(commit("/two", "/one", DELETE))
    remote = msgspec.structs.replace(job, leaving=(msgspec.structs.replace(job.leaving[0], file="nbd://h/x"),))
    assert not [step for step in plan_end(SEEN, remote, ()).settle if isinstance(step, DropFile)]


@pytest.mark.parametrize(("status", "busy"), [("running", True), ("pending", True), ("concluded", False)])
def test_a_disk_with_a_job_on_a_lower_layer_is_busy(status: str, busy: bool) -> None:
    """A stream or intermediate commit leaves no filter on top; QEMU shows the job as a parent of its nodes."""
    graph = Graph(SEEN.graph.nodes, SEEN.graph.edges | {Edge("theirs", "intermediate node", "vda-n2")})
    jobs = {"theirs": Job(id="theirs", type="stream", status=status)}
    seen = msgspec.structs.replace(SEEN, graph=graph, jobs=jobs)
    if busy:
        with pytest.raises(errors.DiskBusy, match="theirs"):
            commit(seen=seen)
        with pytest.raises(errors.DiskBusy, match="theirs"):
            rebase(seen=seen)
    else:
        assert commit(seen=seen)
