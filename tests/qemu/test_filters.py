"""A throttle or copy-on-read filter between the device and its image: it stays on top, whatever is done under it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rig import SIZE, Rig, open_rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.snapshot import DiskWish, SnapshotWish
from blockferry.testing import QemuBinaries, check_image, make_image

TARGET = "vdc"  # behind the rig's own two virtio disks


@pytest.fixture(params=["throttle", "copy-on-read"])
async def filtered(
    request: pytest.FixtureRequest, qemu: QemuBinaries, tmp_path: Path
) -> AsyncIterator[tuple[Rig, str]]:
    image = make_image(qemu, tmp_path / "filtered.img", "qcow2", SIZE)
    more = ",throttle-group=tg" if request.param == "throttle" else ""
    args = [
        "-object",
        '{"qom-type": "throttle-group", "id": "tg", "limits": {"iops-total": 100000}}',
        "-blockdev",
        f"driver=file,node-name=ff,filename={image}",
        "-blockdev",
        "driver=qcow2,node-name=fq,file=ff",
        "-blockdev",
        f"driver={request.param},node-name=flt,file=fq{more}",
        "-device",
        "virtio-blk-pci,drive=flt,id=flt-dev,addr=0x1e",
    ]
    async with open_rig(qemu, tmp_path, args=args) as rig:
        yield rig, request.param


async def on_top(rig: Rig) -> bool:
    """Whether the device stands on the filter still, by QEMU's own graph."""
    shape = await rig.guest.command("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in shape["nodes"]}
    return any(edge["name"] == "root" and names[edge["child"]] == "flt" for edge in shape["edges"])


async def snapshot(rig: Rig, name: str) -> None:
    wish = SnapshotWish(name=name, disks=(DiskWish(name=TARGET, file=str(rig.path / name)),), only_these=True)
    await rig.ask(ask.CreateSnapshot(domain="vm1", wish=wish))


async def test_chains_under_a_filter(filtered: tuple[Rig, str]) -> None:
    rig, _kind = filtered
    for name in ("f1", "f2", "f3"):
        await snapshot(rig, name)
    await rig.commit(TARGET, top=str(rig.path / "f2"), base=str(rig.path / "f1"))
    assert (await rig.ended(TARGET)).state == "done"
    await rig.rebase(TARGET, base=str(rig.path / "filtered.img"))
    ended = await rig.ended(TARGET)
    assert (ended.state, ended.reason) == ("done", None)
    assert await rig.chain(TARGET) == [str(rig.path / "f3"), str(rig.path / "filtered.img")]
    await rig.commit(TARGET)
    assert (await rig.ended(TARGET)).state == "done"
    assert await rig.chain(TARGET) == [str(rig.path / "filtered.img")]
    assert await on_top(rig)
    await rig.guest.stop()
    check_image(rig.qemu, rig.path / "filtered.img", "qcow2")


async def test_copy_under_a_filter(filtered: tuple[Rig, str]) -> None:
    rig, kind = filtered
    if kind == "throttle" and "qemu10" not in str(rig.qemu.system):
        with pytest.raises(errors.DiskUnsuitable, match="may hang when it switches"):
            await rig.copy(TARGET)
        assert await on_top(rig)
        return
    await rig.copy(TARGET)
    await rig.pivot(TARGET)
    assert await rig.chain(TARGET) == [str(rig.dest(TARGET))]
    assert await on_top(rig)
    assert await rig.qemu_jobs() == {}
    await rig.guest.stop()
    check_image(rig.qemu, rig.dest(TARGET), "qcow2")
