"""The instant of a pivot, finish or reopen goes wrong: all disks on their sources, the guest runs, and what can still
be mirrored is. Of guests that are stopped for it; test_held_windows.py has the others."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rig import ALL, FORMATS, MIB, SIZE, Rig, forgets, open_rig

from blockferry import errors
from blockferry.model.flags import SnapshotDelete
from blockferry.testing import Fault, FaultKind, Gate, NbdServer, QemuBinaries, check_image, compare_images, make_image


@pytest.fixture
async def faulty(qemu: QemuBinaries, tmp_path: Path) -> AsyncIterator[Rig]:
    """As `rig`, with a fault-injecting proxy between the service and QEMU; a guest that is stopped for its windows."""
    async with open_rig(qemu, tmp_path, proxy=True, iothreads=not forgets(qemu)) as rig:
        yield rig


async def started(rig: Rig, *targets: str) -> None:
    for target in targets or ALL:
        await rig.copy(target)
    await rig.ready(*(targets or ALL))
    await rig.pauses_heard()


async def on_sources(rig: Rig, status: str = "running") -> None:
    for target in ALL:
        assert await rig.chain(target) == [str(rig.source(target))]
    assert await rig.status() == status
    assert (await rig.pauses_heard())[-1:] in ([], ["RESUME"])


async def on_destinations(rig: Rig) -> None:
    assert await rig.states() == dict.fromkeys(ALL, "pivoted")
    for target in ALL:
        assert await rig.chain(target) == [str(rig.dest(target))]
    assert await rig.status() == "running"
    assert {event.disk for event in await rig.events("mirror-pivoted")} == set(ALL)
    await writable(rig, 0x81)
    await rig.guest.stop()
    for target in ALL:
        assert rig.holds(target, rig.dest(target), FORMATS[target])


async def writable(rig: Rig, byte: int) -> None:
    """The guest's writes are answered: nothing is drained, nothing hangs on a dead destination."""
    for number, target in enumerate(ALL):
        await rig.write(target, byte + number, (byte % 8) * MIB)


async def second_pivot(rig: Rig, *targets: str) -> None:
    """The mirrors work on: what is written now arrives, and the same pivot goes through."""
    await writable(rig, 0x91)
    await rig.ready(*(targets or ALL))
    await rig.pivot(*(targets or ALL))
    for target in targets or ALL:
        assert await rig.chain(target) == [str(rig.dest(target))]
    await writable(rig, 0xA2)
    await rig.guest.stop()
    for target in ALL:
        on = rig.dest(target) if target in (targets or ALL) else rig.source(target)
        assert rig.holds(target, on, FORMATS[target])
        check_image(rig.qemu, on, FORMATS[target])


# All disks' jobs are told at once, and what counts is what has become of them: not an answer that says otherwise, or is lost.
DONE_ALL_THE_SAME = [
    *(("job-finalize", nth, FaultKind.ERROR_AFTER) for nth in (1, 2, 3)),
    ("job-finalize", 2, FaultKind.DROP_REPLY),
    ("job-finalize", 3, FaultKind.CUT_AFTER),
]
# The connection ends when the others may have been told or not; a job that completes may not have got on when it is looked at.
EITHER = [
    *(("job-finalize", nth, FaultKind.CUT_AFTER) for nth in (1, 2)),
    *(("job-complete", nth, FaultKind.ERROR_AFTER) for nth in (1, 2, 3)),
]
FAULTS = [
    (command, nth, kind)
    for command in ("stop", "job-complete", "job-finalize")
    for nth in ((1,) if command == "stop" else (1, 2, 3))
    for kind in (FaultKind.ERROR, FaultKind.ERROR_AFTER, FaultKind.CUT_BEFORE, FaultKind.CUT_AFTER)
    if (command, nth, kind) not in (*DONE_ALL_THE_SAME, *EITHER)
]


@pytest.mark.parametrize(("command", "nth", "kind"), FAULTS)
async def test_all_or_nothing(faulty: Rig, command: str, nth: int, kind: FaultKind) -> None:
    await started(faulty)
    fault = Fault(command, kind, nth=nth, error_desc="not today")
    faulty.proxy.inject(fault)
    with pytest.raises(
        errors.OperationFailed, match="not today" if kind in (FaultKind.ERROR, FaultKind.ERROR_AFTER) else "no reply"
    ):
        await faulty.pivot(*ALL)
    assert faulty.proxy.fired == [fault]
    await on_sources(faulty)
    assert await faulty.states() == dict.fromkeys(ALL, "ready")
    assert await faulty.events("mirror-dropped") == []
    assert (await faulty.operations())[-1] == ("pivot", "undone")
    await second_pivot(faulty)


async def test_order_of_disks_does_not_matter(faulty: Rig) -> None:
    """The legacy -drive, whose node QEMU frees at the switch, as the first that is switched."""
    await started(faulty, "vdb", "sda", "vda")
    faulty.proxy.inject(Fault("job-finalize", FaultKind.ERROR, nth=3))
    with pytest.raises(errors.OperationFailed):
        await faulty.pivot("vdb", "sda", "vda")
    await on_sources(faulty)
    await second_pivot(faulty)


async def test_fails_again_and_again(faulty: Rig) -> None:
    await started(faulty)
    for nth in (1, 3, 2):
        faulty.proxy.inject(Fault("job-finalize", FaultKind.ERROR, nth=nth))
        with pytest.raises(errors.OperationFailed):
            await faulty.pivot(*ALL)
        faulty.proxy.clear()
        await on_sources(faulty)
        await writable(faulty, 0xB0 + nth)
    await second_pivot(faulty)


async def test_paused_guest_stays_paused(qemu: QemuBinaries, tmp_path: Path) -> None:
    async with open_rig(qemu, tmp_path, paused=True, proxy=True) as rig:
        await started(rig)
        rig.proxy.inject(Fault("job-finalize", FaultKind.ERROR, nth=2))
        with pytest.raises(errors.OperationFailed):
            await rig.pivot(*ALL)
        await on_sources(rig, "prelaunch")
        assert "cont" not in rig.proxy.commands()
        assert "stop" not in rig.proxy.commands()
        await second_pivot(rig)


@pytest.mark.parametrize(("command", "nth", "kind"), DONE_ALL_THE_SAME)
async def test_it_was_done_all_the_same(
    faulty: Rig, monkeypatch: pytest.MonkeyPatch, command: str, nth: int, kind: FaultKind
) -> None:
    monkeypatch.setattr("blockferry.qemu.session.Session.execute.__kwdefaults__", {"seconds": 0.5})
    await started(faulty)
    fault = Fault(command, kind, nth=nth)
    faulty.proxy.inject(fault)
    await faulty.pivot(*ALL)
    assert faulty.proxy.fired == [fault]
    await on_destinations(faulty)


@pytest.mark.parametrize(("command", "nth", "kind"), EITHER)
async def test_all_or_nothing_whichever(faulty: Rig, command: str, nth: int, kind: FaultKind) -> None:
    await started(faulty)
    faulty.proxy.inject(Fault(command, kind, nth=nth))
    try:
        await faulty.pivot(*ALL)
    except errors.OperationFailed:
        await on_sources(faulty)
        assert await faulty.states() == dict.fromkeys(ALL, "ready")
        await second_pivot(faulty)
    else:
        await on_destinations(faulty)


@pytest.mark.parametrize("command", ["job-dismiss", "blockdev-del", "cont"])
@pytest.mark.parametrize("kind", [FaultKind.ERROR, FaultKind.CUT_BEFORE, FaultKind.CUT_AFTER])
async def test_failure_after_the_record_goes_forwards(faulty: Rig, command: str, kind: FaultKind) -> None:
    await started(faulty)
    faulty.proxy.inject(Fault(command, kind))
    await faulty.pivot(*ALL)
    assert (await faulty.operations())[-1] == ("pivot", "done")
    assert await faulty.status() == "running"
    assert await faulty.qemu_jobs() == {}
    for target in ALL:
        assert await faulty.chain(target) == [str(faulty.dest(target))]
    assert not [node["file"] for node in (await faulty.nodes()).values() if node["file"].endswith(".img")]
    await writable(faulty, 0xC1)


@pytest.mark.parametrize(
    ("command", "nth", "kind"),
    [
        ("block-job-cancel", 2, FaultKind.ERROR),
        ("block-job-cancel", 2, FaultKind.CUT_AFTER),
        ("job-finalize", 1, FaultKind.ERROR),
        ("job-finalize", 1, FaultKind.CUT_BEFORE),
        ("job-finalize", 2, FaultKind.ERROR),
    ],
)
async def test_finish_that_fails(faulty: Rig, command: str, nth: int, kind: FaultKind) -> None:
    await started(faulty, "vda", "vdb")
    faulty.proxy.inject(Fault(command, kind, nth=nth))
    with pytest.raises(errors.OperationFailed):
        await faulty.finish("vda", "vdb")
    await on_sources(faulty)
    assert await faulty.states() == {"vda": "ready", "vdb": "ready"}
    await writable(faulty, 0xD3)
    await faulty.finish("vda", "vdb")
    for target in ("vda", "vdb"):
        assert faulty.holds(target, faulty.dest(target), FORMATS[target])


async def test_finish_all_or_nothing_whichever(faulty: Rig) -> None:
    """The connection ends after the first finalize: the second one may have been told or not."""
    await started(faulty, "vda", "vdb")
    faulty.proxy.inject(Fault("job-finalize", FaultKind.CUT_AFTER, nth=1))
    try:
        await faulty.finish("vda", "vdb")
    except errors.OperationFailed:
        assert await faulty.states() == {"vda": "ready", "vdb": "ready"}
        await writable(faulty, 0xD4)
        await faulty.finish("vda", "vdb")
    await on_sources(faulty)
    assert await faulty.states() == {"vda": "finished", "vdb": "finished"}
    for target in ("vda", "vdb"):
        assert faulty.holds(target, faulty.dest(target), FORMATS[target])


@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_reopen_that_fails(faulty: Rig, nth: int) -> None:
    await faulty.snapshot(mirrors=ALL)
    await faulty.ready(*ALL)
    faulty.proxy.inject(Fault("job-finalize", FaultKind.ERROR, nth=nth))
    with pytest.raises(errors.OperationFailed, match="injected"):
        await faulty.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    for target in ALL:
        assert await faulty.chain(target) == [f"{faulty.path}/{target}.s1", f"{faulty.path}/{target}.img"]
    assert await faulty.status() == "running"
    assert (await faulty.show()).current_snapshot == "s1"
    await writable(faulty, 0xE1)
    await faulty.ready(*ALL)
    await faulty.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    for target in ALL:
        assert await faulty.chain(target) == [f"{faulty.dst}/{target}.s1", f"{faulty.path}/{target}.img"]
    await writable(faulty, 0xE2)
    await faulty.guest.stop()
    for target in ALL:
        assert faulty.holds(target, faulty.dst / f"{target}.s1", "qcow2")


@pytest.mark.parametrize("command", ["blockdev-reopen", "stop", "job-complete"])
async def test_reopen_on_own_bases_that_fails(faulty: Rig, command: str) -> None:
    backing = {target: faulty.dst / f"{target}.base" for target in ALL}
    await faulty.snapshot(mirrors=ALL, backing=backing)
    await faulty.ready(*ALL)
    for target in ALL:
        backing[target].write_bytes(faulty.source(target).read_bytes())
    nodes = set(await faulty.nodes())
    faulty.proxy.inject(Fault(command, FaultKind.ERROR, nth=1 if command == "stop" else 2))
    with pytest.raises(errors.OperationFailed, match="injected"):
        await faulty.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    assert set(await faulty.nodes()) == nodes  # the bases are closed again
    await writable(faulty, 0xE3)
    await faulty.ready(*ALL)
    await faulty.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    for target in ALL:
        assert await faulty.chain(target) == [f"{faulty.dst}/{target}.s1", f"{faulty.dst}/{target}.base"]
    await faulty.guest.stop()
    for target in ALL:
        assert faulty.holds(target, faulty.dst / f"{target}.s1", "qcow2")


# --- a destination that dies in the window ---------------------------------------------------------------------

MOMENTS = ["before stop", "before complete", "pending", "one finalized", "all finalized", "reading back"]


def moment(rig: Rig, name: str) -> Gate:
    proxy = rig.proxy
    return {
        "before stop": lambda: proxy.pause_before("stop"),
        "before complete": lambda: proxy.pause_before("job-complete"),
        "pending": lambda: proxy.pause_before("job-finalize"),
        "one finalized": lambda: proxy.pause_before("job-finalize", 2),
        "all finalized": lambda: proxy.pause_after("job-finalize", 3),
        "reading back": lambda: proxy.pause_before("human-monitor-command"),
    }[name]()


@pytest.mark.parametrize("victim", ALL)
@pytest.mark.parametrize("when", MOMENTS)
async def test_server_dies_in_the_window(faulty: Rig, when: str, victim: str) -> None:
    """All three stay on their sources, the guest runs, the event names the disk; the other two are mirrored on."""
    image = make_image(faulty.qemu, faulty.dst / "remote", "raw", SIZE)
    async with faulty.server(image) as server:
        for target in ALL:
            await faulty.copy(target, server.uri if target == victim else None)
        await faulty.ready(*ALL)
        gate = moment(faulty, when)
        pivot = asyncio.create_task(faulty.pivot(*ALL))
        async with asyncio.timeout(20):
            await gate.reached()
        await server.kill()
        gate.release()
        with pytest.raises(errors.BlockferryError) as caught:
            async with asyncio.timeout(60):
                await pivot
        assert isinstance(caught.value, errors.OperationFailed)
        await on_sources(faulty)
        dropped = await faulty.heard("mirror-dropped")
        assert dropped.disk == victim
        assert dropped.data["reason"]
        await faulty.settled()
        assert len(await faulty.events("mirror-dropped")) == 1
        assert (await faulty.states())[victim] == "lost"
        assert not [name for name in await faulty.our_nodes() if f"-{victim}-x" in name]
        await second_pivot(faulty, *(target for target in ALL if target != victim))


@pytest.mark.parametrize("when", ["before complete", "pending", "one finalized", "reading back"])
async def test_server_of_all_three_dies_in_the_window(faulty: Rig, when: str) -> None:
    images = [make_image(faulty.qemu, faulty.dst / f"r{target}", "raw", SIZE) for target in ALL]
    servers = [
        NbdServer(faulty.qemu, image, "raw", faulty.path, name=f"t{target}")
        for image, target in zip(images, ALL, strict=True)
    ]
    for server, target in zip(servers, ALL, strict=True):
        await server.start()
        await faulty.copy(target, server.uri)
    await faulty.ready(*ALL)
    gate = moment(faulty, when)
    pivot = asyncio.create_task(faulty.pivot(*ALL))
    async with asyncio.timeout(20):
        await gate.reached()
    for server in servers:
        await server.kill()
    gate.release()
    with pytest.raises(errors.OperationFailed):
        async with asyncio.timeout(60):
            await pivot
    await on_sources(faulty)
    await faulty.settled()
    assert {event.disk for event in await faulty.events("mirror-dropped")} == set(ALL)
    await writable(faulty, 0xF1)
    # Onto other destinations it goes.
    for target in ALL:
        await faulty.copy(target)
    await second_pivot(faulty)


@pytest.mark.parametrize("when", ["before complete", "pending", "reading back"])
async def test_server_dies_in_the_window_of_a_paused_guest(qemu: QemuBinaries, tmp_path: Path, when: str) -> None:
    async with open_rig(qemu, tmp_path, paused=True, proxy=True) as rig:
        image = make_image(qemu, rig.dst / "remote", "raw", SIZE)
        async with rig.server(image) as server:
            for target in ALL:
                await rig.copy(target, server.uri if target == "vdb" else None)
            await rig.ready(*ALL)
            gate = moment(rig, when)
            pivot = asyncio.create_task(rig.pivot(*ALL))
            async with asyncio.timeout(20):
                await gate.reached()
            await server.kill()
            gate.release()
            with pytest.raises(errors.OperationFailed):
                await pivot
            await on_sources(rig, "prelaunch")
            assert (await rig.heard("mirror-dropped")).disk == "vdb"
            assert "cont" not in rig.proxy.commands()


async def test_server_that_is_dead_before_the_pivot(faulty: Rig) -> None:
    """Without having been noticed: an idle mirror writes nothing. The guest is not paused for it."""
    image = make_image(faulty.qemu, faulty.dst / "remote", "raw", SIZE)
    async with faulty.server(image) as server:
        for target in ALL:
            await faulty.copy(target, server.uri if target == "vda" else None)
        await faulty.ready(*ALL)
        await server.kill()
        with pytest.raises((errors.OperationFailed, errors.JobLost), match="vda"):
            await faulty.pivot(*ALL)
    await on_sources(faulty)
    assert "STOP" not in await faulty.pauses_heard()
    assert await faulty.status() == "running"


async def test_destination_that_hangs_is_left(faulty: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and never answers: nothing is pivoted to it, and once it is gone all is as before."""
    monkeypatch.setattr("blockferry.qemu.session.Session.execute.__kwdefaults__", {"seconds": 1.0})
    image = make_image(faulty.qemu, faulty.dst / "remote", "raw", SIZE)
    async with faulty.server(image) as server:
        await faulty.copy("vda", server.uri)
        await faulty.ready("vda")
        gate = faulty.proxy.pause_before("human-monitor-command")
        pivot = asyncio.create_task(faulty.pivot("vda"))
        await gate.reached()
        server.suspend()
        gate.release()
        try:
            with pytest.raises(errors.BlockferryError):
                async with asyncio.timeout(60):
                    await pivot
        finally:
            await server.kill()
        await faulty.settled()
        assert await faulty.chain("vda") == [str(faulty.source("vda"))]
        assert await faulty.status() == "running"


async def test_qemu_dies_in_the_window(qemu: QemuBinaries, tmp_path: Path) -> None:
    async with open_rig(qemu, tmp_path, iothreads=not forgets(qemu)) as rig:
        await started(rig)
        with rig.guest.control.listener("STOP") as stops:
            pivot = asyncio.create_task(rig.pivot(*ALL))
            await stops.get()
            await rig.guest.kill()
            with pytest.raises(errors.BlockferryError):
                await pivot
        await rig.settled()
        state = (await rig.operations())[-1][1]
        jobs = await rig.states()
        # Until the record the sources are authoritative, after it the destinations: the same for all three.
        assert (state, set(jobs.values())) in [("undone", {"lost"}), ("done", {"pivoted"})]
        if state == "undone":
            for target in ALL:
                assert rig.holds(target, rig.source(target), FORMATS[target])
        assert (await rig.show()).state == "gone"


async def test_guest_that_somebody_lets_run_in_the_window(faulty: Rig) -> None:
    """Another client says `cont` while some disks are switched: no write may be lost, each disk is what it is."""
    await started(faulty)
    gate = faulty.proxy.pause_before("job-finalize", 2)
    pivot = asyncio.create_task(faulty.pivot(*ALL))
    await gate.reached()
    (first,) = [args["id"] for name, args in faulty.proxy.log if name == "job-finalize"][:1]
    (switched,) = [target for target in ALL if f"-{target}-" in first]
    await faulty.guest.command("cont")
    await faulty.write(switched, 0x99, 5 * MIB)
    faulty.proxy.inject(Fault("job-finalize", FaultKind.ERROR))
    gate.release()
    said = (await asyncio.gather(pivot, return_exceptions=True))[0]
    await faulty.settled()
    assert await faulty.status() == "running"
    assert await faulty.chain(switched) == [str(faulty.dest(switched))]
    await writable(faulty, 0x9A)
    images = {target: (await faulty.disks())[target].chain[0] for target in ALL}
    await faulty.guest.stop()
    for target, image in images.items():
        assert faulty.holds(target, Path(image.file), image.format)
    # Some are on their destinations, others are not: whatever is said, it is not that the pivot went through.
    assert isinstance(said, errors.BlockferryError), said


async def test_compare_after_everything(faulty: Rig) -> None:
    """A window that failed and one that went through: source and destination are equal at the instant."""
    await started(faulty)
    faulty.proxy.inject(Fault("job-complete", FaultKind.ERROR, nth=3))
    with pytest.raises(errors.OperationFailed):
        await faulty.pivot(*ALL)
    await writable(faulty, 0x88)
    await faulty.ready(*ALL)
    await faulty.finish(*ALL)
    await faulty.guest.stop()
    for target in ALL:
        assert compare_images(faulty.qemu, faulty.source(target), FORMATS[target], faulty.dest(target), FORMATS[target])
