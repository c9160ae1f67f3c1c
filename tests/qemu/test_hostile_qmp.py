"""A QEMU that its guest has taken over, and a guest agent that is the guest's: they say anything.

What they say is a real QEMU's, with one message exchanged for another on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.snapshot import DiskWish, SnapshotWish
from blockferry.qemu.agent import Agent, AgentRefused, AgentSilent
from blockferry.qemu.session import LostReply, Session
from blockferry.service import Service
from blockferry.testing import QemuBinaries, TestQemu, blockdev_disk, make_image
from blockferry.testing.process import socket_path

MIB = 1 << 20
DEEP = b'{"return":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
STOP = b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}\n'
# What is said in the place of the reply to a command that is asked for next: its id is put in for ID.
Reply = tuple[str, bytes]


class Liar:
    """Between blockferry and a QEMU: hands everything on, but for replies to one command.

    Args:
        qmp: QEMU's socket.
        path: where it listens itself.
    """

    def __init__(self, qmp: Path, path: Path) -> None:
        self._qmp = qmp
        self.path = path
        self.lie: Reply | None = None
        self.greeting: bytes | None = None
        self.flood: bytes | None = None

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Liar]:
        async with await asyncio.start_unix_server(self._serve, socket_path(self.path), limit=64 * MIB):
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        qemu, to_qemu = await asyncio.open_unix_connection(self._qmp, limit=64 * MIB)
        asked: dict[str, str] = {}
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._questions(reader, to_qemu, asked))
                tasks.create_task(self._answers(qemu, writer, asked))
        except* (ConnectionError, EOFError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            to_qemu.close()

    async def _questions(
        self, reader: asyncio.StreamReader, to_qemu: asyncio.StreamWriter, asked: dict[str, str]
    ) -> None:
        text = ""
        # One after the other, without anything in between.
        while more := await reader.read(MIB):
            text += more.decode()
            with contextlib.suppress(json.JSONDecodeError):
                while text:
                    question, end = json.JSONDecoder().raw_decode(text)
                    asked[question.get("id", "")] = question["execute"]
                    to_qemu.write(text[:end].encode())
                    text = text[end:]
        raise EOFError

    async def _answers(self, qemu: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: dict[str, str]) -> None:
        greeting = await qemu.readline()
        writer.write(self.greeting or greeting)
        while line := await qemu.readline():
            said = json.loads(line)
            name = said.get("id", "")
            if self.lie is not None and asked.get(name) == self.lie[0]:
                line = self.lie[1].replace(b"ID", name.encode())
            writer.write(line)
            await writer.drain()
            while self.flood is not None:
                writer.write(self.flood * 1000)
                await writer.drain()
        raise EOFError


@dataclass(eq=False)
class Two:
    """A domain `liar`, whose QEMU is lied about, and a domain `honest`, of one service."""

    service: Service
    liar: Liar
    path: Path

    async def ask(self, request: ask.Request) -> Any:
        return await self.service.submit(request)

    def questions(self) -> list[ask.Request]:
        disk = DiskWish(name="vda", file=str(self.path / "new"))
        return [
            ask.ShowDomain(domain="liar"),
            ask.CreateSnapshot(domain="liar", wish=SnapshotWish(disks=(disk,))),
        ]

    async def is_well(self, domain: str) -> None:
        assert [disk.target for disk in (await self.ask(ask.ShowDomain(domain=domain))).disks] == ["vda"]


@pytest.fixture
async def two(qemu: QemuBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Two]:
    monkeypatch.setattr(Session, "COMMAND_SECONDS", 2.0)
    # After a connection has broken it is looked for so long whether QEMU is on its end: here it never is.
    monkeypatch.setattr("blockferry.engine.keeper.DYING_SECONDS", 0.05)
    async with contextlib.AsyncExitStack() as stack:
        guests = {}
        for name in ("liar", "honest"):
            folder = tmp_path / name
            folder.mkdir()
            image = make_image(qemu, folder / "image", "qcow2", MIB)
            guests[name] = await stack.enter_async_context(
                TestQemu(qemu, folder, args=blockdev_disk("d0", image, "qcow2"))
            )
        liar = await stack.enter_async_context(Liar(guests["liar"].qmp, tmp_path / "liar.sock").listening())
        (tmp_path / "state").mkdir()
        service = await Service.open(tmp_path / "state")
        stack.push_async_callback(service.close)
        await service.submit(ask.Attach(domain="liar", qmp=str(liar.path)))
        await service.submit(ask.Attach(domain="honest", qmp=str(guests["honest"].qmp)))
        yield Two(service, liar, tmp_path)


def reply(value: Any) -> bytes:
    return json.dumps({"return": value, "id": "ID"}).encode() + b"\n"


NODE = {"node-name": "d0", "drv": "qcow2", "ro": False}
JOB = {"id": "theirs", "type": "mirror", "status": "no such status", "current-progress": 0, "total-progress": 0}
CIRCLE = {
    "nodes": [{"id": number, "name": name, "type": "block-driver"} for number, name in ((1, "d0"), (2, "d0-file"))],
    "edges": [
        {"parent": 1, "child": 2, "name": "backing", "perm": [], "shared-perm": []},
        {"parent": 2, "child": 1, "name": "backing", "perm": [], "shared-perm": []},
    ],
}
NO_JSON = {
    "half a character": b'{"return": {"status": "\\ud800", "running": true}, "id": "ID"}\n',
    "no UTF-8": b'{"return": {"status": "\xff\xfe", "running": true}, "id": "ID"}\n',
    "too deep": DEEP,
    "a long number": b'{"return": ' + b"9" * 10_000 + b', "id": "ID"}\n',
    "an endless line": b'{"return": "' + b"x" * (11 * MIB) + b'", "id": "ID"}\n',
    "nothing": b"\n",
    "null": b"null\n",
    "a list": b"[]\n",
    "half an object": b'{"return"\n',
    "an id that is none": b'{"return": {}, "id": []}\n',
    "an event that is none": b'{"event": 5, "id": "ID"}\n',
    "an event without a time": b'{"event": "STOP"}\n',
    "an event of a job without a name": b'{"event": "JOB_STATUS_CHANGE", "data": {"id": {}}, '
    b'"timestamp": {"seconds": 1, "microseconds": 1}}\n',
    "neither": b'{"id": "ID"}\n',
    "an error that is none": b'{"error": 5, "id": "ID"}\n',
    "half an error": b'{"error": {"class": "GenericError"}, "id": "ID"}\n',
    "a parse error": b'{"error": {"class": "GenericError", "desc": "x"}}\n',
}
WRONG: dict[str, tuple[Any, ...]] = {
    "query-status": ({}, [], None, 7, {"status": 5, "running": True}, {"status": "running"}),
    "query-block": ({}, [5], [{"device": 5}], [{"device": "d", "qdev": "q", "inserted": 7}]),
    "query-jobs": ({}, [{"id": []}], [{**JOB, "current-progress": "many"}], [{**JOB, "total-progress": 1 << 70}]),
    "query-named-block-nodes": ([{}], 3, [NODE, {**NODE, "image": {"virtual-size": -(1 << 99)}}]),
    "x-debug-query-block-graph": ({}, CIRCLE, {"nodes": [5], "edges": []}, {"nodes": [], "edges": [{"parent": 1}]}),
}
# It is asked only where there are jobs.
WRONG_WITH_A_JOB = {"query-block-jobs": ([{"device": "d"}], "x")}


async def cases(two: Two) -> AsyncIterator[str]:
    """Each lie in its turn."""
    for what, line in NO_JSON.items():
        two.liar.lie = ("query-status", line)
        yield what
    for command, values in (*WRONG.items(), *WRONG_WITH_A_JOB.items()):
        if command in WRONG_WITH_A_JOB:
            two.liar.lie = None
            await two.ask(ask.StartCopy(domain="liar", disk="vda", dest=str(two.path / "copy")))
        for value in values:
            two.liar.lie = (command, reply(value))
            yield f"{command}: {value}"
    two.liar.lie = None


async def test_whatever_it_answers(two: Two) -> None:
    """An error with a code, within bounds; the other domain is served, and so is this one when it is itself again."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async for what in cases(two):
        refusals = []
        for question in two.questions():
            try:
                await asyncio.wait_for(two.ask(question), 30)
            except errors.BlockferryError as error:
                refusals.append(error)
        codes = {error.code for error in refusals}
        assert codes, what
        assert all(len(error.message) < 2000 for error in refusals), what
        assert codes <= {"qmp-unreachable", "guest-gone", "unsettled", "operation-failed"}, (what, codes)
        await two.is_well("honest")
        assert not (two.path / "new").exists()
    await two.is_well("liar")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 256 << 10, (
        "KiB; the liar's lines are among them"
    )


async def test_jobs_that_are_not_ours(two: Two) -> None:
    """They are shown by nobody, waited for by nobody, and touched by nobody."""
    two.liar.lie = ("query-jobs", reply([JOB, {**JOB, "id": "bf-x-1-vda-m"}]))
    await two.is_well("liar")
    assert (await two.ask(ask.ListJobs(domain="liar"))).jobs == ()


GREETINGS = (
    b'{"QMP": 5}\n',
    b'{"QMP": {"version": 5, "capabilities": []}}\n',
    b'{"QMP": {"version": {}, "capabilities": "oob"}}\n',
    b'{"QMP": {"version": {"qemu": []}, "capabilities": []}}\n',
    b'{"QMP": {"version": {"qemu": {"major": {}, "minor": [], "micro": "x"}}, "capabilities": [{}]}}\n',
    b"x" * (11 * MIB) + b"\n",
    DEEP,
    b"\xff\n",
)


async def test_whatever_it_greets_with(two: Two) -> None:
    for greeting in GREETINGS:
        await two.ask(ask.Detach(domain="liar"))
        two.liar.greeting = greeting
        # What it says of itself that is not used is nobody's business.
        with contextlib.suppress(errors.QmpUnreachable, errors.QmpBusy):
            await two.ask(ask.Attach(domain="liar", qmp=str(two.liar.path), timeout=5))
            await two.ask(ask.Detach(domain="liar"))
        await two.is_well("honest")
        two.liar.greeting = None
        await two.ask(ask.Attach(domain="liar", qmp=str(two.liar.path)))
        await two.is_well("liar")


@pytest.mark.parametrize("event", ["STOP", "NOBODY_KNOWS_THIS"])
async def test_a_flood_of_events(two: Two, event: str) -> None:
    """Bounded, whatever it is; the other domain is served meanwhile."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    two.liar.flood = STOP.replace(b"STOP", event.encode())
    with contextlib.suppress(errors.BlockferryError):
        await two.ask(ask.ShowGraph(domain="liar"))
    for _time in range(20):
        await asyncio.wait_for(two.is_well("honest"), 30)
    two.liar.flood = None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 128 << 10, "KiB"
    await two.is_well("liar")


# --- the guest's agent ----------------------------------------------------------------------------------------

ANSWERS = {
    "an endless line": lambda _id: b"x" * (1 << 20),
    "lines without end": lambda _id: b'{"return": 1}\n' * 100_000,
    "no JSON": lambda _id: b"\xfe\xfe\n",
    "too deep": lambda _id: b"[" * 60_000 + b"\n",
    "a list": lambda _id: b"[]\n",
    "a long number": lambda _id: b'{"return": ' + b"9" * 9000 + b"}\n",
    "in order, and then a list": lambda number: (
        b"\xff" + json.dumps({"return": number}).encode() + b'\n{"return": []}\n'
    ),
    "in order, and then an error that is none": lambda number: (
        b"\xff" + json.dumps({"return": number}).encode() + b'\n{"error": {"desc": ["\\u001b[2J", {}]}}\n'
    ),
    "in order, and then a number": lambda number: (
        b"\xff" + json.dumps({"return": number}).encode() + b'\n{"return": 1e999}\n'
    ),
}


@pytest.mark.parametrize("what", ANSWERS)
async def test_whatever_a_guests_agent_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """It is the guest's: nothing is believed, nothing is kept, nothing waits longer than its bound."""
    monkeypatch.setattr("blockferry.qemu.agent.ANSWER_SECONDS", 0.3)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            line = (await reader.readline()).lstrip(b"\xff")
            writer.write(ANSWERS[what](json.loads(line)["arguments"]["id"]))
            await writer.drain()
            await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "agent.sock"):
        agent = Agent(tmp_path / "agent.sock", lambda _when, _what: None)
        for question in (agent.is_frozen, agent.freeze, agent.thaw):
            with pytest.raises((AgentSilent, AgentRefused, LostReply)) as caught:
                await asyncio.wait_for(question(), 30)
            assert len(str(caught.value)) < 500
            assert str(caught.value).isprintable()
