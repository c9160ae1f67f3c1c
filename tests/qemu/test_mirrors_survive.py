"""Mirrors outlive their guest: they rest while it is shut off, and are established again before its first instruction."""

import errno
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from defined import MIB, SIZE, Defined, open_defined

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.flags import SnapshotDelete
from blockferry.testing import QemuBinaries, check_image, write_pattern


@pytest.fixture
async def guest(qemu: QemuBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Defined]:
    """Running, with a snapshot of vda that is mirrored and a copy of vdb, both caught up."""
    monkeypatch.setenv("BLOCKFERRY_QEMU_DIR", str(qemu.system.parent))
    async with open_defined(qemu, tmp_path) as guest:
        await guest.start()
        await guest.snapshot("s1", ("vda",), only=("vda",))
        await guest.ask(ask.StartCopy(domain="g1", disk="vdb", dest=str(guest.dest("vdb", "copy"))))
        await guest.write("vda", 0x51, 3 * MIB)
        await guest.write("vdb", 0x52, 4 * MIB)
        await guest.ready("vda", "vdb")
        yield guest


async def moved(guest: Defined) -> dict[str, int]:
    """Bytes that each mirror has copied since the start, once it has caught up."""
    return {target: job.current or 0 for target, job in (await guest.ready("vda", "vdb")).items()}


async def require_equal(guest: Defined) -> None:
    """What the guest writes now reaches the mirrors; going over to them at one instant, it finds all that it wrote."""
    await guest.write("vda", 0x61, 5 * MIB)
    await guest.write("vdb", 0x62, 6 * MIB)
    await guest.ready("vda", "vdb")
    await guest.ask(ask.PivotJobs(domain="g1", disks=("vdb",)))
    await guest.ask(ask.DeleteSnapshot(domain="g1", snapshot="s1", flags=SnapshotDelete.REOPEN_MIRROR))
    assert (await guest.chain("vda"))[0] == "vda.s1"
    assert (await guest.disk("vda")).source == str(guest.dest("vda", "s1"))
    assert (await guest.disk("vdb")).source == str(guest.dest("vdb", "copy"))
    await guest.stop()
    for target, name, fmt in (("vda", "s1", "qcow2"), ("vdb", "copy", "raw")):
        check_image(guest.qemu, guest.dest(target, name), fmt)
        assert guest.holds(target, guest.dest(target, name), fmt)
    # The definition names them: it starts there, and nowhere else.
    assert str(guest.dest("vda", "s1")) in ((await guest.ask(ask.ShowDomain(domain="g1", inactive=True))).xml or "")


async def test_after_a_clean_stop_nothing_is_copied(guest: Defined) -> None:
    await guest.stop()
    for target in ("vda", "vdb"):
        mirror = await guest.mirror(target)
        assert mirror is not None
        assert mirror.state == "resting"
    operations = (await guest.ask(ask.ListOperations())).operations
    assert [each.state for each in operations if each.what == "copy"] == ["in-progress"]
    assert guest.holds("vdb", guest.dest("vdb", "copy"), "raw"), "it was closed equal"
    await guest.start()
    assert await moved(guest) == {"vda": 0, "vdb": 0}
    await require_equal(guest)


async def test_again_and_again(guest: Defined) -> None:
    """Also across ends of our own process."""
    for byte in (0x71, 0x72, 0x73):
        await guest.stop()
        await guest.reopen()
        await guest.start()
        assert await moved(guest) == {"vda": 0, "vdb": 0}
        await guest.write("vda", byte, 2 * MIB)
    await require_equal(guest)


async def test_after_a_kill_a_snapshots_mirror_costs_the_overlay(guest: Defined) -> None:
    await guest.kill()
    await guest.start()
    now = await moved(guest)
    assert 0 < now["vda"] <= MIB, "the clusters of the overlay, not the disk's megabytes"
    assert now["vdb"] >= SIZE // 2, "nobody knows what of a whole copy had reached the disk"
    await require_equal(guest)


async def test_touched_while_it_rested_is_copied_again(guest: Defined) -> None:
    await guest.stop()
    write_pattern(guest.qemu, guest.dest("vdb", "copy"), "raw", 2 * MIB, MIB, 0xEE)
    await guest.start()
    assert (await moved(guest))["vdb"] > 0
    await require_equal(guest)


async def test_what_may_not_be_on_the_disk_is_copied_again(guest: Defined, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed equal, and the destination's last flush fails: after a power failure it would hold something else."""
    flush = os.fdatasync

    def fail(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(guest.dest("vdb", "copy")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(descriptor)

    monkeypatch.setattr(os, "fdatasync", fail)
    await guest.stop()
    monkeypatch.undo()
    monkeypatch.setenv("BLOCKFERRY_QEMU_DIR", str(guest.qemu.system.parent))
    await guest.start()
    now = await moved(guest)
    assert now["vda"] == 0
    assert now["vdb"] > 0
    await require_equal(guest)


async def test_destination_that_is_gone_is_dropped_and_said_so(guest: Defined) -> None:
    await guest.stop()
    guest.dest("vda", "s1").unlink()
    with pytest.raises(errors.MirrorGone, match=r"vda.*not there"):
        await guest.start(require_mirrors=True)
    assert (await guest.show()).state == "shut off"
    assert (await guest.mirror("vda")).state == "resting"
    await guest.start()
    assert (await guest.mirror("vda")).state == "lost"
    dropped = [event for event in (await guest.ask(ask.ListEvents())).events if event.type == "mirror-dropped"]
    assert [(event.disk, event.data["reason"]) for event in dropped] == [("vda", "it is not there any more")]
    assert (await guest.ready("vdb"))["vdb"].state == "ready"
    await guest.write("vda", 0x41)


async def test_another_file_in_its_place_is_left_alone(guest: Defined) -> None:
    await guest.stop()
    there = guest.dest("vdb", "copy")
    shutil.copy(there, there.with_suffix(".new"))
    there.with_suffix(".new").rename(there)
    theirs = there.read_bytes()
    await guest.start()
    mirror = await guest.mirror("vdb")
    assert (mirror.state, mirror.reason) == ("lost", "another file is there now")
    assert there.read_bytes() == theirs


async def test_destination_that_qemu_refuses_is_dropped(guest: Defined) -> None:
    """What only QEMU finds out keeps nobody from starting: it is tried again without."""
    await guest.stop()
    there = guest.dest("vda", "s1")
    contents = bytearray(there.read_bytes())
    contents[0x60:0x68] = b"\xff" * 8  # features that no QEMU knows
    there.write_bytes(contents)
    await guest.start()
    assert (await guest.mirror("vda")).state == "lost"
    assert (await guest.show()).state == "running"
    assert (await guest.ready("vdb"))["vdb"].state == "ready"


async def test_a_commit_ends_with_its_guest_and_the_chain_is_whole(guest: Defined) -> None:
    await guest.ask(ask.DeleteSnapshot(domain="g1", snapshot="s1", flags=SnapshotDelete.REMOVE_MIRROR))
    await guest.ask(ask.Commit(domain="g1", disk="vda", bandwidth=1))
    await guest.stop()
    jobs = {job.disk: job for job in (await guest.ask(ask.ListJobs(domain="g1"))).jobs}
    assert (jobs["vda"].state, jobs["vda"].reason) == ("cancelled", "the guest was shut off")
    assert guest.holds("vda", guest.path / "vda.s1", "qcow2")
    await guest.start()
    assert await guest.chain("vda") == ["vda.s1", "vda"]


async def test_nothing_of_a_destination_is_believed_after_a_kill(guest: Defined) -> None:
    """When the power went, the source's last writes were not on disk, and the destination's were."""
    overlay = guest.path / "vda.s1"
    await guest.stop()
    before, known = overlay.read_bytes(), bytes(guest.written["vda"])
    await guest.start()
    await guest.write("vda", 0x77, 7 * MIB)
    await guest.ready("vda", "vdb")
    await guest.kill()
    overlay.write_bytes(before)
    guest.written["vda"][:] = known
    await guest.start()
    await require_equal(guest)
