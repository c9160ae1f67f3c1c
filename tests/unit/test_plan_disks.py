"""Which disk is meant, and what works on it."""

import msgspec
import pytest
from test_plan_snapshot import SIZE, Plug, observed

from blockferry import errors
from blockferry.model.domain import Observation
from blockferry.model.graph import Edge, Graph, Node
from blockferry.model.job import ENDED, STATES, Job
from blockferry.plan.disks import find_disk, job_on, require_suitable, source_options

SEEN = observed(
    Plug("vda", file="/top", below=(("/mid", SIZE), ("/low.raw", SIZE))),
    Plug("vdb", file="/b", below=(("/low.raw", SIZE),)),
)


def working(edge: Edge, status: str = "running", driver: str | None = None) -> Observation:
    """With an edge of a job `theirs`, or of a node of that name and driver, to a node."""
    graph = Graph(SEEN.graph.nodes, SEEN.graph.edges | {edge})
    if driver is not None:
        above = Node(name="theirs", driver=driver, filename="", virtual_size=SIZE, read_only=False)
        return msgspec.structs.replace(SEEN, graph=Graph({**graph.nodes, "theirs": above}, graph.edges))
    job = Job(id="theirs", type="stream", status=status)
    return msgspec.structs.replace(SEEN, graph=graph, jobs={"theirs": job})


@pytest.mark.parametrize("image", ["vda-n", "vda-n1", "vda-n2"])
@pytest.mark.parametrize("status", sorted(STATES))
def test_a_job_on_any_layer_is_on_its_disk_until_it_has_ended(image: str, status: str) -> None:
    seen = working(Edge("theirs", "main node", image), status)
    vda, vdb = seen.disks
    assert job_on(vda, seen) == (None if status in ENDED else "theirs")
    assert job_on(vdb, seen) is None
    if status not in ENDED:
        with pytest.raises(errors.DiskBusy, match="theirs"):
            require_suitable("vm1", vda, seen)


@pytest.mark.parametrize(
    ("driver", "busy"), [("mirror_top", True), ("commit_top", True), ("throttle", False), ("copy-on-read", False)]
)
def test_a_filter_of_a_job_between_two_layers(driver: str, busy: bool) -> None:
    """QEMU puts it above a commit's top; those that people put somewhere are no jobs."""
    seen = working(Edge("theirs", "backing", "vda-n1"), driver=driver)
    assert job_on(seen.disks[0], seen) == ("theirs" if busy else None)


@pytest.mark.parametrize(("driver", "busy"), [("mirror_top", True), ("commit_top", True), ("throttle", False)])
def test_a_filter_on_top(driver: str, busy: bool) -> None:
    seen = observed(Plug("vda", filter=driver))
    assert job_on(seen.disks[0], seen) == ("vda-flt" if busy else None)


@pytest.mark.parametrize("driver", ["mirror_top", "commit_top"])
@pytest.mark.parametrize("status", [None, *sorted(ENDED), "running", "pending"])
def test_a_filter_whose_job_is_no_more(driver: str, status: str | None) -> None:
    """QEMU 7.2 forgets one when a job fails while it drains; of which job a filter is, it does not say."""
    seen = observed(Plug("vda", filter=driver))
    jobs = {"some": Job(id="some", type="commit", status=status)} if status else {}
    seen = msgspec.structs.replace(seen, jobs=jobs)
    lives = status is not None and status not in ENDED
    with pytest.raises(errors.DiskBusy if lives else errors.DiskUnsuitable, match="vda-flt"):
        require_suitable("vm1", seen.disks[0], seen)


def test_nothing_works() -> None:
    assert [job_on(disk, SEEN) for disk in SEEN.disks] == [None, None]
    for disk in SEEN.disks:
        require_suitable("vm1", disk, SEEN)
    # A job on something that is in no chain, such as a destination.
    seen = working(Edge("theirs", "main node", "elsewhere"))
    assert [job_on(disk, seen) for disk in seen.disks] == [None, None]


def test_find_disk() -> None:
    for name in ("vda", "vda-dev", "/top", "/mid"):
        assert find_disk("vm1", SEEN, name).target == "vda"
    with pytest.raises(errors.NoSuchDisk, match="vda, vdb"):
        find_disk("vm1", SEEN, "vdc")
    with pytest.raises(errors.AmbiguousDisk, match="vda, vdb"):
        find_disk("vm1", SEEN, "/low.raw")


def test_source_options_are_of_the_whole_chain() -> None:
    """Opened again as it was: a read-only file so that a commit can still write to it (auto-read-only)."""
    options = source_options(SEEN.graph, "vda-n")
    cache = {"direct": False, "no-flush": False}

    def file(path: str, **how: bool) -> dict[str, object]:
        return {"driver": "file", "filename": path, "cache": cache, **how}

    low = {"driver": "raw", "read-only": True, "cache": cache, "file": file("/low.raw", **{"auto-read-only": True})}
    mid = {"driver": "qcow2", "read-only": True, "cache": cache, "file": file("/mid", **{"auto-read-only": True})}
    assert options == {
        "driver": "qcow2",
        "read-only": False,
        "cache": cache,
        "file": file("/top", **{"read-only": False}),
        "backing": {**mid, "backing": low},
    }
