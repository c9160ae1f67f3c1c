"""How far the jobs of a domain are: read once a second while one works, never journalled."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable

import msgspec

from blockferry.engine.bus import Bus
from blockferry.model.blockjob import BlockJob, ChainJob, Mirror
from blockferry.model.job import Job, Progress
from blockferry.model.view import Event
from blockferry.qemu.session import CommandRefused, LostReply, Session

SAMPLE_SECONDS = 1.0
# At low speeds progress comes in bursts: the rate is taken over this many samples.
SAMPLES = 10
# When (seconds), and the bytes done and in all.
Sample = tuple[float, int, int]


def state_of(ours: BlockJob, job: Job | None) -> str:
    """A job's state in one word: copying, ready (a mirror) or running (a commit, a rebase) while it works; else its end."""
    if ours.state != "active":
        return ours.state
    if isinstance(ours, ChainJob) and (job is None or ours.copy is None):
        # QEMU forgets it with its end; whether it was lost is recorded as soon as what follows has been done.
        return "running"
    # A resumed copy's round that has ended well is followed by another one, or by a mirror.
    if job is None or (job.over and (job.error is not None or isinstance(ours, Mirror))):
        return "lost"
    if job.ready or job.status in ("ready", "standby", "pending"):
        return "ready"
    return "catching up" if isinstance(ours, Mirror) and ours.again else "copying"


class Sampler:
    """Samples one domain's jobs.

    Args:
        domain: its name.
    """

    def __init__(self, domain: str) -> None:
        self._domain = domain
        self.running = False
        self._samples: dict[str, deque[Sample]] = {}

    async def run(self, session: Session, active: Callable[[], tuple[BlockJob, ...]], bus: Bus) -> None:
        """Publish progress once a second until no job works any more or the connection ends.

        Args:
            session: to the domain's QEMU.
            active: says which jobs work.
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

    async def _sample(self, session: Session, working: tuple[BlockJob, ...]) -> tuple[Event, ...]:
        answer = {each["device"]: each for each in await session.execute("query-block-jobs")}
        now = time.monotonic()
        events = []
        for ours in working:
            job = answer.get(ours.job)
            if job is None:
                continue
            chain = isinstance(ours, ChainJob) and ours.copy is None
            state = "running" if chain else "ready" if job.get("ready") else "copying"
            progress = self._progress(ours, state, job["offset"], job["len"], now)
            events.append(
                Event(
                    seq=0,
                    time=time.time(),
                    type="progress",
                    domain=self._domain,
                    disk=ours.target,
                    data=msgspec.to_builtins(progress),
                )
            )
        return tuple(events)

    def _progress(self, ours: BlockJob, state: str, current: int, total: int, now: float) -> Progress:
        samples = self._samples.setdefault(ours.job, deque(maxlen=SAMPLES))
        samples.append((now, current, total))
        pace = pace_of(tuple(samples))
        ready = state == "ready"
        return Progress(
            domain=self._domain,
            disk=ours.target,
            state=state,
            current=current,
            total=total,
            rate=pace.rate,
            dirty_rate=pace.dirty_rate,
            converging=True if ready else pace.converging,
            remaining_seconds=0.0 if ready else pace.remaining_seconds,
        )


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """At what rates a job goes on; see Progress."""

    rate: float | None = None
    dirty_rate: float | None = None
    converging: bool | None = None
    remaining_seconds: float | None = None


def pace_of(samples: tuple[Sample, ...]) -> Pace:
    """How fast a job has been from the first of these samples to the last.

    What a guest writes to a mirrored disk is added to the job's total (QEMU's block/mirror.c, mirror_run). Until it
    has first set it, the total is 0: what it then becomes nobody has written.
    """
    samples = tuple(sample for sample in samples if sample[2]) or samples
    (began, first, planned), (now, current, total) = samples[0], samples[-1]
    if now <= began:
        return Pace()
    rate, dirty_rate = (current - first) / (now - began), max(0.0, (total - planned) / (now - began))
    left = total - current
    if not rate and not dirty_rate:
        return Pace(rate=rate, dirty_rate=dirty_rate)
    converging = rate > dirty_rate or not left
    return Pace(
        rate=rate,
        dirty_rate=dirty_rate,
        converging=converging,
        remaining_seconds=(left / (rate - dirty_rate) if left else 0.0) if converging else None,
    )
