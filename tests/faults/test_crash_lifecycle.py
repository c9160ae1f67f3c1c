"""kill -9 of the host process before and after every journal write and QMP command of a start, a stop and a revert.

QEMU is a process of its own, so each death leaves either a guest that runs or one that is shut off, and never one that stands
before its first instruction with nobody to let it run. The mirrors are equal to what the guest has written in the end.
"""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from defined import MIB, Defined, open_defined

from blockferry.model import request as ask
from blockferry.model.flags import SnapshotDelete
from blockferry.testing import QemuBinaries, check_image, find_qemu
from blockferry.testing.crash import Crasher


async def shut_off(guest: Defined) -> None:
    """Mirrors that were closed equal."""
    await mirrored(guest)
    await guest.stop()


async def crashed(guest: Defined) -> None:
    """Mirrors of whose destinations nothing is believed."""
    await mirrored(guest)
    await guest.kill()


async def mirrored(guest: Defined) -> None:
    await guest.start()
    await guest.snapshot("s1", ("vda",), only=("vda",))
    await guest.ask(ask.StartCopy(domain="g1", disk="vdb", dest=str(guest.dest("vdb", "copy"))))
    await guest.write("vda", 0x51, 3 * MIB)
    await guest.ready("vda", "vdb")


@dataclass(frozen=True)
class Operation:
    """What leads up to it, itself, and the QEMU that it is tried on."""

    before: Callable[[Defined], Awaitable[None]]
    itself: ask.Request
    qemu: str


OPERATIONS = {
    "start": Operation(shut_off, ask.Start(domain="g1"), "qemu10"),
    "start-after-a-crash": Operation(crashed, ask.Start(domain="g1"), "distribution"),
    "stop": Operation(mirrored, ask.Stop(domain="g1", force=True), "distribution"),
    "revert": Operation(shut_off, ask.RevertSnapshot(domain="g1", snapshot="s1"), "qemu10"),
}


@pytest.fixture(scope="module")
def crashers() -> Iterator[dict[str, Crasher]]:
    """One for each QEMU: it takes its environment along when it is started."""
    with pytest.MonkeyPatch.context() as patch:
        found = {}
        for version in ("distribution", "qemu10"):
            patch.setenv("BLOCKFERRY_QEMU_DIR", str(find_qemu(version).system.parent))
            found[version] = Crasher().__enter__()
        yield found
        for crasher in found.values():
            crasher.__exit__(None, None, None)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at_every_boundary(
    name: str, crashers: dict[str, Crasher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = OPERATIONS[name]
    binaries = find_qemu(operation.qemu)
    monkeypatch.setenv("BLOCKFERRY_QEMU_DIR", str(binaries.system.parent))
    crasher = crashers[operation.qemu]
    boundaries = asyncio.run(one_case(operation, binaries, crasher, tmp_path / "whole", at=None))
    assert any(boundary.startswith("before record") for boundary in boundaries), boundaries
    for at in range(len(boundaries)):
        folder = tmp_path / str(at)
        try:
            asyncio.run(one_case(operation, binaries, crasher, folder, at=at))
        except BaseException as error:
            error.add_note(f"{name} killed at boundary {at}: {boundaries[at]}")
            raise
        shutil.rmtree(folder)


async def one_case(
    operation: Operation, binaries: QemuBinaries, crasher: Crasher, folder: Path, *, at: int | None
) -> tuple[str, ...]:
    folder.mkdir()
    async with open_defined(binaries, folder) as guest:
        await operation.before(guest)
        await guest.service.close()
        result = await asyncio.to_thread(crasher.run, folder / "state", [operation.itself], at=at)
        assert result.killed or at is None or len(result.boundaries) <= at, result
        assert result.error is None
        await guest.reopen_closed()
        await settled(guest)
        await goes_on(guest)
        return result.boundaries


async def settled(guest: Defined) -> None:
    """Done or undone; the guest runs or is shut off; and there is nothing left to settle."""
    assert (await guest.show()).state in ("running", "shut off")
    again = await guest.ask(ask.Recover())
    assert all(each.row == "-" for each in again.operations), "a second recovery found something to do"
    for each in (await guest.ask(ask.ListOperations())).operations:
        assert each.state in ("done", "undone", "in-progress"), each
    if (await guest.show()).state == "shut off":
        assert not guest.service._desk.keepers["g1"].home.taken(), "a QEMU is left that nobody lets run"


async def goes_on(guest: Defined) -> None:
    """It can be started; mirrors that it still has catch up, and hold what it wrote when it goes over to them."""
    if (await guest.show()).state == "shut off":
        await guest.start()
    reverted = "-r" in Path((await guest.disk("vda")).source or "").name
    if reverted:
        guest.written["vda"][3 * MIB : 3 * MIB + 64 * 1024] = bytes(64 * 1024)
    await guest.write("vda", 0x61, 5 * MIB)
    await guest.write("vdb", 0x62, 6 * MIB)
    mirrors = [target for target in ("vda", "vdb") if (await guest.mirror(target) or MISSING).state != "lost"]
    assert mirrors == (["vdb"] if reverted else ["vda", "vdb"])
    await guest.ready(*mirrors)
    await guest.ask(ask.PivotJobs(domain="g1", disks=("vdb",)))
    if not reverted:
        await guest.ask(ask.DeleteSnapshot(domain="g1", snapshot="s1", flags=SnapshotDelete.REOPEN_MIRROR))
    await guest.stop()
    for target, fmt in (("vda", "qcow2"), ("vdb", "raw")):
        image = Path((await guest.disk(target)).source or "")
        check_image(guest.qemu, image, fmt)
        assert guest.holds(target, image, fmt), f"{target} on {image}"


class MISSING:
    """No mirror at all."""

    state = "lost"
