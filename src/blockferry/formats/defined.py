"""The XML of a guest that we start: as it was given, with the images that its disks are on by now."""

from __future__ import annotations

from collections.abc import Mapping

from blockferry.formats import xmlio
from blockferry.formats.domain import add_backing, add_mirror, add_source, kind_of
from blockferry.formats.xmlio import Element
from blockferry.model.domain import Observation
from blockferry.model.view import MirrorView


def with_uuid(xml: str, uuid: str) -> str:
    """A definition that parse_definition has accepted, with this UUID where it has none; otherwise as it was written."""
    root = xmlio.parse(xml, "domain")
    if "id" in root.attrib:
        del root.attrib["id"]
    if root.find("uuid") is None:
        name = root.find("name")
        element = xmlio.add(root, "uuid", uuid)
        root.insert(0 if name is None else root.index(name) + 1, element)
    return xmlio.pretty(root)


def inactive_xml(xml: str, images: Mapping[str, tuple[str, str]], host_devices: frozenset[str]) -> str:
    """What the guest is started from next: every disk on its present image.

    Args:
        xml: the definition.
        images: target -> (file, format), of disks that are on another image by now.
        host_devices: those of the files that are block devices.
    """
    root = xmlio.parse(xml, "domain")
    for element, target in _disks(root):
        if target in images:
            file, image_format = images[target]
            _clear(element, kind_of(file, host_devices), image_format)
            holder = xmlio.document("holder")
            add_source(holder, element.get("type", "file"), file)
            _put(element, holder)
    return xmlio.pretty(root)


def live_xml(xml: str, seen: Observation, mirrors: Mapping[str, MirrorView]) -> str:
    """The guest as it runs: the definition, with each disk's chain and mirror as observed.

    Args:
        xml: the definition.
        seen: the domain as observed.
        mirrors: by target.
    """
    root = xmlio.parse(xml, "domain")
    if seen.pid is not None:
        root.set("id", str(seen.pid))
    host_devices = frozenset(node.filename for node in seen.graph.nodes.values() if node.driver == "host_device")
    for element, target in _disks(root):
        disk = seen.disk(target)
        if disk is None or not disk.chain:
            continue
        kind = kind_of(disk.active.file, host_devices)
        _clear(element, kind, disk.active.format)
        holder = xmlio.document("holder")
        add_source(holder, kind, disk.active.file)
        add_backing(holder, disk.chain[1:], host_devices)
        mirror = mirrors.get(target)
        if mirror is not None:
            add_mirror(holder, mirror, host_devices)
        _put(element, holder)
    return xmlio.pretty(root)


def _disks(root: Element) -> list[tuple[Element, str]]:
    targets = [(disk, disk.find("target")) for disk in root.findall("devices/disk")]
    return [(disk, str(target.get("dev"))) for disk, target in targets if target is not None]


def _clear(element: Element, kind: str, image_format: str) -> None:
    """Take away what a disk's element says of its images, and say what kind its active one is."""
    for tag in ("source", "backingStore", "mirror"):
        for found in element.findall(tag):
            element.remove(found)
    element.set("type", kind)
    driver = element.find("driver")
    if driver is None:
        driver = xmlio.add(element, "driver", name="qemu")
        element.insert(0, driver)
    driver.set("type", image_format)


def _put(element: Element, holder: Element) -> None:
    """Move what `holder` has to where libvirt has it: after the driver."""
    driver = element.find("driver")
    place = 0 if driver is None else element.index(driver) + 1
    for child in reversed(list(holder)):
        element.insert(place, child)
