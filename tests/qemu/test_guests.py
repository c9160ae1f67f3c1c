"""Disks of every make that guests have, all in one guest: the whole life of each, at the same instants."""

import itertools
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from makes import LEFT_ALONE, PC, PC_ALONE, Q35, Q35_ALONE, LeftAlone, Make, makes_of, open_makes
from rig import KIB, MIB, SIZE, Rig, open_guest, open_rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.flags import SnapshotCreate, SnapshotDelete
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.testing import QemuBinaries, TestQemu, image_sha256, make_image

# How many rounds of a hash make a key is timed by the processor's clock, and where the kernel counts that in ticks a
# processor that others want may show none for as long as QEMU looks.
NO_TIME_SEEN = "Unable to get accurate CPU usage"
ATTEMPTS = 10


class Life:
    """What the guest writes in each part of its life, and what each image has to hold from when it was left on."""

    def __init__(self, rig: Rig, makes: Sequence[Make], alone: Sequence[LeftAlone]) -> None:
        self.rig = rig
        self.makes = makes
        self.alone = alone
        self.targets = [make.target for make in makes]
        self.parts = 0
        self.left: dict[Path, tuple[str, str]] = {}  # format and digest

    async def write(self) -> None:
        """To each disk a byte that is written nowhere else, half of it over what was written before."""
        first = 1 + self.parts * len(self.targets)
        await self.rig.write_each(
            dict(zip(self.targets, itertools.count(first), strict=False)), self.parts * 64 * KIB, 128 * KIB
        )
        self.parts += 1

    def leaves(self, where: str, fmt: str | None = None) -> None:
        """That image of every disk must hold from now on what the guest has written so far; as the disk's first, unless told."""
        for make in self.makes:
            path = Path(where.replace("TARGET", make.target))
            self.left[path] = fmt or make.format, self.rig.digest(make.target)

    def check(self) -> None:
        """Every image that the guest was on, once QEMU is gone."""
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(lambda path: image_sha256(self.rig.qemu, path, self.left[path][0]), self.left)
        assert dict(zip(self.left, found, strict=True)) == {path: digest for path, (_fmt, digest) in self.left.items()}
        assert len(self.left) == 5 * len(self.targets)

    async def between(self) -> dict[str, tuple[int, str]]:
        """What is between each device and its image, as QEMU says: the limit of its requests, the driver on top."""
        drives = {drive.get("qdev"): drive for drive in await self.rig.guest.command("query-block")}
        drivers = {name: node["drv"] for name, node in (await self.rig.nodes()).items()}
        shape = await self.rig.guest.command("x-debug-query-block-graph")
        names = {node["id"]: node["name"] for node in shape["nodes"]}
        roots = {names[edge["parent"]]: names[edge["child"]] for edge in shape["edges"] if edge["name"] == "root"}
        found = {}
        for target in self.targets:
            qdev = self.rig.qdevs[target]
            driver = drivers[roots[drives[qdev]["device"] or qdev]]
            found[target] = drives[qdev]["inserted"]["iops"], driver if driver == "copy-on-read" else "format"
        return found

    async def chains(self, *names: str) -> None:
        """Every disk's chain, by the images' names."""
        chains = {target: [image.file for image in disk.chain] for target, disk in (await self.rig.disks()).items()}
        for target in self.targets:
            assert chains[target] == [name.replace("TARGET", target) for name in names]


@pytest.mark.parametrize("machine", ["pc", "q35"])
async def test_the_whole_life_of_every_disk(qemu: QemuBinaries, tmp_path: Path, machine: str) -> None:
    makes = makes_of(qemu, machine)
    async with open_makes(qemu, tmp_path, makes, LEFT_ALONE[machine], machine=machine, proxy=True) as rig:
        life = Life(rig, makes, LEFT_ALONE[machine])
        shown = await rig.disks()
        assert {target: (shown[target].bus, shown[target].source, shown[target].format) for target in life.targets} == {
            make.target: (make.bus, str(rig.source(make.target)), make.format) for make in makes
        }
        assert set(shown) == {*life.targets, *(drive.target for drive in life.alone)}
        between = await life.between()
        await snapshot_and_reopen(life)
        await copy_and_pivot(life)
        await merge_commit_and_rebase(life)
        await rig.settled()
        assert (await rig.status(), await rig.qemu_jobs()) == ("running", {})
        # What is open: each disk's image, with the cache mode of the first, and nothing else of ours.
        nodes = await rig.nodes()
        assert {nodes[name]["file"]: nodes[name]["cache"]["direct"] for name in await rig.our_nodes()} == {
            f"{rig.path}/{make.target}.s4": make.direct for make in makes
        }
        assert len(await rig.our_nodes()) == 2 * len(makes)
        assert await life.between() == between, "limits and filters stay"
        assert "qom-set" not in rig.proxy.commands(), "setting a device's drive kills some guests"
        await rig.guest.stop()
        life.check()


async def snapshot_and_reopen(life: Life) -> None:
    """Of all disks that the guest can write to, each with a mirror; it is said which drives are left out."""
    rig, path, dst = life.rig, life.rig.path, life.rig.dst
    await life.write()
    life.leaves(f"{path}/TARGET.img")
    disks = tuple(DiskWish(name=each, mirror=MirrorWish(file=f"{dst}/{each}.s1")) for each in life.targets)
    wish = SnapshotWish(name="s1", disks=disks)
    made = await rig.ask(ask.CreateSnapshot(domain="vm1", wish=wish, flags=SnapshotCreate.ATOMIC))
    assert {disk.target for disk in made.disks} == set(life.targets)
    assert made.left_out == {drive.target: drive.reason for drive in life.alone}
    await life.write()
    await life.chains(f"{path}/TARGET.s1", f"{path}/TARGET.img")
    await rig.ready(*life.targets)
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


async def merge_commit_and_rebase(life: Life) -> None:
    """Merge a snapshot under a newer one, then that one, which the guest is on; pull all up into a third."""
    rig, path, dst = life.rig, life.rig.path, life.rig.dst
    for name in ("s2", "s3"):
        await rig.snapshot(name, only=life.targets)
        await life.write()
    await rig.delete("s2", 0)
    await life.chains(f"{path}/TARGET.s3", f"{dst}/TARGET.copy")
    await life.write()
    asked = len(rig.proxy.commands())
    await rig.delete("s3", 0)
    assert len(rig.proxy.commands()) - asked < 100 + 40 * len(life.targets), (
        "what a disk costs is the same for few and many"
    )
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


async def test_what_is_left_alone_is_refused_by_name(qemu: QemuBinaries, tmp_path: Path) -> None:
    alone = LEFT_ALONE["pc"]
    async with open_makes(qemu, tmp_path, makes_of(qemu, "pc"), alone) as rig:
        before = await rig.state()
        for drive in alone:
            target = drive.target
            wish = SnapshotWish(name="s1", disks=(DiskWish(name=target, file=f"{rig.path}/over"),))
            for request in (
                ask.CreateSnapshot(domain="vm1", wish=wish),
                ask.StartCopy(domain="vm1", disk=target, dest=f"{rig.dst}/copy"),
                ask.Commit(domain="vm1", disk=target),
                ask.Rebase(domain="vm1", disk=target),
            ):
                with pytest.raises(errors.DiskUnsuitable, match=f"{target}.*{drive.reason}") as caught:
                    await rig.ask(request)
                assert caught.value.outcome == "refused"
        assert await rig.state() == before


async def test_names_in_a_guest_that_was_started_anew(qemu: QemuBinaries, tmp_path: Path) -> None:
    """What nobody gave an id has a path that counts devices, processors as well: it is named as at first."""
    wanted = ("-hda", "-drive if=virtio")
    makes = [make for make in makes_of(qemu, "pc") if make.given in wanted and make.format == "qcow2"]
    names = {"vdg": "vda", "hda": "hda"}
    async with open_makes(qemu, tmp_path, makes) as rig:
        before = await rig.disks()
        assert {target: before[target].source for target in before} == {
            name: str(rig.source(file)) for file, name in names.items()
        }
        await rig.guest.stop()
        args = [word for make in makes for word in make.arguments(rig.path)]
        async with TestQemu(qemu, rig.path, args=["-smp", "2", "-device", "e1000", *args]) as again:
            assert again.qmp == rig.guest.qmp
            after = await rig.disks()
            assert {name: disk.source for name, disk in after.items()} == {
                name: disk.source for name, disk in before.items()
            }
            assert all(after[name].qdev != disk.qdev for name, disk in before.items())


async def test_an_image_that_was_deleted(rig: Rig) -> None:
    """QEMU has it open still: no overlay could back onto it, and a copy saves the disk."""
    await rig.write("vda", 1)
    rig.source("vda").unlink()
    before = await rig.state()
    with pytest.raises(errors.ImageUnsuitable, match=r"vda\.img can't be used: it is not there any more"):
        await rig.snapshot()
    assert await rig.state() == before
    await rig.snapshot(only=["vdb", "sda"])
    await rig.copy("vda")
    await rig.write("vda", 2, MIB)
    await rig.pivot("vda")
    await rig.snapshot("s2")
    await rig.guest.stop()
    assert rig.holds("vda", rig.dest("vda"), "qcow2")


async def test_a_temporary_image_of_qemus(qemu: QemuBinaries, tmp_path: Path) -> None:
    """`snapshot=on`: what is written goes to a file that has no name."""
    image = make_image(qemu, tmp_path / "kept.img", "qcow2", SIZE)
    args = ["-drive", f"file={image},format=qcow2,if=virtio,snapshot=on"]
    async with open_guest(qemu, tmp_path, args, {}) as rig:
        (disk,) = (await rig.disks()).values()
        left_behind = Path(disk.source).with_suffix(".s1")
        with pytest.raises(errors.ImageUnsuitable, match="snapshot=on"):
            await rig.ask(ask.CreateSnapshot(domain="vm1", wish=SnapshotWish(name="s1")))
        assert not left_behind.exists()
        await rig.copy("vda")
        await rig.pivot("vda")
        assert await rig.chain("vda") == [str(rig.dest("vda"))]


async def test_an_encrypted_image_is_left_alone(qemu: QemuBinaries, tmp_path: Path) -> None:
    """What is made for it would hold in the clear what the guest writes."""
    key = "secret,id=key,data=abc"
    image = encrypted_image(qemu, tmp_path / "luks.img", key)
    args = ["-object", key, "-drive", f"file={image},format=qcow2,if=virtio,encrypt.key-secret=key"]
    async with open_rig(qemu, tmp_path, args=args) as rig:
        made = await rig.ask(ask.CreateSnapshot(domain="vm1", wish=SnapshotWish(name="s1")))
        assert made.left_out == {"vdc": f"{image} is encrypted, and what the guest writes to a new image would not be"}
        with pytest.raises(errors.DiskUnsuitable, match=r"luks\.img is encrypted"):
            await rig.copy("vdc")


def encrypted_image(qemu: QemuBinaries, path: Path, key: str) -> Path:
    how = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    command = [qemu.img, "create", "-q", "--object", key, "-f", "qcow2", "-o", how, path, str(SIZE)]
    for _attempt in range(ATTEMPTS):
        made = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        if NO_TIME_SEEN not in made.stderr:
            break
    assert made.returncode == 0, made.stderr
    return path


def test_the_docs_name_these_and_no_others() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guests.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    disks, alone = rows.index("| disk | given as | format | with |"), rows.index("| drive | reason |")
    assert set(rows[disks + 1 : alone]) == {make.row for make in (*PC, *Q35)}
    assert {drive.row for drive in (*PC_ALONE, *Q35_ALONE)} <= set(rows[alone + 1 :])
