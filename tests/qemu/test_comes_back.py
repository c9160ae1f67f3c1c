"""An attached guest whose QEMU ended with mirrors comes back under the same name: its mirrors are offered, and go on."""

from pathlib import Path

import pytest
from rig import MIB, SIZE, Rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.flags import SnapshotDelete
from blockferry.testing import TestQemu, blockdev_disk, legacy_drive


async def comes_back(rig: Rig, *, chains: dict[str, str] | None = None) -> TestQemu:
    """QEMU is killed; then somebody starts it again, on the images that the guest was on."""
    where = {target: (await rig.chain(target))[0] for target in ("vda", "vdb", "sda")} | (chains or {})
    await rig.guest.kill()
    await rig.heard("domain-gone")
    guest = TestQemu(rig.qemu, rig.path, args=arguments(where), paused=False)
    await guest.start()
    rig.guest = guest
    return guest


def arguments(where: dict[str, str]) -> list[str]:
    formats = {target: "raw" if Path(file).name == "vdb.img" else "qcow2" for target, file in where.items()}
    return [
        *blockdev_disk("d0", Path(where["vda"]), formats["vda"], iothread="io0"),
        *legacy_drive(Path(where["vdb"]), formats["vdb"]),
        *blockdev_disk("d2", Path(where["sda"]), formats["sda"], bus="scsi", iothread="io1"),
    ]


async def mirrored(rig: Rig) -> None:
    """vda by a snapshot, vdb by a copy; what was written is on disk."""
    await rig.snapshot("s1", ["vda"], only=["vda"])
    await rig.copy("vdb", format="raw")
    await rig.write("vda", 0x51, 3 * MIB)
    await rig.write("vdb", 0x52, 4 * MIB)
    await rig.ready("vda", "vdb")
    await rig.guest.command("stop")
    await rig.guest.command("cont")


async def attach(rig: Rig, **more: bool) -> view.DomainView:
    return await rig.ask(ask.Attach(domain="vm1", qmp=str(rig.guest.qmp), **more))


async def test_they_are_offered_and_go_on(rig: Rig) -> None:
    await mirrored(rig)
    guest = await comes_back(rig)
    try:
        offered = await attach(rig)
        assert [note.split()[0] for note in offered.notes] == ["vda", "vdb"]
        assert all("--resume-mirrors" in note for note in offered.notes)
        assert set((await rig.states()).values()) == {"lost"}
        found: view.Findings = await rig.ask(ask.Doctor(domain="vm1"))
        lost = {each.disk: each.next for each in found.findings if each.code == "mirror-lost"}
        again = f"blockferry attach vm1 --qmp {rig.guest.qmp} --resume-mirrors"
        assert lost == {"vda": (again, "blockferry snapshot delete vm1 s1 --remove-mirror"), "vdb": (again,)}
        resumed = await attach(rig, resume_mirrors=True)
        assert [note.rpartition(" ")[2] for note in resumed.notes] == ["again", "again"]
        await rig.ready("vda", "vdb")
        jobs = await rig.jobs()
        assert (jobs["vda"].current or 0) <= MIB, "the overlay, not the disk"
        assert (jobs["vdb"].current or 0) >= SIZE // 2
        assert (await attach(rig)).notes == ()
        await rig.write("vda", 0x61, 5 * MIB)
        await rig.write("vdb", 0x62, 6 * MIB)
        await rig.pivot("vdb")
        await rig.delete("s1", SnapshotDelete.REOPEN_MIRROR)
        await guest.stop()
        assert rig.holds("vda", rig.dst / "vda.s1", "qcow2")
        assert rig.holds("vdb", rig.dest("vdb"), "raw")
    finally:
        await guest.stop()


async def test_each_for_itself(rig: Rig) -> None:
    """One destination is gone, and the other goes on."""
    await mirrored(rig)
    guest = await comes_back(rig)
    try:
        (rig.dst / "vda.s1").unlink()
        notes = (await attach(rig, resume_mirrors=True)).notes
        assert notes[0].endswith("can't be mirrored to " + str(rig.dst / "vda.s1") + " again: it is not there any more")
        assert notes[1].endswith("again")
        assert (await rig.states())["vda"] == "lost"
        await rig.ready("vdb")
    finally:
        await guest.stop()


async def test_a_disk_that_is_on_another_image(rig: Rig) -> None:
    await mirrored(rig)
    guest = await comes_back(rig, chains={"vda": str(rig.source("vda"))})
    try:
        before = await rig.our_nodes()
        notes = (await attach(rig, resume_mirrors=True)).notes
        assert f"the disk is on {rig.source('vda')} now" in notes[0]
        assert not [name for name in await rig.our_nodes() - before if "-vda-" in name]
    finally:
        await guest.stop()


async def test_a_detached_name_keeps_them(rig: Rig) -> None:
    """Whoever gives the guest another socket detaches the old one first."""
    await mirrored(rig)
    guest = await comes_back(rig)
    try:
        await rig.ask(ask.Detach(domain="vm1"))
        with pytest.raises(errors.NoSuchDomain):
            await rig.show()
        assert len((await attach(rig)).notes) == 2
    finally:
        await guest.stop()
