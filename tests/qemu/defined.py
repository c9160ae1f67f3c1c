"""A guest that the service starts itself, and a model of what it has written."""

import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.qemu.session import Session
from blockferry.service import Service
from blockferry.testing import QemuBinaries, image_sha256, make_image, write_pattern
from blockferry.testing.firmware import idle_firmware

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
FORMATS = {"vda": "qcow2", "vdb": "raw"}
XML = """<domain type='qemu'>
  <name>g1</name>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <features><acpi/></features>
  <devices>{disks}</devices>
</domain>"""
DISK = "<disk type='file'><driver name='qemu' type='{format}'/><source file='{file}'/><target dev='{target}'/></disk>"
Targets = tuple[str, ...]


@dataclass(eq=False)
class Defined:
    """g1: vda qcow2, vdb raw. Shut off, while it is closed, or running."""

    qemu: QemuBinaries
    path: Path
    service: Service
    written: dict[str, bytearray] = field(default_factory=dict, repr=False)
    as_of: dict[str, dict[str, bytes]] = field(default_factory=dict, repr=False)

    async def ask(self, request: ask.Request) -> Any:
        return await self.service.submit(request)

    async def start(self, **more: Any) -> view.DomainView:
        return await self.ask(ask.Start(domain="g1", **more))

    async def stop(self) -> None:
        await self.ask(ask.Stop(domain="g1", force=True))

    async def show(self) -> view.DomainView:
        return await self.ask(ask.ShowDomain(domain="g1"))

    async def chain(self, target: str) -> list[str]:
        return [Path(image.file).name for image in (await self.disk(target)).chain]

    async def disk(self, target: str) -> view.DiskView:
        return next(disk for disk in (await self.show()).disks if disk.target == target)

    async def mirror(self, target: str) -> view.MirrorView | None:
        return (await self.disk(target)).mirror

    async def kill(self) -> view.Event:
        """As the OOM killer; what was said of it."""
        since = (await self.ask(ask.ListEvents(since=2**62))).last
        os.kill((await self.show()).pid or 0, 9)
        async for event in self.service.watch("g1", since):
            if event.type == "domain-crashed":
                return event
        raise AssertionError("it was not noticed")

    async def reopen(self) -> None:
        """End the service and start one on the same state directory."""
        await self.service.close()
        await self.reopen_closed()

    async def reopen_closed(self) -> None:
        """Start a service after the one before was closed."""
        self.service = await Service.open(self.path / "state")

    async def snapshot(self, name: str, mirrors: Targets = (), only: Targets = ("vda", "vdb")) -> None:
        disks = tuple(
            DiskWish(
                name=target,
                file=str(self.path / f"{target}.{name}"),
                mirror=MirrorWish(file=str(self.dest(target, name))) if target in mirrors else None,
            )
            for target in only
        )
        wish = SnapshotWish(name=name, only_these=True, disks=disks)
        await self.ask(ask.CreateSnapshot(domain="g1", wish=wish, flags=128))

    def dest(self, target: str, name: str) -> Path:
        return self.path / "dst" / f"{target}.{name}"

    async def ready(self, *targets: str) -> dict[str, view.JobView]:
        """Wait until these mirrors have caught up."""
        while True:
            jobs = {job.disk: job for job in (await self.ask(ask.ListJobs(domain="g1"))).jobs}
            assert {jobs[target].state for target in targets} <= {"copying", "catching up", "ready"}
            if all(jobs[target].state == "ready" for target in targets):
                return jobs

    @contextlib.asynccontextmanager
    async def monitor(self) -> AsyncIterator[Session]:
        """QEMU's socket, for a moment; the service connects anew when it is asked next."""
        keeper = self.service._desk.keepers["g1"]
        session = await keeper.connect()
        yield session

    async def write(self, target: str, byte: int, offset: int = 0, length: int = 64 * KIB) -> None:
        """Write through the guest's device, as QEMU's own test command does, and flush: a kill must not lose it."""
        async with self.monitor() as session:
            for drive in await session.execute("query-block"):
                if f"/disk-{target}/" in drive.get("qdev", ""):
                    qdev = drive["qdev"]
            before = await self._done(session, qdev)
            line = f'qemu-io -d {qdev} "aio_write -q -P {byte:#x} {offset} {length}"'
            await session.execute("human-monitor-command", command_line=line)
            while (now := await self._done(session, qdev)) == before:
                pass
            assert now == (before[0] + 1, before[1])
            # A write is only flushed by itself once the firmware has found the disk.
            await session.execute("human-monitor-command", command_line=f'qemu-io -d {qdev} "flush"')
        self.written[target][offset : offset + length] = bytes([byte]) * length

    async def _done(self, session: Session, qdev: str) -> tuple[int, int]:
        for each in await session.execute("query-blockstats"):
            if each.get("qdev") == qdev:
                return each["stats"]["wr_operations"], each["stats"]["failed_wr_operations"]
        raise AssertionError(qdev)

    def holds(self, target: str, path: Path, fmt: str, written: bytes | None = None) -> bool:
        """Whether a closed image holds what the guest has written to the disk."""
        return image_sha256(self.qemu, path, fmt) == hashlib.sha256(written or self.written[target]).hexdigest()


@contextlib.asynccontextmanager
async def open_defined(qemu: QemuBinaries, path: Path) -> AsyncIterator[Defined]:
    """Defined and shut off; whatever runs at the end is ended. BLOCKFERRY_QEMU_DIR is the caller's to set."""
    for folder in ("state", "dst"):
        (path / folder).mkdir()
    written = {}
    for number, (target, fmt) in enumerate(FORMATS.items(), start=1):
        image = make_image(qemu, path / target, fmt, SIZE)
        write_pattern(qemu, image, fmt, 0, MIB, 0x10 * number)
        written[target] = bytearray(bytes([0x10 * number]) * MIB + bytes(SIZE - MIB))
    disks = "".join(DISK.format(target=target, format=fmt, file=path / target) for target, fmt in FORMATS.items())
    guest = Defined(qemu, path, await Service.open(path / "state"), written)
    try:
        loader = f"<loader type='rom'>{idle_firmware(path)}</loader></os>"
        await guest.ask(ask.Define(xml=XML.format(disks=disks).replace("</os>", loader)))
        yield guest
    finally:
        if (await guest.show()).state != "shut off":
            await guest.stop()
        await guest.service.close()
