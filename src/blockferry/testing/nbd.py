"""Real NBD servers for tests: `qemu-nbd`, which can be killed or made to hang, and `nbdkit`, whose filters fail and delay."""

import asyncio
import contextlib
import shutil
import signal
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from blockferry.testing.launcher import QemuBinaries
from blockferry.testing.missing import MissingComponentError
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


class FaultyNbdServer(NbdServer):
    """nbdkit, which serves a raw image through its filters; an async context manager.

    Args:
        binaries: which QEMU's tools the rest of the test uses.
        path: the image.
        directory: existing folder for the sockets and the server's stderr.
        name: the export's name.
        wdelay: how long each write takes, as nbdkit-delay-filter(1) has it; `0` for no delay.

    Attributes:
        failing: while this file is there, every write ends with ENOSPC.
        pause: the socket that holds requests and lets them go; see `tell_pause`.

    Raises:
        MissingComponentError: nbdkit is not installed.
    """

    def __init__(
        self, binaries: QemuBinaries, path: Path, directory: Path, *, name: str = "disk", wdelay: str = "0"
    ) -> None:
        super().__init__(binaries, path, "raw", directory, name=name)
        program = shutil.which("nbdkit")
        if program is None:
            raise MissingComponentError("nbdkit", "make test-tools")
        self.failing = directory / f"{name}.nbd.failing"
        self.pause = socket_path(directory / f"{name}.nbd.pause")
        filters = {
            "error": ["error-pwrite=ENOSPC", "error-pwrite-rate=100%", f"error-pwrite-file={self.failing}"],
            "pause": [f"pause-control={self.pause}"],
            "delay": [f"wdelay={wdelay}"],
        }
        argv = [program, "--foreground", f"--unix={self.socket}", f"--exportname={name}"]
        argv += [f"--filter={each}" for each in filters]
        argv += ["file", str(path), *(word for words in filters.values() for word in words)]
        self._process = ChildProcess(argv, directory / f"{name}.nbd.stderr")

    async def start(self) -> None:
        """As of `NbdServer`; also one that was killed."""
        self.pause.unlink(missing_ok=True)
        await super().start()

    async def revive(self) -> bool:
        """Serve again, whatever was done to it: fail nothing, let go of what is held, and start anew if it was killed.

        Returns:
            Whether it was.
        """
        self.heal()
        try:
            await self.let_go()
        except OSError:
            await self.kill()
            await self.start()
            return True
        return False

    def fail(self) -> None:
        """From now on every write ends with ENOSPC (nbdkit-error-filter(1))."""
        self.failing.touch()

    def heal(self) -> None:
        """Let writes through again, if they are not."""
        self.failing.unlink(missing_ok=True)

    async def hold(self) -> None:
        """Let no request through from now on (nbdkit-pause-filter(1)): clients are accepted and greeted, and that is all.

        Returns when the requests that are under way are done.
        """
        assert await asyncio.to_thread(tell_pause, self.pause, b"p") == b"P"

    async def let_go(self) -> None:
        """Let all requests through that were held."""
        assert await asyncio.to_thread(tell_pause, self.pause, b"r") == b"R"

    async def stop(self) -> None:
        """As of `NbdServer`; what is held is let go first, which it would wait for."""
        if self.alive:
            await self.let_go()
        await super().stop()


def tell_pause(control: Path, word: bytes) -> bytes:
    """Tell a server to hold requests (`p`, answered when those under way are done) or to let them go (`r`), and wait for its answer.

    Raises:
        OSError: it is gone.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(START_TIMEOUT_S)
        connection.connect(str(control))
        connection.sendall(word)
        return connection.recv(1)
