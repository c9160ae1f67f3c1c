"""How fast moves may write to each storage: limits that all moves of the host share, changed while they run."""

from __future__ import annotations

import os

from blockferry.journal.journal import Journal
from blockferry.model.move import Move
from blockferry.plan.copy import is_uri
from blockferry.qemu.copier import Throttle


class Storages:
    """The storages of a host, by the file system that they are on.

    What is copied outside QEMU takes leave of one throttle a storage; mirrors, which QEMU limits each by itself, get an equal
    part each of what the storage may take.

    Args:
        journal: where limits are kept.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._throttles: dict[int, Throttle] = {}

    def throttle(self, file: str) -> Throttle:
        """The throttle of the storage that a file is on, or is to be on; without a limit it lets everything through."""
        device = _device(file)
        if device not in self._throttles:
            self._throttles[device] = Throttle(self.limit(file))
        return self._throttles[device]

    def limit(self, file: str) -> int:
        """Bytes per second that may be written to the storage of a file; 0 for no limit."""
        if is_uri(file):
            return 0
        device = _device(file)
        limits = [
            rate for folder, rate in self._journal.storages().items() if _device(os.path.join(folder, "")) == device
        ]
        return min(limits, default=0)

    def set_limit(self, folder: str, rate: int) -> None:
        """Limit a storage, and what waits for it now."""
        self._journal.put_storage(folder, rate)
        self.throttle(os.path.join(folder, "")).rate = self.limit(os.path.join(folder, ""))

    def share(self, move: Move, file: str, writers: int) -> int:
        """How fast one mirror of a move may write to a file, in bytes per second; 0 for no limit.

        Args:
            move: whose.
            file: its destination.
            writers: how many mirrors of moves write to that storage.
        """
        own = move.bandwidth // len(move.disks) if move.bandwidth else 0
        limit = self.limit(file)
        parts = [part for part, whole in ((own, move.bandwidth), (limit // max(1, writers), limit)) if whole]
        return max(1, min(parts)) if parts else 0

    def same(self, one: str, other: str) -> bool:
        """Whether two files are on one storage."""
        return not is_uri(one) and not is_uri(other) and _device(one) == _device(other)


def _device(file: str) -> int:
    """The number of the file system that a file is on, or is to be on; 0 where there is none."""
    folder = os.path.dirname(file)
    try:
        return os.stat(folder).st_dev
    except OSError:
        return 0
