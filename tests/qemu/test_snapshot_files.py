"""Snapshots onto files that are there, with other names in their headers, onto block devices, without being remembered;
and on a QEMU without `transaction`, one disk after the other."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from rig import ALL, FORMATS, MIB, SIZE, Rig, header, open_rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.flags import SnapshotCreate, SnapshotDelete
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.testing import Fault, FaultKind, QemuBinaries, check_image, make_image


async def create(rig: Rig, *disks: DiskWish, name: str = "s1", flags: int = 0) -> view.SnapshotView:
    wish = SnapshotWish(name=name, disks=disks, only_these=True)
    return await rig.ask(ask.CreateSnapshot(domain="vm1", wish=wish, flags=int(flags)))


def overlay(rig: Rig, path: Path, target: str, backing: Path | None = None, fmt: str | None = None) -> Path:
    return make_image(
        rig.qemu, path, "qcow2", SIZE, backing=backing or rig.source(target), backing_fmt=fmt or FORMATS[target]
    )


def made(rig: Rig, **more: Any) -> list[DiskWish]:
    """An overlay for each disk, made beforehand, as the caller of REUSE_EXT does."""
    return [
        DiskWish(name=target, file=str(overlay(rig, rig.path / f"{target}.made", target)), **more) for target in ALL
    ]


async def whole(rig: Rig) -> None:
    active = {target: disk.chain[0] for target, disk in (await rig.disks()).items()}
    for number, target in enumerate(ALL):
        await rig.write(target, 0x51 + number, 2 * MIB)
    await rig.guest.stop()
    for target in ALL:
        assert rig.holds(target, Path(active[target].file), active[target].format)
        check_image(rig.qemu, Path(active[target].file), active[target].format)


async def test_reuse_ext(either: Rig) -> None:
    disks = made(either)
    before = {disk.file: (Path(disk.file).stat().st_ino, Path(disk.file).read_bytes()) for disk in disks}
    await create(either, *disks, flags=SnapshotCreate.REUSE_EXT)
    for target in ALL:
        assert await either.chain(target) == [f"{either.path}/{target}.made", str(either.source(target))]
    if await either.status() == "prelaunch":
        assert {file: (Path(file).stat().st_ino, Path(file).read_bytes()) for file in before} == before
    assert await either.pauses_heard() == []
    await whole(either)


async def test_reuse_ext_with_mirrors_of_another_chain(rig: Rig) -> None:
    disks = []
    for target in ALL:
        copied = rig.dst / f"{target}.base"
        copied.write_bytes(rig.source(target).read_bytes())
        mirror = overlay(rig, rig.dst / f"{target}.made", target, copied)
        disks.append(
            DiskWish(
                name=target,
                file=str(overlay(rig, rig.path / f"{target}.made", target)),
                mirror=MirrorWish(file=str(mirror)),
            )
        )
    await create(rig, *disks, flags=SnapshotCreate.REUSE_EXT)
    for target in ALL:
        await rig.write(target, 0x35, 4 * MIB)
    await rig.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    for target in ALL:
        assert await rig.chain(target) == [f"{rig.dst}/{target}.made", f"{rig.dst}/{target}.base"]
    await whole(rig)


@pytest.mark.parametrize(
    ("mode", "named", "mirrored"),
    [
        (None, "{path}/vda.img", "{path}/vda.img"),
        ("absolute", "{path}/vda.img", "{path}/vda.img"),
        ("relative", "vda.img", "../vda.img"),
        ("none", None, None),
    ],
)
async def test_what_headers_say(rig: Rig, mode: Any, named: str | None, mirrored: str | None) -> None:
    files = {"file": str(rig.path / "vda.s1"), "mirror": MirrorWish(file=str(rig.dst / "vda.s1"))}
    answer = await create(rig, DiskWish(name="vda", mode=mode, **files))
    assert bool(answer.notes) == (mode == "none")
    for file, name in ((rig.path / "vda.s1", named), (rig.dst / "vda.s1", mirrored)):
        found = header(rig.qemu, file).get("backing-filename")
        assert found == (name.format(path=rig.path) if name else None)
    assert f'mode="{mode}"' in (answer.xml or "") or mode in (None, "absolute")
    await rig.write("vda", 0x36, 3 * MIB)
    await rig.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    assert await rig.chain("vda") == [str(rig.dst / "vda.s1"), str(rig.source("vda"))]
    if mode != "none":
        await whole(rig)


async def test_one_disk_existing_the_other_new(rig: Rig) -> None:
    await create(
        rig,
        DiskWish(name="vda", file=str(overlay(rig, rig.path / "vda.made", "vda")), mode="existing"),
        DiskWish(name="vdb", file=str(rig.path / "vdb.new"), mode="relative"),
    )
    assert await rig.chain("vda") == [f"{rig.path}/vda.made", str(rig.source("vda"))]
    assert await rig.chain("vdb") == [f"{rig.path}/vdb.new", str(rig.source("vdb"))]


async def test_existing_files_stay_when_it_fails(faulty: Rig) -> None:
    disks = made(faulty)
    before = await faulty.state()
    faulty.proxy.inject(Fault("transaction", FaultKind.ERROR))
    with pytest.raises(errors.OperationFailed):
        await create(faulty, *disks, flags=SnapshotCreate.REUSE_EXT)
    assert await faulty.state() == before


async def test_no_metadata(rig: Rig) -> None:
    answer = await create(rig, DiskWish(name="vda", mirror=MirrorWish(file=str(rig.dst / "m"))), flags=4)
    assert (answer.name, answer.disks[0].source) == ("s1", f"{rig.path}/vda.s1")
    assert await rig.snapshots() == {}
    assert await rig.chain("vda") == [f"{rig.path}/vda.s1", str(rig.source("vda"))]
    await rig.pivot("vda")  # no snapshot names the mirror: it is pivoted as a copy is
    assert await rig.chain("vda") == [str(rig.dst / "m"), str(rig.source("vda"))]


# --- block devices --------------------------------------------------------------------------------------------


async def test_overlay_on_a_block_device(rig: Rig, device: Path) -> None:
    answer = await create(rig, DiskWish(name="vda", file=str(device)))
    assert answer.notes == (f"{device} is a block device: what was on it is overwritten",)
    assert 'type="block"' in (answer.xml or "")
    assert f'<source dev="{device}"/>' in (answer.xml or "")
    assert await rig.chain("vda") == [str(device), str(rig.source("vda"))]
    with pytest.raises(errors.ImageUnsuitable, match="in use: it is in the chain of vm1's vda"):
        await create(rig, DiskWish(name="sda", file=str(device)), name="s2")
    xml = answer.xml or ""
    await rig.delete("s1", 0)
    assert await rig.chain("vda") == [str(rig.source("vda"))]
    assert device.exists()
    await rig.ask(ask.CreateSnapshot(domain="vm1", xml=xml))  # what was dumped asks for the same again
    assert await rig.chain("vda") == [str(device), str(rig.source("vda"))]
    await whole(rig)


async def test_overlay_on_a_device_by_its_link(rig: Rig, device: Path) -> None:
    """As /dev/mapper/NAME and /dev/disk/by-id are."""
    (rig.path / "link").symlink_to(device)
    await create(rig, DiskWish(name="vda", file=str(rig.path / "link")))
    assert (await rig.chain("vda"))[0] == str(rig.path / "link")
    await rig.write("vda", 0x37, 3 * MIB)
    await rig.guest.stop()
    assert rig.holds("vda", device, "qcow2")


# --- a QEMU without transaction -------------------------------------------------------------------------------


@pytest.fixture
async def old(qemu: QemuBinaries, tmp_path: Path) -> AsyncIterator[Rig]:
    """A real QEMU behind a proxy that hides `transaction`."""
    async with open_rig(qemu, tmp_path, proxy=True) as rig:
        rig.proxy.inject(Fault("transaction", FaultKind.HIDE))
        await rig.reopen_service()
        yield rig


def new(rig: Rig, *, mirrors: bool = False) -> list[DiskWish]:
    return [
        DiskWish(
            name=target,
            file=str(rig.path / f"{target}.s1"),
            mirror=MirrorWish(file=str(rig.dst / f"{target}.s1")) if mirrors else None,
        )
        for target in ALL
    ]


async def test_one_after_the_other(old: Rig) -> None:
    await create(old, *new(old, mirrors=True))
    for target in ALL:
        assert await old.chain(target) == [f"{old.path}/{target}.s1", str(old.source(target))]
    await old.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    await whole(old)


async def test_a_failure_names_those_that_have_switched(old: Rig) -> None:
    old.proxy.inject(Fault("blockdev-snapshot", FaultKind.ERROR, nth=3))
    with pytest.raises(errors.SnapshotInPart, match="one after the other: vda, sda now on the new images") as caught:
        await create(old, *new(old))
    assert caught.value.switched == "vda, sda"
    shown = await old.show()
    for target in ("vda", "sda"):
        assert await old.chain(target) == [f"{old.path}/{target}.s1", str(old.source(target))]
        assert f'<source file="{old.path}/{target}.s1"/>' in shown.xml
    assert await old.chain("vdb") == [str(old.source("vdb"))]
    assert not (old.path / "vdb.s1").exists()
    assert await old.snapshots() == {}
    assert (await old.operations())[-1] == ("snapshot", "done")
    for target in ("vda", "sda"):
        await old.commit(target)
        assert (await old.ended(target)).state == "done"
        assert await old.chain(target) == [str(old.source(target))]
    await whole(old)


async def test_a_failure_of_the_first_leaves_nothing(old: Rig) -> None:
    before = await old.state()
    old.proxy.inject(Fault("blockdev-snapshot", FaultKind.ERROR, nth=1))
    with pytest.raises(errors.OperationFailed):
        await create(old, *new(old))
    assert await old.state() == before


@pytest.mark.parametrize(
    ("flags", "count"), [(SnapshotCreate.ATOMIC, 2), (SnapshotCreate.REUSE_EXT, 1), (SnapshotCreate.REUSE_EXT, 3)]
)
async def test_what_needs_transaction_is_refused(old: Rig, flags: int, count: int) -> None:
    before = await old.state()
    with pytest.raises(errors.MissingCapability, match="no `transaction`"):
        await create(old, *new(old)[:count], flags=flags)
    assert await old.state() == before


async def test_atomic_of_one_disk_needs_none(old: Rig) -> None:
    await create(old, *new(old)[:1], flags=SnapshotCreate.ATOMIC)
    assert await old.chain("vda") == [f"{old.path}/vda.s1", str(old.source("vda"))]
