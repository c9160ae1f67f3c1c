"""Every error that blockferry raises on purpose: one tree, one message template each.

A message says what happened, what state things are in now, and what to type next. `code` and `exit_status` are
stable and unique (docs/errors.md lists them; a test holds both). The three branches are the three outcomes:

    Refused   nothing was done
    Failed    it was tried and undone: things are as they were before
    Unknown   nobody can say yet: recovery must look
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(eq=False)
class BlockferryError(Exception):
    """The root: catch this to catch everything that blockferry raises on purpose."""

    code: ClassVar[str] = ""
    exit_status: ClassVar[int] = 1
    outcome: ClassVar[str] = ""
    template: ClassVar[str] = ""

    @property
    def message(self) -> str:
        """The whole sentence that people read."""
        return self.template.format(**self.fields())

    def fields(self) -> dict[str, Any]:
        """The error's own values, by name, as in its template."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        return self.message

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as `--json` and the API give it: code, outcome, exit_status, message and fields."""
        return {
            "code": self.code,
            "outcome": self.outcome,
            "exit_status": self.exit_status,
            "message": self.message,
            "fields": self.fields(),
        }


class Refused(BlockferryError):
    """Nothing was done."""

    outcome = "refused"


class Failed(BlockferryError):
    """It was tried and has been undone."""

    outcome = "failed"


class Unknown(BlockferryError):
    """What became of it can't be said yet; recovery looks and settles it."""

    outcome = "unknown"


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


# --- domains --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class NoSuchDomain(Refused):
    """No domain of that name is attached."""

    domain: str
    code = "no-such-domain"
    exit_status = 20
    template = "no domain {domain!r} is attached. `blockferry list` shows those that are."


@dataclass(eq=False)
class DomainExists(Refused):
    """The name is taken by another QMP socket."""

    domain: str
    qmp: str
    code = "domain-exists"
    exit_status = 21
    template = "a domain {domain!r} is attached already, on {qmp}. Detach it first, or take another name."


@dataclass(eq=False)
class InvalidName(Refused):
    """A name of a domain or snapshot that can't be one."""

    name: str
    code = "invalid-name"
    exit_status = 22
    template = (
        "{name!r} can't be a name: use 1 to 60 letters, digits, '.', '_', '+' and '-', not beginning with '-' or '.'."
    )


@dataclass(eq=False)
class QmpUnreachable(Refused):
    """Nothing answers on the QMP socket."""

    qmp: str
    reason: str
    code = "qmp-unreachable"
    exit_status = 23
    template = "no QEMU answers on {qmp}: {reason}. Nothing was done; is the guest running, and is it its QMP socket?"


@dataclass(eq=False)
class QmpBusy(Refused):
    """Something else holds the QMP socket."""

    qmp: str
    seconds: float
    code = "qmp-busy"
    exit_status = 24
    template = (
        "{qmp} accepted us but sent no QMP greeting within {seconds:g} s: something else (libvirtd, a script) holds it, "
        "and a QMP socket serves one client at a time. Give QEMU a second one: start it with another "
        "`-qmp unix:/path/to/second.qmp,server=on,wait=off`, or, on a running guest, through its present owner: "
        "`chardev-add` a socket and an HMP `mon`; for libvirt: `<qemu:commandline>` with `-qmp`."
    )


@dataclass(eq=False)
class GuestGone(Unknown):
    """QEMU went away."""

    domain: str
    reason: str
    code = "guest-gone"
    exit_status = 25
    template = (
        "{domain}: QEMU is not there any more ({reason}). `blockferry show {domain}` shows what is known of its "
        "images, `blockferry operations {domain}` what was being done."
    )


@dataclass(eq=False)
class QmpTimeout(Unknown):
    """QEMU did not answer in time."""

    domain: str
    command: str
    seconds: float
    code = "qmp-timeout"
    exit_status = 26
    template = (
        "{domain}: QEMU did not answer {command} within {seconds:g} s. Whether it was carried out is unknown; "
        "`blockferry recover` looks."
    )


@dataclass(eq=False)
class MissingCapability(Refused):
    """This QEMU lacks a command that the operation needs."""

    domain: str
    capability: str
    version: str
    code = "missing-capability"
    exit_status = 27
    template = "{domain}: its QEMU ({version}) has no {capability}, which this needs. Nothing was done."


@dataclass(eq=False)
class DomainInUse(Refused):
    """The domain can't be detached while work goes on."""

    domain: str
    what: str
    code = "domain-in-use"
    exit_status = 28
    template = "{domain} can't be detached: {what}. Finish or cancel that first (`blockferry job list {domain}`)."


# --- disks and images -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class NoSuchDisk(Refused):
    """The name is no target, qdev id or image of the domain."""

    domain: str
    disk: str
    known: str
    code = "no-such-disk"
    exit_status = 30
    template = "{domain} has no disk {disk!r}, by target, qdev id or image path. It has: {known}."


@dataclass(eq=False)
class AmbiguousDisk(Refused):
    """The image is in the chains of several disks."""

    domain: str
    disk: str
    targets: str
    code = "ambiguous-disk"
    exit_status = 31
    template = "{disk} is in the chains of several disks of {domain}: {targets}. Name one of these."


@dataclass(eq=False)
class DiskUnsuitable(Refused):
    """The disk can't take part: empty, read-only, a filter, a node that can't be followed."""

    domain: str
    disk: str
    reason: str
    code = "disk-unsuitable"
    exit_status = 32
    template = "{domain}: disk {disk} can't take part: {reason}. Nothing was done."


@dataclass(eq=False)
class DiskBusy(Refused):
    """The disk has a job on it."""

    domain: str
    disk: str
    job: str
    code = "disk-busy"
    exit_status = 33
    template = (
        "{domain}: disk {disk} has a job on it already: {job}. `blockferry job list {domain}` shows it; pivot, finish "
        "or cancel it first."
    )


@dataclass(eq=False)
class DestinationExists(Refused):
    """A destination that must not exist does."""

    path: str
    code = "destination-exists"
    exit_status = 34
    template = "{path} exists already, and nothing is ever overwritten unasked. Name another file, or remove it first."


@dataclass(eq=False)
class DestinationUnusable(Refused):
    """A destination can't be created or opened."""

    path: str
    reason: str
    code = "destination-unusable"
    exit_status = 35
    template = "{path} can't be a destination: {reason}. Nothing was done."


@dataclass(eq=False)
class ImageUnsuitable(Refused):
    """An existing image is not what was said of it."""

    path: str
    reason: str
    code = "image-unsuitable"
    exit_status = 36
    template = "{path} can't be used: {reason}. Nothing was done."


@dataclass(eq=False)
class NoRoom(Refused):
    """The destination's file system is too full."""

    path: str
    needed: int
    available: int
    code = "no-room"
    exit_status = 37
    template = "{path} needs {needed} bytes and its file system has {available}. Nothing was done."


@dataclass(eq=False)
class DuplicateFile(Refused):
    """Two disks of one request were given the same file."""

    path: str
    code = "duplicate-file"
    exit_status = 38
    template = "{path} is named twice in this request. Nothing was done."


# --- snapshots ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class NoSuchSnapshot(Refused):
    """The domain has no snapshot of that name."""

    domain: str
    snapshot: str
    code = "no-such-snapshot"
    exit_status = 40
    template = "{domain} has no snapshot {snapshot!r}. `blockferry snapshot list {domain}` shows those that it has."


@dataclass(eq=False)
class SnapshotExists(Refused):
    """The snapshot's name is taken."""

    domain: str
    snapshot: str
    code = "snapshot-exists"
    exit_status = 41
    template = "{domain} has a snapshot {snapshot!r} already. Take another name."


@dataclass(eq=False)
class InvalidXml(Refused):
    """XML that is malformed, hostile or says what can't be done."""

    element: str
    reason: str
    code = "invalid-xml"
    exit_status = 42
    template = "the XML can't be used: {element}: {reason}. Nothing was done."


@dataclass(eq=False)
class UnsupportedFlag(Refused):
    """A flag that this version does not carry out."""

    call: str
    flag: str
    code = "unsupported-flag"
    exit_status = 43
    template = "{call} does not carry out {flag} in this version, and a flag is never ignored. Nothing was done."


@dataclass(eq=False)
class SnapshotHasMirrors(Refused):
    """A plain delete of a snapshot with mirrors."""

    domain: str
    snapshot: str
    code = "snapshot-has-mirrors"
    exit_status = 44
    template = (
        "snapshot {snapshot!r} of {domain} has mirrors: say --reopen-mirror (the guest goes on on them) or "
        "--remove-mirror (they are dropped). Nothing was done."
    )


@dataclass(eq=False)
class SnapshotNotCurrent(Refused):
    """Its images are not the ones that the guest writes to."""

    domain: str
    snapshot: str
    reason: str
    code = "snapshot-not-current"
    exit_status = 45
    template = "snapshot {snapshot!r} of {domain} is not current: {reason}. Nothing was done."


@dataclass(eq=False)
class NoMirror(Refused):
    """The snapshot has no mirror."""

    domain: str
    snapshot: str
    reason: str
    code = "no-mirror"
    exit_status = 46
    template = "snapshot {snapshot!r} of {domain} has no mirror to go over to: {reason}. Nothing was done."


@dataclass(eq=False)
class DeleteNeedsChoice(Refused):
    """A delete that does not say how."""

    domain: str
    snapshot: str
    code = "delete-needs-choice"
    exit_status = 47
    template = (
        "merging snapshot {snapshot!r} of {domain} back is not carried out by this version; --metadata forgets the "
        "snapshot and leaves its images as they are. Nothing was done."
    )


# --- jobs -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class NoSuchJob(Refused):
    """The disk has no job of ours."""

    domain: str
    disk: str
    code = "no-such-job"
    exit_status = 50
    template = "{domain}: disk {disk} has no copy or mirror. `blockferry job list {domain}` shows those that there are."


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
        "{domain}: the mirror of {disk} was lost: {reason}. The guest goes on on its source; the destination is not a "
        "copy of it."
    )


# --- operations -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class NoSuchOperation(Refused):
    """No operation has that number."""

    operation: int
    code = "no-such-operation"
    exit_status = 60
    template = "there is no operation {operation}. `blockferry operations` lists them."


@dataclass(eq=False)
class OperationFailed(Failed):
    """A step failed; all that had been done was undone."""

    domain: str
    operation: int
    step: str
    reason: str
    code = "operation-failed"
    exit_status = 61
    template = (
        "{domain}: operation {operation} failed at «{step}»: {reason}. It was undone: every disk is on the image that "
        "it was on. `blockferry operations show {operation}` has the steps."
    )


@dataclass(eq=False)
class OperationUnsettled(Unknown):
    """A step failed and its undo too, or QEMU stopped answering."""

    domain: str
    operation: int
    step: str
    reason: str
    code = "operation-unsettled"
    exit_status = 62
    template = (
        "{domain}: operation {operation} stopped at «{step}»: {reason}. It is neither done nor undone; `blockferry "
        "recover` looks and settles it, `blockferry operations show {operation}` has the steps."
    )


@dataclass(eq=False)
class OperationAsItIs(Unknown):
    """A window failed and could not be left by bringing the disks back: each stays where it is."""

    domain: str
    operation: int
    step: str
    reason: str
    code = "operation-as-it-is"
    exit_status = 64
    template = (
        "{domain}: operation {operation} failed at «{step}»: {reason}. The disks could not be brought back (somebody let "
        "the guest run, or QEMU refused), so each stays on the image that it is on now, which holds its data: "
        "`blockferry show {domain}` names them."
    )


@dataclass(eq=False)
class Unsettled(Refused):
    """An earlier operation of the domain must be settled first."""

    domain: str
    operation: int
    code = "unsettled"
    exit_status = 63
    template = (
        "{domain}: operation {operation} is not settled yet, so nothing new may be begun. `blockferry recover` settles "
        "it; `blockferry operations show {operation}` says where it stands."
    )


def _tree(cls: type[BlockferryError]) -> list[type[BlockferryError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _tree(sub))]


BY_CODE: dict[str, type[BlockferryError]] = {cls.code: cls for cls in _tree(BlockferryError) if cls.code}


def from_dict(data: dict[str, Any]) -> BlockferryError:
    """Rebuild the error that `to_dict` described, as a client of the API does.

    A code that this version does not know becomes `InternalError` with the other side's message.
    """
    cls = BY_CODE.get(str(data.get("code")))
    values = data.get("fields")
    if cls is None or not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
        return InternalError(detail=str(data.get("message", data)))
    return cls(**values)
