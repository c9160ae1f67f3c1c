"""Block copies: to files and NBD, pivoted, finished and cancelled, one disk and several at one instant."""

import asyncio
from pathlib import Path

import pytest
from rig import ALL, FORMATS, KIB, MIB, SIZE, Rig, open_rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.flags import BlockCopy
from blockferry.testing import (
    NbdServer,
    QemuBinaries,
    blockdev_disk,
    check_image,
    compare_images,
    make_image,
    write_pattern,
)

BIG = 256 * MIB
SLOW = 64 * KIB  # bytes per second: a full disk does not get ready while a test looks at it


async def test_pivot_of_three_at_once(either: Rig) -> None:
    before = await either.status()
    formats = {"vda": "raw", "vdb": "qcow2", "sda": "qcow2"}
    for target, fmt in formats.items():
        job = await either.copy(target, format=fmt)
        assert (job.source, job.dest, job.format) == (str(either.source(target)), str(either.dest(target)), fmt)
    for target in ALL:
        await either.write(target, 0x21, 3 * MIB)
    assert await either.pauses_heard() == []
    done = await either.pivot(*ALL)
    assert await either.pauses_heard() == ([] if before == "prelaunch" else either.pauses_of_a_window)
    assert (done.pause_ms is None) == (before == "prelaunch")
    assert await either.status() == before
    for target in ALL:
        (image,) = (await either.disks())[target].chain
        assert (image.file, image.format, image.virtual_size) == (str(either.dest(target)), formats[target], SIZE)
    assert await either.states() == dict.fromkeys(ALL, "pivoted")
    assert await either.qemu_jobs() == {}
    assert not [node["file"] for node in (await either.nodes()).values() if node["file"].endswith(".img")]
    sources = {target: either.digest(target) for target in ALL}
    for target in ALL:
        await either.write(target, 0x22, 6 * MIB)
    await either.guest.stop()
    for target, fmt in formats.items():
        assert either.holds(target, either.dest(target), fmt)
        assert either.digest(target) != sources[target]
        check_image(either.qemu, either.dest(target), fmt)


async def test_a_copy_makes_way_for_a_guest_that_is_at_work(qemu: QemuBinaries, tmp_path: Path) -> None:
    async with open_rig(qemu, tmp_path, paused=True, proxy=True) as rig, rig.working("vda"):
        await rig.copy("vdb")
        await rig.copy("sda", buf_size=MIB)
        assert rig.in_flight() == [4 * MIB, MIB]
        async with asyncio.timeout(60):
            # On a machine that is busy elsewhere the guest's last write may have been a while ago: then once more.
            while rig.in_flight()[-1] != MIB // 2:
                await rig.copy("vda", rig.dst / f"copy{len(rig.in_flight())}")
                await rig.ask(ask.CancelJobs(domain="vm1", disks=("vda",)))


async def test_a_copy_that_holds_writes_makes_no_way(qemu: QemuBinaries, tmp_path: Path) -> None:
    async with open_rig(qemu, tmp_path, paused=True, proxy=True) as rig, rig.working("vda"):
        await rig.copy("vda", flags=BlockCopy.SYNCHRONOUS_WRITES)
        assert rig.in_flight() == [4 * MIB]


async def test_finish_of_two_at_once(either: Rig) -> None:
    before = await either.status()
    await either.copy("vda")
    await either.copy("vdb")
    await either.write("vda", 0x23, 2 * MIB)
    await either.write("vdb", 0x24, 2 * MIB)
    await either.finish("vda", "vdb")
    instant = {target: either.digest(target) for target in ("vda", "vdb")}
    for target in ("vda", "vdb"):
        assert await either.chain(target) == [str(either.source(target))]
        assert either.holds(target, either.dest(target), FORMATS[target])  # closed: it can be read while the guest runs
        check_image(either.qemu, either.dest(target), FORMATS[target])
        await either.write(target, 0x25, 4 * MIB)
        assert either.digest(target) != instant[target]
    assert await either.status() == before
    assert await either.states() == {"vda": "finished", "vdb": "finished"}
    assert await either.our_nodes() == set()
    await either.guest.stop()
    assert either.holds("vda", either.source("vda"), "qcow2")


@pytest.mark.parametrize("target", ALL)
async def test_cancel(rig: Rig, target: str) -> None:
    before = await rig.state()
    await rig.copy(target, bandwidth=SLOW)
    done = await rig.ask(ask.CancelJobs(domain="vm1", disks=(target,)))
    assert str(rig.dest(target)) in done.text
    after = await rig.state()
    assert (after.chains, after.xml, after.jobs) == (before.chains, before.xml, before.jobs)
    assert await rig.our_nodes() == set()
    assert await rig.states() == {target: "cancelled"}
    assert rig.dest(target).exists()
    with pytest.raises(errors.NoSuchJob):
        await rig.pivot(target)
    await rig.write(target, 0x26)


async def test_copy_of_a_chain_stands_alone(rig: Rig) -> None:
    await rig.snapshot("s1")
    await rig.write("vdb", 0x27, MIB)
    await rig.copy("vdb", format="qcow2")
    await rig.pivot("vdb")
    assert await rig.chain("vdb") == [str(rig.dest("vdb"))]
    await rig.guest.stop()
    for name in ("vdb.s1", "vdb.img"):
        (rig.path / name).unlink()
    assert rig.holds("vdb", rig.dest("vdb"), "qcow2")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("source", ["raw", "qcow2"])
async def test_holes_are_kept(qemu: QemuBinaries, tmp_path: Path, source: str, fmt: str) -> None:
    big = make_image(qemu, tmp_path / "big", source, BIG)
    write_pattern(qemu, big, source, 100 * MIB, MIB, 0x61)
    write_pattern(qemu, big, source, BIG - MIB, MIB, 0x62)
    async with open_rig(qemu, tmp_path, args=blockdev_disk("big", big, source, addr="0x1e")) as rig:
        await rig.copy(str(big), rig.dst / "big", format=fmt)
        await rig.finish(str(big))
        assert (rig.dst / "big").stat().st_blocks * 512 < 8 * MIB
        await rig.guest.stop()
        assert compare_images(qemu, big, source, rig.dst / "big", fmt)


async def test_create_raw(rig: Rig) -> None:
    job = await rig.copy("vda", flags=BlockCopy.CREATE_RAW)
    assert job.format == "raw"
    await rig.finish("vda")
    assert rig.holds("vda", rig.dest("vda"), "raw")
    with pytest.raises(errors.BadRequest, match="contradict"):
        await rig.copy("vda", rig.dst / "x", flags=BlockCopy.CREATE_RAW, format="qcow2")


@pytest.mark.parametrize("target", ALL)
async def test_nbd_destination(rig: Rig, target: str) -> None:
    image = make_image(rig.qemu, rig.dst / "remote", "qcow2", SIZE)
    async with rig.server(image, "qcow2") as server:
        job = await rig.copy(target, server.uri)
        assert (job.dest, job.format) == (server.uri, "raw")
        assert job.notes == (f"{server.uri} is an NBD export: what was on it is overwritten",)
        xml = (await rig.show()).xml or ""
        assert f'<host transport="unix" socket="{server.socket}"/>' in xml.partition("<mirror")[2]
        await rig.write(target, 0x28, 2 * MIB)
        await rig.pivot(target)
        await rig.write(target, 0x29, 4 * MIB)
        await rig.guest.stop()
    assert rig.holds(target, image, "qcow2")


async def test_nbd_export_that_is_another_when_qemu_opens_it(faulty: Rig) -> None:
    """The server was asked, and a smaller export is there by then: QEMU's node is looked at again."""
    small = make_image(faulty.qemu, faulty.dst / "small", "raw", SIZE - MIB)
    before = await faulty.state()
    gate = faulty.proxy.pause_before("blockdev-add")
    image = make_image(faulty.qemu, faulty.path / "state/image", "raw", SIZE)
    async with faulty.server(image) as server:
        copy = asyncio.create_task(faulty.copy("vda", server.uri))
        await gate.reached()
    async with faulty.server(small):
        gate.release()
        with pytest.raises(errors.OperationFailed, match=f"the destination has {SIZE - MIB} bytes, the disk {SIZE}"):
            await copy
    assert await faulty.state() == before
    assert await faulty.our_nodes() == set()


async def test_nbd_server_that_serves_one_client_and_ends(rig: Rig) -> None:
    """qemu-nbd without --persistent: that it was asked for the export's size first is no client to it."""
    image = make_image(rig.qemu, rig.dst / "remote", "raw", SIZE)
    async with NbdServer(rig.qemu, image, "raw", rig.path, name="t", once=True) as server:
        await rig.copy("vda", server.uri)
        await rig.finish("vda")
        await server.ended()
    assert rig.holds("vda", image, "raw")


async def test_one_job_a_disk(rig: Rig) -> None:
    await rig.copy("vda")
    await rig.ready("vda")
    before = await rig.state()
    with pytest.raises(errors.DiskBusy, match="vda"):
        await rig.copy("vda", rig.dst / "second")
    with pytest.raises(errors.DiskBusy, match="vda"):
        await rig.snapshot("s1")
    assert await rig.state() == before
    await rig.finish("vda")
    await rig.snapshot("s1")


async def test_not_ready_in_time_goes_on(rig: Rig) -> None:
    await rig.write("vda", 0x60, 0, SIZE)
    await rig.copy("vda", bandwidth=SLOW)
    with pytest.raises(errors.JobNotReady, match=r"vda is not ready after 0\.1 s .*copying, [0-9]+ of [0-9]+ bytes"):
        await rig.pivot("vda", timeout=0.1)
    job = (await rig.jobs())["vda"]
    assert (job.state, job.speed) == ("copying", SLOW)
    assert await rig.chain("vda") == [str(rig.source("vda"))]
    assert await rig.pauses_heard() == []
    # The limit can be lifted while a pivot waits for it.
    waiting = asyncio.create_task(rig.pivot("vda"))
    await rig.ask(ask.SetJobSpeed(domain="vm1", disk="vda", bandwidth=0))
    await waiting
    assert await rig.chain("vda") == [str(rig.dest("vda"))]


async def test_pivot_of_two_where_one_is_not_ready(rig: Rig) -> None:
    await rig.copy("vda")
    await rig.write("vdb", 0x60, 0, SIZE)
    await rig.copy("vdb", bandwidth=SLOW)
    job = next(name for name in await rig.qemu_jobs() if "-vdb-" in name)
    await rig.guest.command("job-pause", {"id": job})  # the drain of another disk's window would wake a limited job
    await rig.ready("vda")
    with pytest.raises(errors.JobNotReady, match="vdb"):
        await rig.pivot("vda", "vdb", timeout=0.1)
    assert await rig.chain("vda") == [str(rig.source("vda"))]
    assert await rig.states() == {"vda": "ready", "vdb": "copying"}
    await rig.pivot("vda")
    assert (await rig.jobs())["vdb"].state == "copying"


async def test_a_copy_is_in_progress_until_it_ends(rig: Rig) -> None:
    job = await rig.copy("vda")
    going_on = await rig.operation(job.operation)
    assert going_on.state == "in-progress"
    assert going_on.next == tuple(f"blockferry job {verb} vm1 vda" for verb in ("pivot", "finish", "cancel"))
    assert rig.service.has_work()
    await rig.pivot("vda")
    ended = await rig.operation(job.operation)
    assert (ended.state, ended.next) == ("done", ())
    assert not rig.service.has_work()


async def test_pivot_of_a_snapshots_mirror_names_the_way(rig: Rig) -> None:
    await rig.snapshot(mirrors=["vda"])
    for end in (rig.pivot, rig.finish):
        with pytest.raises(errors.BadRequest, match="--reopen-mirror"):
            await end("vda")


async def test_named_twice_is_once(rig: Rig) -> None:
    await rig.copy("vda")
    await rig.pivot("vda", str(rig.source("vda")))
    assert await rig.chain("vda") == [str(rig.dest("vda"))]


async def test_dry_run(rig: Rig) -> None:
    before = await rig.state()
    plan = await rig.ask(ask.StartCopy(domain="vm1", disk="vda", dest=str(rig.dest("vda")), dry_run=True))
    assert any(line.startswith("prepare: mirror vda: d0 to") for line in plan.steps)
    assert await rig.state() == before
    assert await rig.operations() == []


async def test_back_and_forth(rig: Rig) -> None:
    """A disk that was moved can be moved again, also a legacy one whose first node is gone."""
    for turn in range(3):
        for target in ALL:
            await rig.copy(target, rig.dst / f"{target}.{turn}", format="qcow2" if turn % 2 else "raw")
        await rig.pivot(*ALL)
        await rig.write("vdb", turn + 1, turn * MIB)
    assert len(await rig.our_nodes()) == 6
    await rig.guest.stop()
    for target in ALL:
        assert rig.holds(target, rig.dst / f"{target}.2", "raw")


async def test_progress_is_published(rig: Rig) -> None:
    await rig.write("vda", 0x60, 0, SIZE)
    await rig.copy("vda", bandwidth=SLOW)
    async with asyncio.timeout(10):
        async for event in rig.service.watch("vm1", None):
            if event.type == "progress":
                break
    assert (event.seq, event.disk, event.data["state"]) == (0, "vda", "copying")
    assert 0 <= event.data["current"] <= event.data["total"]
    assert await rig.events("progress") == []  # never recorded
