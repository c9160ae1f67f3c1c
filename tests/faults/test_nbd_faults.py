"""A destination on an NBD server that fails, is slow, or takes requests and does not answer them, by nbdkit's filters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rig import MIB, SIZE, Rig

from blockferry import errors
from blockferry.service import Service
from blockferry.testing import FaultyNbdServer, make_image

FREED_SECONDS = 15.0


@contextlib.asynccontextmanager
async def serving(rig: Rig, *, wdelay: str = "0") -> AsyncIterator[FaultyNbdServer]:
    image = make_image(rig.qemu, rig.dst / "remote", "raw", SIZE)
    async with FaultyNbdServer(rig.qemu, image, rig.path, name="t", wdelay=wdelay) as server:
        yield server


def served(rig: Rig) -> Path:
    return rig.dst / "remote"


@pytest.mark.parametrize("when", ["copying", "ready"])
async def test_writes_fail(rig: Rig, when: str) -> None:
    """The mirror is lost, with QEMU's reason, and the guest sees nothing of it."""
    async with serving(rig) as server:
        await rig.write("vda", 0x21, 0, SIZE)
        if when == "copying":
            server.fail()
        await rig.copy("vda", server.uri)
        if when == "ready":
            await rig.ready("vda")
            server.fail()
            await rig.write("vda", 0x22)
        dropped = await rig.heard("mirror-dropped", "vda")
        assert dropped.data["reason"] == "No space left on device"
        await rig.settled()
        assert await rig.states() == {"vda": "lost"}
        assert await rig.qemu_jobs() == {}
        assert await rig.our_nodes() == set()
        assert await rig.status() == "running"
        await rig.write("vda", 0x23, MIB)
        with pytest.raises(errors.JobLost, match="No space left on device"):
            await rig.pivot("vda")
        assert await rig.pauses_heard() == []
        # It can be copied there again once there is room.
        server.heal()
        await rig.copy("vda", server.uri)
        await rig.pivot("vda")
        assert await rig.chain("vda") == [server.uri]
        await rig.guest.stop()
    assert rig.holds("vda", served(rig), "raw")


async def test_every_write_is_late(rig: Rig) -> None:
    """A slow one is waited for: nothing is lost, and the guest goes over."""
    async with serving(rig, wdelay="50ms") as server:
        await rig.copy("vda", server.uri)
        await rig.ready("vda")
        await rig.write("vda", 0x31)
        await rig.pivot("vda")
        assert await rig.chain("vda") == [server.uri]
        await rig.write("vda", 0x32, MIB)
        await rig.guest.stop()
    assert rig.holds("vda", served(rig), "raw")


@pytest.mark.parametrize("when", ["before", "within"])
async def test_requests_are_taken_and_not_answered(faulty: Rig, when: str) -> None:
    """nbdkit answers the flush that is asked for before the window (it holds reads and writes): the window's deadline is left.

    The guest runs again where it was.
    """
    await faulty.service.close()
    faulty.service = await Service.open(faulty.path / "state", window_seconds=0.6)
    async with serving(faulty) as server:
        await faulty.copy("vda", server.uri)
        await faulty.ready("vda")
        if when == "before":
            await server.hold()
            pivot = asyncio.create_task(faulty.pivot("vda"))
        else:
            gate = faulty.proxy.pause_before("job-complete")
            pivot = asyncio.create_task(faulty.pivot("vda"))
            async with asyncio.timeout(20):
                await gate.reached()
            await server.hold()
            gate.release()
        async with asyncio.timeout(FREED_SECONDS):
            with pytest.raises(errors.OperationFailed, match=r"vda: nbd\+unix.*did not answer within 0\.36 s"):
                await pivot
        assert await faulty.status() == "running"
        assert await faulty.chain("vda") == [str(faulty.source("vda"))]
        assert await faulty.states() == {"vda": "lost"}
        await faulty.write("vda", 0x41)
        await server.let_go()
        await faulty.guest.stop()
    assert faulty.holds("vda", faulty.source("vda"), "qcow2")
