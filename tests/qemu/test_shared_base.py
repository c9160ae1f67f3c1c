"""Two disks that back onto one base: as one node, as one file that is opened twice, and under two names."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rig import KIB, MIB, SIZE, Rig, open_guest

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.flags import SnapshotDelete
from blockferry.testing import QemuBinaries, TestQemu, image_sha256, make_image, write_pattern

BOTH = ("vda", "vdb")
# As libvirt opens what is under an active image: QEMU can open the file for writing when somebody commits into it.
BASE_NODE = (
    "-blockdev driver=file,node-name=base-file,filename=DIR/base,auto-read-only=on "
    "-blockdev driver=raw,node-name=base-node,file=base-file,read-only=on"
)
OVERLAY = (
    "-blockdev driver=file,node-name=TARGET-file,filename=DIR/TARGET.img "
    "-blockdev driver=qcow2,node-name=TARGET-node,file=TARGET-file{} "
    "-device virtio-blk-pci,drive=TARGET-node,id=TARGET-dev"
)
DRIVE = "-drive file=DIR/TARGET.img,format=qcow2,if=virtio"
WAYS = {
    "one node": (BASE_NODE, OVERLAY.format(",backing=base-node")),
    "two nodes": ("", OVERLAY.format("")),
    "drives": ("", DRIVE),
    "two names": ("", DRIVE),
}


@pytest.fixture(params=WAYS)
async def shared(request: pytest.FixtureRequest, qemu: QemuBinaries, tmp_path: Path) -> AsyncIterator[Rig]:
    base = make_image(qemu, tmp_path / "base", "raw", SIZE)
    write_pattern(qemu, base, "raw", 0, MIB, 0x77)
    (tmp_path / "link").symlink_to(base)
    first, each = WAYS[request.param]
    args = words(first, tmp_path)
    for target in BOTH:
        name = tmp_path / "link" if (request.param, target) == ("two names", "vdb") else base
        make_image(qemu, tmp_path / f"{target}.img", "qcow2", backing=name, backing_fmt="raw")
        args += words(each, tmp_path, target)
    written = {target: bytearray(b"\x77" * MIB + bytes(SIZE - MIB)) for target in BOTH}
    async with open_guest(qemu, tmp_path, args, written) as rig:
        await rig.write_each({"vda": 1, "vdb": 2}, MIB - 64 * KIB)
        yield rig


async def test_life(shared: Rig) -> None:
    rig, base = shared, str(shared.path / "base")
    untouched = image_sha256(rig.qemu, rig.path / "base", "raw")
    below = {target: (await rig.chain(target))[-1] for target in BOTH}
    await rig.snapshot("s1", mirrors=BOTH, only=BOTH)
    await rig.write_each({"vda": 3, "vdb": 4}, 2 * MIB)
    await rig.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    for target, other in (BOTH, BOTH[::-1]):
        before = await rig.state()
        with pytest.raises(errors.DiskUnsuitable, match=f"{other} stands on .* as well, which a commit would change"):
            await rig.commit(target)
        assert await rig.state() == before
        await rig.commit(target, base=str(rig.source(target)))
        assert (await rig.ended(target)).state == "done"
        assert await rig.chain(target) == [str(rig.source(target)), below[target]]
    for target in BOTH:
        await rig.copy(target, base=below[target])
    await rig.write_each({"vda": 5, "vdb": 6}, 3 * MIB)
    await rig.pivot(*BOTH)
    for target in BOTH:
        assert await rig.chain(target) == [str(rig.dest(target)), below[target]]
    await rig.snapshot("s2", only=BOTH)
    await rig.write_each({"vda": 7, "vdb": 8}, 4 * MIB)
    await rig.delete("s2", 0)
    # One of them leaves the base; then the other has it alone.
    await rig.rebase("vda")
    assert (await rig.ended("vda")).state == "done"
    assert await rig.chain("vda") == [str(rig.dest("vda"))]
    await rig.write_each({"vda": 9, "vdb": 10}, 5 * MIB)
    assert image_sha256(rig.qemu, rig.path / "base", "raw") == untouched
    await rig.commit("vdb")
    ended = await rig.ended("vdb")
    assert (ended.state, ended.reason) == ("done", None)
    assert await rig.chain("vdb") == [below["vdb"]]
    await rig.write_each({"vda": 11, "vdb": 12}, 6 * MIB)
    await rig.guest.stop()
    assert rig.holds("vda", rig.dest("vda"), "qcow2")
    assert rig.holds("vdb", Path(base), "raw")


async def test_both_leave_the_base(shared: Rig) -> None:
    """Whole copies, at one instant: nothing has the base open any more. What is done to one keeps nobody from the other."""
    rig = shared
    await rig.copy("vda")
    await rig.snapshot(only=["vdb"])
    await rig.copy("vdb")
    await rig.pivot(*BOTH)
    await rig.write_each({"vda": 3, "vdb": 4}, 2 * MIB)
    assert {node["file"] for node in (await rig.nodes()).values()} == {str(rig.dest(target)) for target in BOTH}
    await rig.guest.stop()
    for target in BOTH:
        assert rig.holds(target, rig.dest(target), "qcow2")


async def test_others_on_the_base(qemu: QemuBinaries, tmp_path: Path) -> None:
    """A disk of another guest, and one that can only read: the base may not change under them."""
    base = make_image(qemu, tmp_path / "base", "raw", SIZE)
    for name in ("vda.img", "vm2.img"):
        make_image(qemu, tmp_path / name, "qcow2", backing=base, backing_fmt="raw")
    written = {"vda": bytearray(SIZE)}
    async with open_guest(qemu, tmp_path, words(DRIVE, tmp_path), written) as rig:
        (tmp_path / "vm2").mkdir()
        drive = ["-drive", f"file={tmp_path}/vm2.img,format=qcow2,if=virtio"]
        async with TestQemu(qemu, tmp_path / "vm2", args=drive) as other:
            await rig.ask(ask.Attach(domain="vm2", qmp=str(other.qmp)))
            await refused(rig, "vm2's vda stands on")
            await rig.ask(ask.Detach(domain="vm2"))
            # Of a guest that nobody told us of only QEMU's locks know.
            before = await rig.state()
            with pytest.raises(errors.OperationFailed, match=r"lock.*It was undone"):
                await rig.commit("vda")
            assert await rig.state() == before
        node = {
            "driver": "raw",
            "node-name": "ro",
            "read-only": True,
            "file": {"driver": "file", "filename": str(base)},
        }
        await rig.guest.command("blockdev-add", node)
        await rig.guest.command("device_add", {"driver": "virtio-blk-pci", "drive": "ro", "id": "ro-dev"})
        await refused(rig, "vdb stands on")
        # Merged into an image of its own it changes nothing for them.
        await rig.snapshot("s1", only=["vda"])
        await rig.write("vda", 1)
        await rig.delete("s1", 0)
        assert await rig.chain("vda") == [str(tmp_path / "vda.img"), str(base)]


async def refused(rig: Rig, match: str) -> None:
    before = await rig.state()
    with pytest.raises(errors.DiskUnsuitable, match=f"vm1: .*vda.*{match} .* as well") as caught:
        await rig.commit("vda")
    assert caught.value.outcome == "refused"
    assert await rig.state() == before


async def test_a_base_that_is_open_for_reading_only(qemu: QemuBinaries, tmp_path: Path) -> None:
    """By somebody's wish, which is not ours to overrule: QEMU refuses the commit, and all is as it was."""
    base = make_image(qemu, tmp_path / "base", "raw", SIZE)
    make_image(qemu, tmp_path / "vda.img", "qcow2", backing=base, backing_fmt="raw")
    fixed = BASE_NODE.replace("auto-read-only=on", "read-only=on")
    args = words(f"{fixed} {OVERLAY.format(',backing=base-node')}", tmp_path)
    async with open_guest(qemu, tmp_path, args, {"vda": bytearray(SIZE)}) as rig:
        await rig.write("vda", 1)
        before = await rig.state()
        with pytest.raises(errors.OperationFailed, match=r"read-only.*It was undone"):
            await rig.commit("vda")
        assert await rig.state() == before
        await rig.rebase("vda")
        assert (await rig.ended("vda")).state == "done"
        assert await rig.chain("vda") == [str(tmp_path / "vda.img")]


def words(text: str, folder: Path, target: str = "vda") -> list[str]:
    """QEMU's arguments."""
    return text.replace("TARGET", target).replace("DIR", str(folder)).split()
