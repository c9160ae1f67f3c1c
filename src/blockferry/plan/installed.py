"""What is wrong with a host: its state directory, the programs, what its QEMUs can do. Pure, as plan.findings."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import msgspec

from blockferry.model.view import Finding

OLDEST_TESTED = (7, 2)
LITTLE_ROOM_BYTES = 64 << 20
# What a QEMU is asked for: command -> what is not possible without it; the first are needed by everything.
NEEDED = (
    *("x-debug-query-block-graph", "query-named-block-nodes", "query-jobs"),
    *("blockdev-add", "blockdev-del", "blockdev-reopen", "blockdev-snapshot", "blockdev-mirror"),
    *("block-commit", "block-stream", "job-complete", "job-finalize", "job-dismiss", "job-cancel"),
)
USEFUL = {
    "transaction": "disks are snapshotted one after the other, and --atomic of several and --reuse-ext are refused",
    "yank": "a destination on the network that hangs can't be cut off",
}


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """A program: where it is, its version, and for a QEMU its QMP commands; `problem` why it can't be asked."""

    path: str
    version: str = ""
    commands: frozenset[str] = frozenset()
    problem: str | None = None


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is known of a host.

    Attributes:
        state_dir: the state directory.
        mode: its permissions.
        owner: its owner's user id.
        user: our own.
        journal: the journal's version.
        free: bytes free on its file system.
        qemus: the programs that guests are started with.
        missing: (guest, program) of those that are defined and whose program is not there.
        qemu_img: the qemu-img that is used.
        kvm: whether /dev/kvm can be used; None where there is none.
        kvm_guests: defined guests that want it.
        schema: where libvirt's schema was looked for, and whether it is there.
    """

    state_dir: str
    mode: int
    owner: int
    user: int
    journal: int
    free: int
    qemus: tuple[Program, ...]
    qemu_img: Program
    schema: tuple[str, bool]
    missing: tuple[tuple[str, str], ...] = ()
    kvm: bool | None = None
    kvm_guests: tuple[str, ...] = ()


def inspect(host: Host) -> tuple[Finding, ...]:
    """All findings of a host."""
    return (*_state_dir(host), *_programs(host), *_kvm(host), *_schema(host))


def can_do(name: str, commands: frozenset[str]) -> Iterator[Finding]:
    """What a QEMU can do, by its QMP commands."""
    lacking = [command for command in NEEDED if command not in commands]
    for command in lacking:
        text = f"{name} has no {command}, which is needed: use a newer QEMU"
        yield Finding(severity="problem", code="qemu-lacks", text=text)
    for command, without in USEFUL.items():
        if command not in commands:
            yield Finding(severity="note", code="qemu-lacks", text=f"{name} has no {command}: {without}")
    if not lacking:
        has = ", ".join(command for command in USEFUL if command in commands)
        also = f", and {has}" if has else ""
        yield Finding(severity="ok", code="qemu-able", text=f"{name} has all {len(NEEDED)} commands needed{also}")


def _state_dir(host: Host) -> Iterator[Finding]:
    where = shlex.quote(host.state_dir)
    found = []
    if host.mode & 0o077:
        text = f"{host.state_dir} is open to others (mode {host.mode:04o})"
        found.append(Finding(severity="problem", code="state-dir-open", text=text, next=(f"chmod 700 {where}",)))
    if host.owner != host.user:
        text = f"{host.state_dir} belongs to user {host.owner}, and the host process runs as {host.user}"
        found.append(Finding(severity="problem", code="state-dir-owner", text=text))
    if host.free < LITTLE_ROOM_BYTES:
        text = f"{host.free >> 20} MiB are left for the journal: without room nothing new is begun"
        found.append(Finding(severity="problem", code="state-dir-full", text=text, next=(f"df -h {where}",)))
    text = f"{host.state_dir}, mode {host.mode:04o}, journal version {host.journal}, {host.free >> 20} MiB free"
    yield from found or [Finding(severity="ok", code="state-dir", text=text)]


def _programs(host: Host) -> Iterator[Finding]:
    for qemu in host.qemus:
        if qemu.problem is not None:
            text = f"{qemu.path} can't be asked: {qemu.problem}"
            yield Finding(severity="problem", code="qemu-broken", text=text, next=(f"{qemu.path} --version",))
            continue
        yield from can_do(f"{qemu.path}, QEMU {qemu.version},", qemu.commands)
        if _number(qemu.version) < OLDEST_TESTED:
            text = f"{qemu.path} is QEMU {qemu.version}; 7.2 and later are tested"
            yield Finding(severity="note", code="qemu-old", text=text)
    install = "apt-get install qemu-system-x86"
    for guest, program in host.missing:
        text = f"{guest} is started with {program}, which is not there"
        yield Finding(severity="problem", code="qemu-missing", text=text, domain=guest, next=(install,))
    if not host.qemus and not host.missing:
        text = "there is no QEMU on PATH or in BLOCKFERRY_QEMU_DIR: guests can be attached, and not started"
        yield Finding(severity="note", code="qemu-missing", text=text, next=(install,))
    if host.qemu_img.problem is not None:
        text = f"{host.qemu_img.path}: {host.qemu_img.problem}: no image's header can be read"
        yield Finding(severity="problem", code="qemu-img-missing", text=text, next=("apt-get install qemu-utils",))
    else:
        text = f"{host.qemu_img.path}, version {host.qemu_img.version}"
        yield Finding(severity="ok", code="qemu-img", text=text)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def _kvm(host: Host) -> Iterator[Finding]:
    if host.kvm:
        yield Finding(severity="ok", code="kvm", text="/dev/kvm can be used")
        return
    text = "there is no /dev/kvm" if host.kvm is None else "/dev/kvm may not be opened by us"
    command = ("modprobe kvm",) if host.kvm is None else (f"setfacl -m u:{host.user}:rw /dev/kvm",)
    if host.kvm_guests:
        text += f", and {', '.join(host.kvm_guests)} can't be started without it"
        yield Finding(severity="problem", code="kvm-missing", text=text, next=command)
    else:
        text += ": a guest of type kvm can't be started, one of type qemu is emulated"
        yield Finding(severity="note", code="kvm-missing", text=text, next=command)


def _schema(host: Host) -> Iterator[Finding]:
    path, there = host.schema
    if there:
        yield Finding(severity="ok", code="schema", text=f"libvirt's schema {path}: definitions are checked by it too")
    else:
        text = f"libvirt's schema {path} is not there: definitions are checked by our own rules alone"
        yield Finding(severity="note", code="schema-missing", text=text, next=("apt-get install libvirt0",))
