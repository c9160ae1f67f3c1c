"""`<domainsnapshot>`, with the `<mirror>` of the 2012 proposal, to and from the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

from blockferry.errors import InvalidName
from blockferry.formats import xmlio
from blockferry.formats.names import path_flaw, valid_name
from blockferry.formats.xmlio import Element
from blockferry.model.snapshot import DiskWish, MirrorWish, Mode, Snapshot, SnapshotDisk, SnapshotWish
from blockferry.model.view import MirrorView

# What a dump says about what was, and what a request can therefore not ask for: accepted, so that a dump is a request.
_OUTPUT = frozenset({"state", "creationTime", "parent", "domain", "inactiveDomain", "cookie", "active"})
_REQUEST = frozenset({"name", "description", "memory", "disks"})

# A target, or an id as QEMU lets one be (its id_wellformed); anything else that names a disk is a path.
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,127}")

_NOT_CARRIED_OUT = {
    "internal": "an internal snapshot is not carried out in this version: say 'external' or 'no'",
    "manual": "a manual snapshot is not carried out in this version: say 'external' or 'no'",
}

# type of a <disk> -> the attribute of its <source> that says where.
_SOURCES = {"file": "file", "block": "dev"}
# <state> of what libvirt took of the disks alone, while the guest did whatever it did.
DISK_SNAPSHOT = "disk-snapshot"
# Our element in a dump's <cookie>.
COOKIE = "blockferry"

_MODES: tuple[Mode, ...] = get_args(Mode)

# Formats that an existing image under a mirror may have.
_BACKING_FORMATS = frozenset({"raw", "qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc"})


def parse_snapshot(xml: str) -> SnapshotWish:
    """What a `<domainsnapshot>` asks for.

    Disks that it does not speak of are snapshotted too, as libvirt does (`only_these` is false).

    Args:
        xml: the document, from anybody.

    Returns:
        The wish.

    Raises:
        InvalidXml: it is malformed or hostile, or asks for what this version does not carry out.
        InvalidName: its name can't be a snapshot's.
    """
    root = xmlio.parse(xml, "domainsnapshot")
    xmlio.expect(root, once=_REQUEST | _OUTPUT)
    name = xmlio.text(root, "name")
    if name is not None and not valid_name(name):
        raise InvalidName(name=xmlio.shorten(name))
    memory = root.find("memory")
    if memory is not None:
        _refuse_memory(memory)
    disks = root.find("disks")
    return SnapshotWish(
        name=name,
        description=xmlio.text(root, "description"),
        disks=() if disks is None else _disks(disks),
        only_these=False,
    )


def _refuse_memory(memory: Element) -> None:
    if memory.get("snapshot") != "no":
        raise xmlio.invalid(memory, "a snapshot of the memory is not carried out in this version: say snapshot='no'")
    xmlio.expect(memory, attributes={"snapshot"})


def _disks(element: Element) -> tuple[DiskWish, ...]:
    xmlio.expect(element, many={"disk"})
    disks: dict[str, DiskWish] = {}
    for child in element:
        disk = _disk(child)
        if disk.name in disks:
            raise xmlio.invalid(child, f"disk {xmlio.shorten(disk.name)!r} is spoken of twice")
        disks[disk.name] = disk
    return tuple(disks.values())


def _disk(element: Element) -> DiskWish:
    name = element.get("name")
    if not name:
        raise xmlio.invalid(element, "it has no name: a target, a qdev id or the path of an image")
    if not _ID.fullmatch(name):
        _check_path(element, name)
    mode = _mode(element)
    kind = element.get("type", "file")
    if kind not in _SOURCES:
        words = f"type {xmlio.shorten(kind)!r} is not carried out in this version: say 'file' or 'block'"
        raise xmlio.invalid(element, words)
    if mode == "no" and len(element):
        raise xmlio.invalid(element, f"snapshot='no' leaves the disk out, so <{xmlio.shorten(element[0].tag)}> is void")
    xmlio.expect(element, attributes={"name", "snapshot", "type", "mode"}, once={"driver", "source", "mirror"})
    driver, source, mirror = (element.find(tag) for tag in ("driver", "source", "mirror"))
    if driver is not None:
        _check_driver(driver)
    if source is not None:
        xmlio.expect(source, attributes={_SOURCES[kind]})
    return DiskWish(
        name=name,
        snapshot=mode,
        file=None if source is None else _path(source, _SOURCES[kind]),
        mode=_header_mode(element),
        mirror=None if mirror is None else _mirror(mirror),
    )


def _mode(disk: Element) -> Literal["external", "no"]:
    match disk.get("snapshot", "external"):
        case "external":
            return "external"
        case "no":
            return "no"
        case other:
            raise xmlio.invalid(disk, _NOT_CARRIED_OUT.get(other, f"snapshot={xmlio.shorten(other)!r} means nothing"))


def _header_mode(disk: Element) -> Mode | None:
    """What the headers of the new images are to say of their backing; libvirt has no such annotation."""
    said = disk.get("mode")
    for mode in _MODES:
        if said == mode:
            return mode
    if said is not None:
        raise xmlio.invalid(disk, f"mode {xmlio.shorten(said)!r} is none of {', '.join(_MODES)}")
    return None


def _check_driver(driver: Element) -> None:
    xmlio.expect(driver, attributes={"type"})
    fmt = driver.get("type", "qcow2")
    if fmt != "qcow2":
        raise xmlio.invalid(driver, f"an overlay can be qcow2 only, not {xmlio.shorten(fmt)!r}")


def _mirror(element: Element) -> MirrorWish:
    # state and ready are what a dump says.
    xmlio.expect(element, attributes={"file", "backing", "backingFormat", "state", "ready"})
    file = _path(element, "file")
    if file is None:
        raise xmlio.invalid(element, "it has no file")
    backing_format = element.get("backingFormat")
    if backing_format is not None and backing_format not in _BACKING_FORMATS:
        known = ", ".join(sorted(_BACKING_FORMATS))
        raise xmlio.invalid(element, f"backingFormat {xmlio.shorten(backing_format)!r} is none of {known}")
    return MirrorWish(file=file, backing=_path(element, "backing"), backing_format=backing_format)


def _path(element: Element, attribute: str) -> str | None:
    path = element.get(attribute)
    if path is not None:
        _check_path(element, path)
    return path


def _check_path(element: Element, path: str) -> None:
    flaw = path_flaw(path)
    if flaw is not None:
        raise xmlio.invalid(element, f"{xmlio.shorten(path)!r} {flaw}")


def snapshot_xml(snapshot: Snapshot, mirrors: Mapping[str, MirrorView], current: bool) -> str:
    """The `<domainsnapshot>` of a snapshot that was taken, as libvirt dumps it, with our mirrors.

    Args:
        snapshot: the snapshot.
        mirrors: by target, what became of the mirrors; one that goes to another file than the snapshot's is another's.
        current: whether it is the domain's current snapshot.

    Returns:
        The document; `parse_snapshot` makes a request for the same of it, `parse_redefinition` the snapshot itself.
    """
    root = xmlio.document("domainsnapshot")
    xmlio.add(root, "name", snapshot.name)
    if snapshot.description is not None:
        xmlio.add(root, "description", snapshot.description)
    # libvirt's word for every snapshot without memory of a guest that ran, whatever it did; ours is in the cookie.
    xmlio.add(root, "state", "shutoff" if snapshot.state == "shutoff" else DISK_SNAPSHOT)
    if snapshot.parent is not None:
        xmlio.add(xmlio.add(root, "parent"), "name", snapshot.parent)
    xmlio.add(root, "creationTime", str(int(snapshot.created)))
    xmlio.add(root, "memory", snapshot="no")
    disks = xmlio.add(root, "disks")
    for disk in snapshot.disks:
        _add_disk(disks, disk, mirrors.get(disk.target))
    for target in snapshot.left_out:
        xmlio.add(disks, "disk", name=target, snapshot="no")
    xmlio.add(root, "active", "1" if current else "0")
    _add_cookie(root, snapshot)
    return xmlio.pretty(root)


def _add_cookie(root: Element, snapshot: Snapshot) -> None:
    """What libvirt has no element for and a redefinition needs, where libvirt's own driver keeps such: its cookie."""
    state = None if snapshot.state == DISK_SNAPSHOT else snapshot.state
    cookie = xmlio.add(xmlio.add(root, "cookie"), COOKIE, created=f"{snapshot.created:.9f}", state=state)
    for disk in snapshot.disks:
        xmlio.add(cookie, "backing", disk=disk.target, file=disk.backing, format=disk.backing_format)
    for target, files in snapshot.reverted.items():
        for file in files:
            xmlio.add(cookie, "reverted", disk=target, file=file)


def _add_disk(disks: Element, disk: SnapshotDisk, view: MirrorView | None) -> None:
    kind = "block" if disk.block else "file"
    element = xmlio.add(disks, "disk", name=disk.target, snapshot="external", type=kind, mode=disk.mode)
    xmlio.add(element, "driver", type=disk.format)
    xmlio.add(element, "source", **{_SOURCES[kind]: disk.file})
    if disk.mirror is None:
        return
    state = ready = None
    if view is not None and view.file == disk.mirror:
        state = view.state
        ready = "yes" if view.state == "ready" else "no"
    backing, backing_format = disk.mirror_backing, disk.mirror_backing_format
    xmlio.add(
        element, "mirror", file=disk.mirror, backing=backing, backingFormat=backing_format, state=state, ready=ready
    )
