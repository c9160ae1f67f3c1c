"""Snapshots that move with their guest: dumped here, redefined there, and as good as before; and internal ones."""

import itertools
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rig import ALL, MIB, SIZE, Rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.flags import SnapshotCreate, SnapshotDelete
from blockferry.model.snapshot import DiskWish, SnapshotWish
from blockferry.service import Service
from blockferry.testing import QemuBinaries, check_image, find_qemu, image_sha256, make_image, write_pattern
from blockferry.testing.crash import Crasher

REDEFINE, CURRENT = SnapshotCreate.REDEFINE, SnapshotCreate.CURRENT


def redefining(xml: str | None, flags: int = 0, **more: Any) -> ask.CreateSnapshot:
    return ask.CreateSnapshot(domain="vm1", xml=xml, flags=int(REDEFINE | flags), **more)


def listed(views: Sequence[view.SnapshotView]) -> list[view.SnapshotView]:
    """What has to be the same on both sides: all but the number of the operation."""
    return [msgspec.structs.replace(each, operation=None) for each in views]


async def move(rig: Rig) -> list[view.SnapshotView]:
    """Let the guest be another state directory's; the snapshots as they were listed before."""
    before = (await rig.ask(ask.ListSnapshots(domain="vm1"))).snapshots
    await rig.service.close()
    there = rig.path / "there/state"
    there.mkdir(parents=True)
    rig.service = await Service.open(there)
    await rig.reattach()
    assert await rig.snapshots() == {}
    return listed(before)


# --- a guest that runs ----------------------------------------------------------------------------------------


async def test_snapshots_move_and_are_merged_there(rig: Rig) -> None:
    """Chains of three disks, with a snapshot of one disk alone, of a header without a name, and a branch that was left."""
    await rig.layers(2)
    wish = SnapshotWish(
        name="left", only_these=True, disks=(DiskWish(name="vda", file=f"{rig.path}/vda.left", mode="none"),)
    )
    await rig.ask(ask.CreateSnapshot(domain="vm1", wish=wish))
    await rig.copy("vda", base=rig.layer("vda", 2), format="qcow2")
    await rig.pivot("vda")
    assert await rig.pauses_heard() == rig.pauses_of_a_window
    await rig.snapshot("s4", only=["vda"])
    await rig.write("vda", 0xC4, 3 * MIB)
    before = await move(rig)
    assert [(each.name, each.parent, each.current) for each in before] == [
        *[("s1", None, False), ("s2", "s1", False), ("left", "s2", False), ("s4", None, True)]
    ]
    files = rig.files()
    made = [await rig.ask(redefining(each.xml, CURRENT if each.current else 0)) for each in before]
    assert rig.files() == files
    assert listed((await rig.ask(ask.ListSnapshots(domain="vm1"))).snapshots) == before
    assert [each.notes for each in made if each.notes] == [
        (f"vda: {rig.path}/vda.left is not on another image in its chain now: it can't be merged",)
    ]
    assert await rig.operations() == [("redefine", "done")] * 4
    assert await rig.pauses_heard() == []
    # As good as the old ones.
    await rig.delete("s2", 0)
    assert await rig.chain("vdb") == [rig.layer("vdb", 1), rig.layer("vdb", 0)]
    assert await rig.chain("vda") == [
        f"{rig.path}/vda.s4",
        str(rig.dest("vda")),
        rig.layer("vda", 1),
        rig.layer("vda", 0),
    ]
    await rig.delete("s4", 0)
    await rig.delete("s1", 0)
    await rig.guest.stop()
    assert rig.holds("vda", rig.dest("vda"), "qcow2")
    assert rig.holds("vdb", rig.source("vdb"), "raw")
    for target in ALL[1:]:
        assert not (rig.path / f"{target}.s2").exists()
    check_image(rig.qemu, rig.source("sda"), "qcow2")


LIBVIRT = """<domainsnapshot>
  <name>{name}</name>
  <state>disk-snapshot</state>
  {parent}
  <creationTime>1763856000</creationTime>
  <memory snapshot='no'/>
  <disks>
    <disk name='vda' snapshot='external' type='file'><driver type='qcow2'/><source file='{file}'/></disk>
    <disk name='vdb' snapshot='no'/>
    <disk name='sda' snapshot='no'/>
  </disks>
  <domain type='kvm' id='3'>
    <name>vm1</name>
    <devices>
      <disk type='file' device='disk'>
        <driver name='qemu' type='qcow2'/><source file='{backing}' index='2'/><target dev='vda' bus='virtio'/>
      </disk>
    </devices>
  </domain>
  <inactiveDomain type='kvm'><name>vm1</name></inactiveDomain>
  <cookie><cpu mode='custom'><model fallback='forbid'>qemu64</model></cpu></cookie>
  <active>1</active>
</domainsnapshot>
"""


def libvirts(rig: Rig, name: str, number: int, parent: str | None = None) -> str:
    above = f"<parent><name>{parent}</name></parent>" if parent else ""
    file, backing = rig.layer("vda", number), rig.layer("vda", number - 1)
    return LIBVIRT.format(name=name, parent=above, file=file, backing=backing)


async def test_libvirts_dumps_of_a_guest_that_was_libvirts(rig: Rig) -> None:
    """All of the same second, and named against the order: the tree says which came first."""
    await rig.layers(3, only=["vda"])
    for name in ("s1", "s2", "s3"):
        await rig.delete(name, SnapshotDelete.METADATA_ONLY)
    await rig.ask(redefining(libvirts(rig, "c", 1)))
    await rig.ask(redefining(libvirts(rig, "b", 2, "c")))
    top = await rig.ask(redefining(libvirts(rig, "a", 3, "b"), CURRENT))
    assert (top.current, top.state, top.notes, top.parent) == (True, "disk-snapshot", (), "b")
    assert list(await rig.snapshots()) == ["c", "b", "a"]
    await rig.delete("c", SnapshotDelete.CHILDREN_ONLY)
    await rig.delete("c", 0)
    assert await rig.chain("vda") == [rig.layer("vda", 0)]
    await rig.guest.stop()
    assert rig.holds("vda", rig.source("vda"), "qcow2")


async def test_mirrors_are_remembered_and_not_started(rig: Rig) -> None:
    await rig.snapshot(mirrors=["vda"], backing={"vda": rig.dst / "base"}, only=["vda"])
    await rig.delete("s1", SnapshotDelete.REMOVE_MIRROR)
    (before,) = await move(rig)
    made = await rig.ask(redefining(before.xml))
    assert await rig.jobs() == {}
    assert f'<mirror file="{rig.dst}/vda.s1" backing="{rig.dst}/base" backingFormat="qcow2"/>' in made.xml
    with pytest.raises(errors.NoMirror, match="that of vda is gone"):
        await rig.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    # Its own dump redefines it again.
    assert listed([await rig.ask(redefining(made.xml))]) == listed([made])


async def test_what_is_refused_is_not_done(rig: Rig) -> None:
    await rig.layers(2, only=["vda"])
    old, new = (await rig.snapshots()).values()
    before, operations = await rig.state(), await rig.operations()
    for request, kind, match in [
        (redefining(old.xml, CURRENT), errors.SnapshotNotCurrent, "vda is on .*/vda.s2, not on .*/vda.s1"),
        (redefining(libvirts(rig, "x", 1, "no")), errors.InvalidXml, "no snapshot 'no'"),
        (redefining(libvirts(rig, "x", 1, "x")), errors.InvalidXml, "its own parent"),
        (redefining(libvirts(rig, "s1", 1, "s2")), errors.InvalidXml, "s2' was taken on 's1' itself"),
        (redefining(libvirts(rig, "s1", 2)), errors.InvalidXml, "of other images"),
        (redefining(str(old.xml).replace('"vda"', '"vdx"')), errors.InvalidXml, "no disk 'vdx'; the domain has vda"),
        (redefining(str(old.xml).replace('"vda"', '"vdb"')), errors.InvalidXml, "in the chain of vda"),
        (redefining(libvirts(rig, "x", 1).replace(">vm1<", ">vm2<")), errors.InvalidXml, "'vm2', and this is vm1"),
        (redefining(str(old.xml).replace("external", "internal")), errors.InvalidXml, "internal"),
        (redefining(old.xml, name="other"), errors.BadRequest, "the XML's name is 's1'"),
        (redefining(str(old.xml).replace("<name>s1</name>", "")), errors.InvalidXml, "no <name>"),
        (redefining(None, wish=None), errors.BadRequest, "from XML"),
        (redefining(old.xml, SnapshotCreate.REUSE_EXT), errors.BadRequest, "REUSE_EXT"),
        (redefining(old.xml, SnapshotCreate.NO_METADATA), errors.BadRequest, "NO_METADATA"),
        (ask.CreateSnapshot(domain="vm1", xml=old.xml, flags=int(CURRENT)), errors.BadRequest, "say REDEFINE"),
    ]:
        with pytest.raises(kind, match=match) as caught:
            await rig.ask(request)
        assert caught.value.outcome == "refused"
    assert await rig.state() == before
    assert await rig.operations() == operations
    assert listed((await rig.snapshots()).values()) == listed([old, new])


async def test_a_look_before_and_a_header_that_says_the_backing(rig: Rig) -> None:
    """An overlay that is in no chain: XML without <domain> leaves it to the header."""
    branch = make_image(rig.qemu, rig.path / "branch", "qcow2", backing=rig.source("vdb"), backing_fmt="raw")
    disk = f"<disk name='vdb'><source file='{branch}'/></disk>"
    head = "<creationTime>5</creationTime><state>shutoff</state>"
    xml = f"<domainsnapshot>{head}<disks>{disk}</disks></domainsnapshot>"
    plan = await rig.ask(redefining(xml, name="b", dry_run=True))
    assert (plan.operation, plan.steps) == ("redefine snapshot b", ("record: redefine snapshot b",))
    assert await rig.snapshots() == {}
    made = await rig.ask(redefining(xml, name="b", description="left behind"))
    assert (made.state, made.created, made.current, made.description) == ("shutoff", 5, False, "left behind")
    assert (made.disks[0].backing, made.disks[0].backing_format) == (str(rig.source("vdb")), "raw")
    assert "<state>shutoff</state>" in made.xml
    assert [event.data["snapshot"] for event in await rig.events("snapshot-created")] == ["b"]
    branch.unlink()
    await rig.delete("b", SnapshotDelete.METADATA_ONLY)
    with pytest.raises(errors.ImageUnsuitable, match="what it backs onto, and No such file"):
        await rig.ask(redefining(xml, name="b"))


# --- internal snapshots ---------------------------------------------------------------------------------------


async def internal(rig: Rig) -> list[tuple[str, str, str]]:
    answer = await rig.ask(ask.ListSnapshots(domain="vm1"))
    return [(each.name, each.target, Path(each.file).name) for each in answer.internal]


async def test_internal_snapshots_are_listed_and_refused(rig: Rig) -> None:
    assert await internal(rig) == []
    for node in ("d0", "d2"):
        await rig.guest.command("blockdev-snapshot-internal-sync", {"device": node, "name": "in side"})
    await rig.snapshot(only=["vda"])
    # One is in the backing of an overlay by now.
    assert await internal(rig) == [("in side", "vda", "vda.img"), ("in side", "sda", "sda.img")]
    (first, _second) = (await rig.ask(ask.ListSnapshots(domain="vm1"))).internal
    assert (first.id, first.memory, first.created > 1e9) == ("1", 0, True)
    before = await rig.state()
    for request in (
        ask.ShowSnapshot(domain="vm1", snapshot="in side"),
        ask.DeleteSnapshot(domain="vm1", snapshot="in side"),
        ask.DeleteSnapshot(domain="vm1", snapshot="in side", flags=SnapshotDelete.METADATA_ONLY),
    ):
        with pytest.raises(errors.SnapshotInternal, match=r"qemu-img snapshot -d 'in side' IMAGE") as caught:
            await rig.ask(request)
        assert caught.value.images == f"{rig.source('vda')} (vda), {rig.source('sda')} (sda)"
    with pytest.raises(errors.NoSuchSnapshot):
        await rig.ask(ask.ShowSnapshot(domain="vm1", snapshot="outside"))
    assert await rig.state() == before


async def test_an_image_with_an_internal_snapshot_is_not_removed(rig: Rig) -> None:
    """A merge removes the overlay, and what is inside it nobody else has."""
    await rig.snapshot(only=["vda"])
    (node,) = [
        name for name, each in (await rig.nodes()).items() if each["file"].endswith("s1") and each["drv"] == "qcow2"
    ]
    await rig.guest.command("blockdev-snapshot-internal-sync", {"device": node, "name": "mine"})
    before = await rig.state()
    with pytest.raises(
        errors.DiskUnsuitable, match=r"vda\.s1 would be removed, and it has an internal snapshot 'mine'"
    ):
        await rig.delete("s1", 0)
    assert await rig.state() == before
    await rig.guest.command("blockdev-snapshot-delete-internal-sync", {"device": node, "name": "mine"})
    await rig.delete("s1", 0)
    assert await rig.chain("vda") == [str(rig.source("vda"))]


# --- a guest that is shut off ---------------------------------------------------------------------------------

DOMAIN = """<domain type='qemu'>
  <name>vm1</name>
  <uuid>6f0dd5b1-4f53-4a4e-93b7-7b2f0f4b7c11</uuid>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='{active}'/><target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/></disk>
  </devices>
</domain>
"""


@dataclass
class Resting:
    """A defined guest on /two, on /one, on /base, that has never been started; `written` is what its disk holds."""

    service: Service
    binaries: QemuBinaries
    folder: Path
    written: bytearray = field(repr=False)

    async def ask(self, request: ask.Request) -> Any:
        return await self.service.submit(request)

    async def list(self) -> view.SnapshotList:
        return await self.ask(ask.ListSnapshots(domain="vm1"))

    def xml(self, name: str, file: str, parent: str | None = None) -> str:
        """As libvirt's, with the guest's UUID alone, as it once wrote."""
        above = f"<parent><name>{parent}</name></parent>" if parent else ""
        head = f"<name>{name}</name><creationTime>7</creationTime><state>shutoff</state>{above}"
        disk = f"<disk name='vda' snapshot='external'><source file='{self.folder}/{file}'/></disk>"
        domain = "<domain><uuid>6f0dd5b1-4f53-4a4e-93b7-7b2f0f4b7c11</uuid></domain>"
        return f"<domainsnapshot>{head}<disks>{disk}<disk name='sdb' snapshot='no'/></disks>{domain}</domainsnapshot>"


@pytest.fixture
async def resting(tmp_path: Path) -> AsyncIterator[Resting]:
    qemu = find_qemu("distribution")
    written = bytearray(SIZE)
    below: Path | None = None
    for number, name in enumerate(("base", "one", "two")):
        more = {} if below is None else {"backing": below, "backing_fmt": "qcow2"}
        below = make_image(qemu, tmp_path / name, "qcow2", SIZE, **more)
        write_pattern(qemu, below, "qcow2", number * MIB, 2 * MIB, 0x51 + number)
        written[number * MIB : (number + 2) * MIB] = bytes([0x51 + number]) * (2 * MIB)
    (tmp_path / "state").mkdir()
    service = await Service.open(tmp_path / "state")
    guest = Resting(service, qemu, tmp_path, written)
    await guest.ask(ask.Define(xml=DOMAIN.format(emulator=qemu.system, active=below)))
    try:
        yield guest
    finally:
        await guest.service.close()


async def test_redefined_while_shut_off_and_merged_when_it_runs(resting: Resting) -> None:
    first = await resting.ask(redefining(resting.xml("s1", "one")))
    assert (first.current, first.disks[0].backing, first.notes) == (False, f"{resting.folder}/base", ())
    with pytest.raises(errors.SnapshotNotCurrent, match=r"vda is on .*/two, not on .*/one"):
        await resting.ask(redefining(resting.xml("s1", "one"), CURRENT))
    with pytest.raises(errors.InvalidXml, match="it is a snapshot of '7f0dd5b1"):
        await resting.ask(redefining(resting.xml("s2", "two").replace("6f0dd5b1", "7f0dd5b1")))
    await resting.ask(redefining(resting.xml("s2", "two", "s1"), CURRENT))
    assert [(each.name, each.parent, each.current) for each in (await resting.list()).snapshots] == [
        *[("s1", None, False), ("s2", "s1", True)]
    ]
    assert (await resting.ask(ask.ShowDomain(domain="vm1"))).current_snapshot == "s2"
    await resting.ask(ask.Start(domain="vm1", paused=True))
    assert (await resting.ask(ask.ShowDomain(domain="vm1"))).current_snapshot == "s2"
    await resting.ask(ask.DeleteSnapshot(domain="vm1", snapshot="s1"))
    await resting.ask(ask.DeleteSnapshot(domain="vm1", snapshot="s2"))
    shown = await resting.ask(ask.ShowDomain(domain="vm1"))
    await resting.ask(ask.Stop(domain="vm1", force=True))
    assert {disk.target: [image.file for image in disk.chain] for disk in shown.disks} == {
        "vda": [f"{resting.folder}/base"],
        "sdb": [],
    }
    expected = resting.folder / "expected"
    expected.write_bytes(resting.written)
    base = resting.folder / "base"
    assert image_sha256(resting.binaries, base, "qcow2") == image_sha256(resting.binaries, expected, "raw")


def internal_command(guest: Resting, image: str, option: str, name: str) -> None:
    command = [guest.binaries.img, "snapshot", option, name, guest.folder / image]
    subprocess.run(command, check=True, timeout=20)


async def test_internal_snapshots_of_a_guest_that_is_shut_off(resting: Resting) -> None:
    for image in ("one", "two"):
        internal_command(resting, image, "-c", "fresh")
    found = [(each.name, each.target, Path(each.file).name) for each in (await resting.list()).internal]
    assert found == [("fresh", "vda", "two"), ("fresh", "vda", "one")]
    for request in (
        ask.ShowSnapshot(domain="vm1", snapshot="fresh"),
        ask.RevertSnapshot(domain="vm1", snapshot="fresh"),
        ask.DeleteSnapshot(domain="vm1", snapshot="fresh"),
    ):
        with pytest.raises(errors.SnapshotInternal, match=r"inside .*/two \(vda\), .*/one \(vda\):"):
            await resting.ask(request)
    # What the message says to type.
    for image in ("one", "two"):
        internal_command(resting, image, "-d", "fresh")
    assert (await resting.list()).internal == ()


async def test_a_guest_that_was_reverted_is_still_on_that_snapshot(resting: Resting) -> None:
    """libvirt's XML has no word for the overlay that a revert has made; our dump has."""
    await resting.ask(redefining(resting.xml("s1", "two")))
    await resting.ask(ask.RevertSnapshot(domain="vm1", snapshot="s1"))
    (before,) = (await resting.list()).snapshots
    assert before.current
    await resting.ask(ask.DeleteSnapshot(domain="vm1", snapshot="s1", flags=SnapshotDelete.METADATA_ONLY))
    with pytest.raises(errors.SnapshotNotCurrent, match=r"vda is on .*two\.s1-r"):
        await resting.ask(redefining(resting.xml("s1", "two"), CURRENT))
    await resting.ask(redefining(before.xml, CURRENT))
    assert listed((await resting.list()).snapshots) == [before]
    # Again from XML that does not know of the revert: it is not forgotten.
    await resting.ask(redefining(resting.xml("s1", "two"), CURRENT))
    assert listed((await resting.list()).snapshots) == [before]


async def test_killed_at_every_moment_it_is_remembered_or_not(resting: Resting) -> None:
    """And the operation says which. A snapshot that was there is the old one or the new one."""
    await resting.ask(redefining(resting.xml("s1", "one")))
    (old,) = (await resting.list()).snapshots
    await resting.service.close()
    shutil.copytree(resting.folder / "state", resting.folder / "template")
    requests = {
        "again": redefining(resting.xml("s1", "one"), description="new"),
        "another": redefining(resting.xml("s2", "two", "s1")),
    }
    seen = set()
    with Crasher() as crasher:
        for (what, request), at in itertools.product(requests.items(), range(6)):
            state = resting.folder / f"{what}-{at}"
            shutil.copytree(resting.folder / "template", state)
            result = crasher.run(state, [request], at=at)
            assert result.error is None
            # Before and after the plan, and the record, with which it ends.
            assert result.killed == (at < 4)
            resting.service = await Service.open(state)
            snapshots = {each.name: each for each in (await resting.list()).snapshots}
            operations = [each.state for each in (await resting.ask(ask.ListOperations())).operations]
            await resting.service.close()
            is_new = snapshots["s1"].description == "new" or "s2" in snapshots
            assert is_new or listed(snapshots.values()) == listed([old])
            assert operations in ([["done", "done"]] if is_new else [["done", "undone"], ["done"]])
            seen.add((what, is_new))
    assert seen == {(what, is_new) for what in requests for is_new in (False, True)}
