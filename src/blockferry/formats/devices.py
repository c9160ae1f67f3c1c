"""The `<devices>` of a `<domain>`, to the model."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import quote

from blockferry.formats import xmlio
from blockferry.formats.reading import Reading, refuse, require_path
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

_TARGET = re.compile(r"(vd|sd|hd|xvd|ubd|fd)[a-z]{1,3}|nvme[0-9]{1,3}n1")
_BUSES = ("virtio", "scsi", "sata", "ide", "nvme", "usb")
_CACHES = ("default", "none", "writethrough", "writeback", "directsync", "unsafe")
_LIMITS = tuple(
    f"{what}_{unit}_sec{more}"
    for more in ("", "_max", "_max_length")
    for what in ("total", "read", "write")
    for unit in ("bytes", "iops")
)
# A network interface's name in Linux (dev_valid_name): up to 15 bytes, no slash, no space.
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_NICS = ("virtio", "e1000", "e1000e", "rtl8139", "virtio-net-pci", "ne2k_pci", "pcnet")
_VIDEOS = {"vga": "VGA", "cirrus": "cirrus-vga", "qxl": "qxl-vga", "virtio": "virtio-vga", "bochs": "bochs-display"}
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
    driver = reading.child(element, "driver")
    source = _source(reading, element, kind, driver)
    if source is None and device == "disk":
        refuse(element, "a disk needs a <source>; only a cdrom may be empty")
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
        read_only=reading.child(element, "readonly") is not None or device == "cdrom",
        cache=reading.get(driver, "cache", among=_CACHES),
        io=reading.get(driver, "io", among=("native", "threads", "io_uring")),
        discard=reading.get(driver, "discard", among=("unmap", "ignore")),
        detect_zeroes=reading.get(driver, "detect_zeroes", among=("off", "on", "unmap")),
        iothread=_iothread(reading, element, driver, bus),
        serial=_serial(reading, element),
        boot=None if boot is None else reading.number(boot, "order", 1),
        limits=_limits(reading, tune),
        address=address(reading, element),
    )


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
    port = reading.number(host, "port", 1) or 10809
    return f"nbd://{f'[{name}]' if ':' in name else name}:{port}/{export}"


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


def _limits(reading: Reading, tune: Element | None) -> dict[str, int]:
    if tune is None:
        return {}
    found = {name: reading.whole(tune, name) for name in (*_LIMITS, "size_iops_sec")}
    return {name: number for name, number in found.items() if number}


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
    """The controllers that are carried out; others are listed as not understood."""
    found = []
    for element in devices.findall("controller"):
        if element.get("type") not in ("scsi", "sata", "ide", "usb", "pci", "virtio-serial"):
            continue
        driver, target = element.find("driver"), element.find("target")
        model = element.find("model")
        controller = Controller(
            type=str(element.get("type")),
            index=reading.number(element, "index") or 0,
            model=reading.get(element, "model"),
            iothread=reading.number(driver, "iothread", 1),
            address=address(reading, element),
            chassis=reading.number(target, "chassis"),
            port=reading.number(target, "port"),
        )
        reading.get(element, "type")
        reading.get(element, "ports")
        reading.get(model, "name")
        reading.harmless(element, "alias")
        for each in (driver, target, model):
            if each is not None:
                reading.child(element, each.tag)
        reading.mark(element)
        found.append(controller)
    return tuple(found)


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
    """Serial ports, virtio consoles and channels; a console that shows the first serial port adds nothing."""
    found = [_character(reading, element, "serial") for element in reading.children(devices, "serial")]
    for element in reading.children(devices, "console"):
        target = reading.child(element, "target")
        if reading.get(target, "type") == "virtio":
            found.append(_character(reading, element, "console"))
        else:
            reading.harmless(element, "target", "source", "protocol", "alias", "log")
            reading.get(element, "type")
            reading.get(element, "tty")
            if not any(each.role == "serial" for each in found):
                found.append(_character(reading, element, "serial"))
    found += [_character(reading, element, "channel") for element in reading.children(devices, "channel")]
    return tuple(found)


def _character(reading: Reading, element: Element, role: Literal["serial", "console", "channel"]) -> Character:
    kind = reading.need(element, "type", among=("pty", "file", "unix", "null"))
    source, target = reading.child(element, "source"), reading.child(element, "target")
    path = None if kind == "pty" else reading.path(source, "path")
    if kind == "file" and path is None:
        refuse(element, "it has no <source path>")
    if kind == "unix" and path is None and role != "channel":
        refuse(element, "it has no <source path>")
    name = None
    if role == "channel":
        reading.get(target, "type", among=("virtio",))
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
    return Character(role=role, type=kind, path=path, listen=mode != "connect", name=name)


def graphics(reading: Reading, devices: Element) -> tuple[Graphics, ...]:
    """The VNC servers; other kinds of screens are listed as not understood."""
    found = []
    for element in devices.findall("graphics"):
        if element.get("type") != "vnc":
            continue
        reading.mark(element)
        listen = reading.child(element, "listen")
        port = element.get("port")
        reading.get(element, "port")
        for attribute in ("type", "autoport"):
            reading.get(element, attribute)
        for attribute in ("type", "address"):
            reading.get(listen, attribute)
        host = reading.get(element, "listen") or (listen.get("address") if listen is not None else None) or "127.0.0.1"
        if not re.fullmatch(r"[A-Za-z0-9.:-]{1,255}", host):
            refuse(element, f"{xmlio.shorten(host)!r} is no address to listen on")
        number = 0 if port in (None, "-1") else reading.number(element, "port") or 0
        if number and number < 5900:
            refuse(element, "a VNC port is at least 5900")
        socket = reading.path(element, "socket") or reading.path(listen, "socket")
        found.append(Graphics(listen=host, port=number, socket=socket))
    return tuple(found)


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
    """The host's source of random numbers: a device file."""
    element = reading.child(devices, "rng")
    if element is None:
        return None
    reading.need(element, "model", among=("virtio",))
    backend = reading.child(element, "backend")
    if backend is None:
        refuse(element, "it has no <backend>")
    reading.need(backend, "model", among=("random",))
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
