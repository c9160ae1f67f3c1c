"""The `<devices>` of a `<domain>`, to the model."""

from __future__ import annotations

import ipaddress
import re
from typing import Literal
from urllib.parse import quote, unquote

from blockferry.formats import xmlio
from blockferry.formats.names import NBD_EXPORT_NAME_MAX, NBD_PORT, path_flaw
from blockferry.formats.reading import Reading, at, refuse, require_path
from blockferry.formats.xmlio import Element
from blockferry.model.definition import (
    Address,
    Character,
    Controller,
    DiskDef,
    Graphics,
    Interface,
    Source,
)
from blockferry.model.domain import TARGET_PREFIX

_TARGET = re.compile(r"(vd|sd|hd)[a-z]{1,3}|nvme[0-9]{1,3}n1")
_BUSES = ("virtio", "scsi", "sata", "ide", "nvme", "usb")
# Where QEMU has a drive that a disc can be put into.
_CDROM_BUSES = ("ide", "sata", "scsi")
_CACHES = ("default", "none", "writethrough", "writeback", "directsync", "unsafe")
_LIMITS = tuple(
    f"{what}_{unit}_sec{more}"
    for more in ("", "_max", "_max_length")
    for what in ("total", "read", "write")
    for unit in ("bytes", "iops")
)
# Without these a disk would hold something else than its guest has there, or keep what it is to forget.
_OTHER_CONTENTS = ("encryption", "source/encryption", "source/slices", "transient")
_BLOCK_SIZES = ("logical_block_size", "physical_block_size")
# QEMU's own bounds (hw/core/qdev-properties.c, "blocksize").
_BLOCK_SIZE_MIN, _BLOCK_SIZE_MAX = 512, 2 << 20
# A network interface's name in Linux (dev_valid_name): up to 15 bytes, no slash, no space.
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_NICS = ("virtio", "e1000", "e1000e", "rtl8139", "virtio-net-pci", "ne2k_pci", "pcnet")
_VIDEOS = {"vga": "VGA", "cirrus": "cirrus-vga", "qxl": "qxl-vga", "virtio": "virtio-vga", "bochs": "bochs-display"}
_SCSI_MODELS = ("virtio-scsi",)
_USB_MODELS = (None, "none", "qemu-xhci", "nec-xhci", "piix3-uhci")
_PCI_MODELS = ("pci-root", "pcie-root", "pcie-root-port", "pcie-to-pci-bridge", "dmi-to-pci-bridge", "pci-bridge")
_CONTROLLERS = ("scsi", "sata", "ide", "usb", "pci", "virtio-serial")
_BACKENDS = ("pty", "file", "unix", "null")
# What `virsh dumpxml` of a running guest shows where its definition has nothing: libvirt's own folder, not ours.
_LIBVIRTS_SOCKETS = re.compile(r"/(var/lib|var/run|run)/libvirt/qemu/channel/.*")
_VNC_PORT_MIN = 5900
# One letter a byte: what can't be in a serial number that QEMU passes on.
_SERIAL = re.compile(r"[A-Za-z0-9 _.+-]{1,64}")


# --- disks ----------------------------------------------------------------------------------------------------


def disks(reading: Reading, devices: Element) -> tuple[DiskDef, ...]:
    """The disks, each target once.

    Raises:
        InvalidXml: one can't be carried out: a disk is never left out.
    """
    found: dict[str, DiskDef] = {}
    for element in reading.children(devices, "disk"):
        disk = _disk(reading, element)
        if disk.target in found:
            refuse(element, f"there are two disks {disk.target}")
        found[disk.target] = disk
    return tuple(found.values())


def _disk(reading: Reading, element: Element) -> DiskDef:
    kind = reading.get(element, "type", among=("file", "block", "network")) or "file"
    device = reading.get(element, "device", among=("disk", "cdrom")) or "disk"
    target = reading.child(element, "target")
    if target is None:
        refuse(element, "it has no <target dev>")
    name = reading.need(target, "dev")
    if not _TARGET.fullmatch(name):
        refuse(target, f"{xmlio.shorten(name)!r} is no name of a disk, such as vda")
    bus = reading.get(target, "bus", among=_BUSES) or _bus(name)
    if name.startswith("nvme") and bus != "nvme":
        refuse(target, f"{name} is a name of bus nvme, not {bus}")
    if device == "cdrom" and bus not in _CDROM_BUSES:
        refuse(target, f"a cdrom can't be on bus {bus}: write {', '.join(_CDROM_BUSES)}")
    driver = reading.child(element, "driver")
    source = _source(reading, element, kind, driver)
    if source is None and device == "disk":
        refuse(element, "a disk needs a <source>; only a cdrom may be empty")
    read_only = reading.child(element, "readonly") is not None or device == "cdrom"
    if read_only and device == "disk" and bus in ("ide", "sata"):
        refuse(element, f"a disk on bus {bus} can't be read-only")
    for tag in _OTHER_CONTENTS:
        for each in element.iterfind(tag):
            refuse(
                each,
                "it is not carried out, and without it the guest would find, or leave, other contents on this disk",
            )
    for each in element.findall("backingStore"):
        # The chain is read from the images' headers, and their formats from there too: see docs/commands/define.md.
        reading.harmless(element, each.tag)
    reading.harmless(element, "alias", "mirror")
    tune = reading.child(element, "iotune")
    boot = reading.child(element, "boot")
    return DiskDef(
        target=name,
        bus=bus,
        device="cdrom" if device == "cdrom" else "disk",
        source=source,
        backings=_backings(element),
        read_only=read_only,
        cache=reading.get(driver, "cache", among=_CACHES),
        io=_io(reading, driver),
        discard=reading.get(driver, "discard", among=("unmap", "ignore")),
        detect_zeroes=reading.get(driver, "detect_zeroes", among=("off", "on", "unmap")),
        iothread=_iothread(reading, element, driver, bus),
        serial=_serial(reading, element),
        boot=None if boot is None else reading.number(boot, "order", 1),
        limits=_limits(reading, tune),
        blocks=_blocks(reading, element),
        address=address(reading, element),
    )


def _backings(element: Element) -> tuple[str, ...]:
    """The files that a disk's chain is said to have; one that can't be a path is none."""
    named = [
        source.get("file") or source.get("dev") or ""
        for backing in element.iter("backingStore")
        for source in backing.findall("source")
    ]
    return tuple(file for file in named if path_flaw(file) is None)


def _bus(name: str) -> str:
    """As libvirt: by the name's prefix; sd is SCSI."""
    return next((bus for bus, prefix in TARGET_PREFIX.items() if name.startswith(prefix)), "virtio")


def _source(reading: Reading, element: Element, kind: str, driver: Element | None) -> Source | None:
    reading.get(driver, "name", among=("qemu",))
    # As libvirt: raw unless told. It is never probed.
    image_format = reading.get(driver, "type", among=("qcow2", "raw")) or "raw"
    source = reading.child(element, "source")
    if source is None:
        return None
    reading.get(source, "index")
    if kind == "network":
        return Source(kind="network", where=_nbd(reading, source), format=image_format)
    path = reading.get(source, "file" if kind == "file" else "dev")
    if path is None:
        return None
    require_path(source, path)
    return Source(kind="file" if kind == "file" else "block", where=path, format=image_format)


def _nbd(reading: Reading, source: Element) -> str:
    reading.need(source, "protocol", among=("nbd",))
    reading.get(source, "tls", among=("no",))
    export = quote(reading.get(source, "name") or "")
    if len(unquote(export).encode()) > NBD_EXPORT_NAME_MAX:
        refuse(source, f"the export's name is over {NBD_EXPORT_NAME_MAX} bytes")
    host = reading.child(source, "host")
    if host is None:
        refuse(source, "it has no <host>")
    if reading.get(host, "transport", among=("tcp", "unix")) == "unix":
        socket = reading.need(host, "socket")
        require_path(host, socket)
        return f"nbd+unix:///{export}?socket={quote(socket)}"
    name = reading.need(host, "name")
    if not re.fullmatch(r"[A-Za-z0-9.:-]{1,255}", name):
        refuse(host, f"{xmlio.shorten(name)!r} is no host")
    if ":" in name and not _is_ipv6(name):
        refuse(host, f"{name!r} is no IPv6 address")
    port = reading.number(host, "port", 1) or NBD_PORT
    if port >= 1 << 16:
        refuse(host, f"port={port} is none")
    return f"nbd://{f'[{name}]' if ':' in name else name}:{port}/{export}"


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _io(reading: Reading, driver: Element | None) -> str | None:
    io = reading.get(driver, "io", among=("native", "threads", "io_uring"))
    if driver is not None and io == "native" and driver.get("cache") not in ("none", "directsync"):
        refuse(driver, "io='native' needs cache='none' or 'directsync'")
    return io


def _iothread(reading: Reading, element: Element, driver: Element | None, bus: str) -> int | None:
    number = reading.number(driver, "iothread", 1)
    if number is not None and bus != "virtio":
        refuse(element, "an iothread is the disk's own on virtio only; on scsi it is the controller's")
    return number


def _serial(reading: Reading, element: Element) -> str | None:
    serial = reading.text(element, "serial")
    if serial is not None and not _SERIAL.fullmatch(serial):
        refuse(element, f"{xmlio.shorten(serial)!r} can't be a serial number")
    return serial


def _blocks(reading: Reading, element: Element) -> dict[str, int]:
    blockio = reading.child(element, "blockio")
    found = {name: reading.number(blockio, name) for name in _BLOCK_SIZES}
    sizes = {name: number for name, number in found.items() if number}
    for name, number in sizes.items():
        if number & (number - 1) or not _BLOCK_SIZE_MIN <= number <= _BLOCK_SIZE_MAX:
            refuse(at(element, "blockio"), f"{name}={number} is no power of two from 512 to 2 MiB")
    if sizes.get("logical_block_size", 0) > sizes.get("physical_block_size", _BLOCK_SIZE_MIN):
        refuse(at(element, "blockio"), "logical_block_size is more than physical_block_size, which is 512 unless told")
    return sizes


def _limits(reading: Reading, tune: Element | None) -> dict[str, int]:
    if tune is None:
        return {}
    found = {name: reading.whole(tune, name) for name in (*_LIMITS, "size_iops_sec")}
    limits = {name: number for name, number in found.items() if number}
    for unit in ("bytes", "iops"):
        for more in ("", "_max"):
            parts = [f"{what}_{unit}_sec{more}" for what in ("read", "write")]
            if f"total_{unit}_sec{more}" in limits and any(part in limits for part in parts):
                refuse(tune, f"total_{unit}_sec{more} and {parts[0]} or {parts[1]} are not for one disk")
    for name, number in limits.items():
        base = name.removesuffix("_length").removesuffix("_max")
        if name.endswith("_length") and f"{base}_max" not in limits:
            refuse(tune, f"{name} needs {base}_max")
        if name.endswith("_max") and not 0 < limits.get(base, 0) <= number:
            refuse(tune, f"{name} needs {base}, and has to be at least as much")
    return limits


def address(reading: Reading, element: Element) -> Address | None:
    """Where a device is plugged in; None where it is left to QEMU, and for an address of another kind, which is listed."""
    found = element.find("address")
    kind = None if found is None else found.get("type")
    if found is None or kind not in ("pci", "drive"):
        return None
    reading.child(element, "address")
    reading.get(found, "type")
    if (reading.number(found, "domain") or 0) != 0:
        refuse(found, "there is one PCI domain, 0")
    numbers = {
        name: reading.number(found, name) or 0 for name in ("bus", "slot", "function", "controller", "target", "unit")
    }
    if numbers["slot"] > 31 or numbers["function"] > 7:
        refuse(found, "a PCI slot is at most 31, a function at most 7")
    return Address(
        type="pci" if kind == "pci" else "drive", multifunction=bool(reading.flag(found, "multifunction")), **numbers
    )


# --- the rest -------------------------------------------------------------------------------------------------


def controllers(reading: Reading, devices: Element) -> tuple[Controller, ...]:
    """The controllers that are carried out; others, such as the four of an ICH9's USB, are listed as not understood."""
    found = [each for each in devices.findall("controller") if each.get("type") in _CONTROLLERS]
    found = [each for each in found if each.get("type") != "usb" or each.get("model") in _USB_MODELS]
    for element in found:
        reading.mark(element)
    controllers = tuple(_controller(reading, element) for element in found)
    seen: set[tuple[str, int]] = set()
    for element, controller in zip(found, controllers, strict=True):
        if (controller.type, controller.index) in seen:
            refuse(element, f"there are two {controller.type} controllers {controller.index}")
        seen.add((controller.type, controller.index))
    return controllers


def _controller(reading: Reading, element: Element) -> Controller:
    kind = reading.need(element, "type")
    # A guest without the driver of another model would not find its disks, and what hangs on a bridge would have no place.
    models = {"scsi": _SCSI_MODELS, "pci": _PCI_MODELS}.get(kind)
    driver, target = reading.child(element, "driver"), reading.child(element, "target")
    reading.get(element, "ports")
    reading.get(reading.child(element, "model"), "name")
    reading.harmless(element, "alias")
    model = reading.get(element, "model", among=models)
    if kind == "pci" and model is None:
        refuse(element, "it has no model")
    return Controller(
        type=kind,
        index=reading.number(element, "index") or 0,
        model=model,
        iothread=reading.number(driver, "iothread", 1),
        address=address(reading, element),
        chassis=reading.number(target, "chassis"),
        port=reading.number(target, "port"),
    )


def interfaces(reading: Reading, devices: Element) -> tuple[Interface, ...]:
    """The network interfaces of the kinds that are carried out; others, such as libvirt's networks, are listed."""
    found = [each for each in devices.findall("interface") if each.get("type") in ("user", "ethernet", "bridge")]
    for element in found:
        reading.mark(element)
    return tuple(_interface(reading, element) for element in found)


def _interface(reading: Reading, element: Element) -> Interface:
    kind = reading.need(element, "type", among=("user", "ethernet", "bridge"))
    mac, model = reading.child(element, "mac"), reading.child(element, "model")
    address_text = reading.get(mac, "address")
    if mac is not None and not _MAC.fullmatch(address_text or ""):
        refuse(mac, f"{xmlio.shorten(str(address_text))!r} is no MAC address")
    source, target = reading.child(element, "source"), reading.child(element, "target")
    name = None
    if kind == "bridge":
        name = None if source is None else reading.need(source, "bridge")
        reading.get(target, "dev")
    elif kind == "ethernet":
        # A tap device that is there, and ours to open: we make none.
        name = None if target is None else reading.need(target, "dev")
        reading.flag(target, "managed")
    if kind != "user" and not _INTERFACE.fullmatch(name or ""):
        refuse(element, "it names no bridge" if kind == "bridge" else "it names no tap device (<target dev>)")
    boot = reading.child(element, "boot")
    reading.harmless(element, "alias", "link")
    return Interface(
        type="user" if kind == "user" else "bridge" if kind == "bridge" else "ethernet",
        model=reading.get(model, "type", among=_NICS) or "virtio",
        mac=address_text,
        source=name,
        boot=reading.number(boot, "order", 1),
        address=address(reading, element),
    )


def characters(reading: Reading, devices: Element) -> tuple[Character, ...]:
    """Serial ports, virtio consoles and channels; those of other kinds, such as SPICE's, are listed.

    A console that shows the first serial port adds nothing.
    """
    serials = [each for each in devices.findall("serial") if _carried_out(each, "isa-serial")]
    found = [_character(reading, element, "serial") for element in serials]
    serial = devices.find("serial") is not None
    for element in devices.findall("console"):
        if _carried_out(element, "virtio") and _target_type(element) is not None:
            found.append(_character(reading, element, "console"))
        elif serial and _target_type(element) in (None, "serial"):
            reading.mark(element)
            reading.harmless(element, "target", "source", "protocol", "alias", "log")
            reading.get(element, "type")
            reading.get(element, "tty")
        elif _carried_out(element, "serial"):
            found.append(_character(reading, element, "serial"))
    channels = [each for each in devices.findall("channel") if _carried_out(each, "virtio")]
    return (*found, *(_character(reading, element, "channel") for element in channels))


def _carried_out(element: Element, kind: str) -> bool:
    return element.get("type") in _BACKENDS and _target_type(element) in (None, kind)


def _target_type(element: Element) -> str | None:
    target = element.find("target")
    return None if target is None else target.get("type")


def _character(reading: Reading, element: Element, role: Literal["serial", "console", "channel"]) -> Character:
    reading.mark(element)
    kind = reading.need(element, "type", among=_BACKENDS)
    source, target = reading.child(element, "source"), reading.child(element, "target")
    # A running guest's pty is shown as its path; the next one is another.
    path = reading.get(source, "path") if kind == "pty" else reading.path(source, "path")
    if kind in ("pty", "null") or (role == "channel" and _LIBVIRTS_SOCKETS.fullmatch(path or "")):
        path = None
    if path is None and (kind == "file" or (kind == "unix" and role != "channel")):
        refuse(element, "it has no <source path>")
    name = None
    if role == "channel":
        name = reading.get(target, "name")
        if not name or not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
            refuse(element, "it has no <target type='virtio' name>")
    for attribute in ("port", "type", "state"):
        reading.get(target, attribute)
    if target is not None:
        reading.harmless(target, "model")
    reading.get(element, "tty")
    reading.harmless(element, "alias", "protocol", "address")
    mode = reading.get(source, "mode", among=("bind", "connect"))
    if kind == "unix" and mode == "connect" and path is None:
        refuse(element, "it has no <source path> to connect to")
    return Character(role=role, type=kind, path=path, listen=mode != "connect", name=name)


def graphics(reading: Reading, devices: Element) -> tuple[Graphics, ...]:
    """The VNC servers; other kinds of screens, and one that listens nowhere, are listed as not understood."""
    found = []
    for element in devices.findall("graphics"):
        listen = element.find("listen")
        if element.get("type") == "vnc" and (listen is None or listen.get("type") != "none"):
            reading.mark(element)
            found.append(_vnc(reading, element))
    return tuple(found)


def _vnc(reading: Reading, element: Element) -> Graphics:
    if element.get("passwd") is not None:
        refuse(
            element, "a password is not carried out, and without it anybody could look: use a socket, or an SSH tunnel"
        )
    listen = reading.child(element, "listen")
    for attribute in ("type", "autoport"):
        reading.get(element, attribute)
    kind = reading.get(listen, "type", among=("address", "network", "socket"))
    host = reading.get(element, "listen") or reading.get(listen, "address") or "127.0.0.1"
    if not re.fullmatch(r"[A-Za-z0-9.:-]{1,255}", host):
        refuse(element, f"{xmlio.shorten(host)!r} is no address to listen on")
    reading.get(element, "port")
    number = 0 if element.get("port") in (None, "-1") else reading.number(element, "port") or 0
    if number and not _VNC_PORT_MIN <= number < 1 << 16:
        refuse(element, f"a VNC port is at least {_VNC_PORT_MIN}, at most 65535")
    socket = reading.path(element, "socket") or reading.path(listen, "socket")
    if kind == "socket" and socket is None:
        refuse(element, "it has no path of a socket")
    return Graphics(listen=host, port=number, socket=socket)


def video(reading: Reading, devices: Element) -> str | None:
    """QEMU's device for the screen; of several screens the first, the others are listed."""
    element = devices.find("video")
    model = None if element is None else element.find("model")
    kind = None if model is None else model.get("type")
    if element is None or model is None or kind not in (*_VIDEOS, "none"):
        return None
    reading.mark(element)
    reading.child(element, "model")
    for attribute in ("type", "vram", "ram", "vgamem", "heads", "primary"):
        reading.get(model, attribute)
    reading.harmless(element, "alias", "address")
    return _VIDEOS.get(str(kind))


def rng(reading: Reading, devices: Element) -> str | None:
    """The host's source of random numbers, a device file; another kind of source is listed."""
    element = devices.find("rng")
    backend = None if element is None else element.find("backend")
    if element is None or backend is None or (element.get("model"), backend.get("model")) != ("virtio", "random"):
        return None
    reading.mark(element)
    reading.child(element, "backend")
    for each in (element, backend):
        reading.get(each, "model")
    reading.harmless(element, "alias", "address")
    path = (backend.text or "/dev/urandom").strip()
    require_path(backend, path)
    return path


def balloon(reading: Reading, devices: Element) -> bool:
    """Whether there is a memory balloon."""
    element = reading.child(devices, "memballoon")
    if element is None:
        return False
    model = reading.need(element, "model", among=("virtio", "none"))
    reading.harmless(element, "alias", "address", "stats")
    # What every libvirt dump has beside it, and every machine has anyway.
    return model == "virtio"
