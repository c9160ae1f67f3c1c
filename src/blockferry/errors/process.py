"""The state directory, its host process, and requests as such."""

from __future__ import annotations

from dataclasses import dataclass

from blockferry.errors.tree import Refused, Unknown


@dataclass(eq=False)
class StateDirBusy(Refused):
    """Another process owns the state directory."""

    state_dir: str
    pid: int
    code = "state-dir-busy"
    exit_status = 10
    template = (
        "{state_dir} is owned by process {pid}; nothing was done. Use blockferry.connect() (or the command) to talk "
        "to it, or stop it first."
    )


@dataclass(eq=False)
class StateDirUnusable(Refused):
    """The state directory can't be made, read or trusted."""

    state_dir: str
    reason: str
    code = "state-dir-unusable"
    exit_status = 11
    template = "{state_dir} can't be used as a state directory: {reason}. Name another with --state-dir."


@dataclass(eq=False)
class HostProcessUnreachable(Unknown):
    """The host process did not start, or went away in mid-request."""

    state_dir: str
    reason: str
    code = "host-process-unreachable"
    exit_status = 12
    template = (
        "the host process of {state_dir} can't be reached: {reason}. What was asked may or may not have happened; "
        "`blockferry operations` shows it once `blockferry serve` runs again."
    )


@dataclass(eq=False)
class BadRequest(Refused):
    """The request can't be understood."""

    reason: str
    code = "bad-request"
    exit_status = 13
    template = "the request can't be understood: {reason}. Nothing was done."


@dataclass(eq=False)
class InternalError(Unknown):
    """A bug in blockferry."""

    detail: str
    code = "internal-error"
    exit_status = 14
    template = (
        "a bug in blockferry: {detail}. The journal knows how far it came: `blockferry recover` settles it. Please "
        "report it with the host process's log (STATE_DIR/log/serve.log)."
    )


@dataclass(eq=False)
class JournalUnwritable(Refused):
    """The journal can't be written, so nothing may be begun."""

    reason: str
    code = "journal-unwritable"
    exit_status = 15
    template = "the journal can't be written ({reason}), so nothing new may be begun. Make room, then try again."
