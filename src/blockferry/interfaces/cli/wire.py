"""Talking to the host process: a request and its answer, or a stream of events, as plain JSON values.

HTTP/1.0 by hand: the answer ends where the connection does, so twenty lines do what http.client takes 20 ms to import.
"""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator
from io import BufferedReader
from typing import Any, NoReturn
from urllib.parse import urlencode

from blockferry import hostprocess

Json = dict[str, Any]
CHUNK_BYTES = 64 << 10


class Told(Exception):
    """An error as the host process told it: `BlockferryError.to_dict()`, as plain values."""

    def __init__(self, error: Json) -> None:
        super().__init__(error["message"])
        self.error = error


def submit(state: hostprocess.StateDir, request: Json) -> Json:
    """Carry out a request; the host process is started when none runs.

    Raises:
        Told: what it answered instead of a view.
        BlockferryError: it can't be reached.
    """
    return _exchange(state, hostprocess.ensure_running(state), request)


def submit_if_running(state: hostprocess.StateDir, request: Json) -> Json | None:
    """Carry out a request if a host process runs; None if not."""
    connection = hostprocess.connect(state)
    return None if connection is None else _exchange(state, connection, request)


def events(state: hostprocess.StateDir, domain: str | None, since: int | None) -> Iterator[Json]:
    """Give events as they come, until the host process ends.

    Raises:
        Told: what it answered instead.
        BlockferryError: it can't be reached.
    """
    wanted = {"domain": domain, "since": since}
    query = urlencode({name: value for name, value in wanted.items() if value is not None})
    with hostprocess.ensure_running(state) as connection:
        status, answer = _send(state, connection, f"GET /v1/events?{query}", b"")
        with answer:
            if status != 200:
                raise Told(json.loads(answer.read())["error"])
            for line in _lines(state, connection, answer):
                if line.startswith(b"data: "):
                    event: Json = json.loads(line.removeprefix(b"data: "))
                    if event["kind"] == "error":
                        raise Told(event["error"])
                    yield event


def _exchange(state: hostprocess.StateDir, connection: socket.socket, request: Json) -> Json:
    with connection:
        status, answer = _send(state, connection, "POST /v1/request", _encoded(request))
        with answer:
            try:
                view: Json = json.loads(answer.read())
            except (OSError, ValueError) as error:
                _cut_off(state, error)
    if status != 200:
        raise Told(view["error"])
    return view


def _encoded(request: Json) -> bytes:
    try:
        return json.dumps(request, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        from blockferry.errors import BadRequest

        raise BadRequest(reason=f"{error.object[:200]!r} is not UTF-8") from error


def _send(state: hostprocess.StateDir, connection: socket.socket, line: str, body: bytes) -> tuple[int, BufferedReader]:
    """Send a request, and read its answer up to the body."""
    head = f"{line} HTTP/1.0\r\nHost: blockferry\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        connection.sendall(head.encode() + body)
        _await_answer(state, connection)
        answer = connection.makefile("rb")
        status = int(answer.readline().split()[1])
        while answer.readline().strip():
            pass
    except (OSError, IndexError, ValueError) as error:
        _cut_off(state, error)
    return status, answer


def _await_answer(state: hostprocess.StateDir, connection: socket.socket) -> None:
    """Wait for an answer's first byte: however long the work takes, as long as the host process answers others."""
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    while not poller.poll(hostprocess.LOOK_SECONDS * 1000):
        if not hostprocess.answers(state):
            raise TimeoutError("it does not answer any more: is it stopped, or does its host hang?")


def _lines(state: hostprocess.StateDir, connection: socket.socket, answer: BufferedReader) -> Iterator[bytes]:
    rest = b""
    try:
        # Of so much at once nothing stays in its buffer: what comes next is seen at the connection.
        while chunk := answer.read1(CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
            _await_answer(state, connection)
    except ConnectionError:
        return  # it was killed; a stream's end is its end
    except TimeoutError as error:
        _cut_off(state, error)


def _cut_off(state: hostprocess.StateDir, error: Exception) -> NoReturn:
    from blockferry.errors import HostProcessUnreachable

    reason = str(error) if isinstance(error, OSError) else "it went away before it answered"
    raise HostProcessUnreachable(state_dir=str(state), reason=reason) from error
