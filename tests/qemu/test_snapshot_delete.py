"""What becomes of a snapshot and its mirrors: reopen, remove, forget; and when it is refused."""

import shutil
from pathlib import Path

import pytest
from rig import ALL, FORMATS, MIB, SIZE, Rig, header

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.flags import SnapshotDelete
from blockferry.testing import check_image, make_image

REOPEN, REMOVE, METADATA = SnapshotDelete.REOPEN_MIRROR, SnapshotDelete.REMOVE_MIRROR, SnapshotDelete.METADATA_ONLY


async def snapshots(rig: Rig) -> list[str]:
    return [each.name for each in (await rig.ask(ask.ListSnapshots(domain="vm1"))).snapshots]


async def test_reopen_on_the_shared_base(either: Rig) -> None:
    before = await either.status()
    await either.snapshot(mirrors=ALL)
    for target in ALL:
        await either.write(target, 0x31, 2 * MIB)
    done = await either.delete("s1", REOPEN)
    assert (done.pause_ms is None) == (before == "prelaunch")
    assert await either.status() == before
    for target in ALL:
        assert await either.chain(target) == [f"{either.dst}/{target}.s1", f"{either.path}/{target}.img"]
        await either.write(target, 0x32, 5 * MIB)
    assert await snapshots(either) == []
    assert await either.states() == dict.fromkeys(ALL, "pivoted")
    assert await either.qemu_jobs() == {}
    # The images that the guest has left are closed: somebody else can open them for writing.
    assert not [
        name
        for name, node in (await either.nodes()).items()
        if node["file"].endswith(".s1") and "/dst/" not in node["file"]
    ]
    await either.guest.stop()
    for target in ALL:
        assert either.holds(target, either.dst / f"{target}.s1", "qcow2")
        assert not either.holds(target, either.path / f"{target}.s1", "qcow2")
        check_image(either.qemu, either.dst / f"{target}.s1", "qcow2")


async def test_reopen_on_own_bases(rig: Rig) -> None:
    """The proposal's migration: the base is copied by the caller while the guest writes to both overlays."""
    backing = {target: rig.dst / f"{target}.base" for target in ALL}
    await rig.snapshot(mirrors=ALL, backing=backing)
    for target in ALL:
        await rig.write(target, 0x33, 4 * MIB)
        shutil.copyfile(rig.source(target), backing[target])
    await rig.delete("s1", REOPEN)
    for target in ALL:
        assert await rig.chain(target) == [f"{rig.dst}/{target}.s1", f"{rig.dst}/{target}.base"]
    # Nothing of the old storage is open any more.
    assert not [node["file"] for node in (await rig.nodes()).values() if "/dst/" not in node["file"]]
    await rig.guest.stop()
    for target in ALL:
        rig.source(target).unlink()
        assert rig.holds(target, rig.dst / f"{target}.s1", "qcow2")


async def test_reopen_on_a_base_with_a_chain_of_its_own(rig: Rig) -> None:
    await rig.snapshot("s0", only=["vda"])
    await rig.write("vda", 0x34, MIB)
    top = rig.dst / "vda.base"
    await rig.snapshot("s1", mirrors=["vda"], only=["vda"], backing={"vda": top})
    shutil.copyfile(rig.source("vda"), rig.dst / "lowest")
    await rig.write("vda", 0x35, 6 * MIB)
    shutil.copyfile(rig.path / "vda.s0", top)
    rebase(rig, top, rig.dst / "lowest")
    await rig.delete("s1", REOPEN)
    assert await rig.chain("vda") == [f"{rig.dst}/vda.s1", str(top), f"{rig.dst}/lowest"]
    await rig.guest.stop()
    assert rig.holds("vda", rig.dst / "vda.s1", "qcow2")


def rebase(rig: Rig, image: Path, onto: Path) -> None:
    import subprocess

    command = [rig.qemu.img, "rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", onto, image]
    subprocess.run(command, check=True, timeout=20)


async def refused(
    rig: Rig, kind: type[errors.BlockferryError], match: str, flags: int = REOPEN, timeout: float = 5
) -> None:
    """Refused: the same chains, XML, jobs and files as before, and the mirrors work on."""
    before = await rig.state()
    with pytest.raises(kind, match=match) as caught:
        await rig.delete("s1", flags, timeout)
    assert caught.value.outcome == "refused"
    assert await rig.state() == before
    assert await rig.pauses_heard() == []
    assert "s1" in await snapshots(rig)


async def test_reopen_of_a_backing_that_is_not_there(rig: Rig) -> None:
    await rig.snapshot(mirrors=["vda"], backing={"vda": rig.dst / "base"})
    await rig.ready("vda")
    await refused(rig, errors.ImageUnsuitable, "base can't be used: No such file")


async def test_reopen_of_a_backing_that_is_not_whole(rig: Rig) -> None:
    base = rig.dst / "base"
    await rig.snapshot(mirrors=["vda"], backing={"vda": base})
    await rig.ready("vda")
    make_image(rig.qemu, base, "qcow2", SIZE - MIB)
    await refused(rig, errors.ImageUnsuitable, f"not whole: {SIZE - MIB} bytes")
    # Once it is whole, the same reopen goes through.
    shutil.copyfile(rig.source("vda"), base)
    await rig.delete("s1", REOPEN)
    assert await rig.chain("vda") == [f"{rig.dst}/vda.s1", str(base)]


async def test_reopen_of_a_raw_backing_that_is_cut_off(rig: Rig) -> None:
    base = rig.dst / "base"
    await rig.snapshot(mirrors=["vdb"], backing={"vdb": base})
    await rig.ready("vdb")
    base.write_bytes(rig.source("vdb").read_bytes()[: SIZE // 2])
    await refused(rig, errors.ImageUnsuitable, "not whole")


async def test_reopen_of_a_backing_whose_own_chain_is_broken(rig: Rig) -> None:
    base = rig.dst / "base"
    await rig.snapshot(mirrors=["vda"], backing={"vda": base})
    await rig.ready("vda")
    below = make_image(rig.qemu, rig.dst / "below", "qcow2", SIZE)
    make_image(rig.qemu, base, "qcow2", backing=below, backing_fmt="qcow2")
    below.unlink()
    await refused(rig, errors.ImageUnsuitable, "below can't be used")


@pytest.mark.parametrize("name", ["json:{}", "nbd://127.0.0.1/x", "base"])
async def test_reopen_of_a_backing_that_leads_elsewhere(rig: Rig, name: str) -> None:
    """A header may name anything: what is no plain file, or a loop, is not followed."""
    base = rig.dst / "base"
    await rig.snapshot(mirrors=["vda"], backing={"vda": base})
    await rig.ready("vda")
    make_image(rig.qemu, base, "qcow2", SIZE)
    rebase(rig, base, Path(name))
    await refused(rig, errors.ImageUnsuitable, "can't be used")


async def test_not_current(rig: Rig) -> None:
    await rig.snapshot()
    await rig.snapshot("s2")
    await refused(rig, errors.NoMirror, "none was asked for")


async def test_not_current_with_mirrors(rig: Rig) -> None:
    """s1 has a mirror that was lost, so that a newer snapshot could be taken on top."""
    await rig.snapshot(mirrors=["vda"])
    await rig.ready("vda")
    (job,) = await rig.qemu_jobs()
    await rig.guest.command("job-cancel", {"id": job})
    await rig.heard("mirror-dropped", "vda")
    await rig.snapshot("s2")
    await refused(rig, errors.SnapshotNotCurrent, "vda is on .*vda.s2")


async def test_a_newer_snapshot_of_a_mirrored_disk_is_refused(rig: Rig) -> None:
    await rig.snapshot(mirrors=["vda"])
    await rig.ready("vda")
    before = await rig.state()
    with pytest.raises(errors.DiskBusy, match="vda"):
        await rig.snapshot("s2")
    assert await rig.state() == before


async def test_mirror_that_is_not_ready_in_time(rig: Rig) -> None:
    await rig.snapshot(mirrors=["vda", "vdb"])
    await rig.ready("vda", "vdb")
    job = next(name for name in await rig.qemu_jobs() if "-vdb-" in name)
    await rig.guest.command("job-pause", {"id": job})
    await refused(rig, errors.JobNotReady, "mirror of vdb is not ready after 0.2 s", timeout=0.2)
    await rig.guest.command("job-resume", {"id": job})
    await rig.delete("s1", REOPEN)
    assert (await rig.chain("vdb"))[0] == f"{rig.dst}/vdb.s1"


async def test_lost_mirror_is_no_mirror(rig: Rig) -> None:
    await rig.snapshot(mirrors=["vda", "vdb"])
    await rig.ready("vda", "vdb")
    job = next(name for name in await rig.qemu_jobs() if "-vdb-" in name)
    await rig.guest.command("job-cancel", {"id": job})
    await rig.heard("mirror-dropped", "vdb")
    await rig.settled()
    await refused(rig, errors.NoMirror, "that of vdb is lost")
    # The one that works is dropped with the lost one; nothing of them stays open.
    await rig.delete("s1", REMOVE)
    assert await rig.qemu_jobs() == {}
    assert await rig.states() == dict.fromkeys(("vda", "vdb"), "removed")


async def test_remove_mirror(either: Rig) -> None:
    await either.snapshot(mirrors=ALL)
    await either.ready(*ALL)
    await either.delete("s1", REMOVE)
    dropped = {event.disk: event.data["reason"] for event in await either.events("mirror-dropped")}
    assert dropped == dict.fromkeys(ALL, "on request")
    assert await either.qemu_jobs() == {}
    assert not [name for name in await either.our_nodes() if "-x" in name or name.endswith("-t")]
    for target in ALL:
        assert await either.chain(target) == [f"{either.path}/{target}.s1", f"{either.path}/{target}.img"]
        assert (await either.disks())[target].mirror is None
        assert (either.dst / f"{target}.s1").exists()
        await either.write(target, 0x36)
    assert await snapshots(either) == ["s1"]
    assert await either.pauses_heard() == []
    await refused(either, errors.NoMirror, "none is left", REMOVE)
    await either.delete("s1", METADATA)


@pytest.mark.parametrize("flags", [0, METADATA])
async def test_plain_delete_names_both_ways(rig: Rig, flags: int) -> None:
    await rig.snapshot(mirrors=["vda"])
    await rig.ready("vda")
    await refused(rig, errors.SnapshotHasMirrors, "--reopen-mirror.*--remove-mirror", flags)


async def test_delete_without_mirrors(rig: Rig) -> None:
    await rig.snapshot()
    await refused(rig, errors.NoMirror, "none was asked for", REOPEN)
    await refused(rig, errors.NoMirror, "none is left", REMOVE)
    await refused(rig, errors.BadRequest, "contradict", REOPEN | REMOVE)
    await refused(rig, errors.SnapshotNotMergeable, "no children", SnapshotDelete.CHILDREN_ONLY)
    files = rig.files()
    await rig.delete("s1", METADATA)
    assert await snapshots(rig) == []
    assert rig.files() == files
    assert await rig.chain("vda") == [f"{rig.path}/vda.s1", f"{rig.path}/vda.img"]
    with pytest.raises(errors.NoSuchSnapshot):
        await rig.delete("s1", METADATA)
    assert [event.data["snapshot"] for event in await rig.events("snapshot-deleted")] == ["s1"]
    # Its name is free again, and the forgotten overlay is nobody's parent.
    assert (await rig.snapshot("s1", folder=rig.dst)).parent is None


async def test_header_backing_format(rig: Rig) -> None:
    await rig.snapshot(mirrors=["vdb"], backing={"vdb": rig.dst / "base"})
    assert header(rig.qemu, rig.dst / "vdb.s1")["backing-filename-format"] == FORMATS["vdb"]
