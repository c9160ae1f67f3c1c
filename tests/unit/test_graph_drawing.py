"""The block graph as it is drawn: every node once, in its place, whatever it is called."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import click
import msgspec
import pytest

from blockferry.interfaces.cli import picture, tree
from blockferry.interfaces.cli.graphs import write
from blockferry.interfaces.cli.placing import columns, place, short
from blockferry.interfaces.cli.sketch import sketch
from blockferry.interfaces.cli.wire import Json
from blockferry.model.blockjob import ChainJob, Layer, Mirror
from blockferry.model.definition import Definition, DiskDef, Source
from blockferry.model.domain import Capabilities, Observation
from blockferry.model.files import ImageFact
from blockferry.model.graph import Disk, Edge, Graph, Node
from blockferry.model.job import Job
from blockferry.service.graphs import graph_view, shut_off_graph

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</text><script>alert(1)</script>\x1b[2J\n\u202e&\"'\udc80"


def seen(
    *edges: str, empty: tuple[str, ...] = (), jobs: tuple[Job, ...] = (), alone: tuple[str, ...] = ()
) -> Observation:
    """A guest from edges `PARENT ROLE CHILD`: devices are vda, vdb...; files end in -f, filters in -t or are throttles."""
    found = frozenset(
        Edge(parent, role.replace("_", " "), child) for parent, role, child in (each.split(" ") for each in edges)
    )
    devices = {edge.parent for edge in found if edge.parent.startswith("vd")} | set(empty)
    users = devices | {job.id for job in jobs} | {"", "pflash0"}
    names = {name for edge in found for name in (edge.parent, edge.child)} | set(alone)
    graph = Graph({name: node(name) for name in sorted(names - users)}, found)
    return Observation(
        status="running",
        running=True,
        graph=graph,
        disks=tuple(
            Disk(
                target=each, backend=each, qdev=f"{each}-dev", drive=each, bus="virtio", root=graph.child(each, "root")
            )
            for each in sorted(devices)
        ),
        jobs={job.id: job for job in jobs},
        capabilities=Capabilities(version="10.0.2", commands=frozenset()),
    )


def node(name: str) -> Node:
    drivers = {"f": "file", "t": "mirror_top", "throttle": "throttle"}
    driver = drivers.get(name.rpartition("-")[2], "qcow2")
    file = f"/{name[:-2]}" if driver == "file" else "json:{}"
    return Node(name=name, driver=driver, filename=file, virtual_size=1 << 30, read_only=False)


def mirror(**more: str) -> Mirror:
    values = {"kind": "mirror", "domain": "vm1", "target": "vda", "operation": 1, "job": "m", "snapshot": "s1"}
    values |= {"source": "/a", "file": "/dst/x", "format": "qcow2"}
    values |= {"source_node": "a", "node": "x", "file_node": "x-f", "filter_node": "a-t"}
    return msgspec.convert(values | more, Mirror)


def drawn(observed: Observation, *ours: Mirror | ChainJob) -> Json:
    view: Json = json.loads(msgspec.json.encode(graph_view("vm1", observed, ours)))
    return view


def text(view: Json) -> str:
    return click.unstyle(tree.graph(view))


def picture_of(view: Json) -> ET.Element:
    return ET.fromstring(picture.graph(view))  # noqa: S314 (our own)


def words(view: Json) -> list[str]:
    """All that is written in the picture."""
    return ["".join(each.itertext()) for each in picture_of(view).iter(f"{SVG}text")]


TWO_ON_ONE = (
    "vda root a",
    "a file a-f",
    "a backing base",
    "vdb root b",
    "b file b-f",
    "b backing base",
    "base file base-f",
)


def test_a_base_that_two_disks_share_is_drawn_once() -> None:
    view = drawn(seen(*TWO_ON_ONE, empty=("vdc",)))
    assert text(view).splitlines() == [
        "vm1  running  3 disks, 6 nodes",
        "",
        "vda  virtio disk  vda-dev",
        "▼ root     a  qcow2  1.0 GiB",
        "│          └─ file  a-f  file  /a",
        "▼ backing  base  qcow2  1.0 GiB  shared with vdb",
        "           └─ file  base-f  file  /base",
        "",
        "vdb  virtio disk  vdb-dev",
        "▼ root     b  qcow2  1.0 GiB",
        "│          └─ file  b-f  file  /b",
        "▼ backing  base  qcow2  (shared: see vda)",
        "",
        "vdc  virtio disk  vdc-dev",
        "(empty)",
    ]
    assert sorted(words(view)).count("base") == 1
    assert {"virtio disk · empty", "shared", "qcow2 · 1.0 GiB", "file · /base", "backing", "root"} <= set(words(view))


def test_a_shared_base_stands_right_of_all_that_use_it() -> None:
    short_and_long = (
        "vda root a",
        "a backing base",
        "vdb root b3",
        "b3 backing b2",
        "b2 backing b1",
        "b1 backing base",
    )
    assert columns(sketch(drawn(seen(*short_and_long))).rows) == {"a": 1, "b3": 1, "b2": 2, "b1": 3, "base": 4}


MIRRORED = (
    *("vda root throttle", "throttle file a-t", "a-t backing a", "a file a-f", "a backing base", "base file base-f"),
    *("x file x-f", "x backing base", "m target x", "m main_node a-t"),
)


def test_a_mirror_hangs_from_its_disk_below_the_filters() -> None:
    works = Job(id="m", type="mirror", status="running", current=1, total=4)
    view = drawn(seen(*MIRRORED, jobs=(works,)), mirror())
    assert text(view).splitlines()[2:] == [
        "vda  virtio disk  vda-dev",
        "▼ root     throttle  throttle",
        "▼ file     a-t  mirror_top",
        "▼ backing  a  qcow2  1.0 GiB",
        "│          └─ file  a-f  file  /a",
        "▼ backing  base  qcow2  1.0 GiB  shared with vda's mirror",
        "           └─ file  base-f  file  /base",
        "║",
        "╚═▶ mirror  copying  25 %  of snapshot s1  m",
        "    ▼ target   x  qcow2  1.0 GiB",
        "    │          └─ file  x-f  file  /x",
        "    ▼ backing  base  qcow2  (shared: see vda)",
    ]
    assert {"mirror · copying 25 %", "of snapshot s1"} <= set(words(view))


def test_a_mirror_that_is_ready_and_one_that_was_lost() -> None:
    """In words, and in a colour of its own; one without a node is drawn where it would be."""
    ready = drawn(seen(*MIRRORED, jobs=(Job(id="m", type="mirror", status="ready", ready=True),)), mirror())
    assert "╚═▶ mirror  ready  of snapshot s1  m\n" in text(ready)
    assert "mirror · ready" in words(ready)
    assert ready["jobs"][0]["base"] is None, "it is joined to its base already"
    lost = drawn(seen("vda root a", "a file a-f"), mirror(state="lost", reason="No space left"))
    assert text(lost).endswith("║\n╚═▶ mirror  lost  of snapshot s1  m  into /dst/x  (No space left)")
    assert {"mirror · lost", "/dst/x", "No space left"} <= set(words(lost))
    assert picture.GREEN in picture.graph(ready).partition("</defs>")[2]
    assert picture.RED in picture.graph(lost).partition("</defs>")[2]
    ended = drawn(seen("vda root a", "a file a-f"), mirror(state="pivoted"))
    assert ended["jobs"] == []


def test_what_a_mirror_will_back_onto_is_drawn_as_that() -> None:
    """As the proposal's own drawing has it; its node backs onto nothing until the guest goes over."""
    observed = seen(
        *(each for each in MIRRORED if each != "x backing base"), jobs=(Job(id="m", type="mirror", status="ready"),)
    )
    (disk,) = observed.disks
    observed = msgspec.structs.replace(
        observed, disks=(msgspec.structs.replace(disk, chain=observed.graph.chain("throttle")),)
    )
    view = drawn(observed, mirror(backing="/base"))
    assert view["jobs"][0]["base"] == "base"
    assert text(view).splitlines()[-3:] == [
        "    ▼ target   x  qcow2  1.0 GiB",
        "    │          └─ file  x-f  file  /x",
        "    ▽ backing  base  qcow2  (once the guest goes over)",
    ]
    assert "at the pivot" in words(view)
    assert "shared" not in words(view)


def test_a_commit_is_said_where_it_writes() -> None:
    layers = {name: Layer(node=name, file=f"/{name}", format="qcow2") for name in ("a", "base")}
    ours = ChainJob(
        domain="vm1", target="vda", operation=2, job="c", type="commit", top=layers["a"], base=layers["base"]
    )
    works = Job(id="c", type="commit", status="running", current=3, total=4)
    view = drawn(seen("vda root top", "top backing a", "a backing base", "c main_node a", jobs=(works,)), ours)
    assert text(view).endswith("║\n╚═▶ commit  running  75 %  c  into /base")
    assert "commit running 75 %" in words(view)


def test_jobs_of_others_exports_and_what_is_left_over() -> None:
    edges = ("vda root a", "a file a-f", " root code", "pflash0 root code", "code file code-f", "left file left-f")
    backup = ("job0 main_node a", "job0 target bt", "bt file bt-f")
    jobs = (Job(id="job0", type="backup", status="running"), Job(id="job1", type="create", status="concluded"))
    view = drawn(seen(*edges, *backup, jobs=jobs))
    assert text(view).splitlines()[4:] == [
        "        └─ file  a-f  file  /a",
        "║",
        "╚═▶ backup  running  job0  not started by blockferry, works on a",
        "    ▼ target  bt  qcow2  1.0 GiB",
        "              └─ file  bt-f  file  /bt",
        "",
        "used by something else",
        "something without a name, such as an export",
        "▼ root  code  qcow2  1.0 GiB  shared with pflash0",
        "        └─ file  code-f  file  /code",
        "pflash0",
        "▼ root  code  qcow2  (shared: see an export)",
        "",
        "left over: nobody uses these nodes",
        "●   left  qcow2  1.0 GiB",
        "    └─ file  left-f  file  /left",
        "",
        "other jobs",
        "  create  concluded  job1  not started by blockferry",
    ]
    assert {
        "pflash0",
        "no name",
        "left",
        "left over: nobody uses these nodes",
        "backup · running",
        "create · concluded",
    } <= set(words(view))


def test_what_only_a_job_uses_is_not_left_out() -> None:
    view = drawn(
        seen("vda root a", "j main_node own-t", "own-t backing a", jobs=(Job(id="j", type="?", status="running"),))
    )
    assert text(view).splitlines()[4:] == [
        "",
        "used by jobs",
        "●          own-t  mirror_top",
        "▼ backing  a  qcow2  (shared: see vda)",
        "",
        "other jobs",
        "  ?  running  j  not started by blockferry, works on own-t",
    ]
    assert "own-t" in words(view)


def test_a_node_beside_a_chain_has_what_is_under_it_beside_it() -> None:
    edges = ("vda root a", "a data-file d", "d file d-f", "a file s", "s file s-f", "b file s-f", "vdb root b")
    view = drawn(seen(*edges))
    assert text(view).splitlines()[3:] == [
        "▼ root  a  qcow2  1.0 GiB",
        "        ├─ data-file  d  qcow2  1.0 GiB",
        "        │  └─ file  d-f  file  /d",
        "        └─ file  s  qcow2  1.0 GiB",
        "           └─ file  s-f  file  /s",
        "",
        "vdb  virtio disk  vdb-dev",
        "▼ root  b  qcow2  1.0 GiB",
        "        └─ file  s-f  file  (shared: see vda)",
    ]


def test_a_chain_of_two_hundred() -> None:
    count = 200
    edges = ["vda root n0", *(f"n{each} backing n{each + 1}" for each in range(count - 1))]
    files = [f"n{each} file n{each}-f" for each in range(count)]
    view = drawn(seen(*edges, *files))
    assert len(text(view).splitlines()) == 3 + 2 * count
    assert max(map(len, text(view).splitlines())) < 80
    boxes = place(sketch(view)).boxes
    assert len(boxes) == 1 + 2 * count
    apart = {(box.x, box.y) for box in boxes}
    assert len(apart) == len(boxes)
    assert len(words(view)) > 2 * count


def test_boxes_do_not_lie_on_each_other() -> None:
    views = (seen(*TWO_ON_ONE, empty=("vdc",)), seen(*MIRRORED, jobs=(Job(id="m", type="mirror", status="ready"),)))
    for view in map(drawn, views):
        placed = place(sketch(view))
        for box in placed.boxes:
            assert 0 < box.x < box.right < placed.width
            assert 0 < box.y < box.bottom < placed.height
            for other in placed.boxes:
                apart = box.right < other.x or other.right < box.x or box.bottom < other.y or other.bottom < box.y
                assert apart or other is box


def test_names_of_others_are_no_markup_and_no_commands_to_a_terminal() -> None:
    """An image's name is whatever somebody called it; QEMU hands it on."""
    view = drawn(seen("vda root a", "a file a-f", jobs=(Job(id="j", type="backup", status="running"),)))
    view["domain"] = view["devices"][0]["qdev"] = HOSTILE
    for node_ in view["nodes"]:
        node_["file"] = HOSTILE
    view["users"] = [{"name": HOSTILE, "node": "a"}]
    view["jobs"][0] |= {"source": "a", "reason": HOSTILE}
    root = picture_of(view)
    names = {each.tag.removeprefix(SVG) for each in root.iter()}
    assert names <= {"svg", "title", "desc", "defs", "marker", "path", "rect", "g", "text"}
    assert "<script>" in "".join(root.itertext())
    for shown in text(view), "".join(root.itertext()):
        assert re.search(r"[\x00-\x09\x0b-\x1f\u202e\udc80]", shown) is None
        assert r"\x1b[2J\n\u202e" in shown
    assert len(text(view).splitlines()) == len(text(drawn(seen("vda root a", "a file a-f"))).splitlines()) + 6


@pytest.mark.parametrize("path", ["/a", "/very/long" * 20 + "/name.qcow2", "/画像" * 30])
def test_a_long_name_keeps_its_end(path: str) -> None:
    assert short(path) == path if len(path) < 38 else short(path).endswith(path[-5:]) and "…" in short(path)


def test_a_cycle_that_only_a_job_closes_is_drawn() -> None:
    """A backup's destination may back onto its source."""
    edges = ("vda root a", "a file a-f", "x backing a", "job0 main_node a", "job0 target x")
    view = drawn(seen(*edges, jobs=(Job(id="job0", type="backup", status="running"),)))
    assert text(view).endswith("▼ target   x  qcow2  1.0 GiB\n    ▼ backing  a  qcow2  (shared: see vda)")
    assert place(sketch(view)).width < 4000


def test_a_guest_that_is_shut_off() -> None:
    disks = tuple(
        DiskDef(target=each, bus="virtio", source=Source(kind="file", where=f"/{each}", format="qcow2"))
        for each in ("vda", "vdb")
    )
    base = ImageFact(path="/base", format="raw", virtual_size=1 << 20)
    chains = {
        each.target: (ImageFact(path=f"/{each.target}", format="qcow2", virtual_size=1 << 20), base) for each in disks
    }
    empty = DiskDef(target="sda", bus="sata", device="cdrom", read_only=True)
    definition = Definition(name="vm1", memory=1 << 26, vcpus=1, disks=(*disks, empty))
    view = json.loads(
        msgspec.json.encode(shut_off_graph("vm1", definition, chains, (mirror(state="lost", reason="it died"),)))
    )
    assert text(view).splitlines() == [
        "vm1  shut off  3 disks, 3 images, 1 job",
        "",
        "vda  virtio disk  disk-vda",
        "▼ root     /vda  qcow2  1.0 MiB",
        "▼ backing  /base  raw  1.0 MiB  read-only  shared with vdb",
        "║",
        "╚═▶ mirror  lost  of snapshot s1  m  into /dst/x  (it died)",
        "",
        "vdb  virtio disk  disk-vdb",
        "▼ root     /vdb  qcow2  1.0 MiB",
        "▼ backing  /base  raw  (shared: see vda)",
        "",
        "sda  sata cdrom  disk-sda  read-only",
        "(empty)",
    ]
    assert {"/base", "sata cdrom · read-only · empty", "mirror · lost"} <= set(words(view))


def test_a_domain_without_disks() -> None:
    view = drawn(seen())
    assert text(view) == "vm1  running  0 disks, 0 nodes"
    assert words(view) == ["vm1", "running  ·  0 disks, 0 nodes"]


def test_a_file_is_written_whole_and_readable_by_all(tmp_path: Path) -> None:
    path, link = tmp_path / "g.svg", tmp_path / "link.svg"
    path.write_text("old")
    path.chmod(0o600)
    link.symlink_to(path)
    write(str(link), "new")
    assert (path.read_text(), path.stat().st_mode & 0o777, link.is_symlink()) == ("new", 0o644, True)
    with pytest.raises(UnicodeEncodeError):
        write(str(path), "\udc80")
    with pytest.raises(FileNotFoundError):
        write(str(tmp_path / "none" / "g.svg"), "new")
    assert path.read_text() == "new"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["g.svg", "link.svg"]


def test_what_is_no_file_is_written_to_and_stays(tmp_path: Path) -> None:
    write("/dev/null", "gone")
    assert Path("/dev/null").is_char_device()
