"""What a guest's writes to a disk are like, as QEMU counts them: between the device and the storage."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

from sides import MIB, Guest

# Bins of 5 % from 10 microseconds to 30 seconds.
LOWEST_NS, HIGHEST_NS, STEP = 10_000, 30_000_000_000, 1.05


@dataclass(frozen=True)
class Writes:
    """A stretch of a guest's writes.

    Attributes:
        rate: MiB/s.
        p99_ms: 99 of 100 writes took no longer; the upper end of the bin that it falls into.
        worst_ms: of the slowest.
        count: how many.
    """

    rate: float
    p99_ms: float
    worst_ms: float
    count: int


class Watch:
    """Counts what a guest writes to all its disks, from its beginning on.

    Args:
        guest: whose.
    """

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._began = 0.0
        self._bytes = 0

    async def begin(self) -> None:
        """Start to count."""
        bounds = [float(LOWEST_NS)]
        while bounds[-1] < HIGHEST_NS:
            bounds.append(bounds[-1] * STEP)
        disks = await self._disks()
        for disk in disks:
            arguments = {"id": disk["qdev"], "boundaries-write": [int(bound) for bound in bounds]}
            await self._guest.command("block-latency-histogram-set", arguments)
        self._bytes = sum(disk["stats"]["wr_bytes"] for disk in disks)
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """How long it has counted."""
        return time.perf_counter() - self._began

    async def end(self) -> Writes:
        """What has been written since `begin`."""
        disks = await self._disks()
        seconds = self.seconds
        written = sum(disk["stats"]["wr_bytes"] for disk in disks) - self._bytes
        histograms = [disk["stats"]["wr_latency_histogram"] for disk in disks]
        tops = [*histograms[0]["boundaries"], HIGHEST_NS]
        numbers = [sum(same) for same in zip(*(each["bins"] for each in histograms), strict=True)]
        filled = [(top, number) for top, number in zip(tops, numbers, strict=True) if number]
        count = sum(numbers)
        assert count, "the guest wrote nothing"
        below = list(itertools.accumulate(number for _top, number in filled))
        p99 = next(top for (top, _number), sofar in zip(filled, below, strict=True) if sofar >= 0.99 * count)
        return Writes(rate=written / MIB / seconds, p99_ms=p99 / 1e6, worst_ms=filled[-1][0] / 1e6, count=count)

    async def _disks(self) -> list[dict[str, Any]]:
        """QEMU's account of every disk, by the device that the guest sees."""
        return [each for each in await self._guest.command("query-blockstats", {}) if each.get("qdev")]
