"""Reading a qcow2 image's header without believing a byte of it: what it says is a guest's word, or anybody's.

QEMU's tools open more than the header (a data file, CVE-2024-4467) and take as long as it tells them to. Here only what
was asked for is read: the first cluster and the snapshots' table, both bounded. Source of the format: QEMU's
docs/interop/qcow2.rst; of the bounds: its block/qcow2.h.
"""

from __future__ import annotations

import struct

import msgspec

from blockferry.model.graph import InternalSnapshot

MAGIC = b"QFI\xfb"
# The header, its extensions and the backing file's name lie in the first cluster, of 2 MiB at most.
CLUSTER_BITS = range(9, 22)
CLUSTER_BYTES_MAX = 1 << 21
# An L1 entry stands for one L2 table; QEMU reads all of the L1 table when it opens the image.
L1_BYTES_MAX = 32 << 20
REFCOUNT_TABLE_BYTES_MAX = 8 << 20
BACKING_NAME_MAX = 1023
# QEMU takes 65536 snapshots of 1 KiB each and names of 64 KiB; nobody has made a thousand by hand.
SNAPSHOTS_MAX = 4096
SNAPSHOTS_BYTES_MAX = 4 << 20
# off_t's: where QEMU, and every file system, ends.
VIRTUAL_BYTES_MAX = (1 << 63) - 1

# Magic, version, backing offset and length, cluster bits, size, encryption, L1 entries and offset, refcount table's offset
# and clusters, snapshots and their offset.
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
# Version 3: three feature sets, refcount order, header's length.
_MORE = struct.Struct(">QQQII")
# L1 offset and entries, lengths of id and name, seconds and nanoseconds, clock, size of the state, length of what follows.
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_CORRUPT, _DATA_FILE = 1 << 1, 1 << 2
_END, _BACKING_FORMAT, _DATA_FILE_NAME = 0, 0xE2792ACA, 0x44415441


class BadHeader(Exception):
    """It is no qcow2 header, or one that promises what can't be."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a qcow2 header says.

    Attributes:
        virtual_size: bytes; a multiple of 512.
        cluster: bytes of a cluster.
        backing: the backing file's name, as it is written there; None for none.
        backing_format: the format that is named for it; None for none.
        encrypted: whether its data is.
        corrupt: whether QEMU has marked it so.
        data_file: the name of the file that has its data instead; None when it has them itself.
        snapshots: how many there are in it.
        snapshots_offset: where their table begins.
    """

    virtual_size: int
    cluster: int
    backing: str | None = None
    backing_format: str | None = None
    encrypted: bool = False
    corrupt: bool = False
    data_file: str | None = None
    snapshots: int = 0
    snapshots_offset: int = 0


def parse_header(first: bytes) -> Header:
    """Read a header.

    Args:
        first: the image's beginning: CLUSTER_BYTES_MAX bytes, or all of a shorter one.

    Raises:
        BadHeader: with what is wrong with it, in words that follow "it".
    """
    if len(first) < _HEADER.size or not first.startswith(MAGIC):
        raise BadHeader("is not in qcow2 format")
    (
        _magic,
        version,
        name_at,
        name_length,
        bits,
        size,
        crypt,
        l1_entries,
        _l1,
        _refcounts,
        refcount_clusters,
        count,
        at,
    ) = _HEADER.unpack_from(first)
    if version not in (2, 3):
        raise BadHeader(f"is a qcow2 of version {version}, and 2 and 3 are carried out")
    if bits not in CLUSTER_BITS:
        raise BadHeader(f"has clusters of 2^{bits} bytes")
    cluster = 1 << bits
    incompatible, length = 0, _HEADER.size
    if version == 3:
        if len(first) < _HEADER.size + _MORE.size:
            raise BadHeader("ends within its header")
        incompatible, _compatible, _autoclear, _order, length = _MORE.unpack_from(first, _HEADER.size)
        if not _HEADER.size + _MORE.size <= length <= cluster:
            raise BadHeader(f"has a header of {length} bytes")
    _check_sizes(size, cluster, l1_entries, refcount_clusters, count)
    first = first[:cluster]
    backing = _name(first, name_at, name_length, cluster) if name_at else None
    extensions = _extensions(first, length, name_at or cluster)
    data_file = None
    if incompatible & _DATA_FILE:
        data_file = _text(extensions.get(_DATA_FILE_NAME, b"")) or "one without a name"
    return Header(
        virtual_size=size // 512 * 512,
        cluster=cluster,
        backing=backing,
        backing_format=_text(extensions[_BACKING_FORMAT]) if backing and _BACKING_FORMAT in extensions else None,
        encrypted=crypt != 0,
        corrupt=bool(incompatible & _CORRUPT),
        data_file=data_file,
        snapshots=count,
        snapshots_offset=at,
    )


def without_name(first: bytes) -> bytes:
    """A header's bytes, of which none says that there is a backing file."""
    return first[:8] + bytes(12) + first[20:]


def _check_sizes(size: int, cluster: int, l1_entries: int, refcount_clusters: int, snapshots: int) -> None:
    if size > VIRTUAL_BYTES_MAX:
        raise BadHeader(f"promises a disk of {size} bytes")
    if l1_entries * 8 > L1_BYTES_MAX:
        raise BadHeader(f"has an L1 table of {l1_entries} entries")
    if l1_entries * (cluster // 8) * cluster < size:
        raise BadHeader(f"promises a disk of {size} bytes, and its L1 table has {l1_entries} entries")
    if refcount_clusters * cluster > REFCOUNT_TABLE_BYTES_MAX:
        raise BadHeader(f"has a refcount table of {refcount_clusters} clusters")
    if snapshots > SNAPSHOTS_MAX:
        raise BadHeader(f"has {snapshots} snapshots in it, and {SNAPSHOTS_MAX} are read")


def _name(first: bytes, at: int, length: int, cluster: int) -> str | None:
    if length > BACKING_NAME_MAX or at + length > min(cluster, len(first)):
        raise BadHeader(f"has its backing file's name, of {length} bytes, at {at}")
    return _text(first[at : at + length]) or None


def _text(name: bytes) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError as error:
        raise BadHeader("has a name in it that is not UTF-8") from error
    if not text.isprintable():
        raise BadHeader(f"has a name with a control character in it, {text[:80]!r}")
    return text


def _extensions(first: bytes, start: int, end: int) -> dict[int, bytes]:
    """Those after the header, by kind; they end with one that says so, or where the backing file's name begins."""
    found: dict[int, bytes] = {}
    end = min(end, len(first))
    while start + 8 <= end:
        kind, length = struct.unpack_from(">II", first, start)
        if kind == _END:
            break
        start += 8
        if length > end - start:
            raise BadHeader(f"has a header extension of {length} bytes")
        found.setdefault(kind, first[start : start + length])
        start += -(-length // 8) * 8
    return found


def parse_snapshots(table: bytes, count: int) -> tuple[InternalSnapshot, ...]:
    """Read the snapshots' table.

    Args:
        table: from its beginning: SNAPSHOTS_BYTES_MAX bytes, or to the image's end.
        count: how many the header says that there are.

    Raises:
        BadHeader: it is longer, or ends before.
    """
    found: list[InternalSnapshot] = []
    at = 0
    for _each in range(count):
        if at + _SNAPSHOT.size > len(table):
            raise BadHeader(f"says that it has {count} snapshots, and their table ends after {len(found)}")
        _l1, _entries, id_length, name_length, seconds, nanoseconds, _clock, state, more = _SNAPSHOT.unpack_from(
            table, at
        )
        at += _SNAPSHOT.size
        end = at + more + id_length + name_length
        if end > len(table):
            raise BadHeader(f"says that it has {count} snapshots, and their table ends after {len(found)}")
        if more >= 8:
            (state,) = struct.unpack_from(">Q", table, at)
        at += more
        found.append(
            InternalSnapshot(
                id=table[at : at + id_length].decode(errors="replace"),
                name=table[at + id_length : end].decode(errors="replace"),
                created=seconds + nanoseconds / 1e9,
                memory=state,
            )
        )
        at = -(-end // 8) * 8
    return tuple(found)
