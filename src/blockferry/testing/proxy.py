"""A proxy on the QMP socket of a real QEMU that makes chosen commands go wrong.

It forwards every message between one client and QEMU, as QEMU itself serves one client a socket, and applies
rules to commands by name, arguments and number. In-band commands keep their order, also behind a held one;
out-of-band commands overtake. A client that disconnects may connect again: each gets a fresh connection to
QEMU. Rules, their counts and the log span connections.
"""

import asyncio
import codecs
import contextlib
import enum
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from blockferry.testing.process import socket_path

LINE_MAX_BYTES = 64 * 1024 * 1024  # query-qmp-schema is 0.3 MB; a graph of thousands of nodes stays far below
CHUNK_BYTES = 65536  # a socket buffer's worth; commands are a few hundred bytes
# Of asyncio's loop, from a connection in the backlog to its streams (asyncio/selector_events.py, _accept_connection).
ACCEPT_TURNS = 5

_DECODER = json.JSONDecoder()

Arguments = dict[str, Any]
Predicate = Callable[[Arguments], bool]


class FaultKind(enum.Enum):
    """What happens to a command."""

    ERROR = "not executed, answered with an error"
    ERROR_AFTER = "executed, its answer replaced by an error: the answer lies"
    DROP_REPLY = "executed, never answered"
    LATE = "executed, answered late, and so is what comes behind it"
    CUT_BEFORE = "not executed, the connection ends"
    CUT_AFTER = "executed, the connection ends instead of the answer"
    HIDE = "unknown to this QEMU: not in query-commands and query-qmp-schema, answered CommandNotFound"


@dataclass(frozen=True, eq=False)
class Fault:
    """A rule: what goes wrong with which command.

    Args:
        command: its name.
        kind: what happens.
        nth: which of the matching commands, from 1, counted from when the rule was added; None: each of them.
            HIDE always means each.
        error_desc: the description in the error that is answered.
        when: a condition on the command's arguments; commands that do not meet it are not counted.
        seconds: how late an answer is.
    """

    command: str
    kind: FaultKind
    nth: int | None = 1
    error_desc: str = "injected"
    when: Predicate | None = None
    seconds: float = 1.0


class Gate:
    """Holds one command (or its answer) until it is released; made by `pause_before` and `pause_after`."""

    def __init__(self) -> None:
        self._reached = asyncio.Event()
        self._released = asyncio.Event()

    async def reached(self) -> None:
        """Wait until the command (or its answer) stands at the gate."""
        await self._reached.wait()

    def release(self) -> None:
        """Let it pass; a client that disconnected meanwhile has lost it."""
        self._released.set()

    async def _pass(self) -> None:
        self._reached.set()
        await self._released.wait()


@dataclass(eq=False)
class _Rule:
    command: str
    nth: int | None
    when: Predicate | None
    action: Fault | Gate
    gate_after: bool = False
    seen: int = 0

    def matches(self, command: str, arguments: Arguments) -> bool:
        if command != self.command or (self.when is not None and not self.when(arguments)):
            return False
        self.seen += 1
        return self.nth is None or self.seen == self.nth


@dataclass(eq=False)
class _Verdict:
    """What the rules say about one command."""

    fault: Fault | None = None
    before: Gate | None = None
    after: Gate | None = None
    rewrite: Callable[[Arguments], None] | None = None

    @property
    def wants_reply(self) -> bool:
        return self.fault is not None or self.after is not None or self.rewrite is not None


class _CutError(Exception):
    """The connection ends here, by a fault or because a peer is gone."""


class QmpFaultProxy:
    """Listens on `path` and forwards to QEMU's socket `upstream`, with faults; an async context manager.

    Args:
        upstream: a QMP socket of a running QEMU.
        path: the socket to listen on; a stale one is replaced.
        on_command: called with each command's name and arguments before it is forwarded or faulted; must not raise.
    """

    def __init__(
        self, upstream: Path, path: Path, *, on_command: Callable[[str, Arguments], None] | None = None
    ) -> None:
        self.path = socket_path(path)
        self.log: list[tuple[str, Arguments]] = []
        self.fired: list[Fault] = []
        self.on_command = on_command
        self._upstream = upstream
        self._rules: list[_Rule] = []
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    def inject(self, fault: Fault) -> None:
        """Add a rule; of several that match a command the one that was added first fires."""
        nth = None if fault.kind is FaultKind.HIDE else fault.nth
        self._rules.append(_Rule(fault.command, nth, fault.when, fault))

    def pause_before(self, command: str, nth: int = 1, when: Predicate | None = None) -> Gate:
        """Return a gate that holds the n-th such command before QEMU sees it (and before a fault hits it)."""
        gate = Gate()
        self._rules.append(_Rule(command, nth, when, gate))
        return gate

    def pause_after(self, command: str, nth: int = 1, when: Predicate | None = None) -> Gate:
        """Return a gate that holds QEMU's answer to the n-th such command, and everything behind it."""
        gate = Gate()
        self._rules.append(_Rule(command, nth, when, gate, gate_after=True))
        return gate

    def clear(self) -> None:
        """Remove all rules and release all gates."""
        for rule in self._rules:
            if isinstance(rule.action, Gate):
                rule.action.release()
        self._rules.clear()

    def commands(self) -> list[str]:
        """Return the names of the commands seen so far, in order."""
        return [name for name, _arguments in self.log]

    async def cut(self) -> None:
        """End the connections of the present client, and of those that wait, now."""
        clients = [*self._clients]
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the socket cannot be bound.
        """
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, self.path, limit=LINE_MAX_BYTES)

    async def stop(self) -> None:
        """Stop listening and end every connection."""
        if self._server is not None:
            # Nobody comes any more; who is being accepted is first, as asyncio leaves him open if it is closed meanwhile.
            self.path.unlink(missing_ok=True)
            for _turn in range(ACCEPT_TURNS):
                await asyncio.sleep(0)
            self._server.close()
            await self.cut()
            await self._server.wait_closed()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(_Peer(reader, writer)))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)
        # One that is cancelled before its first step closes nothing.
        task.add_done_callback(lambda _task: writer.close())

    async def _serve(self, client: "_Peer") -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(client.close)
            await stack.enter_async_context(self._turn)  # QEMU serves one client a socket; others wait
            try:
                reader, writer = await asyncio.open_unix_connection(self._upstream, limit=LINE_MAX_BYTES)
            except OSError:  # QEMU is gone: the client sees the end of the connection, as it would without us
                return
            qemu = _Peer(reader, writer)
            stack.push_async_callback(qemu.close)
            await _Session(self, client, qemu).run()

    def _judge(self, command: str, arguments: Arguments) -> _Verdict:
        """Log a command, count it in every rule and say what happens to it."""
        self.log.append((command, arguments))
        if self.on_command is not None:
            self.on_command(command, arguments)
        verdict = _Verdict()
        for rule in [rule for rule in self._rules if rule.matches(command, arguments)]:
            if isinstance(rule.action, Fault):
                verdict.fault = verdict.fault or rule.action
            elif rule.gate_after:
                verdict.after = rule.action
            else:
                verdict.before = rule.action
        if command in {"query-commands", "query-qmp-schema"}:
            verdict.rewrite = self._hide
        if verdict.fault is not None:
            self.fired.append(verdict.fault)
        return verdict

    def _hide(self, reply: Arguments) -> None:
        faults = [rule.action for rule in self._rules if isinstance(rule.action, Fault)]
        hidden = {fault.command for fault in faults if fault.kind is FaultKind.HIDE}
        # In the schema other things than commands may have such a name; in query-commands there are no others.
        reply["return"] = [
            entry
            for entry in reply["return"]
            if entry["name"] not in hidden or entry.get("meta-type", "command") != "command"
        ]


class _Peer:
    """One end of a session: QEMU, which sends lines, or a client, which sends JSON with or without line ends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._text = ""
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    async def receive_object(self) -> Arguments:
        """Return the next JSON object, wherever it ends: qemu.qmp sends no line ends, QEMU wants none."""
        while True:
            with contextlib.suppress(json.JSONDecodeError):
                message, end = _DECODER.raw_decode(self._text)
                self._text = self._text[end:].lstrip()
                assert isinstance(message, dict), "a QMP command is an object"
                return message
            try:
                chunk = await self._reader.read(CHUNK_BYTES)
            except ConnectionError as error:
                raise _CutError from error
            if not chunk:
                raise _CutError
            self._text = (self._text + self._utf8.decode(chunk)).lstrip()

    async def receive_line(self) -> bytes:
        """Return the next line, with its end."""
        try:
            line = await self._reader.readline()
        except ConnectionError as error:
            raise _CutError from error
        if not line.endswith(b"\n"):
            raise _CutError
        return line

    async def send(self, line: bytes) -> None:
        try:
            self._writer.write(line)
            await self._writer.drain()
        except ConnectionError as error:
            raise _CutError from error

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


@dataclass(eq=False)
class _Session:
    """One client and its connection to QEMU, until either ends or a fault cuts both."""

    proxy: QmpFaultProxy
    client: _Peer
    qemu: _Peer
    in_band: asyncio.Queue[Arguments] = field(default_factory=asyncio.Queue)
    in_flight: dict[str, _Verdict] = field(default_factory=dict)  # by id; only those whose reply is touched

    async def run(self) -> None:
        """Forward until the end; commands still held then are lost."""
        pumps: list[Coroutine[Any, Any, None]] = [self._read_commands(), self._forward_in_band(), self._read_replies()]
        tasks = [asyncio.create_task(pump) for pump in pumps]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, _CutError | asyncio.CancelledError):
                raise result

    async def _read_commands(self) -> None:
        """Take the client's commands; also while one is held, to see the client go."""
        while True:
            message = await self.client.receive_object()
            if "exec-oob" in message:
                await self._command(message)
            else:
                self.in_band.put_nowait(message)

    async def _forward_in_band(self) -> None:
        while True:
            await self._command(await self.in_band.get())

    async def _command(self, message: Arguments) -> None:
        name = message.get("execute") or message["exec-oob"]
        verdict = self.proxy._judge(name, message.get("arguments", {}))  # noqa: SLF001  # one class in two halves
        if verdict.before is not None:
            await verdict.before._pass()  # noqa: SLF001  # the gate's other side
        match verdict.fault:
            case Fault(kind=FaultKind.ERROR, error_desc=text):
                await self.client.send(_error("GenericError", text, message))
                return
            case Fault(kind=FaultKind.HIDE):
                await self.client.send(_error("CommandNotFound", f"The command {name} has not been found", message))
                return
            case Fault(kind=FaultKind.CUT_BEFORE):
                raise _CutError
        if verdict.wants_reply:
            self.in_flight[_key(message)] = verdict
        await self.qemu.send(_encode(message))

    async def _read_replies(self) -> None:
        while True:
            line = await self.qemu.receive_line()
            message = json.loads(line)
            if self.in_flight and ("return" in message or "error" in message):
                verdict = self.in_flight.pop(_key(message), None)
                if verdict is not None:
                    await self._reply(line, message, verdict)
                    continue
            await self.client.send(line)

    async def _reply(self, line: bytes, message: Arguments, verdict: _Verdict) -> None:
        if verdict.after is not None:
            await verdict.after._pass()  # noqa: SLF001  # the gate's other side
        match verdict.fault:
            case Fault(kind=FaultKind.DROP_REPLY):
                return
            case Fault(kind=FaultKind.CUT_AFTER):
                raise _CutError
            case Fault(kind=FaultKind.LATE, seconds=seconds):
                await asyncio.sleep(seconds)
            case Fault(kind=FaultKind.ERROR_AFTER, error_desc=text):
                line = _error("GenericError", text, message)
            case _ if verdict.rewrite is not None and "return" in message:
                verdict.rewrite(message)
                line = _encode(message)
        await self.client.send(line)


def _key(message: Arguments) -> str:
    """Identify a command and its answer; those without an id are answered in order, one at a time."""
    return json.dumps(message.get("id"))


def _error(kind: str, text: str, answered: Arguments) -> bytes:
    error: Arguments = {"error": {"class": kind, "desc": text}}
    if "id" in answered:
        error["id"] = answered["id"]
    return _encode(error)


def _encode(message: Arguments) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\r\n"
