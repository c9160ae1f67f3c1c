"""Where the host process of a state directory lives, and how it is reached, started and owned.

Only the standard library, and the error tree only when something is wrong: the command's fast path goes through here.

    STATE_DIR/            0700
      lock                held by the owner for as long as it lives; has its process id
      run/                0700; locked for the moments in which ownership changes
        api.sock          0600; listens as soon as the lock is held, is answered once recovery has run
      log/serve.log       0600; what a host process that was started by a command writes
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockferry.sockets import connect_unix, listen_unix

if TYPE_CHECKING:
    from blockferry.errors import HostProcessUnreachable, StateDirUnusable

READY_SECONDS = 30.0  # recovery asks every attached guest once, 5 s for a greeting, all at the same time
IDLE_EXIT_SECONDS = 30.0
# How long a guest may stand still. Draining and switching took 83 ms for 8 disks; guests' own time-outs begin at 5 s (a
# cluster's heartbeat) and 30 s (a disk's).
WINDOW_SECONDS = 2.0
# Who waits for an answer looks so often whether the host process lives, which it says within milliseconds, or after recovery.
LOOK_SECONDS, ANSWER_SECONDS = 10.0, 60.0
# Ownership changes hands in moments; who is stopped in the middle of that is not waited for.
DOORWAY_SECONDS, DOORWAY_PAUSE_SECONDS = 30.0, 0.01
OTHERS = stat.S_IRWXG | stat.S_IRWXO


class StateDir:
    """The layout of a state directory; making one touches nothing.

    Args:
        path: made absolute, symbolic links and all left as they are.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))
        self.run = self.path / "run"
        self.socket = self.run / "api.sock"
        self.log = self.path / "log" / "serve.log"
        self.lock = self.path / "lock"

    def __str__(self) -> str:
        return str(self.path)


def default_state_dir() -> Path:
    """Where state is kept unless told: BLOCKFERRY_STATE_DIR; root's in /var/lib; a user's by the XDG convention."""
    if named := os.environ.get("BLOCKFERRY_STATE_DIR"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/blockferry")
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(home) / "blockferry"


def default_storage_roots() -> tuple[str, ...]:
    """The folders in which images may lie unless told: BLOCKFERRY_STORAGE_ROOTS, divided by colons as PATH."""
    return tuple(each for each in os.environ.get("BLOCKFERRY_STORAGE_ROOTS", "").split(os.pathsep) if each)


# --- the directory --------------------------------------------------------------------------------------------


def prepare_state_dir(state: StateDir) -> None:
    """Make the directory and its folders, 0700, or check those that are there.

    Raises:
        StateDirUnusable: it can't be made, is a symbolic link, is someone else's, or is open to others. An empty
            directory of ours is closed to them; the mode of one with something in it is not ours to change.
    """
    try:
        _make_folders(state.path)
        if _check_ours(state, state.path) & OTHERS:
            if os.listdir(state.path):
                raise _unusable(state, f"others may enter it and it is not empty; `chmod 700 {state}` if it is ours")
            state.path.chmod(0o700)
        for folder in (state.run, state.log.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
            if _check_ours(state, folder) & OTHERS:
                folder.chmod(0o700)
    except OSError as error:
        raise _unusable(state, _words(error)) from error


def _make_folders(path: Path) -> None:
    """Make a folder and those above it, their names on disk: a journal that nobody finds has recorded nothing."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in missing:
        # One that we may enter and write to, and not read, can't be synced.
        with contextlib.suppress(PermissionError):
            descriptor = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _check_ours(state: StateDir, folder: Path) -> int:
    """Return the folder's mode; refuse what is no directory, a link, or another user's."""
    found = os.lstat(folder)
    if stat.S_ISLNK(found.st_mode):
        raise _unusable(state, f"{folder} is a symbolic link")
    if not stat.S_ISDIR(found.st_mode):
        raise _unusable(state, f"{folder} is not a directory")
    if found.st_uid != os.geteuid():
        raise _unusable(state, f"{folder} belongs to user {found.st_uid}, and we are {os.geteuid()}")
    return found.st_mode


def _unusable(state: StateDir, reason: str) -> StateDirUnusable:
    from blockferry.errors import StateDirUnusable

    return StateDirUnusable(state_dir=str(state), reason=reason)


def _words(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)


# --- owning a state directory ---------------------------------------------------------------------------------


class Lock:
    """A state directory's lock: one process owns it, from `take` until `release` or its death, however it dies."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, state: StateDir) -> Lock:
        """Take the lock of a prepared directory.

        Raises:
            StateDirBusy: another process has it; names its id.
            StateDirUnusable: the lock's file can't be opened.
        """
        try:
            descriptor = os.open(state.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(state, _words(error)) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            from blockferry.errors import StateDirBusy

            owner = os.pread(descriptor, 32, 0).strip()
            os.close(descriptor)
            raise StateDirBusy(state_dir=str(state), pid=int(owner) if owner.isdigit() else 0) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return cls(descriptor)

    def release(self) -> None:
        """Let go of it."""
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


class Ownership:
    """What makes a process the host process of a state directory: its lock and the socket that all connect to.

    The socket listens from the moment that the lock is held, and both change under a lock on run/ (the doorway): who
    finds the lock taken has only to connect, and nobody's connection is lost to a host process that goes away idle.
    """

    def __init__(self, state: StateDir, lock: Lock, listener: socket.socket) -> None:
        self._state = state
        self._lock = lock
        self._doorway: int | None = None
        self.listener = listener

    @classmethod
    def take(cls, state: StateDir) -> Ownership:
        """Become the owner of a prepared directory, and listen. Waits for one that is on its way out.

        Raises:
            StateDirBusy: another process owns it, and listens if it is a host process.
            StateDirUnusable: a file of it can't be opened.
        """
        doorway = _lock_folder(state)
        try:
            lock = Lock.take(state)
            try:
                return cls(state, lock, listen_unix(state.socket))
            except OSError as error:
                lock.release()
                raise _unusable(state, _words(error)) from error
        finally:
            os.close(doorway)

    def withdraw(self, still_idle: Callable[[], bool] | None = None) -> bool:
        """Take the socket's name away, so that nobody connects any more; the next owner waits for `give_up`.

        Args:
            still_idle: asked once nobody can connect any more: False, or a connection that came before that, calls it
                off. None: it is withdrawn whoever waits.

        Returns:
            Whether it was withdrawn.
        """
        hidden = self._state.socket.with_suffix(".gone")
        try:
            self._doorway = _lock_folder(self._state)
            self._state.socket.rename(hidden)
        except FileNotFoundError:
            return True  # someone removed the directory under us: nobody can connect
        waiting, _, _ = select.select([self.listener], [], [], 0)
        if still_idle is not None and (waiting or not still_idle()):
            hidden.rename(self._state.socket)
            self._leave_doorway()
            return False
        hidden.unlink(missing_ok=True)
        return True

    def give_up(self) -> None:
        """Own it no more: the next one may."""
        if self._doorway is None:
            self.withdraw()
        self.listener.close()
        self._lock.release()
        self._leave_doorway()

    def _leave_doorway(self) -> None:
        if self._doorway is not None:
            os.close(self._doorway)
            self._doorway = None


def _lock_folder(state: StateDir) -> int:
    descriptor = os.open(state.run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + DOORWAY_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            # flock(2) has no bound of its own.
            if time.monotonic() > deadline:
                os.close(descriptor)
                reason = (
                    f"{state.run} has been locked for {DOORWAY_SECONDS:g} s by a process that neither starts nor ends"
                )
                raise _unusable(state, reason) from error
            time.sleep(DOORWAY_PAUSE_SECONDS)
        else:
            return descriptor


# --- reaching the host process --------------------------------------------------------------------------------


def connect(state: StateDir) -> socket.socket | None:
    """Connect to the host process; None when none listens. Starts and makes nothing.

    Raises:
        StateDirUnusable: the directory is not ours alone, or its socket may not be used.
    """
    try:
        if _check_ours(state, state.path) & (stat.S_IWGRP | stat.S_IWOTH):
            raise _unusable(state, f"others may write to it; `chmod 700 {state}` if it is ours")
        return connect_unix(state.socket)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except OSError as error:
        raise _unusable(state, _words(error)) from error


def answers(state: StateDir) -> bool:
    """Whether the host process answers anybody: one that works long on a request does, one that is stopped or hangs does not.

    For whoever waits for an answer of its own, and wants to know whether to go on.
    """
    try:
        with connect_unix(state.socket, ANSWER_SECONDS) as connection:
            connection.sendall(b"GET /v1/health HTTP/1.0\r\n\r\n")
            return bool(connection.recv(1))
    except OSError:
        return False


def ensure_running(state: StateDir) -> socket.socket:
    """Connect to the host process, which is started when none listens.

    Of two that start one at the same time, both get a connection to the same.

    Raises:
        StateDirUnusable: the directory can't be used.
        StateDirBusy: a process owns it that serves nobody (`blockferry.open` in a program).
        HostProcessUnreachable: it did not start; has the end of its log.
        BlockferryError: what the host process says why it can't start.
    """
    if (connection := connect(state)) is not None:
        return connection
    prepare_state_dir(state)
    said = _start(state)
    # After "busy" too: then another one listens already, unless the owner is no host process.
    if (connection := connect(state)) is not None:
        return connection
    if said.get("kind") == "error":
        from blockferry.errors import from_dict

        raise from_dict(said["error"])
    raise _unreachable(state, "it started but does not listen")


def _start(state: StateDir) -> dict[str, Any]:
    """Start a host process on its own, and return what it says when it is ready, or why it isn't."""
    import subprocess

    log = os.open(state.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    receiver, sender = os.pipe()
    # -P: the current directory is not a place to import from.
    command = [sys.executable, "-P", "-m", "blockferry.interfaces.daemon", "--state-dir", str(state), "--detach"]
    command += ["--idle-exit", f"{IDLE_EXIT_SECONDS:g}", "--ready-fd", str(sender)]
    deadline = time.monotonic() + READY_SECONDS
    try:
        try:
            started = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(sender,),
                start_new_session=True,
            )
        finally:
            os.close(sender)
        started.wait(READY_SECONDS)  # it goes on in a process of its own, at once, so that none is left for us to reap
        said = _read_until(receiver, deadline)
    except (subprocess.TimeoutExpired, TimeoutError) as error:
        raise _unreachable(
            state, f"it was started and is not ready after {READY_SECONDS:g} s; see {state.log}"
        ) from error
    finally:
        os.close(receiver)
        os.close(log)
    try:
        answer: dict[str, Any] = json.loads(said)
    except ValueError as error:
        raise _unreachable(state, f"it ended as it started; see the end of {state.log}") from error
    return answer


def _read_until(receiver: int, deadline: float) -> bytes:
    """Read what the other side of the pipe writes before it closes it; TimeoutError when that takes too long."""
    said = b""
    poller = select.poll()
    poller.register(receiver, select.POLLIN)
    while True:
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        chunk = os.read(receiver, 65536)
        if not chunk:
            return said
        said += chunk


def _unreachable(state: StateDir, reason: str) -> HostProcessUnreachable:
    from blockferry.errors import HostProcessUnreachable

    return HostProcessUnreachable(state_dir=str(state), reason=reason)
