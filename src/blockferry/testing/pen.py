"""A guest that writes at chosen moments: numbered records through its own disks, and a log of what was acknowledged.

The log outlives whoever writes it, `kill -9` included: a record is announced, written and flushed, then acknowledged, each
with a line of its own. What was acknowledged has to be there afterwards; what was announced only may be.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockferry.testing.sick import failing

RECORD_BYTES = 4096
RECORDS_AT = 1 << 21  # where they begin on each disk
DOUBT = "doubt"
SLOTS = 128  # of a disk; the record after the last is written over the first
ANSWER_SECONDS = 5.0  # QEMU answers within milliseconds; it may have been killed, or hang


@dataclass(frozen=True)
class PenPlan:
    """Where to write.

    Attributes:
        monitor: a QMP socket of the guest's, which nobody else uses.
        disks: by target, the device as QEMU's test command names it: a qdev path.
        log: where records are announced and acknowledged.
        every: write at each so manieth moment.
        first: the first of them, below `every`.
    """

    monitor: str
    disks: Mapping[str, str]
    log: str
    every: int = 4
    first: int = 0


def listener(path: str) -> int | None:
    """The process that listens on a Unix socket; None when nobody does."""
    with socket.socket(socket.AF_UNIX) as peer:
        try:
            peer.connect(path)
        except OSError:
            return None
        pid, _uid, _gid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(pid)


class Monitor:
    """A connection to a QMP socket, one command after the other.

    Raises:
        OSError: nobody answers there, or not in time; so do all methods, and for an error that QEMU answers.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(ANSWER_SECONDS)
            self._socket.connect(path)
            self._lines = self._socket.makefile("rb")
            self._lines.readline()
            self.ask("qmp_capabilities")
        except OSError:
            self.close()
            raise

    def ask(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Execute a command and return its answer."""
        asked = {"execute": command} | ({"arguments": arguments} if arguments else {})
        # QEMU reads its monitor byte by byte, with a turn of its main loop for each.
        self._socket.sendall(json.dumps(asked, separators=(",", ":")).encode() + b"\n")
        while line := self._lines.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise OSError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]
        raise ConnectionResetError(command)

    def close(self) -> None:
        """End it."""
        self._socket.close()


class Pen:
    """Writes records as long as the guest runs; nothing in it waits for the code under test."""

    def __init__(self, plan: PenPlan) -> None:
        self._plan = plan
        self._log = os.open(plan.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        said = Path(plan.log).read_text().splitlines()
        self._number = sum(line.startswith("write") for line in said)
        self._doubtful = DOUBT in said
        self._monitor: Monitor | None = None
        self._hangs = False

    def doubt(self) -> None:
        """What is written from now on need not last, whoever writes it: a flush may fail, and nobody would say so here.

        QEMU believes no page cache that a flush once failed of, until it opens the image anew.
        """
        self._doubtful = True
        self._say(DOUBT)

    def write(self) -> None:
        """Write the next record, if the guest runs and its disks are not being switched at this moment."""
        if self._hangs:
            return
        try:
            # The guest may be started only now.
            self._monitor = self._monitor or Monitor(self._plan.monitor)
            self._write(self._monitor)
        except OSError as error:
            # QEMU is gone, or it hangs: nothing is acknowledged then.
            self.close()
            self._hangs = isinstance(error, TimeoutError)

    def close(self) -> None:
        """End the connection; the next record makes another."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def _write(self, monitor: Monitor) -> None:
        if monitor.ask("query-status")["status"] != "running":
            return
        if _held(monitor):
            return
        targets = sorted(self._plan.disks)
        target = targets[self._number % len(targets)]
        qdev = self._plan.disks[target]
        slot, byte = self._number // len(targets) % SLOTS, 1 + self._number % 255
        self._say(f"write {self._number} {target} {slot} {byte}")
        self._number += 1
        before = _counts(monitor, qdev)
        # With its flush (FUA): QEMU's monitor waits for one of its own, and nobody else is answered, where the disk is held.
        at = RECORDS_AT + slot * RECORD_BYTES
        line = f'qemu-io -d {qdev} "aio_write -q -f -P {byte} {at} {RECORD_BYTES}"'
        monitor.ask("human-monitor-command", {"command-line": line})
        deadline = time.monotonic() + ANSWER_SECONDS
        while (now := _counts(monitor, qdev)) == before:
            if _held(monitor):
                return  # it is answered when the disk has gone over, for which somebody waits for us
            if time.monotonic() > deadline:
                raise TimeoutError("the write does not end")
        if now[1] == before[1] and not self._doubtful and not failing():
            self._say(f"acknowledged {self._number - 1}")

    def _say(self, line: str) -> None:
        os.write(self._log, f"{line}\n".encode())


def _counts(monitor: Monitor, qdev: str) -> tuple[int, int]:
    """How many writes to a disk are done, and how many failed."""
    for each in monitor.ask("query-blockstats"):
        if each.get("qdev") == qdev:
            return each["stats"]["wr_operations"], each["stats"]["failed_wr_operations"]
    raise OSError(f"there is no {qdev}")


def _held(monitor: Monitor) -> bool:
    """Whether a job that waits for its finalize may hold its disk drained: the guest's writes wait then, and so would we."""
    return any(job["status"] in ("waiting", "pending") for job in monitor.ask("query-jobs"))


@dataclass
class Records:
    """What the log says of one disk: by slot, the byte that has to be there, and those that may be there instead."""

    must: dict[int, int]
    may: dict[int, set[int]]


def read_log(path: Path, targets: tuple[str, ...]) -> dict[str, Records]:
    """By target, what its disk holds of the records of a log."""
    found = {target: Records(must={}, may={}) for target in targets}
    written: dict[int, tuple[str, int, int]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        match line.split():
            case ["write", number, target, slot, byte]:
                written[int(number)] = (target, int(slot), int(byte))
                found[target].may.setdefault(int(slot), set()).add(int(byte))
            case ["acknowledged", number]:
                target, at, value = written[int(number)]
                found[target].must[at] = value
                found[target].may[at] = set()
    return found
