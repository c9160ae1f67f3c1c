"""A Linux that the service starts: it hears its power button, shuts down by itself, and finds again what it wrote."""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.snapshot import SnapshotWish
from blockferry.service import Service
from blockferry.testing import QemuBinaries, Records, StartedAgainWarning, build_guest, make_image, raw_contents
from blockferry.testing.guest import BLOCK_BYTES, BOOT_OPTIONS, BOOT_TIMEOUT_S

MIB = 1 << 20
RECORDS = Records("run1", slots=64)
XML = """<domain type='qemu'>
  <name>linux</name><memory unit='MiB'>128</memory><vcpu>2</vcpu><cpu mode='maximum'/>
  <os><type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{cmdline}</cmdline></os>
  <features><acpi/></features>
  <devices>
    <disk type='file'><driver name='qemu' type='qcow2'/><source file='{folder}/vda'/><target dev='vda'/></disk>
    <disk type='file'><driver name='qemu' type='raw' cache='none'/><source file='{folder}/sda'/><target dev='sda' bus='scsi'/></disk>
    <serial type='file'><source path='{folder}/console'/></serial>
    <serial type='unix'><source mode='bind' path='{folder}/port'/></serial>
  </devices>
</domain>"""
FORMATS = {"vda": "qcow2", "sda": "raw"}


@dataclass(eq=False)
class Linux:
    """Its protocol's end, and what it said: the last record that is safe, and what it found at its start."""

    qemu: QemuBinaries
    folder: Path
    service: Service
    acked: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    writer: asyncio.StreamWriter | None = None
    reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Until every disk has a record of this run; one that stands still before its first word is started again, once.

        That is a fault of the emulated machine on a busy one, see `WritingGuest.booted`: its console says how far it came.
        """
        try:
            await self.boot()
        except TimeoutError:
            if self.acked or self.found:
                raise
            shown = await self.service.submit(ask.ShowDomain(domain="linux"))
            console = (self.folder / "console").read_text(errors="replace")
            warnings.warn(f"started again: {shown.state}, console:\n{console}", StartedAgainWarning, stacklevel=2)
            await self.service.submit(ask.Stop(domain="linux", force=True))
            await self.let_go()
            await self.boot()

    async def boot(self) -> None:
        self.acked, self.found, self.reading = {}, {}, None
        await self.service.submit(ask.Start(domain="linux", paused=True))
        reader, self.writer = await asyncio.open_unix_connection(self.folder / "port")
        await self.service.submit(ask.Resume(domain="linux"))
        async with asyncio.timeout(BOOT_TIMEOUT_S):
            while len(self.acked) < len(FORMATS):
                self.hear(await reader.readline())
        self.reading = asyncio.create_task(self.go_on(reader))

    def hear(self, line: bytes) -> None:
        assert line, (self.folder / "console").read_text()[-2000:]
        match line.decode().split():
            case ["ACK", disk, record]:
                self.acked[disk] = int(record)
            case ["FOUND", disk, record]:
                self.found[disk] = int(record)

    async def go_on(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                self.hear(line)

    async def ended(self) -> view.Event:
        """What was said of its end, when it has ended."""
        async with asyncio.timeout(BOOT_TIMEOUT_S):
            async for event in self.service.watch("linux", self.since):
                if event.type in ("domain-stopped", "domain-crashed"):
                    break
        await self.let_go()
        return event

    async def let_go(self) -> None:
        """Hear the rest of what it said."""
        if self.reading is not None:
            await self.reading
        if self.writer is not None:
            self.writer.close()

    async def shut_down(self) -> None:
        """Wait until it has powered off, as its QEMU says to somebody else."""
        client = QMPClient("other")
        await client.connect(str(self.folder / "state/run/domains/linux/qmp.sock"))
        try:
            with client.listener("SHUTDOWN") as listener:
                if (await client.execute("query-status"))["status"] != "shutdown":
                    async with asyncio.timeout(BOOT_TIMEOUT_S):
                        await listener.get()
        finally:
            await client.disconnect()

    async def mark(self) -> None:
        self.since = (await self.service.submit(ask.ListEvents(since=2**62))).last

    async def verify(self) -> None:
        """Every acknowledged record is in the images that it is on now."""
        shown = await self.service.submit(ask.ShowDomain(domain="linux"))
        assert shown.state == "shut off"
        for disk in shown.disks:
            image = disk.chain[0]
            with raw_contents(self.qemu, Path(image.file), image.format) as contents:
                assert RECORDS.missing(contents, disk.target, self.acked[disk.target]) == []


@pytest.fixture
async def linux(qemu: QemuBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Linux]:
    monkeypatch.setenv("BLOCKFERRY_QEMU_DIR", str(qemu.system.parent))
    (tmp_path / "state").mkdir()
    for target, fmt in FORMATS.items():
        make_image(qemu, tmp_path / target, fmt, 8 * MIB)
    boot = build_guest()
    words = f"bf_disks={','.join(FORMATS)} bf_run={RECORDS.run} bf_first=0 bf_slots={RECORDS.slots} bf_batch=4"
    words += f" bf_block={RECORDS.start_bytes // BLOCK_BYTES} bf_resume=1"
    xml = XML.format(
        machine="q35", kernel=boot.kernel, initrd=boot.initrd, cmdline=f"{BOOT_OPTIONS} {words}", folder=tmp_path
    )
    linux = Linux(qemu, tmp_path, await Service.open(tmp_path / "state"))
    try:
        await linux.service.submit(ask.Define(xml=xml))
        yield linux
    finally:
        if (await linux.service.submit(ask.ShowDomain(domain="linux"))).state != "shut off":
            await linux.service.submit(ask.Stop(domain="linux", force=True))
        await linux.service.close()
        await linux.let_go()


@pytest.mark.guest
async def test_stop_and_start_and_it_reads_what_it_wrote(linux: Linux) -> None:
    """Asked by ACPI, with snapshots in between: each time it goes on with the record after the last one."""
    await linux.start()
    assert linux.found == {}, "its disks were empty"
    await linux.mark()
    done = await linux.service.submit(ask.Stop(domain="linux", timeout=BOOT_TIMEOUT_S))
    assert done.text == "linux is shut off"
    assert (await linux.ended()).data["reason"] == "the guest has shut down"
    await linux.verify()
    before = dict(linux.acked)
    await linux.start()
    assert linux.found == before
    await linux.service.submit(ask.CreateSnapshot(domain="linux", wish=SnapshotWish(name="s1"), flags=128))
    await linux.mark()
    await linux.service.submit(ask.Stop(domain="linux", timeout=BOOT_TIMEOUT_S))
    await linux.ended()
    before = dict(linux.acked)
    await linux.start()
    assert linux.found == before, "part of it is in the snapshot's base, the newest in its overlay"


@pytest.mark.guest
async def test_a_guest_that_shuts_down_by_itself(linux: Linux) -> None:
    """Its QEMU is ended in good order, and no crash is said of it; also when no process of ours was there."""
    await linux.start()
    await linux.mark()
    assert linux.writer is not None
    linux.writer.write(b"off\n")
    event = await linux.ended()
    assert (event.type, event.data["reason"]) == ("domain-stopped", "the guest has shut down")
    await linux.verify()
    assert not linux.service.has_work()
    before = dict(linux.acked)
    await linux.start()
    assert linux.found == before
    await linux.mark()
    await linux.service.close()
    assert linux.writer is not None
    linux.writer.write(b"off\n")
    await linux.shut_down()
    linux.service = await Service.open(linux.folder / "state")
    assert (await linux.ended()).type == "domain-stopped"
    await linux.verify()
