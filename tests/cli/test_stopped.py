"""A signal to the host process while it carries a request out: it is carried through, or left to recovery."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from commandkit import Command, owner

import blockferry
from blockferry import errors, hostprocess
from blockferry.interfaces.cli import wire
from blockferry.testing import Fault, FaultKind, QmpFaultProxy, TestQemu


@pytest.fixture
async def serving(command: Command) -> asyncio.subprocess.Process:
    """A host process in the foreground, that is ready."""
    process = await command.start("serve", "--json", "--window-seconds", "5")
    assert process.stdout is not None
    await process.stdout.readline()
    return process


@pytest.fixture
async def proxy(guest: TestQemu, tmp_path: Path) -> AsyncIterator[QmpFaultProxy]:
    async with QmpFaultProxy(guest.qmp, tmp_path / "proxy.sock") as between:
        yield between


@pytest.mark.parametrize(
    ("sent", "held"), [(signal.SIGTERM, "stop"), (signal.SIGINT, "job-finalize"), (signal.SIGINT, "transaction")]
)
async def test_what_was_begun_is_carried_through(
    command: Command, serving: asyncio.subprocess.Process, proxy: QmpFaultProxy, sent: signal.Signals, held: str
) -> None:
    await command.json("attach", "vm1", "--qmp", str(proxy.path))
    await command("copy", "vm1", "vda", str(proxy.path.with_name("vda.copy")), "--wait")
    gate = proxy.pause_before(held)
    words = "snapshot create vm1 s1 --disk vdb --atomic" if held == "transaction" else "job pivot vm1 vda"
    asked = await command.start(*words.split(), "--json")
    await gate.reached()
    serving.send_signal(sent)
    gate.release()
    assert (await command.ends(asked)).status == 0, "who asked is answered"
    assert (await command.ends(serving)).status == 0
    operations = (await command.json("operations"))["operations"]
    assert operations[-1]["state"] == "done"
    assert (await command.json("show", "vm1"))["state"] == "running"


async def test_what_hangs_is_left_to_recovery(
    command: Command, serving: asyncio.subprocess.Process, guest: TestQemu, proxy: QmpFaultProxy
) -> None:
    """A command that is never answered: the process ends within its patience, and the next one settles it."""
    await command.json("attach", "vm1", "--qmp", str(proxy.path))
    proxy.inject(Fault("transaction", FaultKind.DROP_REPLY))
    gate = proxy.pause_before("transaction")
    asked = await command.start("snapshot", "create", "vm1", "s1", "--atomic", "--json")
    await gate.reached()
    serving.send_signal(signal.SIGTERM)
    gate.release()
    assert (await command.ends(serving)).status == 0
    assert (await command.ends(asked)).status != 0
    proxy.clear()
    operations = (await command.json("operations"))["operations"]
    assert operations[-1]["state"] in ("done", "undone")
    assert owner(command.state_dir) != serving.pid
    assert (await guest.command("query-status"))["status"] == "running"


async def test_a_host_process_that_is_stopped(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Who waits for its answer is told, rather than waiting for ever; and what is not answered yet is no reason to leave."""
    monkeypatch.setattr(hostprocess, "LOOK_SECONDS", 0.2)
    state = hostprocess.StateDir(command.state_dir)
    await command.json("list")
    pid = owner(command.state_dir)
    assert await asyncio.to_thread(hostprocess.answers, state)
    os.kill(pid, signal.SIGSTOP)
    try:
        monkeypatch.setattr(hostprocess, "ANSWER_SECONDS", 0.3)
        with pytest.raises(errors.HostProcessUnreachable, match="does not answer any more"):
            await asyncio.to_thread(wire.submit, state, {"request": "list"})
        async with blockferry.connect(command.state_dir) as ferry:
            with pytest.raises(errors.HostProcessUnreachable, match="does not answer any more"):
                await ferry.list()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (await asyncio.to_thread(wire.submit, state, {"request": "list"}))["domains"] == []


async def test_who_listens_to_a_host_process_that_is_stopped(
    command: Command, guest: TestQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`copy --wait` and whoever else waits for an event is told as well."""
    monkeypatch.setattr(hostprocess, "LOOK_SECONDS", 0.2)
    state = hostprocess.StateDir(command.state_dir)
    await command.json("attach", "vm1", "--qmp", str(guest.qmp))
    pid = owner(command.state_dir)
    async with blockferry.connect(command.state_dir) as ferry:
        heard, listed = ferry.watch(None, 0), wire.events(state, None, 0)
        first = await anext(heard)
        assert (await asyncio.to_thread(next, listed))["seq"] == first.seq
        os.kill(pid, signal.SIGSTOP)
        try:
            monkeypatch.setattr(hostprocess, "ANSWER_SECONDS", 0.3)
            with pytest.raises(errors.HostProcessUnreachable, match="does not answer any more"):
                async for _event in heard:
                    pass
            with pytest.raises(errors.HostProcessUnreachable, match="does not answer any more"):
                await asyncio.to_thread(list, listed)
        finally:
            os.kill(pid, signal.SIGCONT)


def test_a_doorway_that_stays_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process that is stopped just then; of one that is gone nothing stays locked."""
    monkeypatch.setattr(hostprocess, "DOORWAY_SECONDS", 0.1)
    state = hostprocess.StateDir(tmp_path / "state")
    hostprocess.prepare_state_dir(state)
    script = f"import fcntl, os; fcntl.flock(os.open({str(state.run)!r}, os.O_RDONLY), fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(errors.StateDirUnusable, match="has been locked for"):
            hostprocess.Ownership.take(state)
        holder.kill()
    hostprocess.Ownership.take(state).give_up()
