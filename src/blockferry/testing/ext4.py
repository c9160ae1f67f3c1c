"""Images with an ext4 on them, and what is found on one afterwards, with the tools of e2fsprogs."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from blockferry.testing.images import ToolError, raw_contents
from blockferry.testing.launcher import QemuBinaries
from blockferry.testing.missing import MissingComponentError

TOOL_TIMEOUT_S = 60.0  # some MiB


def make_ext4(binaries: QemuBinaries, path: Path, fmt: str, size_bytes: int) -> Path:
    """Create an image with an empty ext4 and return its path.

    Args:
        binaries: which QEMU.
        path: the file.
        fmt: "raw" or "qcow2".
        size_bytes: virtual size.

    Raises:
        MissingComponentError: there is no mke2fs.
        ToolError: it could not be made.
    """
    with tempfile.TemporaryDirectory(prefix="blockferry-ext4-") as folder:
        raw = Path(folder) / "contents"
        raw.touch()
        os.truncate(raw, size_bytes)
        # Without lazy initialisation: nothing writes to it but what the test lets write.
        _run("mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(raw))
        _run(str(binaries.img), "convert", "-f", "raw", "-O", fmt, str(raw), str(path))
    return path


def needs_recovery(contents: Path) -> bool:
    """Tell whether an ext4 would replay its journal when it is mounted: nobody had let it come to rest.

    Args:
        contents: the disk's guest-visible contents, as a raw file.
    """
    features = next(line for line in _run("dumpe2fs", "-h", str(contents)).splitlines() if "features:" in line)
    return "needs_recovery" in features.split()


def fsck(contents: Path) -> str:
    """Return what e2fsck, which changes nothing, finds wrong with an ext4 as it is; empty when it is clean."""
    result = _invoke("e2fsck", "-f", "-n", str(contents))
    return "" if result.returncode == 0 else result.stdout + result.stderr


@contextlib.contextmanager
def file_on_ext4(binaries: QemuBinaries, image: Path, fmt: str, name: str) -> Iterator[Path]:
    """Give a file of the ext4 in an image, as it is without a replay of the journal.

    Raises:
        ToolError: the image or the file can't be read.
    """
    with raw_contents(binaries, image, fmt) as contents:
        found = contents.with_name("file")
        _run("debugfs", "-R", f"dump /{name} {found}", str(contents))
        yield found


def _invoke(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    found = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        raise MissingComponentError(program, "apt-get install e2fsprogs")
    return subprocess.run([found, *arguments], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)


def _run(program: str, *arguments: str) -> str:
    result = _invoke(program, *arguments)
    if result.returncode != 0:
        raise ToolError(
            f"{program} {' '.join(arguments)}\nended with {result.returncode}: {result.stdout}{result.stderr}"
        )
    return result.stdout
