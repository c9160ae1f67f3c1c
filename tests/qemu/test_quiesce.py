"""Quiesced snapshots of a real Linux guest with the real qemu-guest-agent: what they keep, and what is refused."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from calm import CALM, FORMATS, Calm, open_calm
from rig import MIB, Rig, open_rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.flags import SnapshotCreate
from blockferry.model.snapshot import SnapshotWish
from blockferry.service import Service
from blockferry.testing import (
    ask_agent,
    build_guest,
    file_on_ext4,
    find_qemu,
    fsck,
    make_ext4,
    needs_recovery,
    raw_contents,
)

FREEZE, THAW = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"


@pytest.fixture
async def calm(tmp_path: Path) -> AsyncIterator[Calm]:
    """On one QEMU: a Linux takes its time to boot. The next test, and faults/test_quiesce_crash.py, are on the other."""
    async with open_calm(find_qemu("distribution"), tmp_path) as calm:
        yield calm


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
    assert plainly.frozen_ms is None
    assert calmly.frozen_ms is not None
    assert 0 < calmly.frozen_ms < 10_000
    listed = await calm.service.submit(ask.ListOperations())
    assert isinstance(listed, view.OperationList)
    assert [each.frozen_ms for each in listed.operations] == [calmly.frozen_ms, None]
    assert guest.pauses_ms() == []
    await frozen_by_somebody_else(calm)
    await guest.progress(8)
    await guest.stop()
    for target, fmt in FORMATS.items():
        with raw_contents(qemu, calm.path / target, fmt) as contents:
            assert not needs_recovery(contents)
            assert fsck(contents) == ""
        with file_on_ext4(qemu, calm.path / target, fmt, "records") as records:
            assert guest.records.missing(records, target, before[target]) == []
        with raw_contents(qemu, calm.path / f"{target}.calm", "qcow2") as contents:
            assert needs_recovery(contents)


async def frozen_by_somebody_else(calm: Calm) -> None:
    """Refused with nothing done: theirs is not ours to thaw. A dry run freezes nothing."""
    guest = calm.guest
    plan = await calm.service.submit(msgspec.structs.replace(calm.wish("s1"), dry_run=True))
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
    assert await calm.operations() == [("snapshot", "done")] * 3


DEFINED = """<domain type='qemu'>
  <name>g1</name>
  <memory unit='MiB'>128</memory>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd>
    <cmdline>quiet tsc=reliable mitigations=off bf_agent=1 bf_disks=vda bf_run=x bf_first=0 bf_slots=64 bf_batch=4 bf_block=0</cmdline>
  </os>
  <devices>
    <disk type='file'><driver name='qemu' type='qcow2'/><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
    <serial type='null'/><serial type='null'/>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  </devices>
</domain>"""


@pytest.mark.guest
async def test_guest_that_is_defined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its agent's socket is found in its definition; shut off, it has none."""
    qemu, boot = find_qemu("qemu10"), build_guest(agent=True)
    monkeypatch.setenv("BLOCKFERRY_QEMU_DIR", str(qemu.system.parent))
    (tmp_path / "state").mkdir()
    disk = make_ext4(qemu, tmp_path / "vda", "qcow2", 16 * MIB)
    service = await Service.open(tmp_path / "state")
    try:
        xml = DEFINED.format(kernel=boot.kernel, initrd=boot.initrd, disk=disk)
        shown = await service.submit(ask.Define(xml=xml))
        assert isinstance(shown, view.DomainView)
        wish = ask.CreateSnapshot(domain="g1", name="s1", wish=SnapshotWish(), flags=CALM)
        with pytest.raises(errors.NotRunning):
            await service.submit(wish)
        await service.submit(ask.Start(domain="g1"))
        assert await ask_agent(Path(str(shown.agent)), "guest-fsfreeze-status") == ["thawed"]
        # The agent may be there before the disk is mounted.
        while not (frozen := await ask_agent(Path(str(shown.agent)), FREEZE, THAW))[0]:
            assert frozen == [0, 0]
        taken = await service.submit(wish)
        assert isinstance(taken, view.SnapshotView)
        assert taken.frozen_ms is not None
    finally:
        with contextlib.suppress(errors.NotRunning):
            await service.submit(ask.Stop(domain="g1", force=True))
        await service.close()
    with raw_contents(qemu, disk, "qcow2") as contents:
        assert not needs_recovery(contents)


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
    with pytest.raises(errors.AgentUnreachable, match="not an absolute path"):
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


# --- hostile agents -------------------------------------------------------------------------------------------


class Hostile:
    """Answers every client with the same bytes, after an agent's own answer to guest-sync-delimited where told."""

    def __init__(self, says: bytes, *, synced: bool) -> None:
        self._says = says
        self._synced = synced

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            asked = json.loads((await reader.readline()).lstrip(b"\xff"))
            if self._synced:
                writer.write(b"\xff" + json.dumps({"return": asked["arguments"]["id"]}).encode() + b"\n")
                await reader.readline()
            writer.write(self._says)
            await writer.drain()
        writer.close()


NOISE = b"[" * 5000 + b"\n"  # more than a parser takes without complaint


NONSENSE = [
    (b"", False, "the connection was closed"),
    (b"x" * (1 << 20), False, "limit"),
    (b"{}\n" * 2000, False, "no guest agent"),
    (NOISE + b'\xff{"return": 1}\n\xff[1]\n\xfe\n', False, "the connection was closed"),
    (b"", True, "the connection was closed"),
    (b"x" * (1 << 20), True, "limit"),
    (NOISE, True, "can't be understood"),
    (b"[]\n", True, "can't be understood"),
    (b"{}\n", True, "can't be understood"),
    (b'{"return": {"frozen": 1}}\n', True, "guest-fsfreeze-status is none"),
    (b'{"return": ["frozen"]}\n', True, "guest-fsfreeze-status is none"),
    (b'{"error": {"desc": "\\u001b[2J\\ud800 no"}}\n', True, r"\?\[2J\? no"),
    (b'{"error": {}}\n', True, "it says no"),
]


async def test_agent_that_talks_nonsense(plain: Rig) -> None:
    """Whatever a guest makes of the channel, it is a refusal with words for it."""
    for number, (says, synced, match) in enumerate(NONSENSE):
        path = plain.path / f"agent{number}.sock"
        async with await asyncio.start_unix_server(Hostile(says, synced=synced).serve, path):
            await refused(plain, match, path)
