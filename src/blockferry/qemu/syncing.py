"""What is on disk when it is asked for, by calls that may never come back: who calls them waits in a thread."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator

from blockferry.qemu.flusher import sync_file_range
from blockferry.qemu.tool import ImageError

# While the kernel finds room for what was written to a file, whoever writes to it waits; the room is looked for on the disk, behind
# what is being written to it. So much at once is some 20 ms of a slow disk.
PIECE_BYTES = 8 << 20
# What is clean costs 3 microseconds a piece, and a look at a large file is to be as short as at a small one.
PIECES = 1024
# What an overlay has grown by meanwhile follows; whoever writes faster than the disk is not run after.
LAPS = 4
# sync_file_range(2): to begin writing, and to wait for what is being written, before and after.
_WAITED_FOR = ctypes.c_uint(1 | 2 | 4)
# What says that there is no such call, or not for that kind of file.
_NOT_DONE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ESPIPE, errno.EINVAL)


@contextlib.contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """A descriptor of the path, closed with the block."""
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_file(path: str, beginning: int = 0, *, readable: bool = False, in_use: bool = False) -> None:
    """Call fdatasync; a file that is not there is not ours.

    Args:
        path: the file.
        beginning: so many of its bytes are in memory afterwards.
        readable: whether they have to be.
        in_use: whether somebody writes to it meanwhile, who is not to wait for that.

    Raises:
        ImageError: in the system's words.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        try:
            os.pread(descriptor, beginning, 0)
        except OSError:
            if readable:
                raise
        if in_use:
            _write_out(descriptor)
        os.fdatasync(descriptor)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def flush_files(paths: tuple[str, ...]) -> None:
    """Call fdatasync on files that somebody writes to, one after the other.

    Raises:
        ImageError: in the system's words.
    """
    for path in paths:
        sync_file(path, in_use=True)


def touch(folder: str) -> None:
    """Make a file without a name: nothing is left of it, and a file system that is frozen or hangs does not come back.

    A flush of what is clean would. Where such files are not known or we may not make any, nothing is learnt.
    """
    with contextlib.suppress(OSError), opened(folder, os.O_TMPFILE | os.O_WRONLY):
        pass


def sync_folder(path: str) -> None:
    """A new or removed name reaches the disk with its directory, not with the file."""
    with opened(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.fsync(descriptor)


def _write_out(descriptor: int) -> None:
    """Have what was written to a file go to the disk piece by piece: docs/adr/0024-in-pieces.md.

    It promises nothing: fdatasync follows. But of a write that failed a descriptor is told once, and this one is told here.

    Raises:
        OSError: a write failed.
    """
    done = 0
    for _lap in range(LAPS):
        end = os.lseek(descriptor, 0, os.SEEK_END)
        piece = max(PIECE_BYTES, -(-end // PIECES))
        for start in range(done, end, piece):
            length = min(piece, end - start)
            if sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(length), _WAITED_FOR) == 0:
                continue
            number = ctypes.get_errno()
            if number in _NOT_DONE:
                return
            raise OSError(number, os.strerror(number))
        done = end
