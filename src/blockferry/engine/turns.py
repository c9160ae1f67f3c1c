"""Whose turn it is on a domain: one request at a time, and the others are told for whom they wait."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from blockferry import errors
from blockferry.journal.journal import Journal

# So long a request waits for others. Twenty at once take two seconds; an end of QEMU, the longest of operations, up to twenty.
BUSY_SECONDS = 30.0


class Turns:
    """The turns on one domain.

    Args:
        domain: its name.
        journal: the state directory's.

    Attributes:
        lock: who holds it may change the domain.
        in_flight: the operations that are being carried out.
    """

    def __init__(self, domain: str, journal: Journal) -> None:
        self.lock = asyncio.Lock()
        self.in_flight: set[int] = set()
        self._domain = domain
        self._journal = journal
        self._held_since = 0.0

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Have the domain's lock, for a request: who asks for one is told who else has it.

        Raises:
            DomainBusy: it was not free within BUSY_SECONDS.
        """
        try:
            async with asyncio.timeout(BUSY_SECONDS):
                await self.lock.acquire()
        except TimeoutError as error:
            raise self._busy() from error
        try:
            self._held_since = time.time()
            yield
        finally:
            self.lock.release()

    def _busy(self) -> errors.DomainBusy:
        """With the operation that is being carried out; before there is one, its number is 0."""
        number = max(self.in_flight, default=0)
        operation = self._journal.operation(number)
        since = operation.started if operation is not None else self._held_since
        return errors.DomainBusy(
            domain=self._domain,
            operation=number,
            what=operation.plan.what if operation is not None else "none yet: it is looked at",
            since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(since)),
            seconds=BUSY_SECONDS,
        )
