"""The library: the same calls in this process and over the host process, on a real QEMU."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from commandkit import MIB, stop

import blockferry
from blockferry import errors
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.testing import TestQemu

SLOW = 2 * MIB


@pytest.fixture(params=["open", "connect"])
async def ferry(request: pytest.FixtureRequest, state_dir: Path) -> AsyncIterator[blockferry.Ferry]:
    async with getattr(blockferry, request.param)(state_dir) as ferry:
        yield ferry


@pytest.fixture
async def vm(ferry: blockferry.Ferry, guest: TestQemu) -> blockferry.Domain:
    return await ferry.attach("vm1", qmp=guest.qmp)


async def test_domains(ferry: blockferry.Ferry, guest: TestQemu) -> None:
    assert await ferry.list() == ()
    with pytest.raises(errors.NoSuchDomain):
        await ferry.domain("vm1")
    vm = await ferry.attach("vm1", qmp=guest.qmp)
    assert [row.name for row in await ferry.list()] == ["vm1"]
    assert (await vm.info()).pid == guest.pid
    assert (await vm.xml_desc()).startswith("<domain")
    graph = await vm.graph()
    assert [device.target for device in graph.devices] == ["vda", "vdb"]
    assert {device.root for device in graph.devices} <= {node.id for node in graph.nodes}
    assert (await ferry.domain("vm1")).name == "vm1"
    await ferry.detach("vm1")
    assert [event.type for event in await ferry.events()] == ["domain-attached", "domain-detached"]


async def test_a_mirrored_snapshot_from_xml(ferry: blockferry.Ferry, vm: blockferry.Domain, guest: TestQemu) -> None:
    """The proposal's own example."""
    folder = guest.directory
    xml = f"""<domainsnapshot><name>s1</name><disks>
      <disk name='{folder}/a.qcow2' snapshot='external'>
        <source file='{folder}/snap.img'/>
        <mirror file='{folder}/dest.img'/>
      </disk>
      <disk name='vdb' snapshot='no'/>
    </disks></domainsnapshot>"""
    snap = await vm.snapshot_create_xml(xml, blockferry.SnapshotCreate.ATOMIC)
    assert snap.name == "s1"
    assert f"{folder}/dest.img" in await vm.xml_desc()
    assert "<domainsnapshot" in await snap.xml_desc()
    assert [each.name for each in await vm.snapshots()] == ["s1"]
    with pytest.raises(errors.SnapshotHasMirrors):
        await (await vm.snapshot("s1")).delete()
    await snap.delete(blockferry.SnapshotDelete.REOPEN_MIRROR)
    assert (await vm.info()).disks[0].source == f"{folder}/dest.img"
    assert await vm.snapshots() == ()
    whats = [operation.what for operation in await ferry.operations("vm1")]
    assert len(whats) == 2
    assert (await ferry.operation(1)).steps


async def test_a_snapshot_without_xml(vm: blockferry.Domain, guest: TestQemu) -> None:
    mirror = MirrorWish(file=f"{guest.directory}/dest.img")
    wish = SnapshotWish(name="s1", disks=(DiskWish(name="vda", mirror=mirror),), only_these=True)
    snap = await vm.snapshot_create(wish)
    assert [disk.target for disk in snap.view.disks] == ["vda"]
    await snap.delete(blockferry.SnapshotDelete.REMOVE_MIRROR)
    await snap.delete(blockferry.SnapshotDelete.METADATA_ONLY)
    with pytest.raises(errors.NoSuchSnapshot):
        await vm.snapshot("s1")


async def test_a_copy_is_iterated_to_ready(vm: blockferry.Domain, guest: TestQemu) -> None:
    dest = guest.directory / "copy.raw"
    job = await vm.block_copy("vda", dest, bandwidth=SLOW, flags=blockferry.BlockCopy.CREATE_RAW)
    states = []
    async for progress in job:
        states.append(progress.state)
        assert progress.disk == "vda"
        if len(states) == 2:
            await job.set_speed(0)
    assert set(states[:-1]) == {"copying"}
    assert states[-1] == "ready"
    assert [progress.state async for progress in job] == ["ready"], "once more gives at least one"
    assert (await job.info()).state == "ready"
    await job.pivot()
    assert (await vm.info()).disks[0].source == str(dest)
    assert (await vm.job("vda")).view.state == "pivoted"


async def test_a_cancelled_copy_ends_the_iteration(vm: blockferry.Domain, guest: TestQemu) -> None:
    job = await vm.block_copy("vda", guest.directory / "copy.qcow2", bandwidth=SLOW)
    progress = aiter(job)
    assert (await anext(progress)).state == "copying"
    await vm.cancel(["vda"])

    async def rest() -> None:
        async for _ in progress:
            pass

    with pytest.raises(errors.JobLost, match="it was cancelled"):
        await rest()
    with pytest.raises(errors.NoSuchJob):
        await job.pivot()


async def test_iterating_through_a_kill_of_the_host_process(state_dir: Path, guest: TestQemu) -> None:
    async with blockferry.connect(state_dir) as ferry:
        vm = await ferry.attach("vm1", qmp=guest.qmp)
        job = await vm.block_copy("vda", guest.directory / "copy.qcow2", bandwidth=SLOW)
        states = []
        async for progress in job:
            states.append(progress.state)
            if len(states) == 1:
                await asyncio.to_thread(stop, state_dir, signal.SIGKILL)
            if len(states) == 3:
                await job.set_speed(0)
        assert states[-1] == "ready"
        await job.finish()


async def test_watching(ferry: blockferry.Ferry, guest: TestQemu) -> None:
    vm = await ferry.attach("vm1", qmp=guest.qmp)
    events = vm.watch(since=0)
    first = await anext(events)
    assert (first.seq, first.type) == (1, "domain-attached")
    await vm.snapshot_create(SnapshotWish(name="s1", disks=(DiskWish(name="vda"),), only_these=True))
    assert "snapshot" in (await anext(events)).type
    await events.aclose()  # type: ignore[attr-defined]


async def test_recover_has_nothing_to_do(ferry: blockferry.Ferry) -> None:
    assert (await ferry.recover()).operations == ()


def test_importing_the_package_loads_nothing() -> None:
    script = "import sys, blockferry; print(*{'msgspec', 'httpx', 'lxml', 'asyncio', 'click'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.split() == []


def test_public_names() -> None:
    assert blockferry.__version__
    assert set(blockferry.__all__) < set(dir(blockferry))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        blockferry.nothing  # noqa: B018
