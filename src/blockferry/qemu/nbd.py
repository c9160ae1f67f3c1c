"""Asking an NBD server from here, before a guest is made to depend on it."""

from __future__ import annotations

import asyncio
import contextlib

from blockferry.plan.copy import nbd_options

CONNECT_SECONDS = 2.0


async def reachable(uri: str) -> str | None:
    """Why the server of an NBD URI does not accept a connection, in the system's words; None when it does.

    No more is asked: a server that serves one client at a time says nothing to a second one.
    """
    server = nbd_options(uri)["server"]
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            if server["type"] == "unix":
                _reader, writer = await asyncio.open_unix_connection(server["path"])
            else:
                _reader, writer = await asyncio.open_connection(server["host"], int(server["port"]))
    except TimeoutError:
        return f"no connection within {CONNECT_SECONDS:g} s"
    except OSError as error:
        return error.strerror or str(error)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return None
