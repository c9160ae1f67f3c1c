"""How far the mirrors of a domain are: read once a second while one works, never journalled."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable

import msgspec

from blockferry.engine.bus import Bus
from blockferry.model.job import Job, Progress
from blockferry.model.snapshot import Mirror
from blockferry.model.view import Event
from blockferry.qemu.session import CommandRefused, LostReply, Session

SAMPLE_SECONDS = 1.0
# At low speeds progress comes in bursts: the rate is taken over this many samples.
SAMPLES = 10


def state_of(mirror: Mirror, job: Job | None) -> str:
    """A mirror's state in one word: copying or ready while it works, else how it ended."""
    if mirror.state != "active":
        return mirror.state
    if job is None or job.over:
        return "lost"
    return "ready" if job.ready or job.status in ("ready", "standby", "pending") else "copying"


class Sampler:
    """Samples one domain's mirrors.

    Args:
        domain: its name.
    """

    def __init__(self, domain: str) -> None:
        self._domain = domain
        self.running = False
        self._samples: dict[str, deque[tuple[float, int]]] = {}

    async def run(self, session: Session, active: Callable[[], tuple[Mirror, ...]], bus: Bus) -> None:
        """Publish progress once a second until no mirror works any more or the connection ends.

        Args:
            session: to the domain's QEMU.
            active: says which mirrors work.
            bus: where progress goes; when nobody listens, QEMU is not asked.
        """
        self.running = True
        try:
            while session.alive and (working := active()):
                self._samples = {m.job: self._samples.get(m.job, deque(maxlen=SAMPLES)) for m in working}
                if bus.listeners:
                    with contextlib.suppress(LostReply, CommandRefused):
                        bus.publish(await self._sample(session, working))
                await asyncio.sleep(SAMPLE_SECONDS)
        finally:
            self.running = False

    async def _sample(self, session: Session, working: tuple[Mirror, ...]) -> tuple[Event, ...]:
        answer = {each["device"]: each for each in await session.execute("query-block-jobs")}
        now = time.monotonic()
        events = []
        for mirror in working:
            job = answer.get(mirror.job)
            if job is None:
                continue
            state = "ready" if job.get("ready") else "copying"
            progress = self._progress(mirror, state, job["offset"], job["len"], now)
            events.append(
                Event(
                    seq=0,
                    time=time.time(),
                    type="progress",
                    domain=self._domain,
                    disk=mirror.target,
                    data=msgspec.to_builtins(progress),
                )
            )
        return tuple(events)

    def _progress(self, mirror: Mirror, state: str, current: int, total: int, now: float) -> Progress:
        samples = self._samples.setdefault(mirror.job, deque(maxlen=SAMPLES))
        samples.append((now, current))
        (began, first), elapsed = samples[0], now - samples[0][0]
        rate = (current - first) / elapsed if now > began else None
        remaining = (total - current) / rate if rate else None
        return Progress(
            domain=self._domain,
            disk=mirror.target,
            state=state,
            current=current,
            total=total,
            rate=rate,
            remaining_seconds=0.0 if state == "ready" else remaining,
        )
