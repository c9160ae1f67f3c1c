"""Moves of a guest's storage, the whole way through, on a running guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from defined import open_defined
from rig import ALL, FORMATS, MIB, SIZE, Rig, header, open_guest, open_rig
from test_comes_back import attach, comes_back

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.move import Move
from blockferry.model.view import Event
from blockferry.qemu.copier import AT_WORK_WORKERS, WORKERS, FileCopy
from blockferry.service import Service, mover
from blockferry.testing import Fault, FaultKind, FaultyNbdServer, QemuBinaries, blockdev_disk, make_image, write_pattern


async def moved(rig: Rig, **more: object) -> view.MoveView:
    """Begin a move to DIR/dst, and wait until it is over or stands still."""
    begun = await rig.ask(ask.MoveStorage(domain="vm1", dest=str(rig.dst), **more))
    return await over(rig, begun.operation)


async def over(rig: Rig, operation: int, since: int = 0) -> view.MoveView:
    return await end_of(rig.service, "vm1", operation, since)


async def end_of(service: Service, domain: str, operation: int, since: int = 0) -> view.MoveView:
    """Wait until a move is over or stands still, after an event of that number."""
    ends = ("move-done", "move-stands", "move-cancelled")
    async with asyncio.timeout(60):
        async for event in service.watch(domain, since):
            if event.type in ends and event.data["operation"] == operation:
                break
    shown = await service.submit(ask.ShowMove(operation=operation))
    assert isinstance(shown, view.MoveView)
    return shown


@contextlib.contextmanager
def raw_file(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def test_mirrors_share_what_is_in_flight(qemu: QemuBinaries, tmp_path: Path) -> None:
    """A disk that the guest works on gets the least, unless its writes are to wait for the copy anyway."""
    async with open_rig(qemu, tmp_path, paused=True, proxy=True) as rig, rig.working("vda"):
        assert (await moved(rig, strategy="mirror", verify="none", converge=True)).state == "done"
        assert rig.in_flight() == [2 * MIB] * 3
        async with asyncio.timeout(60):
            # On a machine that is busy elsewhere the guest's last write may have been a while ago: then once more.
            while rig.in_flight()[-3:] != [MIB // 2, 2 * MIB, 2 * MIB]:
                folder = tmp_path / f"dst{len(rig.in_flight())}"
                folder.mkdir()
                begun = await rig.ask(ask.MoveStorage(domain="vm1", dest=str(folder), strategy="mirror", verify="none"))
                assert (await over(rig, begun.operation)).state == "done"


async def test_what_is_copied_outside_qemu_makes_way_too(
    qemu: QemuBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By fewer threads; how many each copy had is heard on the way."""
    copies: list[int] = []

    class Heard(FileCopy):
        def __init__(self, *args: Any, workers: int, **more: Any) -> None:
            copies.append(workers)
            super().__init__(*args, workers=workers, **more)

    monkeypatch.setattr(mover, "FileCopy", Heard)
    async with open_rig(qemu, tmp_path, paused=True) as rig:
        assert (await moved(rig, strategy="offload", verify="none")).state == "done"
        assert copies == [WORKERS] * 3
        async with rig.working("sda"), asyncio.timeout(60):
            while copies[-3:] != [AT_WORK_WORKERS] * 3:  # as above
                folder = tmp_path / f"dst{len(copies)}"
                folder.mkdir()
                begun = await rig.ask(
                    ask.MoveStorage(domain="vm1", dest=str(folder), strategy="offload", verify="none")
                )
                assert (await over(rig, begun.operation)).state == "done"


@pytest.mark.parametrize("strategy", ["offload", "mirror"])
async def test_all_disks_go_over_at_once(either: Rig, strategy: str) -> None:
    rig = either
    before = await rig.status()
    for target in ALL:
        await rig.write(target, 0x31, 2 * MIB)
    move = await moved(rig, strategy=strategy, verify="full")
    assert (move.state, move.reason) == ("done", None)
    assert await rig.status() == before
    assert {disk.strategy for disk in move.disks} == {strategy}
    assert (move.verified, move.differences) == ("full", ())
    for target in ALL:
        (image,) = (await rig.disks())[target].chain
        assert (Path(image.file).parent, image.format) == (rig.dst, FORMATS[target])
        await rig.write(target, 0x32, 5 * MIB)
    assert await rig.qemu_jobs() == {}
    assert await rig.pauses_heard() == ([] if before == "prelaunch" else rig.pauses_of_a_window)
    files = {disk.target: Path(disk.dest) for disk in move.disks}
    await rig.guest.stop()
    for target in ALL:
        assert rig.holds(target, files[target], FORMATS[target])


async def test_a_move_begun_is_in_nobodys_way(rig: Rig) -> None:
    begun = await rig.ask(ask.MoveStorage(domain="vm1", dest=str(rig.dst), bandwidth=1 << 20, verify="none"))
    with pytest.raises(errors.MoveUnderWay):
        await rig.copy("vda")
    cancelled = await rig.ask(ask.CancelOperation(operation=begun.operation))
    assert cancelled.state == "cancelled"
    assert list(rig.dst.iterdir()) == []
    for target in ALL:
        assert await rig.chain(target) == [str(rig.source(target))]


async def slowly(rig: Rig, **more: object) -> view.MoveView:
    """Begin a move that will not get far."""
    return await rig.ask(
        ask.MoveStorage(domain="vm1", dest=str(rig.dst), strategy="offload", bandwidth=1, verify="none", **more)
    )


async def test_a_move_whose_process_died_is_gone_on_with(rig: Rig) -> None:
    begun = await slowly(rig)
    await rig.reopen_service()
    shown = await rig.ask(ask.ShowMove(operation=begun.operation))
    assert (shown.state, shown.phase) == ("standing still", "copy")
    findings = (await rig.ask(ask.Doctor(domain="vm1"))).findings
    assert not [each for each in findings if str(rig.dst) in each.text and each.severity == "problem"]
    assert any(str(begun.operation) in " ".join(each.next) for each in findings)
    assert shown.next == tuple(f"blockferry operations {verb} {begun.operation}" for verb in ("resume", "cancel"))
    for target in ALL:
        await rig.write(target, 0x41, MIB)
    await rig.ask(ask.SetMoveSpeed(operation=begun.operation, bandwidth=0))
    await rig.ask(ask.ResumeOperation(operation=begun.operation))
    done = await over(rig, begun.operation)
    assert (done.state, done.reason) == ("done", None)
    await rig.guest.stop()
    for disk in done.disks:
        assert rig.holds(disk.target, Path(disk.dest), disk.format)


async def test_what_a_move_wrote_can_not_be_written_down_now(faulty: Rig) -> None:
    """It stands still while it is given up: also for who looks later, and until somebody says so again."""
    begun = await slowly(faulty)
    await faulty.write_each(dict.fromkeys(ALL, 0x41))
    faulty.proxy.inject(Fault("block-commit", FaultKind.ERROR, nth=None))
    with pytest.raises(errors.MoveStands):
        await faulty.ask(ask.CancelOperation(operation=begun.operation))
    await faulty.reopen_service()
    shown = await faulty.ask(ask.ShowMove(operation=begun.operation))
    assert (shown.state, shown.phase) == ("standing still", "back")
    assert shown.next == tuple(f"blockferry operations {verb} {begun.operation}" for verb in ("resume", "cancel"))
    faulty.proxy.clear()
    last = (await faulty.ask(ask.ListEvents(since=2**62))).last
    await faulty.ask(ask.ResumeOperation(operation=begun.operation))
    assert (await over(faulty, begun.operation, last)).state == "cancelled"
    await faulty.guest.stop()
    for target in ALL:
        assert faulty.holds(target, faulty.source(target), FORMATS[target])


async def test_who_gives_a_move_up_goes_away(faulty: Rig) -> None:
    """And another asks for the same: it is being given up all the time, and once."""
    begun = await slowly(faulty)
    gate = faulty.proxy.pause_before("block-commit")
    first = asyncio.create_task(faulty.ask(ask.CancelOperation(operation=begun.operation)))
    await gate.reached()
    second = asyncio.create_task(faulty.ask(ask.CancelOperation(operation=begun.operation)))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await faulty.ask(ask.ShowMove(operation=begun.operation))).state == "cancelling"
    gate.release()
    assert (await second).state == "cancelled"
    for target in ALL:
        assert await faulty.chain(target) == [str(faulty.source(target))]
    assert [what for what, _state in await faulty.operations()].count("move-cancel") == 2, "given up, and over"


async def test_a_move_whose_guest_died_is_gone_on_with(rig: Rig) -> None:
    begun = await slowly(rig)
    for target in ALL:
        await rig.write(target, 0x42, MIB)
    await rig.guest.command("stop")
    guest = await comes_back(rig)
    try:
        await attach(rig)
        await rig.ask(ask.SetMoveSpeed(operation=begun.operation, bandwidth=0))
        done = await over(rig, begun.operation)
        assert (done.state, done.reason) == ("done", None)
    finally:
        await guest.stop()
    for disk in done.disks:
        assert rig.holds(disk.target, Path(disk.dest), disk.format)


async def test_mirrors_that_are_lost_are_started_again(rig: Rig) -> None:
    begun = await rig.ask(ask.MoveStorage(domain="vm1", dest=str(rig.dst), max_pause_ms=1, verify="none"))
    await rig.heard("move-waits")
    for target in ALL:
        await rig.write(target, 0x43, 3 * MIB)
    await rig.guest.command("stop")
    guest = await comes_back(rig)
    try:
        assert (await over(rig, begun.operation)).state == "standing still"
        await attach(rig)
        await rig.reopen_service()
        stands = await rig.ask(ask.ShowMove(operation=begun.operation))
        assert stands.phase == "mirror"
        cancelled = await rig.ask(ask.CancelOperation(operation=begun.operation))
        assert cancelled.state == "cancelled"
    finally:
        await guest.stop()
    for target in ALL:
        assert rig.holds(target, rig.source(target), FORMATS[target])
    assert list(rig.dst.iterdir()) == []


@pytest.mark.parametrize(
    ("phase", "more"),
    [("copy", {"bandwidth": 1, "strategy": "offload"}), ("pivot", {"max_pause_ms": 1})],
    ids=["it copies", "it waits for a short pause"],
)
async def test_a_move_that_is_late_is_given_up(rig: Rig, phase: str, more: dict[str, object]) -> None:
    await rig.write("vda", 0x46, MIB)
    done = await moved(rig, verify="none", deadline=2.0 if phase == "pivot" else 0.3, **more)
    assert done.state == "cancelled"
    assert f" s: it was at «{phase}». More time (--deadline)" in str(done.reason)
    assert "within its deadline" in str(done.reason)
    assert done.next == ()
    assert await rig.qemu_jobs() == {}
    assert await rig.our_nodes() == set()
    assert list(rig.dst.iterdir()) == []
    for target in ALL:
        assert await rig.chain(target) == [str(rig.source(target))]
    assert (await rig.operations())[0] == ("move", "undone")
    await rig.guest.stop()
    for target in ALL:
        assert rig.holds(target, rig.source(target), FORMATS[target])


async def test_a_move_that_is_in_time_is_done(rig: Rig) -> None:
    done = await moved(rig, verify="none", deadline=3600.0)
    assert (done.state, done.reason) == ("done", None)
    assert done.deadline is not None


@pytest.mark.parametrize("verify", [None, "none"])
async def test_a_deadline_that_passed_while_nobody_was_there(rig: Rig, verify: Literal["none"] | None) -> None:
    """Whoever goes on with the move wants it done: the deadline holds no more, and that is said."""
    begun = await slowly(rig, deadline=3600.0)
    await rig.reopen_service()
    journal = rig.service._desk.journal
    move = journal.move(begun.operation)
    assert move is not None
    journal.put_move(msgspec.structs.replace(move, deadline=1.0, bandwidth=0))
    resumed = await rig.ask(ask.ResumeOperation(operation=begun.operation, verify=verify))
    assert "deadline has passed" in resumed.notes[0]
    assert (await over(rig, begun.operation)).state == "done"


async def test_what_is_no_deadline(rig: Rig) -> None:
    for seconds in (0.0, -1.0, float("nan"), 1e12):
        with pytest.raises(errors.BadRequest, match="a deadline is more than 0"):
            await rig.ask(ask.MoveStorage(domain="vm1", dest=str(rig.dst), deadline=seconds))
    late = ask.MoveStorage(domain="vm1", dest=str(rig.dst), bandwidth=1, deadline=5.0, dry_run=True)
    assert "it would be given up: the copying alone takes longer" in (await rig.ask(late)).notes[-1]


async def test_how_long_it_is_to_take_is_told_by_the_newest_copy_that_tells(rig: Rig) -> None:
    """Not by one of a limited move, nor by one of too little."""
    planned = ask.MoveStorage(domain="vm1", dest=str(rig.dst), dry_run=True)
    assert (await rig.ask(planned)).seconds is None
    journal = rig.service._desk.journal
    for operation, bandwidth, mib, seconds in (
        (901, 0, 32, 8.0),
        (902, 0, 32, 2.0),
        (903, 5, 32, 1.0),
        (904, 0, 1, 1.0),
    ):
        journal.put_move(Move(domain="vm1", operation=operation, disks=(), bandwidth=bandwidth, state="done"))
        said = {"operation": operation, "bytes": mib << 20, "seconds": seconds}
        journal.put_event(Event(seq=0, time=0.0, type="move-copied", domain="vm1", data=said))
    plan = await rig.ask(planned)
    assert sum(file.bytes for file in plan.files) > 0
    assert plan.seconds == pytest.approx(sum(file.bytes for file in plan.files) / (16 << 20))


async def test_the_speed_of_a_move_is_changed_while_it_works(rig: Rig) -> None:
    begun = await slowly(rig)
    await rig.ask(ask.SetMoveSpeed(operation=begun.operation, bandwidth=0))
    assert (await over(rig, begun.operation)).state == "done"


async def test_chains_are_kept_with_their_snapshots(rig: Rig) -> None:
    await rig.layers(2)
    before = {target: await rig.chain(target) for target in ALL}
    done = await moved(rig)
    assert (done.state, done.reason, done.verified) == ("done", None, "full")
    for target in ALL:
        chain = await rig.chain(target)
        assert [Path(file).name for file in chain] == [Path(file).name for file in before[target]]
        assert {Path(file).parent for file in chain} == {rig.dst}
    for snapshot in (await rig.snapshots()).values():
        assert {Path(disk.backing).parent for disk in snapshot.disks} == {rig.dst}
    await rig.delete("s1", 0)
    await rig.guest.stop()
    for disk in done.disks:
        assert rig.holds(disk.target, Path(disk.dest), disk.format)


async def test_mirrors_begin_with_a_move_that_copies_nothing_else(faulty: Rig) -> None:
    """In one operation: where one can't be started, nothing has happened."""
    before = await faulty.state()
    faulty.proxy.inject(Fault("blockdev-mirror", FaultKind.ERROR))
    with pytest.raises(errors.OperationFailed, match="every disk is on the image that it was on"):
        await moved(faulty, strategy="mirror", chain="flatten", verify="none")
    assert await faulty.state() == before
    faulty.proxy.clear()
    assert (await moved(faulty, strategy="mirror", chain="flatten", verify="none")).state == "done"
    assert [what for what, _state in await faulty.operations()][-2:] == ["move", "move-pivot"]


async def test_a_header_that_was_torn_is_copied_again(faulty: Rig) -> None:
    """As the power leaves it that fails while a copy is told what it backs onto: some sectors of the header are new."""
    await faulty.layers(2)
    faulty.proxy.inject(Fault("blockdev-mirror", FaultKind.ERROR))
    begun = await faulty.ask(ask.MoveStorage(domain="vm1", dest=str(faulty.dst), strategy="offload", verify="full"))
    stands = await over(faulty, begun.operation)
    assert (stands.state, stands.phase) == ("standing still", "mirror")
    stood = (await faulty.heard("move-stands")).seq
    faulty.proxy.clear()
    await faulty.write("vda", 0x45, MIB)
    torn = Path(next(each.dest for each in stands.disks if each.target == "vda"))
    at, length = struct.unpack_from(">QI", torn.read_bytes(), 8)
    with raw_file(torn) as descriptor:
        os.pwrite(descriptor, bytes(length), at)
    await faulty.ask(ask.ResumeOperation(operation=begun.operation))
    done = await over(faulty, begun.operation, stood)
    assert (done.state, done.reason, done.verified) == ("done", None, "full")
    await faulty.guest.stop()
    for disk in done.disks:
        assert faulty.holds(disk.target, Path(disk.dest), disk.format)


async def test_one_mirror_of_several_is_lost(rig: Rig) -> None:
    """It is started again beside those that work: their images QEMU writes to meanwhile."""
    await rig.layers(2)
    given = ask.MoveStorage(
        domain="vm1", dest=str(rig.dst), strategy="offload", verify="full", delete_source=True, max_pause_ms=1
    )
    begun = await rig.ask(given)
    await rig.heard("move-waits")
    await rig.write("vda", 0x47, MIB)
    (lost,) = [job for job in await rig.qemu_jobs() if "vda" in job]
    await rig.guest.command("job-cancel", {"id": lost})
    stood = await rig.heard("move-stands")
    assert "Operation canceled" in stood.data["reason"]
    move = rig.service._desk.journal.move(begun.operation)
    assert move is not None
    rig.service._desk.journal.put_move(msgspec.structs.replace(move, max_pause_ms=None))
    await rig.write("vdb", 0x48, MIB)
    await rig.ask(ask.ResumeOperation(operation=begun.operation))
    done = await over(rig, begun.operation, stood.seq)
    assert (done.state, done.reason, done.verified) == ("done", None, "full")
    await rig.guest.stop()
    for disk in done.disks:
        assert rig.holds(disk.target, Path(disk.dest), disk.format)


async def test_chains_are_made_one_image(rig: Rig) -> None:
    await rig.layers(2)
    done = await moved(rig, chain="flatten", verify="none")
    assert (done.state, {disk.strategy for disk in done.disks}) == ("done", {"mirror"})
    for target in ALL:
        (image,) = await rig.chain(target)
        assert Path(image).parent == rig.dst
    await rig.guest.stop()
    for disk in done.disks:
        assert rig.holds(disk.target, Path(disk.dest), disk.format)


async def test_sources_are_removed_when_that_was_asked_for(rig: Rig) -> None:
    sources = {target: rig.source(target) for target in ALL}
    done = await moved(rig, delete_source=True)
    assert (done.state, done.left) == ("done", ())
    assert not any(path.exists() for path in sources.values())


async def test_the_speed_of_a_storage_holds_for_what_writes_to_it(rig: Rig) -> None:
    await rig.ask(ask.SetStorageSpeed(folder=str(rig.dst), bandwidth=1))
    begun = await rig.ask(ask.MoveStorage(domain="vm1", dest=str(rig.dst), strategy="offload", verify="none"))
    (row,) = (await rig.ask(ask.ListStorages())).storages
    assert (row.folder, row.bandwidth) == (str(rig.dst.resolve()), 1)
    assert (await rig.ask(ask.ShowMove(operation=begun.operation))).state == "working"
    await rig.ask(ask.SetStorageSpeed(folder=str(rig.dst), bandwidth=0))
    assert (await over(rig, begun.operation)).state == "done"
    assert (await rig.ask(ask.ListStorages())).storages == ()


async def test_blocks_are_shared_where_they_can_be(qemu: QemuBinaries, reflinks: Path) -> None:
    async with open_rig(qemu, reflinks) as rig:
        await rig.write("vda", 0x61, 2 * MIB)
        done = await moved(rig, verify="none")
        assert (done.state, {each.method for each in done.files}) == ("done", {"reflink"})
        await rig.write("vda", 0x62, 3 * MIB)
        await rig.guest.stop()
        for disk in done.disks:
            assert rig.holds(disk.target, Path(disk.dest), disk.format)


async def test_a_file_that_the_guest_has_not_open_is_neither_copied_nor_removed(rig: Rig) -> None:
    """Somebody has put another file in the image's place: QEMU has the one that was there, and is the only one who can copy it."""
    await rig.write("vdb", 0x68, 2 * MIB)
    source = rig.source("vdb")
    source.rename(rig.path / "aside")
    source.write_bytes(b"another" * SIZE)
    os.truncate(source, SIZE)
    for more in ({"strategy": "offload"}, {"strategy": "mirror", "delete_source": True}):
        with pytest.raises(errors.Refused, match="it may be another file than the one that the guest has open"):
            await moved(rig, disks={"vdb": None}, **more)
    done = await moved(rig, disks={"vdb": None}, verify="none")
    assert (done.state, {disk.strategy for disk in done.disks}) == ("done", {"mirror"})
    assert "another file" in done.disks[0].why
    await rig.guest.stop()
    assert rig.holds("vdb", Path(done.disks[0].dest), "raw")
    assert source.read_bytes().startswith(b"anotheranother")


@pytest.mark.parametrize("names", ["one name", "two names"])
async def test_images_that_disks_share_are_copied_once(qemu: QemuBinaries, tmp_path: Path, names: str) -> None:
    base = make_image(qemu, tmp_path / "base.img", "raw", SIZE)
    write_pattern(qemu, base, "raw", 0, MIB, 0x71)
    link = tmp_path / "link.img"
    link.symlink_to(base)
    backing = {"vda": base, "vdb": link if names == "two names" else base}
    for target, file in backing.items():
        make_image(qemu, tmp_path / f"{target}.img", "qcow2", backing=file, backing_fmt="raw")
    args = [arg for target in backing for arg in blockdev_disk(target, tmp_path / f"{target}.img", "qcow2")]
    contents = {target: bytearray(bytes([0x71]) * MIB + bytes(SIZE - MIB)) for target in backing}
    async with open_guest(qemu, tmp_path, args, contents) as rig:
        await rig.write_each({"vda": 0x72, "vdb": 0x73}, 2 * MIB)
        done = await moved(rig, verify="none", delete_source=True)
        assert (done.state, done.reason) == ("done", None)
        assert sorted(path.name for path in rig.dst.iterdir()) == ["base.img", "vda.img", "vdb.img"]
        for target in backing:
            assert await rig.chain(target) == [str(rig.dst / f"{target}.img"), str(rig.dst / "base.img")]
        assert not base.exists()
        await rig.guest.stop()
        for disk in done.disks:
            assert header(qemu, Path(disk.dest))["full-backing-filename"] == str(rig.dst / "base.img")
            assert rig.holds(disk.target, Path(disk.dest), disk.format)


async def test_to_an_export_and_to_a_device(rig: Rig) -> None:
    image = make_image(rig.qemu, rig.path / "exported", "raw", SIZE)
    backing = rig.path / "device"
    backing.write_bytes(b"\xee" * SIZE)
    async with rig.server(image) as server:
        with loop_device(backing) as device:
            await to_both(rig, server.uri, device)
    assert rig.holds("vdb", image, "raw")


async def test_back_from_an_export(rig: Rig) -> None:
    """What the guest has left there is read over NBD to be compared; it is no file that could be removed."""
    image = make_image(rig.qemu, rig.path / "exported", "raw", SIZE)
    async with rig.server(image) as server:
        await rig.write("vdb", 0x76, MIB)
        assert (await moved(rig, disks={"vdb": server.uri}, format="raw")).verified == "full"
        await rig.write("vdb", 0x77, 3 * MIB)
        with pytest.raises(
            errors.ImageUnsuitable, match=re.escape(f"{server.uri} can't be used: it is no file that could")
        ):
            await moved(rig, disks={"vdb": "back"}, delete_source=True)
        last = (await rig.ask(ask.ListEvents(since=2**62))).last
        begun = await rig.ask(ask.MoveStorage(domain="vm1", dest=str(rig.dst), disks={"vdb": "back"}))
        done = await over(rig, begun.operation, last)
        assert (done.state, done.verified, done.compared, done.differences) == ("done", "full", SIZE, ())
    await rig.write("vdb", 0x78, 5 * MIB)
    await rig.guest.stop()
    assert rig.holds("vdb", rig.dst / "back", "raw")


async def test_what_could_not_be_compared_afterwards_is_refused_before(rig: Rig) -> None:
    """A move that stands still at its comparison can neither go on nor go back."""
    source = rig.source("vda")
    with raw_file(source) as descriptor:
        os.pwrite(descriptor, b"\x02", 79)  # the header's mark of a corrupt image; QEMU has read it long ago
    before = await rig.state()
    with pytest.raises(
        errors.DiskUnsuitable, match=f"could not be compared afterwards: {source}: it is marked corrupt"
    ):
        await moved(rig, disks={"vda": None})
    assert await rig.state() == before
    assert (await moved(rig, disks={"vda": None}, strategy="mirror", verify="none")).state == "done"


async def test_what_can_not_be_compared_any_more_is_not_held_for_ever(faulty: Rig) -> None:
    """The old storage is lost between pivot and comparison: the move ends without, when somebody says so."""
    source = faulty.source("vdb")
    gate = faulty.proxy.pause_after("nbd-server-start")
    moving = asyncio.create_task(moved(faulty, disks={"vdb": None}, strategy="mirror", delete_source=True))
    await gate.reached()
    source.rename(faulty.path / "aside")
    gate.release()
    stands = await moving
    assert (stands.state, stands.phase, stands.pivoted) == ("standing still", "verify", True)
    assert "vdb: its source can't be read" in str(stands.reason)
    again = f"blockferry operations resume {stands.operation}"
    assert stands.next == (again, f"{again} --verify none")
    (faulty.path / "aside").rename(source)
    last = (await faulty.ask(ask.ListEvents(since=2**62))).last
    resumed = await faulty.ask(ask.ResumeOperation(operation=stands.operation, verify="none"))
    assert "the source stays where it is" in resumed.notes[0]
    done = await over(faulty, stands.operation, last)
    assert (done.state, done.verified, done.left) == ("done", None, (str(source),))
    assert (await faulty.heard("move-unverified")).data["reason"] == "as asked"
    await faulty.snapshot(only=["vdb"])
    assert not [node for node in (await faulty.nodes()).values() if node.get("dirty-bitmaps")]


async def stands_before_its_server(faulty: Rig, server: FaultyNbdServer) -> view.MoveView:
    """A move of vdb to a server that takes no writes: it stands still, and the server takes them again."""
    await faulty.write("vdb", 0x21, 0, SIZE)
    server.fail()
    gate = faulty.proxy.pause_after("blockdev-mirror")
    moving = asyncio.create_task(moved(faulty, disks={"vdb": server.uri}, format="raw", verify="none"))
    await gate.reached()
    async with asyncio.timeout(20):
        while {job["status"] for job in (await faulty.qemu_jobs()).values()} != {"concluded"}:
            pass
    gate.release()
    begun = await moving
    assert (begun.state, begun.phase) == ("standing still", "mirror")
    assert "the mirror of vdb was lost: No space left on device" in str(begun.reason)
    server.heal()
    return begun


async def test_a_server_that_hangs_when_a_move_is_gone_on_with(faulty: Rig) -> None:
    """QEMU is not told to open it: the guest would wait for it too."""
    image = make_image(faulty.qemu, faulty.path / "exported", "raw", SIZE)
    async with FaultyNbdServer(faulty.qemu, image, faulty.path, name="t") as server:
        begun = await stands_before_its_server(faulty, server)
        server.suspend()
        last = (await faulty.ask(ask.ListEvents(since=2**62))).last
        await faulty.ask(ask.ResumeOperation(operation=begun.operation))
        again = await over(faulty, begun.operation, last)
        assert (again.state, again.phase) == ("standing still", "mirror")
        assert f"{server.uri} can't be a destination: its server gave no answer within 2 s" in str(again.reason)
        await faulty.write("vdb", 0x22, 0, SIZE)
        server.resume()
        await faulty.ask(ask.CancelOperation(operation=begun.operation))
        assert await faulty.chain("vdb") == [str(faulty.source("vdb"))]


async def test_a_destination_that_takes_no_writes_is_not_tried_for_ever(faulty: Rig) -> None:
    """Its mirror is lost before anybody waits for it: the move stands still, and says why; gone on with, it is tried again."""
    image = make_image(faulty.qemu, faulty.path / "exported", "raw", SIZE)
    async with FaultyNbdServer(faulty.qemu, image, faulty.path, name="t") as server:
        begun = await stands_before_its_server(faulty, server)
        last = (await faulty.ask(ask.ListEvents(since=2**62))).last
        await faulty.ask(ask.ResumeOperation(operation=begun.operation))
        assert (await over(faulty, begun.operation, last)).state == "done"
        assert len(await faulty.events("mirror-started")) == 2
        assert await faulty.chain("vdb") == [server.uri]
        await faulty.guest.stop()
    assert faulty.holds("vdb", image, "raw")


async def to_both(rig: Rig, uri: str, device: str) -> None:
    done = await moved(rig, disks={"vdb": uri, "vda": device}, format="raw", verify="none")
    assert (done.state, {disk.strategy for disk in done.disks}) == ("done", {"mirror"})
    chains = [await rig.chain(target) for target in ("vda", "vdb", "sda")]
    assert chains == [[device], [uri], [str(rig.source("sda"))]]
    await rig.write_each({"vda": 0x74, "vdb": 0x75}, 4 * MIB)
    await rig.guest.stop()
    assert rig.holds("vda", Path(device), "raw")


async def test_a_guest_that_is_started_here_is_started_on_its_new_images(
    qemu: QemuBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_QEMU_DIR", str(qemu.system.parent))
    async with open_defined(qemu, tmp_path) as guest:
        await guest.start()
        await guest.write("vda", 0x76, 2 * MIB)
        begun = await guest.ask(ask.MoveStorage(domain="g1", dest=str(tmp_path / "dst"), verify="none"))
        done = await end_of(guest.service, "g1", begun.operation)
        assert (done.state, done.reason) == ("done", None)
        await guest.stop()
        await guest.start()
        for disk in done.disks:
            assert (await guest.disk(disk.target)).source == disk.dest
        await guest.stop()
        for disk in done.disks:
            assert guest.holds(disk.target, Path(disk.dest), disk.format)


@contextlib.contextmanager
def loop_device(backing: Path) -> Iterator[str]:
    """A block device of that file."""
    made = subprocess.run(["losetup", "-f", "--show", backing], capture_output=True, text=True, check=True, timeout=20)
    try:
        yield made.stdout.strip()
    finally:
        subprocess.run(["losetup", "-d", made.stdout.strip()], check=True, timeout=20)


async def test_a_move_whose_guest_is_gone_for_good_can_be_given_up(rig: Rig) -> None:
    begun = await slowly(rig, disks={"vda": None, "vdb": None})
    await rig.guest.kill()
    await rig.heard("domain-gone")
    given_up = await rig.ask(ask.CancelOperation(operation=begun.operation))
    assert given_up.state == "cancelled"
    assert f"{rig.source('vda')}.move{begun.operation} on {rig.source('vda')}" in given_up.reason
    assert list(rig.dst.iterdir()) == []
    await rig.ask(ask.Detach(domain="vm1"))


async def test_sources_that_are_not_equal_are_kept(rig: Rig) -> None:
    begun = await rig.ask(ask.MoveStorage(domain="vm1", dest=str(rig.dst), max_pause_ms=1, delete_source=True))
    await rig.heard("move-waits")
    with (rig.dst / "vdb.img").open("r+b") as file:  # behind QEMU's back
        file.seek(6 * MIB + 17)
        file.write(b"x")
    journal = rig.service._desk.journal
    move = journal.move(begun.operation)
    assert move is not None
    journal.put_move(msgspec.structs.replace(move, max_pause_ms=None))
    done = await over(rig, begun.operation)
    (difference,) = done.differences
    assert (done.state, difference.target) == ("done", "vdb")
    assert difference.offset <= 6 * MIB + 17 < difference.offset + difference.length
    assert all(rig.source(target).exists() for target in ALL)
