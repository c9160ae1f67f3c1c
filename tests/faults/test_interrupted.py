"""Ctrl-C at any moment of a request that a program of somebody's carries out: nothing is left that recovery does not settle."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import ALL, Rig, open_rig

from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.flags import SnapshotCreate, SnapshotDelete
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.service import Service
from blockferry.testing import QemuBinaries, find_qemu
from blockferry.testing.crash import Accident, Crasher

SAMPLES = 6  # of 60 to 80 boundaries of each operation; which ones differs from one QEMU to the other


@pytest.fixture(scope="module")
def crasher() -> Iterator[Crasher]:
    with Crasher() as process:
        yield process


async def interrupted(rig: Rig, crasher: Crasher, request: ask.Request, at: int | None) -> int:
    """Carry it out with Ctrl-C at a boundary; how many there are, without."""
    await rig.service.close()
    accidents = [Accident(at=at, what="interrupt")] if at is not None else []
    result = crasher.run(rig.path / "state", [request], accidents=accidents)
    assert not result.killed, "it ends in good order"
    if at is None:
        assert result.error is None
    assert await rig.status() == "running", "nobody has to recover first"
    rig.service = await Service.open(rig.path / "state")
    return len(result.boundaries)


async def settled(rig: Rig, what: str, done: int) -> bool:
    """All is settled and the guest runs; whether one more than `done` operations of that kind went through."""
    report = await rig.ask(ask.Recover())
    assert isinstance(report, view.RecoveryReport)
    assert {each.row for each in report.operations} <= {"-"}, (
        "the opening has settled it, and a second time nothing is done"
    )
    ended = await rig.operations()
    assert {state for _what, state in ended} <= {"done", "undone", "in-progress"}
    assert await rig.status() == "running"
    return ended.count((what, "done")) == done + 1


def moments(count: int, first: int) -> range:
    return range(first, count, max(1, count // SAMPLES))


@pytest.mark.parametrize("which", ["distribution"])
async def test_pivot(which: str, tmp_path: Path, crasher: Crasher) -> None:
    async with open_rig(find_qemu(which), tmp_path) as rig:
        on = {target: str(rig.source(target)) for target in ALL}
        ends: list[bool] = []

        async def mirrored(number: int) -> dict[str, str]:
            dests = {target: str(rig.dst / f"{target}.{number}") for target in ALL}
            for target in ALL:
                if (await rig.states()).get(target) != "ready":
                    await rig.copy(target, dests[target])
            await rig.ready(*ALL)
            return {target: str(job.dest) for target, job in (await rig.jobs()).items()}

        pivot = ask.PivotJobs(domain="vm1", disks=ALL, timeout=20.0)
        on = await mirrored(0)
        count = await interrupted(rig, crasher, pivot, None)
        for number, at in enumerate(moments(count, which == "qemu10"), start=1):
            dests = await mirrored(number)
            await interrupted(rig, crasher, pivot, at)
            ends.append(await settled(rig, "pivot", 1 + sum(ends)))
            on = dests if ends[-1] else on
            for target in ALL:
                assert (await rig.chain(target))[0] == on[target]
            await rig.write_each(dict.fromkeys(ALL, number))
        assert set(ends) == {True, False}
        images = {target: (await rig.disks())[target].chain[0] for target in ALL}
        await rig.guest.stop()
        for target, image in images.items():
            assert rig.holds(target, Path(image.file), image.format)


@pytest.mark.parametrize("which", ["qemu10"])
async def test_snapshot_with_mirrors(which: str, tmp_path: Path, crasher: Crasher) -> None:
    qemu: QemuBinaries = find_qemu(which)
    async with open_rig(qemu, tmp_path) as rig:

        def request(name: str) -> ask.Request:
            disks = tuple(
                DiskWish(
                    name=target,
                    file=str(rig.path / f"{target}.{name}"),
                    mirror=MirrorWish(file=str(rig.dst / f"{target}.{name}")),
                )
                for target in ALL
            )
            wish = SnapshotWish(name=name, only_these=True, disks=disks)
            return ask.CreateSnapshot(domain="vm1", wish=wish, flags=SnapshotCreate.ATOMIC)

        async def dropped() -> None:
            if jobs := [target for target, job in (await rig.jobs()).items() if job.state == "ready"]:
                await rig.ready(*jobs)
                (snapshot,) = {job.snapshot for job in (await rig.jobs()).values() if job.state == "ready"}
                await rig.ask(
                    ask.DeleteSnapshot(domain="vm1", snapshot=str(snapshot), flags=SnapshotDelete.REMOVE_MIRROR)
                )

        count = await interrupted(rig, crasher, request("s0"), None)
        await dropped()
        ends: list[bool] = []
        for number, at in enumerate(moments(count, which == "qemu10"), start=1):
            before = {target: await rig.chain(target) for target in ALL}
            await interrupted(rig, crasher, request(f"s{number}"), at)
            ends.append(await settled(rig, "snapshot", 1 + sum(ends)))
            for target in ALL:
                new = [str(rig.path / f"{target}.s{number}")] if ends[-1] else []
                assert await rig.chain(target) == [*new, *before[target]]
            made = [file for file in rig.files() if f".s{number} " in file]
            assert len(made) == (2 * len(ALL) if ends[-1] else 0)
            await rig.write_each(dict.fromkeys(ALL, number))
            await dropped()
        assert set(ends) == {True, False}
        images = {target: (await rig.disks())[target].chain[0] for target in ALL}
        await rig.guest.stop()
        for target, image in images.items():
            assert rig.holds(target, Path(image.file), image.format)
