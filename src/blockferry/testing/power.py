"""Power loss: what is left of files when the power fails at any moment of something that was recorded once.

storage-log.c writes down what QEMU, its tools and the host process do to files, in order. `Disk` follows that log, and keeps
apart what is on disk (flushed) and what a cache still has: contents until an fsync of their file, names until an fsync of
their folder, the time of the last change until an fsync (no fdatasync) of their file. At a moment that is chosen the power fails, and of what was not flushed nothing, everything or some is there.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from blockferry.testing.preload import compiled

PAGE = 4096
SECTOR = 512
ENTRY = struct.Struct("<c7xQqqqQ")  # what, inode, offset, length, time, bytes of data or of a path that follow
NAME = "STORAGE_LOG"
# SQLite's shared memory: mapped, made anew by whoever opens the database first, and never expected to last.
FORGOTTEN = "-shm"


class NotRecorded(AssertionError):
    """A file is not what the log says: something has come past the recorder, so that nothing can be said."""


@dataclass(frozen=True)
class Entry:
    """An access, when it was done.

    Attributes:
        what: `w`rite, `t`runcate, `e`xtend to a size at least, `z`ero, `s`ync, `f`datasync, `d`irectory synced; `c`reate,
            `u`nlink, `r`ename, `m`ake a folder.
        inode: of the file, or folder.
        at: the offset in bytes.
        length: in bytes; a size, of `t` and `e`.
        modified: the file's modification time then, in ns; 0 of names.
        data: what was written; of names the path, of `r` both with a NUL between them.
    """

    what: str
    inode: int
    at: int
    length: int
    modified: int
    data: bytes

    @property
    def flushes(self) -> bool:
        """Whether something is on disk from then on that need not have been before."""
        return self.what in "sfd"


class Recorder:
    """Records what programs do to the files below a folder.

    Args:
        folder: existing, for the recorder's own; on the file system of what is recorded.
        root: what is recorded lies below it.

    Raises:
        MissingComponentError: there is no compiler.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self._folder = folder
        self.root = root
        self._log = folder / "log"
        (folder / "root").write_text(f"{root}\n")
        (folder / "page").write_bytes(bytes(PAGE))
        self._log.touch()
        self._library = compiled(Path(__file__).with_name("storage-log.c"))

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs in its environment to be recorded."""
        return {"LD_PRELOAD": str(self._library), NAME: str(self._folder)}

    def begin(self) -> Disk:
        """Begin with what is there now, all of it on disk; no program that is recorded runs meanwhile."""
        kept = self._folder / "kept"
        if kept.exists():
            for path in kept.iterdir():
                path.unlink()
        kept.mkdir(exist_ok=True)
        os.truncate(self._log, 0)
        names: dict[str, int] = {}
        files: dict[int, File] = {}
        for path in sorted(self.root.rglob("*")):
            inode = path.stat().st_ino
            names[str(path)] = 0 if path.is_dir() else inode
            if path.is_file():
                os.link(path, kept / str(inode))
                files[inode] = File.of(path.read_bytes(), path.stat().st_mtime_ns)
        return Disk(self.root, kept, names, files)

    def entries(self) -> list[Entry]:
        """What was recorded since the beginning."""
        log = self._log.read_bytes()
        found, at = [], 0
        while at < len(log):
            what, inode, offset, length, modified, size = ENTRY.unpack_from(log, at)
            at += ENTRY.size
            found.append(Entry(what.decode(), inode, offset, length, modified, log[at : at + size]))
            at += size
        return found


@dataclass
class File:
    """A file's contents: `durable`, on disk; `now`, what whoever reads it sees; and the changes that lie between.

    The times are in ns.
    """

    durable: bytearray
    now: bytearray
    durable_time: int
    time: int
    pending: list[Entry] = field(default_factory=list)

    @classmethod
    def of(cls, data: bytes, time: int) -> File:
        """One that is on disk."""
        return cls(bytearray(data), bytearray(data), time, time)

    def change(self, entry: Entry) -> None:
        """Something is written that may or may not be on disk when the power fails."""
        _apply(self.now, entry)
        self.time = entry.modified
        self.pending.append(entry)

    def flush(self, *, times: bool) -> None:
        """All of it is on disk."""
        for entry in self.pending:
            _apply(self.durable, entry)
        self.pending.clear()
        if times:
            self.durable_time = self.time

    def torn(self, *, first: bool) -> bytearray:
        """What is on disk if of all that was written only the first sector has got there, or all but that."""
        found = bytearray(self.durable)
        for entry in self.pending:
            for part in _split(entry, SECTOR):
                if (part.at < SECTOR) == first:
                    _apply(found, part)
        return found

    def some(self, chance: random.Random) -> bytearray:
        """What is on disk if only some has got there: all or nothing of a file, of a write, or of each sector of one."""
        piece = chance.choice((0, 0, PAGE, SECTOR, 1 << 40))
        if piece == 0:
            return bytearray(self.now if chance.random() < 0.5 else self.durable)
        found = bytearray(self.durable)
        for entry in self.pending:
            for part in _split(entry, piece):
                if chance.random() < 0.5:
                    _apply(found, part)
        return found


def _split(entry: Entry, piece: int) -> Iterator[Entry]:
    """The pieces of a write, as they would reach a disk: aligned."""
    if entry.what != "w":
        yield entry
        return
    start, end = entry.at, entry.at + entry.length
    while start < end:
        stop = min(end, (start // piece + 1) * piece)
        yield Entry("w", entry.inode, start, stop - start, 0, entry.data[start - entry.at : stop - entry.at])
        start = stop


def _apply(data: bytearray, entry: Entry) -> None:
    match entry.what:
        case "w":
            _grow(data, entry.at + entry.length)
            data[entry.at : entry.at + entry.length] = entry.data
        case "z":
            end = min(len(data), entry.at + entry.length)
            if end > entry.at:
                data[entry.at : end] = bytes(end - entry.at)
        case "e":
            _grow(data, entry.length)
        case "t":
            del data[entry.length :]
            _grow(data, entry.length)


def _grow(data: bytearray, size: int) -> None:
    if size > len(data):
        data.extend(bytes(size - len(data)))


class Disk:
    """Files as a log makes them, and what of them is on disk.

    Args:
        root: where they lie.
        kept: where each inode has a second name, its number, so that it is there whatever becomes of the others.
        names: path -> inode, 0 for a folder.
        files: inode -> contents.
    """

    def __init__(self, root: Path, kept: Path, names: dict[str, int], files: dict[int, File]) -> None:
        self._root = root
        self._kept = kept
        self._now = names
        self._durable = dict(names)
        self._pending: list[Entry] = []
        self._files = files

    def go_on(self, entry: Entry) -> None:
        """Follow the log by an entry."""
        match entry.what:
            case "w" | "z" | "e" | "t":
                self._files[entry.inode].change(entry)
            case "s" | "f":
                self._files[entry.inode].flush(times=entry.what == "s")
            case "d":
                self._flush_folder(entry.data.decode())
            case _:
                if entry.what == "c":
                    self._files[entry.inode] = File.of(b"", entry.modified)
                _rename(self._now, entry)
                self._pending.append(entry)

    def _flush_folder(self, folder: str) -> None:
        left = []
        for entry in self._pending:
            if os.path.dirname(entry.data.split(b"\0")[-1].decode()) == folder:
                _rename(self._durable, entry)
            else:
                left.append(entry)
        self._pending = left

    @property
    def unflushed(self) -> list[str]:
        """The files that have contents, or a name, that are not on disk."""
        found = {path for path, inode in self._now.items() if inode and self._files[inode].pending}
        return sorted(found | {entry.data.split(b"\0")[-1].decode() for entry in self._pending})

    def seen(self, path: Path) -> bytes:
        """What whoever reads a file sees now, flushed or not."""
        return bytes(self._files[self._now[str(path)]].now)

    def require_recorded(self) -> None:
        """Compare the real files with what they are by the log.

        Raises:
            NotRecorded: with the first that differs.
        """
        for path in sorted(self._root.rglob("*")):
            if path.is_file() and not path.name.endswith(FORGOTTEN):
                if str(path) not in self._now:
                    raise NotRecorded(f"nothing is recorded of {path}")
                if path.read_bytes() != self.seen(path):
                    raise NotRecorded(f"{path} is not what was recorded of it")
        for name in self._now:
            if not os.path.lexists(name):
                raise NotRecorded(f"{name} is not there, and nobody is known to have removed it")

    def lose_power(self, left: str) -> None:
        """Make the real files those that are left when the power fails now, each with the inode that it had.

        Args:
            left: of what was not flushed: `none`, `all`, `first` (of each file its first sector, in which a header
                begins), `others` (all but that), or a seed that chooses some. Of names some is a beginning: file systems
                keep their order.
        """
        names, contents = self._left(left)
        for path in sorted(self._root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        for name in sorted(names):
            inode = names[name]
            with contextlib.suppress(FileNotFoundError):  # the folder that it lay in has no name
                if inode == 0:
                    os.mkdir(name, 0o700)
                    continue
                second = self._kept / str(inode)
                data, modified = contents[inode]
                second.write_bytes(data)
                os.utime(second, ns=(modified, modified))
                os.link(second, name)

    def _left(self, left: str) -> tuple[dict[str, int], dict[int, tuple[bytearray, int]]]:
        """The names, and each inode's contents and time."""
        if left == "none":
            return self._durable, {inode: (file.durable, file.durable_time) for inode, file in self._files.items()}
        if left == "all":
            return self._now, {inode: (file.now, file.time) for inode, file in self._files.items()}
        if left in ("first", "others"):
            found = {inode: (file.torn(first=left == "first"), file.time) for inode, file in self._files.items()}
            return self._durable if left == "first" else self._now, found
        chance = random.Random(left)  # noqa: S311 - it has to be found again, not to be a secret
        names = dict(self._durable)
        for entry in self._pending[: chance.randint(0, len(self._pending))]:
            _rename(names, entry)
        times = {inode: chance.choice((file.durable_time, file.time)) for inode, file in self._files.items()}
        return names, {inode: (file.some(chance), times[inode]) for inode, file in self._files.items()}


def _rename(names: dict[str, int], entry: Entry) -> None:
    path = entry.data.decode()
    match entry.what:
        case "c":
            names[path] = entry.inode
        case "m":
            names[path] = 0
        case "u":
            names.pop(path, None)
        case "r":
            old, new = path.split("\0")
            if old in names:
                names[new] = names.pop(old)
