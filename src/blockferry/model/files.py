"""What is known of files before a plan is made: looked up by qemu.images, judged by the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from blockferry.model.graph import InternalSnapshot

Kind = Literal["absent", "file", "directory", "block", "other"]


class FileFact(msgspec.Struct, frozen=True, kw_only=True):
    """What a path is.

    Attributes:
        path: as it was asked for.
        real: with links resolved, for comparing.
        kind: what is there.
        problem: why it can't be created, or written to when it is there, in the system's words; None when it can.
        device: its file system's number, for adding up what goes onto one.
        free: bytes free on its file system.
        allocated: bytes that it takes up now.
        size: bytes from its beginning to its end; a device's capacity.
        used: whether a QEMU (or one of its tools) has it open: it holds a lock on it.
        identity: what is the same for every name of the file, hard links too; empty where there is none.
    """

    path: str
    real: str
    kind: Kind
    problem: str | None = None
    device: int = 0
    free: int = 0
    allocated: int = 0
    size: int = 0
    used: bool = False
    identity: str = ""

    def is_same(self, other: FileFact) -> bool:
        """Whether both paths lead to one file."""
        return self.real == other.real or (self.identity != "" and self.identity == other.identity)


class FileStamp(msgspec.Struct, frozen=True, kw_only=True):
    """What tells a file that was touched from one that was not: which it is, its bytes, and when it changed (ns)."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    def holds(self, found: FileStamp | None) -> bool:
        """Whether the file holds what it held: it may have got another owner, mode or name since."""
        return found is not None and msgspec.structs.replace(found, changed=self.changed) == self


class ImageFact(msgspec.Struct, frozen=True, kw_only=True):
    """What an existing image's header says, read with the driver that was named: formats are never probed.

    Attributes:
        path: the file.
        format: the driver that it was read with.
        virtual_size: bytes.
        backing: the backing file as an absolute path; None when it stands alone.
        backing_format: the format that the header names for it; None when it names none.
        real_backing: the backing file with links resolved, for comparing.
        problem: why it can't be read or followed; the rest means nothing then.
        device: whether it is on a block device, which QEMU opens otherwise than a file.
        snapshots: those inside it, of a qcow2.
    """

    path: str
    format: str
    virtual_size: int = 0
    backing: str | None = None
    backing_format: str | None = None
    real_backing: str | None = None
    problem: str | None = None
    device: bool = False
    snapshots: tuple[InternalSnapshot, ...] = ()


class ExportFact(msgspec.Struct, frozen=True, kw_only=True):
    """What an NBD server says of an export.

    Attributes:
        uri: the export's.
        size: bytes; None when the server does not say before it is opened.
        problem: why nothing can be written to it; None when it can.
        multi_conn: whether it takes several clients at a time, a flush of one being a flush of all.
        flushes: whether it knows flushes.
    """

    uri: str
    size: int | None = None
    problem: str | None = None
    multi_conn: bool = False
    flushes: bool = False


# Each disk's images by its target, the active one first; of an empty drive none.
Chains = Mapping[str, tuple[ImageFact, ...]]


class Renamed(msgspec.Struct, frozen=True, kw_only=True):
    """A qcow2 image into whose header QEMU is about to write another backing file's name.

    Attributes:
        path: the image.
        was: what its header names, with that one's format.
        becomes: what it is to name; (None, None) for nothing.
    """

    path: str
    was: tuple[str, str]
    becomes: tuple[str | None, str | None]
