"""Destinations of copies are written out while they are filled. Why, and what it brings: docs/adr/0018-write-out.md."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

from blockferry.plan.destinations import is_uri
from blockferry.qemu.flusher import pause_after
from blockferry.qemu.nbd import flushes
from blockferry.qemu.paths import in_memory
from blockferry.qemu.writeout import WriteOut

# What is full by then is not worth a process.
WORTH_SECONDS = 0.01
# What a server has got since the last time takes as long as its disk takes for it. Whether it hangs is not asked here.
FLUSH_SECONDS = 600.0


class Filling:
    """Has the files of one domain written out that are being filled, and exports of servers that take several clients.

    Args:
        files: says which, by their paths and URIs, now.
        spawn: goes on with work for as long as the domain is kept.
    """

    def __init__(self, files: Callable[[], frozenset[str]], spawn: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        self._files = files
        self._spawn = spawn
        self._seen: frozenset[str] = frozenset()
        self._changed = asyncio.Event()

    def look(self) -> None:
        """See which there are; to be called when a job may have begun, caught up or ended."""
        self._changed.set()
        new = self._files() - self._seen
        if new:
            self._seen |= new
            self._spawn(self._keep(new))

    async def _keep(self, files: frozenset[str]) -> None:
        """See to these until none lacks anything."""
        write_out = WriteOut()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WORTH_SECONDS):
                    await self._until_full(files)
            if files & self._files():
                exports = frozenset(file for file in files if is_uri(file))
                paths = files - exports
                await write_out.begin(paths - await in_memory(paths))
                flushing = [asyncio.ensure_future(self._flush(uri)) for uri in exports]
                try:
                    await self._until_full(files)
                finally:
                    for each in flushing:
                        each.cancel()
        finally:
            self._seen -= files
            await write_out.close()

    async def _flush(self, uri: str) -> None:
        """Have a server flush an export again and again, as long as it does so: whoever needs it flushed sees to that."""
        began = time.monotonic()
        while uri in self._files():
            if await flushes(uri, FLUSH_SECONDS) is not None:
                return
            await asyncio.sleep(pause_after(time.monotonic() - began))

    async def _until_full(self, files: frozenset[str]) -> None:
        while files & self._files():
            self._changed.clear()
            await self._changed.wait()
