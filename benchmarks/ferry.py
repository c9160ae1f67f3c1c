"""blockferry's side: the library in this process, a guest of the test kit."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shlex
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from sides import MEMORY_MIB, PROCESSORS, Boot, Image, Way, snapshot_xml

import blockferry
from blockferry import SnapshotCreate
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.testing import QemuBinaries, TestQemu, blockdev_disk

MOVE_ENDS = ("move-done", "move-stands", "move-cancelled")
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

    async def move(self, way: Way, images: list[Image], folder: Path, uri: str | None) -> dict[str, float]:
        """See sides.Guest; `split` is the guest's pause. A chain is made one image by a mirror, kept by an offload."""
        request = ask.MoveStorage(
            domain=self._domain.name,
            dest=str(folder),
            disks={image.target: uri or image.path.name for image in images},
            strategy="mirror" if way == "mirror" else "offload",
            chain="flatten" if way == "mirror" else "keep",
            verify="none",
        )
        began = time.perf_counter()
        begun = await self._ferry.ask(request, view.MoveView)
        await ended(self._ferry, begun)
        took = _milliseconds(began)
        done = await self._ferry.ask(ask.ShowMove(operation=begun.operation), view.MoveView)
        assert done.state == "done", f"the move is {done.state}: {done.reason}"
        now = {disk.target: disk.source for disk in (await self._domain.info()).disks}
        assert now == {image.target: uri or str(folder / image.path.name) for image in images}, now
        assert done.pause_ms is not None, "the guest was not paused"
        return {"move": took, "split": done.pause_ms}

    async def command(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """See sides.Guest."""
        return await self._qemu.command(name, arguments)

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
        arguments = ["-cpu", "max", "-smp", f"{PROCESSORS},sockets={PROCESSORS},cores=1,threads=1"]  # as libvirt does
        for image in images:
            arguments += blockdev_disk(f"d{image.target}", image.path, image.format, qdev_id=image.target)
        if boot is not None:
            arguments += ["-kernel", str(boot.kernel), "-initrd", str(boot.initrd), "-append", boot.append]
            arguments += ["-serial", f"file:{boot.console}", "-serial", f"file:{boot.acks}"]
        name = f"bench{next(self._numbers)}"
        # With the firmware that libvirt's guest has, too.
        qemu = TestQemu(self._binaries, folder, args=arguments, memory_mib=MEMORY_MIB, paused=False, boots=True)
        async with qemu:
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
        yield FerrySide(ferry, _apart(folder / "qemu", binaries))


def _apart(program: Path, binaries: QemuBinaries) -> QemuBinaries:
    """The same, with a QEMU that begins a session of its own, as libvirtd's does.

    Linux gives each session the same part of the processors (sched(7), autogroup): without one, QEMU would have to share
    this process's.
    """
    program.write_text(f'#!/bin/sh\nexec setsid {shlex.quote(str(binaries.system))} "$@"\n')
    program.chmod(0o755)
    return dataclasses.replace(binaries, system=program)


async def ended(ferry: blockferry.Ferry, begun: view.MoveView) -> None:
    """Wait until a move is over, or stands still."""
    async for event in ferry.watch(begun.domain, 0):
        if event.type in MOVE_ENDS and event.data["operation"] == begun.operation:
            return


def _milliseconds(began: float) -> float:
    return (time.perf_counter() - began) * 1000
