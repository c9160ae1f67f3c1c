"""The header that we write is the one that QEMU's own tools read."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from blockferry.qemu.header import BACKING_NAME_MAX
from blockferry.qemu.qcow2 import CLUSTER, TABLES_MAX, empty_image
from blockferry.testing import check_image, find_qemu
from blockferry.testing.trace import strace

GIB = 1 << 30


def write(path: Path, size: int, backing: str | None = None, backing_format: str | None = None) -> None:
    contents, length = empty_image(size, backing, backing_format)
    path.write_bytes(contents)
    os.truncate(path, length)


def info(path: Path) -> dict[str, object]:
    command = [find_qemu("distribution").img, "info", "-U", "--output=json", "-f", "qcow2", path]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=20).stdout)


@pytest.mark.parametrize("size", [512, 1 << 20, (1 << 20) + 512, GIB // 2, GIB, 3 * 1024 * GIB, 9 * 1024 * GIB])
@pytest.mark.parametrize(
    ("backing", "backing_format"), [(None, None), ("/src/base.img", "raw"), ("b" * BACKING_NAME_MAX, "qcow2")]
)
def test_as_qemu_img_reads_it(tmp_path: Path, size: int, backing: str | None, backing_format: str | None) -> None:
    path = tmp_path / "image"
    write(path, size, backing, backing_format)
    # qemu-img shortens nothing of this itself: an image without an existing backing is still described.
    found = info(path)
    assert found["virtual-size"] == size
    assert found.get("backing-filename") == backing
    assert found.get("backing-filename-format") == backing_format
    if backing is None:
        check_image(find_qemu("distribution"), path, "qcow2")
        made = tmp_path / "made"
        command = [find_qemu("distribution").img, "create", "-q", "-f", "qcow2", made, str(size)]
        subprocess.run(command, check=True, timeout=20)
        ours, theirs = found["format-specific"], info(made)["format-specific"]
        assert ours == theirs, "version, features and refcounts are qemu-img's own"


@pytest.mark.parametrize(("size", "tables"), [(512, 1), (GIB, 2), (GIB + 512, 3), (9 * 1024 * GIB, TABLES_MAX)])
def test_its_tables_are_there_and_take_no_room(tmp_path: Path, size: int, tables: int) -> None:
    contents, length = empty_image(size, None, None)
    assert length - len(contents) == tables * CLUSTER
    path = tmp_path / "image"
    write(path, size)
    assert path.stat().st_blocks * 512 <= len(contents)


def flushes(path: Path, trace: Path, regions: int) -> int:
    """How often what writes to the first 64 KiB of so many regions of 512 MiB has the image flushed, its end with it."""
    writes = [word for number in range(regions) for word in ("-c", f"write -q {number * GIB // 2} 64k")]
    command = [*strace(trace, "fdatasync"), find_qemu("distribution").io, "-t", "writeback", "-f", "qcow2", *writes]
    subprocess.run([*command, path], check=True, timeout=20)
    return trace.read_text().count("fdatasync(")


def test_a_guest_does_not_wait_for_a_table(tmp_path: Path) -> None:
    """QEMU has an image flushed before a new L2 table and after it, with the guest's write waiting."""
    ours, theirs, trace = tmp_path / "ours", tmp_path / "theirs", tmp_path / "trace"
    write(ours, 2 * GIB)
    assert flushes(ours, trace, 1) == flushes(ours, trace, 4)
    check_image(find_qemu("distribution"), ours, "qcow2")
    made = [find_qemu("distribution").img, "create", "-q", "-f", "qcow2", theirs, str(2 * GIB)]
    subprocess.run(made, check=True, timeout=20)
    assert flushes(theirs, trace, 1) < flushes(theirs, trace, 4), (
        "QEMU's own way: this test has nothing to say any more"
    )


def test_a_name_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at most 1023 bytes"):
        empty_image(512, "b" * 1024, "raw")
