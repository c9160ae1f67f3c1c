"""`<domain>`: the live XML of an attached guest."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from blockferry.formats import xmlio
from blockferry.formats.names import NBD_PORT
from blockferry.formats.xmlio import Element
from blockferry.model.domain import Observation
from blockferry.model.graph import Disk, Image
from blockferry.model.view import MirrorView

# libvirt shows a <mirror> while its job works, not what became of it.
_WORKING = frozenset({"copying", "ready"})


def domain_xml(name: str, observation: Observation, mirrors: Mapping[str, MirrorView]) -> str:
    """The live XML of an attached domain: who it is, and its disks with their chains and mirrors.

    Args:
        name: the domain's.
        observation: what QEMU says of it now.
        mirrors: by target; only those that work are shown.

    Returns:
        The document, elements in libvirt's order.
    """
    pid = observation.pid
    root = xmlio.document("domain", type="qemu", id=None if pid is None else str(pid))
    xmlio.add(root, "name", name)
    if observation.uuid is not None:
        xmlio.add(root, "uuid", observation.uuid)
    xmlio.add(root, "memory", str(observation.memory // 1024), unit="KiB")
    if observation.vcpus > 0:
        xmlio.add(root, "vcpu", str(observation.vcpus))
    xmlio.add(xmlio.add(root, "os"), "type", "hvm")
    devices = xmlio.add(root, "devices")
    host_devices = frozenset(node.filename for node in observation.graph.nodes.values() if node.driver == "host_device")
    for disk in observation.disks:
        _add_disk(devices, disk, mirrors.get(disk.target), host_devices)
    return xmlio.pretty(root)


def _add_disk(devices: Element, disk: Disk, mirror: MirrorView | None, host_devices: frozenset[str]) -> None:
    active = disk.chain[0] if disk.chain else None
    kind = "file" if active is None else kind_of(active.file, host_devices)
    element = xmlio.add(devices, "disk", type=kind, device=disk.device)
    xmlio.add(element, "driver", name="qemu", type=None if active is None else active.format)
    if active is not None:
        add_source(element, kind, active.file)
        add_backing(element, disk.chain[1:], host_devices)
    if mirror is not None:
        add_mirror(element, mirror, host_devices)
    xmlio.add(element, "target", dev=disk.target, bus=disk.bus)
    if disk.read_only:
        xmlio.add(element, "readonly")
    # A device without an id has a QOM path, which is no alias to libvirt.
    if not disk.qdev.startswith("/"):
        xmlio.add(element, "alias", name=disk.qdev)


def kind_of(file: str, host_devices: frozenset[str]) -> str:
    """The `type` of a disk on that file or URI."""
    if file in host_devices:
        return "block"
    return "network" if file.startswith(("nbd:", "nbd+unix:")) else "file"


def add_backing(element: Element, layers: tuple[Image, ...], host_devices: frozenset[str]) -> None:
    """One `<backingStore>` within the other, an empty one at the end: the chain ends here, don't look."""
    for image in layers:
        kind = kind_of(image.file, host_devices)
        element = xmlio.add(element, "backingStore", type=kind)
        xmlio.add(element, "format", type=image.format)
        add_source(element, kind, image.file)
    xmlio.add(element, "backingStore")


def add_mirror(element: Element, mirror: MirrorView, host_devices: frozenset[str]) -> None:
    """`<mirror>`, while its job works."""
    if mirror.state not in _WORKING:
        return
    kind = kind_of(mirror.file, host_devices)
    # Readers from before libvirt 1.2.10 know the attributes only.
    old = {"file": mirror.file, "format": mirror.format} if kind == "file" else {}
    ready = "yes" if mirror.state == "ready" else None
    child = xmlio.add(element, "mirror", type=kind, **old, job=mirror.job, ready=ready)
    xmlio.add(child, "format", type=mirror.format)
    add_source(child, kind, mirror.file)


def add_source(element: Element, kind: str, file: str) -> None:
    """`<source>`, by the disk's type."""
    match kind:
        case "block":
            xmlio.add(element, "source", dev=file)
        case "network":
            _add_nbd_source(element, file)
        case _:
            xmlio.add(element, "source", file=file)


def _add_nbd_source(element: Element, uri: str) -> None:
    """The source for `nbd://host:port/export` or `nbd+unix:///export?socket=/path`; as a name when it is neither."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port or NBD_PORT
    except ValueError:
        xmlio.add(element, "source", protocol="nbd", name=uri)
        return
    # Not parse_qs: to a URI, other than to a form, '+' is no space.
    socket = unquote(parts.query.removeprefix("socket="))
    export = unquote(parts.path.removeprefix("/")) or None
    if parts.scheme == "nbd+unix" and socket:
        source = xmlio.add(element, "source", protocol="nbd", name=export)
        xmlio.add(source, "host", transport="unix", socket=socket)
    elif parts.scheme == "nbd" and host:
        source = xmlio.add(element, "source", protocol="nbd", name=export)
        xmlio.add(source, "host", name=host, port=str(port))
    else:
        xmlio.add(element, "source", protocol="nbd", name=uri)
