"""Waking a QEMU that waits on its own connection to an NBD server, from outside.

`yank` shuts a connection down. That wakes whoever reads from it, and on TCP whoever writes to it. Who waits to write to a Unix
socket whose buffer is full sleeps on: poll(2) reports POLLHUP, not POLLOUT (unix_poll goes by the room that is left), and
QEMU waits for POLLOUT. A larger buffer is room: the write is tried, and fails. docs/adr/0014-servers-that-hang.md has
what was tried.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

# Above four times what can be in flight (a mirror has 16 MiB): unix_writable wants a quarter of the buffer in use at most.
ROOM_BYTES = 128 << 20
# pidfd_getfd(2): one number for all architectures; the os module does not have it.
_PIDFD_GETFD = 438
# socket(7), asm-generic: as SO_SNDBUF, beyond net.core.wmem_max; takes CAP_NET_ADMIN.
_SO_SNDBUFFORCE = 32


def widen(pid: int, servers: Collection[str], *, shut: bool = False) -> bool:
    """Let a process's writes to these Unix sockets be tried again, however full the connections are.

    Args:
        pid: QEMU's.
        servers: the paths of the sockets that it is connected to.
        shut: shut the connections down first, where nobody could be asked to.

    Returns:
        Whether that was done to all; not where we may not touch the process (ptrace(2)), or may not make buffers so large.
    """
    done = dict.fromkeys(servers, False)
    for connection, server in _connections(pid):
        if server not in done:
            continue
        if shut:
            connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(PermissionError):
            connection.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, ROOM_BYTES)
            done[server] = True
    return all(done.values())


def _connections(pid: int) -> Iterator[tuple[socket.socket, str]]:
    """The process's connected Unix sockets and what they are connected to, each as a descriptor of ours meanwhile."""
    system = ctypes.CDLL(None, use_errno=True)
    try:
        process = os.pidfd_open(pid)
        numbers = [int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir() if _is_socket(entry)]
    except OSError:
        return
    try:
        for number in numbers:
            descriptor = system.syscall(_PIDFD_GETFD, process, number, 0)
            if descriptor < 0:
                continue
            with socket.socket(fileno=descriptor) as connection, contextlib.suppress(OSError):
                if connection.family == socket.AF_UNIX:
                    yield connection, str(connection.getpeername())
    finally:
        os.close(process)


def _is_socket(entry: Path) -> bool:
    try:
        return os.readlink(entry).startswith("socket:")
    except OSError:
        return False
