"""`<domain>` to a definition: libvirt's XML of the kind that people have. What is not understood is listed."""

from __future__ import annotations

import re
import uuid
from collections import Counter

import msgspec

from blockferry.errors import InvalidName
from blockferry.formats import devices, xmlio
from blockferry.formats.names import valid_name
from blockferry.formats.reading import Reading, at, refuse
from blockferry.formats.xmlio import Element
from blockferry.model.definition import Boot, Controller, Definition, DiskDef

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
# libvirt's units of <memory> (its formatdomain, "Memory Allocation"), in any case; KiB when none is named.
_UNITS = {"b": 1, "byte": 1, "bytes": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", start=1)}
_UNITS |= {f"{letter}{more}": 1024**power for power, letter in enumerate("kmgtp", start=1) for more in ("", "ib")}
# What goes into QEMU's -machine, -cpu and -device as a word.
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_MEMORY_MIN = 1 << 20
# What QEMU's own address spaces end at, and far above what a host has.
_MEMORY_MAX = 1 << 52
_IOTHREADS_MAX = 1024
# Of passwd(5) and group(5), or their numbers after a `+`.
_LABEL = re.compile(r"\+?[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}(:\+?[A-Za-z0-9_][A-Za-z0-9_.-]{0,31})?")
# As libvirt's schema.
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Said of every guest by libvirt's own dumps, and what QEMU or we do anyway.
_HARMLESS = (
    "metadata",
    "title",
    "description",
    "genid",
    "on_poweroff",
    "on_reboot",
    "on_crash",
    "on_lockfailure",
    "resource",
)


def parse_definition(xml: str) -> Definition:
    """The guest that a `<domain>` describes.

    Args:
        xml: the document, from anybody.

    Returns:
        The definition; its `ignored` names what is not understood.

    Raises:
        InvalidXml: it is malformed or hostile, or a disk or value can't be carried out.
        InvalidName: its name can't be a domain's.
    """
    root = xmlio.parse(xml, "domain")
    reading = Reading(root)
    kind = reading.need(root, "type", among=("qemu", "kvm"))
    reading.get(root, "id")
    name = reading.text(root, "name")
    if name is None or not valid_name(name):
        raise InvalidName(name=xmlio.shorten(name or ""))
    os_element = reading.child(root, "os")
    arch, machine = _machine(reading, root, os_element)
    reading.harmless(root, *_HARMLESS)
    plugged = reading.child(root, "devices")
    if plugged is None:
        plugged = xmlio.document("devices")
    disks, controllers = devices.disks(reading, plugged), devices.controllers(reading, plugged)
    arguments, environment = _commandline(reading, root)
    user, relabel = _user(reading, root)
    definition = Definition(
        name=name,
        uuid=_uuid(reading, root),
        kvm=kind == "kvm",
        memory=_memory(reading, root),
        vcpus=_vcpus(reading, root),
        topology=_topology(reading, root),
        cpu=_cpu(reading, root),
        emulator=reading.text_path(plugged, "emulator"),
        arch=arch,
        machine=machine,
        acpi=_acpi(reading, root),
        localtime=_localtime(reading, root),
        boot=_boot(reading, root, os_element),
        iothreads=_iothreads(reading, root, disks, controllers),
        disks=disks,
        controllers=controllers,
        interfaces=devices.interfaces(reading, plugged),
        characters=devices.characters(reading, plugged),
        graphics=devices.graphics(reading, plugged),
        video=devices.video(reading, plugged),
        rng=devices.rng(reading, plugged),
        balloon=devices.balloon(reading, plugged),
        user=user,
        relabel=relabel,
        arguments=arguments,
        environment=environment,
    )
    _check(root, definition)
    return msgspec.structs.replace(definition, ignored=reading.ignored())


def _user(reading: Reading, root: Element) -> tuple[str | None, bool]:
    """Whom QEMU runs as, and whether images become that user's: libvirt's DAC label, of a static one.

    A dynamic one shows whom libvirt has chosen, and other models (selinux, apparmor) are libvirt's alone.
    """
    found: tuple[str | None, bool] = (None, False)
    for element in root.findall("seclabel"):
        if element.get("model") != "dac" or element.get("type") != "static":
            reading.keep(element)
            continue
        reading.mark(element)
        reading.get(element, "model")
        reading.get(element, "type")
        relabel = bool(reading.flag(element, "relabel"))
        label = reading.text(element, "label")
        reading.harmless(element, "imagelabel", "baselabel")
        if label is None or not _LABEL.fullmatch(label):
            refuse(element, "its <label> is to be USER or USER:GROUP")
        if found[0] is not None:
            refuse(element, "only one user can be said")
        found = label, relabel
    return found


def _uuid(reading: Reading, root: Element) -> str | None:
    text = reading.text(root, "uuid")
    if text is None:
        return None
    try:
        return str(uuid.UUID(text))
    except ValueError:
        refuse(at(root, "uuid"), f"{xmlio.shorten(text)!r} is no UUID")


def _memory(reading: Reading, root: Element) -> int:
    amounts = {}
    for tag in ("memory", "currentMemory"):
        element = reading.child(root, tag)
        if element is None:
            continue
        unit = reading.get(element, "unit") or "KiB"
        if unit.lower() not in _UNITS:
            refuse(element, f"unit={xmlio.shorten(unit)!r} is none: write KiB, MiB or GiB")
        amounts[tag] = (reading.whole(root, tag, 1) or 0) * _UNITS[unit.lower()]
    if "memory" not in amounts:
        refuse(root, "it has no <memory>")
    if amounts["memory"] < _MEMORY_MIN:
        refuse(at(root, "memory"), f"{amounts['memory']} bytes are too little for a guest (is it the unit?)")
    if amounts["memory"] > _MEMORY_MAX:
        refuse(at(root, "memory"), f"{amounts['memory']} bytes are more than a guest can have (is it the unit?)")
    present = amounts.get("currentMemory", amounts["memory"])
    if present > amounts["memory"]:
        refuse(at(root, "currentMemory"), "it is more than <memory>")
    if present < amounts["memory"]:
        # The guest starts with all of its memory: nobody blows its balloon up.
        reading.unmark(at(root, "currentMemory"))
    return amounts["memory"]


def _vcpus(reading: Reading, root: Element) -> int:
    element = reading.child(root, "vcpu")
    reading.get(element, "placement")
    return reading.whole(root, "vcpu", 1) or 1


def _iothreads(reading: Reading, root: Element, disks: tuple[DiskDef, ...], controllers: tuple[Controller, ...]) -> int:
    count = reading.whole(root, "iothreads") or 0
    if count > _IOTHREADS_MAX:
        refuse(at(root, "iothreads"), f"{count} are too many: at most {_IOTHREADS_MAX}")
    wanted = [(f"disk {disk.target}", disk.iothread) for disk in disks]
    wanted += [(f"{each.type} controller {each.index}", each.iothread) for each in controllers]
    for who, number in wanted:
        if number is not None and number > count:
            refuse(root, f"{who} wants iothread {number}, and <iothreads> is {count}")
    return count


def _machine(reading: Reading, root: Element, os_element: Element | None) -> tuple[str, str | None]:
    kind = None if os_element is None else reading.child(os_element, "type")
    if kind is None or (kind.text or "").strip() != "hvm":
        refuse(root if kind is None else kind, "the guest has to be a full machine: <os><type>hvm</type></os>")
    arch, machine = reading.get(kind, "arch") or "x86_64", reading.get(kind, "machine")
    for word in (arch, machine):
        if word is not None:
            _require_word(kind, word)
    return arch, machine


def _require_word(element: Element, word: str) -> None:
    if not _WORD.fullmatch(word):
        refuse(element, f"{xmlio.shorten(word)!r} is no name of a model")


def _boot(reading: Reading, root: Element, element: Element | None) -> Boot:
    if element is None:
        return Boot()
    loader, nvram = reading.child(element, "loader"), reading.child(element, "nvram")
    if reading.get(element, "firmware", among=("bios", "efi")) == "efi" and loader is None:
        refuse(
            element,
            "firmware='efi' leaves the choice of an image to libvirt: name it, as <loader readonly='yes' type='pflash'>, "
            "and where the guest's variables are, as <nvram template='...'>",
        )
    # What the image was chosen by.
    reading.harmless(element, "firmware")
    reading.flag(loader, "readonly")
    for each in (loader, nvram):
        reading.get(each, "format", among=("raw",))
    reading.get(nvram, "templateFormat", among=("raw",))
    menu = reading.child(element, "bootmenu")
    return Boot(
        order=tuple(
            reading.need(each, "dev", among=("hd", "cdrom", "network")) for each in reading.children(element, "boot")
        ),
        kernel=reading.text_path(element, "kernel"),
        initrd=reading.text_path(element, "initrd"),
        cmdline=reading.text(element, "cmdline"),
        loader=reading.text_path(element, "loader"),
        loader_type="pflash" if reading.get(loader, "type", among=("rom", "pflash")) == "pflash" else "rom",
        secure=bool(reading.flag(loader, "secure")),
        smm=_smm(reading, root),
        nvram=reading.text_path(element, "nvram"),
        template=reading.path(nvram, "template"),
        menu=bool(reading.flag(menu, "enable")),
    )


def _smm(reading: Reading, root: Element) -> bool | None:
    features = root.find("features")
    element = None if features is None else reading.child(features, "smm")
    # As libvirt: one that says nothing of its state is on.
    return None if element is None else reading.flag(element, "state") is not False


def _acpi(reading: Reading, root: Element) -> bool:
    features = reading.child(root, "features")
    if features is None:
        return False
    reading.harmless(features, "apic", "pae")
    return reading.child(features, "acpi") is not None


def _localtime(reading: Reading, root: Element) -> bool:
    clock = reading.child(root, "clock")
    if clock is None:
        return False
    reading.harmless(clock, "timer")
    return reading.get(clock, "offset", among=("utc", "localtime")) == "localtime"


def _cpu(reading: Reading, root: Element) -> str | None:
    element = reading.child(root, "cpu")
    if element is None:
        return None
    mode = reading.get(element, "mode", among=("custom", "host-model", "host-passthrough", "maximum")) or "custom"
    for name in ("match", "check", "migratable"):
        reading.get(element, name)
    model = reading.text(element, "model")
    child = element.find("model")
    reading.get(child, "fallback")
    if mode != "custom":
        # host-model is libvirt's nearest named model; the host itself is what it stands for on one host.
        model = "max" if mode == "maximum" else "host"
    if model is None:
        return None
    _require_word(element, model)
    words = [model]
    for feature in reading.children(element, "feature"):
        name = reading.need(feature, "name")
        _require_word(feature, name)
        policy = (
            reading.get(feature, "policy", among=("force", "require", "optional", "disable", "forbid")) or "require"
        )
        words.append(f"{name}={'off' if policy in ('disable', 'forbid') else 'on'}")
    return ",".join(words)


def _topology(reading: Reading, root: Element) -> tuple[int, int, int] | None:
    cpu = root.find("cpu")
    element = None if cpu is None else reading.child(cpu, "topology")
    if element is None:
        return None
    sockets, cores, threads = (reading.number(element, name, 1) or 1 for name in ("sockets", "cores", "threads"))
    for name in ("dies", "clusters"):
        if (reading.number(element, name, 1) or 1) != 1:
            refuse(element, f"more than one of {name} is not carried out")
    return sockets, cores, threads


def _commandline(reading: Reading, root: Element) -> tuple[tuple[str, ...], dict[str, str]]:
    element = reading.child(root, f"{{{QEMU_NAMESPACE}}}commandline")
    if element is None:
        return (), {}
    arguments = tuple(reading.need(each, "value") for each in reading.children(element, f"{{{QEMU_NAMESPACE}}}arg"))
    environment = {
        reading.need(each, "name"): reading.get(each, "value") or ""
        for each in reading.children(element, f"{{{QEMU_NAMESPACE}}}env")
    }
    for name in environment:
        if not _VARIABLE.fullmatch(name):
            refuse(element, f"{xmlio.shorten(name)!r} is no name of an environment variable")
    return arguments, environment


def _check(root: Element, definition: Definition) -> None:
    """Refuse what contradicts itself across elements."""
    if definition.topology is not None:
        sockets, cores, threads = definition.topology
        if sockets * cores * threads != definition.vcpus:
            refuse(at(root, "cpu"), f"{sockets} x {cores} x {threads} is not the number of vcpus, {definition.vcpus}")
    boot = definition.boot
    if boot.kernel is None and (boot.initrd is not None or boot.cmdline is not None):
        refuse(at(root, "os"), "an <initrd> or a <cmdline> needs a <kernel>")
    if boot.template is not None and boot.nvram is None:
        refuse(at(root, "os"), "an <nvram template> needs the path of the guest's own variables")
    if boot.nvram is not None and (boot.loader is None or boot.loader_type != "pflash"):
        refuse(at(root, "os"), "an <nvram> needs a <loader type='pflash'>")
    places = [(disk.boot, disk.target) for disk in definition.disks if disk.boot is not None]
    places += [(each.boot, each.mac or each.type) for each in definition.interfaces if each.boot is not None]
    if places and boot.order:
        refuse(at(root, "os"), "a boot order is said by <boot dev> or by each device's <boot order>, not by both")
    counts = Counter(place for place, _who in places)
    for place, who in places:
        if counts[place] > 1:
            refuse(root, f"boot order {place} is given to several devices, {who} among them")
