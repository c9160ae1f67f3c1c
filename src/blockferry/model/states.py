"""A job's states as whoever waits for it sees them: the library and the command wait alike.

Kept without imports that take long: the command's fast path has it.
"""

from __future__ import annotations

from blockferry.errors import BlockferryError, JobFailed, JobLost

CAUGHT_UP = frozenset({"ready", "pivoted", "finished", "done"})
LOST = frozenset({"lost", "cancelled", "removed"})
# Types of jobs that end by themselves: there is nothing to pivot to.
CHAIN = frozenset({"commit", "active-commit", "rebase"})
NEWEST = 2**62  # no event has such a number: the answer has none, and says which is the last


def lost(domain: str, disk: str, job_type: str, state: str, reason: str | None) -> BlockferryError:
    """The error for a job that is in one of LOST.

    Args:
        domain: its name.
        disk: the target.
        job_type: the job's type.
        state: the job's state.
        reason: why, where it is known.
    """
    words = [] if state == "lost" else [f"it was {state}"]
    why = ", ".join([*words, *([reason] if reason else [])]) or "no reason is known"
    if job_type in CHAIN:
        return JobFailed(domain=domain, disk=disk, what=job_type, reason=why)
    return JobLost(domain=domain, disk=disk, reason=why)
