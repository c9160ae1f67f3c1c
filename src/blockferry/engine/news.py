"""What a record means to those who listen: events, before they have their numbers."""

from __future__ import annotations

import time
from typing import Any

from blockferry.model.blockjob import BlockJob, Mirror
from blockferry.model.view import Event
from blockferry.plan.plan import Record


def item(domain: str, kind: str, disk: str | None, **data: Any) -> Event:
    """An event of now."""
    return Event(seq=0, time=time.time(), type=kind, domain=domain, disk=disk, data=data)


def news(domain: str, operation: int, record: Record, before: tuple[BlockJob, ...]) -> tuple[Event, ...]:
    """The events of a record.

    Args:
        domain: its name.
        operation: the operation whose record it is.
        record: what is true from now on.
        before: the domain's jobs until now.
    """
    found: list[Event] = []
    if record.snapshot is not None:
        found.append(item(domain, "snapshot-created", None, snapshot=record.snapshot.name, operation=operation))
    found += [_started(job, operation) for job in record.jobs]
    jobs = {job.target: job for job in before}
    found += [_ended(jobs.get(target), target, domain, operation, record) for target in record.ended]
    found += [item(domain, "snapshot-deleted", None, snapshot=name, operation=operation) for name in record.forget]
    found += [
        item(domain, "snapshot-changed", None, snapshot=each.name, operation=operation) for each in record.changed
    ]
    return tuple(found)


def _started(job: BlockJob, operation: int) -> Event:
    if isinstance(job, Mirror):
        return item(job.domain, "mirror-started", job.target, file=job.file, operation=operation)
    base = job.base.file if job.base is not None else None
    return item(job.domain, "job-started", job.target, job=job.type, base=base, operation=operation)


def _ended(job: BlockJob | None, target: str, domain: str, operation: int, record: Record) -> Event:
    end = record.ended[target]
    if job is not None and not isinstance(job, Mirror):
        kind = "job-lost" if end == "lost" else f"job-{end}"
        return item(domain, kind, target, job=job.type, reason=record.reason, operation=operation)
    if end in ("pivoted", "finished", "cancelled"):
        return item(domain, f"mirror-{end}", target, source=record.authoritative.get(target), operation=operation)
    return item(domain, "mirror-dropped", target, reason=record.reason, operation=operation)
