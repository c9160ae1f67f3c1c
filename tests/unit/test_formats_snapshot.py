"""`<domainsnapshot>`: everything in it is carried out or refused, and a dump is a request for the same."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import get_args
from xml.sax.saxutils import escape, quoteattr

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from blockferry.errors import InvalidName, InvalidXml
from blockferry.formats.names import path_flaw, valid_name
from blockferry.formats.snapshot import parse_snapshot, snapshot_xml
from blockferry.model.snapshot import DiskWish, MirrorWish, Mode, Snapshot, SnapshotDisk, SnapshotWish
from blockferry.model.view import MirrorView

SCHEMAS = Path(os.environ.get("LIBVIRT_SCHEMAS", "/usr/share/libvirt/schemas"))

PROPOSAL = """
<domainsnapshot>
  <disks>
    <disk name='/src/base.img' snapshot='external'>
      <source file='/src/snap.img'/>
      <mirror file='/dest/snap.img'/>
    </disk>
  </disks>
</domainsnapshot>
"""

# What libvirt's dumps say beside what can be asked for.
DUMPED = """<?xml version='1.0' encoding='UTF-8'?>
<domainsnapshot>
  <state>running</state>
  <creationTime>1</creationTime>
  <parent><name>p</name></parent>
  <domain type='kvm'><name>d</name><devices><disk/></devices></domain>
  <inactiveDomain/>
  <cookie><x/></cookie>
  <active>1</active>
</domainsnapshot>
"""


def disk_xml(inner: str = "", **attributes: str) -> str:
    attributes = {"name": "vda", **attributes}
    head = " ".join(f"{name}={quoteattr(value)}" for name, value in attributes.items())
    return f"<domainsnapshot><disks><disk {head}>{inner}</disk></disks></domainsnapshot>"


def wish_xml(wish: SnapshotWish) -> str:
    def element(tag: str, inner: str | None = None, **attributes: str | None) -> str:
        head = "".join(f" {name}={quoteattr(value)}" for name, value in attributes.items() if value is not None)
        return f"<{tag}{head}/>" if inner is None else f"<{tag}{head}>{inner}</{tag}>"

    disks = ""
    for disk in wish.disks:
        inner = "" if disk.file is None else element("source", file=disk.file)
        if (mirror := disk.mirror) is not None:
            inner += element("mirror", file=mirror.file, backing=mirror.backing, backingFormat=mirror.backing_format)
        disks += element("disk", inner, name=disk.name, snapshot=disk.snapshot, mode=disk.mode)
    inner = element("disks", disks)
    for tag, content in (("description", wish.description), ("name", wish.name)):
        inner += "" if content is None else element(tag, escape(content, {"\r": "&#13;"}))
    return element("domainsnapshot", inner)


def test_the_proposals_own_example() -> None:
    mirror = MirrorWish(file="/dest/snap.img")
    assert parse_snapshot(PROPOSAL) == SnapshotWish(
        disks=(DiskWish(name="/src/base.img", file="/src/snap.img", mirror=mirror),)
    )


@pytest.mark.parametrize(
    ("xml", "wish"),
    [
        ("<domainsnapshot/>", SnapshotWish()),
        ("<domainsnapshot><name/><description/><disks/></domainsnapshot>", SnapshotWish()),
        (
            "<domainsnapshot><name>a</name><description> b\n</description><memory snapshot='no'/></domainsnapshot>",
            SnapshotWish(name="a", description=" b\n"),
        ),
        (disk_xml(), SnapshotWish(disks=(DiskWish(name="vda"),))),
        (disk_xml("<driver/><source/>"), SnapshotWish(disks=(DiskWish(name="vda"),))),
        (disk_xml(snapshot="no"), SnapshotWish(disks=(DiskWish(name="vda", snapshot="no"),))),
        (
            disk_xml(name="/machine/peripheral-anon/device[0]"),
            SnapshotWish(disks=(DiskWish(name="/machine/peripheral-anon/device[0]"),)),
        ),
        (
            disk_xml(
                "<driver type='qcow2'/><source file='/s'/><mirror file='/m' backing='/b' backingFormat='raw'/>",
                type="file",
            ),
            SnapshotWish(
                disks=(
                    DiskWish(name="vda", file="/s", mirror=MirrorWish(file="/m", backing="/b", backing_format="raw")),
                )
            ),
        ),
        (DUMPED, SnapshotWish()),
    ],
)
def test_accepted(xml: str, wish: SnapshotWish) -> None:
    assert parse_snapshot(xml) == wish


@pytest.mark.parametrize(
    ("xml", "element", "reason"),
    [
        ("<domain/>", "domain", "must be a <domainsnapshot>"),
        ("<domainsnapshot x='1'/>", "domainsnapshot", "attribute 'x'"),
        ("<domainsnapshot><x/></domainsnapshot>", "domainsnapshot", "<x>"),
        ("<domainsnapshot><revertDisks/></domainsnapshot>", "domainsnapshot", "<revertDisks>"),
        ("<domainsnapshot>x</domainsnapshot>", "domainsnapshot", "'x'"),
        ("<domainsnapshot><disks/>x</domainsnapshot>", "domainsnapshot", "'x'"),
        ("<domainsnapshot xmlns:x='urn:x'><x:disks/></domainsnapshot>", "domainsnapshot", "{urn:x}disks"),
        ("<domainsnapshot><disks/><disks/></domainsnapshot>", "domainsnapshot", "at most one <disks>"),
        ("<domainsnapshot><name>a<b/></name></domainsnapshot>", "domainsnapshot/name", "only text"),
        ("<domainsnapshot><memory snapshot='internal'/></domainsnapshot>", "domainsnapshot/memory", "memory"),
        ("<domainsnapshot><memory snapshot='external' file='/m'/></domainsnapshot>", "domainsnapshot/memory", "memory"),
        ("<domainsnapshot><memory/></domainsnapshot>", "domainsnapshot/memory", "memory"),
        ("<domainsnapshot><memory snapshot='no' file='/m'/></domainsnapshot>", "domainsnapshot/memory", "'file'"),
        ("<domainsnapshot><disks><dusk/></disks></domainsnapshot>", "domainsnapshot/disks", "<dusk>"),
        ("<domainsnapshot><disks><disk/></disks></domainsnapshot>", "domainsnapshot/disks/disk", "no name"),
        (disk_xml(name=""), "domainsnapshot/disks/disk", "no name"),
        (disk_xml(name="../base.img"), "domainsnapshot/disks/disk", "absolute"),
        (disk_xml(name=".."), "domainsnapshot/disks/disk", "absolute"),
        (disk_xml(name="/a/../b"), "domainsnapshot/disks/disk", "'..'"),
        (disk_xml(name="v" * 100_000), "domainsnapshot/disks/disk", "absolute"),
        (disk_xml(name="vda\n"), "domainsnapshot/disks/disk", "absolute"),
        (disk_xml(snapshot="internal"), "domainsnapshot/disks/disk", "internal"),
        (disk_xml(snapshot="manual"), "domainsnapshot/disks/disk", "manual"),
        (disk_xml(snapshot=""), "domainsnapshot/disks/disk", "means nothing"),
        (disk_xml("<source dev='/dev/sda'/>", type="network"), "domainsnapshot/disks/disk", "'network'"),
        (disk_xml("<source file='/dev/sda'/>", type="block"), "domainsnapshot/disks/disk/source", "'file'"),
        (disk_xml("<source file='/s'/>", mode="other"), "domainsnapshot/disks/disk", "none of existing, absolute"),
        (disk_xml("<source protocol='nbd'/>", type="network"), "domainsnapshot/disks/disk", "'network'"),
        (disk_xml(type="volume"), "domainsnapshot/disks/disk", "'volume'"),
        (disk_xml("<source dev='/dev/sda'/>"), "domainsnapshot/disks/disk/source", "'dev'"),
        (disk_xml("<source file='/a'><seclabel/></source>"), "domainsnapshot/disks/disk/source", "<seclabel>"),
        (disk_xml("<source file='/a' startupPolicy='optional'/>"), "domainsnapshot/disks/disk/source", "startupPolicy"),
        (disk_xml("<source file='a'/>"), "domainsnapshot/disks/disk/source", "absolute"),
        (disk_xml("<source file=''/>"), "domainsnapshot/disks/disk/source", "absolute"),
        (disk_xml("<source file='/a/../b'/>"), "domainsnapshot/disks/disk/source", "'..'"),
        (disk_xml("<source file='/a&#10;b'/>"), "domainsnapshot/disks/disk/source", "control"),
        (disk_xml(f"<source file='/{'a' * 4096}'/>"), "domainsnapshot/disks/disk/source", "longer"),
        (disk_xml("<source file='/a'/><source file='/b'/>"), "domainsnapshot/disks/disk", "at most one <source>"),
        (disk_xml("<driver type='raw'/>"), "domainsnapshot/disks/disk/driver", "qcow2 only"),
        (disk_xml("<driver type='qcow2' cache='none'/>"), "domainsnapshot/disks/disk/driver", "'cache'"),
        (disk_xml("<driver><metadata_cache/></driver>"), "domainsnapshot/disks/disk/driver", "<metadata_cache>"),
        (disk_xml("<snapshotDeleteInProgress/>"), "domainsnapshot/disks/disk", "<snapshotDeleteInProgress>"),
        (disk_xml("<mirror/>"), "domainsnapshot/disks/disk/mirror", "no file"),
        (disk_xml("<mirror file='m'/>"), "domainsnapshot/disks/disk/mirror", "absolute"),
        (disk_xml("<mirror file='nbd://h/e'/>"), "domainsnapshot/disks/disk/mirror", "absolute"),
        (disk_xml("<mirror file='/m' backing='json:{}'/>"), "domainsnapshot/disks/disk/mirror", "absolute"),
        (disk_xml("<mirror file='/m' backing='b'/>"), "domainsnapshot/disks/disk/mirror", "absolute"),
        (disk_xml("<mirror file='/m' backingFormat='luks'/>"), "domainsnapshot/disks/disk/mirror", "'luks'"),
        (disk_xml("<mirror file='/m' type='file'/>"), "domainsnapshot/disks/disk/mirror", "'type'"),
        (disk_xml("<mirror file='/m'><source/></mirror>"), "domainsnapshot/disks/disk/mirror", "<source>"),
        (disk_xml("<mirror file='/m'/><mirror file='/n'/>"), "domainsnapshot/disks/disk", "at most one <mirror>"),
        (disk_xml("<mirror file='/m'/>", snapshot="no"), "domainsnapshot/disks/disk", "leaves the disk out"),
        (disk_xml("<source file='/m'/>", snapshot="no"), "domainsnapshot/disks/disk", "leaves the disk out"),
        (disk_xml("</disk><disk name='vda' snapshot='no'>"), "domainsnapshot/disks/disk[2]", "twice"),
    ],
)
def test_refused(xml: str, element: str, reason: str) -> None:
    with pytest.raises(InvalidXml) as caught:
        parse_snapshot(xml)
    assert caught.value.element == element
    assert reason in caught.value.reason
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["-a", ".a", "a/b", " ", "a\n", "..", "a" * 500_000])
def test_refused_names(name: str) -> None:
    with pytest.raises(InvalidName) as caught:
        parse_snapshot(f"<domainsnapshot><name>{name}</name></domainsnapshot>")
    assert len(str(caught.value)) < 500


def taken(**changes: object) -> Snapshot:
    disk = SnapshotDisk(target="vda", file="/s/a.snap", format="qcow2", backing="/s/a.img", backing_format="raw")
    values: dict[str, object] = {"domain": "d", "name": "s", "created": 7.9, "state": "running", "disks": (disk,)}
    return Snapshot(**(values | changes))  # type: ignore[arg-type]


def test_a_dump_looks_like_libvirts() -> None:
    mirrored = SnapshotDisk(
        target="vdb",
        file="/s/b.snap",
        format="qcow2",
        backing="/s/b.img",
        backing_format="qcow2",
        mirror="/m/b.snap",
        mirror_backing="/m/b.img",
    )
    snapshot = taken(disks=(*taken().disks, mirrored), parent="p", description="<d> & \r\n")
    view = MirrorView(file="/m/b.snap", format="qcow2", state="ready", snapshot="s")
    assert snapshot_xml(snapshot, {"vdb": view}, current=True) == (
        "<domainsnapshot>\n"
        "  <name>s</name>\n"
        "  <description>&lt;d&gt; &amp; &#13;\n</description>\n"
        "  <state>disk-snapshot</state>\n"
        "  <parent>\n"
        "    <name>p</name>\n"
        "  </parent>\n"
        "  <creationTime>7</creationTime>\n"
        '  <memory snapshot="no"/>\n'
        "  <disks>\n"
        '    <disk name="vda" snapshot="external" type="file">\n'
        '      <driver type="qcow2"/>\n'
        '      <source file="/s/a.snap"/>\n'
        "    </disk>\n"
        '    <disk name="vdb" snapshot="external" type="file">\n'
        '      <driver type="qcow2"/>\n'
        '      <source file="/s/b.snap"/>\n'
        '      <mirror file="/m/b.snap" backing="/m/b.img" state="ready" ready="yes"/>\n'
        "    </disk>\n"
        "  </disks>\n"
        "  <active>1</active>\n"
        "  <cookie>\n"
        '    <blockferry created="7.900000000" state="running">\n'
        '      <backing disk="vda" file="/s/a.img" format="raw"/>\n'
        '      <backing disk="vdb" file="/s/b.img" format="qcow2"/>\n'
        "    </blockferry>\n"
        "  </cookie>\n"
        "</domainsnapshot>\n"
    )


@pytest.mark.parametrize(
    ("view", "attributes"),
    [
        (None, {}),
        (MirrorView(file="/m", format="qcow2", state="copying"), {"state": "copying", "ready": "no"}),
        (MirrorView(file="/m", format="qcow2", state="lost"), {"state": "lost", "ready": "no"}),
        (MirrorView(file="/m", format="qcow2", state="ready"), {"state": "ready", "ready": "yes"}),
        (MirrorView(file="/another", format="qcow2", state="ready"), {}),
    ],
)
def test_a_mirrors_state_is_dumped(view: MirrorView | None, attributes: dict[str, str]) -> None:
    disk = SnapshotDisk(target="vda", file="/s", format="qcow2", backing="/b", backing_format="raw", mirror="/m")
    xml = snapshot_xml(taken(disks=(disk,)), {} if view is None else {"vda": view}, current=False)
    mirror = etree.fromstring(xml).find("disks/disk/mirror")
    assert mirror is not None
    assert dict(mirror.items()) == {"file": "/m", **attributes}


XML_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="\ufffe\uffff"))
NAMES = st.from_regex(r"[A-Za-z0-9_+][A-Za-z0-9._+-]{0,59}", fullmatch=True)
IDS = st.from_regex(r"[a-z][a-z0-9._-]{0,20}", fullmatch=True)
PATHS = XML_TEXT.map(lambda tail: "/" + tail).filter(lambda path: path_flaw(path) is None)
FORMATS = st.sampled_from(["raw", "qcow2", "vmdk"])
MIRRORS = st.builds(MirrorWish, file=PATHS, backing=st.none() | PATHS, backing_format=st.none() | FORMATS)
MODES = st.none() | st.sampled_from(get_args(Mode))
DISK_WISHES = st.builds(
    DiskWish, name=IDS | PATHS, file=st.none() | PATHS, mode=MODES, mirror=st.none() | MIRRORS
) | st.builds(DiskWish, name=IDS | PATHS, snapshot=st.just("no"))
WISHES = st.builds(
    SnapshotWish,
    name=st.none() | NAMES,
    description=st.none() | XML_TEXT.filter(bool),
    disks=st.lists(DISK_WISHES, max_size=4, unique_by=lambda disk: disk.name).map(tuple),
)
SNAPSHOT_DISKS = st.builds(
    SnapshotDisk,
    target=IDS,
    file=PATHS,
    format=st.just("qcow2"),
    backing=PATHS,
    backing_format=FORMATS,
    block=st.booleans(),
    mode=MODES,
    mirror=PATHS,
    mirror_backing=st.none() | PATHS,
) | st.builds(SnapshotDisk, target=IDS, file=PATHS, format=st.just("qcow2"), backing=PATHS, backing_format=FORMATS)
SNAPSHOTS = st.builds(
    Snapshot,
    domain=NAMES,
    name=NAMES,
    created=st.floats(0, 1e11),
    state=st.sampled_from(["running", "paused", "io-error"]),
    disks=st.lists(SNAPSHOT_DISKS, max_size=4, unique_by=lambda disk: disk.target).map(tuple),
    parent=st.none() | NAMES,
    description=st.none() | XML_TEXT.filter(bool),
)
STATES = st.sampled_from(["copying", "ready", "pivoted", "finished", "cancelled", "removed", "lost"])


@given(WISHES)
def test_a_wish_survives_xml(wish: SnapshotWish) -> None:
    assert parse_snapshot(wish_xml(wish)) == wish


@given(SNAPSHOTS, STATES, st.booleans())
def test_a_dump_is_a_request_for_the_same(snapshot: Snapshot, state: str, current: bool) -> None:
    mirrors = {
        disk.target: MirrorView(file=disk.mirror, format="qcow2", state=state)
        for disk in snapshot.disks
        if disk.mirror is not None
    }
    assert parse_snapshot(snapshot_xml(snapshot, mirrors, current=current)) == SnapshotWish(
        name=snapshot.name,
        description=snapshot.description,
        disks=tuple(
            DiskWish(
                name=disk.target,
                file=disk.file,
                mode=disk.mode,
                mirror=None if disk.mirror is None else MirrorWish(file=disk.mirror, backing=disk.mirror_backing),
            )
            for disk in snapshot.disks
        ),
    )


@given(st.text(), st.text())
def test_whatever_a_snapshot_holds_its_dump_is_xml(description: str, file: str) -> None:
    disk = SnapshotDisk(target="vda", file=file, format="qcow2", backing="/b", backing_format="raw")
    etree.fromstring(snapshot_xml(taken(description=description, disks=(disk,)), {}, current=False))


TAGS = ["domainsnapshot", "name", "description", "memory", "disks", "disk", "driver", "source", "mirror", "domain", "x"]
ATTRIBUTES = ["name", "snapshot", "type", "mode", "file", "dev", "backing", "backingFormat", "state", "ready", "x"]
VALUES = [
    "",
    "relative",
    "vda",
    "no",
    "external",
    "internal",
    "file",
    "block",
    "qcow2",
    "raw",
    "/a",
    "a",
    "/a/../b",
    "..",
    "a&#0;",
]


@st.composite
def trees(draw: st.DrawFn, depth: int = 0) -> str:
    tag = draw(st.sampled_from(TAGS)) if depth or draw(st.integers(0, 9)) == 0 else "domainsnapshot"
    attributes = draw(st.dictionaries(st.sampled_from(ATTRIBUTES), st.sampled_from(VALUES), max_size=3))
    head = "".join(f" {name}='{value}'" for name, value in attributes.items())
    inner = draw(st.lists(trees(depth=depth + 1), max_size=3)) if depth < 4 else []
    return f"<{tag}{head}>{draw(st.sampled_from(['', '', ' ', 'a', '..']))}{''.join(inner)}</{tag}>"


@given(trees() | st.text() | st.binary().map(lambda data: data.decode(errors="surrogateescape")))
def test_any_document_is_a_wish_or_refused(xml: str) -> None:
    try:
        wish = parse_snapshot(xml)
    except (InvalidXml, InvalidName):
        return
    assert wish.name is None or valid_name(wish.name)
    assert parse_snapshot(wish_xml(wish)) == wish


@given(description=XML_TEXT, current=st.booleans())
def test_a_dump_without_mirrors_is_valid_to_libvirt(description: str, current: bool) -> None:
    xml = snapshot_xml(taken(description=description, parent="p"), {}, current=current)
    _schema().assertValid(etree.fromstring(xml))


@functools.cache
def _schema() -> etree.RelaxNG:
    return etree.RelaxNG(file=str(SCHEMAS / "domainsnapshot.rng"))
