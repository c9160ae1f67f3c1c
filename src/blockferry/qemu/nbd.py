"""Asking an NBD server from here, before a guest is made to depend on it.

QEMU's main loop, and the guest with it, waits for a server that it is told to open: one that says nothing hangs both.
Source of the protocol: NetworkBlockDevice/nbd, doc/proto.md, "Option haggling". Data is never asked for: a server that
ends with its first client (qemu-nbd without --persistent) does not count one that only asks. Of a server that takes
several clients (`multi-conn`) a flush is asked for: it says whether the server works. Where a server takes several clients (its `multi-conn` flag), a flush of one is a probe for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator

from blockferry.model.files import ExportFact
from blockferry.plan.copy import nbd_options

CONNECT_SECONDS = 2.0
# A server that writes all that was written to it to a slow disk takes its time; one that hangs takes for ever.
FLUSH_SECONDS = 10.0
_GREETING, _NEW_STYLE, _REPLY = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
_FIXED_NEW_STYLE = 1
_ABORT, _INFO = 2, 6  # options
_ACK, _INFO_REPLY, _ERROR = 1, 3, 1 << 31  # kinds of replies
_UNSUPPORTED, _TLS_REQUIRED, _UNKNOWN = _ERROR + 1, _ERROR + 5, _ERROR + 6
_EXPORT = 0  # kind of information: size and flags
_READ_ONLY, _SEND_FLUSH, _MULTI_CONN = 2, 4, 256  # transmission flags
_GO = 7
_REQUEST, _ANSWER = 0x25609513, 0x67446698
_DISCONNECT, _FLUSH = 2, 3  # commands
_REPLY_BYTES_MAX = 64 * 1024


async def reachable(uri: str) -> str | None:
    """Why the server of an NBD URI does not accept a connection, in the system's words; None when it does.

    No more is asked: a server that serves one client at a time says nothing to a second one.
    """
    try:
        async with asyncio.timeout(CONNECT_SECONDS), _connected(uri):
            return None
    except TimeoutError:
        return f"no connection within {CONNECT_SECONDS:g} s"
    except OSError as error:
        return _words(error)


async def inspect(uri: str) -> ExportFact:
    """What an NBD server says of an export that a copy is to go to; what is wrong with it is in `problem`."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS), _connected(uri) as (reader, writer):
            return await _ask(uri, reader, writer)
    except TimeoutError:
        problem = f"its server gave no answer within {CONNECT_SECONDS:g} s: it hangs, or serves another client"
    except asyncio.IncompleteReadError:
        problem = "its server closed the connection: it is no NBD server, or serves another client"
    except OSError as error:
        problem = f"its server can't be reached: {_words(error)}"
    return ExportFact(uri=uri, problem=problem)


async def flushes(uri: str, seconds: float | None = None) -> str | None:
    """Why the server of an NBD URI does not flush the export for us; None when it does.

    For servers that take several clients, and serve QEMU meanwhile.

    Args:
        uri: the export's.
        seconds: the bound of the wait; FLUSH_SECONDS unless told.
    """
    seconds = FLUSH_SECONDS if seconds is None else seconds
    try:
        async with asyncio.timeout(seconds), _connected(uri) as (reader, writer):
            fact = await _ask(uri, reader, writer, _GO)
            if fact.problem is None and fact.flushes:
                writer.write(struct.pack(">IHHQQI", _REQUEST, 0, _FLUSH, 1, 0, 0))
                _magic, error, _cookie = struct.unpack(">IIQ", await reader.readexactly(16))
                if error:
                    return f"it can't flush: {os.strerror(error)}"
            if fact.problem is None:
                writer.write(struct.pack(">IHHQQI", _REQUEST, 0, _DISCONNECT, 2, 0, 0))
            return fact.problem
    except TimeoutError:
        return f"it accepts, and answers nothing within {seconds:g} s"
    except asyncio.IncompleteReadError:
        return "it closed the connection"
    except OSError as error:
        return _words(error)


@contextlib.asynccontextmanager
async def _connected(uri: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    server = nbd_options(uri)["server"]
    if server["type"] == "unix":
        reader, writer = await asyncio.open_unix_connection(server["path"])
    else:
        reader, writer = await asyncio.open_connection(server["host"], int(server["port"]))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _ask(uri: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, option: int = _INFO) -> ExportFact:
    """What it says of the export; with the option `go` it is open afterwards, unless there is a problem."""
    if await reader.readexactly(len(_GREETING)) != _GREETING:
        return ExportFact(uri=uri, problem="its server does not speak NBD")
    if await reader.readexactly(len(_NEW_STYLE)) != _NEW_STYLE:
        return ExportFact(uri=uri)  # an old server: QEMU sees for itself
    await reader.readexactly(2)
    name = str(nbd_options(uri)["export"])
    wanted = struct.pack(">I", len(name.encode())) + name.encode() + struct.pack(">H", 0)
    writer.write(struct.pack(">I", _FIXED_NEW_STYLE))
    writer.write(_NEW_STYLE + struct.pack(">II", option, len(wanted)) + wanted)
    fact = ExportFact(uri=uri)
    while True:
        magic, _option, kind, length = struct.unpack(">QIII", await reader.readexactly(20))
        if magic != _REPLY or length > _REPLY_BYTES_MAX:
            return ExportFact(uri=uri, problem="its server does not speak NBD")
        data = await reader.readexactly(length)
        if kind == _INFO_REPLY and length >= 12 and struct.unpack_from(">H", data)[0] == _EXPORT:
            _kind, size, flags = struct.unpack_from(">HQH", data)
            fact = ExportFact(
                uri=uri,
                size=size,
                problem="it is exported read-only" if flags & _READ_ONLY else None,
                multi_conn=bool(flags & _MULTI_CONN),
                flushes=bool(flags & _SEND_FLUSH),
            )
        elif kind & _ERROR and kind != _UNSUPPORTED:
            fact = ExportFact(uri=uri, problem=_refusal(kind, name, data.decode(errors="replace")))
        if kind != _INFO_REPLY:
            if option != _GO or kind != _ACK:
                writer.write(_NEW_STYLE + struct.pack(">II", _ABORT, 0))
            return fact


def _words(error: OSError) -> str:
    """The system's; asyncio puts its own in the place of connect's."""
    return os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror or str(error)


def _refusal(kind: int, name: str, words: str) -> str:
    if kind == _UNKNOWN:
        return f"its server has no export {name!r}"
    if kind == _TLS_REQUIRED:
        return "its server wants TLS, which is not carried out"
    return f"its server refuses: {words or hex(kind)}"
