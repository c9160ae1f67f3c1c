"""One QMP connection to one QEMU: the only importer of qemu.qmp.

A reply that never came is `LostReply`: nobody knows whether the command was carried out. Only QEMU's own "no" is
`CommandRefused`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
)
from qemu.qmp import StateError as QmpStateError
from qemu.qmp.error import ProtocolError
from qemu.qmp.models import Greeting

from blockferry import errors
from blockferry.qemu.bounded import bounded
from blockferry.qemu.process import is_stopped
from blockferry.qemu.replies import NotUnderstood, check_message, check_reply, shorten
from blockferry.sockets import connect_unix

# Called before and after every command with ("before"|"after", command): for logs, and for tests that die there.
Witness = Callable[[str, str], None]


class CommandRefused(Exception):
    """QEMU said no, in its own words."""

    def __init__(self, command: str, words: str) -> None:
        super().__init__(f"{command}: {words}")
        self.command = command
        self.words = words


class LostReply(Exception):
    """The connection broke or the time was up (after `seconds`) before a reply came: whether it was carried out is unknown."""

    def __init__(self, command: str, reason: str, seconds: float | None = None) -> None:
        super().__init__(f"{command}: {reason}")
        self.command = command
        self.reason = reason
        self.seconds = seconds


# One line of QEMU's, as long chains on many disks make it; libvirt has the same bound.
LINE_BYTES_MAX = 10 << 20
# Events that nobody has looked at yet: far more than many jobs that all end at once say.
EVENTS_MAX = 10_000
# So many messages are read before others get their turn.
MESSAGES_AT_ONCE = 64
# QEMU reads no further once seven commands wait for it (monitor/qmp.c, QMP_REQ_QUEUE_LEN_MAX), and so would not see what is
# sent out of band to free it from the first of them.
COMMANDS_AT_ONCE = 5


def has_null(value: Any) -> bool:
    """Whether there is a null in a command's arguments: no other command is to be on its way with it.

    All nulls of a QEMU are one object (qobject/qnull.c), whose references are counted without a lock. Its monitor's thread reads a
    command (out-of-band ones could not overtake otherwise) while its main loop is done with another: the count gets wrong, and some
    time later QEMU aborts. Seen once in some ten thousand snapshots, on 7.2.22 (qobject_destroy, QTYPE_QNULL).
    """
    if isinstance(value, Mapping):
        return any(has_null(each) for each in value.values())
    return value is None or (isinstance(value, list | tuple) and any(has_null(each) for each in value))


class BadReply(LostReply):
    """What came is nothing that QEMU says: it was not carried out as far as anybody knows, and asking again is no use."""


class _Client(QMPClient):
    """qemu.qmp's, that believes nothing, and without its log of every message.

    It writes each message out as indented text, also when nobody logs: of a guest with 18 disks, half of all the time that
    was spent here, some of it while the guest stood still.
    """

    def __init__(self) -> None:
        super().__init__("blockferry", LINE_BYTES_MAX)
        self._messages = 0
        # Why nothing more is read from it.
        self.complaint: str | None = None

    async def _do_recv(self) -> Message:
        self._messages += 1
        if self._messages % MESSAGES_AT_ONCE == 0:
            await asyncio.sleep(0)
        try:
            return parse_message(await self._readline())
        except (ValueError, NotUnderstood) as error:  # ValueError: a line that is too long
            raise self.give_up(f"it said what can't be understood: {shorten(str(error))}") from error

    def give_up(self, complaint: str) -> ProtocolError:
        """The error that ends the connection."""
        self.complaint = complaint
        return ProtocolError(complaint)

    def cut(self) -> None:
        """Let go of what is still to be sent: who reads nothing any more would be waited for without end."""
        if self._writer is not None:
            self._writer.transport.abort()

    def _get_exec_id(self) -> str:
        # QEMU reads its monitor byte by byte, with a turn of its main loop for each: what is not said is not paid for.
        self._execute_id += 1
        return f"{self._execute_id:x}"

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


def parse_message(line: bytes) -> Message:
    """A message of QEMU's.

    Raises:
        NotUnderstood: it is none.
    """
    try:
        message = Message(line, eager=True)
    except (ValueError, RecursionError) as error:  # no UTF-8, nested too deeply, a number of 5000 digits
        raise NotUnderstood(str(error)) from error
    except ProtocolError as error:
        raise NotUnderstood(error.error_message) from error
    check_message(line, dict(message))
    return message


class _Listener(EventListener):
    """qemu.qmp's, with an end: who floods us is let go."""

    def __init__(self, client: _Client, names: Iterable[str]) -> None:
        super().__init__(tuple(names))
        self._client = client

    async def put(self, event: Message) -> None:
        """Take an event."""
        if self._queue.qsize() >= EVENTS_MAX:
            raise self._client.give_up(f"it said {EVENTS_MAX} events faster than they could be looked at")
        if self.accept(event):
            await self._queue.put(event)


def _nobody(_when: str, _command: str) -> None:
    pass


class Session:
    """A connection to one QEMU, from greeting to end.

    Args:
        client: connected.
        pid: QEMU's process, as the socket's peer.
        version: such as `7.2.22`.
        witness: told of every command.
    """

    # QEMU answers in milliseconds; `stop` waits for the host's fsync, which was seen to take 200 ms. A command that has
    # not been answered after this long is given up as unknown, and the connection with it.
    COMMAND_SECONDS = 30.0
    # For what is to be sent yet when the connection is closed.
    CLOSE_SECONDS = 1.0

    def __init__(self, client: _Client, pid: int | None, version: str, witness: Witness) -> None:
        self._client = client
        self._ending: asyncio.Task[str] | None = None
        self.pid = pid
        self.version = version
        self._witness = witness
        self._turns = asyncio.Semaphore(COMMANDS_AT_ONCE)
        self._alone = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def _turn(self, *, alone: bool) -> AsyncIterator[None]:
        """A place among the commands that are on their way; or all of them."""
        async with contextlib.AsyncExitStack() as stack:
            if alone:
                await stack.enter_async_context(self._alone)
            for _place in range(COMMANDS_AT_ONCE if alone else 1):
                await stack.enter_async_context(self._turns)
            yield

    @classmethod
    async def connect(cls, path: str, timeout: float, witness: Witness = _nobody) -> Session:
        """Connect and negotiate, out-of-band commands included.

        Args:
            path: the QMP socket; may be longer than a socket address.
            timeout: seconds for the greeting.
            witness: told of every command.

        Raises:
            QmpUnreachable: nobody listens, or what listens does not speak QMP.
            QmpBusy: it is accepted and not greeted: somebody else is being served.
        """
        client = _Client()
        client.logger.setLevel(logging.CRITICAL)  # what it would log is raised as well
        try:
            link = await bounded(timeout, connect_unix, Path(path))
        except TimeoutError as error:
            raise errors.QmpBusy(qmp=path, seconds=timeout) from error
        except OSError as error:
            raise errors.QmpUnreachable(qmp=path, reason=error.strerror or str(error)) from error
        pid = _peer(link)
        try:
            async with asyncio.timeout(timeout):
                await client.connect(link)
        except TimeoutError as error:
            link.close()
            raise _unanswered(path, timeout, pid, greeted=client.greeting is not None) from error
        except asyncio.CancelledError:
            link.close()
            raise
        except ConnectError as error:
            link.close()
            raise errors.QmpUnreachable(qmp=path, reason=f"{error}") from error
        return cls(client, pid, _version(client.greeting), witness)

    @property
    def alive(self) -> bool:
        """Whether the connection stands."""
        return self._client.runstate is Runstate.RUNNING

    async def close(self) -> None:
        """End the connection; the guest and its jobs go on."""
        await self._disconnected()

    async def ended(self) -> str:
        """Wait until the connection ends, and say why, in the system's words."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        return await self._disconnected()

    def _disconnected(self) -> asyncio.Future[str]:
        """The one disconnect, whoever asks for it and is cancelled meanwhile: the library's own can't be abandoned."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._disconnect())
        return asyncio.shield(self._ending)

    async def _disconnect(self) -> str:
        cut = asyncio.get_running_loop().call_later(self.CLOSE_SECONDS, self._client.cut)
        try:
            await self._client.disconnect()
        except asyncio.CancelledError:
            pass  # of the library's own reader or writer: nobody cancels this
        except (QMPError, OSError, EOFError) as error:
            return shorten(str(error)) or "QEMU closed the connection"
        finally:
            cut.cancel()
        return "the connection was closed"

    async def execute(self, command: str, *, seconds: float | None = None, **arguments: Any) -> Any:
        """Execute a command; in argument names `_` stands for `-`, but for the old commands with a `_` of their own.

        Args:
            command: a QMP command.
            seconds: the bound of the wait; COMMAND_SECONDS unless told.
            arguments: its arguments; None is sent as null.

        Raises:
            CommandRefused: QEMU's error.
            LostReply: no reply; the connection is given up, so that a late one can't be taken for another's.
        """
        bound = self.COMMAND_SECONDS if seconds is None else seconds
        # block_set_io_throttle has bps_rd, blockdev-mirror has on-source-error.
        sent = arguments if "_" in command else {name.replace("_", "-"): each for name, each in arguments.items()}
        self._witness("before", command)
        try:
            async with asyncio.timeout(bound), self._turn(alone=has_null(sent)):
                reply = await self._client.execute(command, sent or None)
        except ExecuteError as error:
            raise CommandRefused(command, str(error)) from error
        except TimeoutError as error:
            await self.close()
            raise LostReply(command, f"no answer within {bound:g} s", bound) from error
        except (ExecInterruptedError, QmpStateError, OSError, EOFError) as error:
            if self._client.complaint is not None:
                raise BadReply(command, self._client.complaint) from error
            raise LostReply(command, str(error) or "the connection broke") from error
        except ProtocolError as error:
            await self.close()
            raise BadReply(command, f"its reply can't be understood: {shorten(error.error_message)}") from error
        try:
            check_reply(command, reply)
        except NotUnderstood as error:
            await self.close()
            raise BadReply(command, f"its reply can't be understood: {error}") from error
        self._witness("after", command)
        return reply

    async def execute_each(self, command: str, arguments: Iterable[Mapping[str, Any]]) -> None:
        """Execute a command several times, without waiting for one to be answered before the next is sent.

        Args:
            command: see `execute`.
            arguments: those of each time.

        Raises:
            CommandRefused, LostReply: one failed, the first one in their order; all have been answered or given up by then.
        """
        asked = (self.execute(command, **each) for each in arguments)
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer

    async def execute_oob(self, command: str, seconds: float, **arguments: Any) -> None:
        """Execute a command that overtakes all others, and waits for nothing in QEMU.

        Raises:
            CommandRefused: QEMU's error.
            LostReply, TimeoutError: no reply.
        """
        self._witness("before", command)
        try:
            async with asyncio.timeout(seconds):
                await self._client.execute(command, arguments, oob=True)
        except ExecuteError as error:
            raise CommandRefused(command, str(error)) from error
        except (ExecInterruptedError, QmpStateError, OSError, EOFError) as error:
            raise LostReply(command, str(error) or "the connection broke") from error
        self._witness("after", command)

    @contextlib.contextmanager
    def _listening(self, names: Iterable[str]) -> Iterator[EventListener]:
        listener = _Listener(self._client, names)
        self._client.register_listener(listener)
        try:
            yield listener
        finally:
            self._client.remove_listener(listener)

    async def events(self, names: Iterable[str]) -> AsyncIterator[dict[str, Any]]:
        """Events as they come, until the connection ends; the subscription is open from the first wait."""
        listener = _Listener(self._client, names)
        self._client.register_listener(listener)
        gone = asyncio.ensure_future(self.ended())
        event = asyncio.ensure_future(listener.get())
        try:
            while True:
                await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    return
                yield dict(event.result())
                event = asyncio.ensure_future(listener.get())
        finally:
            gone.cancel()
            event.cancel()
            self._client.remove_listener(listener)

    @contextlib.contextmanager
    def stopwatch(self, held: Collection[str] = ()) -> Iterator[Callable[[], float | None]]:
        """Measure how long the guest stands still: gives a function that says it, in milliseconds, by QEMU's clock.

        It says None when the guest was not stopped and let run in the block.

        Args:
            held: jobs that hold the guest's requests instead, each from when it waits to be finalized until it is concluded: what
                is said is how long the first and the last of them do.
        """
        with self._listening(("JOB_STATUS_CHANGE",) if held else ("STOP", "RESUME")) as listener:

            def milliseconds() -> float | None:
                begun: list[float] = []
                ended: list[float] = []
                for event in listener.clear():
                    stamp: Any = event["timestamp"]
                    data: Any = event.get("data", {})
                    at = stamp["seconds"] * 1000 + stamp["microseconds"] / 1000
                    if held and data.get("id") not in held:
                        continue
                    match data.get("status") if held else event["event"]:
                        case "waiting" | "STOP":
                            begun.append(at)
                        case "concluded" | "RESUME":
                            ended.append(at)
                return max(ended) - min(begun) if begun and ended else None

            yield milliseconds

    async def wait_until(
        self, met: Callable[[], Awaitable[bool]], names: Iterable[str], *, what: str, seconds: float
    ) -> None:
        """Look, then look again at every event of these names, until `met` says so.

        Args:
            met: looks at QEMU and says whether it is so.
            names: events after which it may be.
            what: for the error's text.
            seconds: the bound of the wait.

        Raises:
            LostReply: not within the bound, or the connection broke.
        """
        with self._listening(names) as listener:
            deadline = asyncio.get_running_loop().time() + seconds
            while not await met():
                left = deadline - asyncio.get_running_loop().time()
                gone = asyncio.ensure_future(self.ended())
                event = asyncio.ensure_future(listener.get())
                try:
                    await asyncio.wait({event, gone}, timeout=max(left, 0.0), return_when=asyncio.FIRST_COMPLETED)
                    if not event.done():
                        reason = gone.result() if gone.done() else f"not within {seconds:g} s"
                        raise LostReply(what, reason)
                finally:
                    gone.cancel()
                    event.cancel()


def _unanswered(path: str, seconds: float, pid: int | None, *, greeted: bool) -> errors.BlockferryError:
    """What a QEMU that accepts and does not go on is to be called."""
    if pid is not None and is_stopped(pid):
        reason = f"its process {pid} is stopped, and its guest with it; `kill -CONT {pid}` lets both go on"
    elif greeted:
        reason = (
            f"it greets, and does not answer within {seconds:g} s: it waits for something itself, a disk most often"
        )
    else:
        return errors.QmpBusy(qmp=path, seconds=seconds)
    return errors.QmpUnreachable(qmp=path, reason=reason)


def _version(greeting: Greeting | None) -> str:
    """QEMU's version, such as `7.2.22`; with question marks in the place of what it does not say."""
    said: Any = greeting.QMP.version.get("qemu") if greeting is not None else None
    parts = [said.get(part) if isinstance(said, dict) else None for part in ("major", "minor", "micro")]
    return ".".join(str(part) if isinstance(part, int) and 0 <= part < 10_000 else "?" for part in parts)


def _peer(link: socket.socket) -> int | None:
    """The process that listens (SO_PEERCRED: who called listen), or None when another namespace hides it."""
    size = struct.calcsize("3i")
    pid: int = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0]
    return pid or None
