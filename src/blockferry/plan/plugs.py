"""Where a definition's devices are plugged in, and its disks with their chains, as QEMU's arguments. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from blockferry import errors
from blockferry.model.definition import Address, Controller, Definition, DiskDef
from blockferry.model.files import ImageFact
from blockferry.plan.copy import nbd_options
from blockferry.plan.disks import READ_ONLY_FILE

_PCI_BRIDGES = {
    "pcie-root-port": "pcie-root-port",
    "pcie-to-pci-bridge": "pcie-pci-bridge",
    "dmi-to-pci-bridge": "i82801b11-bridge",
    "pci-bridge": "pci-bridge",
}
_PCI_ROOTS = ("pci-root", "pcie-root", None)
_USB = {"qemu-xhci": "qemu-xhci", "nec-xhci": "nec-usb-xhci", "piix3-uhci": "piix3-usb-uhci", None: "qemu-xhci"}
# The devices that the machine brings along: libvirt's default of each.
_DRIVERS = {
    "virtio": "virtio-blk-pci",
    "scsi": "scsi",
    "sata": "ide",
    "ide": "ide",
    "usb": "usb-storage",
    "nvme": "nvme",
}
# A SATA controller of ICH9 has six ports, IDE two channels with two drives each; the largest numbers of SCSI are
# virtio-scsi's.
_SATA_PORTS = 6
_LARGEST = {"ide": (0, 1, 1), "sata": (255, 0, _SATA_PORTS - 1), "scsi": (255, 255, 16383)}


def plugged_wrong(reason: str, element: str = "domain/devices") -> errors.InvalidXml:
    """The refusal of a definition whose devices don't fit together."""
    return errors.InvalidXml(element=element, reason=reason)


class Slots:
    """What a definition's devices can be plugged into.

    Args:
        definition: the guest.
    """

    def __init__(self, definition: Definition) -> None:
        self._definition = definition
        machine = definition.machine or "pc"
        self.express = "q35" in machine
        self._bridges = {each.index for each in definition.controllers if each.type == "pci"} | {0}
        self._check_drives()
        self._added = self._missing()
        self.boot_order = _boot_order(definition)

    def _check_drives(self) -> None:
        """Refuse drives whose place is not there, or taken.

        Raises:
            InvalidXml: with the disk.
        """
        taken: dict[tuple[str, int, int, int], str] = {}
        for number, disk in enumerate(self._definition.disks, start=1):
            element = f"domain/devices/disk[{number}]"
            if disk.bus == "ide" and self.express:
                raise plugged_wrong(f"a q35 has no IDE for {disk.target}: write bus='sata'", element)
            if disk.bus not in _LARGEST:
                continue
            place = unit_of(disk)
            if any(one > most for one, most in zip(place, _LARGEST[disk.bus], strict=True)):
                where = "controller {}, bus or target {}, unit {}".format(*place)
                raise plugged_wrong(f"{disk.bus} has no place for {disk.target} at {where}", element)
            other = taken.setdefault((disk.bus, *place), disk.target)
            if other != disk.target:
                raise plugged_wrong(f"{disk.target} is where {other} is: give each an <address>", element)

    def _missing(self) -> list[Controller]:
        """The controllers that disks and channels need and the document does not name."""
        named = {(each.type, each.index) for each in self._definition.controllers}
        wanted: dict[tuple[str, int], None] = {}
        for disk in self._definition.disks:
            if disk.bus in ("scsi", "usb", "sata"):
                wanted[disk.bus, unit_of(disk)[0] if disk.bus != "usb" else 0] = None
        if any(each.role in ("console", "channel") for each in self._definition.characters):
            wanted["virtio-serial", 0] = None
        if self.express:
            named.add(("sata", 0))
        return [Controller(type=kind, index=index) for kind, index in wanted if (kind, index) not in named]

    def place(self, address: Address | None) -> dict[str, Any]:
        """The properties that plug a PCI device in.

        Raises:
            InvalidXml: there is no such bus.
        """
        if address is None or address.type != "pci":
            return {}
        if address.bus not in self._bridges:
            raise plugged_wrong(
                f"an address names PCI bus {address.bus}, and no <controller type='pci'> has that index"
            )
        root = "pcie.0" if self.express else "pci.0"
        return {
            "bus": f"pci.{address.bus}" if address.bus else root,
            "addr": f"0x{address.slot:x}.0x{address.function:x}",
            "multifunction": True if address.multifunction else None,
        }

    def controllers(self) -> list[str]:
        """`-device` for each controller that the machine does not have by itself, bridges first."""
        every = [*self._definition.controllers, *self._added]
        every.sort(key=lambda each: (each.type != "pci", each.index))
        return [word for each in every for word in self._controller(each)]

    def _controller(self, each: Controller) -> list[str]:
        place = self.place(each.address)
        thread = f"iothread{each.iothread}" if each.iothread is not None else None
        match each.type:
            case "pci":
                return self._bridge(each, place)
            case "scsi":
                return device("virtio-scsi-pci", {"id": f"scsi{each.index}", "iothread": thread, **place})
            case "sata" if not (self.express and each.index == 0):
                return device("ich9-ahci", {"id": f"sata{each.index}", **place})
            case "usb" if each.model != "none":
                driver = _USB.get(each.model)
                if driver is None:
                    raise plugged_wrong(f"USB controller {each.model} is not carried out: qemu-xhci is")
                return device(driver, {"id": f"usb{each.index}", **place})
            case "virtio-serial":
                return device("virtio-serial-pci", {"id": f"virtio-serial{each.index}", **place})
            case _:
                return []

    def _bridge(self, each: Controller, place: dict[str, Any]) -> list[str]:
        if each.model in _PCI_ROOTS:
            return []
        driver = _PCI_BRIDGES.get(str(each.model))
        if driver is None:
            raise plugged_wrong(f"PCI controller {each.model} is not carried out")
        more: dict[str, Any] = {}
        if each.model == "pcie-root-port":
            more = {"chassis": each.chassis if each.chassis is not None else each.index, "port": each.port or 0}
        elif each.model == "pci-bridge":
            more = {"chassis_nr": each.chassis if each.chassis is not None else each.index}
        return device(driver, {"id": f"pci.{each.index}", **more, **place})


def device(driver: str, properties: Mapping[str, Any]) -> list[str]:
    """`-device` in JSON; properties that are None are left out."""
    said = {name: value for name, value in properties.items() if value is not None}
    return ["-device", json.dumps({"driver": driver, **said})]


def unit_of(disk: DiskDef) -> tuple[int, int, int]:
    """A drive's controller, bus (or SCSI target) and unit: as it says, or by its name's place, as libvirt does."""
    where = disk.address
    index = _letters(disk.target)
    if where is not None and where.type == "drive":
        return where.controller, where.target if disk.bus == "scsi" else where.bus, where.unit
    match disk.bus:
        case "ide":
            return 0, index // 2, index % 2
        case "sata":
            return index // _SATA_PORTS, 0, index % _SATA_PORTS
        case _:
            return 0, index, 0


def _letters(target: str) -> int:
    """Which disk of its prefix a target is, from 0: vda 0, vdb 1, vdaa 26."""
    number = 0
    for letter in target[2:]:
        number = number * 26 + ord(letter) - ord("a") + 1
    return number - 1


def _boot_order(definition: Definition) -> dict[str, int]:
    """Device -> bootindex: as each device says, or the first device of each kind that `<boot dev>` names."""
    order = {disk.target: disk.boot for disk in definition.disks if disk.boot is not None}
    order |= {f"net{n}": each.boot for n, each in enumerate(definition.interfaces) if each.boot is not None}
    firsts = {
        "hd": next((disk.target for disk in definition.disks if disk.device == "disk"), None),
        "cdrom": next((disk.target for disk in definition.disks if disk.device == "cdrom"), None),
        "network": "net0" if definition.interfaces else None,
    }
    for place, kind in enumerate(definition.boot.order, start=1):
        first = firsts[kind]
        if first is not None:
            order.setdefault(first, place)
    return order


# --- disks ----------------------------------------------------------------------------------------------------


def disk_arguments(definition: Definition, slots: Slots, chains: Mapping[str, tuple[ImageFact, ...]]) -> list[str]:
    """`-blockdev` for every image of every chain, bottom first, and the devices on top."""
    words: list[str] = []
    for disk in definition.disks:
        for options in chain_options(disk, chains.get(disk.target, ())):
            words += ["-blockdev", json.dumps(options)]
        words += _disk_device(disk, slots)
    return words


def chain_options(disk: DiskDef, chain: tuple[ImageFact, ...]) -> list[dict[str, Any]]:
    """How to open a disk's images (QAPI BlockdevOptions), bottom first; each with its driver and its backing said.

    Layers under the active one are read-only, and may become writable when something is committed into them.
    """
    found: list[dict[str, Any]] = []
    below: str | None = None
    for depth in reversed(range(len(chain))):
        image = chain[depth]
        read_only = depth > 0 or disk.read_only
        common = {**cache_options(disk), "discard": disk.discard or "ignore"}
        options: dict[str, Any] = {
            "driver": image.format,
            "node-name": node_name(disk, depth),
            "read-only": read_only,
            "file": {"node-name": f"{node_name(disk, depth)}f", **_file(disk, image), **common},
            **common,
        }
        if read_only:
            options["file"] |= READ_ONLY_FILE
        if image.format == "qcow2":
            options["backing"] = below
        if disk.detect_zeroes is not None and depth == 0:
            options["detect-zeroes"] = disk.detect_zeroes
        below = node_name(disk, depth)
        found.append(options)
    return found


def cache_options(disk: DiskDef) -> dict[str, Any]:
    """The disk's cache mode, as an option of every node of its."""
    return {"cache": {"direct": disk.cache in ("none", "directsync"), "no-flush": disk.cache == "unsafe"}}


def node_name(disk: DiskDef, depth: int) -> str:
    """The node of a disk's image, counted from the top, 0."""
    return f"{disk.target}-{depth}"


def _file(disk: DiskDef, image: ImageFact) -> dict[str, Any]:
    if not image.path.startswith("/"):
        return nbd_options(image.path)
    more = {"aio": disk.io} if disk.io is not None else {}
    return {"driver": "host_device" if image.device else "file", "filename": image.path, **more}


def _disk_device(disk: DiskDef, slots: Slots) -> list[str]:
    driver = _DRIVERS[disk.bus]
    if disk.bus in ("scsi", "sata", "ide"):
        driver += "-cd" if disk.device == "cdrom" else "-hd"
    properties: dict[str, Any] = {
        "id": disk.id,
        "drive": node_name(disk, 0) if disk.source is not None else None,
        "bootindex": slots.boot_order.get(disk.target),
        "serial": disk.serial,
        **disk.blocks,
    }
    if disk.cache in ("writethrough", "directsync"):
        properties["write-cache"] = "off"
    controller, bus, unit = unit_of(disk)
    match disk.bus:
        case "virtio":
            thread = f"iothread{disk.iothread}" if disk.iothread is not None else None
            properties |= {"iothread": thread, **slots.place(disk.address)}
        case "nvme":
            # NVMe has to have one.
            properties |= {"serial": disk.serial or disk.target, **slots.place(disk.address)}
        case "scsi":
            properties |= {"bus": f"scsi{controller}.0", "scsi-id": bus, "lun": unit}
        case "sata":
            builtin = slots.express and controller == 0
            properties["bus"] = f"ide.{unit}" if builtin else f"sata{controller}.{unit}"
        case "ide":
            properties |= {"bus": f"ide.{bus}", "unit": unit}
        case "usb":
            properties["bus"] = "usb0.0"
    return device(driver, properties)
