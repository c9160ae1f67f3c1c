"""Moves that are over at once: raw images that share their blocks with their destinations, under a mirror."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from rig import MIB, SIZE, Rig, forgets
from sharing import DISKS, open_sharing
from test_move import end_of, moved

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.service import Service
from blockferry.testing import QemuBinaries, WritingGuest, blockdev_disk, legacy_drive, make_image

ROUNDS = 4


async def require_moved(rig: Rig, folder: Path) -> None:
    """The guest is on the copies, which hold what it has written, and what it writes now."""
    for target in DISKS:
        assert await rig.chain(target) == [str(folder / f"{target}.img")]
        await rig.write(target, 0x33, 6 * MIB)
    assert await rig.qemu_jobs() == {}
    await rig.guest.stop()
    for target in DISKS:
        assert rig.holds(target, folder / f"{target}.img", "raw")


@pytest.mark.parametrize("paused", [False, True])
async def test_one_operation_and_no_overlay(qemu: QemuBinaries, reflinks: Path, *, paused: bool) -> None:
    async with open_sharing(qemu, reflinks, paused=paused) as rig:
        await rig.write("vda", 0x31, 2 * MIB)
        await rig.pauses_heard()
        done = await moved(rig, verify="none")
        assert (done.state, done.reason) == ("done", None)
        assert {each.method for each in done.files} == {"reflink"}
        assert {disk.strategy for disk in done.disks} == {"offload"}
        assert await rig.pauses_heard() == ([] if paused else rig.pauses_of_a_window)
        assert (done.pause_ms is None) == paused
        assert await rig.operations() == [("move", "done")]
        assert not {"transaction", "blockdev-snapshot", "block-commit"} & set(rig.proxy.commands())
        assert sorted(os.listdir(rig.dst)) == ["vda.img", "vdb.img"]
        assert sorted(done.left) == [str(rig.source(target)) for target in DISKS]
        await require_moved(rig, rig.dst)


async def test_what_is_written_before_and_after_the_blocks_are_shared(sharing: Rig) -> None:
    """What is written when only the mirror is there is in the blocks; what is written then, comes by the mirror."""
    mirrored = sharing.proxy.pause_after("blockdev-mirror", nth=2)
    shared = sharing.proxy.pause_before("job-complete" if sharing.is_held else "stop")
    moving = asyncio.create_task(moved(sharing, verify="full", delete_source=True))
    await mirrored.reached()
    for target in DISKS:
        await sharing.write(target, 0x41, 2 * MIB)
        await sharing.write(target, 0x42, 3 * MIB)
    mirrored.release()
    await shared.reached()
    for target in DISKS:
        await sharing.write(target, 0x43, 3 * MIB)
        await sharing.write(target, 0x44, 4 * MIB)
    shared.release()
    done = await moving
    assert (done.state, done.reason, done.verified, done.differences) == ("done", None, "full", ())
    assert done.compared == len(DISKS) * SIZE
    assert not any(sharing.source(target).exists() for target in DISKS)
    await require_moved(sharing, sharing.dst)


@pytest.mark.guest
async def test_a_guest_that_writes_all_the_time(qemu: QemuBinaries, reflinks: Path) -> None:
    """Back and forth: each time all of it is compared, and at the end all is there that the guest was told is on disk."""
    images = {target: make_image(qemu, reflinks / f"{target}.img", "raw", 24 * MIB) for target in DISKS}
    disks = {
        "vda": blockdev_disk("d0", images["vda"], "raw", iothread="io0"),
        "vdb": legacy_drive(images["vdb"], "raw"),
    }
    folders = [reflinks / "dst", reflinks]
    folders[0].mkdir()
    (reflinks / "state").mkdir(mode=0o700)
    async with WritingGuest(qemu, reflinks, disks, slots=1024) as guest:
        await guest.booted()
        service = await Service.open(reflinks / "state")
        try:
            await service.submit(ask.Attach(domain="vm1", qmp=str(guest.qemu.qmp)))
            for number in range(ROUNDS):
                to = str(folders[number % 2])
                begun = await service.submit(ask.MoveStorage(domain="vm1", dest=to, verify="full", delete_source=True))
                assert isinstance(begun, view.MoveView)
                done = await end_of(service, "vm1", begun.operation)
                assert (done.state, done.reason, done.differences) == ("done", None, ())
                assert done.pause_ms is not None
                assert {each.method for each in done.files} == {"reflink"}
                await guest.progress(8)
        finally:
            await service.close()
        assert len(guest.pauses_ms()) == (0 if forgets(qemu) else ROUNDS)
        await guest.kill()
    assert guest.errors == []
    for target in DISKS:
        assert guest.verify(target, reflinks / f"{target}.img", "raw") == []


async def test_a_destination_that_is_there_is_refused_with_nothing_done(sharing: Rig) -> None:
    before = await sharing.state()
    (sharing.dst / "vdb.img").write_bytes(b"somebody's")
    with pytest.raises(errors.DestinationExists, match=r"vdb\.img"):
        await moved(sharing, verify="none")
    assert (sharing.dst / "vdb.img").read_bytes() == b"somebody's"
    (sharing.dst / "vdb.img").unlink()
    assert await sharing.state() == before


async def test_a_file_that_the_guest_has_not_open_is_not_shared(sharing: Rig) -> None:
    sharing.source("vda").rename(sharing.path / "aside")
    sharing.source("vda").write_bytes(b"x" * SIZE)
    done = await moved(sharing, disks={"vda": None}, verify="none")
    assert (done.state, {disk.strategy for disk in done.disks}) == ("done", {"mirror"})
    await sharing.guest.stop()
    assert sharing.holds("vda", sharing.dst / "vda.img", "raw")
