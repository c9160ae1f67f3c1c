"""Files that are made for images."""

from pathlib import Path

import pytest

from blockferry.qemu.images import Images, _claim
from blockferry.qemu.tool import ImageError


def test_a_claim_that_fails_leaves_no_file(tmp_path: Path) -> None:
    new = tmp_path / "new"
    with pytest.raises(ImageError, match="/dev/null/like: Not a directory"):
        _claim(str(new), "/dev/null/like")
    assert not new.exists()


def test_a_claim_takes_the_mode_of_what_is_there(tmp_path: Path) -> None:
    like = tmp_path / "like"
    like.touch()
    like.chmod(0o640)
    _claim(str(tmp_path / "one"), str(like))
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o640
    # Of an image that was deleted while QEMU has it open nothing can be known.
    like.unlink()
    _claim(str(tmp_path / "other"), str(like))
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ImageError, match="exists already"):
        _claim(str(tmp_path / "one"), None)


async def test_what_has_to_be_readable_is_read(tmp_path: Path) -> None:
    """A folder can be opened and synced, and not be read."""
    images = Images()
    (file := tmp_path / "file").write_bytes(b"x")
    (unreadable := tmp_path / "unreadable").mkdir()
    gone = str(tmp_path / "gone")
    await images.sync((str(file), str(unreadable), gone), (str(file), gone))
    with pytest.raises(ImageError, match=f"{unreadable}: Is a directory"):
        await images.sync((str(file), str(unreadable)), (str(unreadable),))
