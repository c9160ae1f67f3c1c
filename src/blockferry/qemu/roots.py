"""Where images may lie: nothing outside is opened, whatever a header names (ADR 15)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

# An image there says nothing of its neighbours: other disks, processes and settings of the host.
_NO_NEIGHBOURS = ("/dev", "/proc", "/sys", "/etc", "/run", "/boot")


class StorageRoots:
    """The folders in which images may lie.

    With `given` ones, every image and every destination has to lie in one of them, whoever names it. Without, what a
    caller names is opened, and what an image's header names is followed only to a file that a caller has named too, or
    that lies in or below the folder of one.

    Args:
        given: absolute paths of folders.
        named: the files that callers have named before; asked when those that are known do not do.
    """

    def __init__(self, given: Iterable[str] = (), named: Callable[[], Iterable[str]] = tuple) -> None:
        self._given = tuple(os.path.realpath(each) for each in given)
        self._named = named

    def refuses(self, path: str) -> str | None:
        """Why a file that a caller names is not to be opened; None when it may be."""
        if not self._given or _within(os.path.realpath(path), self._given):
            return None
        return f"it is outside the storage roots ({', '.join(self._given)}): `--storage-root` adds one"

    def refuses_backing(self, path: str, known: Iterable[str]) -> str | None:
        """Why a file that a header names is not to be opened; None when it may be.

        Args:
            path: the file.
            known: files that callers have named, or that QEMU has open.
        """
        if self._given:
            return self.refuses(path)
        real = os.path.realpath(path)
        if any(_implies(file, real) for files in (known, self._named()) for file in files):
            return None
        return (
            "only an image's header names it, and it lies outside the folders of the guests' images: if it is what the "
            "image stands on, say so with `--storage-root` or a <backingStore>"
        )


def _implies(file: str, real: str) -> bool:
    """Whether who named `file` may have meant the other too."""
    if not file.startswith("/"):
        return False
    known = os.path.realpath(file)
    folder = os.path.dirname(known)
    return known == real or (folder != "/" and not _within(folder, _NO_NEIGHBOURS) and _within(real, (folder,)))


def _within(real: str, folders: Iterable[str]) -> bool:
    return any(real == folder or real.startswith(folder.rstrip("/") + "/") for folder in folders)
