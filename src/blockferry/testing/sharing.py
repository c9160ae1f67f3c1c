"""A file system whose files can share their blocks."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

# The smallest that mkfs.xfs makes is 300 MiB.
BYTES_MIN = 320 << 20


@contextlib.contextmanager
def sharing_file_system(image: Path, folder: Path, size: int = BYTES_MIN) -> Iterator[Path]:
    """An XFS, mounted on a folder that is made unless it is there; as root only.

    Args:
        image: the file that it is in; it is made, and removed at the end.
        folder: where its files are.
        size: bytes.
    """
    folder.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    try:
        _run("mkfs.xfs", "-q", "-m", "reflink=1", str(image))
        _run("mount", "-o", "loop", str(image), str(folder))
        try:
            yield folder
        finally:
            _run("umount", str(folder))
    finally:
        image.unlink()


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=60)
