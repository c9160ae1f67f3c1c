"""Starting a QEMU that is a process of its own: it outlives us, and a lock says whether it lives.

RUN/NAME/           0700
  lock              flock(2)ed by QEMU itself, through a descriptor that it inherits, until its end, however it ends
  qmp.sock, ...     0600, made by QEMU
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import shlex
import shutil
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from blockferry.model.definition import RunAs
from blockferry.plan.machine import FOLDER_DESCRIPTOR, QMP_SOCKET
from blockferry.qemu.bounded import apart, bounded
from blockferry.qemu.process import born
from blockferry.qemu.tool import ImageError
from blockferry.qemu.user import hand_over

# After the folder's: QEMU inherits them under these numbers.
LOCK_DESCRIPTOR = FOLDER_DESCRIPTOR + 1
CONTROL_DESCRIPTOR = FOLDER_DESCRIPTOR + 2
# QEMU answers within half a second; a loaded machine gets a hundred times that.
ANSWER_SECONDS = 60.0
KILL_SECONDS = 10.0
# Its greeting, its answer, and events in between are some hundred bytes.
ANSWER_BYTES = 64 << 10
LAST_WORDS_BYTES = 4096
SAID_LINES = 5


class LaunchFailed(Exception):
    """QEMU did not start, with its last words."""


class AlreadyRuns(Exception):
    """A QEMU of this domain lives."""


class Launched(msgspec.Struct, frozen=True, kw_only=True):
    """A QEMU that was started: its process, when that was born (process.born), and where its QMP socket is."""

    pid: int
    born: int | None
    qmp: str


class Home:
    """Where the QEMU of a domain lives.

    Args:
        run: the folder of all domains' sockets.
        logs: the folder of all domains' logs.
        name: the domain's.
    """

    def __init__(self, run: Path, logs: Path, name: str) -> None:
        self.folder = run / name
        self.log = logs / f"{name}.log"

    @property
    def qmp(self) -> Path:
        """The QMP socket's path."""
        return self.folder / QMP_SOCKET

    def taken(self) -> bool:
        """Whether a QEMU of this domain lives, or is being started."""
        try:
            with _lock(self.folder):
                return False
        except (AlreadyRuns, FileNotFoundError) as found:
            return isinstance(found, AlreadyRuns)

    def last_words(self) -> str:
        """The last lines of the log since the last start, on one line; empty when there are none."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_WORDS_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        said = [line.strip() for line in text.rpartition(START_MARK)[2].splitlines()[1:] if line.strip()]
        return "; ".join(said[-SAID_LINES:])


START_MARK = "=== blockferry starts"


# The value of a `secret` object, in QEMU's own syntax and in JSON.
_SECRET = re.compile(r"""(\bdata["']?\s*[=:]\s*["']?)[^,"'}]*""")


def without_secrets(command: list[str]) -> list[str]:
    """A command line as it may be logged: what a definition gives QEMU as a secret is left out."""
    return [_SECRET.sub(r"\1***", word) if "secret" in word else word for word in command]


def find_program(emulator: str | None, arch: str) -> str:
    """The QEMU program of a definition.

    Raises:
        LaunchFailed: there is none.
    """
    folder = os.environ.get("BLOCKFERRY_QEMU_DIR")
    name = emulator or f"qemu-system-{arch}"
    found = shutil.which(name, path=folder if folder and emulator is None else None)
    if found is None:
        raise LaunchFailed(f"there is no program {name}: install it, or name another in <emulator>")
    return found


async def launch(
    home: Home,
    program: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    templates: Mapping[str, str],
    run_as: RunAs | None = None,
) -> Launched:
    """Start QEMU and wait until its sockets listen; its guest does not run yet.

    Args:
        home: where it lives.
        program: QEMU.
        arguments: those of plan.machine.
        environment: added to ours.
        templates: file -> what it is made from where it is not there; it stays, whatever becomes of the start.
        run_as: whom it becomes, as the arguments say too; the images are made that user's first.

    Raises:
        AlreadyRuns: a QEMU of this domain lives.
        LaunchFailed: a file can't be made, or QEMU ended at once, or did not answer, with its last words.
    """
    home.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _lock(home.folder) as lock:
        if run_as is not None:
            try:
                await apart(hand_over, run_as)
            except ImageError as error:
                raise LaunchFailed(str(error)) from error
        for stale in home.folder.glob("*.sock"):
            stale.unlink()
        for path, template in templates.items():
            await apart(_make, Path(path), template)
        ours, theirs = socket.socketpair()
        with theirs:
            control = ["-chardev", f"socket,id=control,fd={CONTROL_DESCRIPTOR}", "-mon", "chardev=control,mode=control"]
            pid = _spawn(home, [program, *arguments, *control], {**os.environ, **environment}, lock, theirs.fileno())
    # The lock is QEMU's alone from here on, and so is the other end of the pair: it ends with QEMU.
    with ours:
        started = born(pid)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                answered = await _answers(ours)
        except TimeoutError:
            answered = False
        if not answered:
            how = await _end(pid)
            raise LaunchFailed(home.last_words() or f"it {how} and said nothing")
    return Launched(pid=pid, born=started, qmp=str(home.qmp))


def _make(path: Path, template: str) -> None:
    """Copy a template to a file that is not there: all of it, or nothing."""
    if path.exists():
        return
    partial = path.with_name(f"{path.name}.new")
    try:
        shutil.copyfile(template, partial)
        partial.chmod(0o600)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise LaunchFailed(f"{path} can't be made from {template}: {error.strerror}") from error


def _spawn(home: Home, command: list[str], environment: Mapping[str, str], lock: int, control: int) -> int:
    with contextlib.ExitStack() as stack:
        log = os.open(home.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        stack.callback(os.close, log)
        folder = os.open(home.folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, folder)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, null)
        os.write(log, f"{START_MARK} {shlex.join(without_secrets(command)).replace(chr(10), ' ')}\n".encode())
        # Its sockets are made with this mask: 0600, well, 0700 without the bit that means nothing for a socket.
        stack.callback(os.umask, os.umask(0o077))
        # Above all numbers that are given away, so that none is overwritten before it is copied.
        sources = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 64) for each in (folder, lock, control)]
        for each in sources:
            stack.callback(os.close, each)
        targets = (FOLDER_DESCRIPTOR, LOCK_DESCRIPTOR, CONTROL_DESCRIPTOR)
        actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        actions += [(os.POSIX_SPAWN_DUP2, source, target) for source, target in zip(sources, targets, strict=True)]
        # Not subprocess nor asyncio: their objects end, or complain of, a child that outlives them.
        try:
            return os.posix_spawn(
                command[0],
                command,
                environment,
                file_actions=actions,
                setsid=True,
                setsigdef=[signal.SIGPIPE, signal.SIGINT],
            )
        except OSError as error:
            raise LaunchFailed(f"{command[0]} can't be run: {error.strerror}") from error


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[int]:
    """The lock, held by the descriptor and by every copy of it."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyRuns(str(folder)) from error
        yield descriptor
    finally:
        os.close(descriptor)


async def _answers(ours: socket.socket) -> bool:
    """Whether QEMU gets so far as to answer a command, which it does from its main loop, when all devices are there.

    The greeting says less: a thread of its own sends it before the devices are made (tried on 7.2 and 10.0).
    """
    ours.setblocking(False)
    loop = asyncio.get_running_loop()
    said = b""
    try:
        await loop.sock_sendall(ours, b'{"execute": "qmp_capabilities"}\n')
        while b'"return"' not in said:
            more = await loop.sock_recv(ours, 4096)
            if not more:
                return False
            said = (said + more)[-ANSWER_BYTES:]
    except OSError:
        return False
    return True


async def _end(pid: int) -> str:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    try:
        return f"ended with status {await bounded(KILL_SECONDS, _wait, pid)}"
    except TimeoutError:  # it waits for storage that hangs, and ends when that answers
        return f"(pid {pid}) was killed and has not ended within {KILL_SECONDS:g} s"


def _wait(pid: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return 0
