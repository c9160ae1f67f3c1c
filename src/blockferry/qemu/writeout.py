"""Having files written out while somebody fills them, by a process beside: docs/adr/0018-write-out.md."""

from __future__ import annotations

import asyncio
import contextlib
import sys

from blockferry.qemu import flusher

# One whose storage hangs can't be ended by anybody, and is left to itself.
_END_SECONDS = 5.0


class WriteOut:
    """Has files written out until it is closed.

    No thread of ours: one that waits for a storage that hangs keeps its process, and so its locks, beyond a SIGKILL.
    """

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def begin(self, paths: frozenset[str]) -> None:
        """Start it for these files, if there are any; where that can't be done, the kernel writes out when it does."""
        if not paths:
            return
        nothing = asyncio.subprocess.DEVNULL
        with contextlib.suppress(OSError):
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                flusher.__file__,
                *sorted(paths),
                stdin=asyncio.subprocess.PIPE,
                stdout=nothing,
                stderr=nothing,
                start_new_session=True,  # Ctrl-C is for us: it ends with us
            )

    async def close(self) -> None:
        """End it."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()
