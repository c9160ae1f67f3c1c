"""Files that share their blocks, on file systems that can (XFS, btrfs): sharing takes moments, however long the file.

Sources: ioctl_ficlonerange(2), ioctl_ficlone(2); the kernel's Documentation/filesystems/fiemap.rst.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Mapping
from typing import Any

from blockferry.qemu.syncing import opened
from blockferry.qemu.tool import ImageError

# include/uapi/linux/fs.h: _IOW(0x94, 9, int), and _IOW(0x94, 13, struct file_clone_range).
_FICLONE, _FICLONERANGE = 0x40049409, 0x4020940D
_RANGE = struct.Struct("=qQQQ")
# include/uapi/linux/fiemap.h: _IOWR('f', 11, struct fiemap); without room for extents it counts them.
_FIEMAP = 0xC020660B
_MAP = struct.Struct("=QQIIII")
_CANT_CLONE = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ETXTBSY)
# include/uapi/linux/magic.h. Of these it is known that nobody writes to either file while blocks are shared (xfs_ilock2_io_mmap,
# btrfs_double_inode_lock); whether that holds for NFS, CIFS, or what else has the call, is not.
_XFS, _BTRFS = 0x58465342, 0x9123683E
# Sharing an extent takes some 10 µs: of more than these it is work that wants to be shown and cancelled.
EXTENTS_MAX = 100_000
# While a piece is being shared, who writes to the file waits. Pieces are as long as takes about as long as a write.
PIECE_BYTES_MIN, PIECE_BYTES_FIRST = 1 << 20, 16 << 20
SHORT_SECONDS, LONG_SECONDS = 0.001, 0.004


def clone(source: int, copy: int) -> bool:
    """Share all blocks of an open file with its copy; False where the file systems can't.

    Raises:
        OSError: it failed for another reason.
    """
    try:
        fcntl.ioctl(copy, _FICLONE, source)
    except OSError as error:
        if error.errno not in _CANT_CLONE:
            raise
        return False
    return True


def can_share(source: str, folder: str) -> bool:
    """Whether a file that is written to can share its blocks with one in that folder, and is in few enough extents for a moment.

    Tried, with a file that has no name: whether a file system can is not to be had otherwise. What can't be tried can't.
    """
    try:
        with opened(source, os.O_RDONLY) as original, opened(folder, os.O_TMPFILE | os.O_RDWR) as trial:
            block = os.fstat(original).st_blksize
            if (
                _type(trial) not in (_XFS, _BTRFS)
                or os.fstat(original).st_size < block
                or _extents(original) > EXTENTS_MAX
            ):
                return False
            _share_piece(original, trial, 0, block)
    except OSError:
        return False
    return True


def share(source: str, file: str, claim: Mapping[str, Any] | None) -> None:
    """Have a file that we made share all blocks of another, also of one that a guest writes to meanwhile.

    The kernel takes each piece's bytes as they are at one instant of its own, and nobody writes to either file in that: bytes that
    somebody has written before it are in the copy. Those that the guest writes after it are carried over by a mirror, which has to
    be at work already (plan.atonce).

    Args:
        source: its path.
        file: the copy's: as long as the source.
        claim: device and inode of the copy, as it was made.

    Raises:
        ImageError: it was not shared, or only in part.
    """
    try:
        with opened(source, os.O_RDONLY) as original, opened(file, os.O_RDWR | os.O_NOFOLLOW) as copy:
            found = os.fstat(copy)
            if claim is None or (found.st_dev, found.st_ino) != (claim["device"], claim["inode"]):
                raise ImageError(f"{file} is not the file that was made there")
            size = os.fstat(original).st_size
            if not stat.S_ISREG(found.st_mode) or found.st_size != size:
                raise ImageError(f"{file} has {found.st_size} bytes, and {source} {size}")
            # What is in memory only would be written while the guest waits.
            os.fdatasync(original)
            _share_pieces(original, copy, size)
    except OSError as error:
        raise ImageError(f"share the blocks of {source} with {file}: {error.strerror}") from error


def _share_pieces(original: int, copy: int, size: int) -> None:
    at, piece = 0, PIECE_BYTES_FIRST
    while at < size:
        last = at + piece >= size
        began = time.monotonic()
        # To the end of the file, which may be in the middle of a block, there is a length of its own: 0.
        _share_piece(original, copy, at, 0 if last else piece)
        took = time.monotonic() - began
        at += piece
        if took < SHORT_SECONDS:
            piece *= 2
        elif took > LONG_SECONDS:
            piece = max(PIECE_BYTES_MIN, piece // 2)


def _share_piece(original: int, copy: int, at: int, length: int) -> None:
    fcntl.ioctl(copy, _FICLONERANGE, _RANGE.pack(original, at, length, at))


def _extents(descriptor: int) -> int:
    answer = fcntl.ioctl(descriptor, _FIEMAP, _MAP.pack(0, (1 << 64) - 1, 0, 0, 0, 0))
    return int(_MAP.unpack(answer)[3])


def _type(descriptor: int) -> int:
    """The type of the file system: struct statfs (statfs(2)) begins with it."""
    answer = (ctypes.c_long * 32)()
    if ctypes.CDLL(None, use_errno=True).fstatfs(descriptor, ctypes.byref(answer)):
        raise OSError(ctypes.get_errno(), "fstatfs")
    return int(answer[0])
