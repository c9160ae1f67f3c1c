"""What paths are, asked apart: a file system that hangs holds up who asks, for a while, and nobody else.

Of a path whose file system does not answer in time nothing is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from blockferry.qemu.bounded import bounded

T = TypeVar("T")

# An NFS server that is there answers in milliseconds; a loaded machine gets a thousand times that.
PATH_SECONDS = 30.0


async def aliases(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What is the same for every name of a file: its path with links resolved, and its identity where it is there.

    Of one that hangs, the path alone.
    """
    asked = tuple(dict.fromkeys(paths))
    found = await ask_each(_aliases, asked)
    return {path: found.get(path, (path,)) for path in asked}


async def real_paths(paths: Iterable[str]) -> dict[str, str]:
    """Paths with links resolved; of one that hangs, as it is."""
    asked = tuple(dict.fromkeys(paths))
    found = await ask_each(os.path.realpath, asked)
    return {path: found.get(path, path) for path in asked}


async def existing(paths: Iterable[str]) -> frozenset[str]:
    """Those that are there; one that hangs counts as there."""
    asked = tuple(dict.fromkeys(paths))
    found = await ask_each(os.path.exists, asked)
    return frozenset(path for path in asked if found.get(path, True))


async def directories(paths: Iterable[str]) -> frozenset[str]:
    """Those that are directories."""
    found = await ask_each(os.path.isdir, tuple(dict.fromkeys(paths)))
    return frozenset(path for path, directory in found.items() if directory)


async def block_devices(paths: Iterable[str]) -> frozenset[str]:
    """Those that are block devices."""
    found = await ask_each(is_block_device, tuple(dict.fromkeys(paths)))
    return frozenset(path for path, device in found.items() if device)


async def storages(folders: Iterable[str]) -> dict[str, int]:
    """The numbers of the file systems that folders are on; 0 of one that is not there, or hangs."""
    asked = tuple(dict.fromkeys(folders))
    found = await ask_each(_storage, asked)
    return {folder: found.get(folder, 0) for folder in asked}


async def in_memory(paths: Iterable[str]) -> frozenset[str]:
    """Files on a file system that has no disk, as the kernel says (/proc/self/mountinfo, proc(5)); not one that hangs."""
    found = await ask_each(_written_to, tuple(dict.fromkeys(paths)))
    without = _without_disk()
    return frozenset(path for path, where in found.items() if where in without)


async def ask_each(what: Callable[[str], T], paths: tuple[str, ...], seconds: float | None = None) -> dict[str, T]:
    """The answers, without those that did not come back: of all in one thread, or, where that hangs, of each in its own.

    Args:
        what: asks the system about a path.
        paths: which.
        seconds: the bound; PATH_SECONDS unless told.
    """
    if not paths:
        return {}
    bound = PATH_SECONDS if seconds is None else seconds
    try:
        return await bounded(bound, lambda: {path: what(path) for path in paths})
    except TimeoutError:
        answers = await asyncio.gather(*(bounded(bound, what, path) for path in paths), return_exceptions=True)
    found: dict[str, T] = {}
    for path, answer in zip(paths, answers, strict=True):
        if isinstance(answer, BaseException):
            if not isinstance(answer, TimeoutError):
                raise answer
        else:
            found[path] = answer
    return found


def identity_of(found: os.stat_result) -> str:
    """What is the same for every name of a file."""
    return f"device {found.st_rdev}" if stat.S_ISBLK(found.st_mode) else f"{found.st_dev}:{found.st_ino}"


def is_block_device(path: str) -> bool:
    """Whether there is a block device of that name."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def _aliases(path: str) -> tuple[str, ...]:
    real = os.path.realpath(path)
    try:
        return (real, identity_of(os.stat(path)))
    except OSError:
        return (real,)


def _storage(folder: str) -> int:
    try:
        return os.stat(folder).st_dev
    except OSError:
        return 0


def _written_to(path: str) -> int:
    """The number of the file system, or of the block device, that takes what is written to a file; 0 where it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return 0
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else found.st_dev


def _without_disk() -> frozenset[int]:
    """The numbers of the file systems in memory."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            mount, _, about = line.partition(b" - ")
            if about.partition(b" ")[0] in (b"tmpfs", b"ramfs"):
                major, minor = mount.split(b" ")[2].split(b":")
                found.add(os.makedev(int(major), int(minor)))
    return frozenset(found)
