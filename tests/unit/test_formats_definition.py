"""Reading the definitions that people have: all that is understood, all that is listed, all that is refused."""

from __future__ import annotations

import re

import msgspec
import pytest
from definitions import EVERYTHING, VIRT_MANAGER, VIRT_MANAGER_IGNORED, disk, guest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from blockferry.errors import InvalidName, InvalidXml
from blockferry.formats.definition import parse_definition
from blockferry.model.definition import (
    Address,
    Boot,
    Character,
    Controller,
    DiskDef,
    Graphics,
    Interface,
    Source,
)

MIB = 1 << 20


def refusal(xml: str) -> InvalidXml:
    with pytest.raises(InvalidXml) as caught:
        parse_definition(xml)
    return caught.value


# --- what is understood ---------------------------------------------------------------------------------------


def test_the_guest_itself() -> None:
    found = parse_definition(EVERYTHING)
    assert found.ignored == ()
    assert (found.name, found.uuid) == ("all-1", "1b4f2a53-6f0e-4d4e-9e7b-1c7a3f8f0a11")
    assert (found.memory, found.vcpus, found.topology, found.iothreads) == (256 * MIB, 4, (1, 2, 2), 3)
    assert (found.cpu, found.arch, found.machine) == ("qemu64,sse4.2=on,svm=off", "x86_64", "q35")
    assert (found.kvm, found.acpi, found.localtime, found.emulator) == (False, True, True, None)
    assert found.boot == Boot(
        kernel="/boot/vmlinuz",
        initrd="/boot/initrd",
        cmdline="console=ttyS0 a,b=c",
        loader="/fw/code.fd",
        loader_type="pflash",
        secure=True,
        smm=True,
        nvram="/fw/vars.fd",
        template="/fw/vars.tmpl",
        menu=True,
    )
    assert (found.video, found.rng, found.balloon, found.agent) == ("cirrus-vga", "/dev/random", True, True)
    assert (found.arguments, found.environment) == (("-device", "edu"), {"A_B": "c d"})


def test_disks() -> None:
    first, second, third, fourth, fifth, sixth = parse_definition(EVERYTHING).disks
    limits = {"total_bytes_sec": 1000000, "total_bytes_sec_max": 2000000, "total_bytes_sec_max_length": 60}
    assert first == DiskDef(
        target="vda",
        bus="virtio",
        source=Source(kind="file", where="/img/a, b=c.qcow2", format="qcow2"),
        cache="none",
        io="native",
        discard="unmap",
        detect_zeroes="unmap",
        iothread=1,
        serial="WD-1 a_b.c+d",
        boot=1,
        limits={**limits, "read_iops_sec": 100},
        blocks={"logical_block_size": 4096, "physical_block_size": 8192},
        address=Address(type="pci", bus=1),
    )
    assert second == DiskDef(
        target="sda",
        bus="scsi",
        source=Source(kind="block", where="/dev/vg/b", format="raw"),
        cache="writethrough",
        read_only=True,
        address=Address(type="drive", controller=1, target=3, unit=2),
    )
    assert third.source == Source(kind="network", where="nbd://[::1]:10810/exp/ort", format="raw")
    assert (third.bus, third.io) == ("sata", "io_uring")
    unix = "nbd+unix:///e?socket=/run/a%20b%2Cc%3Dd%3F.sock"
    assert (fourth.bus, fourth.source) == ("usb", Source(kind="network", where=unix, format="qcow2"))
    # As libvirt: raw unless told, never probed.
    assert (fifth.bus, fifth.source) == ("nvme", Source(kind="file", where="/img/nvme", format="raw"))
    assert sixth == DiskDef(target="sdd", bus="sata", device="cdrom", read_only=True, boot=2)


def test_controllers_interfaces_characters_screens() -> None:
    found = parse_definition(EVERYTHING)
    assert found.controllers == (
        Controller(type="pci", index=0, model="pcie-root"),
        Controller(type="pci", index=1, model="pcie-root-port", chassis=7, port=8, address=Address(type="pci", slot=6)),
        Controller(type="scsi", index=1, model="virtio-scsi", iothread=2),
    )
    assert found.interfaces == (
        Interface(type="user", model="e1000e", mac="52:54:00:00:00:01", boot=3),
        Interface(type="ethernet", source="tap-1"),
        Interface(type="bridge", source="br0"),
    )
    assert found.characters == (
        Character(role="serial", type="file", path="/log/a,b=c"),
        Character(role="serial", type="unix", path="/run/s,1"),
        Character(role="console", type="pty"),
        Character(role="channel", type="unix", name="org.qemu.guest_agent.0"),
        Character(role="channel", type="unix", path="/run/c", listen=False, name="org.example.c"),
    )
    assert found.graphics == (Graphics(listen="::1", port=5903), Graphics(socket="/run/v,nc"))


@pytest.mark.parametrize(
    ("unit", "factor"),
    [
        ("", 1024),
        ("unit='b'", 1),
        ("unit='KB'", 1000),
        ("unit='k'", 1024),
        ("unit='MiB'", MIB),
        ("unit='gib'", 1 << 30),
    ],
)
def test_units_of_memory(unit: str, factor: int) -> None:
    xml = guest().replace("<memory unit='MiB'>64<", f"<memory {unit}>4194304<")
    assert parse_definition(xml).memory == 4194304 * factor


@pytest.mark.parametrize(
    ("cpu", "said"),
    [
        ("<cpu mode='host-passthrough'/>", "host"),
        ("<cpu mode='host-model'/>", "host"),
        ("<cpu mode='maximum'/>", "max"),
        ("<cpu><model>Haswell</model><feature name='avx' policy='forbid'/></cpu>", "Haswell,avx=off"),
        ("<cpu><topology sockets='1' cores='1' threads='1'/></cpu>", None),
    ],
)
def test_cpus(cpu: str, said: str | None) -> None:
    found = parse_definition(guest(more=cpu))
    assert (found.cpu, found.ignored) == (said, ())


@pytest.mark.parametrize(
    ("target", "bus"),
    [("vdb", "virtio"), ("sdb", "scsi"), ("hdb", "ide"), ("nvme0n1", "nvme"), ("dev='sda' bus='usb'", "usb")],
)
def test_the_bus_of_a_name(target: str, bus: str) -> None:
    assert parse_definition(guest(disk(target))).disks[0].bus == bus


def test_a_console_that_shows_the_serial_port_is_no_second_one() -> None:
    console = (
        "<console type='pty' tty='/dev/pts/1'><source path='/dev/pts/1'/><target type='serial' port='0'/></console>"
    )
    serial = "<serial type='pty'><source path='/dev/pts/1'/><target type='isa-serial' port='0'/></serial>"
    for devices in (serial + console, serial, console):
        found = parse_definition(guest(devices))
        assert [(each.role, each.type, each.path) for each in found.characters] == [("serial", "pty", None)]
        assert found.ignored == ()


# --- what is listed -------------------------------------------------------------------------------------------


def test_virt_managers_guest() -> None:
    found = parse_definition(VIRT_MANAGER)
    assert found.ignored == VIRT_MANAGER_IGNORED
    assert (found.name, found.kvm, found.cpu, found.machine) == ("debian12", True, "host", "pc-q35-7.2")
    assert [(each.target, each.device) for each in found.disks] == [("vda", "disk"), ("sda", "cdrom")]
    assert [(each.role, each.type) for each in found.characters] == [("serial", "pty"), ("channel", "unix")]
    assert (found.agent, found.balloon, found.rng, found.video) == (True, True, "/dev/urandom", "virtio-vga")


def test_a_running_guests_document() -> None:
    """What `virsh dumpxml` adds while it runs is no part of the definition, and libvirt's sockets are not ours."""
    path = "/var/lib/libvirt/qemu/channel/target/domain-3-debian12/org.qemu.guest_agent.0"
    live = VIRT_MANAGER.replace("<domain type='kvm'>", "<domain type='kvm' id='3'>")
    live = live.replace("<source file='/var/lib/libvirt/images/debian12.qcow2'/>", "<source file='/a' index='2'/>")
    live = live.replace(
        "<target dev='vda' bus='virtio'/>", "<backingStore/><target dev='vda' bus='virtio'/><alias name='d'/>"
    )
    live = live.replace(
        "<target type='virtio' name='org.qemu.guest_agent.0'/>",
        f"<source mode='bind' path='{path}'/><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>",
    )
    found = parse_definition(live)
    assert found.ignored == VIRT_MANAGER_IGNORED
    assert [each.path for each in found.characters] == [None, None]


@pytest.mark.parametrize(
    ("xml", "ignored"),
    [
        (guest("<tpm model='tpm-crb'><backend type='emulator'/></tpm>"), ("devices/tpm",)),
        (
            guest("<hostdev mode='subsystem' type='pci'/><hostdev mode='subsystem' type='usb'/>"),
            ("devices/hostdev[1]", "devices/hostdev[2]"),
        ),
        (guest(disk(more="<geometry cyls='1'/><shareable/>")), ("devices/disk/geometry", "devices/disk/shareable")),
        (
            guest(disk(driver="queues='4'", attributes="rawio='yes'")),
            ("devices/disk/@rawio", "devices/disk/driver/@queues"),
        ),
        (guest("<interface type='user'><mtu size='9000'/></interface>"), ("devices/interface/mtu",)),
        (
            guest(
                "<controller type='usb' index='0' model='ich9-ehci1'/><controller type='usb' index='0' model='ich9-uhci1'/>"
            ),
            ("devices/controller[1]", "devices/controller[2]"),
        ),
        (guest("<serial type='tcp'><source host='h' service='1'/></serial>"), ("devices/serial",)),
        (guest("<serial type='pty'><target type='usb-serial'/></serial>"), ("devices/serial",)),
        (guest("<graphics type='vnc'><listen type='none'/></graphics>"), ("devices/graphics",)),
        (guest("<video><model type='vga'/></video><video><model type='vga'/></video>"), ("devices/video[2]",)),
        (guest("<video><model type='none'/></video>"), ()),
        (guest("<rng model='virtio'><backend model='builtin'/></rng>"), ("devices/rng",)),
        (guest(more="<currentMemory unit='MiB'>32</currentMemory>"), ("currentMemory",)),
        (guest(more="<currentMemory unit='KiB'>65536</currentMemory>"), ()),
        (guest(os="<smbios mode='host'/>"), ("os/smbios",)),
        # As libvirt shows a guest whose firmware it has chosen.
        (
            guest(
                os="<firmware><feature enabled='no' name='secure-boot'/></firmware>"
                "<loader readonly='yes' type='pflash' format='raw'>/a</loader>"
                "<nvram template='/b' templateFormat='raw' format='raw'>/c</nvram>"
            ).replace("<os>", "<os firmware='efi'>"),
            (),
        ),
        (guest().replace("<name>", "<name a='b'>"), ("name/@a",)),
        (guest().replace("type='qemu'>", "type='qemu' new='1'>", 1), ("@new",)),
        (guest(more="<metadata><x xmlns='urn:x' y='z'/></metadata><description>d</description>"), ()),
    ],
)
def test_what_is_not_understood_is_listed(xml: str, ignored: tuple[str, ...]) -> None:
    assert parse_definition(xml).ignored == ignored


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("xml", "element", "word"),
    [
        ("<domain type='xen'><name>g</name></domain>", "domain", "qemu, kvm"),
        (guest().replace(" type='qemu'", ""), "domain", "no type"),
        (guest(os="<type>hvm</type>"), "domain/os/type[2]", "only one"),
        (guest().replace("hvm", "xen"), "domain/os/type", "full machine"),
        (guest(machine="q35,accel=xen"), "domain/os/type", "no name of a model"),
        (guest().replace("64", "0x"), "domain/memory", "no whole number"),
        (guest().replace("64", "6_4"), "domain/memory", "no whole number"),
        (guest().replace("64", "٦٤"), "domain/memory", "no whole number"),
        (guest().replace("64", "-64"), "domain/memory", "no whole number"),
        (guest().replace("64", "9" * 19), "domain/memory", "too large"),
        (guest().replace("64", "9" * 18), "domain/memory", "more than a guest"),
        (guest().replace(" unit='MiB'>64", ">64"), "domain/memory", "is it the unit"),
        (guest().replace("MiB", "Mib/s"), "domain/memory", "unit="),
        (guest(more="<currentMemory>65537</currentMemory>"), "domain/currentMemory", "more than"),
        (guest(more="<vcpu>0</vcpu>"), "domain/vcpu", "less than 1"),
        (guest(more="<vcpu>3</vcpu><cpu><topology sockets='1' cores='2' threads='1'/></cpu>"), "domain/cpu", "1 x 2 x 1"),
        (guest(more="<cpu><topology sockets='1' dies='2' cores='1' threads='1'/></cpu>"), "domain/cpu/topology", "dies"),
        (guest(more="<cpu><model>a,b</model></cpu>"), "domain/cpu", "no name of a model"),
        (guest(more="<cpu><model>a</model><feature name='x=on,y'/></cpu>"), "domain/cpu/feature", "no name"),
        (guest(more="<uuid>1234</uuid>"), "domain/uuid", "no UUID"),
        (guest(more="<iothreads>9999999</iothreads>"), "domain/iothreads", "at most 1024"),
        (guest(disk(driver="iothread='1'")), "domain", "disk vda wants iothread 1"),
        (guest("<controller type='scsi' index='0' model='virtio-scsi'><driver iothread='2'/></controller>",
               more="<iothreads>1</iothreads>"), "domain", "scsi controller 0 wants iothread 2"),
        (guest(os="<cmdline>a</cmdline>"), "domain/os", "<kernel>"),
        (guest(os="<initrd>/a</initrd>"), "domain/os", "<kernel>"),
        (guest(os="<kernel>vmlinuz</kernel>"), "domain/os/kernel", "absolute"),
        (guest(disk(more="<transient/>")), "domain/devices/disk/transient", "other contents"),
        (guest(disk(more="<encryption format='luks'/>")), "domain/devices/disk/encryption", "other contents"),
        (guest(disk().replace("<source file='/a'/>", "<source file='/a'><slices/></source>")),
         "domain/devices/disk/source/slices", "other contents"),
        (guest(disk().replace("<source file='/a'/>", "<source file='/a'><encryption/></source>")),
         "domain/devices/disk/source/encryption", "other contents"),
        (guest(disk(more="<blockio logical_block_size='513'/>")), "domain/devices/disk/blockio", "no power of two"),
        (guest(disk(more="<blockio logical_block_size='4096'/>")), "domain/devices/disk/blockio", "physical_block_size"),
        (guest(os="<nvram>/a</nvram>"), "domain/os", "pflash"),
        (guest().replace("<os>", "<os firmware='efi'>"), "domain/os", "<loader readonly='yes' type='pflash'>"),
        (guest(os="<loader type='pflash' format='qcow2'>/a</loader>"), "domain/os/loader", "write raw"),
        (guest(os="<loader type='pflash'>/a</loader><nvram template='b'>/c</nvram>"), "domain/os/nvram", "absolute"),
        (guest(os="<loader type='pflash'>/a</loader><nvram template='/b'/>"), "domain/os", "the guest's own variables"),
        (guest(os="<loader>/b</loader><nvram>/a</nvram>"), "domain/os", "pflash"),
        (guest(os="<boot dev='fd'/>"), "domain/os/boot", "hd, cdrom, network"),
        (guest(disk(more="<boot order='1'/>"), os="<boot dev='hd'/>"), "domain/os", "not by both"),
        (guest(disk(more="<boot order='1'/>") + disk("vdb", "<boot order='1'/>")), "domain", "boot order 1"),
        (guest(more="<clock offset='variable'/>"), "domain/clock", "utc, localtime"),
        # disks: none is ever left out
        (guest("<disk/>"), "domain/devices/disk", "<target dev>"),
        (guest(disk() + disk()), "domain/devices/disk[2]", "two disks vda"),
        (guest(disk(source="")), "domain/devices/disk", "needs a <source>"),
        (guest(disk(attributes="type='volume'")), "domain/devices/disk", "file, block, network"),
        (guest(disk(attributes="device='lun'")), "domain/devices/disk", "disk, cdrom"),
        (guest(disk(attributes="device='floppy'")), "domain/devices/disk", "disk, cdrom"),
        (guest(disk("fda")), "domain/devices/disk/target", "no name of a disk"),
        (guest(disk("dev='vda' bus='xen'")), "domain/devices/disk/target", "virtio, scsi"),
        (guest(disk("dev='nvme0n1' bus='scsi'")), "domain/devices/disk/target", "bus nvme"),
        (guest(disk("vda", attributes="device='cdrom'")), "domain/devices/disk/target", "ide, sata, scsi"),
        (guest(disk(source="relative")), "domain/devices/disk/source", "absolute"),
        (guest(disk(source="/a/../b")), "domain/devices/disk/source", "'..'"),
        (guest(disk(source="/a&#10;b")), "domain/devices/disk/source", "control character"),
        (guest(disk(driver="name='phy'")), "domain/devices/disk/driver", "qemu"),
        (guest(disk(driver="type='vmdk'")), "domain/devices/disk/driver", "qcow2, raw"),
        (guest(disk(driver="cache='maybe'")), "domain/devices/disk/driver", "writeback"),
        (guest(disk(driver="io='native'")), "domain/devices/disk/driver", "cache='none'"),
        (guest(disk("sda", driver="iothread='1'"), more="<iothreads>1</iothreads>"), "domain/devices/disk", "virtio only"),
        (guest(disk("dev='sda' bus='sata'", "<readonly/>")), "domain/devices/disk", "can't be read-only"),
        (guest(disk(more="<serial>a,b</serial>")), "domain/devices/disk", "serial number"),
        (guest(disk(more="<iotune><total_bytes_sec>1</total_bytes_sec><read_bytes_sec>1</read_bytes_sec></iotune>")),
         "domain/devices/disk/iotune", "not for one disk"),
        (guest(disk(more="<iotune><total_iops_sec_max>9</total_iops_sec_max></iotune>")),
         "domain/devices/disk/iotune", "needs total_iops_sec"),
        (guest(disk(more="<iotune><write_iops_sec_max_length>9</write_iops_sec_max_length></iotune>")),
         "domain/devices/disk/iotune", "needs write_iops_sec_max"),
        (guest(disk(more="<address type='pci' domain='1' bus='0' slot='3'/>")), "domain/devices/disk/address", "domain"),
        (guest(disk(more="<address type='pci' slot='32'/>")), "domain/devices/disk/address", "at most 31"),
        (guest("<disk type='network'><source protocol='rbd' name='a'/><target dev='vda'/></disk>"),
         "domain/devices/disk/source", "nbd"),
        (guest("<disk type='network'><source protocol='nbd'><host name='fe80:zz'/></source><target dev='vda'/></disk>"),
         "domain/devices/disk/source/host", "IPv6"),
        (guest("<disk type='network'><source protocol='nbd'><host name='h' port='65536'/></source><target dev='vda'/></disk>"),
         "domain/devices/disk/source/host", "port"),
        (guest("<disk type='network'><source protocol='nbd' name='" + "a" * 4097 + "'><host name='h'/></source><target dev='vda'/></disk>"),
         "domain/devices/disk/source", "4096"),
        # the rest
        (guest("<controller type='scsi' index='0' model='lsilogic'/>"), "domain/devices/controller", "virtio-scsi"),
        (guest("<controller type='pci' index='1' model='pcie-expander-bus'/>"), "domain/devices/controller", "pcie-root-port"),
        (guest("<controller type='sata' index='1'/><controller type='sata' index='1'/>"), "domain/devices/controller[2]", "two"),
        (guest("<interface type='user'><mac address='zz'/></interface>"), "domain/devices/interface/mac", "no MAC"),
        (guest("<interface type='user'><model type='vmxnet3'/></interface>"), "domain/devices/interface/model", "virtio"),
        (guest("<interface type='ethernet'/>"), "domain/devices/interface", "<target dev>"),
        (guest("<interface type='bridge'><source bridge='a/b'/></interface>"), "domain/devices/interface", "bridge"),
        (guest("<serial type='file'/>"), "domain/devices/serial", "<source path>"),
        (guest("<channel type='unix'><target type='virtio'/></channel>"), "domain/devices/channel", "name"),
        (guest("<channel type='unix'><source mode='connect'/><target type='virtio' name='a'/></channel>"),
         "domain/devices/channel", "connect to"),
        (guest("<graphics type='vnc' port='80'/>"), "domain/devices/graphics", "5900"),
        (guest("<graphics type='vnc' port='70000'/>"), "domain/devices/graphics", "65535"),
        (guest("<graphics type='vnc' passwd='s'/>"), "domain/devices/graphics", "password"),
        (guest("<graphics type='vnc' listen='a b'/>"), "domain/devices/graphics", "no address"),
        (guest("<graphics type='vnc'><listen type='socket'/></graphics>"), "domain/devices/graphics", "socket"),
        (guest("<rng model='virtio'><backend model='random'>rel</backend></rng>"), "domain/devices/rng/backend", "absolute"),
        (guest("<emulator>qemu</emulator>"), "domain/devices/emulator", "absolute"),
        (EVERYTHING.replace("name='A_B'", "name='A=B'"), "domain/qemu:commandline", "environment variable"),
        (EVERYTHING.replace("arg value='edu'", "arg"), "domain/qemu:commandline/qemu:arg[2]", "no value"),
        # no document
        ("<domain type='qemu'>", "document", ""),
        ("<!DOCTYPE domain [<!ENTITY a SYSTEM 'file:///etc/passwd'>]>" + guest(), "document", "DOCTYPE"),
        ("<domainsnapshot/>", "domainsnapshot", "must be a <domain>"),
    ],
)  # fmt: skip
def test_what_is_refused_says_which_element_and_why(xml: str, element: str, word: str) -> None:
    error = refusal(xml)
    assert error.element == element
    assert word in error.reason


@pytest.mark.parametrize("name", ["", "-a", "a/b", "a,b", "a b", ".", "a" * 61])
def test_names_that_can_not_be(name: str) -> None:
    with pytest.raises(InvalidName):
        parse_definition(guest().replace("<name>g<", f"<name>{name}<"))


# --- whatever is written --------------------------------------------------------------------------------------

HOSTILE = (
    *("", " ", "-", "--", "-device", "0", "1", "-1", "0x", "999999999999999999999", "9" * 5000, "NaN", "1e9", "²"),
    *(
        "/",
        "/a",
        "/a,b=c",
        "//",
        "/../x",
        "/a\nb",
        "~",
        "nbd:x",
        "json:{}",
        "[::1",
        "fe80:zz",
        "a]",
        "%00",
        "https://x",
    ),
    *("yes", "on", "virtio", "scsi", "sata", "ide", "nvme", "usb", "cdrom", "disk", "file", "block", "network", "unix"),
    *("pci", "drive", "pflash", "rom", "host-passthrough", "vda", "sda", "nvme0n1", "hdzzz", "\U0001f4be", "&", "<"),
)


@st.composite
def mangled(draw: st.DrawFn) -> str:
    """One of the documents with some of its elements and attributes removed, doubled, moved or changed."""
    root = etree.fromstring(draw(st.sampled_from((EVERYTHING, VIRT_MANAGER))))
    for _ in range(draw(st.integers(1, 6))):
        elements = list(root.iter(etree.Element))
        element = elements[draw(st.integers(0, len(elements) - 1))]
        parent = element.getparent()
        match draw(st.sampled_from(("text", "attribute", "remove", "double", "move", "drop"))):
            case "text":
                element.text = draw(st.sampled_from(HOSTILE))
            case "attribute" if element.attrib:
                element.set(draw(st.sampled_from(sorted(element.attrib))), draw(st.sampled_from(HOSTILE)))
            case "drop" if element.attrib:
                del element.attrib[draw(st.sampled_from(sorted(element.attrib)))]
            case "remove" if parent is not None:
                parent.remove(element)
            case "double" if parent is not None:
                parent.append(etree.fromstring(etree.tostring(element)))
            case "move" if parent is not None:
                where = elements[draw(st.integers(0, len(elements) - 1))]
                if element not in (where, *where.iterancestors()):
                    where.append(element)
    return etree.tostring(root, encoding="unicode")


@given(mangled())
def test_a_mangled_document_is_understood_or_refused(xml: str) -> None:
    """Nothing else comes out; and what is understood can be written down."""
    try:
        found = parse_definition(xml)
    except (InvalidXml, InvalidName):
        return
    assert msgspec.json.decode(msgspec.json.encode(found)) is not None


@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    refusal(text)


@given(st.text(alphabet=st.characters(exclude_categories=("Cs", "Cc")), max_size=40))
def test_whatever_a_serial_number_is_it_is_one_or_refused(text: str) -> None:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    try:
        serial = parse_definition(guest(disk(more=f"<serial>{escaped}</serial>"))).disks[0].serial
    except InvalidXml:
        return
    assert serial is None or re.fullmatch(r"[A-Za-z0-9 _.+-]+", serial)
