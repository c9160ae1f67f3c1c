"""A real Linux guest with an ext4 on each of its two disks and the real qemu-guest-agent, and the service on it."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from rig import MIB

from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.flags import SnapshotCreate
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.service import Service
from blockferry.testing import (
    AgentRelay,
    QemuBinaries,
    QmpFaultProxy,
    WritingGuest,
    ask_agent,
    blockdev_disk,
    make_ext4,
)

FORMATS = {"vda": "qcow2", "vdb": "raw"}
CALM = SnapshotCreate.ATOMIC | SnapshotCreate.QUIESCE


@dataclass(eq=False)
class Calm:
    """The service reaches QEMU through `proxy`, and the agent through `relay`."""

    path: Path
    guest: WritingGuest
    proxy: QmpFaultProxy
    relay: AgentRelay
    service: Service

    @property
    def attach(self) -> ask.Attach:
        return ask.Attach(domain="vm1", qmp=str(self.proxy.path), agent=str(self.relay.path))

    def wish(self, name: str, flags: SnapshotCreate = CALM, *, mirrored: bool = False) -> ask.CreateSnapshot:
        disks = tuple(
            DiskWish(
                name=target,
                file=str(self.path / f"{target}.{name}"),
                mirror=MirrorWish(file=str(self.path / f"{target}.{name}.mirror")) if mirrored else None,
            )
            for target in FORMATS
        )
        return ask.CreateSnapshot(domain="vm1", wish=SnapshotWish(name=name, disks=disks), flags=flags)

    async def snapshot(self, name: str, flags: SnapshotCreate = CALM, *, mirrored: bool = False) -> view.SnapshotView:
        answer = await self.service.submit(self.wish(name, flags, mirrored=mirrored))
        assert isinstance(answer, view.SnapshotView)
        return answer

    async def operations(self) -> list[tuple[str, str]]:
        answer = await self.service.submit(ask.ListOperations())
        assert isinstance(answer, view.OperationList)
        return [(each.what, each.state) for each in answer.operations]

    async def active(self) -> dict[str, str]:
        """The image that each disk is on."""
        shown = await self.service.submit(ask.ShowDomain(domain="vm1"))
        assert isinstance(shown, view.DomainView)
        return {disk.target: Path(str(disk.source)).name for disk in shown.disks}

    async def is_thawed(self) -> None:
        """It says so itself, and it writes."""
        assert await ask_agent(self.guest.agent, "guest-fsfreeze-status") == ["thawed"]
        await self.guest.progress()


@contextlib.asynccontextmanager
async def open_calm(qemu: QemuBinaries, path: Path) -> AsyncIterator[Calm]:
    """Start it all, attached as vm1."""
    (path / "state").mkdir()
    disks = {
        target: blockdev_disk(f"d{target}", make_ext4(qemu, path / target, fmt, 16 * MIB), fmt)
        for target, fmt in FORMATS.items()
    }
    async with contextlib.AsyncExitStack() as stack:
        guest = await stack.enter_async_context(WritingGuest(qemu, path, disks, slots=64, agent=True))
        proxy = await stack.enter_async_context(QmpFaultProxy(guest.qemu.qmp, path / "proxy.sock"))
        relay = await stack.enter_async_context(AgentRelay(guest.agent, path / "relay.sock"))
        await guest.booted()
        calm = Calm(path, guest, proxy, relay, await Service.open(path / "state"))
        try:
            await calm.service.submit(calm.attach)
            yield calm
        finally:
            await calm.service.close()
