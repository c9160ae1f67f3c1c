import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, StateError

from blockferry.testing import Fault, FaultKind, QemuBinaries, QmpFaultProxy, TestQemu

NULL = {"driver": "null-co", "node-name": "n0"}


@pytest.fixture
async def guest(qemu: QemuBinaries, tmp_path: Path) -> AsyncIterator[TestQemu]:
    async with TestQemu(qemu, tmp_path) as guest:
        yield guest


@pytest.fixture
async def proxy(guest: TestQemu, tmp_path: Path) -> AsyncIterator[QmpFaultProxy]:
    async with QmpFaultProxy(guest.qmp, tmp_path / "proxy.sock") as proxy:
        yield proxy


async def connect(proxy: QmpFaultProxy) -> QMPClient:
    client = QMPClient("product")
    await client.connect(str(proxy.path))
    return client


async def disconnect_dead(client: QMPClient) -> None:
    with pytest.raises((EOFError, ConnectionError)):  # a reset where something was still unread
        await client.disconnect()


@pytest.fixture
async def client(proxy: QmpFaultProxy) -> AsyncIterator[QMPClient]:
    client = await connect(proxy)
    yield client
    await client.disconnect()


async def nodes(guest: TestQemu) -> list[str]:
    return [node["node-name"] for node in await guest.command("query-named-block-nodes")]


async def test_forwards_and_logs(proxy: QmpFaultProxy, client: QMPClient, guest: TestQemu) -> None:
    seen: list[str] = []
    proxy.on_command = lambda name, _arguments: seen.append(name)
    await client.execute("blockdev-add", NULL)
    schema = await client.execute("query-qmp-schema")
    assert isinstance(schema, list)
    assert len(schema) == len(await guest.command("query-qmp-schema"))
    assert proxy.log[1:] == [("blockdev-add", NULL), ("query-qmp-schema", {})]
    assert proxy.commands() == ["qmp_capabilities", "blockdev-add", "query-qmp-schema"]
    assert seen == ["blockdev-add", "query-qmp-schema"]


async def test_events_come_through(client: QMPClient) -> None:
    with client.listener("RESUME") as events:
        await client.execute("cont")
        assert (await events.get())["event"] == "RESUME"


async def test_error(proxy: QmpFaultProxy, client: QMPClient, guest: TestQemu) -> None:
    fault = Fault("blockdev-add", FaultKind.ERROR, nth=2, error_desc="no luck")
    proxy.inject(fault)
    await client.execute("blockdev-add", NULL)
    with pytest.raises(ExecuteError, match="no luck"):
        await client.execute("blockdev-add", {**NULL, "node-name": "n1"})
    assert await nodes(guest) == ["n0"]
    assert proxy.fired == [fault]
    await client.execute("blockdev-add", {**NULL, "node-name": "n2"})


async def test_error_each_time_when_arguments_match(proxy: QmpFaultProxy, client: QMPClient) -> None:
    proxy.inject(Fault("blockdev-add", FaultKind.ERROR, nth=None, when=lambda args: args["node-name"] == "bad"))
    await client.execute("blockdev-add", NULL)
    for _ in range(2):
        with pytest.raises(ExecuteError, match="injected"):
            await client.execute("blockdev-add", {**NULL, "node-name": "bad"})
    proxy.clear()
    await client.execute("blockdev-add", {**NULL, "node-name": "bad"})


async def test_error_after(proxy: QmpFaultProxy, client: QMPClient, guest: TestQemu) -> None:
    proxy.inject(Fault("blockdev-add", FaultKind.ERROR_AFTER))
    with pytest.raises(ExecuteError, match="injected"):
        await client.execute("blockdev-add", NULL)
    assert await nodes(guest) == ["n0"]


async def test_drop_reply(proxy: QmpFaultProxy, client: QMPClient, guest: TestQemu) -> None:
    proxy.inject(Fault("blockdev-add", FaultKind.DROP_REPLY))
    forwarded = asyncio.Event()
    proxy.on_command = lambda _name, _arguments: forwarded.set()
    lost = asyncio.create_task(client.execute("blockdev-add", NULL))
    await forwarded.wait()
    # Others are answered, each with its own answer; QEMU executes in order.
    answers: Any = await asyncio.gather(client.execute("query-status"), client.execute("query-named-block-nodes"))
    assert answers[0]["status"] == "prelaunch"
    assert [node["node-name"] for node in answers[1]] == ["n0"]
    assert not lost.done()
    lost.cancel()
    with pytest.raises(asyncio.CancelledError):
        await lost


@pytest.mark.parametrize(("kind", "expected"), [(FaultKind.CUT_BEFORE, []), (FaultKind.CUT_AFTER, ["n0"])])
async def test_cut(proxy: QmpFaultProxy, guest: TestQemu, kind: FaultKind, expected: list[str]) -> None:
    client = await connect(proxy)
    proxy.inject(Fault("blockdev-add", kind))
    with pytest.raises(ExecInterruptedError):
        await client.execute("blockdev-add", NULL)
    await disconnect_dead(client)
    again = await connect(proxy)
    assert await nodes(guest) == expected
    await again.execute("query-status")
    await again.disconnect()


async def test_hide(proxy: QmpFaultProxy, client: QMPClient) -> None:
    proxy.inject(Fault("job-change", FaultKind.HIDE))
    proxy.inject(Fault("blockdev-mirror", FaultKind.HIDE))
    commands: Any = await client.execute("query-commands")
    schema: Any = await client.execute("query-qmp-schema")
    for names in [entry["name"] for entry in commands], [entry["name"] for entry in schema]:
        assert "blockdev-mirror" not in names
        assert "blockdev-backup" in names
    for _ in range(2):
        with pytest.raises(ExecuteError) as caught:
            await client.execute("blockdev-mirror", {})
        assert caught.value.error_class == "CommandNotFound"


async def test_gate_before(proxy: QmpFaultProxy, client: QMPClient, guest: TestQemu) -> None:
    gate = proxy.pause_before("blockdev-add")
    held = asyncio.create_task(client.execute("blockdev-add", NULL))
    await gate.reached()
    behind = asyncio.create_task(client.execute("query-named-block-nodes"))
    assert await nodes(guest) == []
    gate.release()
    await held
    answer: Any = await behind
    assert [node["node-name"] for node in answer] == ["n0"]


async def test_gate_after(proxy: QmpFaultProxy, client: QMPClient, guest: TestQemu) -> None:
    gate = proxy.pause_after("blockdev-add")
    held = asyncio.create_task(client.execute("blockdev-add", NULL))
    await gate.reached()
    assert await nodes(guest) == ["n0"]
    assert not held.done()
    gate.release()
    await held


async def test_client_that_dies_at_a_gate_takes_its_command_along(proxy: QmpFaultProxy, guest: TestQemu) -> None:
    gate = proxy.pause_before("blockdev-add")
    client = await connect(proxy)
    held = asyncio.create_task(client.execute("blockdev-add", NULL))
    await gate.reached()
    await client.disconnect()
    with pytest.raises(ExecInterruptedError):
        await held
    again = await connect(proxy)
    gate.release()
    assert await again.execute("query-named-block-nodes") == []
    await again.disconnect()


@pytest.mark.parametrize("turns", range(8))
async def test_who_comes_while_it_stops_is_let_go(guest: TestQemu, tmp_path: Path, turns: int) -> None:
    """Whatever has been done of accepting him: nobody else would close what is left of that."""
    proxy = QmpFaultProxy(guest.qmp, tmp_path / "proxy.sock")
    await proxy.start()
    with socket.socket(socket.AF_UNIX) as comes:
        comes.connect(str(proxy.path))
        for _turn in range(turns):
            await asyncio.sleep(0)
        await proxy.stop()
        comes.settimeout(20)
        said = b""
        with contextlib.suppress(ConnectionResetError):  # never accepted, or with something unread
            while more := await asyncio.to_thread(comes.recv, 1 << 16):
                said += more
        assert b"QMP" in said or not said


async def test_cut_now_and_dead_qemu(proxy: QmpFaultProxy, guest: TestQemu) -> None:
    client = await connect(proxy)
    await proxy.cut()
    await disconnect_dead(client)
    client = await connect(proxy)
    await guest.kill()
    with pytest.raises((ExecInterruptedError, StateError)):  # StateError where the client has noticed already
        await client.execute("query-status")
    await disconnect_dead(client)
