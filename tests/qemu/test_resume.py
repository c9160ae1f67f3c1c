"""Copies that are cancelled or lost and gone on with: only what is missing is moved, and nothing is believed unproved."""

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from rig import ALL, EVENT_TIMEOUT_S, FORMATS, KIB, MIB, SIZE, Rig, open_guest

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.flags import BlockCopy, SnapshotDelete
from blockferry.testing import Fault, FaultKind, QemuBinaries, TestQemu, blockdev_disk, check_image

SLOW = 64 * KIB


async def cancel(rig: Rig, target: str = "vda") -> view.Done:
    return await rig.ask(ask.CancelJobs(domain="vm1", disks=(target,)))


async def bitmaps(rig: Rig) -> dict[str, int]:
    """What the bitmaps of ours count, by name."""
    return {
        bitmap["name"]: bitmap["count"]
        for node in (await rig.nodes()).values()
        for bitmap in node.get("dirty-bitmaps", ())
        if bitmap.get("name")
    }


async def refused(rig: Rig, reason: str, target: str = "vda", **more: object) -> None:
    """Refused, with nothing done."""
    before = (await rig.state(), await rig.our_nodes(), await rig.operations())
    with pytest.raises(errors.NotResumable, match=reason):
        await rig.copy(target, resume=True, **more)
    assert (await rig.state(), await rig.our_nodes(), await rig.operations()) == before


async def pivots(rig: Rig, target: str, fmt: str) -> None:
    """The guest goes over, and what it stands on then holds all that it wrote."""
    await rig.pivot(target)
    assert await rig.chain(target) == [str(rig.dest(target))]
    await rig.write(target, 0x66, 6 * MIB)
    assert await rig.qemu_jobs() == {}
    assert await bitmaps(rig) == {}
    await rig.guest.stop()
    assert rig.holds(target, rig.dest(target), fmt)
    check_image(rig.qemu, rig.dest(target), fmt)


@pytest.fixture
async def left(rig: Rig) -> Rig:
    """A rig whose copy of vda was cancelled after it had begun."""
    await rig.copy("vda", bandwidth=SLOW, buf_size=64 * KIB)
    await cancel(rig)
    return rig


# --- gone on with ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "fmt"), [*((target, "raw") for target in ALL), ("vda", "qcow2"), ("vdb", "qcow2")])
async def test_a_cancelled_copy_is_resumed(either: Rig, target: str, fmt: str) -> None:
    status = await either.status()
    await either.copy(target, format=fmt, bandwidth=SLOW, buf_size=64 * KIB)
    await either.write(target, 0x31, 512 * KIB + 4 * KIB, 8 * KIB)  # where it may have been copied already
    done = await cancel(either, target)
    assert done.text.endswith(f"to go on with it: blockferry copy vm1 {target} {either.dest(target)} --resume")
    assert await either.our_nodes() == set()
    await either.write(target, 0x32, 0)
    await either.write(target, 0x33, 5 * MIB)
    await either.pauses_heard()
    job = await either.copy(target, resume=True)
    await either.ready(target)
    await either.settled()
    assert (job.dest, job.format, job.base) == (str(either.dest(target)), fmt, None)
    assert (await either.jobs())[target].type == "copy"
    assert await either.status() == status
    assert await either.pauses_heard() == (["STOP", "RESUME"] if status == "running" else [])
    moved = [each for each in (await either.ask(ask.ListOperations())).operations if each.what == "job-end"]
    assert [each.pause_ms is not None for each in moved] == [True] or status != "running"
    await either.write(target, 0x34, 3 * MIB)
    await pivots(either, target, fmt)


async def test_interrupted_again_and_again(rig: Rig) -> None:
    """While what lacks is moved, and when it is a mirror again."""
    await rig.copy("vda", bandwidth=SLOW, buf_size=64 * KIB)
    await cancel(rig)
    await rig.write("vda", 0x41, 4 * MIB)
    assert (await rig.copy("vda", resume=True, bandwidth=SLOW)).type == "resume"
    with pytest.raises(errors.JobNotReady, match="what the destination lacks is copied"):
        await rig.pivot("vda", timeout=0.1)
    await rig.write("vda", 0x42, 5 * MIB)
    await cancel(rig)
    await rig.write("vda", 0x43, MIB)
    await rig.copy("vda", resume=True)
    await rig.ready("vda")
    await rig.write("vda", 0x44, 2 * MIB)
    await cancel(rig)
    await rig.write("vda", 0x45, 3 * MIB)
    (counted,) = (await bitmaps(rig)).values()
    assert counted == 2 * 64 * KIB, "what was written since it was a mirror again, and nothing else"
    await rig.copy("vda", resume=True)
    await pivots(rig, "vda", "qcow2")


async def test_resumed_by_another_process_of_ours(left: Rig) -> None:
    await left.reopen_service()
    await left.write("vda", 0x46, MIB)
    await left.copy("vda", resume=True, bandwidth=SLOW)
    await left.reopen_service()
    await left.ask(ask.SetJobSpeed(domain="vm1", disk="vda", bandwidth=0))
    await pivots(left, "vda", "qcow2")


async def test_finish_of_a_resumed_copy(left: Rig) -> None:
    await left.write("vda", 0x47, MIB)
    await left.copy("vda", resume=True)
    await left.finish("vda")
    assert await bitmaps(left) == {}
    await left.guest.stop()
    assert left.holds("vda", left.dest("vda"), "qcow2")


async def test_dry_run_tells_and_does_nothing(left: Rig) -> None:
    before = (await left.state(), await left.our_nodes())
    plan = await left.copy("vda", resume=True, dry_run=True)
    assert isinstance(plan, view.PlanView)
    assert plan.operation == f"resume the copy of vda to {left.dest('vda')}"
    assert any("to be copied" in step for step in plan.steps)
    assert (await left.state(), await left.our_nodes()) == before


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "small", folder], check=True, timeout=20)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True, timeout=20)


def enlarge(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True, timeout=20)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
async def test_lost_for_want_of_room(qemu: QemuBinaries, small: Path, rig: Rig, fmt: str) -> None:
    dest = small / "vdb.copy"
    await rig.copy("vdb", dest, format=fmt)
    await rig.ready("vdb")
    for number in range(6):
        await rig.write("vdb", 0x50 + number, (2 + number) * MIB, MIB)
    dropped = await rig.heard("mirror-dropped", "vdb")
    assert dropped.data["reason"] == "No space left on device"
    await rig.settled()
    assert await rig.our_nodes() == set()
    enlarge(small)
    await rig.write("vdb", 0x5F, 3 * MIB)
    await rig.copy("vdb", dest, resume=True)
    await rig.pivot("vdb")
    await rig.guest.stop()
    assert rig.holds("vdb", dest, fmt)
    check_image(qemu, dest, fmt)


# --- what it costs --------------------------------------------------------------------------------------------

BIG = 128 * MIB


@contextlib.asynccontextmanager
async def full_disk(qemu: QemuBinaries, path: Path) -> AsyncIterator[Rig]:
    """A guest with a disk of 128 MiB, all of it data."""
    contents = bytearray(os.urandom(MIB) * (BIG // MIB))
    (path / "vda.img").write_bytes(contents)
    disk = blockdev_disk("d0", path / "vda.img", "raw", iothread="io0")
    async with open_guest(qemu, path, disk, {"vda": contents}) as rig:
        yield rig


async def copied(rig: Rig, part: float) -> None:
    """Wait until the job has moved that part of the disk."""
    async with asyncio.timeout(EVENT_TIMEOUT_S):
        while not any(job["current-progress"] >= part * BIG for job in (await rig.qemu_jobs()).values()):
            pass


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
async def test_an_interruption_costs_what_was_missing(qemu: QemuBinaries, tmp_path: Path, fmt: str) -> None:
    async with full_disk(qemu, tmp_path) as rig:
        await rig.copy("vda", format=fmt, bandwidth=96 * MIB, buf_size=MIB)
        await copied(rig, 0.6)
        await cancel(rig)
        for number in range(3):
            await rig.write("vda", 0x61 + number, number * 10 * MIB, MIB)
        with rig.guest.control.listener("BLOCK_JOB_COMPLETED") as ended:
            await rig.copy("vda", resume=True)
            await rig.pivot("vda")
            moved = sum(event["data"]["offset"] for event in ended.clear())
        assert 3 * MIB < moved < 0.45 * BIG
        await rig.guest.stop()
        assert rig.holds("vda", rig.dest("vda"), fmt)


# --- refused --------------------------------------------------------------------------------------------------


async def test_nothing_to_resume(rig: Rig) -> None:
    await refused(rig, "it has no copy that was cancelled or lost")
    await rig.copy("vda")
    with pytest.raises(errors.DiskBusy):
        await rig.copy("vda", resume=True)
    await rig.finish("vda")
    await refused(rig, "neither cancelled nor lost, but finished")
    await rig.snapshot("s1", ["vdb"])
    await rig.ask(ask.DeleteSnapshot(domain="vm1", snapshot="s1", flags=SnapshotDelete.REMOVE_MIRROR))
    await refused(rig, "it has no copy", "vdb")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(512))


def replace(path: Path) -> None:
    shutil.copy2(path, f"{path}.new")
    Path(f"{path}.new").rename(path)


@pytest.mark.parametrize("touch", [append, replace, Path.touch, lambda path: path.chmod(0o640)])
async def test_a_destination_that_was_touched(left: Rig, touch: Callable[[Path], None]) -> None:
    touch(left.dest("vda"))
    await refused(left, "it was touched since it was closed")


async def test_other_wishes(left: Rig) -> None:
    await refused(left, "its last copy went to", dest=left.dest("vdb"))
    await refused(left, "it has no copy that was cancelled", "vdb", dest=left.dest("vda"))
    await refused(left, "it is qcow2", format="raw")
    for wish in {"base": str(left.source("vdb"))}, {"flags": BlockCopy.REUSE_EXT}, {"flags": BlockCopy.SHALLOW}:
        with pytest.raises((errors.BadRequest, errors.ImageUnsuitable)):
            await left.copy("vda", resume=True, **wish)
    left.dest("vda").unlink()
    with pytest.raises(errors.ImageUnsuitable, match="does not exist"):
        await left.copy("vda", resume=True)


async def test_a_snapshot_taken_meanwhile(left: Rig) -> None:
    await left.snapshot("s1", only=["vda"])
    await refused(left, f"the disk is on {left.layer('vda', 1)} now, and {left.source('vda')} was copied")
    assert await bitmaps(left) == {}, "nobody will use it any more"


async def test_an_account_that_somebody_removed(left: Rig) -> None:
    (name,) = await bitmaps(left)
    await left.guest.command("block-dirty-bitmap-remove", {"node": "d0", "name": name})
    await refused(left, "QEMU has kept no account of what was written since")


async def test_an_account_that_somebody_stopped(left: Rig) -> None:
    (name,) = await bitmaps(left)
    await left.guest.command("block-dirty-bitmap-disable", {"node": "d0", "name": name})
    await refused(left, "QEMU has kept no account of what was written since")


async def test_another_qemu_process(left: Rig) -> None:
    await left.guest.stop()
    async with TestQemu(
        left.qemu, left.path, args=blockdev_disk("d0", left.source("vda"), "qcow2"), paused=False
    ) as again:
        left.guest = again
        await left.reattach()
        await refused(left, "QEMU has kept no account of what was written since")


async def test_copies_of_which_nothing_is_known(rig: Rig, device: Path) -> None:
    """Whatever was on them before, or what was written in part, may look as if it had been copied."""
    await rig.copy("vda", format="raw", granularity=512)
    await cancel(rig)
    await refused(rig, "allocates 4096 bytes at once")
    shutil.copyfile(rig.source("vdb"), rig.dest("vdb"))
    await rig.copy("vdb", flags=BlockCopy.REUSE_EXT)
    await cancel(rig, "vdb")
    await refused(rig, "what it held when its copy began", "vdb")
    await rig.copy("sda", device, format="qcow2")
    await cancel(rig, "sda")
    await refused(rig, "what it held when its copy began", "sda", dest=device)
    assert len(await bitmaps(rig)) == 1


async def test_a_copy_onto_a_base(rig: Rig) -> None:
    await rig.layers(1, only=["vda"])
    await rig.copy("vda", base=rig.layer("vda", 0))
    await cancel(rig)
    await refused(rig, "only whole copies are resumed")


async def test_a_copy_to_an_export(rig: Rig) -> None:
    remote = rig.dst / "remote"
    remote.write_bytes(bytes(SIZE))
    async with rig.server(remote) as server:
        await rig.copy("vda", server.uri)
        await cancel(rig)
        await refused(rig, "what an export holds", dest=server.uri)


async def test_a_given_image_that_was_empty(rig: Rig) -> None:
    with rig.dest("vdb").open("wb") as file:
        file.truncate(SIZE)
    await rig.copy("vdb", flags=BlockCopy.REUSE_EXT, bandwidth=SLOW, buf_size=64 * KIB)
    await cancel(rig, "vdb")
    await rig.write("vdb", 0x71, MIB)
    await rig.copy("vdb", resume=True)
    await pivots(rig, "vdb", "raw")


# --- nothing is left behind -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ALL)
async def test_begun_anew(rig: Rig, target: str) -> None:
    await rig.copy(target)
    await cancel(rig, target)
    (first,) = await bitmaps(rig)
    rig.dest(target).unlink()
    await rig.copy(target)
    await rig.settled()  # what nobody needs is removed by the next look
    (second,) = await bitmaps(rig)
    assert first != second
    await pivots(rig, target, FORMATS[target])


async def test_a_guest_that_is_let_go(left: Rig) -> None:
    await left.ask(ask.Detach(domain="vm1"))
    assert await bitmaps(left) == {}


async def test_a_qemu_without_bitmaps(faulty: Rig) -> None:
    """A copy works as it always did; it can't be resumed."""
    assert faulty.proxy is not None
    faulty.proxy.inject(Fault("block-dirty-bitmap-merge", FaultKind.HIDE))
    await faulty.reopen_service()
    await faulty.copy("vda")
    assert await bitmaps(faulty) == {}
    await cancel(faulty)
    await refused(faulty, "what was written since, is not known")
