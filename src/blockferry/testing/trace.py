"""The system calls of a process, in order: what was on disk when a command was sent."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from blockferry.testing.missing import MissingComponentError

CALLS = "openat,open,write,pwrite64,sendto,sendmsg,fsync,fdatasync,unlink,rename,renameat"
SHOWN_BYTES = 160  # of what is written or sent: a QMP command begins with its name
_LINE = re.compile(r"^(?P<thread>\d+) +(?:<\.\.\. (?P<resumed>\w+) resumed>|(?P<name>\w+)\()(?P<rest>.*)$")
_UNFINISHED = " <unfinished ...>"
_RESULT = re.compile(r"\) += (-?\d+)(?:<(.*)>)?(?: E\w+ \(.*\))?$")
_FILE = re.compile(r"^\d+<([^>]*)>")
_COMMAND = re.compile(r'\\"execute\\": ?\\"([\w-]+)\\"')


@dataclass(frozen=True)
class Call:
    """A system call that went well.

    Attributes:
        name: `fdatasync`.
        path: of the file that it is about, as the kernel knew its descriptor then.
        text: its arguments as strace shows them.
        began: the line of the trace at which it began.
        ended: and at which it had ended.
    """

    name: str
    path: str
    text: str
    began: int
    ended: int

    @property
    def command(self) -> str | None:
        """The QMP command that it sends."""
        found = _COMMAND.search(self.text) if self.name in ("sendto", "sendmsg", "write") else None
        return found[1] if found else None

    @property
    def flushes(self) -> bool:
        """Whether a file or folder is on disk when it has ended."""
        return self.name in ("fsync", "fdatasync")

    @property
    def creates(self) -> bool:
        """Whether it makes a file that was not there."""
        return self.name in ("open", "openat") and "O_CREAT|O_EXCL" in self.text


def strace(to: Path, *also: str) -> list[str]:
    """What a command line begins with so that its calls are written down, and those of its threads and of what it forks.

    Programs that it starts are let go: a QEMU that is traced is slow.

    Args:
        to: the file to write to.
        also: more calls than CALLS.

    Raises:
        MissingComponentError: there is no strace.
    """
    program = shutil.which("strace")
    if program is None:
        raise MissingComponentError("strace", "scripts/system-packages.sh tests")
    quiet = ["-qqq", "-e", "signal=none", "-e", f"trace={','.join((CALLS, *also))}"]
    return [program, "-f", "-b", "execve", "-y", "-s", str(SHOWN_BYTES), *quiet, "-o", str(to), "--"]


def read_trace(text: str) -> list[Call]:
    """The calls of a trace that went well, in the order in which they began."""
    found: list[Call] = []
    begun: dict[tuple[str, str], tuple[int, str]] = {}
    for number, line in enumerate(text.splitlines()):
        match = _LINE.match(line)
        if match is None:
            continue
        name, rest, began = match["name"] or match["resumed"], match["rest"], number
        if match["resumed"]:
            began, first = begun.pop((match["thread"], name))
            rest = first + rest
        elif rest.endswith(_UNFINISHED):
            begun[match["thread"], name] = (number, rest.removesuffix(_UNFINISHED))
            continue
        result = _RESULT.search(rest)
        if result is None or int(result[1]) < 0:
            continue
        about = _FILE.match(rest)
        path = about[1] if about and not name.startswith("open") else result[2] or _named(rest)
        found.append(Call(name, path, rest[: result.start()], began, number))
    return sorted(found, key=lambda call: call.began)


def _named(text: str) -> str:
    """The first path among a call's arguments."""
    found = re.search(r'"([^"]*)"', text)
    return found[1] if found else ""
