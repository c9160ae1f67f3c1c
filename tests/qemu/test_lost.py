"""Mirrors that are lost, with us watching and with nobody watching; QEMU that is killed."""

import asyncio
import contextlib
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError
from rig import ALL, FORMATS, MIB, SIZE, Rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.flags import SnapshotDelete
from blockferry.service import Service
from blockferry.testing import TestQemu, blockdev_disk, legacy_drive, make_image

LIST = ask.ListEvents()


async def job_of(rig: Rig, target: str) -> str:
    return next(name for name in await rig.qemu_jobs() if f"-{target}-m" in name)


def remote(rig: Rig) -> Path:
    return make_image(rig.qemu, rig.dst / "remote", "raw", SIZE)


@pytest.mark.parametrize("target", ALL)
async def test_server_killed_while_it_copies(either: Rig, target: str) -> None:
    before = await either.status()
    async with either.server(remote(either)) as server:
        await either.copy(target, server.uri)
        await either.ready(target)
        await server.kill()
        await either.write(target, 0x11, MIB)
        dropped = await either.heard("mirror-dropped", target)
    await either.settled()
    job = (await either.jobs())[target]
    assert job.state == "lost"
    assert job.reason == dropped.data["reason"]
    assert job.reason == "Input/output error"  # QEMU's own words
    assert await either.status() == before
    assert await either.pauses_heard() == []
    assert await either.qemu_jobs() == {}
    assert await either.our_nodes() == set()
    await either.write(target, 0x12, 2 * MIB)
    assert len(await either.events("mirror-dropped")) == 1
    with pytest.raises(errors.JobLost, match="Input/output error"):
        await either.pivot(target)
    # A new copy of the disk takes the lost one's place.
    await either.copy(target)
    await either.pivot(target)
    await either.guest.stop()
    assert either.holds(target, either.dest(target), FORMATS[target])


async def test_lost_mirror_in_the_xml_and_the_chain(rig: Rig) -> None:
    async with rig.server(remote(rig)) as server:
        await rig.copy("vda", server.uri)
        await rig.ready("vda")
        await server.kill()
        await rig.write("vda", 0x13)
        await rig.heard("mirror-dropped", "vda")
    shown = (await rig.disks())["vda"]
    assert shown.mirror is not None
    assert (shown.mirror.state, shown.mirror.reason) == ("lost", "Input/output error")
    assert "<mirror" not in ((await rig.show()).xml or "")
    assert [image.file for image in shown.chain] == [str(rig.source("vda"))]


async def test_a_pivot_that_waits_learns_of_the_loss(rig: Rig) -> None:
    async with rig.server(remote(rig)) as server:
        await rig.write("vda", 0x14, 0, SIZE)
        await rig.copy("vda", server.uri, bandwidth=1)
        waiting = asyncio.create_task(rig.pivot("vda"))
        await server.kill()
        job = await job_of(rig, "vda")
        with contextlib.suppress(ExecuteError):  # it may have noticed by itself
            await rig.guest.command("block-job-set-speed", {"device": job, "speed": 0})
        with pytest.raises(errors.JobLost, match="vda was lost: Input/output error"):
            await waiting
    assert await rig.chain("vda") == [str(rig.source("vda"))]


@pytest.mark.parametrize("force", [True, False])
async def test_cancelled_behind_our_back(rig: Rig, force: bool) -> None:
    for target in ALL:
        await rig.copy(target)
    await rig.ready(*ALL)
    job = await job_of(rig, "vdb")
    await rig.guest.command("block-job-cancel", {"device": job, "force": force})
    dropped = await rig.heard("mirror-dropped", "vdb")
    reason = "Operation canceled" if force else "somebody else ended its job"  # QEMU's words, where it has any
    assert dropped.data["reason"] == reason
    await rig.settled()
    assert await rig.states() == {"vda": "ready", "vdb": "lost", "sda": "ready"}
    assert not [name for name in await rig.our_nodes() if "-vdb-" in name]
    await rig.write("vdb", 0x15)  # which QEMU holds while a job waits for its finalize
    with pytest.raises(errors.JobLost, match=reason):
        await rig.pivot(*ALL)
    assert await rig.chain("vda") == [str(rig.source("vda"))]
    await rig.pivot("vda", "sda")


async def test_ended_and_dismissed_behind_our_back(rig: Rig) -> None:
    """A job that has vanished is a failure, never a success."""
    await rig.copy("vda")
    await rig.ready("vda")
    await rig.service.close()
    job = await job_of(rig, "vda")
    with rig.guest.control.listener("JOB_STATUS_CHANGE") as changes:
        await rig.guest.command("job-cancel", {"id": job})
        while (await rig.qemu_jobs())[job]["status"] != "concluded":
            await changes.get()
    await rig.guest.command("job-dismiss", {"id": job})
    await reopened(rig)
    (dropped,) = await rig.events("mirror-dropped")
    assert "vanished" in dropped.data["reason"]
    with pytest.raises(errors.JobLost, match="vanished"):
        await rig.pivot("vda")
    assert await rig.chain("vda") == [str(rig.source("vda"))]


async def reopened(rig: Rig) -> None:
    """A service on the same state directory, twice: the second finds nothing new."""
    rig.service = await Service.open(rig.path / "state")
    events = [(event.type, event.disk) for event in (await rig.service.submit(LIST)).events]
    await rig.reopen_service()
    again = [(event.type, event.disk) for event in (await rig.service.submit(LIST)).events]
    assert again == events


async def test_pivoted_behind_our_back(rig: Rig) -> None:
    """Whoever did it put the guest onto the destination: that image is not closed under it."""
    await rig.copy("vda")
    await rig.ready("vda")
    job = await job_of(rig, "vda")
    with rig.guest.control.listener("JOB_STATUS_CHANGE") as changes:
        await rig.guest.command("job-complete", {"id": job})
        while (await rig.qemu_jobs())[job]["status"] != "pending":
            await changes.get()
    await rig.guest.command("job-finalize", {"id": job})
    dropped = await rig.heard("mirror-dropped", "vda")
    assert "somebody else" in dropped.data["reason"]
    await rig.settled()
    assert await rig.chain("vda") == [str(rig.dest("vda"))]
    await rig.write("vda", 0x15)
    await rig.guest.stop()
    assert rig.holds("vda", rig.dest("vda"), "qcow2")


@pytest.mark.parametrize("how", ["server killed", "job cancelled"])
async def test_lost_while_nobody_watched_is_recorded_once(rig: Rig, how: str) -> None:
    async with rig.server(remote(rig)) as server:
        await rig.copy("vda", server.uri)
        await rig.copy("vdb")
        await rig.ready("vda", "vdb")
        await rig.service.close()
        with rig.guest.control.listener("JOB_STATUS_CHANGE") as changes:
            job = await job_of(rig, "vda")
            if how == "server killed":
                await server.kill()
                await rig.write("vda", 0x16)
            else:
                await rig.guest.command("job-cancel", {"id": job})
            while (await rig.qemu_jobs())[job]["status"] != "concluded":
                await changes.get()
        await reopened(rig)
    (dropped,) = await rig.events("mirror-dropped")
    assert dropped.disk == "vda"
    assert dropped.data["reason"] == ("Input/output error" if how == "server killed" else "Operation canceled")
    assert await rig.states() == {"vda": "lost", "vdb": "ready"}
    assert list(await rig.qemu_jobs()) == [await job_of(rig, "vdb")]
    await rig.pivot("vdb")


async def test_mirrors_go_on_while_nobody_watches(rig: Rig) -> None:
    await rig.snapshot(mirrors=ALL)
    await rig.service.close()
    for target in ALL:
        await rig.write(target, 0x17, 3 * MIB)
    await reopened(rig)
    assert await rig.states() == dict.fromkeys(ALL, "ready")
    await rig.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    await rig.guest.stop()
    for target in ALL:
        assert rig.holds(target, rig.dst / f"{target}.s1", "qcow2")


async def test_qemu_killed_while_we_watch(rig: Rig) -> None:
    await rig.copy("vda")
    await rig.snapshot("s1", mirrors=["vdb"], only=["vdb"])
    await rig.guest.kill()
    await rig.heard("domain-gone")
    assert {event.disk for event in await rig.events("mirror-dropped")} == {"vda", "vdb"}
    assert await rig.states() == {"vda": "lost", "vdb": "lost"}
    assert all("QEMU is gone" in (job.reason or "") for job in (await rig.jobs()).values())
    shown = await rig.show()
    assert (shown.state, shown.disks) == ("gone", ())
    assert not rig.service.has_work()
    await rig.reopen_service()
    await rig.settled()
    assert len(await rig.events("domain-gone")) == 1
    assert len(await rig.events("mirror-dropped")) == 2
    assert (await rig.show()).state == "gone"
    for request in (rig.copy("sda"), rig.snapshot("s2"), rig.pivot("vda")):
        with pytest.raises(errors.BlockferryError):
            await request


async def test_qemu_killed_while_nobody_watched(rig: Rig) -> None:
    await rig.copy("vda")
    await rig.service.close()
    await rig.guest.kill()
    await reopened(rig)
    assert len(await rig.events("domain-gone")) == 1
    (dropped,) = await rig.events("mirror-dropped")
    assert (dropped.disk, "QEMU is gone" in dropped.data["reason"]) == ("vda", True)
    assert (await rig.show()).state == "gone"


async def test_another_qemu_on_the_same_socket(rig: Rig) -> None:
    """The images' guest was started anew: the old one's mirrors are lost, its jobs are nobody's."""
    await rig.copy("vda")
    await rig.service.close()
    await rig.guest.kill()
    again = await started_again(rig)
    async with again:
        rig.guest = again
        await reopened(rig)
        assert len(await rig.events("domain-gone")) == 1
        assert await rig.states() == {"vda": "lost"}
        shown = await rig.show()
        assert (shown.state, shown.pid) == ("running", again.pid)
        await rig.copy("vda", rig.dst / "second")
        await rig.pivot("vda")


async def started_again(rig: Rig) -> TestQemu:
    disks = [
        *blockdev_disk("d0", rig.source("vda"), "qcow2", iothread="io0"),
        *legacy_drive(rig.source("vdb"), "raw"),
        *blockdev_disk("d2", rig.source("sda"), "qcow2", bus="scsi", iothread="io1"),
    ]
    return TestQemu(rig.qemu, rig.path, args=disks, paused=False)


async def test_somebody_elses_jobs_are_left_alone(rig: Rig) -> None:
    node = {"driver": "null-co", "node-name": "sink", "size": SIZE}
    await rig.guest.command("blockdev-add", node)
    await rig.guest.command("blockdev-mirror", {"job-id": "theirs", "device": "d0", "target": "sink", "sync": "full"})
    with pytest.raises(errors.DiskBusy):
        await rig.copy("vda")
    await rig.copy("vdb")
    await rig.reopen_service()
    await rig.settled()
    assert "theirs" in await rig.qemu_jobs()
    assert set(await rig.jobs()) == {"vdb"}
    await rig.pivot("vdb")
    assert "theirs" in await rig.qemu_jobs()
