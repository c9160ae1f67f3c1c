"""QEMU's command line for a definition: the machine and what is not a block device. Pure.

Whatever can be said as JSON is said so: no character of a path or name can then become an option.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from blockferry.model.definition import AGENT_CHANNEL, Character, Definition, Graphics, RunAs
from blockferry.model.files import ImageFact
from blockferry.plan.plugs import Slots, device, disk_arguments

# The domain's own folder, which QEMU inherits opened (qemu/launch.py): a short path, without a character of anybody's.
FOLDER_DESCRIPTOR = 3
FOLDER = f"/proc/self/fd/{FOLDER_DESCRIPTOR}"
QMP_SOCKET = "qmp.sock"
AGENT_SOCKET = "agent.sock"
VNC_FIRST_PORT = 5900


def arguments(
    definition: Definition, chains: Mapping[str, tuple[ImageFact, ...]], run_as: RunAs | None = None
) -> list[str]:
    """QEMU's arguments, its program left out. The guest does not run yet (-S), and stays when it shuts down.

    Args:
        definition: the guest.
        chains: by target, the images of each disk that has one, top first, as their headers say.
        run_as: whom QEMU is to become; None for who starts it.

    Raises:
        InvalidXml: a device is plugged into what is not there.
    """
    slots = Slots(definition)
    return [
        *_machine(definition, run_as),
        *_firmware(definition),
        *_boot(definition),
        *_objects(definition),
        *slots.controllers(),
        *disk_arguments(definition, slots, chains),
        *_characters(definition),
        *_interfaces(definition, slots),
        *_screens(definition),
        *_others(definition),
        *definition.arguments,
    ]


def option(text: str) -> str:
    """A value inside of an option in QEMU's own syntax: a comma is written twice (qemu(1), "-blockdev")."""
    return text.replace(",", ",,")


def _machine(definition: Definition, run_as: RunAs | None) -> list[str]:
    machine = definition.machine or "pc"
    flash = definition.boot.loader if definition.boot.loader_type == "pflash" else None
    parts = [machine, *(["pflash0=pflash0"] if flash else []), *(["pflash1=pflash1"] if definition.boot.nvram else [])]
    parts += [f"acpi={'on' if definition.acpi else 'off'}"]
    parts += [f"smm={'on' if definition.boot.smm else 'off'}"] if definition.boot.smm is not None else []
    smp = [f"cpus={definition.vcpus}"]
    if definition.topology is not None:
        sockets, cores, threads = definition.topology
        smp += [f"sockets={sockets}", f"cores={cores}", f"threads={threads}"]
    bridge = any(each.type == "bridge" for each in definition.interfaces)
    children = "allow" if bridge else "deny"  # QEMU's bridge helper is a program of its own, and setuid
    # The filter is there before QEMU becomes another user, and would end it then. Afterwards it has no capability left.
    elevate = "allow" if run_as is not None else children
    cpu = definition.cpu
    if cpu is not None and not definition.kvm:
        # TCG has no host's processor to pass on.
        model, _, features = cpu.partition(",")
        cpu = ("max" if model == "host" else model) + (f",{features}" if features else "")
    return [
        *["-name", f"guest={definition.name},debug-threads=on"],
        *["-S", "-no-user-config", "-nodefaults", "-no-shutdown"],
        *["-machine", ",".join(parts)],
        *["-accel", "kvm" if definition.kvm else "tcg"],
        *(["-cpu", cpu] if cpu is not None else []),
        *["-m", f"size={definition.memory // 1024}k"],
        *["-smp", ",".join(smp)],
        *(["-uuid", definition.uuid] if definition.uuid is not None else []),
        *["-rtc", f"base={'localtime' if definition.localtime else 'utc'}"],
        *["-sandbox", f"on,obsolete=deny,elevateprivileges={elevate},spawn={children},resourcecontrol=deny"],
        *(run_as.words if run_as is not None else ()),
        *[
            "-chardev",
            f"socket,id=qmp,path={FOLDER}/{QMP_SOCKET},server=on,wait=off",
            "-mon",
            "chardev=qmp,mode=control",
        ],
        *["-msg", "timestamp=on"],
    ]


def _firmware(definition: Definition) -> list[str]:
    boot = definition.boot
    if boot.loader is not None and boot.loader_type == "rom":
        return ["-bios", boot.loader]
    secure = ["-global", "driver=cfi.pflash01,property=secure,value=on"] if boot.secure else []
    images = [("pflash0", boot.loader, True), ("pflash1", boot.nvram, False)]
    return secure + [
        word
        for node, path, read_only in images
        if path is not None
        for word in (
            "-blockdev",
            json.dumps(
                {
                    "driver": "raw",
                    "node-name": node,
                    "read-only": read_only,
                    "file": {"driver": "file", "filename": path, "auto-read-only": read_only},
                }
            ),
        )
    ]


def _boot(definition: Definition) -> list[str]:
    boot = definition.boot
    said = [("-kernel", boot.kernel), ("-initrd", boot.initrd), ("-append", boot.cmdline)]
    words = [word for flag, value in said if value is not None for word in (flag, value)]
    return [*words, "-boot", f"strict=on,menu={'on' if boot.menu else 'off'}"]


def _objects(definition: Definition) -> list[str]:
    threads = [{"qom-type": "iothread", "id": f"iothread{number}"} for number in range(1, definition.iothreads + 1)]
    return [word for each in threads for word in ("-object", json.dumps(each))]


# --- characters, network, screens -----------------------------------------------------------------------------


def _characters(definition: Definition) -> list[str]:
    words: list[str] = []
    for number, each in enumerate(definition.characters):
        name = f"{each.role}{number}"
        words += ["-chardev", _backend(each, name)]
        match each.role:
            case "serial":
                words += device("isa-serial", {"chardev": name, "id": f"dev-{name}"})
            case "console":
                words += device("virtconsole", {"chardev": name, "id": f"dev-{name}"})
            case "channel":
                words += device("virtserialport", {"chardev": name, "id": f"dev-{name}", "name": each.name})
    return words


def _backend(each: Character, name: str) -> str:
    match each.type:
        case "file":
            return f"file,id={name},path={option(str(each.path))},append=on"
        case "unix":
            path = option(each.path) if each.path is not None else _own_socket(each, name)
            return f"socket,id={name},path={path}" + (",server=on,wait=off" if each.listen else "")
        case _:
            return f"{each.type},id={name}"


def agent_socket(definition: Definition) -> str | None:
    """Where QEMU listens for those who want the guest's agent, a path of its own in the domain's folder; None if nowhere."""
    for each in definition.characters:
        if each.name == AGENT_CHANNEL and each.type == "unix" and each.listen:
            return each.path or AGENT_SOCKET
    return None


def _own_socket(each: Character, name: str) -> str:
    return f"{FOLDER}/{AGENT_SOCKET if each.name == AGENT_CHANNEL else f'{name}.sock'}"


_NICS = {"virtio": "virtio-net-pci"}


def _interfaces(definition: Definition, slots: Slots) -> list[str]:
    words: list[str] = []
    order = slots.boot_order
    for number, each in enumerate(definition.interfaces):
        name = f"net{number}"
        backend: dict[str, Any] = {"id": f"host{name}", "type": {"ethernet": "tap"}.get(each.type, each.type)}
        if each.type == "ethernet":
            backend |= {"ifname": each.source, "script": "no", "downscript": "no"}
        elif each.type == "bridge":
            backend["br"] = each.source
        words += ["-netdev", json.dumps(backend)]
        plugged = {"netdev": f"host{name}", "id": name, "mac": each.mac, "bootindex": order.get(name)}
        words += device(_NICS.get(each.model, each.model), {**plugged, **slots.place(each.address)})
    return words


def _screens(definition: Definition) -> list[str]:
    words = [word for each in definition.graphics for word in ("-vnc", _vnc(each))] or ["-display", "none"]
    return [*words, *(device(definition.video, {"id": "video0"}) if definition.video is not None else [])]


def _vnc(each: Graphics) -> str:
    if each.socket is not None:
        # Its option is named: QEMU would take a path with a '=' for another one.
        return f"vnc=unix:{option(each.socket)}"
    host = f"[{each.listen}]" if ":" in each.listen else each.listen
    return f"{host}:{each.port - VNC_FIRST_PORT}" if each.port else f"{host}:0,to=99"


def _others(definition: Definition) -> list[str]:
    words: list[str] = []
    if definition.rng is not None:
        words += ["-object", json.dumps({"qom-type": "rng-random", "id": "rng0", "filename": definition.rng})]
        words += device("virtio-rng-pci", {"rng": "rng0", "id": "dev-rng0"})
    if definition.balloon:
        words += device("virtio-balloon-pci", {"id": "balloon0"})
    return words
