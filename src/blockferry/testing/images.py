"""Image files for tests: made, written, hashed, compared and checked offline with QEMU's own tools."""

import contextlib
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from blockferry.testing.launcher import QemuBinaries

TOOL_TIMEOUT_S = 120.0  # test images are small; a tool that takes longer hangs
COMPARE_DIFFERENT = 1  # qemu-img compare: exit status of images that differ
CHECK_LEAKS = 3
CHECK_UNSUPPORTED = 63  # qemu-img check: the format has nothing to check (raw)


class ToolError(RuntimeError):
    """One of QEMU's tools failed; the message has its command line and output."""


class ImageDamagedError(AssertionError):
    """`qemu-img check` found errors or leaks; the message is its report."""


def make_image(
    binaries: QemuBinaries,
    path: Path,
    fmt: str,
    size_bytes: int | None = None,
    *,
    backing: Path | None = None,
    backing_fmt: str | None = None,
) -> Path:
    """Create an image and return its path.

    Args:
        binaries: which QEMU.
        path: the file.
        fmt: "raw" or "qcow2".
        size_bytes: virtual size; an overlay may leave it out and has its backing's.
        backing: the image below.
        backing_fmt: its format, required with `backing`.

    Raises:
        ToolError: qemu-img refused.
        ValueError: a backing image without its format, or neither size nor backing.
    """
    if (backing is None) != (backing_fmt is None):
        raise ValueError("a backing image and its format go together")
    if backing is None and size_bytes is None:
        raise ValueError("an image without backing needs a size")
    arguments = ["create", "-q", "-f", fmt]
    if backing is not None and backing_fmt is not None:
        arguments += ["-b", str(backing), "-F", backing_fmt]
    _run(binaries.img, *arguments, str(path), *([] if size_bytes is None else [str(size_bytes)]))
    return path


def write_pattern(binaries: QemuBinaries, path: Path, fmt: str, offset: int, length: int, byte: int) -> None:  # noqa: PLR0917  # qemu-io's own order
    """Write `length` bytes of the value `byte` at the guest's offset `offset`, in bytes.

    Raises:
        ToolError: qemu-io refused, for example because the image is in use.
    """
    output = _run(binaries.io, "-f", fmt, "-c", f"write -P {byte:#x} {offset} {length}", str(path))
    if "wrote" not in output:  # qemu-io ends with 0 for some failed commands
        raise ToolError(f"qemu-io did not write to {path}: {output}")


@contextlib.contextmanager
def raw_contents(binaries: QemuBinaries, path: Path, fmt: str) -> Iterator[Path]:
    """Give the guest-visible contents of an image (the whole chain) as a temporary sparse raw file.

    Raises:
        ToolError: the image cannot be read, or is in use.
    """
    with tempfile.TemporaryDirectory(prefix="blockferry-raw-") as folder:
        raw = Path(folder) / "contents"
        _run(binaries.img, "convert", "-f", fmt, "-O", "raw", str(path), str(raw))
        yield raw


def image_sha256(binaries: QemuBinaries, path: Path, fmt: str) -> str:
    """Return the SHA-256 of what a guest sees in the image, in hex; equal for equal contents in any format.

    Raises:
        ToolError: the image cannot be read, or is in use.
    """
    with raw_contents(binaries, path, fmt) as raw, raw.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare_images(binaries: QemuBinaries, first: Path, first_fmt: str, second: Path, second_fmt: str) -> bool:
    """Tell whether a guest sees the same size and bytes in both images.

    Raises:
        ToolError: one of them cannot be read, or is in use.
    """
    # qemu-img takes images for equal where the longer one ends in zeroes; its -s also compares allocation.
    if _virtual_size(binaries, first, first_fmt) != _virtual_size(binaries, second, second_fmt):
        return False
    result = _invoke(binaries.img, "compare", "-q", "-f", first_fmt, "-F", second_fmt, str(first), str(second))
    if result.returncode > COMPARE_DIFFERENT:
        raise _tool_error(result)
    return result.returncode == 0


def check_image(binaries: QemuBinaries, path: Path, fmt: str, *, leaks: bool = False) -> None:
    """Check an image's metadata; a raw image has none.

    Args:
        binaries: whose qemu-img.
        path: the image.
        fmt: its format.
        leaks: whether clusters may be lost to use: what QEMU leaves when an image's own storage fails.

    Raises:
        ImageDamagedError: it has errors or leaked clusters.
    """
    result = _invoke(binaries.img, "check", "-f", fmt, str(path))
    if result.returncode not in {0, CHECK_UNSUPPORTED, *([CHECK_LEAKS] if leaks else [])}:
        raise ImageDamagedError(f"{path}: {result.stdout}{result.stderr}")


def _virtual_size(binaries: QemuBinaries, path: Path, fmt: str) -> int:
    information = json.loads(_run(binaries.img, "info", "--output=json", "-f", fmt, str(path)))
    return int(information["virtual-size"])


def _invoke(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False
    )


def _run(program: Path, *arguments: str) -> str:
    result = _invoke(program, *arguments)
    if result.returncode != 0:
        raise _tool_error(result)
    return result.stdout


def _tool_error(result: subprocess.CompletedProcess[str]) -> ToolError:
    return ToolError(f"{' '.join(result.args)}\nended with {result.returncode}: {result.stdout}{result.stderr}")
