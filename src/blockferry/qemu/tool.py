"""Running qemu-img, within bounds: how long it takes and what it needs may be up to whoever wrote the image."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource

# Generous: to check an image of many terabytes may take minutes, and to map one in pieces a lot of memory.
SECONDS = 600.0
MEMORY_BYTES = 4 << 30
PRINTED_BYTES_MAX = 64 << 20
_WORDS_BYTES_MAX = 64 << 10


class ImageError(Exception):
    """A file operation failed, in the system's or qemu-img's own words."""


class QemuImg:
    """A qemu-img.

    Args:
        program: its path; None finds it beside the QEMU that is used, or on PATH.
    """

    def __init__(self, program: str | None = None) -> None:
        self.program = program or os.path.join(os.environ.get("BLOCKFERRY_QEMU_DIR", ""), "qemu-img")

    async def run(self, *arguments: str, good: tuple[int, ...] = (0,)) -> str:
        """Run it to its end, which comes within SECONDS; what it printed.

        Raises:
            ImageError: in its own words, or that it came to a bound.
        """
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                self.program, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
            )
        except OSError as error:
            raise ImageError(f"{self.program} can't be run ({error.strerror}): install qemu-utils") from error
        try:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            async with asyncio.timeout(SECONDS):
                out, words = await asyncio.gather(
                    _read(process.stdout, PRINTED_BYTES_MAX), _read(process.stderr, _WORDS_BYTES_MAX)
                )
                await process.wait()
        except TimeoutError as error:
            raise ImageError(f"qemu-img {arguments[0]} has not ended within {SECONDS:g} s") from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode not in good:
            raise ImageError(words.decode(errors="replace").strip().removeprefix("qemu-img: "))
        return out.decode(errors="replace")


async def _read(stream: asyncio.StreamReader | None, most: int) -> bytes:
    """All that a program prints.

    Raises:
        ImageError: it is more than `most` bytes.
    """
    found = bytearray()
    while stream is not None and (more := await stream.read(1 << 16)):
        found += more
        if len(found) > most:
            raise ImageError(f"qemu-img printed more than {most} bytes: the image is in too many pieces")
    return bytes(found)
