"""Going on with a copy while commands are refused, or the connection breaks, or the guest writes. Kills: tests/chaos."""

import asyncio

import pytest
from rig import KIB, MIB, Rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.testing import Fault, FaultKind


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
