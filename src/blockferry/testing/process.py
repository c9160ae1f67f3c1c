"""Child processes of a test: started without a shell, dead when the test is dead, with their stderr in a file."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

SOCKET_PATH_MAX_BYTES = 107  # sockaddr_un.sun_path holds 108 bytes, the last is NUL


class StartError(RuntimeError):
    """A process did not come up; the message has its command line and what it wrote to stderr."""


def socket_path(path: Path) -> Path:
    """Return `path` if a Unix socket can be bound to it.

    Raises:
        ValueError: the path has more bytes than the kernel allows (107).
    """
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_MAX_BYTES:
        raise ValueError(f"socket path has {length} bytes, the kernel allows {SOCKET_PATH_MAX_BYTES}: {path}")
    return path


class ChildProcess:
    """One child process, killed by the kernel when the test process dies, however that dies.

    Args:
        argv: the program and its arguments.
        stderr: file that receives the standard error (and output) of the process.
        pass_fds: descriptors that the process inherits under the same numbers.
    """

    def __init__(self, argv: Sequence[str], stderr: Path, pass_fds: Sequence[int] = ()) -> None:
        self._argv = list(argv)
        self._stderr = stderr
        self._pass_fds = tuple(pass_fds)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process; returns when it was forked, not when it is ready.

        Raises:
            OSError: it could not be forked.
        """
        with self._stderr.open("wb") as stderr:
            self._process = await asyncio.create_subprocess_exec(
                "setpriv",  # util-linux; the death signal survives exec, so also wrapper scripts
                "--pdeathsig=KILL",
                "--",
                *self._argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=self._pass_fds,
            )

    @property
    def pid(self) -> int:
        """The process id; kept after the process ended."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True from the start until the process has been reaped."""
        return self._process is not None and self._process.returncode is None

    @property
    def stderr_text(self) -> str:
        """What the process wrote to its standard error so far."""
        return self._stderr.read_text(errors="replace") if self._stderr.exists() else ""

    async def wait(self) -> int:
        """Wait until the process ended and return its exit status (negative: the signal's number)."""
        assert self._process is not None, "not started"
        return await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it lives."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """SIGKILL the process and wait until it is gone; nothing to do if it never started."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            await self.wait()

    def start_error(self) -> StartError:
        """Return the error that says why the process is not up."""
        return StartError(f"{' '.join(self._argv)}\ndid not come up; its stderr:\n{self.stderr_text}")


async def wait_gone(pid: int) -> None:
    """Wait until a process has ended, a child of ours or not; returns at once when there is none."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    # A pidfd becomes readable when its process ends (pidfd_open(2)).
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
