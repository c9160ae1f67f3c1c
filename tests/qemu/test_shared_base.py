"""Two disks that back onto one base: as one node, as one file that is opened twice, and under two names."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rig import KIB, MIB, SIZE, Rig, open_guest

from blockferry import errors
from blockferry.model.flags import SnapshotDelete
from blockferry.testing import QemuBinaries, image_sha256, make_image, write_pattern

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
    args = first
    for target in BOTH:
        name = tmp_path / "link" if (request.param, target) == ("two names", "vdb") else base
        make_image(qemu, tmp_path / f"{target}.img", "qcow2", backing=name, backing_fmt="raw")
        args += f" {each.replace('TARGET', target)}"
    written = {target: bytearray(b"\x77" * MIB + bytes(SIZE - MIB)) for target in BOTH}
    async with open_guest(qemu, tmp_path, args.replace("DIR", str(tmp_path)).split(), written) as rig:
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
    """Whole copies, at one instant: nothing has the base open any more."""
    rig = shared
    for target in BOTH:
        await rig.copy(target)
    await rig.pivot(*BOTH)
    await rig.write_each({"vda": 3, "vdb": 4}, 2 * MIB)
    assert {node["file"] for node in (await rig.nodes()).values()} == {str(rig.dest(target)) for target in BOTH}
    await rig.guest.stop()
    for target in BOTH:
        assert rig.holds(target, rig.dest(target), "qcow2")
