"""blockferry's side: the library in this process, a guest of the test kit."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path

from sides import MEMORY_MIB, PROCESSORS, Boot, Image, snapshot_xml

import blockferry
from blockferry import SnapshotCreate
from blockferry.testing import QemuBinaries, TestQemu, blockdev_disk

FLAGS = SnapshotCreate.DISK_ONLY | SnapshotCreate.ATOMIC


class FerryGuest:
    """A guest that blockferry is attached to.

    Args:
        ferry: whose it is.
        domain: the same, as blockferry sees it.
        qemu: its process, with a monitor of its own that blockferry knows nothing of.
    """

    def __init__(self, ferry: blockferry.Ferry, domain: blockferry.Domain, qemu: TestQemu) -> None:
        self._ferry = ferry
        self._domain = domain
        self._qemu = qemu

    async def snapshot(self, overlays: dict[str, Path]) -> dict[str, float]:
        """See sides.Guest."""
        began = time.perf_counter()
        await self._domain.snapshot_create_xml(snapshot_xml("s", overlays), FLAGS)
        took = _milliseconds(began)
        await self._require_on(overlays)
        return {"snapshot": took}

    async def mirrored(self, overlays: dict[str, Path], mirrors: dict[str, Path]) -> dict[str, float]:
        """See sides.Guest; the guest's own monitor says whether it was ever stopped."""
        with self._qemu.control.listener(("STOP", "RESUME")) as pauses:
            began = time.perf_counter()
            snapshot = await self._domain.snapshot_create_xml(snapshot_xml("s", overlays, mirrors), FLAGS)
            took = _milliseconds(began)
            while any(job.state != "ready" for job in await self._domain.jobs()):
                pass
            synced = _milliseconds(began)
            await self._require_on(overlays)
            assert pauses.empty(), "the guest was paused"
        operation = await self._ferry.operation(snapshot.view.operation or 0)
        assert operation.pause_ms is None, f"the guest was paused for {operation.pause_ms} ms"
        return {"mirrored": took, "mirrored-ready": synced}

    async def copy(self, image: Image, to: Path) -> dict[str, float]:
        """See sides.Guest."""
        began = time.perf_counter()
        job = await self._domain.block_copy(image.target, to, format=image.format)
        async for _progress in job:
            pass
        took = _milliseconds(began)
        await self._domain.cancel([image.target])
        return {"copy": took}

    async def pivot(self, copies: dict[str, Path]) -> dict[str, float]:
        """See sides.Guest; `split` is the guest's pause, by QEMU's clock: no write is between any two disks."""
        for target, to in copies.items():
            async for _progress in await self._domain.block_copy(target, to):
                pass
        began = time.perf_counter()
        done = await self._domain.pivot(copies)
        took = _milliseconds(began)
        await self._require_on(copies)
        assert done.pause_ms is not None, "the guest was not paused"
        return {"split": done.pause_ms, "pivot": took}

    async def _require_on(self, files: dict[str, Path]) -> None:
        now = {disk.target: disk.source for disk in (await self._domain.info()).disks}
        wrong = {target: now[target] for target, path in files.items() if now[target] != str(path)}
        assert not wrong, f"not where they should be: {wrong}"


class FerrySide:
    """`blockferry.open()`, warm.

    Args:
        ferry: open.
        binaries: which QEMU.
    """

    name = "blockferry"

    def __init__(self, ferry: blockferry.Ferry, binaries: QemuBinaries) -> None:
        self._ferry = ferry
        self._binaries = binaries
        self._numbers = itertools.count()
        self.version = blockferry.__version__

    def own(self, path: Path) -> None:
        """Leave it as it is: QEMU runs as this process's user."""

    @contextlib.asynccontextmanager
    async def guest(self, images: list[Image], folder: Path, boot: Boot | None) -> AsyncIterator[FerryGuest]:
        """See sides.Side."""
        arguments = ["-cpu", "max", "-smp", str(PROCESSORS)]
        for image in images:
            arguments += blockdev_disk(f"d{image.target}", image.path, image.format, qdev_id=image.target)
        if boot is not None:
            arguments += ["-kernel", str(boot.kernel), "-initrd", str(boot.initrd), "-append", boot.append]
            arguments += ["-serial", f"file:{boot.console}", "-serial", f"file:{boot.acks}"]
        name = f"bench{next(self._numbers)}"
        async with TestQemu(self._binaries, folder, args=arguments, memory_mib=MEMORY_MIB, paused=False) as qemu:
            domain = await self._ferry.attach(name, qemu.qmp)
            await domain.info()
            try:
                yield FerryGuest(self._ferry, domain, qemu)
            finally:
                with contextlib.suppress(blockferry.BlockferryError):
                    active = [job.disk for job in await domain.jobs() if job.state in {"copying", "ready"}]
                    if active:
                        await domain.cancel(active)
                    await self._ferry.detach(name)


@contextlib.asynccontextmanager
async def ferry_side(folder: Path, binaries: QemuBinaries) -> AsyncIterator[FerrySide]:
    """The library in this process, with its state directory in `folder`."""
    async with blockferry.open(folder / "state") as ferry:
        yield FerrySide(ferry, binaries)


def _milliseconds(began: float) -> float:
    return (time.perf_counter() - began) * 1000
