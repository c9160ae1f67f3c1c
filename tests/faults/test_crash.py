"""kill -9 of the host process before and after every journal write and every QMP command, by enumeration.

Each operation is carried out once to the end, which tells how many boundaries it has; then once for every boundary, on
fresh images and a fresh QEMU, by a process that dies there. The next process must find its way: the guest runs, the
operation is done, undone or in progress, what is in progress can be continued or cancelled, nothing is left behind, and
every image that the guest stands on holds what the guest wrote.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.flags import SnapshotDelete
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.service import Service
from blockferry.testing import (
    QemuBinaries,
    TestQemu,
    blockdev_disk,
    find_qemu,
    image_sha256,
    legacy_drive,
    make_image,
    write_pattern,
)
from blockferry.testing.crash import Crasher

MIB = 1 << 20
SIZE = 4 * MIB
TARGETS = ("vda", "vdb")


@dataclass
class World:
    """A guest with two disks, one with an iothread and one that nobody named, and a state directory."""

    folder: Path
    binaries: QemuBinaries
    qemu: TestQemu

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.glob("images/*")}


@asynccontextmanager
async def world(folder: Path, binaries: QemuBinaries, template: Path) -> AsyncIterator[World]:
    shutil.copytree(template, folder / "images")
    (folder / "state").mkdir(mode=0o700)
    images = folder / "images"
    args = [
        *blockdev_disk("da", images / "a.img", "qcow2", iothread="io0"),
        *legacy_drive(images / "b.img", "raw"),
    ]
    async with TestQemu(binaries, folder, args=args, paused=False) as qemu:
        yield World(folder=folder, binaries=binaries, qemu=qemu)


def attach(place: World) -> ask.Request:
    return ask.Attach(domain="vm", qmp=str(place.qemu.qmp))


def snapshot(place: World) -> ask.Request:
    disks = tuple(
        DiskWish(
            name=str(place.folder / f"images/{letter}.img"),
            file=str(place.folder / f"images/{letter}.snap"),
            mirror=MirrorWish(file=str(place.folder / f"images/{letter}.mirror")),
        )
        for letter in "ab"
    )
    return ask.CreateSnapshot(domain="vm", wish=SnapshotWish(name="s1", disks=disks), flags=128)


def copy(place: World, target: str = "vda") -> ask.Request:
    return ask.StartCopy(domain="vm", disk=target, dest=str(place.folder / f"images/{target}.copy"), format="raw")


def both_copies(place: World) -> list[ask.Request]:
    return [attach(place), copy(place, "vda"), copy(place, "vdb")]


def delete(flag: SnapshotDelete) -> ask.Request:
    return ask.DeleteSnapshot(domain="vm", snapshot="s1", flags=flag)


@dataclass(frozen=True)
class Operation:
    """An operation under test: what leads up to it, itself, and the images that a finished one leaves the guest on."""

    before: Callable[[World], list[ask.Request]]
    itself: Callable[[World], ask.Request]
    after: dict[str, str]


ON_SOURCE = {"vda": "a.img", "vdb": "b.img"}
ON_OVERLAY = {"vda": "a.snap", "vdb": "b.snap"}
OPERATIONS: dict[str, Operation] = {
    "snapshot": Operation(lambda w: [attach(w)], snapshot, ON_OVERLAY),
    "copy": Operation(lambda w: [attach(w)], copy, ON_SOURCE),
    "pivot": Operation(
        both_copies, lambda _w: ask.PivotJobs(domain="vm", disks=TARGETS), {"vda": "vda.copy", "vdb": "vdb.copy"}
    ),
    "finish": Operation(both_copies, lambda _w: ask.FinishJobs(domain="vm", disks=TARGETS), ON_SOURCE),
    "cancel": Operation(both_copies, lambda _w: ask.CancelJobs(domain="vm", disks=TARGETS), ON_SOURCE),
    "reopen": Operation(
        lambda w: [attach(w), snapshot(w)],
        lambda _w: delete(SnapshotDelete.REOPEN_MIRROR),
        {"vda": "a.mirror", "vdb": "b.mirror"},
    ),
    "remove-mirror": Operation(
        lambda w: [attach(w), snapshot(w)], lambda _w: delete(SnapshotDelete.REMOVE_MIRROR), ON_OVERLAY
    ),
}


async def carry_out(place: World, requests: list[ask.Request]) -> None:
    service = await Service.open(place.state_dir)
    try:
        for request in requests:
            await service.submit(request)
    finally:
        await service.close()


async def roots(service: Service) -> dict[str, str]:
    shown = await service.submit(ask.ShowDomain(domain="vm"))
    assert isinstance(shown, view.DomainView)
    return {disk.target: Path(str(disk.source)).name for disk in shown.disks}


@dataclass(frozen=True)
class Bench:
    """What every case of a QEMU version shares."""

    binaries: QemuBinaries
    crasher: Crasher
    template: Path


@pytest.fixture(scope="module", params=["distribution", "qemu10"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    binaries = find_qemu(request.param)
    folder = tmp_path_factory.mktemp("template")
    for letter, fmt, byte in (("a", "qcow2", 0x61), ("b", "raw", 0x62)):
        make_image(binaries, folder / f"{letter}.img", fmt, SIZE)
        write_pattern(binaries, folder / f"{letter}.img", fmt, 0, MIB, byte)
    with Crasher() as crasher:
        yield Bench(binaries=binaries, crasher=crasher, template=folder)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_killed_at_every_boundary(name: str, bench: Bench, tmp_path: Path) -> None:
    operation = OPERATIONS[name]
    contents = {
        target: image_sha256(bench.binaries, bench.template / f"{letter}.img", fmt)
        for target, letter, fmt in (("vda", "a", "qcow2"), ("vdb", "b", "raw"))
    }
    boundaries = asyncio.run(one_case(operation, bench, tmp_path / "whole", contents, at=None))
    assert any(boundary.startswith("before record") for boundary in boundaries), boundaries
    for at in range(len(boundaries)):
        folder = tmp_path / str(at)
        try:
            asyncio.run(one_case(operation, bench, folder, contents, at=at))
        except BaseException as error:
            error.add_note(f"{name} killed at boundary {at}: {boundaries[at]}")
            raise
        shutil.rmtree(folder)
    print(f"\n{name}: {len(boundaries)} kills, 0 lost, 0 left over")  # noqa: T201 - the figure


async def one_case(
    operation: Operation, bench: Bench, folder: Path, contents: dict[str, str], *, at: int | None
) -> tuple[str, ...]:
    folder.mkdir()
    async with world(folder, bench.binaries, bench.template) as place:
        await carry_out(place, operation.before(place))
        before = place.files()
        result = await asyncio.to_thread(bench.crasher.run, place.state_dir, [operation.itself(place)], at=at)
        # Looking again after an event is a command too: a run may have some boundaries less than the first.
        assert result.killed or at is None or len(result.boundaries) <= at, result
        assert result.error is None
        service = await Service.open(place.state_dir)
        try:
            await check_settled(service, place, operation, before, whole=at is None)
            await go_on_or_back(service, place, continuing=(at or 0) % 2 == 0)
            final = await roots(service)
        finally:
            await service.close()
        await place.qemu.stop()
        for target, file in final.items():
            fmt = "raw" if file == "b.img" or file.endswith(".copy") else "qcow2"
            assert image_sha256(bench.binaries, folder / "images" / file, fmt) == contents[target], (target, file)
        return result.boundaries


async def check_settled(service: Service, place: World, operation: Operation, before: set[str], *, whole: bool) -> None:
    status = await place.qemu.command("query-status")
    assert status["status"] == "running"
    again = await service.submit(ask.Recover())
    assert isinstance(again, view.RecoveryReport)
    assert all(each.row == "-" for each in again.operations), "a second recovery found something to do"
    listed = await service.submit(ask.ListOperations())
    assert isinstance(listed, view.OperationList)
    for each in listed.operations:
        assert each.state in ("done", "undone", "in-progress"), each
        assert each.state != "in-progress" or each.next, "in progress, and no command to go on with"
    now = await roots(service)
    if any(each.state == "undone" for each in listed.operations):
        assert place.files() == before
        assert not whole
    if whole:
        assert now == operation.after
    assert now in (operation.after, ON_OVERLAY if "images/a.snap" in before else ON_SOURCE), now
    await nothing_left_over(service, place)


async def nothing_left_over(service: Service, place: World) -> None:
    """No node, job or file of ours but those of a chain or of a mirror that works."""
    shown = await service.submit(ask.ShowDomain(domain="vm"))
    jobs = await service.submit(ask.ListJobs(domain="vm"))
    assert isinstance(shown, view.DomainView)
    assert isinstance(jobs, view.JobList)
    working = {job.disk: job for job in jobs.jobs if job.state in ("copying", "ready")}
    files = {image.file for disk in shown.disks for image in disk.chain} | {job.dest for job in working.values()}
    for node in await place.qemu.command("query-named-block-nodes", {"flat": True}):
        # A format node opened without its backing is shown as json:{...} with the file name inside.
        if node["node-name"].startswith("bf") and node["drv"] in ("file", "qcow2", "raw"):
            assert any(file in node["file"] for file in files), f"{node['node-name']} is left over"
    there = {job["id"] for job in await place.qemu.command("query-jobs")}
    assert len(there) == len(working), f"jobs {there}, working {sorted(working)}"


async def go_on_or_back(service: Service, place: World, *, continuing: bool) -> None:
    """Do what the report offers for what is in progress: go on with it, or cancel it."""
    jobs = await service.submit(ask.ListJobs(domain="vm"))
    assert isinstance(jobs, view.JobList)
    working = [job for job in jobs.jobs if job.state in ("copying", "ready")]
    copies = tuple(job.disk for job in working if job.snapshot is None)
    if copies:
        verb = ask.PivotJobs if continuing else ask.CancelJobs
        await service.submit(verb(domain="vm", disks=copies))
    if any(job.snapshot for job in working):
        flag = SnapshotDelete.REOPEN_MIRROR if continuing else SnapshotDelete.REMOVE_MIRROR
        await service.submit(delete(flag))
    assert await place.qemu.command("query-jobs") == []
