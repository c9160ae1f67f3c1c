"""What going on with an interrupted move moves, beside a full one: our process ends when 60 % of the disk is copied."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from cases import fill
from ferry import ended
from sides import moved_by_jobs

import blockferry
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.testing import QemuBinaries, TestQemu, blockdev_disk, compare_images

INTERRUPTED_AT = 0.6
# So long it takes until it is interrupted: somebody has to see where it is.
SECONDS = 2.0
LOOK_SECONDS = 0.02


async def interrupted(binaries: QemuBinaries, place: Path, size: int) -> float:
    """Interrupt an offload of a full disk, and go on with it: what the second run moves, as a part of the disk.

    What is copied outside QEMU, and what is mirrored, as QEMU counts that.
    """
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        source = folder / "disk.img"
        (folder / "to").mkdir()
        fill(source, size)
        disk = blockdev_disk("d0", source, "raw", iothread="io0")
        async with TestQemu(binaries, folder, args=disk, paused=False) as qemu:
            operation = await _begin(folder, qemu, size)
            with qemu.control.listener("BLOCK_JOB_COMPLETED") as mirrors:
                copied = await _go_on(folder, operation)
                mirrored = moved_by_jobs(mirrors)
        assert compare_images(binaries, source, "raw", folder / "to/disk.img", "raw"), "the copy is another"
    return (copied + mirrored) / size


async def _begin(folder: Path, qemu: TestQemu, size: int) -> int:
    """Begin, and end without a word once so much is on disk; the move's number."""
    async with blockferry.open(folder / "state") as ferry:
        await ferry.attach("vm", qemu.qmp)
        request = ask.MoveStorage(
            domain="vm",
            dest=str(folder / "to"),
            strategy="offload",
            verify="none",
            bandwidth=int(size * INTERRUPTED_AT / SECONDS),
        )
        move = await ferry.ask(request, view.MoveView)
        while move.copied < INTERRUPTED_AT * size:
            assert move.state == "working", move.reason
            await asyncio.sleep(LOOK_SECONDS)
            move = await ferry.ask(ask.ShowMove(operation=move.operation), view.MoveView)
    return move.operation


async def _go_on(folder: Path, operation: int) -> int:
    """Go on until the move is done; the bytes that were copied outside QEMU."""
    async with blockferry.open(folder / "state") as ferry:
        await ferry.ask(ask.SetMoveSpeed(operation=operation, bandwidth=0), view.Done)
        move = await ferry.ask(ask.ResumeOperation(operation=operation), view.MoveView)
        await ended(ferry, move)
        done = await ferry.ask(ask.ShowMove(operation=operation), view.MoveView)
        assert done.state == "done", done.reason
        return sum(event.data["bytes"] for event in await ferry.events("vm") if event.type == "move-copied")
