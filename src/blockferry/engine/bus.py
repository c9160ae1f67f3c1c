"""Events to whoever listens: each listener has a queue of its own, opened before it is told anything."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from blockferry.model.view import Event

# A listener that reads nothing for this many events is let go: it can ask for them by number.
QUEUE_MAX = 10_000


class Bus:
    """Hands events to listeners."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[Event | None]] = set()

    def publish(self, events: tuple[Event, ...]) -> None:
        """Hand events to every listener, now."""
        for queue in list(self._queues):
            for event in events:
                if queue.qsize() >= QUEUE_MAX:
                    self._queues.discard(queue)
                    queue.put_nowait(None)
                    break
                queue.put_nowait(event)

    @property
    def listeners(self) -> int:
        """How many listen."""
        return len(self._queues)

    @contextlib.contextmanager
    def listen(self) -> Iterator[asyncio.Queue[Event | None]]:
        """A queue of every event from now on; None says that it has ended."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._queues.add(queue)
        try:
            yield queue
        finally:
            self._queues.discard(queue)

    def close(self) -> None:
        """Tell every listener that there will be no more."""
        for queue in self._queues:
            queue.put_nowait(None)
        self._queues.clear()
