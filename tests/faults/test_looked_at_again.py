"""A job ends while QEMU can't be asked for a moment: what follows its end is done all the same, without anybody asking."""

import asyncio

import pytest
from rig import Rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.testing import Fault, FaultKind

SLOW = 64 * 1024  # bytes per second


@pytest.mark.parametrize("kind", [FaultKind.ERROR, FaultKind.CUT_BEFORE])
@pytest.mark.parametrize("command", ["query-jobs", "query-block"])
async def test_commit_whose_end_could_not_be_looked_at(faulty: Rig, command: str, kind: FaultKind) -> None:
    await faulty.layers(2, only=["vda"])
    await faulty.commit("vda", top=faulty.layer("vda", 1), bandwidth=SLOW)
    last = (await faulty.ask(ask.ListEvents(since=2**62))).last
    faulty.proxy.inject(Fault(command, kind, nth=None))
    (job,) = await faulty.qemu_jobs()
    await faulty.guest.command("block-job-set-speed", {"device": job, "speed": 0})
    async with asyncio.timeout(20):
        while not faulty.proxy.fired:
            await faulty.status()
        faulty.proxy.clear()
        async for event in faulty.service.watch("vm1", last):
            if event.type == "job-done":
                break
    assert await faulty.chain("vda") == [faulty.layer("vda", 2), faulty.layer("vda", 0)]


async def test_delete_whose_end_could_not_be_looked_at(faulty: Rig) -> None:
    """Its caller waits, and nobody else asks."""
    await faulty.layers(2, only=["vda"])
    gate = faulty.proxy.pause_before("block-commit")
    delete = asyncio.create_task(faulty.delete("s1", 0))
    await gate.reached()
    faulty.proxy.inject(Fault("query-block", FaultKind.ERROR, nth=None))
    gate.release()
    async with asyncio.timeout(20):
        while len(faulty.proxy.fired) < 2:
            await faulty.status()
        faulty.proxy.clear()
        await delete
    assert await faulty.chain("vda") == [faulty.layer("vda", 2), faulty.layer("vda", 0)]


async def test_delete_whose_guest_can_not_be_asked_any_more(faulty: Rig) -> None:
    """Whoever waits is told: behind the proxy nobody sees that QEMU is gone, and nobody else will say how its job ended."""
    await faulty.layers(2, only=["vda"])
    gate = faulty.proxy.pause_before("job-finalize")
    delete = asyncio.create_task(faulty.delete("s1", 0))
    await gate.reached()
    await faulty.guest.kill()
    gate.release()
    async with asyncio.timeout(30):
        with pytest.raises(errors.QmpUnreachable):
            await delete
