"""Links that somebody else has planted are not followed, and what was swapped for our file is left alone."""

import os
from pathlib import Path

import pytest

from blockferry.qemu.images import _claim, _create
from blockferry.qemu.launch import without_secrets
from blockferry.qemu.tool import ImageError

SOMEBODY = 4242


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that all may write to, and beside it one that somebody would like us to write to."""
    for name in ("shared", "ours"):
        (tmp_path / name).mkdir()
    return tmp_path / "shared"


def plant(link: Path, to: Path, owner: int = SOMEBODY) -> None:
    link.symlink_to(to)
    os.lchown(link, owner, owner)


@pytest.mark.parametrize("to", ["../ours", "ABSOLUTE"])
def test_a_folder_that_is_somebodys_link(shared: Path, to: str) -> None:
    ours = shared.parent / "ours"
    plant(shared / "images", ours if to == "ABSOLUTE" else Path(to))
    with pytest.raises(ImageError, match=r"images is a symbolic link that user 4242 has made"):
        _claim(str(shared / "images/new"), None)
    assert not list(ours.iterdir())
    # Our own is followed, as root's is.
    os.lchown(shared / "images", os.geteuid(), 0)
    _claim(str(shared / "images/new"), None)
    assert [path.name for path in ours.iterdir()] == ["new"]


def test_links_that_lead_to_each_other(shared: Path) -> None:
    plant(shared / "a", Path("b"), 0)
    plant(shared / "b", Path("a"), 0)
    with pytest.raises(ImageError, match="Too many levels of symbolic links"):
        _claim(str(shared / "a/new"), None)


def test_a_claim_that_is_swapped(shared: Path) -> None:
    """Between its claim and its writing another name of somebody's file, or a link to it, is put in its place."""
    victim = shared.parent / "ours/victim"
    victim.write_bytes(b"precious")
    new = str(shared / "new")
    claim = _claim(new, None)
    for swap in (os.link, os.symlink):
        os.unlink(new)
        swap(victim, new)
        with pytest.raises(ImageError):
            _create(new, "qcow2", 1 << 20, None, None, claim=claim)
        assert victim.read_bytes() == b"precious"


def test_a_log_has_no_secrets() -> None:
    words = [
        "-object",
        "secret,id=s,data=abc def,format=raw",
        "-object",
        '{"qom-type":"secret","id":"s","data":"abc"}',
        "-m",
    ]
    assert without_secrets(words) == [
        *("-object", "secret,id=s,data=***,format=raw", "-object", '{"qom-type":"secret","id":"s","data":"***"}', "-m")
    ]
