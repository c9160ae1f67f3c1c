"""A move that is over at once goes wrong at each of its commands: all of it is done or nothing, as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rig import MIB, Rig, forgets
from sharing import DISKS, open_sharing
from test_move import moved

from blockferry import errors
from blockferry.qemu import sharing as blocks
from blockferry.qemu.session import Session
from blockferry.testing import Fault, FaultKind, QemuBinaries

# Of what is sent to each of the two disks: the second time, when the first is done.
FAULTS = [
    (command, nth, kind)
    for command, numbers in {
        "blockdev-add": (2,),
        "blockdev-mirror": (2,),
        "query-jobs": (1, 3),
        "stop": (1,),
        "job-complete": (2,),
        "job-finalize": (1, 2),
        "cont": (1,),
        "job-dismiss": (2,),
        "blockdev-del": (2,),
    }.items()
    for nth in numbers
    for kind in (FaultKind.ERROR, FaultKind.ERROR_AFTER, FaultKind.CUT_BEFORE, FaultKind.CUT_AFTER)
]


@pytest.mark.parametrize(("command", "nth", "kind"), FAULTS)
async def test_done_or_undone_as_it_says(
    qemu: QemuBinaries, reflinks: Path, command: str, nth: int, kind: FaultKind
) -> None:
    iothreads = command not in ("stop", "cont") or not forgets(qemu)
    async with open_sharing(qemu, reflinks, iothreads=iothreads) as sharing:
        await require_done_or_undone(sharing, command, nth, kind)


async def require_done_or_undone(sharing: Rig, command: str, nth: int, kind: FaultKind) -> None:
    before = await sharing.state()
    fault = Fault(command, kind, nth=nth, error_desc="not today")
    sharing.proxy.inject(fault)
    try:
        done = (await moved(sharing, verify="none")).state == "done"
    except (errors.OperationFailed, errors.QmpUnreachable):
        done = False
    assert sharing.proxy.fired == [fault]
    sharing.proxy.clear()
    if not done:
        assert await sharing.operations() in ([("move", "undone")], [])
        assert await sharing.state() == before
        # Its mirrors were never anybody's to know of.
        assert (await sharing.jobs(), await sharing.events("mirror-dropped")) == ({}, [])
        # A source that was opened again stays: the legacy -drive's, whose node QEMU frees at the switch.
        assert {name for name in await sharing.our_nodes() if not name.endswith("-vdb-r")} == set()
    assert await sharing.status() == "running"
    for target in DISKS:
        await sharing.write(target, 0x51, 3 * MIB)
    if not done:
        assert (await moved(sharing, verify="none")).state == "done"
    await require_on_copies(sharing)


async def require_on_copies(rig: Rig) -> None:
    assert await rig.qemu_jobs() == {}
    for target in DISKS:
        assert await rig.chain(target) == [str(rig.dst / f"{target}.img")]
        await rig.write(target, 0x52, 5 * MIB)
    await rig.guest.stop()
    for target in DISKS:
        assert rig.holds(target, rig.dst / f"{target}.img", "raw")


async def test_blocks_that_can_not_be_shared_after_all(sharing: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system is full, say: the mirrors end, and what was made is gone."""

    def full(_original: int, _copy: int, _size: int) -> None:
        raise OSError(28, "No space left on device")

    before = await sharing.state()
    with monkeypatch.context() as patched:
        patched.setattr(blocks, "_share_pieces", full)
        with pytest.raises(errors.OperationFailed, match="No space left on device"):
            await moved(sharing, verify="none")
    assert await sharing.state() == before
    assert await sharing.our_nodes() == set()
    assert (await moved(sharing, verify="none")).state == "done"
    await require_on_copies(sharing)


@pytest.mark.parametrize("command", ["blockdev-mirror", "stop", "job-finalize"])
async def test_a_guest_that_dies_leaves_no_copies(
    qemu: QemuBinaries, reflinks: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """It never ran on them."""
    async with open_sharing(qemu, reflinks, proxy=False, iothreads=not forgets(qemu)) as rig:
        files, execute, dying = rig.files(), Session.execute, [command]

        async def die(self: Session, name: str, /, **arguments: Any) -> Any:
            if name in dying:
                dying.clear()
                await rig.guest.kill()
            return await execute(self, name, **arguments)

        monkeypatch.setattr(Session, "execute", die)
        with pytest.raises(errors.GuestGone, match="undone: every disk is on the image that it was on"):
            await moved(rig, verify="none")
        assert await rig.operations() == [("move", "undone")]
        assert rig.files() == files
        for target in DISKS:
            assert rig.holds(target, rig.source(target), "raw")
