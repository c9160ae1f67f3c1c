"""Snapshots of several disks at one instant, with and without mirrors, on a guest that runs or is paused."""

import re
from pathlib import Path

import pytest
from rig import ALL, FORMATS, MIB, SIZE, Rig, header, open_rig, wish_xml

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.flags import SnapshotCreate, SnapshotDelete
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.qemu.images import Images
from blockferry.testing import (
    QemuBinaries,
    blockdev_disk,
    blockdev_node,
    check_image,
    compare_images,
    make_image,
    write_pattern,
)


async def test_all_disks_switch_to_overlays(either: Rig) -> None:
    before = await either.status()
    made = await either.snapshot()
    assert made.current
    assert {disk.target: disk.source for disk in made.disks} == {t: f"{either.path}/{t}.s1" for t in ALL}
    assert {disk.target: disk.backing_format for disk in made.disks} == FORMATS
    for target in ALL:
        assert await either.chain(target) == [f"{either.path}/{target}.s1", f"{either.path}/{target}.img"]
        await either.write(target, 0x77, MIB)
    assert await either.pauses_heard() == []
    assert await either.status() == before
    await either.guest.stop()
    for target in ALL:
        overlay = either.path / f"{target}.s1"
        said = header(either.qemu, overlay)
        assert (said["full-backing-filename"], said["backing-filename-format"]) == (
            str(either.source(target)),
            FORMATS[target],
        )
        assert either.holds(target, overlay, "qcow2")
        assert not either.holds(target, either.source(target), FORMATS[target])
        check_image(either.qemu, overlay, "qcow2")


async def test_mirrors_get_every_write_and_the_guest_never_pauses(either: Rig) -> None:
    before = await either.status()
    made = await either.snapshot(mirrors=ALL)
    assert {disk.target: disk.mirror.file for disk in made.disks if disk.mirror} == {
        t: f"{either.dst}/{t}.s1" for t in ALL
    }
    for number, target in enumerate(ALL):
        await either.write(target, 0x41 + number, 3 * MIB, MIB)
        await either.write(target, 0x51 + number, 0)
    assert await either.pauses_heard() == []
    assert await either.status() == before
    await either.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    assert await either.pauses_heard() == ([] if before == "prelaunch" else either.pauses_of_a_window)
    assert await either.status() == before
    await either.guest.stop()
    for target in ALL:
        mirror = either.dst / f"{target}.s1"
        said = header(either.qemu, mirror)
        assert said["full-backing-filename"] == str(either.source(target))
        assert said["backing-filename-format"] == FORMATS[target]
        for image in (either.path / f"{target}.s1", mirror):
            assert either.holds(target, image, "qcow2")
            check_image(either.qemu, image, "qcow2")


async def test_mirror_is_whole_when_the_guest_goes_over(rig: Rig) -> None:
    """A disk without a mirror stays where the snapshot put it."""
    await rig.write("vda", 1, 0)
    await rig.snapshot(mirrors=["vda", "sda"])
    await rig.write("vda", 2, MIB)
    await rig.write("sda", 3, 2 * MIB)
    await rig.write("vdb", 4, 0)
    assert (await rig.disks())["vdb"].mirror is None
    await rig.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    assert (await rig.chain("vdb"))[0] == f"{rig.path}/vdb.s1"
    await rig.guest.stop()
    for target in ("vda", "sda"):
        assert rig.holds(target, rig.path / f"{target}.s1", "qcow2")
        assert rig.holds(target, rig.dst / f"{target}.s1", "qcow2")


async def test_what_a_guest_has_written_is_flushed_before_it_waits_for_qemu_to_do_so(
    faulty: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By snapshots and moves alike; the flush is over when the disks switch."""
    flushed: list[tuple[frozenset[str], int]] = []
    flush = Images.flush

    def switches() -> int:
        return sum(command == "transaction" for command, _words in faulty.proxy.log)

    async def told(images: Images, paths: tuple[str, ...]) -> None:
        await flush(images, paths)
        flushed.append((frozenset(paths), switches()))

    monkeypatch.setattr(Images, "flush", told)
    await faulty.snapshot()
    assert {*flushed} == {(frozenset(str(faulty.source(target)) for target in ALL), 0)}
    assert switches() == 1
    flushed.clear()
    move = ask.MoveStorage(domain="vm1", dest=str(faulty.dst), disks={"vda": None}, strategy="offload", verify="none")
    begun = await faulty.ask(move)
    assert (frozenset([begun.disks[0].source]), 1) in flushed
    assert switches() == 2


async def test_own_backing_is_in_the_header(rig: Rig) -> None:
    backing = {target: rig.dst / f"{target}.base" for target in ALL}  # still to be copied: none of them is there
    await rig.snapshot(mirrors=ALL, backing=backing)
    for target in ALL:
        said = header(rig.qemu, rig.dst / f"{target}.s1")
        assert said["full-backing-filename"] == str(backing[target])
        assert said["backing-filename-format"] == FORMATS[target]
        assert said["virtual-size"] == SIZE


async def test_live_xml_right_after(rig: Rig) -> None:
    await rig.snapshot(mirrors=["vda", "vdb"])
    await rig.ready("vda", "vdb")
    xml = (await rig.show()).xml or ""
    for target in ALL:
        part = re.search(rf"<disk (?:(?!</disk>).)*<target dev=\"{target}\".*?</disk>", xml, re.DOTALL)
        assert part is not None, xml
        assert f'<source file="{rig.path}/{target}.s1"/>' in part[0]
        assert f'<source file="{rig.path}/{target}.img"/>' in part[0].partition("<backingStore")[2]
        mirror = re.search(r"<mirror [^>]*>", part[0])
        if target == "sda":
            assert mirror is None
            continue
        assert mirror is not None
        assert f'file="{rig.dst}/{target}.s1"' in mirror[0]
        assert 'job="copy"' in mirror[0]
        assert 'ready="yes"' in mirror[0]


async def test_proposal_as_written(rig: Rig) -> None:
    """The disk by its image's path, the snapshot and the mirror where the mail has them."""
    xml = wish_xml(
        "s1",
        f"<disk name='{rig.path}/vda.img'><source file='{rig.path}/snap.img'/><mirror file='{rig.dst}/snap.img'/></disk>",
        "<disk name='vdb' snapshot='no'/><disk name='sda' snapshot='no'/>",
    )
    await rig.ask(ask.CreateSnapshot(domain="vm1", xml=xml, flags=SnapshotCreate.ATOMIC))
    assert await rig.chain("vda") == [f"{rig.path}/snap.img", f"{rig.path}/vda.img"]
    assert f'<mirror type="file" file="{rig.dst}/snap.img"' in ((await rig.show()).xml or "")
    await rig.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    assert await rig.chain("vda") == [f"{rig.dst}/snap.img", f"{rig.path}/vda.img"]
    assert "<mirror" not in ((await rig.show()).xml or "")


async def test_disks_that_xml_does_not_mention_get_generated_names(rig: Rig) -> None:
    xml = wish_xml(
        "tuesday", f"<disk name='vda'><source file='{rig.path}/mine'/></disk>", "<disk name='sda' snapshot='no'/>"
    )
    made = await rig.ask(ask.CreateSnapshot(domain="vm1", xml=xml))
    assert {disk.target: disk.source for disk in made.disks} == {
        "vda": f"{rig.path}/mine",
        "vdb": f"{rig.path}/vdb.tuesday",
    }
    assert made.left_out == {"sda": "as asked"}
    assert await rig.chain("sda") == [f"{rig.path}/sda.img"]
    assert '<disk name="sda" snapshot="no"' in made.xml


async def test_nameless_snapshot_gets_seconds_and_a_chain_grows(rig: Rig) -> None:
    first = await rig.ask(ask.CreateSnapshot(domain="vm1", xml=wish_xml("")))
    assert first.name.isdigit()
    assert abs(int(first.name) - first.created) <= 1
    second = await rig.snapshot("s2")
    assert (first.parent, second.parent) == (None, first.name)
    assert await rig.chain("vdb") == [f"{rig.path}/vdb.s2", f"{rig.path}/vdb.{first.name}", f"{rig.path}/vdb.img"]
    listed = (await rig.ask(ask.ListSnapshots(domain="vm1"))).snapshots
    assert [(each.name, each.current) for each in listed] == [(first.name, False), ("s2", True)]
    assert (await rig.show()).current_snapshot == "s2"
    with pytest.raises(errors.SnapshotExists):
        await rig.snapshot("s2")


async def test_only_these_leaves_the_others_alone(rig: Rig) -> None:
    made = await rig.snapshot(only=["vdb"])
    assert [disk.target for disk in made.disks] == ["vdb"]
    assert await rig.chain("vda") == [f"{rig.path}/vda.img"]


async def test_cdrom_read_only_and_empty_drives_are_left_out(qemu: QemuBinaries, tmp_path: Path) -> None:
    for name in ("ro", "cd"):
        make_image(qemu, tmp_path / f"{name}.raw", "raw", MIB)
    args = [
        *blockdev_node("ro", tmp_path / "ro.raw", "raw", read_only=True),
        *["-device", "virtio-blk-pci,drive=ro,id=ro-dev,addr=0x1e"],
        *blockdev_node("cd", tmp_path / "cd.raw", "raw", read_only=True),
        *["-device", "ide-cd,drive=cd,id=cd-dev,bus=ide.0", "-device", "ide-cd,id=empty-dev,bus=ide.1"],
    ]
    async with open_rig(qemu, tmp_path, args=args) as rig:
        shown = await rig.disks()
        assert {target: disk.device for target, disk in shown.items()} == {
            **dict.fromkeys((*ALL, "vdc"), "disk"),
            **dict.fromkeys(("hda", "hdc"), "cdrom"),
        }
        assert shown["hdc"].chain == ()
        made = await rig.ask(ask.CreateSnapshot(domain="vm1", xml=wish_xml("s1")))
        assert {disk.target for disk in made.disks} == set(ALL)
        assert set(made.left_out) == {"vdc", "hda", "hdc"}
        assert "read-only" in made.left_out["vdc"]
        assert "cdrom" in made.left_out["hda"]
        assert "empty" in made.left_out["hdc"]
        for target in ("vdc", "hda", "hdc"):
            wish = SnapshotWish(name="s2", only_these=True, disks=(DiskWish(name=target, file=f"{tmp_path}/x"),))
            with pytest.raises(errors.DiskUnsuitable, match=target):
                await rig.ask(ask.CreateSnapshot(domain="vm1", wish=wish))


async def test_dry_run_does_nothing(rig: Rig) -> None:
    before = await rig.state()
    wish = SnapshotWish(name="s1", disks=(DiskWish(name="vda", mirror=MirrorWish(file=str(rig.dst / "m"))),))
    plan = await rig.ask(ask.CreateSnapshot(domain="vm1", wish=wish, dry_run=True))
    assert any("at one instant: vda, sda, vdb" in line for line in plan.steps)
    assert await rig.state() == before
    assert (await rig.ask(ask.ListOperations())).operations == ()
    assert (await rig.ask(ask.ListSnapshots(domain="vm1"))).snapshots == ()


async def test_overlay_is_owned_and_moded_as_its_image(rig: Rig) -> None:
    rig.source("vda").chmod(0o640)
    await rig.snapshot(mirrors=["vda"])
    assert (rig.path / "vda.s1").stat().st_mode & 0o777 == 0o640
    assert (rig.dst / "vda.s1").stat().st_mode & 0o777 == 0o640
    assert (rig.path / "vda.s1").stat().st_uid == rig.source("vda").stat().st_uid


async def test_a_raw_image_that_looks_like_qcow2_stays_raw(rig: Rig) -> None:
    """A guest can write a qcow2 header onto its raw disk: nothing may follow it."""
    evil = make_image(rig.qemu, rig.path / "evil", "qcow2", MIB, backing=Path("/etc/hostname"), backing_fmt="raw")
    head = evil.read_bytes()[:4096]
    with rig.source("vdb").open("r+b") as file:
        file.write(head)
    rig.written["vdb"][:4096] = head
    await rig.snapshot(mirrors=["vdb"], only=["vdb"])
    assert header(rig.qemu, rig.path / "vdb.s1")["backing-filename-format"] == "raw"
    await rig.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    assert [image.format for image in (await rig.disks())["vdb"].chain] == ["qcow2", "raw"]
    await rig.guest.stop()
    assert rig.holds("vdb", rig.dst / "vdb.s1", "qcow2")


async def test_mirror_of_a_deep_chain_is_thin(rig: Rig) -> None:
    """`sync top`: the mirror has what was written since, not what lies below."""
    await rig.snapshot("s1")
    await rig.write("vda", 9, 0, MIB)
    await rig.snapshot("s2", mirrors=["vda"])
    await rig.write("vda", 8, 2 * MIB)
    await rig.delete("s2", SnapshotDelete.REOPEN_MIRROR)
    assert (rig.dst / "vda.s2").stat().st_size < MIB
    await rig.guest.stop()
    assert compare_images(rig.qemu, rig.path / "vda.s2", "qcow2", rig.dst / "vda.s2", "qcow2")
    assert rig.holds("vda", rig.dst / "vda.s2", "qcow2")


async def test_virtual_size_that_is_no_multiple_of_a_cluster(qemu: QemuBinaries, tmp_path: Path) -> None:
    odd = make_image(qemu, tmp_path / "odd.raw", "raw", MIB + 512)
    write_pattern(qemu, odd, "raw", MIB, 512, 0x66)
    async with open_rig(qemu, tmp_path, args=blockdev_disk("odd", odd, "raw", addr="0x1e")) as rig:
        wish = SnapshotWish(
            name="s1",
            only_these=True,
            disks=(DiskWish(name=str(odd), mirror=MirrorWish(file=str(rig.dst / "odd"))),),
        )
        await rig.ask(ask.CreateSnapshot(domain="vm1", wish=wish))
        await rig.delete("s1", SnapshotDelete.REOPEN_MIRROR)
        await rig.guest.stop()
        assert compare_images(qemu, odd, "raw", tmp_path / "dst/odd", "qcow2")
