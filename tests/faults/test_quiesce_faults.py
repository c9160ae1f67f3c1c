"""A guest never stays frozen: whatever fails between the freeze and the thaw, and whoever dies there.

One guest for all: it is to be as it was after each.
"""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from calm import FORMATS, Calm, open_calm

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.qemu import agent
from blockferry.service import Service
from blockferry.testing import AgentFault, Fault, FaultKind, ask_agent, find_qemu

pytestmark = [pytest.mark.guest, pytest.mark.asyncio(loop_scope="module")]

FREEZE, THAW = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Calm]:
    """On one QEMU: what is asked here is the agent, in the same guest on all."""
    async with open_calm(find_qemu("distribution"), tmp_path_factory.mktemp("calm")) as calm:
        yield calm


@pytest_asyncio.fixture(loop_scope="module")
async def calm(guest: Calm) -> AsyncIterator[Calm]:
    """The guest, which afterwards is as it was: on its images, thawed, with nothing open."""
    before = await guest.active()
    yield guest
    guest.relay.faults.clear()
    await guest.is_thawed()
    assert await guest.active() == before
    assert {state for _what, state in await guest.operations()} <= {"undone"}
    assert [path.name for path in guest.path.glob("*.s1*")] == []


async def fails(calm: Calm, match: str, *, mirrored: bool = False) -> None:
    with pytest.raises(errors.OperationFailed, match=match):
        await calm.snapshot("s1", mirrored=mirrored)


@pytest.mark.parametrize("kind", [FaultKind.ERROR, FaultKind.ERROR_AFTER, FaultKind.CUT_BEFORE, FaultKind.CUT_AFTER])
async def test_transaction_that_fails(calm: Calm, kind: FaultKind) -> None:
    calm.proxy.inject(Fault("transaction", kind))
    await fails(calm, "injected|no reply")


async def test_mirror_that_does_not_start(calm: Calm) -> None:
    calm.proxy.inject(Fault("blockdev-mirror", FaultKind.ERROR, nth=2))
    await fails(calm, "injected", mirrored=True)


async def test_agent_that_refuses(calm: Calm) -> None:
    calm.proxy.log.clear()
    calm.relay.faults[FREEZE] = AgentFault.REFUSE
    await fails(calm, "the guest's agent: no luck today")
    assert "transaction" not in calm.proxy.commands()


@pytest.mark.parametrize("fault", [AgentFault.CUT_BEFORE, AgentFault.CUT_AFTER, AgentFault.SWALLOW])
async def test_freeze_that_is_not_answered(calm: Calm, fault: AgentFault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "FREEZE_SECONDS", 0.5)
    calm.relay.faults[FREEZE] = fault
    await fails(calm, "no reply")


async def test_thaw_that_is_not_answered(calm: Calm) -> None:
    """It was done, and nobody knows: not that the freeze had held until then either."""
    calm.relay.faults[THAW] = AgentFault.CUT_AFTER
    await fails(calm, "no reply")


async def test_freeze_that_does_not_hold(calm: Calm) -> None:
    gate = calm.proxy.pause_before("transaction")
    task = asyncio.create_task(calm.snapshot("s1"))
    await gate.reached()
    assert await ask_agent(calm.guest.agent, "guest-fsfreeze-status", THAW) == ["frozen", 2]
    gate.release()
    with pytest.raises(errors.OperationFailed, match="did not stay frozen"):
        await task


async def test_request_that_is_cancelled(calm: Calm) -> None:
    gate = calm.proxy.pause_before("transaction")
    task = asyncio.create_task(calm.snapshot("s1"))
    await gate.reached()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await ask_agent(calm.guest.agent, "guest-fsfreeze-status") == ["thawed"]
    gate.release()
    await calm.service.submit(ask.Recover())


async def still_frozen(calm: Calm) -> None:
    """A snapshot whose thaw does not get through: it says so, and nothing new is begun."""
    calm.relay.faults[THAW] = AgentFault.CUT_BEFORE
    with pytest.raises(errors.OperationUnsettled, match="may still be frozen") as caught:
        await calm.snapshot("s1")
    assert caught.value.step == "thaw the guest's file systems"
    assert await ask_agent(calm.guest.agent, "guest-fsfreeze-status") == ["frozen"]
    with pytest.raises(errors.Unsettled):
        await calm.snapshot("s2")
    report = await calm.service.submit(ask.Recover())
    assert isinstance(report, view.RecoveryReport)
    (open_one,) = report.operations
    assert (open_one.row, open_one.state, open_one.next) == ("T", "unsettled", ("blockferry recover",))
    shown = await calm.service.submit(ask.ShowOperation(operation=open_one.operation))
    assert isinstance(shown, view.OperationView)
    assert "may still be frozen" in str(shown.error)
    heard = await calm.service.submit(ask.ListEvents())
    assert isinstance(heard, view.EventList)
    said = [event.data["operation"] for event in heard.events if event.type == "domain-frozen"]
    assert said.count(open_one.operation) == 1
    assert calm.service.has_work()
    calm.relay.faults.clear()


async def test_recover_thaws(calm: Calm) -> None:
    await still_frozen(calm)
    report = await calm.service.submit(ask.Recover())
    assert isinstance(report, view.RecoveryReport)
    assert [(each.row, each.state) for each in report.operations] == [("D", "undone")]
    assert not calm.service.has_work()


async def test_next_host_process_thaws(calm: Calm) -> None:
    await still_frozen(calm)
    await calm.service.close()
    assert await ask_agent(calm.guest.agent, "guest-fsfreeze-status") == ["frozen"]
    calm.service = await Service.open(calm.path / "state")


async def test_thawed_by_itself(calm: Calm) -> None:
    """Nobody asks for anything: the host process tries again."""
    await still_frozen(calm)
    async with asyncio.timeout(20):
        async for event in calm.service.watch("vm1", None):
            if event.type == "operation-undone":
                break


async def test_thawed_without_qemu(calm: Calm) -> None:
    """Its QMP socket can't be reached any more, its agent can: nothing is settled, but the guest works."""
    gate = calm.proxy.pause_before("transaction")
    task = asyncio.create_task(calm.snapshot("s1"))
    await gate.reached()
    await calm.proxy.stop()
    with pytest.raises(errors.OperationUnsettled):
        await task
    await calm.is_thawed()
    await calm.proxy.start()
    await calm.service.submit(ask.Recover())
    assert set(await calm.active()) == set(FORMATS)
