"""What is known of a disk that is compared, chunk by chunk: a byte each, 16 MiB for a disk of 1 TiB."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

from blockferry.plan.tracking import CHUNK

# Of a chunk: it reads as zeroes on both sides; has to be read; differs; differs, and the guest has written there; is in no
# sample.
ZERO, UNREAD, DIFFERENT, WRITTEN, PASSED_OVER = range(5)
# A sample has one chunk of so many of the data, and at least this much of them.
SAMPLE_ONE_OF = 100
SAMPLE_BYTES_MIN = 16 << 20
# Where a file system keeps its own tables: ext4 begins a block group every 128 MiB (32768 blocks of 4 KiB), and other
# file systems keep something there as often as anywhere.
GROUP_BYTES = 128 << 20


class Chunks:
    """The chunks of one disk; several threads may mark different ones.

    Args:
        size: the disk's bytes; the last chunk may be shorter than the others.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._states = bytearray(-(-size // CHUNK))

    def mark(self, start: int, length: int, state: int) -> None:
        """Say what all chunks are that these bytes touch."""
        first, end = start // CHUNK, -(-(start + length) // CHUNK)
        self._states[first:end] = bytes([state]) * (end - first)

    def change(self, start: int, length: int, old: int, new: int) -> None:
        """Say of the chunks that these bytes touch, and that are `old`, that they are `new`."""
        first, end = start // CHUNK, -(-(start + length) // CHUNK)
        self._states[first:end] = self._states[first:end].replace(bytes([old]), bytes([new]))

    def bytes_in(self, state: int) -> int:
        """How many bytes of the disk are so."""
        count = self._states.count(state) * CHUNK
        if self._states and self._states[-1] == state:
            count -= len(self._states) * CHUNK - self.size
        return count

    def runs(self, state: int, longest: int | None = None) -> Iterator[tuple[int, int]]:
        """The parts (offset, length) of the disk that are so, each of at most `longest` bytes, a multiple of a chunk's."""
        most = b"{1,%d}" % (longest // CHUNK) if longest is not None else b"+"
        for found in re.finditer(re.escape(bytes([state])) + most, self._states):
            start, end = found.span()
            yield start * CHUNK, min(end * CHUNK, self.size) - start * CHUNK

    def span(self, state: int) -> tuple[int, int] | None:
        """From where to where the disk has chunks that are so; None when none is."""
        first = self._states.find(state)
        return None if first < 0 else (first * CHUNK, min((self._states.rfind(state) + 1) * CHUNK, self.size))

    def sample(self, seed: str) -> None:
        """Leave some of the unread chunks to be read, and pass the others over.

        They are one of a hundred and at least 16 MiB: the disk's first and last one, those at the beginning of its groups of
        128 MiB (as far as they are no more than half), and others at random.

        Args:
            seed: the same one chooses the same chunks of the same disk.
        """
        unread = self._states.count(UNREAD)
        room = max(SAMPLE_BYTES_MIN // CHUNK, unread // SAMPLE_ONE_OF)
        if unread <= room:
            return
        chance = Random(seed)  # noqa: S311 - nobody gains from guessing it
        groups = [index for index in range(0, len(self._states), GROUP_BYTES // CHUNK) if self._states[index] == UNREAD]
        kept = set(groups if len(groups) <= room // 2 else chance.sample(groups, room // 2))
        kept |= {index for index in (0, len(self._states) - 1) if self._states[index] == UNREAD}
        kept |= set(self._nth_unread(sorted(chance.sample(range(unread), room - len(kept)))))
        self._states = self._states.replace(bytes([UNREAD]), bytes([PASSED_OVER]))
        for index in kept:
            self._states[index] = UNREAD

    def _nth_unread(self, ordinals: list[int]) -> Iterator[int]:
        """Where the n-th unread chunks are, counted from 0, for each n of an ascending list."""
        left = iter(ordinals)
        ordinal = next(left, None)
        passed = 0
        for start, length in self.runs(UNREAD):
            count = -(-length // CHUNK)
            while ordinal is not None and ordinal < passed + count:
                yield start // CHUNK + ordinal - passed
                ordinal = next(left, None)
            passed += count
