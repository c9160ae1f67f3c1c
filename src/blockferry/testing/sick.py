"""Storage that fails when told: reads, writes or flushes of chosen files, in every program that has the library preloaded.

sick-storage.c has how. One page of a file says what fails; who writes it need not be one of the programs.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Literal

from blockferry.testing.preload import compiled

PAGE = 4096
NAME = "STORAGE_FAULTS"
Ailment = Literal["read", "write", "flush", "full"]
ORDERS: dict[Ailment, tuple[str, int]] = {
    "read": ("r", errno.EIO),
    "write": ("w", errno.EIO),
    "flush": ("f", errno.EIO),
    "full": ("w", errno.ENOSPC),
}


def sick_storage(page: Path) -> dict[str, str]:
    """What a program needs in its environment so that its storage can be made to fail.

    Args:
        page: a file to be made, which says what fails.

    Raises:
        MissingComponentError: there is no compiler.
    """
    page.write_bytes(bytes(PAGE))
    return {"LD_PRELOAD": str(compiled(Path(__file__).with_name("sick-storage.c"))), NAME: str(page)}


def order(ailment: Ailment, below: Path) -> str:
    """What `fail` takes: that kind of access to every file below a folder fails."""
    letter, number = ORDERS[ailment]
    return f"{letter} {number} {below}/"


def fail(what: str) -> None:
    """Let something fail from now on, in every program that shares the page of this one's environment."""
    _write(Path(os.environ[NAME]), what.encode())


def failing() -> bool:
    """Whether anything fails now, by the page of this one's environment; not without one."""
    page = os.environ.get(NAME)
    return page is not None and Path(page).read_bytes()[:1] not in (b"", b"\0")


def heal(page: Path) -> None:
    """Let nothing fail any more."""
    _write(page, b"")


def _write(page: Path, what: bytes) -> None:
    with page.open("r+b", buffering=0) as file:
        # Health first and the first byte last: who reads meanwhile sees health or all of it.
        file.write(b"\0")
        file.write(what[1:].ljust(PAGE - 1, b"\0"))
        file.seek(0)
        file.write(what[:1] or b"\0")
