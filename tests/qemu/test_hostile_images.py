"""Images of guests that lie: nothing that only a header names is opened, connected to or probed, by us or by QEMU."""

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from defined import DISK, FORMATS, XML, Defined, open_defined
from hostile import LIES, lay, qcow2
from rig import open_rig, wish_xml

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.flags import BlockCopy, SnapshotCreate
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.service import Service
from blockferry.testing import QemuBinaries, make_image
from blockferry.testing.canary import Canary
from blockferry.testing.firmware import idle_firmware


@dataclass(eq=False)
class Trap:
    """What nobody may touch: a file outside the folder of images, and a port."""

    canary: Canary
    port: int
    images: Path
    connections: int = 0

    def untouched(self) -> bool:
        return (self.canary.opened(), self.connections) == (0, 0)


@pytest.fixture
async def trap(tmp_path: Path) -> AsyncIterator[Trap]:
    for folder in ("images", "outside"):
        (tmp_path / folder).mkdir()
    shadow = tmp_path / "outside/shadow"
    shadow.write_bytes(qcow2())
    with Canary(shadow) as canary:
        trap = Trap(canary, 0, tmp_path / "images")

        def connected(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            trap.connections += 1
            writer.close()

        async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
            trap.port = server.sockets[0].getsockname()[1]
            yield trap
        # It works: what is opened is seen.
        assert canary.opened() == 0
        shadow.read_bytes()
        assert canary.opened() > 0


@pytest.fixture
async def guest(qemu: QemuBinaries, trap: Trap, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Defined]:
    monkeypatch.setenv("BLOCKFERRY_QEMU_DIR", str(qemu.system.parent))
    async with open_defined(qemu, trap.images) as guest:
        yield guest


async def test_what_is_given_to_a_guest_that_runs(qemu: QemuBinaries, trap: Trap) -> None:
    """As an overlay, as a mirror's base, as a copy's destination, and as a snapshot that is remembered."""
    async with open_rig(qemu, trap.images) as rig:
        before = await rig.chain("vda")
        offered = trap.images / "offered"
        offered.mkdir()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for what, lie in lay(offered, trap.canary.path, trap.port):
            wish = SnapshotWish(only_these=True, disks=(DiskWish(name="vda", file=str(lie)),))
            mirrored = DiskWish(
                name="vda",
                file=str(offered / "new"),
                mirror=MirrorWish(file=str(offered / "dst"), backing=str(lie), backing_format="qcow2"),
            )
            reuse = SnapshotCreate.REUSE_EXT
            requests: list[ask.Request] = [
                ask.CreateSnapshot(domain="vm1", wish=wish, flags=reuse),
                ask.StartCopy(domain="vm1", disk="vda", dest=str(lie), flags=BlockCopy.REUSE_EXT),
                ask.StartCopy(domain="vm1", disk="vda", dest=str(lie), flags=BlockCopy.REUSE_EXT | BlockCopy.SHALLOW),
                ask.CreateSnapshot(
                    domain="vm1",
                    xml=wish_xml("r", f"<disk name='vda'><source file='{lie}'/></disk>"),
                    flags=SnapshotCreate.REDEFINE,
                ),
            ]
            for request in requests:
                with pytest.raises(errors.Refused):
                    await rig.ask(request)
                assert trap.untouched(), (what, request)
            # A mirror's base is given by its name and format; what is wrong with it shows when the guest would go over.
            with contextlib.suppress(errors.BlockferryError):
                await rig.ask(
                    ask.CreateSnapshot(
                        domain="vm1", wish=SnapshotWish(only_these=True, disks=(mirrored,)), dry_run=True
                    )
                )
            assert trap.untouched(), what
        assert await rig.chain("vda") == before
        assert {each.severity for each in (await rig.ask(ask.Doctor(domain="vm1"))).findings} <= {"ok", "note"}
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 << 10, "KiB: tables are bounded"


async def test_what_a_guest_is_to_be_started_on(guest: Defined, trap: Trap) -> None:
    """It is defined and shown; it is not started, and the doctor says why."""
    offered = trap.images / "offered"
    offered.mkdir()
    firmware = f"<loader type='rom'>{idle_firmware(trap.images)}</loader></os>"
    refused = []
    for what, lie in lay(offered, trap.canary.path, trap.port):
        disks = DISK.format(target="vda", format="qcow2", file=lie)
        # Some lies name each other: another definition of one guest would be refused for that already.
        await guest.ask(ask.Undefine(domain="g1"))
        await guest.ask(ask.Define(xml=XML.format(disks=disks).replace("</os>", firmware)))
        with pytest.raises(errors.BlockferryError) as caught:
            await guest.start()
        refused.append((what, caught.value.code))
        assert trap.untouched(), what
        findings = (await guest.ask(ask.Doctor(domain="g1"))).findings
        assert {each.severity for each in findings} - {"ok", "note"}, what
        assert trap.untouched(), what
        assert (await guest.show()).state == "shut off"
    assert {what for what, _code in refused} == set(LIES)
    assert {code for _what, code in refused} == {"image-unsuitable"}


async def test_a_guest_that_writes_a_header_into_its_raw_disk(guest: Defined, trap: Trap) -> None:
    """Its disk stays raw through everything that is done with it."""
    header = qcow2(size=1 << 40, backing=str(trap.canary.path))
    with (trap.images / "vdb").open("r+b") as disk:
        disk.write(header)
    guest.written["vdb"][: len(header)] = header
    await guest.start()
    await guest.snapshot("s1", mirrors=("vdb",), only=("vdb",))
    await guest.ready("vdb")
    await guest.ask(ask.Doctor(domain="g1"))
    await guest.stop()
    await guest.start(require_mirrors=True)
    assert await guest.chain("vdb") == ["vdb.s1", "vdb"]
    assert (await guest.disk("vdb")).chain[-1].format == "raw"
    await guest.ask(ask.CancelJobs(domain="g1", disks=("vdb",)))
    await guest.ask(ask.RevertSnapshot(domain="g1", snapshot="s1", start=True))
    copy = str(trap.images / "copy")
    await guest.ask(ask.Rebase(domain="g1", disk="vdb"))
    async for _event in guest.service.watch("g1", 0):
        if len(await guest.chain("vdb")) == 1:
            break
    await guest.ask(ask.StartCopy(domain="g1", disk="vdb", dest=copy, format="raw"))
    await guest.ask(ask.PivotJobs(domain="g1", disks=("vdb",)))
    assert (await guest.disk("vdb")).chain[0].format == "raw"
    await guest.stop()
    await guest.start()
    await guest.stop()
    await guest.reopen()
    assert trap.untouched()
    assert guest.holds("vdb", Path(copy), "raw")
    assert guest.holds("vdb", trap.images / "vdb", "raw")


async def test_the_folders_that_a_header_may_lead_to(guest: Defined, trap: Trap) -> None:
    """What is near an image that was named, what was named too, and nothing else."""
    elsewhere = trap.images.parent / "outside/base"
    make_image(guest.qemu, elsewhere, "raw", 8 << 20)
    (trap.images / "below").mkdir()
    make_image(guest.qemu, trap.images / "below/near", "raw", 8 << 20)
    firmware = f"<loader type='rom'>{idle_firmware(trap.images)}</loader></os>"

    async def defined(backing: Path, more: str = "") -> None:
        (trap.images / "top").write_bytes(qcow2(backing=str(backing)))
        disk = DISK.format(target="vda", format="qcow2", file=trap.images / "top").replace("<target", more + "<target")
        await guest.ask(ask.Define(xml=XML.format(disks=disk).replace("</os>", firmware)))

    await defined(trap.images / "below/near")
    await guest.start()
    await guest.stop()
    await defined(elsewhere)
    with pytest.raises(errors.ImageUnsuitable, match="only an image's header names it"):
        await guest.start()
    await defined(
        elsewhere, f"<backingStore type='file'><format type='raw'/><source file='{elsewhere}'/></backingStore>"
    )
    await guest.start()
    await guest.stop()


async def test_roots_that_are_given(guest: Defined, trap: Trap) -> None:
    """Nothing outside of them is opened or made, whoever names it."""
    await guest.service.close()
    guest.service = await Service.open(trap.images / "state", storage_roots=(str(trap.images),))
    assert set(FORMATS) == {disk.target for disk in (await guest.start()).disks}
    outside = trap.canary.path.parent
    for dest, flags in ((trap.canary.path, BlockCopy.REUSE_EXT), (outside / "new", 0)):
        with pytest.raises(errors.Refused, match="outside the storage roots"):
            await guest.ask(ask.StartCopy(domain="g1", disk="vdb", dest=str(dest), format="raw", flags=flags))
    link = trap.images / "link"
    link.symlink_to(outside)
    wish = SnapshotWish(only_these=True, disks=(DiskWish(name="vda", file=str(link / "new")),))
    with pytest.raises(errors.Refused, match="outside the storage roots"):
        await guest.ask(ask.CreateSnapshot(domain="g1", wish=wish))
    assert [path.name for path in outside.iterdir()] == ["shadow"]
    await guest.stop()
    await guest.ask(ask.Define(xml=XML.format(disks=DISK.format(target="vda", format="raw", file=trap.canary.path))))
    with pytest.raises(errors.ImageUnsuitable, match="outside the storage roots"):
        await guest.start()
    assert trap.untouched()
    with pytest.raises(errors.BadRequest, match="not an absolute path"):
        await Service.open(trap.images / "state", storage_roots=("images",))
