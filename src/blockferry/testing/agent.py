"""A client of a guest's agent for tests, and a relay in between that makes chosen commands go wrong."""

import asyncio
import contextlib
import enum
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ANSWER_TIMEOUT_S = 30.0  # a guest under TCG on a busy machine
SYNC = b"\xff"


async def ask_agent(path: Path, *commands: str) -> list[Any]:
    """Connect to a guest agent's socket, which serves one client, and return what the commands return.

    Raises:
        TimeoutError: it did not answer.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            number = secrets.randbits(31)
            sync = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
            writer.write(SYNC + json.dumps(sync).encode() + b"\n")
            while True:
                await reader.readuntil(SYNC)
                if json.loads(await reader.readline()) == {"return": number}:
                    break
            answers = []
            for command in commands:
                writer.write(json.dumps({"execute": command}).encode() + b"\n")
                answers.append(json.loads(await reader.readline())["return"])
            return answers
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class AgentFault(enum.Enum):
    """What happens to a command on its way to the agent."""

    REFUSE = "not executed, answered with an error"
    SWALLOW = "not executed, never answered"
    CUT_BEFORE = "not executed, the connection ends"
    CUT_AFTER = "executed, the connection ends instead of the answer"


class AgentRelay:
    """Listens on `path` and forwards to a guest agent's socket; an async context manager.

    Args:
        upstream: the agent's socket.
        path: where it listens.

    Attributes:
        faults: what goes wrong with which command, as long as it is in here.
        seen: every command that came, in order.
    """

    def __init__(self, upstream: Path, path: Path) -> None:
        self.path = path
        self.faults: dict[str, AgentFault] = {}
        self.seen: list[str] = []
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            above, below = await asyncio.open_unix_connection(self._upstream)
        except OSError:  # QEMU is gone
            self._clients.discard(task)
            writer.close()
            return
        try:
            async for line in self._commands(reader):
                command = json.loads(line.lstrip(SYNC))["execute"]
                self.seen.append(command)
                fault = self.faults.get(command)
                if fault is AgentFault.CUT_BEFORE:
                    return
                if fault is AgentFault.SWALLOW:
                    continue
                if fault is AgentFault.REFUSE:
                    writer.write(b'{"error": {"class": "GenericError", "desc": "no luck today"}}\n')
                    continue
                below.write(line)
                answer = await above.readline()
                # The agent says first what it thinks of the byte that resets its parser.
                while command == "guest-sync-delimited" and SYNC not in answer:
                    answer = await above.readline()
                if fault is AgentFault.CUT_AFTER:
                    return
                writer.write(answer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the other side has gone, or the test is over
        finally:
            self._clients.discard(task)
            for each in (below, writer):
                each.close()

    async def _commands(self, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        while line := await reader.readline():
            yield line

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._clients):
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
