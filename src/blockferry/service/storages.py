"""How fast moves may write to each storage: limits that all moves of the host share, changed while they run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blockferry.journal.journal import Journal
from blockferry.plan.destinations import is_uri
from blockferry.qemu.copier import Throttle
from blockferry.qemu.paths import storages


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

    async def throttle(self, file: str) -> Throttle:
        """The throttle of the storage that a file is on, or is to be on; without a limit it lets everything through."""
        limits = await self._limits([file])
        return self._throttle(limits.on[file], limits.of(file))

    def _throttle(self, storage: int, rate: int) -> Throttle:
        if storage not in self._throttles:
            self._throttles[storage] = Throttle(rate)
        return self._throttles[storage]

    async def set_limit(self, folder: str, rate: int) -> None:
        """Limit a storage, and what waits for it now."""
        self._journal.put_storage(folder, rate)
        inside = os.path.join(folder, "")
        limits = await self._limits([inside])
        self._throttle(limits.on[inside], 0).rate = limits.of(inside)

    async def shares(self, files: Mapping[str, str], bandwidth: int, writing: Iterable[str]) -> dict[str, int]:
        """How fast each mirror of a move may write, by target, in bytes per second; 0 for no limit.

        Args:
            files: target -> where it goes, of all its disks.
            bandwidth: of the move, bytes per second, 0 for no limit.
            writing: where all mirrors of moves write to, those of this one too.
        """
        writing = list(writing)
        limits = await self._limits([*writing, *files.values()])
        own = bandwidth // len(files)
        found = {}
        for target, file in files.items():
            limit = limits.of(file)
            writers = sum(limits.same(file, other) for other in writing)
            parts = [part for part, whole in ((own, bandwidth), (limit // max(1, writers), limit)) if whole]
            found[target] = max(1, min(parts)) if parts else 0
        return found

    async def writers(self, writing: Iterable[str]) -> dict[str, int]:
        """How many of these files are on each storage that has a limit, by the folder that it was given for."""
        writing = list(writing)
        limits = await self._limits(writing)
        return {
            folder: sum(limits.on[os.path.join(folder, "")] == limits.on[file] for file in writing if not is_uri(file))
            for folder in limits.rates
        }

    async def _limits(self, files: list[str]) -> _Limits:
        rates = self._journal.storages()
        names = [*files, *(os.path.join(folder, "") for folder in rates)]
        found = await storages(os.path.dirname(name) for name in names)
        return _Limits(rates, {name: found[os.path.dirname(name)] for name in names})


@dataclass(frozen=True)
class _Limits:
    """The limits by folder, and which storage each file and each of those folders is on."""

    rates: Mapping[str, int]
    on: Mapping[str, int]

    def of(self, file: str) -> int:
        """Bytes per second that may be written to the storage of a file; 0 for no limit."""
        if is_uri(file):
            return 0
        storage = self.on[file]
        limits = [rate for folder, rate in self.rates.items() if self.on[os.path.join(folder, "")] == storage]
        return min(limits, default=0)

    def same(self, one: str, other: str) -> bool:
        """Whether two files are on one storage."""
        return not is_uri(one) and not is_uri(other) and self.on[one] == self.on[other]
