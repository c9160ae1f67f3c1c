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
from collections.abc import AsyncIterator

from blockferry.model.files import ExportFact
from blockferry.plan.copy import nbd_options
from blockferry.qemu import nbdwire as wire

CONNECT_SECONDS = 2.0
# A server that writes all that was written to it to a slow disk takes its time; one that hangs takes for ever.
FLUSH_SECONDS = 10.0


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
            fact = await _ask(uri, reader, writer, wire.GO)
            if fact.problem is None and fact.flushes:
                writer.write(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.FLUSH, 1, 0, 0))
                _magic, error, _cookie = wire.ANSWER.unpack(await reader.readexactly(wire.ANSWER.size))
                if error:
                    return f"it can't flush: {os.strerror(error)}"
            if fact.problem is None:
                writer.write(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.DISCONNECT, 2, 0, 0))
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


async def _ask(
    uri: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, option: int = wire.INFO
) -> ExportFact:
    """What it says of the export; with the option `go` it is open afterwards, unless there is a problem."""
    if await reader.readexactly(len(wire.GREETING)) != wire.GREETING:
        return ExportFact(uri=uri, problem="its server does not speak NBD")
    if await reader.readexactly(len(wire.NEW_STYLE)) != wire.NEW_STYLE:
        return ExportFact(uri=uri)  # an old server: QEMU sees for itself
    await reader.readexactly(2)
    name = str(nbd_options(uri)["export"])
    writer.write(wire.FIXED_NEW_STYLE)
    writer.write(wire.option(option, wire.export_wanted(name)))
    fact = ExportFact(uri=uri)
    while True:
        magic, _option, kind, length = wire.OPTION_REPLY.unpack(await reader.readexactly(wire.OPTION_REPLY.size))
        if magic != wire.OPTION_REPLY_MAGIC or length > wire.REPLY_BYTES_MAX:
            return ExportFact(uri=uri, problem="its server does not speak NBD")
        data = await reader.readexactly(length)
        export = wire.export_info(kind, data)
        if export is not None:
            size, flags = export
            fact = ExportFact(
                uri=uri,
                size=size,
                problem="it is exported read-only" if flags & wire.READ_ONLY else None,
                multi_conn=bool(flags & wire.MULTI_CONN),
                flushes=bool(flags & wire.SEND_FLUSH),
            )
        elif kind & wire.ERROR and kind != wire.UNSUPPORTED:
            fact = ExportFact(uri=uri, problem=f"its server {wire.refusal(kind, name, data)}")
        if kind != wire.INFO_REPLY:
            if option != wire.GO or kind != wire.ACK:
                writer.write(wire.option(wire.ABORT))
            return fact


def _words(error: OSError) -> str:
    """The system's; asyncio puts its own in the place of connect's."""
    return os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror or str(error)
