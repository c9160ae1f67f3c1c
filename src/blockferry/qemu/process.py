"""Telling one QEMU process from another: a pid alone may be somebody else's by now."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
from pathlib import Path


def born(pid: int | None) -> int | None:
    """When the process was started, in clock ticks since boot (proc_pid_stat(5), field 22); None when it is gone."""
    fields = _stat(pid) if pid is not None else None
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on, the state; None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the program's name in parentheses and may hold anything, spaces and parentheses too.
    return text.rpartition(")")[2].split()


def lives(pid: int, started: int | None) -> bool:
    """Whether that very process still runs; a zombie does not."""
    now = born(pid)
    return now is not None and (started is None or now == started)


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped it (proc_pid_stat(5)): it answers nothing until it is let go on."""
    fields = _stat(pid)
    return fields is not None and fields[0] in ("T", "t")


def _opened(pid: int) -> int | None:
    """A pidfd; None where there is no process of that number."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        # Another process's thread may have the number by now (EINVAL; ENOENT on newer kernels: seen on 6.18).
        if error.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
            return None
        raise


def kill(pid: int, started: int | None) -> None:
    """End that very process without mercy; nothing if it is gone."""
    descriptor = _opened(pid)
    if descriptor is None:
        return
    try:
        if lives(pid, started):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    finally:
        os.close(descriptor)


def status_of(pid: int) -> str | None:
    """How a child of ours ended, in words; None when it is no child of ours, or lives."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    if found == 0:
        return None
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


async def ends(pid: int, started: int | None, seconds: float | None) -> bool:
    """Whether that very process has ended, or does within `seconds` (None: wait for it).

    Its sockets close a moment before it is gone.
    """
    descriptor = _opened(pid)
    if descriptor is None:
        return True
    try:
        # Not `lives`: of a process whose first thread has ended it says so while others still hold its files and locks.
        fields = _stat(pid)
        if fields is None or (started is not None and int(fields[19]) != started) or _readable(descriptor):
            return True
        return await _becomes_readable(descriptor, seconds)
    finally:
        os.close(descriptor)


def _readable(descriptor: int) -> bool:
    """Whether a pidfd says that its process has ended with all of its threads (pidfd_open(2))."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


async def _becomes_readable(descriptor: int, seconds: float | None) -> bool:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(seconds):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)
    return True
