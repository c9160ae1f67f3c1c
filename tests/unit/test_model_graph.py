"""The graph's own rules: chains, filters, names that a disk answers to."""

import pytest

from blockferry.model.graph import Disk, Edge, Graph, Node, images_of


def node(name: str, driver: str, filename: str = "") -> Node:
    return Node(name=name, driver=driver, filename=filename, virtual_size=512, read_only=False)


# dev -> filter -> top -> mid (through a commit's filter) -> base; each format on a protocol node
GRAPH = Graph(
    {
        each.name: each
        for each in (
            node("filter", "mirror_top"),
            node("top", "qcow2", "json:{...}"),
            node("top-file", "file", "/top"),
            node("commit", "commit_top"),
            node("mid", "qcow2", "/mid"),
            node("mid-slice", "raw", "/mid"),
            node("mid-file", "file", "/mid"),
            node("base", "raw", "nbd://h/x"),
            node("base-net", "nbd", ""),
        )
    },
    frozenset(
        {
            Edge("dev", "root", "filter"),
            Edge("filter", "backing", "top"),
            Edge("top", "file", "top-file"),
            Edge("top", "backing", "commit"),
            Edge("commit", "backing", "mid"),
            Edge("mid", "file", "mid-slice"),
            Edge("mid-slice", "file", "mid-file"),
            Edge("mid", "backing", "base"),
            Edge("base", "file", "base-net"),
        }
    ),
)


def test_chain_has_no_filters_and_the_protocols_names() -> None:
    """While a mirror runs, a format node's own file name is `json:{...}`."""
    chain = [(image.node, image.file, image.format) for image in GRAPH.chain("filter")]
    assert chain == [("top", "/top", "qcow2"), ("mid", "/mid", "qcow2"), ("base", "nbd://h/x", "raw")]
    assert GRAPH.chain("top") == GRAPH.chain("filter")


def test_below_filters() -> None:
    assert GRAPH.below_filters("filter") == "top"
    assert GRAPH.below_filters("commit") == "mid"
    assert GRAPH.below_filters("top") == "top"
    assert GRAPH.below_filters("unknown") == "unknown"
    alone = Graph({"f": node("f", "mirror_top")}, frozenset())
    assert alone.below_filters("f") == "f"


def test_filter_above_a_file_child() -> None:
    graph = Graph({"f": node("f", "mirror_top"), "x": node("x", "raw", "/x")}, frozenset({Edge("f", "file", "x")}))
    assert graph.below_filters("f") == "x"


def test_neighbours() -> None:
    assert GRAPH.child("top", "file") == "top-file"
    assert GRAPH.child("top", "root") is None
    assert GRAPH.parents("mid") == {Edge("commit", "backing", "mid")}
    assert GRAPH.parents("filter") == {Edge("dev", "root", "filter")}
    assert GRAPH.protocol("mid") == "mid-file"
    assert GRAPH.protocol("mid-file") == "mid-file"


DISK = Disk(
    target="vda",
    backend="virtio0",
    qdev="/machine/x",
    drive="/machine/x",
    bus="virtio",
    root="filter",
    chain=GRAPH.chain("filter"),
)


@pytest.mark.parametrize("name", ["vda", "virtio0", "/machine/x", "/top", "/mid", "nbd://h/x"])
def test_answers_to(name: str) -> None:
    assert DISK.answers_to(name)


@pytest.mark.parametrize("name", ["vdb", "top", "mid", "filter", "/top/", "", "json:{...}"])
def test_does_not_answer_to(name: str) -> None:
    assert not DISK.answers_to(name)


def test_images_of_leaves_node_names_out() -> None:
    empty = Disk(target="hda", backend="cd", qdev="cd", drive="cd", bus="ide", device="cdrom")
    assert images_of((DISK, empty)) == {
        "vda": (("/top", "qcow2"), ("/mid", "qcow2"), ("nbd://h/x", "raw")),
        "hda": (),
    }
    assert DISK.active.node == "top"
