"""What a snapshot is planned as, and what is refused before anything is done."""

from dataclasses import dataclass

import msgspec
import pytest

from blockferry import errors
from blockferry.model.domain import Capabilities, Observation
from blockferry.model.files import FileFact
from blockferry.model.flags import SnapshotCreate
from blockferry.model.graph import JOB_FILTERS, Disk, Edge, Graph, Node
from blockferry.model.job import Job
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.plan.destinations import Files
from blockferry.plan.files import ClaimFile, CreateImage, FlushFiles, RemoveFile
from blockferry.plan.plan import Names, Plan
from blockferry.plan.snapshot import Choice, choose, files_of, plan_snapshot
from blockferry.plan.steps import AddNode, CommitDown, Freeze, StartMirror, TakeSnapshots, Thaw

SIZE = 1 << 20
GIB = 1 << 30


@dataclass
class Plug:
    """A disk of a made-up guest: its format node on a file node."""

    target: str
    file: str = ""
    fmt: str = "qcow2"
    driver: str = "file"
    device: str = "disk"
    read_only: bool = False
    filter: str | None = None
    empty: bool = False
    direct: bool = False
    encrypted: bool = False
    size: int = SIZE
    below: tuple[tuple[str, int], ...] = ()  # what it backs onto, top first: path (raw where it ends so) and size

    @property
    def path(self) -> str:
        return self.file or f"/img/{self.target}.img"

    def chain(self) -> Graph:
        """The format nodes TARGET-n, -n1, -n2... with a protocol node each, TARGET-f, -f1..."""
        nodes: dict[str, Node] = {}
        edges: set[Edge] = set()
        above = None
        for index, (path, size) in enumerate(((self.path, self.size), *self.below)):
            top, file = (f"{self.target}-{kind}{index or ''}" for kind in "nf")
            common = {"filename": path, "virtual_size": size, "direct": self.direct, "encrypted": self.encrypted}
            fmt = self.fmt if index == 0 else "raw" if path.endswith(".raw") else "qcow2"
            read_only = self.read_only or index > 0
            nodes[top] = Node(name=top, driver=fmt, read_only=read_only, **common)
            nodes[file] = Node(name=file, driver=self.driver, read_only=read_only, **common)
            edges |= {Edge(top, "file", file), *([Edge(above, "backing", top)] if above else [])}
            above = top
        return Graph(nodes, frozenset(edges))


def observed(*plugs: Plug) -> Observation:
    nodes: dict[str, Node] = {}
    edges: set[Edge] = set()
    disks = []
    for plug in plugs:
        if plug.empty:
            disks.append(
                Disk(target=plug.target, backend=plug.target, qdev=plug.target, drive=plug.target, bus="virtio")
            )
            continue
        top = root = f"{plug.target}-n"
        chain = plug.chain()
        nodes |= chain.nodes
        edges |= chain.edges
        if plug.filter:
            root = f"{plug.target}-flt"
            nodes[root] = Node(name=root, driver=plug.filter, filename="", virtual_size=plug.size, read_only=False)
            edges.add(Edge(root, "backing" if plug.filter.endswith("_top") else "file", top))
        edges.add(Edge(f"{plug.target}-dev", "root", root))
        graph = Graph(nodes, frozenset(edges))
        disks.append(
            Disk(
                target=plug.target,
                backend=f"{plug.target}-dev",
                qdev=f"{plug.target}-dev",
                drive=f"{plug.target}-dev",
                bus="virtio",
                device=plug.device,
                root=root,
                chain=graph.chain(root),
                read_only=plug.read_only,
            )
        )
    return Observation(
        status="running",
        running=True,
        graph=Graph(nodes, frozenset(edges)),
        disks=tuple(disks),
        jobs={"some": Job(id="some", type="commit", status="running")}
        if any(p.filter in JOB_FILTERS for p in plugs)
        else {},
        capabilities=Capabilities(version="0", commands=frozenset({"transaction"})),
    )


def fact(path: str, **more: object) -> FileFact:
    return FileFact(**{"path": path, "real": path, "kind": "absent", "device": 1, "free": GIB, **more})


def images_of(choices: tuple[Choice, ...]) -> dict[str, FileFact]:
    """The disks' images, which are there."""
    return {path: fact(path, kind="file") for path in (choice.disk.active.file for choice in choices)}


def plan(seen: Observation, wish: SnapshotWish, *, flags: int = 0, **facts: FileFact) -> Plan:
    """`facts` by file name; of what is not told the disks' images are there and the rest is absent, with room."""
    choices, _left_out = choose("vm1", seen, wish, "s1", SnapshotCreate(0))
    known = {path: fact(path) for path in files_of(choices)} | images_of(choices)
    known |= {each.path: each for each in facts.values()}
    files = Files(facts=known)
    return plan_snapshot(
        "vm1",
        seen,
        wish,
        names=Names("abcd", 7),
        operation=7,
        name="s1",
        files=files,
        now=1.5,
        parent="s0",
        flags=flags,
    )


TWO = observed(Plug("vda"), Plug("vdb", fmt="raw", direct=True))


def test_steps_in_their_order() -> None:
    wish = SnapshotWish(disks=(DiskWish(name="vda", file="/o", mirror=MirrorWish(file="/m")),))
    made = plan(TWO, wish)
    kinds = [type(step) for step in made.prepare]
    assert kinds == [*[ClaimFile] * 3, *[CreateImage] * 3, *[AddNode] * 3, FlushFiles, TakeSnapshots, StartMirror]
    assert made.window is None
    assert made.settle == ()


@pytest.mark.parametrize("together", [True, False])
def test_quiesced_only_while_the_disks_switch(together: bool) -> None:
    """Images are made before, mirrors are started after."""
    commands = frozenset({"transaction"} if together else ())
    seen = msgspec.structs.replace(TWO, capabilities=Capabilities(version="0", commands=commands))
    wish = SnapshotWish(disks=(DiskWish(name="vda", file="/o", mirror=MirrorWish(file="/m")),))
    made = plan(seen, wish, flags=SnapshotCreate.QUIESCE)
    switches = [TakeSnapshots] if together else [TakeSnapshots] * 2
    assert [type(step) for step in made.prepare][9:] == [FlushFiles, Freeze, *switches, Thaw, StartMirror]
    assert Thaw(held=True) in made.prepare
    without = plan(seen, wish)
    assert [step for step in made.prepare if not isinstance(step, Freeze | Thaw)] == [*without.prepare]


def test_what_was_written_is_on_disk_before_the_disks_switch() -> None:
    """Not that of an image whose flushes QEMU was told to leave out; there is nothing to be done for an export."""
    (sync,) = [step for step in plan(TWO, SnapshotWish()).prepare if isinstance(step, FlushFiles)]
    assert (sync.paths, sync.undo()) == (("/img/vda.img", "/img/vdb.img"), ())
    graph = TWO.graph
    protocol = graph.nodes[graph.protocol("vdb-n")]
    careless = {**graph.nodes, protocol.name: msgspec.structs.replace(protocol, no_flush=True)}
    seen = msgspec.structs.replace(TWO, graph=msgspec.structs.replace(graph, nodes=careless))
    assert [step.paths for step in plan(seen, SnapshotWish()).prepare if isinstance(step, FlushFiles)] == [
        ("/img/vda.img",)
    ]
    only = SnapshotWish(disks=(DiskWish(name="vda", snapshot="no"),))
    assert not [step for step in plan(seen, only).prepare if isinstance(step, FlushFiles)]


def test_names_and_backings() -> None:
    wish = SnapshotWish(disks=(DiskWish(name="vda", file="/o", mirror=MirrorWish(file="/m")),))
    made = plan(TWO, wish)
    created = {step.path: step for step in made.prepare if isinstance(step, CreateImage)}
    assert set(created) == {"/o", "/m", "/img/vdb.s1"}
    assert (created["/o"].backing, created["/o"].backing_format) == ("/img/vda.img", "qcow2")
    assert (created["/m"].backing, created["/m"].backing_format) == ("/img/vda.img", "qcow2")
    assert (created["/img/vdb.s1"].backing, created["/img/vdb.s1"].backing_format) == ("/img/vdb.img", "raw")
    assert {step.size for step in created.values()} == {SIZE}
    (pairs,) = [step.pairs for step in made.prepare if isinstance(step, TakeSnapshots)]
    assert [(pair.node, pair.overlay) for pair in pairs] == [("vda-n", "bfabcd-7-vda-s"), ("vdb-n", "bfabcd-7-vdb-s")]
    assert made.record.authoritative == {"vda": "/o", "vdb": "/img/vdb.s1"}
    assert made.record.snapshot is not None
    assert (made.record.snapshot.parent, made.record.snapshot.created) == ("s0", 1.5)
    (mirror,) = made.record.jobs
    assert (mirror.snapshot, mirror.source, mirror.file, mirror.backing) == ("s1", "/o", "/m", "/img/vda.img")


def test_own_backing() -> None:
    wish = SnapshotWish(
        disks=(DiskWish(name="vda", mirror=MirrorWish(file="/m", backing="/copy", backing_format="raw")),)
    )
    made = plan(TWO, wish)
    created = {step.path: step for step in made.prepare if isinstance(step, CreateImage)}
    assert (created["/m"].backing, created["/m"].backing_format) == ("/copy", "raw")
    assert created["/img/vda.s1"].backing == "/img/vda.img"
    assert (made.record.jobs[0].backing, made.record.jobs[0].backing_format) == ("/copy", "raw")


def test_new_nodes_are_never_probed_and_have_the_sources_cache() -> None:
    made = plan(TWO, SnapshotWish())
    nodes = {step.node: step.options for step in made.prepare if isinstance(step, AddNode)}
    for options in nodes.values():
        assert options["driver"] in ("qcow2", "file")
        assert options["driver"] == "file" or options["backing"] is None
    # QEMU's own mode is not said.
    assert [nodes["bfabcd-7-vda-s"].get("cache"), nodes["bfabcd-7-vda-s"]["file"].get("cache")] == [None, None]
    direct = {"direct": True}
    assert [nodes["bfabcd-7-vdb-s"]["cache"], nodes["bfabcd-7-vdb-s"]["file"]["cache"]] == [direct, direct]


def test_undo_of_each_step() -> None:
    made = plan(TWO, SnapshotWish(disks=(DiskWish(name="vda", mirror=MirrorWish(file="/m")),)))
    for step in made.prepare:
        match step:
            case ClaimFile():
                assert step.undo() == (RemoveFile(path=step.path),)
            case TakeSnapshots():
                assert [(back.overlay, back.base) for back in step.undo() if isinstance(back, CommitDown)] == [
                    ("bfabcd-7-vda-s", "vda-n"),
                    ("bfabcd-7-vdb-s", "vdb-n"),
                ]
            case CreateImage() | FlushFiles():
                assert step.undo() == ()
            case _:
                assert len(step.undo()) == 1


def test_dry_run_lines() -> None:
    lines = plan(TWO, SnapshotWish(disks=(DiskWish(name="vda", file="/o", mirror=MirrorWish(file="/m")),))).lines()
    assert lines[0] == "prepare: create /o, which must not exist"
    assert lines[3] == f"prepare: make /o an empty qcow2 image of {SIZE} bytes backing onto /img/vda.img (qcow2)"
    assert "prepare: switch to the overlays at one instant: vda, vdb" in lines
    assert "prepare: mirror vda: bfabcd-7-vda-s to bfabcd-7-vda-x (top)" in lines
    assert lines[-1] == "record: vda is /o, vdb is /img/vdb.s1"


def test_same_request_gives_the_same_plan() -> None:
    assert plan(TWO, SnapshotWish()) == plan(TWO, SnapshotWish())


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("/img/a.qcow2", "/img/a.s1"),
        ("/img/a", "/img/a.s1"),
        ("/img/a.tar.gz", "/img/a.tar.s1"),
        ("/i.mg/a", "/i.mg/a.s1"),
        ("/img/.hidden", "/img/.hidden.s1"),
    ],
)
def test_generated_name(image: str, name: str) -> None:
    (choice,), _left_out = choose("vm1", observed(Plug("vda", file=image)), SnapshotWish(), "s1", SnapshotCreate(0))
    assert choice.file == name


def test_generated_name_of_what_is_no_file() -> None:
    seen = observed(Plug("vda", file="nbd://h/x", fmt="raw", driver="nbd"))
    with pytest.raises(errors.DiskUnsuitable, match="name the overlay"):
        plan(seen, SnapshotWish())
    assert plan(seen, SnapshotWish(disks=(DiskWish(name="vda", file="/o"),))).record.authoritative == {"vda": "/o"}


UNSUITABLE = {
    "empty": Plug("vdc", empty=True),
    "cdrom": Plug("vdc", device="cdrom"),
    "floppy": Plug("vdc", device="floppy"),
    "passed through": Plug("vdc", device="lun"),
    "/img/vdc.img is encrypted": Plug("vdc", encrypted=True),
    "read-only": Plug("vdc", read_only=True),
    "vmdk": Plug("vdc", fmt="vmdk"),
    "bare file": Plug("vdc", fmt="file"),
}


def test_an_image_that_was_deleted_gets_no_overlay() -> None:
    with pytest.raises(errors.ImageUnsuitable, match=r"/img/vdb\.img .* not there any more .*`blockferry copy`"):
        plan(TWO, SnapshotWish(), gone=fact("/img/vdb.img"))
    # What is no file of this host has none to be looked up.
    seen = observed(Plug("vda", file="nbd://host/x", driver="nbd"))
    assert plan(seen, SnapshotWish(disks=(DiskWish(name="vda", file="/o"),)), gone=fact("nbd://host/x"))


@pytest.mark.parametrize("why", sorted(UNSUITABLE))
def test_unsuitable_is_left_out_or_refused_when_named(why: str) -> None:
    seen = observed(Plug("vda"), UNSUITABLE[why])
    made = plan(seen, SnapshotWish())
    assert set(made.record.authoritative) == {"vda"}
    assert why in made.left_out["vdc"]
    with pytest.raises(errors.DiskUnsuitable, match=why):
        plan(seen, SnapshotWish(disks=(DiskWish(name="vdc"),)))
    # Said to be left out it may be anything.
    plan(seen, SnapshotWish(disks=(DiskWish(name="vdc", snapshot="no"),)))


def test_busy() -> None:
    seen = observed(Plug("vda"), Plug("vdb", filter="mirror_top"))
    for wish in (SnapshotWish(), SnapshotWish(disks=(DiskWish(name="vdb"),))):
        with pytest.raises(errors.DiskBusy, match="vdb-flt"):
            plan(seen, wish)
    assert plan(seen, SnapshotWish(disks=(DiskWish(name="vda"),), only_these=True))


def test_only_these_and_none_left() -> None:
    made = plan(TWO, SnapshotWish(disks=(DiskWish(name="vdb"),), only_these=True))
    assert set(made.record.authoritative) == {"vdb"}
    assert made.left_out == {}
    for wish in (
        SnapshotWish(only_these=True),
        SnapshotWish(disks=(DiskWish(name="vda", snapshot="no"), DiskWish(name="vdb", snapshot="no"))),
    ):
        with pytest.raises(errors.BadRequest, match="no disk is left"):
            plan(TWO, wish)


def test_named_twice_by_two_names() -> None:
    with pytest.raises(errors.BadRequest, match="vda is named twice"):
        plan(TWO, SnapshotWish(disks=(DiskWish(name="vda"), DiskWish(name="/img/vda.img", snapshot="no"))))


def test_shared_image_is_ambiguous() -> None:
    seen = observed(Plug("vda", file="/same"), Plug("vdb", file="/same"))
    with pytest.raises(errors.AmbiguousDisk, match="vda, vdb"):
        plan(seen, SnapshotWish(disks=(DiskWish(name="/same"),)))


@pytest.mark.parametrize(
    ("kind", "refusal"),
    [
        ("file", errors.DestinationExists),
        ("directory", errors.DestinationUnusable),
        ("other", errors.DestinationUnusable),
    ],
)
def test_file_that_exists(kind: str, refusal: type[errors.Refused]) -> None:
    with pytest.raises(refusal):
        plan(TWO, SnapshotWish(), there=fact("/img/vdb.s1", kind=kind))


def test_a_block_device_is_overwritten_and_that_is_said() -> None:
    made = plan(TWO, SnapshotWish(), there=fact("/img/vdb.s1", kind="block", size=GIB))
    assert made.notes == ("/img/vdb.s1 is a block device: what was on it is overwritten",)
    assert [step.path for step in made.prepare if isinstance(step, ClaimFile)] == ["/img/vda.s1"]
    with pytest.raises(errors.NoRoom):
        plan(TWO, SnapshotWish(), there=fact("/img/vdb.s1", kind="block", size=4096))


def test_file_that_can_not_be_created() -> None:
    with pytest.raises(errors.DestinationUnusable, match="mounted read-only"):
        plan(TWO, SnapshotWish(), there=fact("/img/vdb.s1", problem="/img is mounted read-only"))


def test_same_file_under_two_names() -> None:
    with pytest.raises(errors.DuplicateFile, match=r"vdb\.s1"):
        plan(TWO, SnapshotWish(), there=fact("/img/vdb.s1", real="/img/vda.s1"))


def test_room_is_added_up_for_each_file_system() -> None:
    one = 4 * 65536
    enough = {path: fact(f"/img/{path}.s1", free=2 * one) for path in ("vda", "vdb")}
    plan(TWO, SnapshotWish(), **enough)
    short = {path: fact(f"/img/{path}.s1", free=2 * one - 1) for path in ("vda", "vdb")}
    with pytest.raises(errors.NoRoom, match=r"vdb\.s1"):
        plan(TWO, SnapshotWish(), **short)
    apart = {path: fact(f"/img/{path}.s1", free=one, device=number) for number, path in enumerate(("vda", "vdb"))}
    plan(TWO, SnapshotWish(), **apart)


def test_names_fit_into_qemus_limit() -> None:
    names = Names("abcd", 99_999_999)
    for role in ("s", "sf", "x", "xf", "t", "m", "y0", "z0", "r", "b"):
        assert len(names.of("nvme1234n1", role)) <= 31
    assert len({names.of(target, "s") for target in ("vda", "vdaa", "sda", "nvme0n1", "nvme10n1")}) == 5
