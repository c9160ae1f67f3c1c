"""Reading an NBD export on a Unix socket: its data, and what its server says of its blocks.

A client blocks, and belongs to one thread; `close` may be called from any. `qemu.nbd` asks a server before a guest is made
to depend on it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from typing import Self

from blockferry.qemu import nbdwire as wire

# A server that has sent nothing for this long hangs: its storage, or itself.
SILENCE_SECONDS = 30.0
# QEMU answers at most 32 MiB of data, and some thousands of ranges, at once (nbd/server.c).
_CHUNK_BYTES_MAX = 33 << 20


class NbdFailed(Exception):
    """A server does not give what it was asked for, or is gone: what it does, in words."""


class NbdClient:
    """A connection to one export, from the handshake on.

    Args:
        link: connected to the server; owned from now on.
        export: its name.
        context: what the server is asked of its blocks: `base:allocation`, or a dirty bitmap's.

    Raises:
        NbdFailed: it is no NBD server, or has no such export or context.
    """

    def __init__(self, link: socket.socket, export: str, context: str) -> None:
        self._link = link
        # The kernel's own time-outs: a socket with Python's would return with what has come so far, read by read.
        limit = struct.pack("ll", int(SILENCE_SECONDS), 0)
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._cookie = 0
        try:
            self.size = self._open(export, context)
        except BaseException:
            link.close()
            raise

    @classmethod
    def connect(cls, path: str, export: str, context: str = wire.ALLOCATION) -> Self:
        """Connect to a server's socket.

        Raises:
            NbdFailed: nobody listens there, or as of the class.
        """
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.settimeout(SILENCE_SECONDS)
            link.connect(path)
        except OSError as error:
            link.close()
            raise NbdFailed(f"can't be reached: {error.strerror or error}") from error
        return cls(link, export, context)

    def close(self) -> None:
        """End the connection; a thread that waits for an answer gets none."""
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
        self._link.close()

    # --- handshake --------------------------------------------------------------------------------------------

    def _open(self, export: str, context: str) -> int:
        """Open the export; its size in bytes."""
        if self._take(16) != wire.GREETING + wire.NEW_STYLE:
            raise NbdFailed("does not speak NBD")
        self._take(2)
        self._send(wire.FIXED_NEW_STYLE)
        self._option(wire.STRUCTURED_REPLY, b"", export)
        asked = wire.text(export) + struct.pack(">I", 1) + wire.text(context)
        if wire.META_CONTEXT not in dict(self._option(wire.SET_META_CONTEXT, asked, export)):
            raise NbdFailed(f"does not know {context} of its export {export!r}")
        for kind, data in self._option(wire.GO, wire.export_wanted(export), export):
            info = wire.export_info(kind, data)
            if info is not None:
                return info[0]
        raise NbdFailed("does not say what size its export has")

    def _option(self, number: int, data: bytes, export: str) -> list[tuple[int, bytes]]:
        """Negotiate an option: the replies, kind and data, before it was acknowledged."""
        self._send(wire.option(number, data))
        replies: list[tuple[int, bytes]] = []
        while True:
            magic, _option, kind, length = wire.OPTION_REPLY.unpack(self._take(wire.OPTION_REPLY.size))
            if magic != wire.OPTION_REPLY_MAGIC or length > wire.REPLY_BYTES_MAX:
                raise NbdFailed("does not speak NBD")
            answer = self._take(length)
            if kind & wire.ERROR:
                raise NbdFailed(wire.refusal(kind, export, answer))
            if kind == wire.ACK:
                return replies
            replies.append((kind, answer))

    # --- reading ----------------------------------------------------------------------------------------------

    def ask(self, offset: int, length: int) -> None:
        """Ask for data, of at most 32 MiB; `receive` takes them."""
        self._request(wire.READ, wire.DO_NOT_FRAGMENT, offset, length)

    def receive(self, buffer: memoryview) -> None:
        """Take the data that were asked for last.

        Raises:
            NbdFailed: they can't be read, or the server is gone.
        """
        wanted = len(buffer)
        for kind, length in self._chunks():
            if kind != wire.DATA or length != 8 + wanted:
                raise NbdFailed("answers a read with something else")
            self._take(8)
            self._fill(buffer)

    def ranges(self, offset: int, end: int, step: int) -> Iterator[tuple[int, int, int]]:
        """What the server says of a part of the export: start, length and flags of range after range.

        Args:
            offset: where it begins.
            end: where it ends.
            step: the bytes that are asked about at once, under 4 GiB.

        Raises:
            NbdFailed: it does not say, or is gone.
        """
        while offset < end:
            self._request(wire.BLOCK_STATUS, 0, offset, min(step, end - offset))
            before = offset
            for kind, length in self._chunks():
                data = self._take(length)
                if kind != wire.STATUS or length % 8 != 4:
                    raise NbdFailed("answers a question about its blocks with something else")
                for said, flags in struct.iter_unpack(">II", data[4:]):
                    # The last one may go beyond what was asked.
                    count = min(said, end - offset)
                    yield offset, count, flags
                    offset += count
            if offset == before:
                raise NbdFailed("says nothing about its blocks")

    def _request(self, command: int, flags: int, offset: int, length: int) -> None:
        self._cookie += 1
        self._send(wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, command, self._cookie, offset, length))

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """The chunks of the reply, kind and length; whoever iterates takes the data of each."""
        flags = 0
        while not flags & wire.DONE:
            magic, flags, kind, cookie, length = wire.CHUNK.unpack(self._take(wire.CHUNK.size))
            if magic != wire.CHUNK_MAGIC or cookie != self._cookie or length > _CHUNK_BYTES_MAX:
                raise NbdFailed("does not speak NBD")
            if kind & wire.CHUNK_ERROR:
                number, size = struct.unpack_from(">IH", data := self._take(length))
                words = data[6 : 6 + size].decode(errors="replace")
                raise NbdFailed(f"answers: {words}{': ' if words else ''}{os.strerror(number)}")
            if kind != wire.NOTHING:
                yield kind, length

    # --- bytes ------------------------------------------------------------------------------------------------

    def _send(self, data: bytes) -> None:
        try:
            self._link.sendall(data)
        except OSError as error:
            raise _gone(error) from error

    def _take(self, length: int) -> bytes:
        buffer = bytearray(length)
        self._fill(memoryview(buffer))
        return bytes(buffer)

    def _fill(self, buffer: memoryview) -> None:
        got = 0
        while got < len(buffer):
            try:
                count = self._link.recv_into(buffer[got:], flags=socket.MSG_WAITALL)
            except OSError as error:
                raise _gone(error) from error
            if not count:
                raise NbdFailed("has closed the connection")
            got += count


def _gone(error: OSError) -> NbdFailed:
    if isinstance(error, BlockingIOError):
        return NbdFailed(f"has said nothing for {SILENCE_SECONDS:g} s")
    return NbdFailed(f"is gone: {error.strerror or error}")
