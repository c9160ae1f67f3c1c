"""Looking at one closed image: what its header says, or how long it is. Nothing else is opened, nothing is probed."""

from __future__ import annotations

import os
import stat

from blockferry.model.files import ImageFact, Renamed
from blockferry.model.graph import InternalSnapshot
from blockferry.qemu.header import (
    CLUSTER_BYTES_MAX,
    SNAPSHOTS_BYTES_MAX,
    BadHeader,
    Header,
    parse_header,
    parse_snapshots,
    without_name,
)


def inspect_image(path: str, real: str, image_format: str) -> ImageFact:
    """What an image is; what is wrong with it is in `problem`.

    Args:
        path: its path.
        real: the same with links resolved, when it was decided that it may be opened.
        image_format: `qcow2` or `raw`, which the caller knows.
    """
    try:
        descriptor = _open(path, real)
        try:
            if image_format == "raw":
                return ImageFact(path=path, format="raw", virtual_size=_sectors(descriptor), device=_device(descriptor))
            return _qcow2(path, descriptor)
        finally:
            os.close(descriptor)
    except (OSError, BadHeader) as error:
        words = error.strerror or str(error) if isinstance(error, OSError) else f"it {error}"
        return ImageFact(path=path, format=image_format, problem=words)


def read_header(path: str) -> Header:
    """The header of a qcow2 image that a caller names.

    Raises:
        OSError, BadHeader: it can't be read, or is none.
    """
    return parse_header(_beginning(path))


def read_nameless(path: str) -> Header:
    """As `read_header`, whatever stands where the backing file's name is to be."""
    return parse_header(without_name(_beginning(path)))


def _beginning(path: str) -> bytes:
    descriptor = _open(path, os.path.realpath(path))
    try:
        return os.pread(descriptor, CLUSTER_BYTES_MAX, 0)
    finally:
        os.close(descriptor)


def is_whole(path: str, header: Renamed) -> bool:
    """Whether an image's header names one of the two; an image that is not there has none to be mended."""
    try:
        found = read_header(path)
    except FileNotFoundError:
        return True
    except (OSError, BadHeader):
        return False

    def full(name: str | None) -> str | None:
        return os.path.normpath(os.path.join(os.path.dirname(path), name)) if name is not None else None

    # An old image's header may name no format.
    return any(
        full(found.backing) == full(name) and found.backing_format in (image_format, None)
        for name, image_format in (header.was, header.becomes)
    )


def refusal(header: Header) -> str | None:
    """What an image has that can't be carried out; QEMU would find it when it opens the image, or follow it."""
    if header.encrypted:
        return "it is encrypted, and no key is given to QEMU"
    if header.corrupt:
        return "it is marked corrupt: `qemu-img check -r all` repairs it"
    if header.data_file is not None:
        return f"its data lie in another file, {header.data_file}, which is not followed"
    if header.backing is not None and ":" in header.backing.split("/", 1)[0]:
        return f"its backing {header.backing!r} is no plain file name"
    return None


def _open(path: str, real: str) -> int:
    """Open a file or block device for reading if it is the one that was looked at.

    It is found first and opened then: to open a FIFO or some devices is to do something to them, and who may write to a
    folder can put another file there meanwhile.
    """
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        held = f"/proc/self/fd/{found}"
        mode = os.fstat(found).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise BadHeader("is neither a file nor a block device")
        if os.readlink(held) != real:
            raise BadHeader("became another file while it was looked at")
        return os.open(held, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(found)


def _qcow2(path: str, descriptor: int) -> ImageFact:
    header = parse_header(os.pread(descriptor, CLUSTER_BYTES_MAX, 0))
    problem = refusal(header)
    if problem is not None:
        return ImageFact(path=path, format="qcow2", problem=problem)
    backing = os.path.join(os.path.dirname(path), header.backing) if header.backing is not None else None
    return ImageFact(
        path=path,
        format="qcow2",
        virtual_size=header.virtual_size,
        backing=backing,
        backing_format=header.backing_format,
        real_backing=os.path.realpath(backing) if backing is not None else None,
        device=_device(descriptor),
        snapshots=_snapshots(descriptor, header),
    )


def _snapshots(descriptor: int, header: Header) -> tuple[InternalSnapshot, ...]:
    if header.snapshots == 0:
        return ()
    try:
        table = os.pread(descriptor, SNAPSHOTS_BYTES_MAX, header.snapshots_offset)
    except (OSError, OverflowError) as error:
        raise BadHeader(f"has its snapshots' table at {header.snapshots_offset}") from error
    return parse_snapshots(table, header.snapshots)


def _device(descriptor: int) -> bool:
    return stat.S_ISBLK(os.fstat(descriptor).st_mode)


def _sectors(descriptor: int) -> int:
    """A raw image's size as QEMU has it, in whole sectors."""
    return -(-os.lseek(descriptor, 0, os.SEEK_END) // 512) * 512
