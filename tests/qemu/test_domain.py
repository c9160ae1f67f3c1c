"""Attaching, naming disks, finding them; and what attach refuses."""

import asyncio
import socket
from pathlib import Path

import pytest
from qemu.qmp import QMPClient
from rig import ALL, MIB, Rig, open_rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.snapshot import DiskWish, SnapshotWish
from blockferry.service import Service
from blockferry.testing import (
    Fault,
    FaultKind,
    QemuBinaries,
    QmpFaultProxy,
    TestQemu,
    blockdev_disk,
    blockdev_node,
    legacy_drive,
    make_image,
)


async def test_attached_domain(rig: Rig) -> None:
    shown = await rig.show()
    assert (shown.name, shown.state, shown.pid) == ("vm1", "running", rig.guest.pid)
    version = (await rig.guest.command("query-version"))["qemu"]
    assert shown.qemu == f"{version['major']}.{version['minor']}.{version['micro']}"
    assert {disk.target: (disk.bus, disk.source, disk.format) for disk in shown.disks} == {
        "vda": ("virtio", f"{rig.path}/vda.img", "qcow2"),
        "vdb": ("virtio", f"{rig.path}/vdb.img", "raw"),
        "sda": ("scsi", f"{rig.path}/sda.img", "qcow2"),
    }
    (row,) = (await rig.ask(ask.ListDomains())).domains
    assert (row.name, row.state, row.disks, row.mirrors) == ("vm1", "running", 3, 0)
    await rig.copy("vda")
    (row,) = (await rig.ask(ask.ListDomains())).domains
    assert row.mirrors == 1


async def test_every_bus_has_its_names(qemu: QemuBinaries, tmp_path: Path) -> None:
    """In the order of PCI addresses, not of the command line; sd is shared by scsi, sata and usb."""
    plugs = [
        ("b1", "virtio", "0x9"),
        ("b0", "virtio", "0x5"),
        ("u0", "usb", "0x8"),
        ("s0", "scsi", "0x7"),
        ("a0", "sata", "0x6"),
        ("n1", "nvme", "0xb"),
        ("n0", "nvme", "0xa"),
    ]
    args = [
        part
        for name, bus, addr in plugs
        for part in blockdev_disk(name, make_image(qemu, tmp_path / name, "raw", MIB), "raw", bus=bus, addr=addr)
    ]
    for name, unit in (("i1", "1"), ("i3", "3"), ("i0", "0")):
        args += blockdev_node(name, make_image(qemu, tmp_path / name, "raw", MIB), "raw")
        args += ["-device", f"ide-hd,drive={name},id={name}-dev,bus=ide.{int(unit) // 2},unit={int(unit) % 2}"]
    async with attached(qemu, tmp_path, args) as service:
        shown = await service.submit(ask.ShowDomain(domain="vm1"))
        found = {disk.target: Path(disk.source).name for disk in shown.disks}
        assert found == {
            "vda": "b0",
            "vdb": "b1",
            "sda": "a0",
            "sdb": "s0",
            "sdc": "u0",
            "nvme0n1": "n0",
            "nvme1n1": "n1",
            "hda": "i0",
            "hdb": "i1",
            "hdd": "i3",  # the name says the place, as libvirt's does
        }
        # Each of them takes part in a snapshot.
        made = await service.submit(ask.CreateSnapshot(domain="vm1", wish=SnapshotWish(name="s1")))
        assert len(made.disks) == 10


class attached:  # noqa: N801  # used as a context manager only
    """A service on a paused QEMU with these disks."""

    def __init__(self, qemu: QemuBinaries, path: Path, args: list[str]) -> None:
        self.guest = TestQemu(qemu, path, args=args)
        self.state = path / "state"

    async def __aenter__(self) -> Service:
        await self.guest.start()
        self.state.mkdir(exist_ok=True)
        self.service = await Service.open(self.state)
        await self.service.submit(ask.Attach(domain="vm1", qmp=str(self.guest.qmp)))
        return self.service

    async def __aexit__(self, *_: object) -> None:
        await self.service.close()
        await self.guest.stop()


async def test_names_are_kept_when_disks_come_and_go(rig: Rig) -> None:
    """A disk that is plugged in at a lower address gets the next name; one that comes back its own."""
    image = make_image(rig.qemu, rig.path / "new", "raw", MIB)
    await plug(rig, image, "new", "0x1d")
    assert (await rig.disks())["vdc"].source == str(image)
    other = make_image(rig.qemu, rig.path / "other", "raw", MIB)
    await plug(rig, other, "other", "0x1c")
    disks = await rig.disks()
    assert (disks["vdc"].source, disks["vdd"].source) == (str(image), str(other))
    await unplug(rig, "new")
    assert set(await rig.disks()) == {*ALL, "vdd"}
    await rig.reopen_service()
    await rig.settled()
    third = make_image(rig.qemu, rig.path / "third", "raw", MIB)
    await plug(rig, third, "third", "0x1b")
    assert (await rig.disks())["vde"].source == str(third)  # vdc is remembered
    await plug(rig, image, "new", "0x1a")
    assert (await rig.disks())["vdc"].source == str(image)


async def plug(rig: Rig, image: Path, name: str, addr: str) -> None:
    node = {"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": str(image)}}
    await rig.guest.command("blockdev-add", node)
    device = {"driver": "virtio-blk-pci", "id": f"{name}-dev", "drive": name, "addr": addr}
    await rig.guest.command("device_add", device)


async def unplug(rig: Rig, name: str) -> None:
    """The firmware answers no unplug request; a reset takes the device away."""
    with rig.guest.control.listener("DEVICE_DELETED") as deleted:
        await rig.guest.command("device_del", {"id": f"{name}-dev"})
        await rig.guest.command("system_reset")
        async with asyncio.timeout(10):
            while (await deleted.get())["data"].get("device") != f"{name}-dev":
                pass
    await rig.guest.command("blockdev-del", {"node-name": name})


@pytest.mark.parametrize("name", ["vda", "d0-dev", "DIR/vda.img", "DIR/vda.s1"])
async def test_disk_by_any_of_its_names(rig: Rig, name: str) -> None:
    await rig.snapshot("s1", only=["vda"])
    job = await rig.copy(name.replace("DIR", str(rig.path)), rig.dst / "x")
    assert job.disk == "vda"


@pytest.mark.parametrize(("name", "target"), [("d2-dev", "sda"), ("virtio0", "vdb")])
async def test_disk_by_its_device(rig: Rig, name: str, target: str) -> None:
    assert (await rig.copy(name, rig.dst / "x")).disk == target


@pytest.mark.parametrize("name", ["vdx", "d0", "vda.img", "", "/nowhere", "DIR/vda"])
async def test_no_such_disk(rig: Rig, name: str) -> None:
    with pytest.raises(errors.NoSuchDisk, match="It has: vda, sda, vdb"):
        await rig.copy(name.replace("DIR", str(rig.path)), rig.dst / "x")


async def test_shared_base_is_ambiguous(qemu: QemuBinaries, tmp_path: Path) -> None:
    base = make_image(qemu, tmp_path / "base", "raw", MIB)
    args = blockdev_node("base", base, "raw", read_only=True)
    for name in ("x", "y"):
        top = make_image(qemu, tmp_path / name, "qcow2", backing=base, backing_fmt="raw")
        args += blockdev_disk(name, top, "qcow2", backing="base")
    async with attached(qemu, tmp_path, args) as service:

        def wish(disk: str) -> ask.CreateSnapshot:
            disks = (DiskWish(name=disk, file=str(tmp_path / "over")),)
            return ask.CreateSnapshot(domain="vm1", wish=SnapshotWish(name="s1", only_these=True, disks=disks))

        with pytest.raises(errors.AmbiguousDisk, match="vda, vdb"):
            await service.submit(wish(str(base)))
        made = await service.submit(wish(str(tmp_path / "y")))
        assert [disk.target for disk in made.disks] == ["vdb"]


# --- attach ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def service(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    service = await Service.open(tmp_path / "empty")
    yield service
    await service.close()


async def refused(service: Service, qmp: Path | str, kind: type[errors.BlockferryError], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        await service.submit(ask.Attach(domain="vm2", qmp=str(qmp), timeout=0.3))
    assert caught.value.outcome == "refused"
    assert "vm2" not in [row.name for row in (await service.submit(ask.ListDomains())).domains]


async def test_attach_to_a_busy_socket(service: Service, rig: Rig) -> None:
    """rig's own service holds it: said within the time-out, with how to add another."""
    started = asyncio.get_running_loop().time()
    await refused(service, rig.guest.qmp, errors.QmpBusy, "within 0.3 s.*-qmp unix:")
    assert asyncio.get_running_loop().time() - started < 3


async def test_attach_to_a_socket_with_a_full_backlog(service: Service, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(tmp_path / "full.sock"))
        listener.listen(0)
        waiting.connect(str(tmp_path / "full.sock"))
        await refused(service, tmp_path / "full.sock", errors.QmpBusy, "within 0.3 s")


async def test_attach_when_the_other_client_goes(service: Service, qemu: QemuBinaries, tmp_path: Path) -> None:
    async with TestQemu(qemu, tmp_path) as guest:
        other = QMPClient("other")
        await other.connect(str(guest.qmp))
        attach = asyncio.create_task(service.submit(ask.Attach(domain="vm2", qmp=str(guest.qmp), timeout=20)))
        await guest.command("query-status")
        await other.disconnect()
        assert (await attach).state == "prelaunch"


async def test_attach_twice_and_other_names(rig: Rig) -> None:
    again = await rig.ask(ask.Attach(domain="vm1", qmp=str(rig.guest.qmp)))
    assert {disk.target for disk in again.disks} == set(ALL)
    for domain, qmp in (("vm2", rig.guest.qmp), ("vm1", rig.path / "other.sock")):
        with pytest.raises(errors.DomainExists):
            await rig.ask(ask.Attach(domain=domain, qmp=str(qmp)))
    assert len(await rig.events("domain-attached")) == 1


async def test_qemu_that_lacks_a_command(service: Service, qemu: QemuBinaries, tmp_path: Path) -> None:
    async with TestQemu(qemu, tmp_path) as guest, QmpFaultProxy(guest.qmp, tmp_path / "p.sock") as proxy:
        proxy.inject(Fault("blockdev-reopen", FaultKind.HIDE))
        await refused(service, proxy.path, errors.MissingCapability, "blockdev-reopen")


async def test_detach(rig: Rig) -> None:
    await rig.copy("vda")
    with pytest.raises(errors.DomainInUse, match="vda"):
        await rig.ask(ask.Detach(domain="vm1"))
    await rig.ask(ask.CancelJobs(domain="vm1", disks=("vda",)))
    await rig.ask(ask.Detach(domain="vm1"))
    with pytest.raises(errors.NoSuchDomain):
        await rig.show()
    assert await rig.status() == "running"
    await rig.reattach()
    assert set(await rig.disks()) == set(ALL)


async def test_two_state_directories_on_one_guest(qemu: QemuBinaries, tmp_path: Path) -> None:
    """One after the other has the socket: their node names and jobs never meet."""
    (tmp_path / "second").mkdir()
    async with open_rig(qemu, tmp_path) as rig:
        second = await Service.open(tmp_path / "second")
        try:
            await rig.copy("vda")
            await rig.service.close()
            await second.submit(ask.Attach(domain="same", qmp=str(rig.guest.qmp)))
            copy = ask.StartCopy(domain="same", disk="vdb", dest=str(rig.dst / "b"))
            await second.submit(copy)
            with pytest.raises(errors.DiskBusy):
                await second.submit(ask.StartCopy(domain="same", disk="vda", dest=str(rig.dst / "x")))
            with pytest.raises(errors.NoSuchJob):
                await second.submit(ask.PivotJobs(domain="same", disks=("vda",)))
            await second.submit(ask.Recover())
            assert len(await rig.qemu_jobs()) == 2
        finally:
            await second.close()
        rig.service = await Service.open(tmp_path / "state")
        assert set(await rig.jobs()) == {"vda"}
        await rig.pivot("vda")
        assert len(await rig.qemu_jobs()) == 1


async def test_relative_image_names_are_found(
    qemu: QemuBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU says the name that it was given: what it is relative to is QEMU's folder, not ours."""
    make_image(qemu, tmp_path / "rel.img", "raw", MIB)
    monkeypatch.chdir(tmp_path)
    async with attached(qemu, tmp_path, legacy_drive(Path("rel.img"), "raw")) as service:
        monkeypatch.chdir("/")
        (disk,) = (await service.submit(ask.ShowDomain(domain="vm1"))).disks
        assert disk.source == f"{tmp_path}/rel.img"
        made = await service.submit(ask.CreateSnapshot(domain="vm1", wish=SnapshotWish(name="s1")))
        assert made.disks[0].source == f"{tmp_path}/rel.s1"


async def test_guest_paused_and_resumed_by_somebody_is_said(rig: Rig) -> None:
    await rig.guest.command("stop")
    await rig.heard("domain-paused")
    assert (await rig.show()).state == "paused"
    await rig.copy("vda")
    await rig.pivot("vda")
    assert await rig.status() == "paused"
    await rig.guest.command("cont")
    await rig.heard("domain-resumed")
    assert (await rig.show()).state == "running"


async def test_connection_that_broke_is_made_anew(faulty: Rig) -> None:
    await faulty.copy("vda")
    await faulty.ready("vda")
    await faulty.proxy.cut()
    assert (await faulty.jobs())["vda"].state == "ready"
    await faulty.pivot("vda")
    assert await faulty.events("domain-gone") == []
    assert await faulty.events("mirror-dropped") == []


@pytest.mark.parametrize(
    "request_of_it",
    [
        ask.Start(domain="vm1"),
        ask.Stop(domain="vm1", force=True),
        ask.Undefine(domain="vm1"),
        ask.RevertSnapshot(domain="vm1", snapshot="s1"),
        ask.ShowDomain(domain="vm1", inactive=True),
    ],
)
async def test_a_guest_that_somebody_else_starts_is_not_ours_to_end(rig: Rig, request_of_it: ask.Request) -> None:
    before = await rig.state()
    with pytest.raises(errors.NotDefined, match="vm1 is attached, not defined"):
        await rig.ask(request_of_it)
    assert await rig.state() == before


async def test_suspend_and_resume_of_an_attached_guest(rig: Rig) -> None:
    await rig.ask(ask.Suspend(domain="vm1"))
    assert await rig.status() == "paused"
    await rig.ask(ask.Resume(domain="vm1"))
    assert await rig.status() == "running"
    assert await rig.pauses_heard() == ["STOP", "RESUME"]
