"""Snapshots as libvirt writes them, ours with what libvirt has no word for, and what is made of both."""

import pytest
from lxml import etree

from blockferry.errors import InvalidXml
from blockferry.formats.snapshot import parse_snapshot, snapshot_xml
from blockferry.model.snapshot import DiskWish, MirrorWish, Mode, Snapshot, SnapshotDisk, SnapshotWish

# `virsh snapshot-dumpxml` of a disk-only snapshot of a guest that runs: libvirt 9.0, the domain cut down.
LIBVIRT_9 = """<domainsnapshot>
  <name>before-upgrade</name>
  <description>a &amp; b</description>
  <state>disk-snapshot</state>
  <parent>
    <name>1763800000</name>
  </parent>
  <creationTime>1763856000</creationTime>
  <memory snapshot='no'/>
  <disks>
    <disk name='vda' snapshot='external' type='file'>
      <driver type='qcow2'/>
      <source file='/var/lib/libvirt/images/vm1.before-upgrade'/>
    </disk>
    <disk name='vdb' snapshot='no'/>
    <disk name='vdc' snapshot='external' type='block'>
      <driver type='qcow2'/>
      <source dev='/dev/vg0/vm1-overlay'/>
    </disk>
  </disks>
  <domain type='kvm' id='3'>
    <name>vm1</name>
    <uuid>6f0dd5b1-4f53-4a4e-93b7-7b2f0f4b7c11</uuid>
    <metadata>
      <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0"/>
    </metadata>
    <memory unit='KiB'>1048576</memory>
    <os>
      <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    </os>
    <devices>
      <disk type='file' device='disk'>
        <driver name='qemu' type='qcow2' discard='unmap'/>
        <source file='/var/lib/libvirt/images/vm1.qcow2' index='2'/>
        <backingStore/>
        <target dev='vda' bus='virtio'/>
        <alias name='virtio-disk0'/>
      </disk>
    </devices>
    <seclabel type='none' model='none'/>
  </domain>
  <cookie>
    <cpu mode='custom' match='exact' check='partial'>
      <model fallback='forbid'>qemu64</model>
    </cpu>
  </cookie>
</domainsnapshot>
"""
# libvirt 11 has the definition for the next boot beside the live one, and says (with --security-info or in its own
# files) whether the snapshot is current.
LIBVIRT_11 = LIBVIRT_9.replace(
    "  <cookie>", "  <inactiveDomain type='kvm'>\n    <name>vm1</name>\n  </inactiveDomain>\n  <cookie>"
).replace("</domainsnapshot>", "  <active>1</active>\n</domainsnapshot>")
# What its man page shows to be asked for: `virsh snapshot-create-as --disk-only --print-xml`.
ASKED = """<domainsnapshot>
  <name>s</name>
  <disks>
    <disk name='vda' snapshot='external' type='block'>
      <driver type='qcow2'/>
      <source dev='/dev/vg0/o'/>
    </disk>
    <disk name='vdb' snapshot='no'>
    </disk>
  </disks>
</domainsnapshot>
"""


@pytest.mark.parametrize("xml", [LIBVIRT_9, LIBVIRT_11, f"<?xml version='1.0' encoding='UTF-8'?>\n{LIBVIRT_11}"])
def test_a_dump_of_libvirts_is_a_request_for_the_same(xml: str) -> None:
    """Like libvirt's own redefinition, but for a new snapshot: what it says of the past is passed over."""
    assert parse_snapshot(xml) == SnapshotWish(
        name="before-upgrade",
        description="a & b",
        disks=(
            DiskWish(name="vda", file="/var/lib/libvirt/images/vm1.before-upgrade"),
            DiskWish(name="vdb", snapshot="no"),
            DiskWish(name="vdc", file="/dev/vg0/vm1-overlay"),
        ),
    )


def test_a_request_of_virshs() -> None:
    disks = (DiskWish(name="vda", file="/dev/vg0/o"), DiskWish(name="vdb", snapshot="no"))
    assert parse_snapshot(ASKED) == SnapshotWish(name="s", disks=disks)


@pytest.mark.parametrize(
    ("said", "instead", "element", "reason"),
    [
        ("<memory snapshot='no'/>", "<memory snapshot='external' file='/m'/>", "memory", "say snapshot='no'"),
        ("<memory snapshot='no'/>", "<memory snapshot='internal'/>", "memory", "say snapshot='no'"),
        ("name='vdb' snapshot='no'", "name='vdb' snapshot='internal'", "disks/disk[2]", "internal"),
        ("type='file'>", "type='network'>", "disks/disk[1]", "say 'file' or 'block'"),
        ("type='file'>", "type='volume'>", "disks/disk[1]", "say 'file' or 'block'"),
        ("type='file'>", "type='vhostvdpa'>", "disks/disk[1]", "say 'file' or 'block'"),
        ("<source dev=", "<source file=", "disks/disk[3]/source", "'file'"),
        ("/dev/vg0/vm1-overlay", "dev/vg0/vm1-overlay", "disks/disk[3]/source", "absolute"),
        ("/dev/vg0/vm1-overlay", "/dev/vg0/../sda", "disks/disk[3]/source", "'..'"),
        ("<driver type='qcow2'/>", "<driver type='qed'/>", "disks/disk[1]/driver", "qcow2 only"),
        ("<disk name='vdb' snapshot='no'/>", "<revertDisks/>", "disks", "<revertDisks>"),
        ("  <cookie>", "  <revertDisks/>\n  <cookie>", "", "<revertDisks>"),
        (
            "<driver type='qcow2'/>",
            "<driver type='qcow2'/><snapshotDeleteInProgress/>",
            "disks/disk[1]",
            "<snapshotDeleteInProgress>",
        ),
    ],
)
def test_what_libvirt_can_and_we_can_not_is_refused_by_name(said: str, instead: str, element: str, reason: str) -> None:
    assert said in LIBVIRT_9
    with pytest.raises(InvalidXml) as caught:
        parse_snapshot(LIBVIRT_9.replace(said, instead, 1))
    assert caught.value.element == "/".join(filter(None, ("domainsnapshot", element)))
    assert reason in caught.value.reason


# --- header modes and block devices ---------------------------------------------------------------------------


def one_disk(attributes: str, inner: str = "") -> str:
    return f"<domainsnapshot><disks><disk name='vda' {attributes}>{inner}</disk></disks></domainsnapshot>"


@pytest.mark.parametrize("mode", ["existing", "absolute", "relative", "none"])
@pytest.mark.parametrize("block", [False, True])
def test_mode_and_block_device_survive_the_dump(mode: Mode, block: bool) -> None:
    disk = SnapshotDisk(
        target="vda", file="/o", format="qcow2", backing="/b", backing_format="raw", block=block, mode=mode, mirror="/m"
    )
    snapshot = Snapshot(domain="d", name="s", created=1, state="running", disks=(disk,), left_out=("vdb",))
    xml = snapshot_xml(snapshot, {}, current=True)
    found = etree.fromstring(xml).find("disks/disk")
    assert found is not None
    assert (found.get("type"), found.get("mode")) == ("block" if block else "file", mode)
    (source,) = found.findall("source")
    assert dict(source.items()) == {"dev" if block else "file": "/o"}
    assert parse_snapshot(xml) == SnapshotWish(
        name="s",
        disks=(
            DiskWish(name="vda", file="/o", mode=mode, mirror=MirrorWish(file="/m")),
            DiskWish(name="vdb", snapshot="no"),
        ),
    )


@pytest.mark.parametrize("mode", ["", "Existing", "relative ", "default-paths", "absolute-paths"])
def test_mode_that_is_none(mode: str) -> None:
    with pytest.raises(InvalidXml, match="is none of existing, absolute, relative, none"):
        parse_snapshot(one_disk(f"mode='{mode}'"))


@pytest.mark.parametrize(
    ("attributes", "inner", "file"),
    [
        ("type='block'", "", None),
        ("type='block'", "<source/>", None),
        ("type='block'", "<source dev='/dev/a'/>", "/dev/a"),
        ("type='file'", "<source file='/dev/a'/>", "/dev/a"),  # what it is, the system says
        ("", "<source file='/a'/>", "/a"),
    ],
)
def test_source_is_where_its_type_has_it(attributes: str, inner: str, file: str | None) -> None:
    assert parse_snapshot(one_disk(attributes, inner)).disks == (DiskWish(name="vda", file=file),)


@pytest.mark.parametrize(
    ("attributes", "inner"),
    [
        ("type='block'", "<source file='/a'/>"),
        ("type='block'", "<source dev='/dev/a' file='/a'/>"),
        ("type='file'", "<source dev='/dev/a'/>"),
        ("", "<source dev='/dev/a'/>"),
        ("type='block'", "<source dev='/dev/a' index='1'/>"),
        ("type='block'", "<mirror dev='/dev/a'/>"),
        ("type=''", ""),
        ("type='dir'", ""),
    ],
)
def test_source_that_contradicts_its_type(attributes: str, inner: str) -> None:
    with pytest.raises(InvalidXml):
        parse_snapshot(one_disk(attributes, inner))
