"""The HTTP interface on its own: what the service is told, and what comes of clients that misbehave or leave."""

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from blockferry import errors
from blockferry.hostprocess import StateDir
from blockferry.interfaces.api import Api
from blockferry.interfaces.api.app import BODY_MAX
from blockferry.interfaces.api.server import ApiServer
from blockferry.interfaces.api.status import http_status
from blockferry.model import request as requests
from blockferry.model.view import Done, Event, View
from blockferry.sockets import listen_unix
from blockferry.transport import HttpTransport


class Door:
    """A service that does what the test says, so that a request can be caught in the middle."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.go_on = asyncio.Event()
        self.done = asyncio.Event()
        self.left = asyncio.Event()
        self.carried_out: list[requests.Request] = []
        self.queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        self.watchers = 0

    async def submit(self, request: requests.Request) -> View:
        self.began.set()
        if isinstance(request, requests.ShowDomain):
            raise errors.NoSuchDomain(domain=request.domain)
        if isinstance(request, requests.ListDomains):
            raise ZeroDivisionError("a bug")
        await self.go_on.wait()
        self.carried_out.append(request)
        self.done.set()
        return Done(text="done")

    async def watch(self, _domain: str | None, _since: int | None) -> AsyncIterator[Event]:
        self.watchers += 1
        try:
            while (event := await self.queue.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.watchers -= 1
            self.left.set()


@pytest.fixture
async def door() -> Door:
    return Door()


@pytest.fixture
async def server(door: Door, tmp_path: Path) -> AsyncIterator[ApiServer]:
    api: Any = Api(door)  # type: ignore[arg-type]
    server = ApiServer(api, before_end=lambda: None)
    (tmp_path / "run").mkdir()
    with listen_unix(StateDir(tmp_path).socket) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        yield server
        door.go_on.set()
        server.end()
        await serving


@pytest.fixture
async def http(server: ApiServer, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(uds=str(StateDir(tmp_path).socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://blockferry") as client:
        yield client


def error_of(answer: httpx.Response) -> tuple[int, str]:
    body = answer.json()
    assert (body["version"], body["kind"]) == (1, "error")
    return answer.status_code, body["error"]["code"]


async def test_health(http: httpx.AsyncClient) -> None:
    body = (await http.get("/v1/health")).json()
    assert body["kind"] == "health"
    assert set(body) == {"version", "kind", "pid", "blockferry"}


async def test_errors_have_their_status(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/request", content=b'{"request": "show", "domain": "vm1"}')
    assert error_of(answer) == (404, "no-such-domain")
    assert isinstance(errors.from_dict(answer.json()["error"]), errors.NoSuchDomain)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"request": "no-such"}',
        b'{"request": "list", "more": 1}',
        b'{"request": "show"}',
        b'{"request": "show", "domain": 1}',
        b"x" * (BODY_MAX + 1),
    ],
)
async def test_what_can_not_be_understood(http: httpx.AsyncClient, body: bytes) -> None:
    assert error_of(await http.post("/v1/request", content=body)) == (400, "bad-request")


async def test_no_such_path(http: httpx.AsyncClient) -> None:
    assert error_of(await http.get("/v1/nothing")) == (404, "bad-request")
    assert error_of(await http.get("/v1/request")) == (405, "bad-request")
    assert error_of(await http.get("/v1/events?since=x")) == (400, "bad-request")


async def test_a_bug_is_told_and_logged(http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    answer = await http.post("/v1/request", content=b'{"request": "list"}')
    assert error_of(answer) == (500, "internal-error")
    assert "a bug" in answer.json()["error"]["message"]
    assert any(record.exc_info for record in caplog.records)


async def test_a_client_that_leaves_cancels_nothing(
    door: Door, server: ApiServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    body = b'{"request": "detach", "domain": "vm1"}'
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(StateDir(tmp_path).socket))
        client.sendall(b"POST /v1/request HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await asyncio.wait_for(door.began.wait(), 10)
    assert not server.idle
    door.go_on.set()
    await asyncio.wait_for(door.done.wait(), 10)
    assert door.carried_out == [requests.Detach(domain="vm1")]
    assert [line.split()[:2] for line in caplog.messages if "detach" in line] == [
        ["begin", 'request="detach"'],
        ["end", "request=detach"],
    ]


async def test_the_subscription_is_open_when_the_stream_begins(door: Door, http: httpx.AsyncClient) -> None:
    async with http.stream("GET", "/v1/events") as stream:
        lines = stream.aiter_lines()
        assert stream.headers["content-type"] == "text/event-stream"
        assert await anext(lines) == ": subscribed"
        assert door.watchers == 1
        door.queue.put_nowait(Event(seq=4, time=0.0, type="mirror-ready", domain="vm1", disk="vda"))
        door.queue.put_nowait(Event(seq=0, time=0.0, type="progress", domain="vm1", disk="vda"))
        assert await anext(lines) == ""
        assert await anext(lines) == "id: 4"
        assert await anext(lines) == "event: mirror-ready"
        assert (await anext(lines)).startswith("data: {")
        assert await anext(lines) == ""
        assert await anext(lines) == "event: progress", "which has no number to resume from"


async def test_a_watcher_that_leaves_is_forgotten(door: Door, http: httpx.AsyncClient) -> None:
    async with http.stream("GET", "/v1/events") as stream:
        await anext(stream.aiter_lines())
        assert door.watchers == 1
    await asyncio.wait_for(door.left.wait(), 10)
    assert door.watchers == 0


async def test_an_error_ends_a_stream(door: Door, http: httpx.AsyncClient) -> None:
    door.queue.put_nowait(errors.NoSuchDomain(domain="vm1"))
    door.queue.put_nowait(None)
    text = (await http.get("/v1/events")).text
    assert "event: error\n" in text
    assert "no-such-domain" in text


@pytest.mark.usefixtures("server")
async def test_the_library_reads_any_text(door: Door, tmp_path: Path) -> None:
    data = {"reason": "line\n separators \u2028 \x85 \r and \x1c"}
    door.queue.put_nowait(Event(seq=1, time=0.0, type="mirror-dropped", domain="vm1", data=data))
    door.queue.put_nowait(errors.NoSuchDomain(domain="vm1"))
    transport = HttpTransport(StateDir(tmp_path))
    events = transport.watch(None, None)
    assert (await anext(events)).data == data
    with pytest.raises(errors.NoSuchDomain):
        await anext(events)
    await transport.close()


@pytest.mark.usefixtures("server")
async def test_a_large_answer_comes_in_pieces(door: Door, tmp_path: Path) -> None:
    for number in range(1, 40):
        door.queue.put_nowait(Event(seq=number, time=0.0, type="t", domain="vm1", data={"x": "y" * 50_000}))
    door.queue.put_nowait(None)
    transport = HttpTransport(StateDir(tmp_path))
    assert [event.seq async for event in transport.watch(None, None)] == list(range(1, 40))
    await transport.close()


def test_every_error_has_a_status() -> None:
    for cls in errors.BY_CODE.values():
        fields = dict.fromkeys((field.name for field in dataclasses.fields(cls)), 0)
        assert 400 <= http_status(cls(**fields)) < 600
    assert {http_status(errors.NoSuchJob(domain="", disk="")), http_status(errors.JobLost("", "", ""))} == {404, 422}


async def test_ending_does_not_wait_for_ever(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockferry.interfaces.api.server.DRAIN_SECONDS", 0.2)
    server = ApiServer(Api(door), before_end=lambda: None)  # type: ignore[arg-type]
    with listen_unix(tmp_path / "api.sock") as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "api.sock"))
        async with httpx.AsyncClient(transport=transport, base_url="http://blockferry") as client:
            body = b'{"request": "detach", "domain": "vm1"}'
            asking = asyncio.create_task(client.post("/v1/request", content=body))
            await door.began.wait()
            server.end()
            await asyncio.wait_for(serving, 10)
            with contextlib.suppress(httpx.HTTPError):
                await asking
    assert door.carried_out == []
