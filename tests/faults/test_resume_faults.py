"""Going on with a copy, killed before and after every journal write and every QMP command, and with commands refused."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from rig import KIB, MIB, Rig
from test_crash import Bench, World, attach, bench, carry_out, copy, nothing_left_over, roots, world

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.service import Service
from blockferry.testing import Fault, FaultKind, image_sha256

__all__ = ["bench"]  # the fixture

# Killed after the destination was opened, or closed, and before it was written down what it looks like.
UNPROVED = ("it was touched since it was closed", "what it looked like when it was closed is not known")
PIVOT = ask.PivotJobs(domain="vm", disks=("vda",))


def again(place: World) -> ask.Request:
    dest = str(place.folder / "images/vda.copy")
    return ask.StartCopy(domain="vm", disk="vda", dest=dest, resume=True)


@pytest.mark.timeout(900)
def test_killed_at_every_boundary(bench: Bench, tmp_path: Path) -> None:
    """The resumed copy and its pivot: the rounds and the window between them are the host process's own doing."""
    contents = image_sha256(bench.binaries, bench.template / "a.img", "qcow2")
    boundaries = asyncio.run(one_case(bench, tmp_path / "whole", contents, at=None))
    assert boundaries.count("before operation window") == 2, boundaries
    for at in range(len(boundaries)):
        folder = tmp_path / str(at)
        try:
            asyncio.run(one_case(bench, folder, contents, at=at))
        except BaseException as error:
            error.add_note(f"killed at boundary {at}: {boundaries[at]}")
            raise
        shutil.rmtree(folder)


async def one_case(bench: Bench, folder: Path, contents: str, *, at: int | None) -> tuple[str, ...]:
    folder.mkdir()
    async with world(folder, bench.binaries, bench.template) as place:
        cancelled = ask.CancelJobs(domain="vm", disks=("vda",))
        await carry_out(place, [attach(place), copy(place), cancelled])
        result = await asyncio.to_thread(bench.crasher.run, place.state_dir, [again(place), PIVOT], at=at)
        assert result.error is None
        service = await Service.open(place.state_dir)
        try:
            await check_settled(service, place)
            await go_on(service, place)
            assert (await roots(service))["vda"] == "vda.copy"
        finally:
            await service.close()
        await no_bitmaps(place)
        await place.qemu.stop()
        assert image_sha256(bench.binaries, folder / "images/vda.copy", "raw") == contents
        return result.boundaries


async def check_settled(service: Service, place: World) -> None:
    assert (await place.qemu.command("query-status"))["status"] == "running"
    report = await service.submit(ask.Recover())
    assert isinstance(report, view.RecoveryReport)
    assert all(each.row == "-" for each in report.operations), "a second recovery found something to do"
    listed = await service.submit(ask.ListOperations())
    assert isinstance(listed, view.OperationList)
    assert {each.state for each in listed.operations} <= {"done", "undone", "in-progress"}
    await nothing_left_over(service, place)


async def go_on(service: Service, place: World) -> None:
    """Resume what was interrupted, or begin anew where it is not known what the destination lacks; then pivot."""
    jobs = await service.submit(ask.ListJobs(domain="vm"))
    assert isinstance(jobs, view.JobList)
    (job,) = jobs.jobs
    if job.state in ("cancelled", "lost"):
        why = await refusal(service, again(place))
        assert why in (None, *UNPROVED)
        if why is not None:
            (place.folder / "images/vda.copy").unlink()
            await service.submit(copy(place))
    if job.state != "pivoted":
        await service.submit(PIVOT)


async def refusal(service: Service, request: ask.Request) -> str | None:
    """Why it can't be resumed; None when it is."""
    try:
        await service.submit(request)
    except errors.NotResumable as refused:
        return refused.reason
    return None


async def no_bitmaps(place: World) -> None:
    for node in await place.qemu.command("query-named-block-nodes", {"flat": True}):
        assert not [each for each in node.get("dirty-bitmaps", ()) if each.get("name")], node["node-name"]


# --- a QEMU that refuses --------------------------------------------------------------------------------------


async def interrupted(faulty: Rig) -> None:
    await faulty.copy("vda", bandwidth=64 * KIB, buf_size=64 * KIB)
    await faulty.ask(ask.CancelJobs(domain="vm1", disks=("vda",)))
    await faulty.write("vda", 0x21, 5 * MIB)


@pytest.mark.parametrize(
    ("command", "nth"),
    [
        ("blockdev-add", 1),
        ("blockdev-add", 2),
        ("block-dirty-bitmap-add", 1),
        ("block-dirty-bitmap-merge", 1),
        ("blockdev-backup", 1),
    ],
)
@pytest.mark.parametrize("kind", [FaultKind.ERROR, FaultKind.CUT_BEFORE, FaultKind.CUT_AFTER])
async def test_a_start_that_fails_can_be_tried_again(faulty: Rig, command: str, nth: int, kind: FaultKind) -> None:
    assert faulty.proxy is not None
    await interrupted(faulty)
    before = (await faulty.state(), await faulty.our_nodes())
    faulty.proxy.inject(Fault(command, kind, nth=nth))
    try:
        await faulty.copy("vda", resume=True)
    except errors.OperationFailed:
        assert (await faulty.state(), await faulty.our_nodes()) == before
        faulty.proxy.clear()
        await faulty.copy("vda", resume=True)
    await faulty.pivot("vda")
    await faulty.guest.stop()
    assert faulty.holds("vda", faulty.dest("vda"), "qcow2")


@pytest.mark.parametrize("command", ["stop", "blockdev-backup", "blockdev-mirror"])
async def test_a_last_round_that_fails(faulty: Rig, command: str) -> None:
    """The guest runs on, and the copy can be gone on with."""
    assert faulty.proxy is not None
    await interrupted(faulty)
    faulty.proxy.inject(Fault(command, FaultKind.ERROR, nth=2 if command == "blockdev-backup" else 1))
    await faulty.copy("vda", resume=True)
    await faulty.heard("job-lost", "vda")
    await faulty.settled()
    faulty.proxy.clear()
    assert await faulty.status() == "running"
    assert await faulty.our_nodes() == set()
    assert await faulty.qemu_jobs() == {}
    await faulty.write("vda", 0x22, 6 * MIB)
    await faulty.copy("vda", resume=True)
    await faulty.pivot("vda")
    await faulty.guest.stop()
    assert faulty.holds("vda", faulty.dest("vda"), "qcow2")


async def test_the_guest_writes_while_what_lacks_is_moved(faulty: Rig) -> None:
    """So much that there is another round, and before the last one."""
    assert faulty.proxy is not None
    await interrupted(faulty)
    begun = faulty.proxy.pause_after("blockdev-backup")
    last = faulty.proxy.pause_before("stop")
    resuming = asyncio.create_task(faulty.copy("vda", resume=True))
    await begun.reached()
    await faulty.write("vda", 0x23, 0, 5 * MIB)
    begun.release()
    await last.reached()
    await faulty.write("vda", 0x24, 7 * MIB)
    last.release()
    await resuming
    await faulty.ready("vda")
    await faulty.settled()
    ends = [each.text for each in (await faulty.ask(ask.ListOperations())).operations if each.what == "job-end"]
    assert len(ends) == 2, ends
    assert ends[0].startswith(f"{5 * MIB} bytes of vda were written meanwhile")
    await faulty.pivot("vda")
    await faulty.guest.stop()
    assert faulty.holds("vda", faulty.dest("vda"), "qcow2")
