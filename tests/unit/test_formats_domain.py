"""`<domain>`: what libvirt's clients read of an attached guest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from blockferry.formats.domain import domain_xml
from blockferry.model.domain import Capabilities, Observation
from blockferry.model.graph import Disk, Graph, Image, Node
from blockferry.model.view import MirrorView

SCHEMAS = Path(os.environ.get("LIBVIRT_SCHEMAS", "/usr/share/libvirt/schemas"))
UUID = "8d5a5bd0-5c3e-4b5e-8f0a-0d5f0d5f0d5f"


def observation(*disks: Disk, host_device: str | None = None, **changes: object) -> Observation:
    node = Node(name="n", driver="host_device", filename=host_device or "", virtual_size=0, read_only=False)
    values: dict[str, object] = {
        "status": "running",
        "running": True,
        "graph": Graph({"n": node} if host_device else {}, frozenset()),
        "disks": disks,
        "jobs": {},
        "capabilities": Capabilities(version="7.2.22", commands=frozenset()),
        "pid": 42,
        "uuid": UUID,
        "memory": 64 << 20,
        "vcpus": 2,
    }
    return Observation(**(values | changes))  # type: ignore[arg-type]


def disk(*files: tuple[str, str], **changes: object) -> Disk:
    chain = tuple(
        Image(node=f"#block{n}", file=file, format=fmt, virtual_size=1) for n, (file, fmt) in enumerate(files)
    )
    values: dict[str, object] = {
        "target": "vda",
        "backend": "d0",
        "qdev": "d0",
        "drive": "d0",
        "bus": "virtio",
        "chain": chain,
    }
    return Disk(**(values | changes))  # type: ignore[arg-type]


WHOLE = f"""\
<domain type="qemu" id="42">
  <name>guest</name>
  <uuid>{UUID}</uuid>
  <memory unit="KiB">65536</memory>
  <vcpu>2</vcpu>
  <os>
    <type>hvm</type>
  </os>
  <devices>
    <disk type="file" device="disk">
      <driver name="qemu" type="qcow2"/>
      <source file="/s/top.qcow2"/>
      <backingStore type="file">
        <format type="qcow2"/>
        <source file="/s/mid.qcow2"/>
        <backingStore type="block">
          <format type="raw"/>
          <source dev="/dev/sdz"/>
          <backingStore/>
        </backingStore>
      </backingStore>
      <mirror type="file" file="/m/top.qcow2" format="qcow2" job="copy" ready="yes">
        <format type="qcow2"/>
        <source file="/m/top.qcow2"/>
      </mirror>
      <target dev="vda" bus="virtio"/>
      <alias name="d0"/>
    </disk>
    <disk type="file" device="cdrom">
      <driver name="qemu"/>
      <target dev="sda" bus="sata"/>
      <readonly/>
      <alias name="cd"/>
    </disk>
  </devices>
</domain>
"""


def whole() -> str:
    chain = disk(("/s/top.qcow2", "qcow2"), ("/s/mid.qcow2", "qcow2"), ("/dev/sdz", "raw"))
    empty = disk(target="sda", qdev="cd", bus="sata", device="cdrom", read_only=True)
    mirror = MirrorView(file="/m/top.qcow2", format="qcow2", state="ready")
    return domain_xml("guest", observation(chain, empty, host_device="/dev/sdz"), {"vda": mirror})


def test_a_whole_guest() -> None:
    assert whole() == WHOLE


def test_what_is_not_known_is_left_out() -> None:
    root = etree.fromstring(domain_xml("g", observation(pid=None, uuid=None, vcpus=0), {}))
    assert dict(root.items()) == {"type": "qemu"}
    assert [child.tag for child in root] == ["name", "memory", "os", "devices"]


@pytest.mark.parametrize(
    ("file", "kind", "source"),
    [
        ("/a", "file", '<source file="/a"/>'),
        ("null-co://", "file", '<source file="null-co://"/>'),
        ("/dev/sdz", "block", '<source dev="/dev/sdz"/>'),
        ("nbd://h:1/e", "network", '<source protocol="nbd" name="e"><host name="h" port="1"/></source>'),
        ("nbd://h", "network", '<source protocol="nbd"><host name="h" port="10809"/></source>'),
        ("nbd://[::1]:2/a%20b", "network", '<source protocol="nbd" name="a b"><host name="::1" port="2"/></source>'),
        (
            "nbd+unix:///e?socket=/p+q",
            "network",
            '<source protocol="nbd" name="e"><host transport="unix" socket="/p+q"/></source>',
        ),
        ("nbd+unix://?socket=/p", "network", '<source protocol="nbd"><host transport="unix" socket="/p"/></source>'),
        ("nbd+unix:///e", "network", '<source protocol="nbd" name="nbd+unix:///e"/>'),
        ("nbd:unix:/p", "network", '<source protocol="nbd" name="nbd:unix:/p"/>'),
        ("nbd://h:x/e", "network", '<source protocol="nbd" name="nbd://h:x/e"/>'),
        ("nbd://[/e", "network", '<source protocol="nbd" name="nbd://[/e"/>'),
    ],
)
def test_sources(file: str, kind: str, source: str) -> None:
    mirror = MirrorView(file=file, format="raw", state="copying")
    xml = domain_xml("g", observation(disk((file, "raw")), host_device="/dev/sdz"), {"vda": mirror})
    compact = etree.fromstring(xml, etree.XMLParser(remove_blank_text=True))
    for path in ("devices/disk", "devices/disk/mirror"):
        element = compact.find(path)
        assert element is not None
        assert element.get("type") == kind
        found = element.find("source")
        assert found is not None
        assert etree.tostring(found, encoding="unicode") == source


@pytest.mark.parametrize(
    ("state", "attributes"),
    [
        ("copying", {"type": "file", "file": "/m", "format": "raw", "job": "copy"}),
        ("ready", {"type": "file", "file": "/m", "format": "raw", "job": "copy", "ready": "yes"}),
        ("pivoted", None),
        ("finished", None),
        ("cancelled", None),
        ("removed", None),
        ("lost", None),
    ],
)
def test_only_a_mirror_that_works_is_shown(state: str, attributes: dict[str, str] | None) -> None:
    mirror = MirrorView(file="/m", format="raw", state=state)
    root = etree.fromstring(domain_xml("g", observation(disk(("/a", "raw"))), {"vda": mirror, "vdb": mirror}))
    found = root.find("devices/disk/mirror")
    assert (None if found is None else dict(found.items())) == attributes


def test_a_qom_path_is_no_alias() -> None:
    root = etree.fromstring(domain_xml("g", observation(disk(qdev="/machine/peripheral-anon/device[0]")), {}))
    assert root.find("devices/disk/alias") is None


def test_a_long_chain() -> None:
    chain = disk(*((f"/s/{n}", "qcow2") for n in range(200)))
    root = etree.fromstring(domain_xml("g", observation(chain), {}))
    assert len(list(root.iter("backingStore"))) == 200
    assert [source.get("file") for source in root.iter("source")] == [f"/s/{n}" for n in range(200)]


@given(st.text(), st.text(), st.text())
def test_whatever_qemu_says_it_is_xml(name: str, file: str, qdev: str) -> None:
    mirror = MirrorView(file="nbd://" + file, format="raw", state="ready")
    etree.fromstring(domain_xml(name, observation(disk((file, "raw"), qdev=qdev)), {"vda": mirror}))


@pytest.mark.parametrize("dest", ["/m/a", "nbd://host:1/e", "nbd+unix:///e?socket=/p", "/dev/sdz"])
def test_valid_to_libvirt(dest: str) -> None:
    schema = etree.RelaxNG(file=str(SCHEMAS / "domain.rng"))
    schema.assertValid(etree.fromstring(whole()))
    mirror = MirrorView(file=dest, format="qcow2", state="copying")
    anonymous = disk((dest, "raw"), qdev="/machine/peripheral-anon/device[0]/virtio-backend")
    xml = domain_xml("g", observation(anonymous, host_device="/dev/sdz", uuid=None, vcpus=0), {"vda": mirror})
    schema.assertValid(etree.fromstring(xml))
