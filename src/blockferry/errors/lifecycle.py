"""Defining, starting and stopping guests."""

from __future__ import annotations

from dataclasses import dataclass

from blockferry.errors.tree import Failed, Refused


@dataclass(eq=False)
class NotDefined(Refused):
    """The domain was attached: somebody else starts it and ends it."""

    domain: str
    code = "not-defined"
    exit_status = 70
    template = (
        "{domain} is attached, not defined: whoever started it stops it, and blockferry can't start it. Nothing was "
        "done. `blockferry detach {domain}`, then `blockferry define FILE.xml` takes it over at its next start."
    )


@dataclass(eq=False)
class AlreadyRunning(Refused):
    """What was asked for needs a guest that is shut off."""

    domain: str
    code = "already-running"
    exit_status = 71
    template = "{domain} runs already; nothing was done. `blockferry show {domain}` shows it, `blockferry stop {domain}` stops it."


@dataclass(eq=False)
class NotRunning(Refused):
    """What was asked for needs a guest that runs."""

    domain: str
    code = "not-running"
    exit_status = 72
    template = "{domain} is shut off; nothing was done. `blockferry start {domain}` starts it."


@dataclass(eq=False)
class StillRunning(Failed):
    """The guest was asked to shut down and has not."""

    domain: str
    seconds: float
    code = "still-running"
    exit_status = 73
    template = (
        "{domain} was asked to shut down (ACPI) and still runs after {seconds:g} s; it may shut down yet. Wait longer "
        "with --timeout, or end it with `blockferry stop {domain} --force`, which is like pulling the plug."
    )


@dataclass(eq=False)
class MirrorGone(Refused):
    """A mirror can't be established again, and the guest was to be started with its mirrors only."""

    domain: str
    disk: str
    reason: str
    code = "mirror-gone"
    exit_status = 76
    template = (
        "{domain} was not started: the mirror of {disk} can't be established again: {reason}. Mend that, or start it "
        "without --require-mirrors, which drops the mirror."
    )


@dataclass(eq=False)
class CannotShutDown(Refused):
    """The guest can't be asked to shut down as it is now."""

    domain: str
    state: str
    code = "cannot-shut-down"
    exit_status = 74
    template = (
        "{domain} is {state} and can't hear that it is to shut down; nothing was done. `blockferry resume {domain}` lets "
        "it run; `blockferry stop {domain} --force` ends it as it is."
    )
