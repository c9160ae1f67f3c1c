"""Finding a folder without following links that somebody else has planted: they may lead elsewhere by the next moment."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

# As the kernel's own (path_resolution(7)).
_LINKS_MAX = 40


@contextlib.contextmanager
def folder_of(path: str) -> Iterator[tuple[int, str]]:
    """A descriptor of the folder that a path is in, and the path's last name: for `dir_fd`, whatever becomes of the path.

    Raises:
        OSError: there is none, or a link on the way is neither root's nor ours.
    """
    folder, name = os.path.split(path)
    descriptor = _walk(folder)
    try:
        yield descriptor, name
    finally:
        os.close(descriptor)


def _walk(folder: str) -> int:
    here = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    left = folder.split("/")[::-1]
    links = 0
    try:
        while left:
            name = left.pop()
            if name in ("", "."):
                continue
            found = os.stat(name, dir_fd=here, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                links += 1
                target = _target(name, here, found.st_uid, links)
                left += target.split("/")[::-1]
                name = "/" if target.startswith("/") else "."
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            here, before = os.open(name, flags, dir_fd=here), here
            os.close(before)
    except BaseException:
        os.close(here)
        raise
    return here


def _target(name: str, folder: int, owner: int, links: int) -> str:
    """What a link leads to, if it may be followed."""
    if links > _LINKS_MAX:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if owner not in (0, os.geteuid()):
        words = f"{name} is a symbolic link that user {owner} has made: name the folder that it leads to"
        raise OSError(errno.ELOOP, words)
    return os.readlink(name, dir_fd=folder)
