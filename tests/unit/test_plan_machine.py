"""QEMU's command line for a definition: what each element becomes, and what no name or path can ever become."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from definitions import EVERYTHING, VIRT_MANAGER, disk, guest
from hypothesis import given
from hypothesis import strategies as st

from blockferry import errors
from blockferry.formats.definition import parse_definition
from blockferry.formats.names import path_flaw
from blockferry.model.definition import (
    Address,
    Boot,
    Character,
    Controller,
    Definition,
    DiskDef,
    Graphics,
    Interface,
    Source,
)
from blockferry.model.files import ImageFact
from blockferry.plan.lifecycle import Start, plan_start
from blockferry.plan.machine import arguments
from blockferry.plan.plugs import chain_options, unit_of
from blockferry.plan.steps import Launch, Resume, SetLimits

# The options that stand alone; every other one has its value in the next word.
ALONE = frozenset({"-S", "-no-user-config", "-nodefaults", "-no-shutdown"})


def parsed(words: list[str]) -> list[tuple[str, str]]:
    """The options as QEMU reads them: each with its value."""
    rest = iter(words)
    return [(word, "" if word in ALONE else next(rest)) for word in rest]


def values(words: list[str], option: str) -> list[str]:
    return [value for name, value in parsed(words) if name == option]


def devices(words: list[str]) -> dict[str, dict[str, Any]]:
    """The `-device`s by id."""
    found = [json.loads(value) for value in values(words, "-device") if value.startswith("{")]
    return {each["id"]: each for each in found}


def words_of(xml: str) -> list[str]:
    definition = parse_definition(xml)
    chains = {
        each.target: (ImageFact(path=each.source.where, format=each.source.format),)
        for each in definition.disks
        if each.source is not None
    }
    return arguments(definition, chains)


# --- what each element becomes --------------------------------------------------------------------------------


def test_the_machine() -> None:
    words = words_of(EVERYTHING)
    assert words[-2:] == ["-device", "edu"], "what the document adds comes last"
    # What runs no instruction before we say so, stays when its guest shuts down, and does nothing by itself.
    assert set(words) >= ALONE
    for option, value in {
        "-name": "guest=all-1,debug-threads=on",
        "-machine": "q35,pflash0=pflash0,pflash1=pflash1,acpi=on,smm=on",
        "-accel": "tcg",
        "-cpu": "qemu64,sse4.2=on,svm=off",
        "-m": "size=262144k",
        "-smp": "cpus=4,sockets=1,cores=2,threads=2",
        "-uuid": "1b4f2a53-6f0e-4d4e-9e7b-1c7a3f8f0a11",
        "-rtc": "base=localtime",
        # QEMU's bridge helper is a program of its own, and setuid: only a guest with a bridge may run it.
        "-sandbox": "on,obsolete=deny,elevateprivileges=allow,spawn=allow,resourcecontrol=deny",
        "-mon": "chardev=qmp,mode=control",
        "-kernel": "/boot/vmlinuz",
        "-initrd": "/boot/initrd",
        "-append": "console=ttyS0 a,b=c",
        "-boot": "strict=on,menu=on",
    }.items():
        assert values(words, option) == [value]
    assert [json.loads(each) for each in values(words, "-object")] == [
        *({"qom-type": "iothread", "id": f"iothread{number}"} for number in (1, 2, 3)),
        {"qom-type": "rng-random", "id": "rng0", "filename": "/dev/random"},
    ]
    assert values(words, "-vnc") == ["[::1]:3", "vnc=unix:/run/v,,nc"]


def test_a_small_machine() -> None:
    words = words_of(guest(machine="pc"))
    assert values(words, "-machine") == ["pc,acpi=off"]
    assert values(words, "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    assert values(words, "-display") == ["none"]
    assert values(words, "-cpu") == []
    assert devices(words) == {}


def test_firmware() -> None:
    flash = [json.loads(each) for each in values(words_of(EVERYTHING), "-blockdev")][:2]
    assert [(each["node-name"], each["read-only"], each["file"]["filename"]) for each in flash] == [
        ("pflash0", True, "/fw/code.fd"),
        ("pflash1", False, "/fw/vars.fd"),
    ]
    assert values(words_of(EVERYTHING), "-global") == ["driver=cfi.pflash01,property=secure,value=on"]
    plain = words_of(guest(os="<loader>/fw/seabios.bin</loader>"))
    assert values(plain, "-bios") == ["/fw/seabios.bin"]
    assert values(plain, "-global") == []
    assert "smm" not in values(plain, "-machine")[0]


def test_the_hosts_processor_is_not_there_without_kvm() -> None:
    cpu = "<cpu mode='host-passthrough'><feature name='vmx' policy='disable'/></cpu>"
    assert values(words_of(guest(more=cpu)), "-cpu") == ["max,vmx=off"]
    kvm = words_of(guest(more=cpu).replace("'qemu'", "'kvm'"))
    assert (values(kvm, "-cpu"), values(kvm, "-accel")) == (["host,vmx=off"], ["kvm"])


def test_the_devices() -> None:
    found = devices(words_of(EVERYTHING))
    assert found["disk-vda"] == {
        "driver": "virtio-blk-pci",
        "id": "disk-vda",
        "drive": "vda-0",
        "bootindex": 1,
        "serial": "WD-1 a_b.c+d",
        "iothread": "iothread1",
        "logical_block_size": 4096,
        "physical_block_size": 8192,
        "bus": "pci.1",
        "addr": "0x0.0x0",
    }
    scsi = {"driver": "scsi-hd", "drive": "sda-0", "write-cache": "off", "bus": "scsi1.0", "scsi-id": 3, "lun": 2}
    assert found["disk-sda"] == {"id": "disk-sda", **scsi}
    assert found["disk-sdb"] == {"driver": "ide-hd", "id": "disk-sdb", "drive": "sdb-0", "bus": "ide.1"}
    assert found["disk-sdc"] == {"driver": "usb-storage", "id": "disk-sdc", "drive": "sdc-0", "bus": "usb0.0"}
    # NVMe has to have a serial number.
    assert found["disk-nvme0n1"] == {
        "driver": "nvme", "id": "disk-nvme0n1", "drive": "nvme0n1-0", "serial": "nvme0n1",
    }  # fmt: skip
    assert found["disk-sdd"] == {"driver": "ide-cd", "id": "disk-sdd", "bootindex": 2, "bus": "ide.3"}
    assert found["pci.1"] == {
        "driver": "pcie-root-port", "id": "pci.1", "chassis": 7, "port": 8, "bus": "pcie.0", "addr": "0x6.0x0",
    }  # fmt: skip
    assert found["scsi1"] == {"driver": "virtio-scsi-pci", "id": "scsi1", "iothread": "iothread2"}
    assert found["usb0"]["driver"] == "qemu-xhci", "a disk needs it, and the document has none"
    assert found["virtio-serial0"]["driver"] == "virtio-serial-pci"
    assert found["net0"] == {
        "driver": "e1000e", "netdev": "hostnet0", "id": "net0", "mac": "52:54:00:00:00:01", "bootindex": 3,
    }  # fmt: skip
    assert [found[each]["driver"] for each in ("net1", "net2", "video0", "dev-rng0", "balloon0")] == [
        "virtio-net-pci", "virtio-net-pci", "cirrus-vga", "virtio-rng-pci", "virtio-balloon-pci",
    ]  # fmt: skip
    assert [each["driver"] for name, each in found.items() if name.startswith("dev-")] == [
        *("isa-serial", "isa-serial", "virtconsole", "virtserialport", "virtserialport", "virtio-rng-pci"),
    ]


def test_networks_and_characters() -> None:
    words = words_of(EVERYTHING)
    assert [json.loads(each) for each in values(words, "-netdev")] == [
        {"id": "hostnet0", "type": "user"},
        {"id": "hostnet1", "type": "tap", "ifname": "tap-1", "script": "no", "downscript": "no"},
        {"id": "hostnet2", "type": "bridge", "br": "br0"},
    ]
    assert values(words, "-chardev") == [
        "socket,id=qmp,path=/proc/self/fd/3/qmp.sock,server=on,wait=off",
        "file,id=serial0,path=/log/a,,b=c,append=on",
        "socket,id=serial1,path=/run/s,,1,server=on,wait=off",
        "pty,id=console2",
        "socket,id=channel3,path=/proc/self/fd/3/agent.sock,server=on,wait=off",
        "socket,id=channel4,path=/run/c",
    ]


def test_virt_managers_devices_are_where_it_put_them() -> None:
    words = words_of(VIRT_MANAGER)
    found = devices(words)
    ports = ("pci.1", "pci.2", "pci.3", "pci.4")
    assert [found[each]["addr"] for each in ports] == ["0x2.0x0", "0x2.0x1", "0x2.0x2", "0x2.0x3"]
    assert [found[each].get("multifunction") for each in ports] == [True, None, None, None]
    assert (found["disk-vda"]["bus"], found["usb0"]["bus"], found["virtio-serial0"]["bus"]) == (
        "pci.4",
        "pci.2",
        "pci.3",
    )
    assert found["disk-vda"]["bootindex"] == 1, "<boot dev='hd'/>"
    assert found["disk-sda"] == {"driver": "ide-cd", "id": "disk-sda", "bus": "ide.0"}
    order = [json.loads(value).get("id") for value in values(words, "-device")]
    assert order.index("pci.4") < order.index("disk-vda"), "a bus comes before what is plugged into it"


def test_the_boot_order_of_kinds() -> None:
    devs = disk("dev='sdb' bus='sata'", source="", attributes="device='cdrom'") + disk() + disk("vdb")
    devs += "<interface type='user'/><interface type='user'/>"
    found = devices(words_of(guest(devs, os="<boot dev='cdrom'/><boot dev='network'/><boot dev='hd'/>")))
    places = {name: each["bootindex"] for name, each in found.items() if "bootindex" in each}
    assert places == {"disk-sdb": 1, "net0": 2, "disk-vda": 3}


@pytest.mark.parametrize(
    ("bus", "target", "place"),
    [
        ("ide", "hda", (0, 0, 0)), ("ide", "hdd", (0, 1, 1)),
        ("sata", "sda", (0, 0, 0)), ("sata", "sdf", (0, 0, 5)), ("sata", "sdg", (1, 0, 0)),
        ("scsi", "sdb", (0, 1, 0)), ("scsi", "sdaa", (0, 26, 0)),
    ],
)  # fmt: skip
def test_a_drives_place_is_its_names(bus: str, target: str, place: tuple[int, int, int]) -> None:
    assert unit_of(DiskDef(target=target, bus=bus)) == place


@pytest.mark.parametrize(
    ("xml", "element", "word"),
    [
        (guest(disk("hda")), "domain/devices/disk[1]", "q35 has no IDE"),
        (guest(disk("hda") + disk("hde"), machine="pc"), "domain/devices/disk[2]", "no place for hde"),
        (
            guest(disk("sda") + disk("sdb", "<address type='drive' target='0' unit='0'/>")),
            "domain/devices/disk[2]",
            "sdb is where sda is",
        ),
        (guest(disk("dev='sda' bus='sata'", "<address type='drive' unit='6'/>")), "domain/devices/disk[1]", "no place"),
        (guest(disk("sdzz")), "domain/devices/disk[1]", "no place for sdzz"),
        (guest(disk(more="<address type='pci' bus='3'/>")), "domain/devices", "PCI bus 3"),
    ],
)
def test_devices_that_do_not_fit_together(xml: str, element: str, word: str) -> None:
    with pytest.raises(errors.InvalidXml) as caught:
        arguments(parse_definition(xml), {})
    assert caught.value.element == element
    assert word in caught.value.reason


# --- chains ---------------------------------------------------------------------------------------------------

CHAIN = (
    ImageFact(path="/s3", format="qcow2", backing="/s2"),
    ImageFact(path="/s2", format="qcow2", backing="/dev/vg/base"),
    ImageFact(path="/dev/vg/base", format="raw", device=True),
)


def test_every_image_of_a_chain_says_its_driver_and_its_backing() -> None:
    source = Source(kind="file", where="/s3", format="qcow2")
    shown = DiskDef(target="vda", bus="virtio", source=source, cache="none", io="native", detect_zeroes="on")
    base, middle, top = chain_options(shown, CHAIN)
    assert [(each["node-name"], each["driver"], each["read-only"]) for each in (base, middle, top)] == [
        ("vda-2", "raw", True), ("vda-1", "qcow2", True), ("vda-0", "qcow2", False),
    ]  # fmt: skip
    # Raw has none, which an absent one means; a qcow2 without would follow its header.
    assert ("backing" in base, middle["backing"], top["backing"]) == (False, "vda-2", "vda-1")
    assert [each["file"]["driver"] for each in (base, middle, top)] == ["host_device", "file", "file"]
    assert [each["file"]["node-name"] for each in (base, middle, top)] == ["vda-2f", "vda-1f", "vda-0f"]
    # What is below may become writable when something is committed into it.
    assert [each["file"].get("auto-read-only") for each in (base, middle, top)] == [True, True, None]
    assert [each.get("detect-zeroes") for each in (base, middle, top)] == [None, None, "on"]
    assert all(each["cache"] == {"direct": True, "no-flush": False} for each in (base, middle, top))
    assert all(each["file"]["aio"] == "native" for each in (base, middle, top))


def test_a_qcow2_alone_says_that_it_has_no_backing() -> None:
    shown = DiskDef(target="vda", bus="virtio", source=Source(kind="file", where="/a", format="qcow2"))
    (only,) = chain_options(shown, (ImageFact(path="/a", format="qcow2"),))
    assert only["backing"] is None


def test_an_export() -> None:
    where = "nbd+unix:///e?socket=/run/a%20b%2Cc%3Dd%3F.sock"
    shown = DiskDef(
        target="vda", bus="virtio", source=Source(kind="network", where=where, format="raw"), read_only=True
    )
    (only,) = chain_options(shown, (ImageFact(path=where, format="raw"),))
    assert only["file"]["server"] == {"type": "unix", "path": "/run/a b,c=d?.sock"}
    assert (only["file"]["export"], only["read-only"]) == ("e", True)


@pytest.mark.parametrize(
    ("cache", "direct", "no_flush", "write_cache"),
    [
        (None, False, False, None), ("writeback", False, False, None), ("none", True, False, None),
        ("writethrough", False, False, "off"), ("directsync", True, False, "off"), ("unsafe", False, True, None),
    ],
)  # fmt: skip
def test_cache_modes(cache: str | None, direct: bool, no_flush: bool, write_cache: str | None) -> None:
    words = words_of(guest(disk(driver=f"cache='{cache}'" if cache else "")))
    node = json.loads(values(words, "-blockdev")[0])
    assert node["cache"] == node["file"]["cache"] == {"direct": direct, "no-flush": no_flush}
    assert devices(words)["disk-vda"].get("write-cache") == write_cache


# --- starting -------------------------------------------------------------------------------------------------


def test_a_start() -> None:
    definition = parse_definition(EVERYTHING)
    chains = {"vda": (ImageFact(path="/s1", format="qcow2"), ImageFact(path="/a", format="raw"))}
    start = Start(definition=definition, program="/bin/qemu", chains=chains)
    plan = plan_start(start)
    launch, limits = plan.prepare
    assert isinstance(launch, Launch)
    assert isinstance(limits, SetLimits)
    assert (launch.program, launch.environment) == ("/bin/qemu", {"A_B": "c d"})
    assert (limits.device, limits.limits) == ("/machine/peripheral/disk-vda/virtio-backend", definition.disks[0].limits)
    assert plan.record.authoritative == {"vda": "/s1"}
    assert plan.settle == (Resume(first=True),)
    assert plan_start(msgspec.structs.replace(start, paused=True)).settle == ()


def test_an_image_that_will_not_do() -> None:
    bad = ImageFact(path="/base", format="raw", problem="it is not there")
    chains = {"vda": (ImageFact(path="/a", format="qcow2", backing="/base"), bad)}
    start = Start(definition=parse_definition(guest(disk())), program="/bin/qemu", chains=chains)
    with pytest.raises(errors.ImageUnsuitable, match="it is not there"):
        plan_start(start)


# --- no name or path becomes an option ------------------------------------------------------------------------

letters = st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("-,=/:{}\"' $")
anything = st.text(letters | st.just("\n"), max_size=30)
paths = st.text(letters, max_size=30).map(lambda text: f"/{text}.").filter(lambda path: path_flaw(path) is None)


@st.composite
def hostile(draw: st.DrawFn) -> tuple[Definition, dict[str, tuple[ImageFact, ...]]]:
    """A definition as parse_definition may let it through, its paths and texts anybody's."""
    image = draw(paths)
    definition = Definition(
        name="g",
        memory=1 << 26,
        acpi=True,
        boot=Boot(kernel=draw(paths), initrd=draw(paths), cmdline=draw(anything), loader=draw(paths)),
        disks=(
            DiskDef(target="vda", bus="virtio", source=Source(kind="file", where=image, format="qcow2")),
            DiskDef(
                target="sda", bus="scsi", source=Source(kind="block", where=draw(paths), format="raw"), serial="a b"
            ),
        ),
        controllers=(Controller(type="scsi", index=0, address=Address(type="pci", slot=5)),),
        interfaces=(Interface(type="bridge", source="-br"),),
        characters=(
            Character(role="serial", type="file", path=draw(paths)),
            Character(role="channel", type="unix", path=draw(paths), name="a"),
        ),
        graphics=(Graphics(socket=draw(paths)),),
        rng=draw(paths),
    )
    backing = ImageFact(path=draw(paths), format="raw")
    top = ImageFact(path=image, format="qcow2", backing=backing.path)
    assert definition.disks[1].source is not None
    return definition, {"vda": (top, backing), "sda": (ImageFact(path=definition.disks[1].source.where, format="raw"),)}


def split(value: str) -> dict[str, str]:
    """A value as QEMU's own option syntax reads it (util/qemu-option.c): a comma ends it, two commas are one."""
    parts = [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]
    return dict(part.split("=", 1) if "=" in part else (part, "") for part in parts)


@given(hostile())
def test_no_path_or_text_becomes_an_option(drawn: tuple[Definition, dict[str, tuple[ImageFact, ...]]]) -> None:
    definition, chains = drawn
    plain = Definition(
        name="g",
        memory=1 << 26,
        acpi=True,
        boot=Boot(kernel="/k", initrd="/i", cmdline="c", loader="/l"),
        disks=(
            DiskDef(target="vda", bus="virtio", source=Source(kind="file", where="/a", format="qcow2")),
            DiskDef(target="sda", bus="scsi", source=Source(kind="block", where="/b", format="raw"), serial="a b"),
        ),
        controllers=definition.controllers,
        interfaces=definition.interfaces,
        characters=(
            Character(role="serial", type="file", path="/f"),
            Character(role="channel", type="unix", path="/u", name="a"),
        ),
        graphics=(Graphics(socket="/v"),),
        rng="/r",
    )
    facts = {
        "vda": (ImageFact(path="/a", format="qcow2", backing="/c"), ImageFact(path="/c", format="raw")),
        "sda": (ImageFact(path="/b", format="raw"),),
    }
    ours, theirs = parsed(arguments(plain, facts)), parsed(arguments(definition, chains))
    assert [option for option, _ in ours] == [option for option, _ in theirs]
    for (option, own), (_, other) in zip(ours, theirs, strict=True):
        match option:
            case "-blockdev" | "-device" | "-object" | "-netdev":
                assert shape(json.loads(own)) == shape(json.loads(other))
            case "-chardev":
                assert split(own).keys() == split(other).keys()
            case "-vnc":
                assert split(other) == {"vnc": f"unix:{definition.graphics[0].socket}"}
            case "-kernel" | "-initrd" | "-append" | "-bios":
                # QEMU takes the whole of the next word, whatever it begins with.
                assert other in (
                    definition.boot.kernel,
                    definition.boot.initrd,
                    definition.boot.cmdline,
                    definition.boot.loader,
                )
            case _:
                assert own == other
    for value in values(arguments(definition, chains), "-chardev"):
        if "path" in split(value) and not split(value)["path"].startswith("/proc/self/fd/3/"):
            assert split(value)["path"] in [each.path for each in definition.characters]


def shape(value: Any) -> Any:
    """A document without the texts that are paths: of every other value, itself."""
    if isinstance(value, dict):
        return {name: "..." if name in ("filename", "path") else shape(each) for name, each in value.items()}
    return value
