"""Destinations of copies are written out while they are filled. Why, and what it brings: docs/adr/0018-write-out.md."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from blockferry.qemu.paths import in_memory
from blockferry.qemu.writeout import WriteOut

# What is full by then is not worth a process.
WORTH_SECONDS = 0.03


class Filling:
    """Has the files of one domain written out that are being filled.

    Args:
        files: says which, by their paths, now.
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
                await write_out.begin(files - await in_memory(files))
                await self._until_full(files)
        finally:
            self._seen -= files
            await write_out.close()

    async def _until_full(self, files: frozenset[str]) -> None:
        while files & self._files():
            self._changed.clear()
            await self._changed.wait()
