"""Disks of every make that guests have, all in one guest: the whole life of each, at the same instants."""

from collections.abc import Sequence
from pathlib import Path

from makes import PC, Make, makes_for, open_makes
from rig import KIB, MIB, Rig

from blockferry.model.flags import SnapshotDelete
from blockferry.testing import QemuBinaries, image_sha256


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

    def leave(self, target: str, path: Path, fmt: str) -> None:
        """The image must hold from now on what the guest has written so far."""
        self.left[path] = fmt, self.rig.digest(target)

    def check(self) -> None:
        """Every image that the guest was on, once QEMU is gone."""
        for path, (fmt, digest) in self.left.items():
            assert image_sha256(self.rig.qemu, path, fmt) == digest, path

    async def chains(self, *names: str) -> None:
        """Every disk's chain, by the images' names."""
        for target in self.targets:
            assert await self.rig.chain(target) == [name.replace("TARGET", target) for name in names]


async def test_the_whole_life_of_every_disk(qemu: QemuBinaries, tmp_path: Path) -> None:
    makes = makes_for(qemu, PC)
    async with open_makes(qemu, tmp_path, makes) as rig:
        life = Life(rig, makes)
        path, dst = rig.path, rig.dst
        shown = await rig.disks()
        assert {target: (disk.bus, disk.source, disk.format) for target, disk in shown.items()} == {
            make.target: (make.bus, str(rig.source(make.target)), make.format) for make in makes
        }
        await life.write()

        for make in makes:
            life.leave(make.target, rig.source(make.target), make.format)
        await rig.snapshot("s1", mirrors=life.targets, only=life.targets)
        await life.write()
        await life.chains(f"{path}/TARGET.s1", f"{path}/TARGET.img")
        for target in life.targets:
            life.leave(target, path / f"{target}.s1", "qcow2")
        await rig.delete("s1", SnapshotDelete.REOPEN_MIRROR)
        await life.write()
        await life.chains(f"{dst}/TARGET.s1", f"{path}/TARGET.img")

        for make in makes:
            await rig.copy(make.target, format=make.format)
        await life.write()
        for target in life.targets:
            life.leave(target, dst / f"{target}.s1", "qcow2")
        await rig.pivot(*life.targets)
        await life.write()
        await life.chains(f"{dst}/TARGET.copy")

        await rig.guest.stop()
        life.check()
