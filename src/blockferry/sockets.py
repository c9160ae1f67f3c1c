"""Unix sockets whose paths may be longer than a socket address: the host process's, and QMP's. Standard library only."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

SUN_PATH_MAX = 107  # sockaddr_un.sun_path is 108 bytes with the zero at its end


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Give a path for `path` that fits into a socket address, as long as the block lasts.

    A long one goes through its directory, opened: /proc/self/fd/N/name.
    """
    if len(os.fsencode(path)) <= SUN_PATH_MAX:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def connect_unix(path: Path, timeout: float | None = None) -> socket.socket:
    """Connect to a Unix socket, however long its path is; `timeout` as of a socket, 0 to wait for nothing."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        with short_path(path) as address:
            connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


def listen_unix(path: Path) -> socket.socket:
    """Listen on a Unix socket, 0600 from its first moment, however long its path is. One that is there is replaced."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        with short_path(path) as address:
            listener.bind(address)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener
