"""Domains and their QMP sockets."""

from __future__ import annotations

from dataclasses import dataclass

from blockferry.errors.tree import Refused, Unknown


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


@dataclass(eq=False)
class DomainBusy(Refused):
    """Somebody else works on the domain, and did for as long as it was waited."""

    domain: str
    operation: int
    what: str
    since: str
    seconds: float
    code = "domain-busy"
    exit_status = 29
    template = (
        "{domain} is busy with operation {operation} ({what}) since {since}, and still was after {seconds:g} s. Nothing was "
        "done. `blockferry operations show {operation}` says how far it is; try again when it has ended."
    )
