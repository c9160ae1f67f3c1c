"""Guests that the service starts: their beginning, their end however it comes, and what they find in between."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from defined import DISK, MIB, SIZE, XML, Defined, open_defined
from definitions import VIRT_MANAGER, VIRT_MANAGER_IGNORED
from lxml import etree

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.snapshot import DiskWish, SnapshotWish
from blockferry.qemu.process import born, ends
from blockferry.qemu.session import LostReply
from blockferry.testing import NbdServer, QemuBinaries, make_image, write_pattern
from blockferry.testing.firmware import idle_firmware

COMMANDLINE = (
    "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
    "<qemu:arg value='-device'/><qemu:arg value='{}'/></qemu:commandline></domain>"
)


@pytest.fixture
async def guest(qemu: QemuBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Defined]:
    """Defined, and shut off."""
    monkeypatch.setenv("BLOCKFERRY_QEMU_DIR", str(qemu.system.parent))
    async with open_defined(qemu, tmp_path) as guest:
        yield guest


def xml_of(guest: Defined, more: str = "", *, disks: tuple[str, ...] = ("vda", "vdb"), machine: str = "pc") -> str:
    formats = {"vda": "qcow2", "vdb": "raw"}
    found = [DISK.format(target=each, format=formats[each], file=guest.path / each) for each in disks]
    return XML.format(disks="".join(found) + more).replace("machine='pc'", f"machine='{machine}'")


def command_of(pid: int | None) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")


def sources(xml: str | None) -> dict[str, list[str]]:
    """Each disk's images as the XML has them, the names of their files, top first."""
    assert xml is not None
    found = {}
    for disk in etree.fromstring(xml).iterfind("devices/disk"):
        files = [disk, *disk.iter("backingStore")]
        named = [source for each in files if (source := each.find("source")) is not None]
        found[disk.find("target").get("dev")] = [
            Path(str(each.get("file") or each.get("dev") or each.get("name"))).name for each in named
        ]
    return found


def uuid_of(shown: view.DomainView) -> str:
    found = etree.fromstring(str(shown.xml)).findtext("uuid")
    assert found is not None
    return found


async def inactive(guest: Defined) -> str | None:
    return (await guest.ask(ask.ShowDomain(domain="g1", inactive=True))).xml


async def events(guest: Defined, kind: str) -> list[view.Event]:
    return [each for each in (await guest.ask(ask.ListEvents())).events if each.type == kind]


def taken(guest: Defined) -> bool:
    return bool(guest.service._desk.keepers["g1"].home.taken())


# --- from define to undefine ----------------------------------------------------------------------------------


async def test_a_life(guest: Defined) -> None:
    shown = await guest.show()
    assert (shown.state, shown.pid) == ("shut off", None)
    started = await guest.start()
    assert started.state == "running"
    assert (started.pid, uuid_of(started)) == ((await guest.show()).pid, uuid_of(shown))
    assert born(started.pid) is not None
    assert guest.service.has_work(), "the host process stays for it"
    with pytest.raises(errors.AlreadyRunning):
        await guest.start()
    with pytest.raises(errors.AlreadyRunning):
        await guest.ask(ask.Undefine(domain="g1"))
    with pytest.raises(errors.AlreadyRunning):
        await guest.ask(ask.Define(xml=xml_of(guest)))
    assert (await guest.show()).pid == started.pid
    await guest.stop()
    assert born(started.pid) is None
    assert not guest.service.has_work()
    assert [each.type for each in (await guest.ask(ask.ListEvents())).events if each.type.startswith("domain-")] == [
        *("domain-defined", "domain-resumed", "domain-started", "domain-paused", "domain-shutdown", "domain-stopped"),
    ]
    await guest.ask(ask.Undefine(domain="g1"))
    with pytest.raises(errors.NoSuchDomain):
        await guest.show()
    await guest.ask(ask.Define(xml=xml_of(guest)))
    assert uuid_of(await guest.start()) != uuid_of(shown)


async def test_its_process(guest: Defined) -> None:
    """A session of its own, in a sandbox, with its sockets and its log to itself, every image with its format."""
    await guest.ask(
        ask.Define(
            xml=xml_of(guest, "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>")
        )
    )
    pid = (await guest.start()).pid
    assert pid is not None
    assert os.getsid(pid) == pid
    words = command_of(pid)
    assert words[words.index("-sandbox") + 1].startswith("on,")
    assert "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
    nodes = [json.loads(words[at + 1]) for at, word in enumerate(words) if word == "-blockdev"]
    assert [(each["driver"], each["file"]["driver"]) for each in nodes] == [("qcow2", "file"), ("raw", "file")]
    assert nodes[0]["backing"] is None
    folder = guest.path / "state/run/domains/g1"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    made = {path.name: stat.S_IMODE(path.stat().st_mode) & 0o077 for path in folder.iterdir()}
    assert made == {"lock": 0, "qmp.sock": 0, "agent.sock": 0}
    log = guest.path / "state/log/domains/g1.log"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert "-sandbox" in log.read_text()


async def test_what_is_not_carried_out_is_named_and_kept(guest: Defined) -> None:
    shown = await guest.ask(ask.Define(xml=xml_of(guest, "<sound model='ich9'/>")))
    assert shown.notes == ("<devices/sound> is kept, and not carried out",)
    assert "<sound model" in str((await guest.start()).xml)
    assert "<sound model" in str(await inactive(guest))


@pytest.mark.parametrize(
    ("more", "element"),
    [
        ("<nonsense/>", "domain/devices/nonsense"),
        (DISK.format(target="vda", format="raw", file="/a"), "domain/devices/disk[3]"),
        (DISK.format(target="vdc", format="vmdk", file="/a"), "domain/devices/disk[3]/driver"),
        ("<interface type='user'><address type='pci' bus='4' slot='1'/></interface>", "domain/devices"),
    ],
)
async def test_a_definition_that_is_refused_changes_nothing(guest: Defined, more: str, element: str) -> None:
    before = await inactive(guest)
    with pytest.raises(errors.InvalidXml) as caught:
        await guest.ask(ask.Define(xml=xml_of(guest, more)))
    assert caught.value.element == element
    assert await inactive(guest) == before


async def test_another_definition(guest: Defined) -> None:
    await guest.start()
    await guest.stop()
    await guest.ask(ask.Define(xml=xml_of(guest, disks=("vdb",))))
    assert [each.target for each in (await guest.start()).disks] == ["vdb"]


async def test_a_definition_of_before_a_snapshot_is_not_taken(guest: Defined) -> None:
    """Started on it the guest would write under its overlays. Undefined, it says what the document does not."""
    await guest.start()
    await guest.snapshot("s1")
    await guest.stop()
    present = await inactive(guest)
    (guest.path / "link").symlink_to(guest.path / "vdb")
    with pytest.raises(errors.ImageUnsuitable, match=r"vda.s1, which g1 is on by now.*show g1 --xml --inactive"):
        await guest.ask(ask.Define(xml=xml_of(guest)))
    with pytest.raises(errors.ImageUnsuitable, match=r"vdb\.s1"):
        await guest.ask(ask.Define(xml=present.replace("vdb.s1", "link").replace('type="qcow2"', 'type="raw"', 2)))
    assert await inactive(guest) == present
    assert (await guest.ask(ask.Define(xml=present))).notes == ()
    make_image(guest.qemu, guest.path / "other", "qcow2", SIZE)
    other = await guest.ask(ask.Define(xml=present.replace("vda.s1", "other")))
    assert other.notes == (f"vda was on {guest.path}/vda.s1, and is on {guest.path}/other from now on",)
    await guest.start()
    await guest.snapshot("s2", only=("vda",))
    await guest.stop()
    done = await guest.ask(ask.Undefine(domain="g1"))
    assert done.text == f"g1 is no longer defined; its images are as they were: vda on {guest.path}/vda.s2"
    await guest.ask(ask.Define(xml=present))


async def test_suspend_and_resume(guest: Defined) -> None:
    for request in (ask.Suspend(domain="g1"), ask.Resume(domain="g1"), ask.Stop(domain="g1")):
        with pytest.raises(errors.NotRunning):
            await guest.ask(request)
    assert (await guest.start(paused=True)).state == "prelaunch"
    with pytest.raises(errors.CannotShutDown):
        await guest.ask(ask.Stop(domain="g1"))
    await guest.ask(ask.Resume(domain="g1"))
    assert (await guest.show()).state == "running"
    await guest.ask(ask.Suspend(domain="g1"))
    assert (await guest.show()).state == "paused"
    with pytest.raises(errors.CannotShutDown):
        await guest.ask(ask.Stop(domain="g1"))
    await guest.ask(ask.Resume(domain="g1"))
    assert (await guest.show()).state == "running"


async def test_a_guest_that_does_not_obey(guest: Defined) -> None:
    """Firmware alone does not hear the button."""
    await guest.start()
    with pytest.raises(errors.StillRunning, match="--force"):
        await guest.ask(ask.Stop(domain="g1", timeout=0.1))
    assert (await guest.show()).state == "running"
    assert (await guest.ask(ask.Stop(domain="g1", force=True))).text == "g1 is shut off, by force"
    assert (await guest.show()).state == "shut off"


# --- a QEMU that does not come up -----------------------------------------------------------------------------


async def test_a_qemu_that_dies_at_once_says_why(guest: Defined) -> None:
    await guest.ask(ask.Define(xml=xml_of(guest).replace("</domain>", COMMANDLINE.format("no-such-device"))))
    for _ in range(2):
        with pytest.raises(errors.OperationFailed) as caught:
            await guest.start()
        assert "'no-such-device' is not a valid device model name" in caught.value.message
        assert "-sandbox" not in caught.value.message, "its last words, not ours"
        assert not taken(guest)
        assert (await guest.show()).state == "shut off"
    assert await events(guest, "domain-crashed") == []
    assert not (guest.path / "state/run/domains/g1/qmp.sock").exists() or not taken(guest)
    await guest.ask(ask.Define(xml=xml_of(guest)))
    assert (await guest.start()).state == "running"


async def test_firmware_with_variables_of_its_own(guest: Defined) -> None:
    """Made from their template once, and then the guest's."""
    template, own = guest.path / "vars.tmpl", guest.path / "vars"
    template.write_bytes(b"template".ljust(128 * 1024, b"\xff"))
    flash = (
        f"<loader readonly='yes' type='pflash'>{idle_firmware(guest.path)}</loader>"
        f"<nvram template='{template}'>{own}</nvram></os>"
    )
    await guest.ask(ask.Define(xml=xml_of(guest).replace("</os>", flash)))
    await guest.start()
    assert own.read_bytes() == template.read_bytes()
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    await guest.stop()
    own.write_bytes(b"changed".ljust(128 * 1024, b"\xff"))
    template.unlink()
    await guest.start()
    assert own.read_bytes().startswith(b"changed")
    await guest.stop()
    own.unlink()
    with pytest.raises(errors.OperationFailed, match=r"vars can't be made from .*vars.tmpl: No such file"):
        await guest.start()
    missing = [each for each in (await guest.ask(ask.Doctor(domain="g1"))).findings if each.severity == "problem"]
    assert [each.text for each in missing] == [f"its nvram's template {template} is not there"]
    assert not own.exists()


async def test_an_image_that_is_not_there(guest: Defined) -> None:
    (guest.path / "vdb").rename(guest.path / "elsewhere")
    with pytest.raises(errors.ImageUnsuitable) as caught:
        await guest.start()
    assert caught.value.path == str(guest.path / "vdb")
    assert not taken(guest)
    (guest.path / "elsewhere").rename(guest.path / "vdb")
    assert (await guest.start()).state == "running"


async def test_an_image_that_somebody_writes(guest: Defined) -> None:
    async with NbdServer(guest.qemu, guest.path / "vdb", "raw", guest.path, name="t"):
        with pytest.raises(errors.OperationFailed, match="lock"):
            await guest.start()
        assert not taken(guest)
    assert (await guest.start()).state == "running"


async def test_a_program_that_is_not_there(guest: Defined) -> None:
    await guest.ask(ask.Define(xml=xml_of(guest, "<emulator>/no/such/qemu</emulator>")))
    with pytest.raises(errors.BadRequest, match="/no/such/qemu"):
        await guest.start()


# --- an end that nobody asked for -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_crash_is_noticed_at_once(guest: Defined, number: signal.Signals) -> None:
    pid = (await guest.start()).pid
    assert pid is not None
    os.kill(pid, number)
    async for event in guest.service.watch("g1", 0):
        if event.type == "domain-crashed":
            break
    assert number.name in event.data["reason"]
    shown = await guest.show()
    assert shown.state == "shut off"
    assert shown.reason is not None
    assert number.name in shown.reason
    assert not guest.service.has_work()
    started = await guest.start()
    assert (started.state, started.reason) == ("running", None)
    await guest.stop()
    assert (await guest.show()).reason is None, "somebody ended it"


async def test_a_qemu_that_somebody_ends(guest: Defined) -> None:
    await guest.start()
    async with guest.monitor() as session:
        with contextlib.suppress(LostReply):  # it goes while it answers, or after
            await session.execute("quit")
    async for event in guest.service.watch("g1", 0):
        if event.type == "domain-crashed":
            break
    assert "exit status 0" in event.data["reason"]
    assert (await guest.show()).state == "shut off"


async def test_it_outlives_us(guest: Defined) -> None:
    pid = (await guest.start()).pid
    await guest.write("vda", 0x77, 3 * MIB)
    await guest.reopen()
    shown = await guest.show()
    assert (shown.state, shown.pid) == ("running", pid)
    assert await events(guest, "domain-crashed") == []
    await guest.write("vda", 0x78, 4 * MIB)
    await guest.stop()
    assert guest.holds("vda", guest.path / "vda", "qcow2")


async def test_an_end_while_nobody_looked_is_said_once(guest: Defined) -> None:
    pid = (await guest.start()).pid
    assert pid is not None
    await guest.service.close()
    os.kill(pid, signal.SIGKILL)
    assert await ends(pid, None, 10)
    for _ in range(2):
        await guest.reopen_closed()
        assert len(await events(guest, "domain-crashed")) == 1
        assert (await guest.show()).state == "shut off"
        await guest.service.close()
    await guest.reopen_closed()
    assert (await guest.start()).state == "running"


@pytest.mark.parametrize("wrong", [{"pid": None, "born": None}, {"pid": 1, "born": 1}])
async def test_the_lock_says_whether_it_runs_whatever_the_journal_says(guest: Defined, wrong: dict[str, Any]) -> None:
    pid = (await guest.start()).pid
    journal = guest.service._desk.journal
    journal.put_domain(msgspec.structs.replace(journal.domain("g1"), **wrong))
    await guest.reopen()
    with pytest.raises(errors.AlreadyRunning):
        await guest.start()
    shown = await guest.show()
    assert (shown.state, shown.pid) == ("running", pid)


# --- the images that it is on ---------------------------------------------------------------------------------


async def stop_and_start(guest: Defined, now: dict[str, list[str]]) -> None:
    """Both documents name these images; and after an end and a new start the guest finds what it wrote."""
    assert sources((await guest.show()).xml) == now
    assert sources(await inactive(guest)) == {target: files[:1] for target, files in now.items()}
    await guest.stop()
    for target in now:
        shown = await guest.disk(target)
        assert guest.holds(target, Path(str(shown.source)), str(shown.chain[0].format))
    assert sources(await inactive(guest)) == {target: files[:1] for target, files in now.items()}
    await guest.start()
    assert sources((await guest.show()).xml) == now
    for target in now:
        await guest.write(target, 0x66, 6 * MIB)
    await guest.stop()
    for target in now:
        shown = await guest.disk(target)
        assert guest.holds(target, Path(str(shown.source)), str(shown.chain[0].format))


@pytest.fixture
async def layered(guest: Defined) -> Defined:
    """Running, with snapshot s1 and something in each layer."""
    await guest.start()
    await guest.snapshot("s1")
    for target in ("vda", "vdb"):
        await guest.write(target, 0x41, 2 * MIB)
    return guest


async def test_after_a_snapshot(layered: Defined) -> None:
    await stop_and_start(layered, {"vda": ["vda.s1", "vda"], "vdb": ["vdb.s1", "vdb"]})


async def test_after_a_pivot(layered: Defined) -> None:
    dest = layered.dest("vdb", "copy")
    await layered.ask(ask.StartCopy(domain="g1", disk="vdb", dest=str(dest), format="qcow2"))
    await layered.ready("vdb")
    assert sources(await inactive(layered))["vdb"] == ["vdb.s1"], "only once the switch is certain"
    await layered.ask(ask.PivotJobs(domain="g1", disks=("vdb",)))
    await stop_and_start(layered, {"vda": ["vda.s1", "vda"], "vdb": ["vdb.copy"]})


async def test_after_a_commit(layered: Defined) -> None:
    await layered.ask(ask.Commit(domain="g1", disk="vdb"))
    async for _event in layered.service.watch("g1", 0):
        if await layered.chain("vdb") == ["vdb"]:
            break
    await layered.ask(ask.Recover())
    await stop_and_start(layered, {"vda": ["vda.s1", "vda"], "vdb": ["vdb"]})


async def test_after_a_delete(layered: Defined) -> None:
    await layered.ask(ask.DeleteSnapshot(domain="g1", snapshot="s1"))
    await stop_and_start(layered, {"vda": await layered.chain("vda"), "vdb": await layered.chain("vdb")})
    assert await layered.chain("vda") in (["vda"], ["vda.s1"])


async def test_after_a_crash_with_snapshots(layered: Defined) -> None:
    await layered.kill()
    assert sources(await inactive(layered)) == {"vda": ["vda.s1"], "vdb": ["vdb.s1"]}
    await layered.start()
    assert sources((await layered.show()).xml) == {"vda": ["vda.s1", "vda"], "vdb": ["vdb.s1", "vdb"]}


async def test_a_snapshot_of_a_block_device(guest: Defined, device: Path) -> None:
    """Its base is opened as a device also when it is no longer the active image."""
    disk = f"<disk type='block'><driver name='qemu' type='raw'/><source dev='{device}'/><target dev='vdc'/></disk>"
    await guest.ask(ask.Define(xml=xml_of(guest, disk, disks=())))
    guest.written = {"vdc": bytearray(device.read_bytes())}
    await guest.start()
    await guest.snapshot("s1", only=("vdc",))
    await guest.write("vdc", 0x12, MIB)
    await stop_and_start(guest, {"vdc": ["vdc.s1", device.name]})


async def test_a_disk_on_an_export(guest: Defined) -> None:
    image = make_image(guest.qemu, guest.path / "exported", "raw", 8 * MIB)
    write_pattern(guest.qemu, image, "raw", 0, MIB, 0x33)
    async with NbdServer(guest.qemu, image, "raw", guest.path, name="e p") as server:
        disk = (
            "<disk type='network'><driver name='qemu' type='raw'/><source protocol='nbd' name='{}'>"
            "<host transport='unix' socket='{}'/></source><target dev='vdc'/></disk>"
        ).format("e p", server.socket)
        defined = await guest.ask(ask.Define(xml=xml_of(guest, disk, disks=())))
        assert defined.disks[0].virtual_size is None, "not known before it is opened"
        guest.written = {"vdc": bytearray(image.read_bytes())}
        await guest.start()
        await guest.write("vdc", 0x12, MIB)
        await guest.stop()
    assert image.read_bytes() == bytes(guest.written["vdc"])
    found = {finding.code: finding for finding in (await guest.ask(ask.Doctor(domain="g1"))).findings}
    assert "startable" not in found
    assert "its server can't be reached" in found["image-unusable"].text
    before = len((await guest.ask(ask.ListOperations(domain="g1"))).operations)
    with pytest.raises(errors.ImageUnsuitable, match="its server can't be reached"):
        await guest.start()
    assert len((await guest.ask(ask.ListOperations(domain="g1"))).operations) == before


# --- everything starts ----------------------------------------------------------------------------------------

DEVICES = """
<disk type='file'><driver name='qemu' type='raw' cache='none' io='native' discard='unmap' detect_zeroes='unmap' iothread='1'/>
  <source file='{d}/a,b=c d'/><target dev='vdd'/><blockio logical_block_size='4096' physical_block_size='4096'/><serial>S-1</serial><boot order='1'/>
  <iotune><total_bytes_sec>1000000</total_bytes_sec><total_bytes_sec_max>2000000</total_bytes_sec_max>
    <total_bytes_sec_max_length>60</total_bytes_sec_max_length><read_iops_sec>100</read_iops_sec></iotune></disk>
<disk type='file'><driver name='qemu' type='raw' io='threads' cache='writethrough'/><source file='{d}/b'/>
  <target dev='sda' bus='scsi'/><readonly/><iotune><write_iops_sec>77</write_iops_sec></iotune></disk>
<disk type='file'><driver name='qemu' type='raw' cache='directsync'/><source file='{d}/c'/><target dev='sdb' bus='sata'/><iotune><write_iops_sec>77</write_iops_sec></iotune></disk>
<disk type='file'><driver name='qemu' type='raw' cache='unsafe'/><source file='{d}/e'/><target dev='sdc' bus='usb'/><iotune><write_iops_sec>77</write_iops_sec></iotune></disk>
<disk type='file'><driver name='qemu' type='raw' io='io_uring'/><source file='{d}/f'/><target dev='nvme0n1' bus='nvme'/><iotune><write_iops_sec>77</write_iops_sec></iotune></disk>
<disk type='file' device='cdrom'><target dev='sdd' bus='sata'/></disk>
<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{d}/g'/><target dev='sde' bus='scsi'/></disk>
<controller type='scsi' index='0' model='virtio-scsi'><driver iothread='2'/></controller>
<interface type='user'><mac address='52:54:00:00:00:01'/><model type='virtio'/><boot order='2'/></interface>
<interface type='user'><model type='e1000'/></interface>
<serial type='file'><source path='{d}/log,a=b'/></serial>
<serial type='unix'><source mode='bind' path='{d}/s,a=b'/></serial>
<serial type='pty'/><serial type='null'/>
<console type='pty'><target type='virtio'/></console>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<channel type='unix'><source mode='bind' path='{d}/c,a=b'/><target type='virtio' name='org.example'/></channel>
<graphics type='vnc' socket='{d}/v,a=b'/>
<video><model type='{video}'/></video>
<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
<memballoon model='virtio'/>
"""
PORTS = """
<controller type='pci' index='0' model='pcie-root'/>
<controller type='pci' index='1' model='pcie-root-port'><target chassis='1' port='0x10'/>
  <address type='pci' bus='0' slot='6' function='0' multifunction='on'/></controller>
<controller type='pci' index='2' model='pcie-root-port'><target chassis='2' port='0x11'/>
  <address type='pci' bus='0' slot='6' function='1'/></controller>
<controller type='pci' index='3' model='pcie-to-pci-bridge'><address type='pci' bus='2' slot='0'/></controller>
<controller type='usb' index='0' model='qemu-xhci' ports='15'><address type='pci' bus='1' slot='0'/></controller>
"""


@pytest.mark.parametrize(("machine", "video"), [("pc", "cirrus"), ("q35", "vga")])
async def test_everything_that_is_carried_out_starts(guest: Defined, machine: str, video: str) -> None:
    folder = guest.path / "all"
    folder.mkdir()
    for name in ("a,b=c d", *"bcefg"):
        make_image(guest.qemu, folder / name, "raw", MIB)
    more = DEVICES.format(d=folder, video=video)
    if machine == "q35":
        more += PORTS
    else:
        more += DISK.format(target="hdb", format="raw", file=make_image(guest.qemu, folder / "ide", "raw", MIB))
    xml = xml_of(guest, more, machine=machine).replace(
        "<os>", "<vcpu>2</vcpu><iothreads>2</iothreads><cpu><model>qemu64</model><topology sockets='1' cores='2' "
        "threads='1'/><feature policy='disable' name='svm'/></cpu><os>"
    )  # fmt: skip
    defined = await guest.ask(ask.Define(xml=xml))
    assert defined.notes == ()
    shown = await guest.start()
    assert shown.state == "running"
    expected = {"vda", "vdb", "vdd", "sda", "sdb", "sdc", "nvme0n1", "sdd", "sde"} | (
        {"hdb"} if machine == "pc" else set()
    )
    assert {each.target for each in shown.disks} == expected, "each is known by the name that it was given"
    assert {each.target: each.bus for each in shown.disks} == {each.target: each.bus for each in defined.disks}
    for name in ("log,a=b", "s,a=b", "c,a=b", "v,a=b"):
        assert (folder / name).exists()
    async with guest.monitor() as session:
        drives = {
            next(word for word in each["qdev"].split("/") if word.startswith("disk-")): each
            for each in await session.execute("query-block")
        }
        assert drives["disk-vdd"]["inserted"]["bps"] == 1000000
        assert drives["disk-vdd"]["inserted"]["iops_rd"] == 100
        blocks = {"path": "/machine/peripheral/disk-vdd", "property": "logical_block_size"}
        assert await session.execute("qom-get", **blocks) == 4096
        limited = ("disk-sda", "disk-sdb", "disk-sdc", "disk-nvme0n1")
        assert [drives[each]["inserted"]["iops_wr"] for each in limited] == [77] * 4
        assert drives["disk-sda"]["inserted"]["ro"]
        assert "inserted" not in drives["disk-sdd"]
    wish = SnapshotWish(name="s1", disks=(DiskWish(name="sda", snapshot="no"),))
    assert "vdd" in {each.target for each in (await guest.ask(ask.CreateSnapshot(domain="g1", wish=wish))).disks}
    await guest.stop()
    assert (await guest.start()).state == "running"


async def test_virt_managers_guest_starts(guest: Defined) -> None:
    """What people have: only the accelerator and the image are this machine's."""
    xml = VIRT_MANAGER.replace("type='kvm'", "type='qemu'", 1).replace("debian12<", "g1<")
    xml = xml.replace("/var/lib/libvirt/images/debian12.qcow2", str(guest.path / "vda"))
    xml = xml.replace("<emulator>/usr/bin/qemu-system-x86_64</emulator>", "").replace("2097152", "131072")
    await guest.ask(ask.Undefine(domain="g1"))
    defined = await guest.ask(ask.Define(xml=xml))
    assert defined.notes == tuple(f"<{path}> is kept, and not carried out" for path in VIRT_MANAGER_IGNORED)
    shown = await guest.start()
    assert {each.target: each.source for each in shown.disks} == {"vda": str(guest.path / "vda"), "sda": None}
    await guest.snapshot("s1", only=("vda",))
    await guest.write("vda", 0x12, MIB)
    await guest.stop()
    assert guest.holds("vda", guest.path / "vda.s1", "qcow2")
