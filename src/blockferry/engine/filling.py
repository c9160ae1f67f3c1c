"""Destinations of copies are written out while they are filled. Why, and what it brings: docs/adr/0018-write-out.md."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from blockferry.qemu.writeout import WriteOut

# What is full by then is not worth a process; and so often it is looked whether one is needed still.
LOOK_SECONDS = 0.1


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

    def look(self) -> None:
        """Begin with files that have come; to be called when a job may have begun."""
        new = self._files() - self._seen
        if new:
            self._seen |= new
            self._spawn(self._keep(new))

    async def _keep(self, files: frozenset[str]) -> None:
        """See to these until they are full."""
        write_out = WriteOut(tuple(sorted(files)))
        begun = False
        try:
            await asyncio.sleep(LOOK_SECONDS)
            while files & self._files():
                if not begun:
                    await write_out.begin()
                    begun = True
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            self._seen -= files
            await write_out.close()
