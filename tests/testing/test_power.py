"""The recorder of what programs do to files, and the files that a power loss leaves of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockferry.testing.power import PAGE, SECTOR, Disk, NotRecorded, Recorder

OLD, NEW = b"o" * 2 * PAGE, b"n" * 2 * PAGE
BEGIN = "import os, mmap\nfile = os.open('file', os.O_RDWR)\n"
HERE = "os.fsync(os.open('.', os.O_RDONLY))\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_bytes(OLD)
    return root


@pytest.fixture
def recorder(tmp_path: Path, root: Path) -> Recorder:
    (tmp_path / "recorder").mkdir()
    return Recorder(tmp_path / "recorder", root)


def after(recorder: Recorder, *command: str) -> Disk:
    """What is there when a program has run; the log has to say the same as the files."""
    disk = recorder.begin()
    environment = os.environ | recorder.environment
    subprocess.run(command, cwd=recorder.root, env=environment, check=True, timeout=20)
    for entry in recorder.entries():
        disk.go_on(entry)
    disk.require_recorded()
    return disk


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", BEGIN + code


def test_what_was_not_flushed_is_lost_or_not(recorder: Recorder, root: Path) -> None:
    disk = after(
        recorder, *python(f"os.write(file, {NEW[:PAGE]!r}); os.fdatasync(file); os.write(file, {NEW[:PAGE]!r})")
    )
    assert disk.unflushed == [str(root / "file")]
    disk.lose_power("all")
    assert (root / "file").read_bytes() == NEW
    disk.lose_power("none")
    assert (root / "file").read_bytes() == NEW[:PAGE] + OLD[PAGE:]


@pytest.mark.parametrize(("flush", "durable"), [("fsync", True), ("fdatasync", False)])
def test_a_file_s_time_is_on_disk_with_an_fsync(flush: str, durable: bool, recorder: Recorder, root: Path) -> None:
    first = (root / "file").stat().st_mtime_ns
    disk = after(recorder, *python(f"os.write(file, {NEW!r}); os.{flush}(file)"))
    written = (root / "file").stat().st_mtime_ns
    assert written > first
    disk.lose_power("none")
    assert (root / "file").read_bytes() == NEW
    assert (root / "file").stat().st_mtime_ns == (written if durable else first)
    disk.lose_power("all")
    assert (root / "file").stat().st_mtime_ns == written


def test_some_of_what_was_not_flushed_is_left(recorder: Recorder, root: Path) -> None:
    """Whole writes, pages or sectors of them, by a seed."""
    disk = after(recorder, *python(f"os.write(file, {NEW!r})"))
    found = set()
    for seed in range(60):
        disk.lose_power(str(seed))
        found.add((root / "file").read_bytes())
    assert {OLD, NEW} < found
    sectors = [{data[at : at + SECTOR] for at in range(0, len(OLD), SECTOR)} for data in found]
    assert all(each <= {OLD[:SECTOR], NEW[:SECTOR]} for each in sectors)
    again = (root / "file").read_bytes()
    disk.lose_power("59")
    assert (root / "file").read_bytes() == again


@pytest.mark.parametrize(
    ("change", "before", "afterwards"),
    [
        ("os.fsync(os.open('new', os.O_CREAT | os.O_WRONLY))", {"file"}, {"file", "new"}),
        ("os.rename('file', 'new')", {"file"}, {"new"}),
        ("os.unlink('file')", {"file"}, set()),
        ("os.mkdir('new')", {"file"}, {"file", "new"}),
    ],
)
def test_a_name_is_on_disk_with_its_folder(
    change: str, before: set[str], afterwards: set[str], recorder: Recorder, root: Path
) -> None:
    for code, left in ((change, before), (f"{change}\n{HERE}", afterwards)):
        for path in root.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
        (root / "file").write_bytes(OLD)
        disk = after(recorder, *python(code))
        disk.lose_power("none")
        assert set(os.listdir(root)) == left
        disk.lose_power("all")
        assert set(os.listdir(root)) == afterwards


def test_a_file_is_the_same_inode_when_power_is_back(recorder: Recorder, root: Path) -> None:
    inode = (root / "file").stat().st_ino
    disk = after(recorder, *python(f"os.rename('file', 'other'); os.fsync(os.open('new', os.O_CREAT)); {HERE}"))
    made = (root / "new").stat().st_ino
    disk.lose_power("none")
    assert ((root / "other").stat().st_ino, (root / "new").stat().st_ino) == (inode, made)


@pytest.mark.parametrize(
    "command",
    [
        python("os.ftruncate(file, 100); os.ftruncate(file, 9000)"),
        python("os.posix_fallocate(file, 8192, 4096); os.pwritev(file, [b'abc', b'd'], 12000)"),
        python("os.close(os.open('file', os.O_WRONLY | os.O_TRUNC)); os.replace('file', 'other')"),
        python("open('file', 'ab').write(b'more'); os.lseek(file, 5, os.SEEK_SET); os.write(file, b'x')"),
        ("fallocate", "--punch-hole", "--offset", "1000", "--length", "9000", "file"),
        ("fallocate", "--zero-range", "--offset", "1000", "--length", "9000", "file"),
        ("cp", "file", "copy"),
        ("qemu-img", "create", "-q", "-f", "qcow2", "image", "1M"),
    ],
    ids=str,
)
def test_the_log_says_what_the_files_are(command: tuple[str, ...], recorder: Recorder) -> None:
    after(recorder, *command)
    assert recorder.entries()


def test_what_comes_past_the_recorder_is_noticed(recorder: Recorder) -> None:
    with pytest.raises(NotRecorded, match="file is not what was recorded of it"):
        after(recorder, *python("mmap.mmap(file, 4096)[:3] = b'new'"))
