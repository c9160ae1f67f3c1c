"""A program that has files written out until its standard input ends, as it does with whoever began it.

The kernel begins by itself when a tenth of the memory is to be written. Here it is asked to begin, again and again, and is not
waited for. Nothing is imported that is not needed: the program is there while it starts for nobody's good.
"""

import contextlib
import ctypes
import os
import select
import stat
import sys
import time

# What comes between two times is flushed at the end, while everybody waits: asked every tenth of a second, a copy that takes half a
# second took a quarter longer. Of one that takes minutes it is one part in a hundred, and no more than a disk does in a moment.
SHARE = 0.01
SECONDS_MIN, SECONDS_MAX = 0.02, 0.25
# sync_file_range(2); the os module does not have it.
_SYNC_FILE_RANGE_WRITE = 2
_WHOLE = (ctypes.c_int64(0), ctypes.c_int64(0))
sync_file_range = ctypes.CDLL(None, use_errno=True).sync_file_range


def begin_writing_out(path: str) -> None:
    """Have the kernel write to the disk what is changed of a file now; it is not waited for, and nothing is promised of it.

    What can't be opened, is neither a file nor a block device, or lies where the kernel does not do this, is left to that.

    Args:
        path: of the file.
    """
    with contextlib.suppress(OSError):
        # What it is comes first, as in qemu/inspect.py, which is not imported: to open a device that is no disk may do something.
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            mode = os.fstat(found).st_mode
            if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
                _begin(os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        finally:
            os.close(found)


def pause_after(seconds: float) -> float:
    """How long to wait until the kernel is asked again, so many seconds after the first time."""
    return min(max(SECONDS_MIN, seconds * SHARE), SECONDS_MAX)


def _begin(descriptor: int) -> None:
    try:
        sync_file_range(descriptor, *_WHOLE, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
    finally:
        os.close(descriptor)


def _main(paths: list[str]) -> None:
    ended: list[int] = []
    began = time.monotonic()
    while not ended:
        for path in paths:
            begin_writing_out(path)
        ended, _, _ = select.select([0], [], [], pause_after(time.monotonic() - began))


if __name__ == "__main__":
    _main(sys.argv[1:])
