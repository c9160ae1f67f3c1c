"""A file that nobody may open, and that tells when somebody does, whichever process it is (inotify(7))."""

import ctypes
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

_OPENED, _READ, _WRITTEN = 0x20, 0x1, 0x2
_EVENT = struct.Struct("iIII")


class Canary:
    """Watches one file.

    Args:
        path: the file, which is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._queue = -1

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._queue = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._libc.inotify_add_watch(self._queue, os.fsencode(self.path), _OPENED | _READ | _WRITTEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch", str(self.path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Watch no longer."""
        os.close(self._queue)

    def opened(self) -> int:
        """How often it was opened, read or written since this was asked last."""
        try:
            return len(os.read(self._queue, 1 << 16)) // _EVENT.size
        except BlockingIOError:
            return 0
