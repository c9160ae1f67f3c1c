import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blockferry.qemu import syncing
from blockferry.qemu.syncing import PIECE_BYTES, PIECES, flush_files, sync_file
from blockferry.qemu.tool import ImageError
from blockferry.testing.trace import strace

ALL_OF_IT = "SYNC_FILE_RANGE_WAIT_BEFORE|SYNC_FILE_RANGE_WRITE|SYNC_FILE_RANGE_WAIT_AFTER"


class Asked:
    """What the kernel is asked to write out; it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real: Any = syncing.sync_file_range
        self.pieces: list[tuple[int, int]] = []
        self.appends: list[tuple[Path, int]] = []
        self.error = 0
        monkeypatch.setattr(syncing, "sync_file_range", self)

    def __call__(self, descriptor: int, start: ctypes.c_int64, length: ctypes.c_int64, flags: ctypes.c_uint) -> int:
        self.pieces.append((start.value, length.value))
        if self.appends:
            path, size = self.appends.pop()
            with path.open("ab") as file:
                file.write(bytes(size))
        if self.error:
            ctypes.set_errno(self.error)
            return -1
        return int(self._real(descriptor, start, length, flags))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


@pytest.mark.parametrize(("in_use", "pieces"), [(True, 3), (False, 0)])
def test_what_is_in_use_goes_to_the_disk_in_pieces(tmp_path: Path, in_use: bool, pieces: int) -> None:
    image, trace = tmp_path / "disk.img", tmp_path / "trace"
    image.write_bytes(bytes(2 * PIECE_BYTES + 5))
    code = f"from blockferry.qemu.syncing import sync_file; sync_file({str(image)!r}, in_use={in_use})"
    subprocess.run([*strace(trace, "sync_file_range"), sys.executable, "-c", code], check=True, timeout=60)
    calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines() if f"<{image}>" in line]
    starts = range(0, pieces * PIECE_BYTES, PIECE_BYTES)
    lengths = (PIECE_BYTES, PIECE_BYTES, 5)
    wanted = [f"{start}, {length}, {ALL_OF_IT}) = 0" for start, length in zip(starts, lengths, strict=False)]
    said = [call.partition(">, ")[2] for call in calls if call.startswith("sync_file_range(")]
    assert said == wanted
    assert calls[-1].startswith("fdatasync("), "what is on disk is what that says"


def test_what_it_has_grown_by_meanwhile_follows(tmp_path: Path, asked: Asked) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_bytes(bytes(PIECE_BYTES + 1))
    asked.appends = [(first, PIECE_BYTES)]
    flush_files((str(first), str(second)))
    end = PIECE_BYTES + 1
    assert asked.pieces == [(0, PIECE_BYTES), (PIECE_BYTES, 1), (end, PIECE_BYTES), (0, PIECE_BYTES), (PIECE_BYTES, 1)]


def test_nobody_is_run_after_for_ever(tmp_path: Path, asked: Asked) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x")
    asked.appends = [(path, 1)] * 100
    sync_file(str(path), in_use=True)
    assert asked.pieces == [(number, 1) for number in range(syncing.LAPS)]


def test_a_large_file_takes_no_more_pieces(tmp_path: Path, asked: Asked) -> None:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 1 << 40)
    sync_file(str(path), in_use=True)
    assert len(asked.pieces) == PIECES
    assert sum(length for _start, length in asked.pieces) == 1 << 40


def test_a_write_that_failed_is_said(tmp_path: Path, asked: Asked) -> None:
    """The kernel says it once to a descriptor: fdatasync, which follows, would not."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"x")
    asked.error = errno.EIO
    with pytest.raises(ImageError, match=r"disk\.img: Input/output error"):
        sync_file(str(path), in_use=True)


def test_where_there_is_no_such_call(tmp_path: Path, asked: Asked) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(PIECE_BYTES + 1))
    asked.error = errno.ENOSYS
    sync_file(str(path), in_use=True)
    assert len(asked.pieces) == 1
