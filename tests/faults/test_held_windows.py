"""The instant of a guest that is not stopped for it, since it might not hear of a request then: its jobs hold what it asks for.

Something goes wrong: before the record all disks are on their sources and the guest is answered, after it all go over.
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from rig import ALL, FORMATS, MIB, Rig, forgets, open_rig
from test_window_faults import on_destinations, second_pivot, started, writable

from blockferry import errors
from blockferry.engine.jobsteps import HOLD_SECONDS, JobSteps
from blockferry.model import view
from blockferry.model.flags import BlockCommit
from blockferry.qemu.session import LostReply, Session
from blockferry.testing import Fault, FaultKind, check_image, find_qemu


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[Rig]:
    """A guest that runs, with iothreads, in a QEMU of which one that was stopped may forget."""
    qemu = find_qemu("qemu10")
    assert forgets(qemu)
    async with open_rig(qemu, tmp_path, proxy=True) as rig:
        yield rig


def recorded_state(rig: Rig) -> str:
    """The state of the newest operation, as it is on disk."""
    with contextlib.closing(sqlite3.connect(f"file:{rig.path}/state/journal.sqlite?mode=ro", uri=True)) as journal:
        return str(journal.execute("SELECT state FROM operation ORDER BY id DESC LIMIT 1").fetchone()[0])


async def told_of(rig: Rig, kind: str) -> view.Event:
    """The next event of that type, as somebody hears it who listens."""
    async for event in rig.service.watch("vm1", None):
        if event.type == kind:
            return event
    raise AssertionError(kind)


async def on_sources(rig: Rig) -> None:
    for target in ALL:
        assert await rig.chain(target) == [str(rig.source(target))]
    assert await rig.status() == "running"
    assert await rig.pauses_heard() == []
    await writable(rig, 0x71)


async def mirrored_anew(rig: Rig) -> None:
    """Nothing is in the way of new copies, and they are pivoted to."""
    await rig.settled()
    assert await rig.qemu_jobs() == {}
    assert not [name for name in await rig.our_nodes() if name.endswith(("-x", "-xf", "-t"))]
    for target in ALL:
        rig.dest(target).unlink()
        await rig.copy(target)
    await second_pivot(rig)


async def test_the_guest_runs_and_is_not_answered_meanwhile(held: Rig) -> None:
    await started(held)
    told = asyncio.create_task(told_of(held, "mirror-pivoted"))
    gate = held.proxy.pause_before("job-finalize")
    pivot = asyncio.create_task(held.pivot(*ALL))
    await gate.reached()
    assert await held.status() == "running"
    assert {job["status"] for job in (await held.qemu_jobs()).values()} == {"pending"}
    writes = [asyncio.create_task(held.write(target, 0x61, 2 * MIB)) for target in ALL]
    assert recorded_state(held) == "recorded", (
        "what holds the guest's data from now on is written down before anything is answered"
    )
    assert not [task for task in (told, *writes) if task.done()]
    gate.release()
    done = await pivot
    assert (await told).disk in ALL
    await asyncio.gather(*writes)
    assert done.pause_ms is not None
    assert await held.pauses_heard() == []
    assert not {"stop", "cont"} & set(held.proxy.commands())
    await on_destinations(held)


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("kind", [FaultKind.ERROR, FaultKind.CUT_BEFORE, FaultKind.CUT_AFTER])
async def test_before_the_record(held: Rig, nth: int, kind: FaultKind) -> None:
    """Some were told to end and others not: all are where they were, and the mirrors that were told can't go on."""
    await started(held)
    fault = Fault("job-complete", kind, nth=nth, error_desc="not today")
    held.proxy.inject(fault)
    with pytest.raises(errors.OperationFailed, match="not today" if kind is FaultKind.ERROR else "no reply"):
        await held.pivot(*ALL)
    assert held.proxy.fired == [fault]
    assert (await held.operations())[-1] == ("pivot", "undone")
    await on_sources(held)
    assert await held.states() == dict.fromkeys(ALL, "lost")
    assert {event.disk for event in await held.events("mirror-dropped")} == set(ALL)
    await mirrored_anew(held)


async def test_a_job_that_is_not_ready_costs_no_mirror(held: Rig) -> None:
    """It is found before any is told to end."""
    await started(held)
    gate = held.proxy.pause_before("query-jobs", 4)  # after two looks, and between them whether all are ready
    pivot = asyncio.create_task(held.pivot(*ALL))
    await gate.reached()
    (job,) = [name for name in await held.qemu_jobs() if "-vdb-" in name]
    await held.guest.command("job-cancel", {"id": job})
    gate.release()
    with pytest.raises(errors.BlockferryError, match="cancel"):
        await pivot
    await on_sources(held)
    await held.settled()
    assert await held.states() == {"vda": "ready", "vdb": "lost", "sda": "ready"}
    await second_pivot(held, "vda", "sda")


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("kind", [kind for kind in FaultKind if kind is not FaultKind.HIDE])
async def test_after_the_record(held: Rig, monkeypatch: pytest.MonkeyPatch, nth: int, kind: FaultKind) -> None:
    """All go over, whatever is said."""
    monkeypatch.setattr("blockferry.qemu.session.Session.execute.__kwdefaults__", {"seconds": 0.5})
    await started(held)
    fault = Fault("job-finalize", kind, nth=nth)
    held.proxy.inject(fault)
    await held.pivot(*ALL)
    assert held.proxy.fired == [fault]
    assert (await held.operations())[-1] == ("pivot", "done")
    assert await held.pauses_heard() == []
    await on_destinations(held)


@pytest.mark.parametrize("command", ["job-dismiss", "blockdev-del"])
@pytest.mark.parametrize("kind", [FaultKind.ERROR, FaultKind.CUT_BEFORE, FaultKind.CUT_AFTER])
async def test_after_the_switch(held: Rig, command: str, kind: FaultKind) -> None:
    """It is settled from the beginning, with jobs that QEMU was let forget."""
    await started(held)
    fault = Fault(command, kind)
    held.proxy.inject(fault)
    await held.pivot(*ALL)
    assert held.proxy.fired == [fault]
    assert (await held.operations())[-1] == ("pivot", "done")
    assert await held.qemu_jobs() == {}
    assert await held.pauses_heard() == []
    await on_destinations(held)


async def test_a_job_that_somebody_cancels_after_the_record(held: Rig) -> None:
    """What had been written down is not so: what is, is written down instead, and said."""
    await started(held)
    gate = held.proxy.pause_before("job-finalize")
    pivot = asyncio.create_task(held.pivot(*ALL))
    await gate.reached()
    (job,) = [name for name in await held.qemu_jobs() if "-vdb-" in name]
    await held.guest.command("job-cancel", {"id": job})
    gate.release()
    with pytest.raises(errors.OperationAsItIs):
        await pivot
    assert (await held.operations())[-1] == ("pivot", "done")
    await held.settled()
    assert await held.states() == {"vda": "pivoted", "vdb": "lost", "sda": "pivoted"}
    assert await held.qemu_jobs() == {}
    await writable(held, 0x72)
    for target in ALL:
        on = held.source(target) if target == "vdb" else held.dest(target)
        assert await held.chain(target) == [str(on)]
    await held.guest.stop()
    for target in ALL:
        on = held.source(target) if target == "vdb" else held.dest(target)
        assert held.holds(target, on, FORMATS[target])
        check_image(held.qemu, on, FORMATS[target])


async def test_qemu_dies_after_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing had gone over, and nothing had been answered: the destinations hold all of it."""
    async with open_rig(find_qemu("qemu10"), tmp_path) as rig:
        await started(rig)
        for target in ALL:
            await rig.write(target, 0x66, 2 * MIB)
        execute_each = Session.execute_each

        async def die(self: Session, command: str, *arguments: Any, **more: Any) -> Any:
            if command == "job-finalize":
                await rig.guest.kill()
            return await execute_each(self, command, *arguments, **more)

        monkeypatch.setattr(Session, "execute_each", die)
        await asyncio.gather(rig.pivot(*ALL), return_exceptions=True)
        await rig.settled()
        assert (await rig.operations())[-1] == ("pivot", "done")
        assert await rig.states() == dict.fromkeys(ALL, "pivoted")
        for target in ALL:
            assert rig.holds(target, rig.dest(target), FORMATS[target])


async def test_a_guest_that_is_not_drained_in_time_is_stopped_until_it_is(
    held: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one is that writes faster than is copied."""
    wait = JobSteps._wait_jobs

    async def in_vain(self: JobSteps, names: tuple[str, ...], states: frozenset[str], seconds: float) -> None:
        if seconds == HOLD_SECONDS:
            raise LostReply("wait", "not within that time")
        await wait(self, names, states, seconds)

    monkeypatch.setattr(JobSteps, "_wait_jobs", in_vain)
    await started(held)
    await held.pivot(*ALL)
    assert await held.pauses_heard() == ["STOP", "RESUME"]
    commands = held.proxy.commands()
    assert commands.index("cont") < commands.index("job-finalize"), "a guest that stands still would not be told of it"
    await on_destinations(held)


async def test_finish(held: Rig) -> None:
    await started(held)
    for target in ALL:
        await held.write(target, 0x62, 2 * MIB)
    await held.finish(*ALL)
    assert await held.pauses_heard() == []
    assert await held.states() == dict.fromkeys(ALL, "finished")
    for target in ALL:
        assert held.holds(target, held.dest(target), FORMATS[target])
        assert await held.chain(target) == [str(held.source(target))]
    await writable(held, 0x73)


async def test_commit_of_the_active_layer(held: Rig) -> None:
    await held.layers(2, only=["vda"])
    gate = held.proxy.pause_before("job-finalize")
    commit = asyncio.create_task(held.commit("vda"))
    await gate.reached()
    write = asyncio.create_task(held.write("vda", 0x63, 2 * MIB))
    assert await held.status() == "running"
    gate.release()
    await asyncio.gather(commit, write)
    assert (await held.ended("vda")).state == "done"
    assert await held.pauses_heard() == []
    assert await held.chain("vda") == [held.layer("vda", 0)]
    await held.guest.stop()
    assert held.holds("vda", Path(held.layer("vda", 0)), FORMATS["vda"])


async def test_commit_that_somebody_cancels_after_the_record(held: Rig) -> None:
    await held.layers(2, only=["vda"])
    gate = held.proxy.pause_before("job-finalize")
    commit = asyncio.create_task(held.commit("vda", flags=BlockCommit.ACTIVE | BlockCommit.DELETE))
    await gate.reached()
    (job,) = await held.qemu_jobs()
    await held.guest.command("job-cancel", {"id": job})
    gate.release()
    await commit
    await held.settled()
    assert await held.states() == {"vda": "lost"}
    for target in ALL:
        await held.write(target, 0x74, 4 * MIB)
    assert await held.chain("vda") == [held.layer("vda", number) for number in (2, 1, 0)]
    assert all(Path(held.layer("vda", number)).exists() for number in range(3))
    assert await held.pauses_heard() == []
    await held.guest.stop()
    assert held.holds("vda", Path(held.layer("vda", 2)), "qcow2")


async def test_rebase_flushes_without_a_stop(held: Rig) -> None:
    await held.layers(2, only=["sda"])
    await held.pauses_heard()
    await held.rebase("sda")
    assert (await held.ended("sda")).state == "done"
    assert await held.pauses_heard() == []
    lines = [
        str(arguments.get("command-line")) for name, arguments in held.proxy.log if name == "human-monitor-command"
    ]
    assert any("flush" in line for line in lines)
    assert await held.chain("sda") == [held.layer("sda", 2)]
    await held.guest.stop()
    assert held.holds("sda", Path(held.layer("sda", 2)), "qcow2")
