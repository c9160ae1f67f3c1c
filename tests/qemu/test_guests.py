"""Disks of every make that guests have, all in one guest: the whole life of each, at the same instants."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from makes import Make, makes_of, open_makes
from rig import KIB, MIB, Rig

from blockferry.model import request as ask
from blockferry.model.flags import SnapshotCreate, SnapshotDelete
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.testing import QemuBinaries, image_sha256, make_image


class Life:
    """What the guest writes in each part of its life, and what each image has to hold from when it was left on."""

    def __init__(self, rig: Rig, makes: Sequence[Make]) -> None:
        self.rig = rig
        self.makes = makes
        self.targets = [make.target for make in makes]
        self.parts = 0
        self.left: dict[Path, tuple[str, str]] = {}  # format and digest

    async def write(self) -> None:
        """To each disk: at a place that was not written before, and over what was; never the same twice."""
        for number, target in enumerate(self.targets):
            byte = 1 + (self.parts * len(self.targets) + number) % 255
            await self.rig.write(target, byte, self.parts * 512 * KIB + 4 * KIB)
            await self.rig.write(target, byte, 7 * MIB)
        self.parts += 1

    def leaves(self, where: str, fmt: str | None = None) -> None:
        """That image of every disk must hold from now on what the guest has written so far; as the disk's first, unless told."""
        for make in self.makes:
            path = Path(where.replace("TARGET", make.target))
            self.left[path] = fmt or make.format, self.rig.digest(make.target)

    def check(self) -> None:
        """Every image that the guest was on, once QEMU is gone."""
        for path, (fmt, digest) in self.left.items():
            assert image_sha256(self.rig.qemu, path, fmt) == digest, path

    async def chains(self, *names: str) -> None:
        """Every disk's chain, by the images' names."""
        chains = {target: [image.file for image in disk.chain] for target, disk in (await self.rig.disks()).items()}
        for target in self.targets:
            assert chains[target] == [name.replace("TARGET", target) for name in names]


@pytest.mark.parametrize("machine", ["pc", "q35"])
async def test_the_whole_life_of_every_disk(qemu: QemuBinaries, tmp_path: Path, machine: str) -> None:
    makes = makes_of(qemu, machine)
    async with open_makes(qemu, tmp_path, makes, machine=machine) as rig:
        life = Life(rig, makes)
        assert {target: (disk.bus, disk.source, disk.format) for target, disk in (await rig.disks()).items()} == {
            make.target: (make.bus, str(rig.source(make.target)), make.format) for make in makes
        }
        await life.write()
        await snapshot_and_reopen(life)
        await copy_and_pivot(life)
        await chains(life)
        assert await rig.status() == "running"
        assert await rig.qemu_jobs() == {}
        nodes = await rig.nodes()
        assert {name[-len(f"-{t}-s") :] for name in await rig.our_nodes() for t in life.targets} is not None
        print({node["file"] for node in nodes.values()})
        assert "qom-set" not in rig.proxy.commands()
        await rig.guest.stop()
        life.check()


async def snapshot_and_reopen(life: Life) -> None:
    rig, path, dst = life.rig, life.rig.path, life.rig.dst
    life.leaves(f"{path}/TARGET.img")
    await rig.snapshot("s1", mirrors=life.targets, only=life.targets)
    await life.write()
    await life.chains(f"{path}/TARGET.s1", f"{path}/TARGET.img")
    life.leaves(f"{path}/TARGET.s1", "qcow2")
    await rig.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    await life.write()
    await life.chains(f"{dst}/TARGET.s1", f"{path}/TARGET.img")


async def copy_and_pivot(life: Life) -> None:
    rig, dst = life.rig, life.rig.dst
    for make in life.makes:
        await rig.copy(make.target, format=make.format)
    await life.write()
    life.leaves(f"{dst}/TARGET.s1", "qcow2")
    await rig.pivot(*life.targets)
    await life.write()
    await life.chains(f"{dst}/TARGET.copy")


async def chains(life: Life) -> None:
    """Merge a snapshot under a newer one, commit that, and pull what is left up into another."""
    rig, path, dst = life.rig, life.rig.path, life.rig.dst
    for name in ("s2", "s3"):
        await rig.snapshot(name, only=life.targets)
        await life.write()
    await rig.delete("s2", 0)
    await life.chains(f"{path}/TARGET.s3", f"{dst}/TARGET.copy")
    for target in life.targets:
        await rig.commit(target)
    for target in life.targets:
        assert (await rig.ended(target)).state == "done"
    await life.chains(f"{dst}/TARGET.copy")
    await life.write()
    life.leaves(f"{dst}/TARGET.copy")
    await rig.snapshot("s4", only=life.targets)
    await life.write()
    for target in life.targets:
        await rig.rebase(target)
    for target in life.targets:
        assert (await rig.ended(target)).state == "done"
    await life.chains(f"{path}/TARGET.s4")
    await life.write()
    life.leaves(f"{path}/TARGET.s4", "qcow2")
