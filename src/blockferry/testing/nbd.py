"""A real NBD server for tests: `qemu-nbd`, which can be killed or made to hang."""

import asyncio
import contextlib
import signal
from pathlib import Path
from types import TracebackType
from typing import Self

from blockferry.testing.launcher import QemuBinaries
from blockferry.testing.process import ChildProcess, socket_path

START_TIMEOUT_S = 10.0  # qemu-nbd is ready after 0.02 s
POLL_S = 0.005  # qemu-nbd tells nobody that it is ready
GREETING = b"NBDMAGIC"


class NbdServer:
    """Exports one image, writable and to any number of clients, on a Unix socket; an async context manager.

    Args:
        binaries: which QEMU's qemu-nbd.
        path: the image.
        fmt: its format; a client sees the guest-visible contents, as raw.
        directory: existing folder for the socket (`NAME.nbd.sock`) and the server's stderr.
        name: the export's name.
        once: serve one client and end, as qemu-nbd does unless it is told otherwise.
        read_only: let clients read only.
    """

    def __init__(
        self,
        binaries: QemuBinaries,
        path: Path,
        fmt: str,
        directory: Path,
        *,
        name: str = "disk",
        once: bool = False,
        read_only: bool = False,
    ) -> None:
        self.name = name
        self.socket = socket_path(directory / f"{name}.nbd.sock")
        argv = [str(binaries.nbd), "--discard=unmap"]
        argv += [] if once else ["--persistent", "--shared=0"]
        argv += ["--read-only"] if read_only else []
        argv += [f"--format={fmt}", f"--export-name={name}", f"--socket={self.socket}", str(path)]
        self._process = ChildProcess(argv, directory / f"{name}.nbd.stderr")

    @property
    def uri(self) -> str:
        """Where the export is, as QEMU's tools take it."""
        return f"nbd+unix:///{self.name}?socket={self.socket}"

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while the server's process exists, also while it is suspended."""
        return self._process.alive

    async def start(self) -> None:
        """Start the server; on return it serves the image. A stale socket is removed.

        The socket is tried every 5 ms while the process is watched.

        Raises:
            StartError: the server ended, or was not ready in 10 s; has what it wrote to stderr.
        """
        self.socket.unlink(missing_ok=True)
        await self._process.start()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not await self._greets():
                    if not self.alive:
                        raise self._process.start_error()
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            await self.kill()
            raise self._process.start_error() from error

    async def _greets(self) -> bool:
        """Tell whether the server speaks; it listens already before it has opened the image."""
        try:
            reader, writer = await asyncio.open_unix_connection(self.socket)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        try:
            return await reader.read(len(GREETING)) == GREETING
        except ConnectionError:
            return False
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def kill(self) -> None:
        """SIGKILL the server and wait until it is gone: every client's connection ends."""
        await self._process.kill()

    async def ended(self) -> None:
        """Wait until the server ends by itself."""
        async with asyncio.timeout(START_TIMEOUT_S):
            await self._process.wait()

    def suspend(self) -> None:
        """SIGSTOP: connections stay open and nothing is answered, as with a hung host."""
        self._process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: the server goes on where `suspend` stopped it."""
        self._process.signal(signal.SIGCONT)

    async def stop(self) -> None:
        """End the server in good order (SIGTERM, the image is flushed and closed) and wait until it is gone."""
        if self.alive:
            self.resume()
            self._process.signal(signal.SIGTERM)
            await self._process.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
