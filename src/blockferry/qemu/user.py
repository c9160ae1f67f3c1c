"""Running QEMU as another user: who that is, which option it is to this QEMU, and whether the images are the user's to open.

QEMU opens what is on its command line first and becomes the user then; what it opens later (an overlay, a destination, a base
that something is committed into) it opens as the user.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
import subprocess

from blockferry.model.definition import RunAs
from blockferry.qemu.probe import ask_option
from blockferry.qemu.tool import ImageError

_CHECK_SECONDS = 10


class NoSuchUser(Exception):
    """Nobody is called so, or we are not root."""


async def run_as(program: str, label: str, relabel: bool) -> RunAs | None:
    """How a QEMU is made to run as the user of a definition; None for who we are already.

    Args:
        program: QEMU; it is asked which option it has.
        label: libvirt's: `USER`, `USER:GROUP`; a `+` before a number.
        relabel: whether the images that the guest writes to become the user's.

    Raises:
        NoSuchUser: it can't be done.
    """
    user, _, group = label.partition(":")
    try:
        uid, name, gid = _user(user)
        gid = _group(group) if group else gid
    except (KeyError, ValueError, OverflowError) as error:
        raise NoSuchUser(f"there is no user or group {label}") from error
    if uid == os.geteuid() and gid == os.getegid():
        return None
    if os.geteuid() != 0:
        raise NoSuchUser(f"only root starts a guest as another user, {label}")
    # By its name QEMU takes the user's other groups too, such as kvm.
    words = name if name is not None and not group else f"{uid}:{gid}"
    modern = await ask_option(program, "run-with", "user")
    return RunAs(
        words=("-run-with", f"user={words}") if modern else ("-runas", words), uid=uid, gid=gid, relabel=relabel
    )


def _user(text: str) -> tuple[int, str | None, int]:
    digits = text.removeprefix("+")
    if digits.isascii() and digits.isdecimal() and (text.startswith("+") or not _is_name(text)):
        return int(digits), None, int(digits)
    found = pwd.getpwnam(text)
    return found.pw_uid, found.pw_name, found.pw_gid


def _is_name(text: str) -> bool:
    try:
        pwd.getpwnam(text)
    except KeyError:
        return False
    return True


def _group(text: str) -> int:
    digits = text.removeprefix("+")
    if digits.isascii() and digits.isdecimal():
        return int(digits)
    return grp.getgrnam(text).gr_gid


def hand_over(who: RunAs) -> None:
    """Give the user the images that the guest writes to, if that was asked for, and see that all can be opened.

    Raises:
        ImageError: one can't be opened by the user, with what would help.
    """
    for path in who.written if who.relabel else ():
        _give(path, who)
    for path, letters in [*((path, "rw") for path in who.written), *((path, "r") for path in who.read)]:
        if not _can_open(path, letters, who):
            raise ImageError(
                f"{path} can't be opened by user {who.uid}, group {who.gid}: "
                + (
                    "every folder above it has to be passable, too"
                    if who.relabel
                    else "relabel='yes' makes it the user's"
                )
            )


def _give(path: str, who: RunAs) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode):
                os.fchown(descriptor, who.uid, who.gid)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error


def _can_open(path: str, letters: str, who: RunAs) -> bool:
    """Asked of the system as that user (faccessat(2)), so that folders and access lists count."""
    asked = [word for letter in letters for word in (f"-{letter}", path, "-a")][:-1]
    groups = os.getgrouplist(pwd.getpwuid(who.uid).pw_name, who.gid) if _has_account(who.uid) else [who.gid]
    done = subprocess.run(
        ["test", *asked], user=who.uid, group=who.gid, extra_groups=groups, check=False, timeout=_CHECK_SECONDS
    )
    return done.returncode == 0


def _has_account(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True
