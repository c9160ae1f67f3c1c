"""Copies that back onto an image of the source's chain, or of one of their own; and onto what is there already."""

import asyncio
import json
import subprocess
from pathlib import Path

import pytest
from rig import ALL, FORMATS, KIB, MIB, SIZE, Rig, header

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.flags import BlockCopy
from blockferry.testing import QemuBinaries, check_image, compare_images, make_image

SLOW = 64 * KIB


def own_bytes(qemu: QemuBinaries, image: Path) -> int:
    """What an image holds itself, of all that the guest can see in it."""
    alone = f'json:{{"driver": "qcow2", "backing": null, "file": {{"driver": "file", "filename": "{image}"}}}}'
    done = subprocess.run([qemu.img, "map", "--output=json", alone], capture_output=True, check=True, timeout=30)
    return sum(part["length"] for part in json.loads(done.stdout) if part["data"])


async def finish_whole(rig: Rig, target: str, chain: list[str]) -> None:
    """The guest is on the copy: it, over its chain, holds what was written."""
    assert await rig.chain(target) == chain
    await rig.write(target, 0x66, 6 * MIB)
    assert await rig.qemu_jobs() == {}
    await rig.guest.stop()
    assert rig.holds(target, rig.dest(target), "qcow2")
    check_image(rig.qemu, rig.dest(target), "qcow2")


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("base", [0, 1, 2, 3])
async def test_any_base(rig: Rig, target: str, base: int) -> None:
    """Every layer has data of its own, and data over the others'; zeroes over data too."""
    await rig.layers(4, only=[target])
    await rig.write(target, 0, 512 * KIB)  # zeroes over what s1 holds
    below = rig.layer(target, base)
    job = await rig.copy(target, base=below, format="qcow2")
    assert job.base == below
    await rig.write(target, 0x41, 5 * MIB)
    await rig.pauses_heard()
    await rig.pivot(target)
    chain = [str(rig.dest(target)), *(rig.layer(target, number) for number in range(base, -1, -1))]
    assert await rig.chain(target) == chain
    named = header(rig.qemu, rig.dest(target))
    assert named["backing-filename"] == below
    assert named["backing-filename-format"] == (FORMATS[target] if base == 0 else "qcow2")
    assert await rig.pauses_heard() == rig.pauses_of_a_window
    await finish_whole(rig, target, chain)
    # s1...s4 wrote 64 KiB each at a place of its own and at one in common; after it 0x41 and 0x66, and the zeroes.
    assert own_bytes(rig.qemu, rig.dest(target)) <= ((4 - base) + 4) * 64 * KIB, "nothing of the base is copied"


async def test_a_shallow_copy_by_its_flag(rig: Rig) -> None:
    await rig.layers(2, only=["vda"])
    job = await rig.copy("vda", flags=BlockCopy.SHALLOW)
    assert job.base == rig.layer("vda", 1)
    await rig.pivot("vda")
    await finish_whole(rig, "vda", [str(rig.dest("vda")), rig.layer("vda", 1), rig.layer("vda", 0)])


async def test_shallow_copy_of_a_disk_without_backing_is_whole(rig: Rig) -> None:
    assert (await rig.copy("vda", flags=BlockCopy.SHALLOW)).base is None


@pytest.mark.parametrize("base", [0, 1])
async def test_finish_is_a_copy_of_one_instant(rig: Rig, base: int) -> None:
    await rig.layers(2, only=["vda"])
    await rig.copy("vda", base=rig.layer("vda", base))
    await rig.write("vda", 0x42, 3 * MIB)
    await rig.finish("vda")
    instant = rig.digest("vda")
    await rig.write("vda", 0x43, 3 * MIB)
    assert await rig.chain("vda") == [rig.layer("vda", number) for number in (2, 1, 0)]
    assert await rig.our_nodes() == {name for name in await rig.our_nodes() if "-s" in name}
    await rig.guest.stop()
    rig.written["vda"][3 * MIB : 3 * MIB + 64 * KIB] = bytes([0x42]) * 64 * KIB
    assert rig.digest("vda") == instant
    assert rig.holds("vda", rig.dest("vda"), "qcow2")


async def test_a_filling_copy_is_cancelled_limited_and_shown(rig: Rig) -> None:
    await rig.layers(3, only=["vda"])
    started = await rig.copy("vda", base=rig.layer("vda", 0), bandwidth=SLOW)
    assert (started.type, started.state) == ("fill", "copying")
    with pytest.raises(errors.JobNotReady, match="lower layers"):
        await rig.pivot("vda", timeout=0.1)
    operation = await rig.operation(started.operation)
    assert (operation.state, operation.next[-1]) == ("in-progress", "blockferry job cancel vm1 vda")
    await rig.ask(ask.CancelJobs(domain="vm1", disks=("vda",)))
    assert await rig.states() == {"vda": "cancelled"}
    assert rig.dest("vda").exists()
    assert not [name for name in await rig.our_nodes() if "-x" in name or "-f" in name]


async def test_the_service_starts_again_while_a_copy_is_filled(rig: Rig) -> None:
    await rig.layers(3, only=["vda"])
    await rig.copy("vda", base=rig.layer("vda", 0), bandwidth=SLOW)
    await rig.reopen_service()
    await rig.ask(ask.SetJobSpeed(domain="vm1", disk="vda", bandwidth=0))
    await rig.pivot("vda")
    await finish_whole(rig, "vda", [str(rig.dest("vda")), rig.layer("vda", 0)])


async def filled(rig: Rig) -> str:
    """A copy whose lower layers are pulled in so slowly that much can be done meanwhile; QEMU's job."""
    await rig.layers(3, only=["vda"])
    await rig.copy("vda", base=rig.layer("vda", 0), bandwidth=SLOW)
    (job,) = await rig.qemu_jobs()
    return job


async def mirrored_at(rig: Rig, bandwidth: int) -> None:
    await rig.ready("vda")
    job = (await rig.jobs())["vda"]
    assert (job.type, job.speed) == ("copy", bandwidth)
    await rig.pivot("vda")
    await finish_whole(rig, "vda", [str(rig.dest("vda")), rig.layer("vda", 0)])


async def test_a_limit_given_while_a_copy_is_filled_is_its_mirrors(rig: Rig) -> None:
    await filled(rig)
    await rig.ask(ask.SetJobSpeed(domain="vm1", disk="vda", bandwidth=64 * MIB))
    await mirrored_at(rig, 64 * MIB)


@pytest.mark.parametrize("command", ["block-job-set-speed", "job-finalize"])
async def test_a_limit_given_while_a_fill_ends(faulty: Rig, command: str) -> None:
    """QEMU takes no limit of a job that is pending, and none of one that is gone: the mirror has it all the same."""
    job = await filled(faulty)
    gate = faulty.proxy.pause_before(command)
    if command == "block-job-set-speed":
        limiting = asyncio.create_task(faulty.ask(ask.SetJobSpeed(domain="vm1", disk="vda", bandwidth=64 * MIB)))
        await gate.reached()
        await faulty.guest.command("block-job-set-speed", {"device": job, "speed": 0})
        async with asyncio.timeout(20):
            while (await faulty.qemu_jobs())[job]["status"] != "pending":
                pass
    else:
        await faulty.guest.command("block-job-set-speed", {"device": job, "speed": 0})
        await gate.reached()
        limiting = asyncio.create_task(faulty.ask(ask.SetJobSpeed(domain="vm1", disk="vda", bandwidth=64 * MIB)))
        await asyncio.sleep(0)  # it looks, and waits for the domain
    gate.release()
    await limiting
    await mirrored_at(faulty, 64 * MIB)


# --- what is there already ------------------------------------------------------------------------------------


async def test_reuse_ext_takes_an_image_as_it_is(rig: Rig) -> None:
    await rig.layers(2, only=["vda"])
    for name, backing in (("vda", rig.layer("vda", 1)), ("sda", None), ("vdb", None)):
        fmt = FORMATS[name]
        over = {"backing": Path(backing), "backing_fmt": "qcow2"} if backing else {}
        make_image(rig.qemu, rig.dest(name), fmt, SIZE, **over)
    inodes = {target: rig.dest(target).stat().st_ino for target in ALL}
    await rig.copy("vda", base=rig.layer("vda", 1), flags=BlockCopy.REUSE_EXT)
    await rig.copy("vdb", flags=BlockCopy.REUSE_EXT)
    await rig.copy("sda", flags=BlockCopy.REUSE_EXT)
    await rig.pivot(*ALL)
    assert {target: rig.dest(target).stat().st_ino for target in ALL} == inodes
    assert await rig.chain("vda") == [str(rig.dest("vda")), rig.layer("vda", 1), rig.layer("vda", 0)]
    await rig.guest.stop()
    for target in ALL:
        assert rig.holds(target, rig.dest(target), FORMATS[target])


@pytest.mark.parametrize("number", [0, 1])
async def test_reuse_ext_with_the_destinations_own_chain(rig: Rig, number: int) -> None:
    """The caller has copied the base, and says so by what the destination's header names."""
    await rig.layers(2, only=["vda"])
    own = rig.dst / "base.copy"
    convert = [rig.qemu.img, "convert", "-U", "-O", "qcow2", rig.layer("vda", number), own]
    await asyncio.to_thread(subprocess.run, convert, check=True, timeout=30)
    make_image(rig.qemu, rig.dest("vda"), "qcow2", SIZE, backing=own, backing_fmt="qcow2")
    await rig.copy("vda", base=rig.layer("vda", number), flags=BlockCopy.REUSE_EXT)
    with pytest.raises(errors.ImageUnsuitable, match="in use: the copy of vm1's vda backs onto it"):
        await rig.copy("sda", own, flags=BlockCopy.REUSE_EXT)
    await rig.pivot("vda")
    await finish_whole(rig, "vda", [str(rig.dest("vda")), str(own)])


async def grown(rig: Rig) -> None:
    """vda on s2, s1 and its image; from s1 on it has twice the size."""
    await rig.layers(1, only=["vda"])
    (overlay,) = [name for name in await rig.our_nodes() if name.endswith("-vda-s")]
    await rig.guest.command("block_resize", {"node-name": overlay, "size": 2 * SIZE})
    rig.written["vda"] += bytes(SIZE)
    await rig.snapshot("s2", only=["vda"])
    for number in (1, 3):
        await rig.write("vda", 0xC0 + number, number * SIZE // 2)


async def test_reuse_ext_where_the_disk_is_larger_than_its_base(rig: Rig) -> None:
    """What the destination backs onto is as large as the base that it stands for, not as the layers above that."""
    await grown(rig)
    own = rig.dst / "base.copy"
    convert = [rig.qemu.img, "convert", "-U", "-O", "qcow2", rig.source("vda"), own]
    await asyncio.to_thread(subprocess.run, convert, check=True, timeout=30)
    make_image(rig.qemu, rig.dest("vda"), "qcow2", 2 * SIZE, backing=own, backing_fmt="qcow2")
    await rig.copy("vda", base=rig.layer("vda", 0), flags=BlockCopy.REUSE_EXT)
    await rig.pivot("vda")
    await finish_whole(rig, "vda", [str(rig.dest("vda")), str(own)])


@pytest.mark.parametrize(("number", "size"), [(0, 2 * SIZE), (1, SIZE)])
async def test_reuse_ext_over_an_image_of_another_size_than_the_base(rig: Rig, number: int, size: int) -> None:
    """Refused when the copy is to begin: at the pivot it would be refused for certain."""
    await grown(rig)
    before = await rig.state()
    own = make_image(rig.qemu, rig.dst / "own", "qcow2", size)
    make_image(rig.qemu, rig.dest("vda"), "qcow2", 2 * SIZE, backing=own, backing_fmt="qcow2")
    base = rig.layer("vda", number)
    with pytest.raises(errors.ImageUnsuitable, match=f"{own} .*{size} bytes, and {base}, .* has {3 * SIZE - size}"):
        await rig.copy("vda", base=base, flags=BlockCopy.REUSE_EXT)
    own.unlink()
    rig.dest("vda").unlink()
    assert await rig.state() == before


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"granularity": 64 * KIB}, {"granularity": 64 * KIB}),
        ({"buf_size": MIB}, {}),
        ({"flags": BlockCopy.SYNCHRONOUS_WRITES}, {}),
    ],
)
async def test_options_of_the_mirror(rig: Rig, options: dict[str, int], more: dict[str, int]) -> None:
    await rig.copy("vda", **options)
    await rig.ready("vda")
    bitmaps = [bitmap for node in (await rig.nodes()).values() for bitmap in node.get("dirty-bitmaps", [])]
    assert {key: bitmaps[0][key] for key in more} == more
    await rig.write("vda", 0x44, 2 * MIB)
    await rig.pivot("vda")
    await rig.guest.stop()
    assert rig.holds("vda", rig.dest("vda"), "qcow2")


# --- block devices --------------------------------------------------------------------------------------------


async def test_copy_to_a_block_device(rig: Rig, device: Path) -> None:
    job = await rig.copy("vda", device)
    assert job.notes == (f"{device} is a block device: what was on it is overwritten",)
    await rig.write("vda", 0x45, 2 * MIB)
    await rig.pivot("vda")
    assert await rig.chain("vda") == [str(device)]
    assert f'<source dev="{device}"/>' in (await rig.show()).xml
    await rig.guest.stop()
    assert rig.holds("vda", device, "qcow2")


async def test_raw_onto_a_device_of_another_size_is_refused(rig: Rig, device: Path) -> None:
    with pytest.raises(errors.DestinationUnusable, match=f"{12 * MIB} bytes, and the disk has {SIZE}"):
        await rig.copy("vdb", device)
    assert device.read_bytes()[:512] == b"\xee" * 512
    await rig.copy("vda", device)
    with pytest.raises(errors.ImageUnsuitable, match="in use: vm1 copies its vda to it"):
        await rig.copy("sda", device)


async def test_nbd_in_use_by_another_copy(rig: Rig) -> None:
    target = make_image(rig.qemu, rig.dst / "export", "raw", SIZE)
    async with rig.server(target) as server:
        await rig.copy("vda", server.uri)
        with pytest.raises(errors.ImageUnsuitable, match="in use: vm1 copies its vda to it"):
            await rig.copy("sda", server.uri)
        await rig.pivot("vda")
        await rig.guest.stop()
    assert compare_images(rig.qemu, rig.source("vda"), "qcow2", target, "raw")
