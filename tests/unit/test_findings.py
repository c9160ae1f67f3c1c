"""What doctor makes of what it sees, as tables: pure, without a guest."""

import re
from pathlib import Path

import msgspec
import pytest

from blockferry.model.blockjob import Mirror
from blockferry.model.definition import Boot, Definition, DiskDef, Source
from blockferry.model.domain import Capabilities, Observation
from blockferry.model.files import FileFact, ImageFact, Kind
from blockferry.model.graph import Disk, Edge, Graph, Image, Node
from blockferry.model.job import Job
from blockferry.model.snapshot import Snapshot, SnapshotDisk
from blockferry.model.view import Finding
from blockferry.plan import findings, installed
from blockferry.plan.findings import Belief, Case, Made, Open, examine
from blockferry.plan.installed import NEEDED, USEFUL, Host, Program, can_do, inspect

ABLE = frozenset({*NEEDED, *USEFUL})
GIB = 1 << 30


def node(name: str, driver: str, file: str) -> Node:
    return Node(name=name, driver=driver, filename=file, virtual_size=GIB, read_only=False)


def image(name: str, file: str, image_format: str = "qcow2") -> Image:
    return Image(node=name, file=file, format=image_format, virtual_size=GIB)


NODES = {
    "n0": node("n0", "qcow2", "/a.img"),
    "f0": node("f0", "file", "/a.img"),
    "n1": node("n1", "raw", "/base.img"),
    "f1": node("f1", "file", "/base.img"),
}
EDGES = frozenset(
    {Edge("d0", "root", "n0"), Edge("n0", "file", "f0"), Edge("n0", "backing", "n1"), Edge("n1", "file", "f1")}
)
DISK = Disk(
    target="vda",
    backend="d0",
    qdev="d0",
    drive="d0",
    bus="virtio",
    root="n0",
    chain=(image("n0", "/a.img"), image("n1", "/base.img", "raw")),
)
SEEN = Observation(
    status="running",
    running=True,
    graph=Graph(NODES, EDGES),
    disks=(DISK,),
    jobs={},
    capabilities=Capabilities(version="10.0.2", commands=ABLE),
    pid=7,
)


def fact(path: str, kind: Kind = "file", **more: object) -> FileFact:
    return msgspec.structs.replace(
        FileFact(path=path, real=path, kind=kind, free=9 * GIB, identity=f"1:{path}"), **more
    )


HEADERS = {
    "/a.img": ImageFact(
        path="/a.img", format="qcow2", backing="/base.img", backing_format="raw", real_backing="/base.img"
    ),
    "/base.img": ImageFact(path="/base.img", format="raw"),
}
WELL = Case(
    domain="vm1",
    qmp="/run/vm1.qmp",
    tag="beef",
    seen=SEEN,
    beliefs={"vda": Belief(file="/a.img", operation=4)},
    facts={path: fact(path) for path in ("/a.img", "/base.img")},
    headers=HEADERS,
)
MIRROR = Mirror(
    domain="vm1",
    target="vda",
    operation=5,
    job="bfbeef-5-vda-m",
    source_node="n0",
    source="/a.img",
    node="bfbeef-5-vda-x",
    file_node="bfbeef-5-vda-xf",
    filter_node="bfbeef-5-vda-t",
    file="/m.img",
    format="qcow2",
    snapshot="s1",
)
RUNS = Job(id=MIRROR.job, type="mirror", status="ready")
SNAPSHOT = Snapshot(
    domain="vm1",
    name="s1",
    created=1.0,
    state="running",
    disks=(SnapshotDisk(target="vda", file="/a.img", format="qcow2", backing="/base.img", backing_format="raw"),),
)
DEFINED = Definition(
    name="vm1",
    memory=GIB,
    disks=(DiskDef(target="vda", bus="virtio", source=Source(kind="file", where="/a.img", format="qcow2")),),
)
OFF = msgspec.structs.replace(
    WELL, seen=None, defined=True, definition=DEFINED, closed={"vda": tuple(HEADERS.values())}, headers={}
)


def case(of: Case = WELL, **more: object) -> Case:
    return msgspec.structs.replace(of, **more)


def seen(**more: object) -> Observation:
    return msgspec.structs.replace(SEEN, **more)


def facts(*more: FileFact) -> dict[str, FileFact]:
    return {**WELL.facts, **{each.path: each for each in more}}


def headers(**of_a: object) -> dict[str, ImageFact]:
    return {**HEADERS, "/a.img": msgspec.structs.replace(HEADERS["/a.img"], **of_a)}


def with_node(name: str, *edges: Edge) -> Observation:
    return seen(graph=Graph({**NODES, name: node(name, "qcow2", "/m.img")}, EDGES | frozenset(edges)))


def said(found: tuple[Finding, ...]) -> list[tuple[str, str]]:
    return [(each.severity, each.code) for each in found if each.severity != "ok"]


FORGOTTEN = seen(
    graph=Graph(
        {**NODES, "top": Node(name="top", driver="commit_top", filename="", virtual_size=GIB, read_only=False)},
        frozenset({Edge("d0", "root", "top"), Edge("top", "backing", "n0"), *EDGES} - {Edge("d0", "root", "n0")}),
    ),
    disks=(msgspec.structs.replace(DISK, root="top"),),
)
NAMELESS = msgspec.structs.replace(SNAPSHOT, disks=(msgspec.structs.replace(SNAPSHOT.disks[0], mode="none"),))
LOST = msgspec.structs.replace(MIRROR, state="lost", reason="Input/output error")
RESTING = msgspec.structs.replace(MIRROR, state="resting")
MADE = (Made(path="/left.img", operation=3, identity="1:/left.img"),)
LEFT = facts(fact("/left.img", allocated=4096))

# What is so -> what is said of it, besides what is in order.
TABLE: dict[str, tuple[Case, list[tuple[str, str]]]] = {
    "well": (WELL, []),
    "well, with a mirror": (
        case(jobs=(MIRROR,), seen=seen(jobs={MIRROR.job: RUNS}), snapshots=(SNAPSHOT,)),
        [],
    ),
    "paused": (case(seen=seen(status="paused", running=False)), [("note", "paused")]),
    "a disk is full": (case(seen=seen(status="io-error", running=False)), [("problem", "io-error")]),
    "an older QEMU": (
        case(seen=seen(capabilities=Capabilities(version="4", commands=ABLE - {"transaction", "yank"}))),
        [("note", "qemu-lacks"), ("note", "qemu-lacks")],
    ),
    "an operation that is not settled": (
        case(operations=(Open(operation=9, text="pivot", unsettled=True, next=("blockferry recover",)),)),
        [("problem", "unsettled")],
    ),
    "an operation that goes on": (
        case(operations=(Open(operation=9, text="copy", unsettled=False),)),
        [("note", "in-progress")],
    ),
    "on another image": (
        case(beliefs={"vda": Belief(file="/b.img", operation=4)}, facts=facts(fact("/b.img"))),
        [("problem", "disk-elsewhere")],
    ),
    "on the same image by another name": (
        case(beliefs={"vda": Belief(file="/link", operation=4)}, facts=facts(fact("/link", real="/a.img"))),
        [],
    ),
    "on another image, the old one is gone": (
        case(beliefs={"vda": Belief(file="/b.img", operation=4)}, facts=facts(fact("/b.img", "absent"))),
        [("note", "disk-elsewhere")],
    ),
    "on another image since it was attached anew": (
        case(beliefs={"vda": Belief(file="/b.img", operation=4, old=True)}, facts=facts(fact("/b.img"))),
        [("note", "disk-elsewhere")],
    ),
    "a disk that was unplugged": (
        case(beliefs={"vdz": Belief(file="/z.img", operation=4)}),
        [("note", "disk-missing")],
    ),
    "mirrored from an image that the guest has left": (
        case(jobs=(msgspec.structs.replace(MIRROR, source="/b.img"),), seen=seen(jobs={MIRROR.job: RUNS})),
        [("problem", "mirror-elsewhere")],
    ),
    "an image that was deleted": (case(facts=facts(fact("/base.img", "absent"))), [("problem", "image-deleted")]),
    "a header that can't be read": (
        case(headers=headers(problem="it is marked corrupt")),
        [("problem", "image-unusable")],
    ),
    "a header that names another": (
        case(headers=headers(backing="/c.img", real_backing="/c.img")),
        [("problem", "header-differs")],
    ),
    "a header that names none": (
        case(headers=headers(backing=None, real_backing=None)),
        [("problem", "header-differs")],
    ),
    "a header that names none, as was asked": (
        case(headers=headers(backing=None, real_backing=None), snapshots=(NAMELESS,)),
        [("note", "header-names-none")],
    ),
    "a header that names another format": (
        case(headers=headers(backing_format="qcow2")),
        [("problem", "header-format")],
    ),
    "a header that names no format": (case(headers=headers(backing_format=None)), [("problem", "header-format")]),
    "a base of which the header says more": (
        case(
            headers={**HEADERS, "/base.img": ImageFact(path="/base.img", format="raw", backing="/d", real_backing="/d")}
        ),
        [("problem", "header-differs")],
    ),
    "little room": (case(facts=facts(fact("/a.img", free=1 << 20))), [("note", "little-room")]),
    "a job that QEMU does not have": (case(jobs=(MIRROR,)), [("problem", "job-missing")]),
    "a job with an error": (
        case(jobs=(MIRROR,), seen=seen(jobs={MIRROR.job: msgspec.structs.replace(RUNS, error="gone")})),
        [("problem", "job-stuck")],
    ),
    "a job whose destination is full": (
        case(jobs=(MIRROR,), seen=seen(jobs={MIRROR.job: msgspec.structs.replace(RUNS, io_status="nospace")})),
        [("problem", "job-stuck")],
    ),
    "a job of ours that is not in the journal": (
        case(seen=seen(jobs={MIRROR.job: RUNS})),
        [("problem", "job-unknown")],
    ),
    "the filter of a job that is no more": (
        case(seen=FORGOTTEN),
        [("problem", "filter-left")],
    ),
    "the filter of a job of somebody else's": (
        case(seen=msgspec.structs.replace(FORGOTTEN, jobs={"theirs": RUNS})),
        [],
    ),
    "a job of somebody else's": (case(seen=seen(jobs={"theirs": RUNS})), []),
    "a job of another state directory": (case(seen=seen(jobs={"bfcafe-5-vda-m": RUNS})), []),
    "a node of ours that nothing uses": (case(seen=with_node("bfbeef-5-vda-x")), [("problem", "node-left")]),
    "a node of ours that a job uses": (
        case(seen=with_node("bfbeef-5-vda-x", Edge("some-job", "target", "bfbeef-5-vda-x"))),
        [],
    ),
    "a node of ours in a chain": (
        case(seen=with_node("bfbeef-5-vda-x", Edge("n1", "backing", "bfbeef-5-vda-x"))),
        [],
    ),
    "a node that a mirror is going to need": (
        case(seen=seen(graph=with_node("bfbeef-5-vda-y0").graph, jobs={MIRROR.job: RUNS}), jobs=(MIRROR,)),
        [],
    ),
    "a node of somebody else's": (case(seen=with_node("theirs")), []),
    "a snapshot's mirror was lost": (case(jobs=(LOST,), snapshots=(SNAPSHOT,)), [("problem", "mirror-lost")]),
    "a copy was lost": (case(jobs=(msgspec.structs.replace(LOST, snapshot=None),)), [("note", "mirror-lost")]),
    "a snapshot's image is not there": (
        case(
            snapshots=(
                msgspec.structs.replace(
                    SNAPSHOT, disks=(msgspec.structs.replace(SNAPSHOT.disks[0], backing="/old.img"),)
                ),
            ),
            facts=facts(fact("/old.img", "absent")),
        ),
        [("problem", "snapshot-image-missing")],
    ),
    "a file that is left over": (case(made=MADE, facts=LEFT), [("note", "file-left")]),
    "a file that is left over, and open": (
        case(made=MADE, facts=facts(fact("/left.img", used=True))),
        [("note", "file-left")],
    ),
    "a file that something mentions": (case(made=MADE, facts=LEFT, mentioned=frozenset({"/left.img"})), []),
    "a file that something mentions by another name": (
        case(made=MADE, facts=LEFT, mentioned=frozenset({"1:/left.img"})),
        [],
    ),
    "another file in its place": (case(made=MADE, facts=facts(fact("/left.img", identity="1:another"))), []),
    "shut off": (OFF, []),
    "shut off, with a file left over": (case(OFF, made=MADE, facts=LEFT), [("note", "file-left")]),
    "crashed": (case(OFF, gone="killed by SIGKILL"), [("problem", "crashed")]),
    "shut off, an image is not there": (
        case(OFF, closed={"vda": (ImageFact(path="/a.img", format="qcow2", problem="No such file or directory"),)}),
        [("problem", "image-unusable")],
    ),
    "shut off, its device is mounted": (
        case(OFF, facts=facts(fact("/a.img", "block", problem="it is mounted, or part of a volume"))),
        [("problem", "image-unusable")],
    ),
    "shut off, somebody has its image open": (
        case(OFF, facts=facts(fact("/a.img", used=True))),
        [("problem", "image-in-use")],
    ),
    "shut off, somebody reads its base": (case(OFF, facts=facts(fact("/base.img", used=True))), []),
    "shut off, its kernel is not there": (
        case(
            OFF,
            definition=msgspec.structs.replace(DEFINED, boot=Boot(kernel="/k", initrd="/i")),
            facts=facts(fact("/k", "absent"), fact("/i", "absent")),
        ),
        [("problem", "boot-file-missing"), ("problem", "boot-file-missing")],
    ),
    "shut off, its nvram is not there": (
        case(
            OFF,
            definition=msgspec.structs.replace(DEFINED, boot=Boot(nvram="/n")),
            facts=facts(fact("/n", "absent")),
        ),
        [("problem", "boot-file-missing")],
    ),
    "shut off, its nvram is there": (
        case(OFF, definition=msgspec.structs.replace(DEFINED, boot=Boot(nvram="/n")), facts=facts(fact("/n"))),
        [],
    ),
    "a start would be refused": (case(OFF, refusal="two devices on one address"), [("problem", "would-not-start")]),
    "what is not carried out": (
        case(OFF, definition=msgspec.structs.replace(DEFINED, ignored=("devices/sound",))),
        [("note", "not-carried-out")],
    ),
    "a mirror rests": (case(OFF, jobs=(RESTING,)), [("note", "mirror-resting")]),
    "a mirror rests, and a start would drop it": (
        case(OFF, jobs=(RESTING,), dropped={"vda": "it is not there any more"}),
        [("problem", "mirror-gone")],
    ),
    "it can't be asked": (
        case(seen=None, problem="something else holds it", made=MADE, facts=LEFT),
        [("problem", "unreachable")],
    ),
    "its QEMU is gone": (
        case(seen=None, problem="no QEMU answers", gone="its QEMU has ended", made=MADE, facts=LEFT),
        [("problem", "qemu-gone"), ("note", "start-on")],
    ),
    "its QEMU is gone, and its image": (
        case(seen=None, gone="its QEMU has ended", facts=facts(fact("/a.img", "absent"))),
        [("problem", "qemu-gone"), ("problem", "image-missing")],
    ),
}


@pytest.mark.parametrize("what", TABLE)
def test_what_is_said(what: str) -> None:
    of, expected = TABLE[what]
    found = examine(of)
    assert said(found) == expected
    assert {finding.domain for finding in found} == {"vm1"}
    for finding in found:
        assert finding.severity != "problem" or finding.next or finding.code in UNTYPED


# Here what to do depends on what the text names: a file to bring back, a program that is to let go.
UNTYPED = {"image-unusable", "image-in-use", "image-missing", "boot-file-missing", "would-not-start", "filter-left"}


def test_what_to_type_is_what_mends_it() -> None:
    def typed(what: str) -> tuple[str, ...]:
        (finding,) = [each for each in examine(TABLE[what][0]) if each.severity != "ok"]
        return finding.next

    assert typed("a header that names another") == ("qemu-img rebase -u -f qcow2 -F raw -b /base.img /a.img",)
    assert typed("a base of which the header says more") == ("qemu-img rebase -u -f raw -b '' /base.img",)
    assert typed("a file that is left over") == ("rm /left.img",)
    assert typed("a file that is left over, and open") == ()
    assert typed("a node of ours that nothing uses") == (
        '{"execute": "blockdev-del", "arguments": {"node-name": "bfbeef-5-vda-x"}}',
    )
    assert typed("a job of ours that is not in the journal") == (
        '{"execute": "job-cancel", "arguments": {"id": "bfbeef-5-vda-m"}}',
    )


# --- the host -------------------------------------------------------------------------------------------------

HOST = Host(
    state_dir="/var/lib/blockferry",
    mode=0o700,
    owner=0,
    user=0,
    journal=3,
    free=9 * GIB,
    qemus=(Program(path="/usr/bin/qemu-system-x86_64", version="10.0.2", commands=ABLE),),
    qemu_img=Program(path="/usr/bin/qemu-img", version="10.0.2"),
    schema=("/usr/share/libvirt/schemas/domain.rng", True),
    kvm=True,
)
HOSTS: dict[str, tuple[dict[str, object], list[tuple[str, str]]]] = {
    "well": ({}, []),
    "open to others": ({"mode": 0o750}, [("problem", "state-dir-open")]),
    "somebody else's": ({"owner": 1000}, [("problem", "state-dir-owner")]),
    "full": ({"free": 1 << 20}, [("problem", "state-dir-full")]),
    "no QEMU": ({"qemus": ()}, [("note", "qemu-missing")]),
    "a guest without a program": ({"missing": (("vm1", "qemu-system-arm"),)}, [("problem", "qemu-missing")]),
    "a QEMU that does not run": ({"qemus": (Program(path="/q", problem="exec format"),)}, [("problem", "qemu-broken")]),
    "an old QEMU": ({"qemus": (Program(path="/q", version="6.2.0", commands=ABLE),)}, [("note", "qemu-old")]),
    "no qemu-img": ({"qemu_img": Program(path="qemu-img", problem="No such file")}, [("problem", "qemu-img-missing")]),
    "no kvm": ({"kvm": None}, [("note", "kvm-missing")]),
    "no kvm, and a guest that wants it": ({"kvm": False, "kvm_guests": ("vm1",)}, [("problem", "kvm-missing")]),
    "no schema": ({"schema": ("/nowhere", False)}, [("note", "schema-missing")]),
}


@pytest.mark.parametrize("what", HOSTS)
def test_what_is_said_of_a_host(what: str) -> None:
    more, expected = HOSTS[what]
    assert said(inspect(msgspec.structs.replace(HOST, **more))) == expected


@pytest.mark.parametrize("command", NEEDED)
def test_what_a_qemu_has_to_have(command: str) -> None:
    (finding,) = can_do("QEMU", ABLE - {command})
    assert (finding.severity, finding.code) == ("problem", "qemu-lacks")
    assert command in finding.text


def test_every_code_is_in_the_docs() -> None:
    docs = Path(__file__).parents[2] / "docs/commands/doctor.md"
    source = "".join(Path(module.__file__ or "").read_text() for module in (findings, installed))
    codes = set(re.findall(r'(?:ok|note|problem)\(\s*"([a-z-]+)"', source)) | set(
        re.findall(r'code="([a-z-]+)"', source)
    )
    assert set(re.findall(r"^\| `([a-z][a-z-]+)` \|", docs.read_text(), re.MULTILINE)) == codes | {"domain"}
