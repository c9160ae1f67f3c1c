"""Block jobs."""

from __future__ import annotations

from dataclasses import dataclass

from blockferry.errors.tree import Failed, Refused


@dataclass(eq=False)
class NoSuchJob(Refused):
    """The disk has no job of ours."""

    domain: str
    disk: str
    code = "no-such-job"
    exit_status = 50
    template = "{domain}: disk {disk} has no job of ours. `blockferry job list {domain}` shows those that there are."


@dataclass(eq=False)
class JobNotReady(Refused):
    """A mirror has not caught up within the time-out."""

    domain: str
    disk: str
    seconds: float
    state: str
    code = "job-not-ready"
    exit_status = 51
    template = (
        "{domain}: the mirror of {disk} is not ready after {seconds:g} s ({state}); it goes on. Wait longer with "
        "--timeout, see `blockferry job list {domain}`, or cancel it with `blockferry job cancel {domain} {disk}`."
    )


@dataclass(eq=False)
class JobLost(Failed):
    """A job ended with an error or vanished."""

    domain: str
    disk: str
    reason: str
    code = "job-lost"
    exit_status = 52
    template = (
        "{domain}: the mirror of {disk} was lost: {reason}. The disk stays on its source; the destination is not a copy "
        "of it."
    )


@dataclass(eq=False)
class JobFailed(Failed):
    """A commit, rebase or merge ended without having done what it was to do."""

    domain: str
    disk: str
    what: str
    reason: str
    code = "job-failed"
    exit_status = 53
    template = (
        "{domain}: the {what} of {disk} has not been done: {reason}. The guest goes on on the image that it was on, and its "
        "chain is whole: `blockferry show {domain}` shows it. It can be started again."
    )


@dataclass(eq=False)
class SpeedRefused(Refused):
    """QEMU does not take a limit for a job, which is about to end."""

    domain: str
    disk: str
    what: str
    reason: str
    code = "speed-refused"
    exit_status = 57
    template = (
        "{domain}: the {what} of {disk} can't be limited now: {reason}. Nothing was done, and it goes on as it was: "
        "`blockferry job list {domain}` shows how far it is."
    )


@dataclass(eq=False)
class RebaseElsewhere(Refused):
    """A rebase of a disk that is being copied onto another base."""

    domain: str
    disk: str
    dest: str
    base: str
    asked: str
    code = "rebase-elsewhere"
    exit_status = 54
    template = (
        "{domain}: disk {disk} is being copied to {dest}, which backs onto {base}; a rebase onto {asked} can't join that "
        "copy. Cancel it first (`blockferry job cancel {domain} {disk}`), or ask for the same base. Nothing was done."
    )


@dataclass(eq=False)
class NotResumable(Refused):
    """A copy that can't be gone on with: it is not known what its destination lacks."""

    domain: str
    disk: str
    dest: str
    reason: str
    code = "not-resumable"
    exit_status = 56
    template = (
        "{domain}: the copy of {disk} to {dest} can't be resumed: {reason}. Nothing was done. To begin anew, remove {dest}, "
        "then `blockferry copy {domain} {disk} {dest}` without --resume."
    )


@dataclass(eq=False)
class JobNotDismissed(Refused):
    """A stream that somebody started has ended and was not dismissed; to look at the graph would crash QEMU."""

    job: str
    code = "job-not-dismissed"
    exit_status = 55
    template = (
        "the stream job {job!r} has ended, and whoever started it has not dismissed it: QEMU 7.2 and 10.0 crash when they are "
        "asked for their block nodes in this state, so nothing was asked. Dismiss it there (QMP: job-dismiss)."
    )
