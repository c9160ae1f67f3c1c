"""A snapshot that fails anywhere leaves the graph, the XML and the files as they were, and the guest untouched."""

import asyncio
import errno
import re
from pathlib import Path

import pytest
from rig import ALL, FORMATS, MIB, Rig, open_rig, wish_xml

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.flags import SnapshotCreate
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.service import Service
from blockferry.testing import Fault, FaultKind, Gate, QemuBinaries, check_image
from blockferry.testing.crash import Crasher
from blockferry.testing.sick import fail, heal, sick_storage

# A snapshot of three disks, each mirrored, sends these: two images a disk, one transaction, a mirror a disk.
COMMANDS = [
    *[("blockdev-add", number) for number in range(1, 7)],
    ("transaction", 1),
    *[("blockdev-mirror", number) for number in range(1, 4)],
]


async def fails(rig: Rig, kind: type[errors.BlockferryError], match: str, **more: object) -> None:
    """It fails, and everything is as before: chains, node names, XML, jobs, files."""
    before, nodes = await rig.state(), set(await rig.nodes())
    with pytest.raises(kind, match=match):
        await rig.snapshot(mirrors=ALL, **more)
    after = await rig.state()
    assert after == before
    assert set(await rig.nodes()) == nodes
    assert await rig.qemu_jobs() == {}
    assert await rig.pauses_heard() == []
    assert (await rig.ask(ask.ListSnapshots(domain="vm1"))).snapshots == ()
    assert (await rig.jobs()) == {}


async def works_now(rig: Rig) -> None:
    """Nothing is left in the way of the same request."""
    await rig.snapshot(mirrors=ALL)
    await rig.ready(*ALL)
    for target in ALL:
        assert (await rig.chain(target))[0] == f"{rig.path}/{target}.s1"


@pytest.mark.parametrize(("command", "nth"), COMMANDS)
async def test_error_at_any_command(faulty: Rig, command: str, nth: int) -> None:
    fault = Fault(command, FaultKind.ERROR, nth=nth, error_desc="no luck today")
    faulty.proxy.inject(fault)
    await fails(faulty, errors.OperationFailed, "no luck today")
    assert faulty.proxy.fired == [fault]
    assert await faulty.operations() == [("snapshot", "undone")]
    await works_now(faulty)


@pytest.mark.parametrize("command", ["blockdev-add", "blockdev-mirror"])
async def test_what_is_there_all_the_same(faulty: Rig, command: str) -> None:
    """It was carried out and answered with an error: QEMU's graph and jobs are believed, not its answer."""
    faulty.proxy.inject(Fault(command, FaultKind.ERROR_AFTER, nth=2))
    await faulty.snapshot(mirrors=ALL)
    assert await faulty.operations() == [("snapshot", "done")]
    await faulty.ready(*ALL)


async def test_error_that_lies(faulty: Rig) -> None:
    """The switch was carried out and answered with an error: it is undone."""
    faulty.proxy.inject(Fault("transaction", FaultKind.ERROR_AFTER))
    await fails(faulty, errors.OperationFailed, "injected")


async def test_undo_that_is_interrupted_between_two_disks(faulty: Rig) -> None:
    """The overlay that was committed down is still there, on its base, and nobody's any more: it is not committed again."""
    before = await faulty.state()
    faulty.proxy.inject(Fault("blockdev-mirror", FaultKind.ERROR))
    faulty.proxy.inject(Fault("block-commit", FaultKind.ERROR, nth=2))
    with pytest.raises(errors.OperationUnsettled):
        await faulty.snapshot(mirrors=ALL)
    await faulty.settled()
    assert await faulty.operations() == [("snapshot", "undone")]
    assert await faulty.state() == before
    await works_now(faulty)


@pytest.mark.parametrize("command", ["blockdev-add", "blockdev-mirror"])
async def test_errors_at_several_of_a_wave(faulty: Rig, command: str) -> None:
    """They are under way at the same time: all are waited for, the first is named, and what went well is undone."""
    for nth in (2, 3):
        faulty.proxy.inject(Fault(command, FaultKind.ERROR, nth=nth, error_desc=f"no luck {nth}"))
    await fails(faulty, errors.OperationFailed, "no luck 2")
    (operation,) = (await faulty.ask(ask.ListOperations())).operations
    steps = (await faulty.operation(operation.id)).steps
    assert sorted(step.error for step in steps if step.error) == ["no luck 2", "no luck 3"]
    await works_now(faulty)


@pytest.mark.parametrize("kind", [FaultKind.CUT_BEFORE, FaultKind.CUT_AFTER])
@pytest.mark.parametrize(
    ("command", "nth"),
    [("blockdev-add", 1), ("blockdev-add", 4), ("transaction", 1)],
)
async def test_connection_cut(faulty: Rig, command: str, nth: int, kind: FaultKind) -> None:
    faulty.proxy.inject(Fault(command, kind, nth=nth))
    await fails(faulty, errors.OperationFailed, "no reply")
    await works_now(faulty)


@pytest.mark.parametrize("kind", [FaultKind.CUT_BEFORE, FaultKind.CUT_AFTER])
async def test_connection_cut_among_the_mirrors(faulty: Rig, kind: FaultKind) -> None:
    """Those after the cut may have reached QEMU or not: with all of them there it is done, else undone."""
    before = await faulty.state()
    faulty.proxy.inject(Fault("blockdev-mirror", kind, nth=2))
    try:
        await faulty.snapshot(mirrors=ALL)
    except errors.OperationFailed:
        assert await faulty.state() == before
        assert await faulty.operations() == [("snapshot", "undone")]
        await works_now(faulty)
    else:
        assert kind is FaultKind.CUT_AFTER
        assert await faulty.operations() == [("snapshot", "done")]
        await faulty.ready(*ALL)


async def test_reply_to_the_last_command_is_lost(faulty: Rig) -> None:
    """No reply is no failure: whoever looks sees that all of it is there."""
    faulty.proxy.inject(Fault("blockdev-mirror", FaultKind.CUT_AFTER, nth=3))
    await faulty.snapshot(mirrors=ALL)
    assert (await faulty.operations())[-1] == ("snapshot", "done")
    assert set((await faulty.states()).values()) <= {"copying", "ready"}
    assert await faulty.chain("vda") != []


def snapshot_request(rig: Rig) -> ask.Request:
    """Of all disks, each with a mirror."""
    files = {target: (f"{target}.s1", f"dst/{target}.s1") for target in ALL}
    return ask.CreateSnapshot(domain="vm1", wish=wished(rig, **files), flags=SnapshotCreate.ATOMIC)


async def written_meanwhile(rig: Rig) -> tuple[asyncio.Task[view.SnapshotView], Gate]:
    """A snapshot whose last mirror will not start, once the gate is released; its overlays have been written to."""
    gate = rig.proxy.pause_before("blockdev-mirror", 3)
    rig.proxy.inject(Fault("blockdev-mirror", FaultKind.ERROR, nth=3))
    snapshot = asyncio.create_task(rig.snapshot(mirrors=ALL))
    await gate.reached()
    for number, target in enumerate(ALL):
        await rig.write(target, 0x71 + number, number * MIB)
    return snapshot, gate


async def test_what_the_guest_wrote_meanwhile_is_kept(faulty: Rig) -> None:
    """Written between the transaction and the mirror that does not start: into overlays that go away again."""
    snapshot, gate = await written_meanwhile(faulty)
    gate.release()
    with pytest.raises(errors.OperationFailed):
        await snapshot
    for target in ALL:
        assert await faulty.chain(target) == [str(faulty.source(target))]
        await faulty.write(target, 0x79, 7 * MIB)
    assert await faulty.pauses_heard() == []
    await faulty.guest.stop()
    for target, fmt in (("vda", "qcow2"), ("vdb", "raw"), ("sda", "qcow2")):
        assert faulty.holds(target, faulty.source(target), fmt)
        check_image(faulty.qemu, faulty.source(target), fmt)


async def test_overlay_that_finds_no_room_below(
    qemu: QemuBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays until there is room: the job that failed is in nobody's way then."""
    for name, value in sick_storage(tmp_path / "sick").items():
        monkeypatch.setenv(name, value)
    async with open_rig(qemu, tmp_path, proxy=True) as rig:
        before = await rig.state()
        snapshot, gate = await written_meanwhile(rig)
        fail(f"w {errno.ENOSPC} {rig.source('vdb')}")
        gate.release()
        with pytest.raises(errors.OperationUnsettled, match="No space left"):
            await snapshot
        with pytest.raises(errors.BlockferryError, match="not settled yet"):
            await rig.copy("sda")
        heal(tmp_path / "sick")
        await rig.settled()
        assert await rig.operations() == [("snapshot", "undone")]
        assert await rig.state() == before
        assert await rig.qemu_jobs() == {}
        await rig.guest.stop()
        for target, fmt in FORMATS.items():
            assert rig.holds(target, rig.source(target), fmt)


async def test_overlay_above_an_image_whose_flush_failed(
    qemu: QemuBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its QEMU never flushes that image again: what was switched stays so until the guest ends, and that is said."""
    for name, value in sick_storage(tmp_path / "sick").items():
        monkeypatch.setenv(name, value)
    for folder in ("whole", "dies"):
        (tmp_path / folder).mkdir()
    with Crasher() as crasher:
        async with open_rig(qemu, tmp_path / "whole") as rig:
            await rig.service.close()
            lives = crasher.run(rig.path / "state", [snapshot_request(rig)])
            rig.service = await Service.open(rig.path / "state")
        async with open_rig(qemu, tmp_path / "dies") as rig:
            await rig.service.close()
            switched = lives.boundaries.index("after transaction")
            assert crasher.run(rig.path / "state", [snapshot_request(rig)], at=switched).killed
            await rig.write("vdb", 0x7A, 7 * MIB)
            fail(f"f {errno.EIO} {rig.source('vdb')}")
            rig.service = await Service.open(rig.path / "state")
            heal(tmp_path / "sick")
            await rig.settled()
            unsettled = await rig.operation(1)
            assert (unsettled.state, unsettled.row) == ("unsettled", "D")
            assert re.search(
                r"Input/output error.*overlay.*stop the guest, then `blockferry recover`", str(unsettled.error)
            )
            assert await rig.chain("vdb") == [f"{rig.path}/vdb.s1", str(rig.source("vdb"))]
            await rig.write("vdb", 0x7B, 6 * MIB)
            await rig.guest.stop()
            await rig.settled()
            settled = await rig.operation(1)
            assert (settled.state, settled.row) == ("done", "I")
            found = [
                each.text for each in (await rig.ask(ask.Doctor(domain="vm1"))).findings if each.code == "start-on"
            ]
            assert found == [f"{rig.path}/{target}.s1 holds what it held (operation 1)" for target in sorted(ALL)]
            for target in ALL:
                assert rig.holds(target, rig.path / f"{target}.s1", "qcow2")


async def test_mirror_that_does_not_start_on_a_paused_guest(qemu: QemuBinaries, tmp_path: Path) -> None:
    async with open_rig(qemu, tmp_path, paused=True, proxy=True) as rig:
        rig.proxy.inject(Fault("blockdev-mirror", FaultKind.ERROR, nth=2))
        await fails(rig, errors.OperationFailed, "injected")
        assert await rig.status() == "prelaunch"


def wished(rig: Rig, **files: tuple[str, str]) -> SnapshotWish:
    """Disks with (overlay, mirror), under the test's folder."""
    return SnapshotWish(
        name="s1",
        only_these=True,
        disks=tuple(
            DiskWish(name=target, file=f"{rig.path}/{file}", mirror=MirrorWish(file=f"{rig.path}/{mirror}"))
            for target, (file, mirror) in files.items()
        ),
    )


@pytest.mark.parametrize(
    ("second", "kind", "match"),
    [
        (("s2", "missing/m"), errors.DestinationUnusable, "missing/m.*No such file"),
        (("s2", "dangling"), errors.DestinationExists, "dangling exists"),
        (("s2", "here/s1"), errors.DuplicateFile, "here/s1"),
    ],
)
async def test_bad_destination_of_the_second_disk(
    rig: Rig, second: tuple[str, str], kind: type[errors.BlockferryError], match: str
) -> None:
    """All that is refused of one is in tests/qemu/refusals.py; here nothing is made for the others either."""
    (rig.path / "there").write_text("somebody's")
    (rig.path / "dangling").symlink_to(rig.path / "nothing")
    (rig.path / "here").symlink_to(rig.path)
    before, nodes = await rig.state(), set(await rig.nodes())
    wish = wished(rig, vda=("s1", "dst/m1"), vdb=second, sda=("s3", "dst/m3"))
    with pytest.raises(kind, match=match) as caught:
        await rig.ask(ask.CreateSnapshot(domain="vm1", wish=wish))
    assert caught.value.outcome == "refused"
    assert await rig.state() == before
    assert set(await rig.nodes()) == nodes
    assert (rig.path / "there").read_text() == "somebody's"
    assert await rig.operations() == []


async def test_file_that_appears_after_the_look(faulty: Rig) -> None:
    """Created by somebody else between our look and our claim: theirs stays, ours go."""
    theirs = faulty.dst / "sda.s1"

    def writes(when: str, what: str) -> None:
        if (when, what) == ("before", "plan snapshot") and not theirs.exists():
            theirs.write_text("somebody's")

    before = await faulty.state()
    await faulty.service.close()
    faulty.service = await Service.open(faulty.path / "state", witness=writes)
    with pytest.raises(errors.OperationFailed, match=r"sda\.s1 exists already"):
        await faulty.snapshot(mirrors=ALL)
    assert theirs.read_text() == "somebody's"
    theirs.unlink()
    assert await faulty.state() == before
    await faulty.reopen_service()
    await works_now(faulty)


async def test_our_file_that_was_replaced_meanwhile_is_left_alone(faulty: Rig) -> None:
    gate = faulty.proxy.pause_before("transaction")
    faulty.proxy.inject(Fault("transaction", FaultKind.ERROR))
    task = asyncio.create_task(faulty.snapshot(mirrors=ALL))
    await gate.reached()
    theirs = faulty.path / "vda.s1"
    theirs.unlink()
    theirs.write_text("somebody's")
    gate.release()
    with pytest.raises(errors.OperationFailed):
        await task
    assert theirs.read_text() == "somebody's"
    assert not (faulty.path / "vdb.s1").exists()


async def test_mirror_ready_is_said_for_each_disk(faulty: Rig) -> None:
    """Also for those that got ready before the snapshot was recorded."""
    gate = faulty.proxy.pause_after("blockdev-mirror", 3)
    task = asyncio.create_task(faulty.snapshot(mirrors=ALL))
    await gate.reached()
    await faulty.ready(*ALL)
    gate.release()
    await task
    for target in ALL:
        await faulty.heard("mirror-ready", target)


@pytest.mark.parametrize("flag", [1 << 3, 1 << 8])
async def test_flags_that_are_not_carried_out_are_refused(rig: Rig, flag: int) -> None:
    with pytest.raises(errors.UnsupportedFlag):
        await rig.ask(ask.CreateSnapshot(domain="vm1", xml=wish_xml("s1"), flags=flag))
    assert await rig.operations() == []
