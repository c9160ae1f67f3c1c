"""Sharing the blocks of a file, on a real XFS, and where it can't be done."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from blockferry.qemu import sharing
from blockferry.qemu.sharing import can_share, share
from blockferry.qemu.tool import ImageError

MIB = 1 << 20
SIZE = 40 * MIB + 512  # its end is in the middle of a block


@pytest.fixture
def source(reflinks: Path) -> Path:
    """With holes, and data at its end."""
    path, chance = reflinks / "source", random.Random(7)  # noqa: S311 - data that is no secret
    with path.open("wb") as file:
        for at in (0, 9 * MIB, 33 * MIB):
            file.seek(at)
            file.write(chance.randbytes(2 * MIB))
        file.truncate(SIZE - 512)
        file.seek(SIZE - 512)
        file.write(chance.randbytes(512))
    return path


def made(path: Path, size: int = SIZE) -> dict[str, int]:
    path.touch()
    os.truncate(path, size)
    found = path.stat()
    return {"device": found.st_dev, "inode": found.st_ino}


@pytest.mark.parametrize("piece", [1 * MIB, 16 * MIB, 64 * MIB])
def test_a_copy_is_equal_and_takes_no_room(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    assert tmp_path in source.parents
    monkeypatch.setattr(sharing, "PIECE_BYTES_FIRST", piece)
    copy = source.parent / "copy"
    claim = made(copy)
    free = os.statvfs(source.parent).f_bfree
    share(str(source), str(copy), claim)
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_blocks == source.stat().st_blocks
    assert abs(os.statvfs(source.parent).f_bfree - free) * 4096 < MIB
    # Twice is as once.
    share(str(source), str(copy), claim)
    assert copy.read_bytes() == source.read_bytes()


def test_whether_it_can_be_done_is_tried(source: Path, tmp_path: Path) -> None:
    (source.parent / "folder").mkdir()
    assert can_share(str(source), str(source.parent / "folder"))
    assert not can_share(str(source), str(tmp_path)), "another file system"
    (tmp_path / "here").write_bytes(b"x" * 8192)
    assert not can_share(str(tmp_path / "here"), str(tmp_path)), "one that can't"
    assert not can_share(str(source), str(source.parent / "nowhere"))
    assert not can_share(str(source.parent / "nothing"), str(source.parent))
    (source.parent / "short").write_bytes(b"x")
    assert not can_share(str(source.parent / "short"), str(source.parent))
    assert sorted(os.listdir(source.parent)) == ["folder", "short", "source"], "nothing is left of it"


def test_a_file_in_very_many_pieces_is_none_for_a_moment(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "EXTENTS_MAX", 3)
    assert not can_share(str(source), str(source.parent))
    monkeypatch.setattr(sharing, "EXTENTS_MAX", 8)
    assert can_share(str(source), str(source.parent))


def test_only_what_was_made_for_it_is_written_to(source: Path) -> None:
    copy = source.parent / "copy"
    claim = made(copy)
    with pytest.raises(ImageError, match="not the file that was made there"):
        share(str(source), str(copy), None)
    with pytest.raises(ImageError, match="not the file that was made there"):
        share(str(source), str(copy), claim | {"inode": 1})
    link = source.parent / "link"
    link.symlink_to(copy)
    with pytest.raises(ImageError, match="share the blocks"):
        share(str(source), str(link), claim)
    with pytest.raises(ImageError, match="has 4096 bytes"):
        share(str(source), str(copy), made(copy, 4096))
    assert not any(copy.read_bytes())


def test_where_it_can_not_be_done_it_is_said(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    with pytest.raises(ImageError, match=f"share the blocks of {source} with {copy}"):
        share(str(source), str(copy), made(copy))
