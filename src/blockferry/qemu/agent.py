"""A guest's agent (qemu-ga) on its socket: the only module that talks to one.

What comes back is a guest's word: every wait and every line is bounded, and nothing of it is believed to be what it should.
A connection a question: the socket serves one client, and others want it too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from blockferry.qemu.session import LostReply, Witness
from blockferry.sockets import connect_unix

# An agent that is there answers within milliseconds; under TCG on a busy host it took 0.2 s.
ANSWER_SECONDS = 5.0
# The guest writes all that is dirty before it says that it is frozen.
FREEZE_SECONDS = 30.0
THAW_SECONDS = 30.0
# Its answers are some hundred bytes; before the first there may be what it said to a client that did not wait for it.
LINE_BYTES = 64 << 10
STALE_LINES = 1000
WORDS = 200
# In a stream of UTF-8 this byte can only mean: forget what came before (docs/interop/qemu-ga.rst).
FLUSH = b"\xff"


class AgentSilent(Exception):
    """Nobody answers there, or nothing that can be understood: nothing was done."""


class AgentRefused(Exception):
    """The agent said no, in its own words."""


class Agent:
    """A guest's agent.

    Args:
        path: its socket.
        witness: told of every command.
    """

    def __init__(self, path: Path, witness: Witness) -> None:
        self._path = path
        self._witness = witness

    async def is_frozen(self) -> bool:
        """Whether it holds the guest's file systems frozen.

        Raises:
            AgentSilent, AgentRefused, LostReply: it can't be told.
        """
        async with self._talk() as talk:
            return await talk.is_frozen()

    async def freeze(self) -> int:
        """Freeze the guest's file systems, none of which may be frozen; how many they are.

        Raises:
            AgentSilent, AgentRefused: it was not done.
            LostReply: nobody knows whether it was done, or will be.
        """
        async with self._talk() as talk:
            if await talk.is_frozen():
                raise AgentRefused("somebody else has frozen the guest's file systems already")
            words = "it found no file system that can be frozen"
            try:
                frozen = await talk.number("guest-fsfreeze-freeze", FREEZE_SECONDS)
                if frozen > 0:
                    return frozen
            except AgentRefused as refusal:
                words = str(refusal)
            # Those that it had frozen before the one that failed.
            try:
                await talk.thaw()
            except (AgentSilent, AgentRefused) as failure:
                raise LostReply("guest-fsfreeze-freeze", f"{words}; {failure}") from failure
            raise AgentRefused(words)

    async def thaw(self) -> bool:
        """Thaw the guest's file systems if they are frozen; whether they were until now.

        Raises:
            AgentSilent, AgentRefused: it was not done.
            LostReply: nobody knows whether it was done.
        """
        async with self._talk() as talk:
            return await talk.thaw()

    @contextlib.asynccontextmanager
    async def _talk(self) -> AsyncIterator[_Talk]:
        try:
            link = connect_unix(self._path, timeout=0)
            reader, writer = await asyncio.open_unix_connection(sock=link, limit=LINE_BYTES)
        except BlockingIOError as error:
            raise AgentSilent(f"{self._path} accepts no connection") from error
        except OSError as error:
            raise AgentSilent(f"{self._path}: {_words(error)}") from error
        try:
            talk = _Talk(reader, writer, self._witness)
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await talk.begin()
            except TimeoutError as error:
                raise AgentSilent(f"nobody answers on {self._path} within {ANSWER_SECONDS:g} s") from error
            except (OSError, EOFError, ValueError) as error:
                raise AgentSilent(f"{self._path}: {_words(error)}") from error
            yield talk
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class _Talk:
    """One connection, to its end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, witness: Witness) -> None:
        self._reader = reader
        self._writer = writer
        self._witness = witness

    async def begin(self) -> None:
        """Get past what was left by others; ValueError when it never ends."""
        number = secrets.randbits(31)
        await self._send("guest-sync-delimited", FLUSH, arguments={"id": number})
        for _line in range(STALE_LINES):
            if _parsed((await self._line()).rpartition(FLUSH)[2]) == {"return": number}:
                return
        raise ValueError("what answers is no guest agent")

    async def is_frozen(self) -> bool:
        status = await self._ask("guest-fsfreeze-status", ANSWER_SECONDS)
        if status not in ("frozen", "thawed"):
            raise AgentRefused("its answer to guest-fsfreeze-status is none")
        return bool(status == "frozen")

    async def number(self, command: str, seconds: float) -> int:
        """Execute a command that answers with how many file systems it was about."""
        answer = await self._ask(command, seconds)
        if not isinstance(answer, int):
            raise LostReply(command, "its answer is no number")
        return answer

    async def thaw(self) -> bool:
        if not await self.is_frozen():
            return False
        try:
            return await self.number("guest-fsfreeze-thaw", THAW_SECONDS) > 0
        except AgentRefused:
            # A Windows guest freezes for ten seconds at most, and says so when it is thawed.
            if await self.is_frozen():
                raise
            return False

    async def _ask(self, command: str, seconds: float) -> Any:
        self._witness("before", command)
        try:
            async with asyncio.timeout(seconds):
                await self._send(command)
                answer = _parsed(await self._line())
        except TimeoutError as error:
            raise LostReply(command, f"no answer within {seconds:g} s") from error
        except (OSError, EOFError, ValueError) as error:
            raise LostReply(command, _words(error)) from error
        self._witness("after", command)
        if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
            raise AgentRefused(_printable(str(answer["error"].get("desc", "it says no, and not why"))))
        if not isinstance(answer, dict) or "return" not in answer:
            raise LostReply(command, "its answer can't be understood")
        return answer["return"]

    async def _send(self, command: str, before: bytes = b"", **more: Any) -> None:
        self._writer.write(before + json.dumps({"execute": command, **more}).encode() + b"\n")
        await self._writer.drain()

    async def _line(self) -> bytes:
        """The next line; ValueError when it is too long."""
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the connection was closed")
        return line


def _parsed(line: bytes) -> Any:
    """The JSON value of a line; None for what is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _printable(words: str) -> str:
    """A guest's words, fit for a terminal."""
    return "".join(each if each.isprintable() else "?" for each in words[:WORDS])
