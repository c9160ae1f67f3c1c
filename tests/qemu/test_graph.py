"""The block graph as a real QEMU has it: nothing is left out, nothing is drawn twice."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import click
import msgspec
import pytest
from defined import open_defined
from makes import LEFT_ALONE, makes_of, open_makes
from rig import MIB, SIZE, Rig, open_rig

from blockferry import errors
from blockferry.interfaces.cli import picture, tree
from blockferry.interfaces.cli.sketch import sketch
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.testing import QemuBinaries, make_image


@pytest.fixture
async def many(qemu: QemuBinaries, tmp_path: Path) -> AsyncIterator[Rig]:
    """The rig's disks; vdc and vdd on one base; a drive without a disc; a node that nobody uses; one for an export."""
    base = make_image(qemu, tmp_path / "base.img", "qcow2", SIZE)
    args = ["-blockdev", f"driver=file,node-name=base-file,filename={base},read-only=on"]
    args += ["-blockdev", "driver=qcow2,node-name=base,file=base-file,read-only=on"]
    for name, address in (("c", "0x19"), ("d", "0x1a")):
        overlay = make_image(qemu, tmp_path / f"{name}.img", "qcow2", backing=base, backing_fmt="qcow2")
        args += ["-blockdev", f"driver=file,node-name={name}-file,filename={overlay}"]
        args += ["-blockdev", f"driver=qcow2,node-name={name},file={name}-file,backing=base"]
        args += ["-device", f"virtio-blk-pci,drive={name},id={name}-dev,addr={address}"]
    args += ["-drive", "if=none,id=drive,media=cdrom", "-device", "ide-cd,drive=drive,id=cd"]
    for name in ("left", "exported"):
        args += ["-blockdev", f"driver=null-co,node-name={name},size={MIB}"]
    async with open_rig(qemu, tmp_path, args=args) as rig:
        yield rig


async def graph(rig: Rig) -> view.GraphView:
    return await rig.ask(ask.ShowGraph(domain="vm1"))


def job_of(shown: view.GraphView, disk: str) -> view.GraphJob:
    return next(job for job in shown.jobs if job.disk == disk)


def drawn(shown: view.GraphView) -> tuple[str, str]:
    """As text and as a picture, each of which names every node, and has a place for each exactly once."""
    plain = json.loads(msgspec.json.encode(shown))
    places = [layer.node["id"] for row in sketch(plain).rows for layer in row.layers]
    places += [
        side.node["id"] for row in sketch(plain).rows for layer in row.layers for side in layer.sides if side.here
    ]
    assert sorted(places) == sorted(node.id for node in shown.nodes)
    written = click.unstyle(tree.graph(plain)), picture.graph(plain)
    assert all(node.id in each for node in shown.nodes for each in written)
    return written


async def test_a_snapshot_with_mirrors_a_shared_base_and_an_empty_drive(many: Rig) -> None:
    await many.snapshot("s1", mirrors=["vda", "vdb"])
    await many.ready("vda", "vdb")
    await many.guest.command(
        "nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(many.path / "nbd.sock")}}}
    )
    await many.guest.command("block-export-add", {"type": "nbd", "id": "e", "node-name": "exported"})
    shown = await graph(many)
    devices = {device.target: device for device in shown.devices}
    assert {device.device for device in devices.values() if device.root is None} == {"cdrom"}
    assert set(devices) == {disk.target for disk in (await many.show()).disks}
    assert {node.id for node in shown.nodes} == set(await many.nodes())
    edges = {(edge.parent, edge.role, edge.child) for edge in shown.edges}
    assert {("c", "backing", "base"), ("d", "backing", "base"), ("base", "file", "base-file")} <= edges
    for target in ("vda", "vdb"):
        job = job_of(shown, target)
        assert (job.type, job.state, job.snapshot, job.operation) == ("mirror", "ready", "s1", 1)
        assert job.source == devices[target].root
        assert (job.dest, "file", f"{job.dest}f") in edges
        assert {node.file for node in shown.nodes if node.id == f"{job.dest}f"} == {str(many.dst / f"{target}.s1")}
    assert (shown.unused, [(user.name, user.node) for user in shown.users]) == (("left",), [("", "exported")])
    kinds = {node.id: node.kind for node in shown.nodes}
    assert (kinds[job.source], kinds["base"], kinds["base-file"]) == ("filter", "format", "protocol")
    text, svg = drawn(shown)
    assert "base  qcow2  (shared: see vdc)" in text
    assert "mirror · ready" in svg


@pytest.mark.parametrize("machine", ["pc", "q35"])
async def test_disks_of_every_make(qemu: QemuBinaries, tmp_path: Path, machine: str) -> None:
    async with open_makes(qemu, tmp_path, makes_of(qemu, machine), LEFT_ALONE[machine], machine=machine) as rig:
        shown = await graph(rig)
        assert {node.id for node in shown.nodes} == set(await rig.nodes())
        assert {device.target: device.root is None for device in shown.devices} == {
            target: disk.source is None for target, disk in (await rig.disks()).items()
        }
        drawn(shown)


async def test_a_copy_onto_a_lower_base_while_it_is_filled_and_when_it_is_lost(rig: Rig) -> None:
    await rig.layers(2, only=["vda"])
    await rig.copy("vda", base=rig.layer("vda", 0), bandwidth=1)
    filled = job_of(await graph(rig), "vda")
    assert (filled.type, filled.state) == ("fill", "copying")
    text, svg = drawn(await graph(rig))
    assert "shared with vda's fill" in text
    assert "fill · copying" in svg
    await rig.copy("vdb")
    await rig.ready("vdb")
    (name,) = [name for name in await rig.qemu_jobs() if "-vdb-m" in name]
    await rig.guest.command("block-job-cancel", {"device": name, "force": True})
    assert (await rig.ended("vdb")).state == "lost"
    lost = job_of(await graph(rig), "vdb")
    assert (lost.state, lost.dest, lost.file) == ("lost", None, str(rig.dest("vdb")))
    assert "copy · lost" in drawn(await graph(rig))[1]


async def test_a_commit_and_a_backup_of_somebody_else(rig: Rig) -> None:
    await rig.layers(2, only=["vda"])
    await rig.commit("vda", top=rig.layer("vda", 1), bandwidth=1)
    target = make_image(rig.qemu, rig.path / "backup.qcow2", "qcow2", SIZE)
    await rig.guest.command(
        "blockdev-add",
        {"node-name": "backup", "driver": "qcow2", "file": {"driver": "file", "filename": str(target)}},
    )
    await rig.guest.command(
        "blockdev-backup", {"job-id": "theirs", "device": "d2", "target": "backup", "sync": "full", "speed": 1}
    )
    shown = await graph(rig)
    commit = job_of(shown, "vda")
    assert (commit.type, commit.state, commit.source is not None, commit.dest) == ("commit", "running", True, "d0")
    (theirs,) = [job for job in shown.jobs if job.operation is None]
    assert (theirs.id, theirs.type, theirs.dest, theirs.file) == ("theirs", "backup", "backup", str(target))
    text, svg = drawn(shown)
    assert "not started by blockferry" in text
    assert "commit running" in svg
    assert "backup running" in svg


async def test_a_guest_that_is_shut_off(rig: Rig) -> None:
    """Its images are drawn, a base of two disks once; of one that is gone nothing is known any more."""
    base = make_image(rig.qemu, rig.path / "base.qcow2", "qcow2", SIZE)
    disks = ""
    for target in ("vda", "vdb"):
        overlay = rig.path / f"{target}.defined"
        make_image(rig.qemu, overlay, "qcow2", backing=base, backing_fmt="qcow2")
        disks += f"<disk type='file'><driver type='qcow2'/><source file='{overlay}'/><target dev='{target}' bus='virtio'/></disk>"
    disks += "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>"
    xml = f"<domain type='qemu'><name>vm2</name><memory>65536</memory><os><type>hvm</type></os><devices>{disks}</devices></domain>"
    await rig.ask(ask.Define(xml=xml))
    shown = await rig.ask(ask.ShowGraph(domain="vm2"))
    assert (shown.state, [device.root for device in shown.devices][2]) == ("shut off", None)
    assert [(node.id, node.kind) for node in shown.nodes] == [
        (str(rig.path / name), "image") for name in ("vda.defined", "base.qcow2", "vdb.defined")
    ]
    assert f"{base}  qcow2  (shared: see vda)" in drawn(shown)[0]
    await rig.guest.stop()
    with pytest.raises(errors.BlockferryError) as raised:
        await graph(rig)
    assert raised.value.code in {"guest-gone", "qmp-unreachable"}


async def test_a_mirror_that_rests(qemu: QemuBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKFERRY_QEMU_DIR", str(qemu.system.parent))
    async with open_defined(qemu, tmp_path) as guest:
        await guest.start()
        await guest.snapshot("s1", ("vda",), only=("vda",))
        await guest.ready("vda")
        runs = await guest.ask(ask.ShowGraph(domain="g1"))
        chain = (await guest.disk("vda")).chain
        files = {node.id: node.file for node in runs.nodes}
        below = {edge.parent: edge.child for edge in runs.edges if edge.role == "file"}
        assert files[below[job_of(runs, "vda").base or ""]] == chain[1].file
        assert "(once the guest goes over)" in drawn(runs)[0]
        await guest.stop()
        rests = await guest.ask(ask.ShowGraph(domain="g1"))
        assert [node.id for node in rests.nodes[:2]] == [image.file for image in chain]
        mirror = job_of(rests, "vda")
        assert (mirror.state, mirror.dest, mirror.file) == ("resting", None, str(guest.dest("vda", "s1")))
        text, svg = drawn(rests)
        assert "╚═▶ mirror  resting  of snapshot s1" in text
        assert "mirror · resting" in svg
