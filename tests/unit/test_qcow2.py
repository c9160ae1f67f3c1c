"""The header that we write is the one that QEMU's own tools read."""

import json
import subprocess
from pathlib import Path

import pytest

from blockferry.qemu.header import BACKING_NAME_MAX
from blockferry.qemu.qcow2 import empty_image
from blockferry.testing import check_image, find_qemu

GIB = 1 << 30


def info(path: Path) -> dict[str, object]:
    command = [find_qemu("distribution").img, "info", "-U", "--output=json", "-f", "qcow2", path]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=20).stdout)


@pytest.mark.parametrize("size", [512, 1 << 20, (1 << 20) + 512, GIB // 2, GIB, 3 * 1024 * GIB, 9 * 1024 * GIB])
@pytest.mark.parametrize(
    ("backing", "backing_format"), [(None, None), ("/src/base.img", "raw"), ("b" * BACKING_NAME_MAX, "qcow2")]
)
def test_as_qemu_img_reads_it(tmp_path: Path, size: int, backing: str | None, backing_format: str | None) -> None:
    path = tmp_path / "image"
    path.write_bytes(empty_image(size, backing, backing_format))
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


def test_a_name_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at most 1023 bytes"):
        empty_image(512, "b" * 1024, "raw")
