"""The XML of a guest that we start: what isn't understood stays, and every disk names its present images."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from definitions import EVERYTHING, VIRT_MANAGER, VIRT_MANAGER_IGNORED, disk, guest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from blockferry.formats.defined import inactive_xml, live_xml, with_uuid
from blockferry.formats.definition import parse_definition
from blockferry.formats.names import path_flaw
from blockferry.model.definition import Source
from blockferry.model.domain import Capabilities, Observation
from blockferry.model.graph import Disk, Graph, Image, Node
from blockferry.model.view import MirrorView

UUID = "00000000-1111-2222-3333-444444444444"
NONE: frozenset[str] = frozenset()


def compact(xml: str) -> Any:
    return etree.fromstring(xml, etree.XMLParser(remove_blank_text=True))


def same(one: str, other: str) -> bool:
    return bool(etree.tostring(compact(one), method="c14n") == etree.tostring(compact(other), method="c14n"))


def shown(xml: str, target: str) -> list[str]:
    """What a disk's element says, a line for each of its children; the element itself first."""
    (element,) = compact(xml).xpath(f"/domain/devices/disk[target/@dev='{target}']")
    attributes = " ".join(f"{name}={value}" for name, value in element.attrib.items())
    return [attributes, *(etree.tostring(child, encoding="unicode") for child in element)]


def observation(*disks: Disk, host_device: str | None = None, pid: int | None = 7) -> Observation:
    node = Node(name="n", driver="host_device", filename=host_device or "", virtual_size=0, read_only=False)
    return Observation(
        status="running",
        running=True,
        graph=Graph({"n": node} if host_device else {}, frozenset()),
        disks=disks,
        jobs={},
        capabilities=Capabilities(version="7.2.22", commands=frozenset()),
        uuid=UUID,
        memory=1 << 26,
        vcpus=1,
        pid=pid,
    )


def running(target: str, *chain: tuple[str, str]) -> Disk:
    images = tuple(
        Image(node=f"{target}-{depth}", file=file, format=fmt, virtual_size=1)
        for depth, (file, fmt) in enumerate(chain)
    )
    return Disk(
        target=target, bus="virtio", backend=f"disk-{target}", qdev=f"disk-{target}", drive=target, chain=images
    )


# --- as it was given ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("xml", [VIRT_MANAGER, EVERYTHING])
def test_a_definition_stays_as_it_was_written(xml: str) -> None:
    assert same(with_uuid(xml, UUID), xml)
    assert same(inactive_xml(xml, {}, NONE), xml)


def test_one_without_a_uuid_is_given_one() -> None:
    xml = with_uuid(guest(disk()).replace("type='qemu'", "type='qemu' id='3'", 1), UUID)
    assert parse_definition(xml).uuid == UUID
    assert [child.tag for child in compact(xml)][:2] == ["name", "uuid"]
    assert "id" not in compact(xml).attrib, "that of a process of somebody else's"


# --- what is started next -------------------------------------------------------------------------------------


def test_a_disk_that_is_on_another_image_by_now() -> None:
    xml = inactive_xml(VIRT_MANAGER, {"vda": ("/snap/one", "qcow2")}, NONE)
    address = '<address type="pci" domain="0x0000" bus="0x04" slot="0x00" function="0x0"/>'
    assert shown(xml, "vda") == [
        "type=file device=disk",
        '<driver name="qemu" type="qcow2" discard="unmap"/>',
        '<source file="/snap/one"/>',
        '<target dev="vda" bus="virtio"/>',
        address,
    ]
    assert shown(xml, "sda") == shown(VIRT_MANAGER, "sda")
    assert parse_definition(xml).ignored == VIRT_MANAGER_IGNORED


@pytest.mark.parametrize(
    ("file", "devices", "source"),
    [
        ("/a, b=c", NONE, Source(kind="file", where="/a, b=c", format="qcow2")),
        ("/dev/vg/a", frozenset({"/dev/vg/a"}), Source(kind="block", where="/dev/vg/a", format="qcow2")),
        ("nbd://h:10810/e%20x", NONE, Source(kind="network", where="nbd://h:10810/e%20x", format="qcow2")),
        ("nbd://[::1]/e", NONE, Source(kind="network", where="nbd://[::1]:10809/e", format="qcow2")),
        (
            "nbd+unix:///e?socket=/a%20b",
            NONE,
            Source(kind="network", where="nbd+unix:///e?socket=/a%20b", format="qcow2"),
        ),
    ],
)
@pytest.mark.parametrize("target", ["vda", "sda", "sdb", "sdc", "nvme0n1"])
def test_what_is_written_is_what_is_started(target: str, file: str, devices: frozenset[str], source: Source) -> None:
    xml = inactive_xml(EVERYTHING, {target: (file, "qcow2")}, devices)
    before, after = parse_definition(EVERYTHING), parse_definition(xml)
    for one, other in zip(before.disks, after.disks, strict=True):
        expected = source if one.target == target else one.source
        assert other == msgspec.structs.replace(one, source=expected)
    assert after.ignored == ()


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=50).map(lambda text: f"/{text}"))
def test_any_path_that_can_be_an_images_comes_back(path: str) -> None:
    if path_flaw(path) is None and not set(path) & {"\ufffe", "\uffff"}:
        xml = inactive_xml(guest(disk()), {"vda": (path, "raw")}, NONE)
        assert parse_definition(xml).disks[0].source == Source(kind="file", where=path, format="raw")


# --- as it runs -----------------------------------------------------------------------------------------------


def test_a_running_guest_shows_its_chains_and_mirrors() -> None:
    seen = observation(running("vda", ("/snap", "qcow2"), ("/base", "raw")), host_device="/base")
    mirror = MirrorView(file="/m", format="raw", state="ready")
    xml = live_xml(VIRT_MANAGER, seen, {"vda": mirror})
    assert compact(xml).get("id") == "7"
    assert shown(xml, "vda")[:-2] == [
        "type=file device=disk",
        '<driver name="qemu" type="qcow2" discard="unmap"/>',
        '<source file="/snap"/>',
        '<backingStore type="block"><format type="raw"/><source dev="/base"/><backingStore/></backingStore>',
        '<mirror type="file" file="/m" format="raw" job="copy" ready="yes"><format type="raw"/><source file="/m"/></mirror>',
    ]
    assert shown(xml, "sda") == shown(VIRT_MANAGER, "sda")
    assert parse_definition(xml).ignored == VIRT_MANAGER_IGNORED


def test_a_running_guest_is_read_again_as_its_definition() -> None:
    """Only the images that its disks are on are others."""
    seen = observation(running("sda", ("/dev/c", "qcow2"), ("/b", "raw")), host_device="/dev/c", pid=None)
    found = parse_definition(live_xml(EVERYTHING, seen, {}))
    before = parse_definition(EVERYTHING)
    expected = [
        msgspec.structs.replace(each, source=Source(kind="block", where="/dev/c", format="qcow2"), backings=("/b",))
        if each.target == "sda"
        else each
        for each in before.disks
    ]
    assert list(found.disks) == expected
    assert msgspec.structs.replace(found, disks=()) == msgspec.structs.replace(before, disks=())


def test_a_chain_that_was_written_is_another_by_now() -> None:
    old = "<backingStore type='file'><format type='raw'/><source file='/gone'/><backingStore/></backingStore>"
    xml = guest(disk(more=old + "<mirror type='file' job='copy'/>"))
    for now in (
        live_xml(xml, observation(running("vda", ("/a", "qcow2"))), {}),
        inactive_xml(xml, {"vda": ("/a", "qcow2")}, NONE),
    ):
        assert "/gone" not in now
        assert "mirror" not in now
