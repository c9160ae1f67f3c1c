"""Block jobs: QEMU's states and verbs as tables, and what progress means.

Source: QEMU's job.c, JobSTT and JobVerbTable (qapi/job.json documents both).
"""

from __future__ import annotations

import msgspec

STATES = frozenset(
    {
        "undefined",
        "created",
        "running",
        "paused",
        "ready",
        "standby",
        "waiting",
        "pending",
        "aborting",
        "concluded",
        "null",
    }
)
# In these a verb is accepted by QEMU.
VERBS: dict[str, frozenset[str]] = {
    "complete": frozenset({"ready"}),
    "finalize": frozenset({"pending"}),
    "cancel": frozenset({"created", "running", "paused", "ready", "standby", "waiting", "pending"}),
    "dismiss": frozenset({"concluded"}),
    "set-speed": frozenset({"created", "running", "paused", "ready", "standby"}),
}
# A ready mirror is on standby while the guest is drained: both have caught up.
CAUGHT_UP = frozenset({"ready", "standby"})
BUSY = frozenset({"created", "running", "paused"})
ENDED = frozenset({"concluded", "null"})


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A block job as query-jobs and query-block-jobs show it.

    Attributes:
        id: QEMU's job id; ours are derived from operation and target.
        type: `mirror`, `commit`, `backup`, `stream`...
        status: one of STATES.
        current: bytes done, as QEMU counts.
        total: bytes in all, as QEMU counts; grows while the guest writes.
        ready: a mirror that has caught up at least once.
        error: QEMU's own words, when it ended with one.
        speed: the limit in bytes per second, 0 for none.
        io_status: `ok`, `failed` or `nospace`.
    """

    id: str
    type: str
    status: str
    current: int = 0
    total: int = 0
    ready: bool = False
    error: str | None = None
    speed: int = 0
    io_status: str = "ok"

    def allows(self, verb: str) -> bool:
        """Whether QEMU accepts the verb in this state."""
        return self.status in VERBS[verb]

    @property
    def busy(self) -> bool:
        """Whether it has work before it, and nothing follows from it yet."""
        return self.error is None and self.status in BUSY

    @property
    def over(self) -> bool:
        """Whether it works no more: it has ended, or is ending with an error."""
        return self.error is not None or self.status in ENDED

    @property
    def caught_up(self) -> bool:
        """Whether it is ready, or on standby for a moment, and nothing went wrong."""
        return self.status in CAUGHT_UP and self.error is None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a mirror is, for people to look at.

    Attributes:
        domain: its name.
        disk: the target.
        state: `copying`, `ready`, `pivoted`, `finished`, `cancelled` or `lost`.
        current: bytes done.
        total: bytes in all.
        rate: bytes per second over the last samples; None for the first.
        dirty_rate: bytes per second that the guest adds to what is to be copied; None for the first sample.
        converging: whether it gets ready at these rates; None when it can't be said.
        remaining_seconds: at these rates; None when it can't be said, and while it does not converge.
        reason: why a mirror was lost.
    """

    domain: str
    disk: str
    state: str
    current: int
    total: int
    rate: float | None = None
    dirty_rate: float | None = None
    converging: bool | None = None
    remaining_seconds: float | None = None
    reason: str | None = None
