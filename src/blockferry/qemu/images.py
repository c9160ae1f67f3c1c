"""Image files: looking at them, claiming, creating, removing. Formats are never probed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import stat
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from blockferry.model.files import FileFact, FileStamp, ImageFact, Kind, Renamed
from blockferry.qemu.bounded import bounded
from blockferry.qemu.folders import folder_of
from blockferry.qemu.header import BadHeader, Header
from blockferry.qemu.inspect import inspect_image, is_whole, read_header, read_nameless, refusal
from blockferry.qemu.paths import ask_each, identity_of
from blockferry.qemu.qcow2 import empty_image
from blockferry.qemu.roots import StorageRoots
from blockferry.qemu.syncing import flush_files, opened, sync_file, sync_folder, touch
from blockferry.qemu.tool import ImageError, QemuImg

P = ParamSpec("P")
T = TypeVar("T")

# A chain longer than libvirt's own limit (virstoragefile, 200) is a loop or an attack.
CHAIN_MAX = 200
# What asks a file system for no data is answered in milliseconds; one that hangs can't be waited for.
FILE_SECONDS = 30.0
# What was written and not flushed yet may be gigabytes, to a disk that takes 100 MB/s.
SYNC_SECONDS = 60.0
# The status with which `qemu-img check` ends for an image that takes up more than it needs, and is in order.
_LEAKS = 3
# That an image can be read is seen at its beginning, where a qcow2 has its tables too.
BEGINNING_BYTES = 1 << 20


class Images:
    """Image files on this host.

    Args:
        roots: where they may lie.
        qemu_img: the qemu-img to run; None finds it beside the QEMU that is used, or on PATH.

    Attributes:
        program: that one.
        server: the qemu-nbd beside it.
    """

    def __init__(self, roots: StorageRoots | None = None, qemu_img: str | None = None) -> None:
        self._roots = roots or StorageRoots()
        self._tool = QemuImg(qemu_img)
        self.program = self._tool.program
        self.server = os.path.join(os.path.dirname(self.program), "qemu-nbd")

    async def facts(self, paths: tuple[str, ...]) -> dict[str, FileFact]:
        """What each of these paths is; of a file that is there it is asked whether it is locked."""
        found = await ask_each(self._fact, paths, FILE_SECONDS)
        return {path: found[path] if path in found else _unknown(path, _hangs(path, FILE_SECONDS)) for path in paths}

    def _fact(self, path: str) -> FileFact:
        try:
            return _fact(path, self._roots)
        except ImageError as error:
            return _unknown(path, str(error))

    async def chain(self, path: str, image_format: str, known: Iterable[str] = ()) -> tuple[ImageFact, ...]:
        """A closed chain's images as their headers say, top first, from `path`, whose format the caller knows.

        A problem ends the chain in a fact that says so; nothing is raised, and the file is not opened.

        Args:
            path: an image that a caller names, or that QEMU has open.
            image_format: its format.
            known: others of that kind: what a header names has to be, or to lie near, one of them.
        """
        try:
            return await _bounded(self._chain, path, image_format, (path, *known))
        except ImageError as hung:
            return (ImageFact(path=path, format=image_format, problem=str(hung)),)

    def _chain(self, path: str, image_format: str, known: tuple[str, ...]) -> tuple[ImageFact, ...]:
        facts: list[ImageFact] = []
        next_path: str | None = path
        next_format: str | None = image_format
        seen: set[str] = set()
        while next_path is not None:
            real = os.path.realpath(next_path)
            problem = _follow_problem(next_format, real in seen or len(seen) >= CHAIN_MAX)
            problem = problem or (
                self._roots.refuses_backing(next_path, known) if facts else self._roots.refuses(next_path)
            )
            seen.add(real)
            if problem:
                facts.append(ImageFact(path=next_path, format=next_format or "", problem=problem))
                break
            fact = inspect_image(next_path, real, str(next_format))
            facts.append(fact)
            if fact.problem:
                break
            next_path, next_format = fact.backing, fact.backing_format
        return tuple(facts)

    async def holds_data(self, path: str) -> bool:
        """Whether a closed qcow2 overlay has any data of its own."""
        await _bounded(_require_plain, path)
        alone = {"driver": "qcow2", "file": {"driver": "file", "filename": path}, "backing": None}
        out = await self._tool.run("map", "-U", "--output=json", f"json:{json.dumps(alone)}")
        return any(extent.get("present", extent["data"]) for extent in json.loads(out))

    async def data(self, path: str, image_format: str) -> tuple[tuple[int, int], ...]:
        """The extents (offset, length) of a closed image that hold data of its own, neighbours joined, by its allocation.

        Raises:
            ImageError: in qemu-img's own words.
        """
        alone: dict[str, Any] = {"driver": image_format, "file": {"driver": "file", "filename": path}}
        if image_format == "qcow2":
            await _bounded(_require_plain, path)
            alone["backing"] = None
        found: list[tuple[int, int]] = []
        for each in json.loads(await self._tool.run("map", "--output=json", f"json:{json.dumps(alone)}")):
            start, length = each["start"], each["length"]
            if not each["data"]:
                continue
            if found and sum(found[-1]) == start:
                start, length = found[-1][0], found.pop()[1] + length
            found.append((start, length))
        return tuple(found)

    async def unit(self, path: str, image_format: str) -> int:
        """The bytes that a closed image allocates at once: of what is less, its allocation does not tell what was written.

        Raises:
            ImageError: it can't be read, or its tables are not in order.
        """
        if image_format != "qcow2":
            return (await _bounded(os.stat, path)).st_blksize
        header = await _bounded(_require_plain, path)
        # Its backing is none of what is checked: only the image itself is opened.
        alone = {"driver": "qcow2", "file": {"driver": "file", "filename": path}, "backing": None}
        await self._tool.run("check", "-q", f"json:{json.dumps(alone)}", good=(0, _LEAKS))
        return header.cluster

    async def claim(self, path: str, like: str | None) -> dict[str, Any]:
        """Create an empty file exclusively, with owner and mode of `like` (0600 without); what it is, to be kept.

        Raises:
            ImageError: it exists, or can't be created.
        """
        return await _bounded(_claim, path, like)

    async def create(
        self,
        path: str,
        image_format: str,
        size: int,
        backing: str | None,
        backing_format: str | None,
        *,
        claim: Mapping[str, Any] | None = None,
    ) -> bool:
        """Write an empty image of `size` bytes into a claimed file; whether one can see that it holds nothing.

        Args:
            path: the file.
            image_format: `qcow2` or `raw`.
            size: bytes.
            backing: what its header is to name; None for nothing.
            backing_format: that one's format.
            claim: what `claim` answered, of a file that we made; any other file is left alone then.

        Raises:
            ImageError: in the system's or qemu-img's words.
        """
        blank = await _bounded(_create, path, image_format, size, backing, backing_format, claim=claim)
        if blank is not None:
            return blank
        # A block device: what is on it has to be dealt with, and qemu-img knows how.
        onto = ["-u", "-b", backing, "-F", str(backing_format)] if backing else []
        await self._tool.run("create", "-q", "-f", image_format, *onto, "--", path, str(size))
        await _bounded(sync_file, path)
        return False

    async def remove(self, path: str, identity: Mapping[str, Any] | None) -> bool:
        """Remove the file if it is the one that we claimed; whether it was.

        Args:
            path: the file.
            identity: what `claim` answered; None when we died before it could be kept. Then only an empty file goes:
                we write nothing into a file before its identity is in the journal.

        Raises:
            ImageError: it can't be removed.
        """
        return await _bounded(_remove, path, identity)

    async def drop(self, path: str) -> bool:
        """Remove a regular file unless a QEMU holds a lock on it; whether it was removed.

        Raises:
            ImageError: it can't be removed.
        """
        return await _bounded(_drop, path)

    async def name_backing(self, path: str, image_format: str, backing: str, backing_format: str) -> None:
        """Have a closed image's header name that backing file; its data stays as it is.

        Raises:
            ImageError: in qemu-img's words, or it would make qemu-img open another file.
        """
        await self._name_backing(path, image_format, backing, backing_format, read_header)

    async def mend_backing(self, header: Renamed) -> bool:
        """Have a closed image's header name what it did, if it names neither that nor what it was to name; whether it did not.

        Raises:
            ImageError: in qemu-img's words: somebody has it open, for one; or it would make qemu-img open another file.
        """
        if await _bounded(is_whole, header.path, header):
            return False
        await self._name_backing(header.path, "qcow2", *header.was, read_nameless)
        return True

    async def _name_backing(
        self, path: str, image_format: str, backing: str, backing_format: str, read: Callable[[str], Header]
    ) -> None:
        await _bounded(_require_plain, path, read)
        await self._tool.run("rebase", "-q", "-u", "-f", image_format, "-F", backing_format, "-b", backing, path)
        await _bounded(sync_file, path)

    async def stamps(self, paths: tuple[str, ...]) -> dict[str, FileStamp]:
        """What tells whether somebody touches these files from now on; what is no plain file, or hangs, has none."""
        found = await ask_each(stamp_of, paths, FILE_SECONDS)
        return {path: stamp for path, stamp in found.items() if stamp is not None}

    async def sync(self, paths: tuple[str, ...], readable: tuple[str, ...] = (), *, in_use: bool = False) -> None:
        """Call fdatasync on each file, read its beginning, and see whether its file system takes a change at all.

        On all at once: a disk takes them together, and what is written to one of them meanwhile would be to be flushed by whoever
        goes on from here. A file that is not there is not ours.

        Args:
            paths: the files.
            readable: those of them that have to be.
            in_use: whether somebody writes to them meanwhile, who is not to wait for that.

        Raises:
            ImageError: in the system's words; or nothing came back, and whoever uses the file hangs as well.
        """
        files = dict.fromkeys(paths)
        folders = dict.fromkeys(os.path.dirname(path) for path in files)
        work = [
            *(_bounded(sync_file, path, BEGINNING_BYTES, readable=path in readable, in_use=in_use) for path in files),
            *(_bounded(touch, folder) for folder in folders),
        ]
        for problem in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(problem, BaseException):
                raise problem

    async def flush(self, paths: tuple[str, ...]) -> None:
        """Call fdatasync on each file, one after the other: of those that are clean that is a tenth of what `sync` costs.

        Raises:
            ImageError: as of `sync`.
        """
        await _bounded(flush_files, paths)


async def _bounded(function: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T:
    """Call what may hang with the file system that it asks.

    Raises:
        ImageError: as the function; or it did not come back.
    """
    seconds = SYNC_SECONDS if function in (sync_file, touch, flush_files) else FILE_SECONDS
    try:
        return await bounded(seconds, function, *arguments, **named)
    except TimeoutError as error:
        raise ImageError(_hangs(str(arguments[0]), seconds)) from error


def _hangs(path: str, seconds: float) -> str:
    return f"{path}: its file system does not answer within {seconds:g} s"


def _unknown(path: str, problem: str) -> FileFact:
    return FileFact(path=path, real=path, kind="other", problem=problem)


def _follow_problem(image_format: str | None, looped: bool) -> str | None:
    if looped:
        return "its chain comes back to itself or is over 200 deep"
    if image_format not in ("qcow2", "raw"):
        return f"its format {image_format!r} is not qcow2 or raw" if image_format else "nothing says what format it has"
    return None


def _require_plain(path: str, read: Callable[[str], Header] = read_header) -> Header:
    """The header of a qcow2 image that qemu-img may be given.

    Raises:
        ImageError: it can't be read, or would make it open another file.
    """
    try:
        header = read(path)
    except (OSError, BadHeader) as error:
        words = error.strerror if isinstance(error, OSError) else f"it {error}"
        raise ImageError(f"{path}: {words}") from error
    problem = refusal(header)
    if problem is not None:
        raise ImageError(f"{path}: {problem}")
    return header


def _fact(path: str, roots: StorageRoots) -> FileFact:
    real = os.path.realpath(path)
    outside = roots.refuses(path)
    if outside is not None:
        return FileFact(path=path, real=real, kind="other", problem=outside)
    folder = os.path.dirname(real)
    kind: Kind = "absent"
    allocated = size = 0
    used = False
    identity = ""
    try:
        kind = _kind(os.lstat(path).st_mode)
        found = os.stat(path)
        kind, allocated, size = _kind(found.st_mode), found.st_blocks * 512, found.st_size
        identity = identity_of(found)
        if kind in ("file", "block"):
            used = _locked(path)
        if kind == "block":
            size, allocated = _capacity(path), 0
    except FileNotFoundError:
        pass
    except OSError as error:
        return FileFact(path=path, real=real, kind="other", problem=error.strerror)
    if not path.startswith("/"):
        return FileFact(path=path, real=real, kind=kind, problem="it is not an absolute path", allocated=allocated)
    try:
        room = os.statvfs(folder)
        device = os.stat(folder).st_dev
    except OSError as error:
        return FileFact(path=path, real=real, kind=kind, problem=f"{folder}: {error.strerror}", allocated=allocated)
    problem = None
    if kind == "block":
        # A device's room is its own, and its folder needs no new name.
        problem = _device_problem(path)
    elif kind == "file":
        problem = _file_problem(path)
    elif room.f_flag & os.ST_RDONLY:
        problem = f"{folder} is mounted read-only"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = f"{folder}: permission denied"
    return FileFact(
        path=path,
        real=real,
        kind=kind,
        problem=problem,
        device=device,
        free=room.f_bavail * room.f_frsize,
        allocated=allocated,
        size=size,
        used=used,
        identity=identity,
    )


def stamp_of(path: str) -> FileStamp | None:
    """What tells whether somebody touches a file from now on; None of what is no plain file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return FileStamp(
        device=found.st_dev,
        inode=found.st_ino,
        size=found.st_size,
        modified=found.st_mtime_ns,
        changed=found.st_ctime_ns,
    )


def _file_problem(path: str) -> str | None:
    """Why a file that is there is not to be written to, whoever QEMU runs as."""
    try:
        return os.strerror(errno.EROFS) if os.statvfs(path).f_flag & os.ST_RDONLY else None
    except OSError as error:
        return error.strerror


def _device_problem(path: str) -> str | None:
    """Why a block device is not to be written to: what is mounted, swap or part of a volume is open exclusively."""
    if not os.access(path, os.R_OK | os.W_OK):
        return "permission denied"
    try:
        with opened(path, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK):
            return None
    except OSError as error:
        return "it is mounted, or part of a volume" if error.errno == errno.EBUSY else error.strerror


def _capacity(path: str) -> int:
    """A block device's bytes: where its end is."""
    with opened(path, os.O_RDONLY) as descriptor:
        return os.lseek(descriptor, 0, os.SEEK_END)


def _locked(path: str) -> bool:
    """Whether a QEMU, or one of its tools, has the image open: its locks are open-file-description locks on these bytes.

    Source: QEMU's block/file-posix.c, RAW_LOCK_PERM_BASE (100) and RAW_LOCK_SHARED_BASE (200), one byte a permission.
    Only asked for, never taken (F_OFD_GETLK, fcntl(2)). An image opened with locking=off has none.
    """
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as descriptor:
        # struct flock: type, whence, start, length, pid.
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 200, 0)
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
        return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)


def _drop(path: str) -> bool:
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode) or _locked(path):
            return False
        os.unlink(path)
        sync_folder(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    return True


def _kind(mode: int) -> Kind:
    if stat.S_ISREG(mode) or stat.S_ISLNK(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "block" if stat.S_ISBLK(mode) else "other"


def _claim(path: str, like: str | None) -> dict[str, Any]:
    try:
        model = _stat(like) if like is not None else None
        with folder_of(path) as (folder, name):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(name, flags, 0o600, dir_fd=folder)
    except FileExistsError as error:
        raise ImageError(f"{path} exists already") from error
    except OSError as error:
        where = error.filename if str(error.filename).startswith("/") else path
        raise ImageError(f"{where}: {error.strerror}") from error
    try:
        if model is not None:
            # QEMU runs as whoever owns its images: a file of root's it could not open.
            if os.geteuid() == 0:
                os.fchown(descriptor, model.st_uid, model.st_gid)
            os.fchmod(descriptor, stat.S_IMODE(model.st_mode))
        made = os.fstat(descriptor)
    except OSError as error:
        # A step that failed has nothing to undo: it leaves no file.
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise ImageError(f"{path}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    sync_folder(path)
    return {"device": made.st_dev, "inode": made.st_ino}


def _stat(path: str) -> os.stat_result | None:
    """Owner and mode of an image; None of one that was deleted while QEMU has it open."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _create(
    path: str,
    image_format: str,
    size: int,
    backing: str | None,
    backing_format: str | None,
    *,
    claim: Mapping[str, Any] | None,
) -> bool | None:
    """Write an image into an empty regular file, and onto disk; None where it is none, with nothing done.

    Whether one can see that it holds nothing: not on a file system that has no holes, or does not tell.
    """
    try:
        # /dev/mapper/NAME is a link, so devices are followed; a file that we claimed is none.
        if stat.S_ISBLK(os.stat(path).st_mode):
            return None
        with opened(path, os.O_WRONLY | os.O_NOFOLLOW) as descriptor:
            found = os.fstat(descriptor)
            ours = claim is None or (found.st_dev, found.st_ino) == (claim["device"], claim["inode"])
            if not stat.S_ISREG(found.st_mode) or not ours:
                raise ImageError(f"{path} is not the file that was made there")
            # Nothing of a destination that is made anew is kept; of one that was just claimed there is nothing.
            os.ftruncate(descriptor, 0)
            if image_format == "qcow2":
                contents, length = empty_image(size, backing, backing_format)
                # Done twice it writes the same: nobody else has opened it yet.
                if os.pwrite(descriptor, contents, 0) != len(contents):
                    raise ImageError(f"{path}: {os.strerror(errno.ENOSPC)}")
            else:
                length = size
            os.ftruncate(descriptor, length)
            os.fdatasync(descriptor)
            return image_format == "qcow2" or _all_hole(descriptor)
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: {error.strerror if isinstance(error, OSError) else error}") from error


def _all_hole(descriptor: int) -> bool:
    """Whether a file has no data in it (lseek(2), SEEK_DATA); a file system that can't tell says that all is data."""
    try:
        os.lseek(descriptor, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno == errno.ENXIO
    return False


def _remove(path: str, identity: Mapping[str, Any] | None) -> bool:
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):
            return False
        ours = (
            found.st_size == 0
            if identity is None
            else (found.st_dev, found.st_ino) == (identity["device"], identity["inode"])
        )
        if ours:
            os.unlink(path)
            sync_folder(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    return ours
