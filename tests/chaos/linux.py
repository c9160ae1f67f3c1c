"""Cases on a Linux that writes and flushes all the time: booted once, saved, and woken anew for each."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from qemu.qmp import EventListener
from worlds import FORMATS, MIB, SIZE, TARGETS, Stage, World, disk_arguments

from blockferry.testing import QmpFaultProxy
from blockferry.testing.guest import BLOCK_BYTES, WritingGuest

PAUSE_S = 0.1  # a guest that never rests takes most of what a case costs
SLOTS = 256  # they begin at 1 MiB, behind the pattern
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Saved:
    """A Linux that ran: its memory, and its disks at that instant."""

    memory: Path
    disks: Path


def linux(stage: Stage, folder: Path, *args: str) -> WritingGuest:
    """One on the images of `folder`/src; what its devices are may not change between saving and waking it."""
    files = {target: (folder / "src" / f"{target}.img", FORMATS[target]) for target in TARGETS}
    arguments: dict[str, list[str]] = {target: [] for target in TARGETS}
    arguments["vda"] = disk_arguments(files)
    return WritingGuest(
        stage.binaries,
        folder,
        arguments,
        slots=SLOTS,
        pause_s=PAUSE_S,
        run="chaos",
        memory_mib=96,
        args=args,
        sockets=("qmp", "pen"),
    )


async def save(stage: Stage, folder: Path) -> Saved:
    """Boot one, let it write, and save it."""
    saved = Saved(memory=folder / "memory", disks=folder / "src")
    saved.disks.mkdir(parents=True)
    for target in TARGETS:
        shutil.copy(stage.template / f"{target}.img", saved.disks)
    async with linux(stage, folder) as guest:
        await guest.booted()
        await guest.progress(SLOTS)
        await guest.qemu.command(
            "migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}
        )
        events = EventListener("MIGRATION")
        with guest.qemu.control.listen(events):
            await guest.qemu.command("migrate", {"uri": f"exec:cat >{saved.memory}"})
            async with asyncio.timeout(SAVE_SECONDS):
                async for event in events:
                    assert "failed" not in str(event["data"]), event
                    if "completed" in str(event["data"]):
                        break
    return saved


@contextlib.asynccontextmanager
async def open_linux(
    saved: Saved, stage: Stage, folder: Path, *, proxied: bool = True, defined: bool = False, served: bool = False
) -> AsyncIterator[World]:
    """The saved one, awake, on copies of its disks; as `open_world`."""
    assert not defined, "what blockferry starts boots"
    assert not served, "one writer is enough for a server"
    shutil.copytree(saved.disks, folder / "src")
    (folder / "dst").mkdir()
    (folder / "state").mkdir(mode=0o700)
    guest = linux(stage, folder, "-incoming", f"exec:cat {saved.memory}")
    contents = {target: bytearray(SIZE) for target in TARGETS}
    for target in TARGETS:
        contents[target][:MIB] = bytes([0x61 + TARGETS.index(target)]) * MIB
    async with guest, QmpFaultProxy(guest.qemu.qmp, folder / "proxy.sock") as proxy:
        await guest.booted()
        world = World(
            stage=stage,
            folder=folder,
            qemu=guest.qemu,
            proxy=proxy,
            qmp=proxy.path if proxied else guest.qemu.qmp,
            contents=contents,
            guest=guest,
        )
        try:
            yield world
        finally:
            await world.qemu.stop()
            await guest.stop()


assert SLOTS * BLOCK_BYTES == MIB, "the records lie in the second MiB"
