"""Quiesced snapshots of a real Linux guest with the real qemu-guest-agent: what they keep, and what is refused."""

import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rig import MIB, Rig, open_rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.flags import SnapshotCreate
from blockferry.model.snapshot import DiskWish, SnapshotWish
from blockferry.service import Service
from blockferry.testing import (
    QemuBinaries,
    WritingGuest,
    ask_agent,
    blockdev_disk,
    file_on_ext4,
    find_qemu,
    fsck,
    make_ext4,
    needs_recovery,
    raw_contents,
)

BASES = {"vda": "qcow2", "vdb": "raw"}
CALM = SnapshotCreate.ATOMIC | SnapshotCreate.QUIESCE


@dataclass
class Calm:
    """A guest with an ext4 on each of its two disks and its agent, attached as vm1."""

    path: Path
    guest: WritingGuest
    service: Service

    async def snapshot(self, name: str, flags: SnapshotCreate = CALM, **more: object) -> view.View:
        wish = SnapshotWish(
            name=name,
            disks=tuple(DiskWish(name=target, file=str(self.path / f"{target}.{name}")) for target in BASES),
        )
        return await self.service.submit(ask.CreateSnapshot(domain="vm1", wish=wish, flags=flags, **more))


@pytest.fixture
async def calm(qemu: QemuBinaries, tmp_path: Path) -> AsyncIterator[Calm]:
    (tmp_path / "state").mkdir()
    disks = {
        target: blockdev_disk(f"d{target}", make_ext4(qemu, tmp_path / target, fmt, 16 * MIB), fmt)
        for target, fmt in BASES.items()
    }
    async with WritingGuest(qemu, tmp_path, disks, slots=64, agent=True) as guest:
        await guest.booted()
        service = await Service.open(tmp_path / "state")
        try:
            request = ask.Attach(domain="vm1", qmp=str(guest.qemu.qmp), agent=str(guest.agent))
            shown = await service.submit(request)
            assert isinstance(shown, view.DomainView)
            assert shown.agent == str(guest.agent)
            yield Calm(tmp_path, guest, service)
        finally:
            await service.close()


@pytest.mark.guest
async def test_file_systems_are_at_rest_in_a_quiesced_snapshot(calm: Calm) -> None:
    """As cleanly unmounted, everything acknowledged is in place without the journal; in another they never are."""
    guest, qemu = calm.guest, calm.guest.qemu.binaries
    await guest.progress(8)
    before = dict(guest.acked)
    calmly = await calm.snapshot("calm")
    assert await ask_agent(guest.agent, "guest-fsfreeze-status") == ["thawed"]
    await guest.progress(8)
    plainly = await calm.snapshot("plain", SnapshotCreate.ATOMIC)
    assert isinstance(calmly, view.SnapshotView)
    assert isinstance(plainly, view.SnapshotView)
    assert plainly.frozen_ms is None
    assert calmly.frozen_ms is not None
    assert 0 < calmly.frozen_ms < 10_000
    (operation, other) = (await calm.service.submit(ask.ListOperations())).operations
    assert (operation.frozen_ms, other.frozen_ms) == (calmly.frozen_ms, None)
    assert guest.pauses_ms() == []
    await guest.progress(8)
    await guest.stop()
    for target, fmt in BASES.items():
        with raw_contents(qemu, calm.path / target, fmt) as contents:
            assert not needs_recovery(contents)
            assert fsck(contents) == ""
        with file_on_ext4(qemu, calm.path / target, fmt, "records") as records:
            assert guest.records.missing(records, target, before[target]) == []
        with raw_contents(qemu, calm.path / f"{target}.calm", "qcow2") as contents:
            assert needs_recovery(contents)


@pytest.mark.guest
async def test_frozen_by_somebody_else(calm: Calm) -> None:
    """Refused with nothing done: theirs is not ours to thaw. A dry run freezes nothing."""
    guest = calm.guest
    plan = await calm.snapshot("s1", dry_run=True)
    assert isinstance(plan, view.PlanView)
    steps = [step.removeprefix("prepare: ") for step in plan.steps]
    assert steps[-4:-1] == [
        "freeze the guest's file systems",
        "switch to the overlays at one instant: vda, vdb",
        "thaw the guest's file systems",
    ]
    assert await ask_agent(guest.agent, "guest-fsfreeze-status") == ["thawed"]
    await ask_agent(guest.agent, "guest-fsfreeze-freeze")
    with pytest.raises(errors.AlreadyFrozen):
        await calm.snapshot("s1")
    assert await ask_agent(guest.agent, "guest-fsfreeze-status", "guest-fsfreeze-thaw") == ["frozen", 2]
    await guest.qemu.command("stop")
    with pytest.raises(errors.AgentUnreachable, match="the guest is paused"):
        await calm.snapshot("s1")
    await guest.qemu.command("cont")
    await calm.snapshot("s1")
    await guest.progress(4)
    assert [each.what for each in (await calm.service.submit(ask.ListOperations())).operations] == ["snapshot"]


# --- who is no agent ------------------------------------------------------------------------------------------


@pytest.fixture
async def plain(tmp_path: Path) -> AsyncIterator[Rig]:
    """A guest without an agent: one QEMU will do, it is not asked."""
    async with open_rig(find_qemu("distribution"), tmp_path) as rig:
        yield rig


async def refused(rig: Rig, match: str, agent: Path | None = None) -> None:
    """Refused, with nothing done and nothing left."""
    if agent is not None:
        await rig.ask(ask.Attach(domain="vm1", qmp=str(rig.guest.qmp), agent=str(agent)))
    before, nodes = await rig.state(), await rig.nodes()
    with pytest.raises(errors.AgentUnreachable, match=match) as caught:
        await rig.ask(ask.CreateSnapshot(domain="vm1", name="s1", wish=SnapshotWish(), flags=CALM))
    assert caught.value.message.isprintable()
    assert await rig.state() == before
    assert (await rig.nodes()).keys() == nodes.keys()
    assert await rig.operations() == []


async def test_no_agent(plain: Rig) -> None:
    await refused(plain, "its socket is not known")
    await refused(plain, "No such file", plain.path / "nothing")
    with pytest.raises(errors.AgentUnreachable, match="not absolute"):
        await plain.ask(ask.Attach(domain="vm1", qmp=str(plain.guest.qmp), agent="agent.sock"))


async def test_agent_that_never_answers(plain: Rig) -> None:
    """A socket that listens, and one whose queue is full besides: it is somebody else's turn."""
    path = plain.path / "agent.sock"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(0)
        await refused(plain, "nobody answers on .* within 5 s", path)
        for _turn in range(2):
            waits = stack.enter_context(socket.socket(socket.AF_UNIX))
            waits.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waits.connect(str(path))
        await refused(plain, "accepts no connection", path)
