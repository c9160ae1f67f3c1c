"""The words of the NBD protocol that are used here, and what they say of an export.

Source: NetworkBlockDevice/nbd, doc/proto.md.
"""

from __future__ import annotations

import struct

GREETING, NEW_STYLE = b"NBDMAGIC", b"IHAVEOPT"
# What a client answers to the greeting.
FIXED_NEW_STYLE = struct.pack(">I", 1)
ABORT, INFO, GO, STRUCTURED_REPLY, SET_META_CONTEXT = 2, 6, 7, 8, 10  # options
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, kind, length
OPTION_REPLY_MAGIC = 0x3E889045565A9
ACK, INFO_REPLY, META_CONTEXT, ERROR = 1, 3, 4, 1 << 31  # kinds of replies to options
UNSUPPORTED, TLS_REQUIRED, UNKNOWN = ERROR + 1, ERROR + 5, ERROR + 6
REPLY_BYTES_MAX = 64 * 1024
READ_ONLY, SEND_FLUSH, MULTI_CONN = 2, 4, 256  # of an export's flags
_EXPORT = 0  # kind of information: size and flags

REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
REQUEST_MAGIC = 0x25609513
READ, DISCONNECT, FLUSH, BLOCK_STATUS = 0, 2, 3, 7
ANSWER = struct.Struct(">IIQ")  # magic, error, cookie: a simple reply
DO_NOT_FRAGMENT = 4  # of a read: one chunk with all the data, also where there are holes
CHUNK = struct.Struct(">IHHQI")  # magic, flags, kind, cookie, length
CHUNK_MAGIC = 0x668E33EF
DONE = 1  # of a chunk's flags: the last one of its reply
NOTHING, DATA, STATUS, CHUNK_ERROR = 0, 1, 5, 1 << 15  # kinds of chunks
ALLOCATION = "base:allocation"
ZERO = 2  # of a range's flags in ALLOCATION: it reads as zeroes
DIRTY = 1  # of a range's flags in a dirty bitmap's context


def dirty_bitmap(name: str) -> str:
    """QEMU's context of a dirty bitmap (docs/interop/nbd.txt)."""
    return f"qemu:dirty-bitmap:{name}"


def option(number: int, data: bytes = b"") -> bytes:
    """An option as a client sends it."""
    return NEW_STYLE + struct.pack(">II", number, len(data)) + data


def text(words: str) -> bytes:
    """A string with its length before it."""
    encoded = words.encode()
    return struct.pack(">I", len(encoded)) + encoded


def export_wanted(name: str) -> bytes:
    """The data of INFO and GO: an export, and no information beyond what is always given."""
    return text(name) + struct.pack(">H", 0)


def export_info(kind: int, data: bytes) -> tuple[int, int] | None:
    """Size and flags of an export, if that is what a reply to INFO or GO has."""
    if kind != INFO_REPLY or len(data) < 12 or struct.unpack_from(">H", data)[0] != _EXPORT:
        return None
    _kind, size, flags = struct.unpack_from(">HQH", data)
    return size, flags


def refusal(kind: int, name: str, data: bytes) -> str:
    """What a server does that says no to an export."""
    if kind == UNKNOWN:
        return f"has no export {name!r}"
    if kind == TLS_REQUIRED:
        return "wants TLS, which is not carried out"
    return f"refuses: {data.decode(errors='replace') or hex(kind)}"
