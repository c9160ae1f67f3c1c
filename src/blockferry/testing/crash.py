"""Dying at a chosen moment: requests carried out by a process that is killed at its n-th boundary.

A boundary is the moment before or after a durable journal write or a QMP command. `Crasher` keeps one process with
everything imported, which forks one child a case: a real `kill -9` of a real process, in a tenth of a second.

    python -m blockferry.testing.crash      reads cases on standard input, a JSON object a line, answers likewise
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from blockferry import errors
from blockferry.model.request import Request
from blockferry.service import Service


@dataclass(frozen=True)
class CrashResult:
    """What became of a case.

    Attributes:
        killed: whether the n-th boundary was reached, and the process died there.
        boundaries: the boundaries that were passed, as `when what`, when it was not killed.
        error: the code of the error that the last request ended with, or a traceback; None when it went well.
    """

    killed: bool
    boundaries: tuple[str, ...] = ()
    error: str | None = None


class _Witness:
    """Counts boundaries, and dies at one."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.counting = False
        self.passed: list[str] = []

    def __call__(self, when: str, what: str) -> None:
        if not self.counting:
            return
        if len(self.passed) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed.append(f"{when} {what}")


async def _carry_out(state_dir: Path, requests: list[Request], witness: _Witness, *, from_open: bool) -> str | None:
    witness.counting = from_open
    service = await Service.open(state_dir, witness=witness)
    witness.counting = True
    try:
        for request in requests:
            await service.submit(request)
    except errors.BlockferryError as error:
        return error.code
    finally:
        witness.counting = False
        await service.close()
    return None


def _child(case: dict[str, object], answer: int) -> None:
    """Carry a case out and write what became of it; never returns."""
    witness = _Witness(case["at"] if isinstance(case["at"], int) else None)
    requests = msgspec.convert(case["requests"], list[Request])
    try:
        error = asyncio.run(
            _carry_out(Path(str(case["state_dir"])), requests, witness, from_open=bool(case["from_open"]))
        )
    except BaseException:  # noqa: BLE001 - the top of a process: the parent is told, and nothing is unwound further
        error = traceback.format_exc()
    os.write(answer, json.dumps({"boundaries": witness.passed, "error": error}).encode())
    os._exit(0)


def _serve() -> None:
    for line in sys.stdin:
        case = json.loads(line)
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            _child(case, theirs)
        os.close(theirs)
        with os.fdopen(ours, "rb") as pipe:
            said = pipe.read()
        _pid, status = os.waitpid(pid, 0)
        answer = json.loads(said) if said else {"boundaries": [], "error": None}
        answer["killed"] = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


class Crasher:
    """A process that carries requests out in children that die when told."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "blockferry.testing.crash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _where: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()

    def run(
        self, state_dir: Path, requests: Sequence[Request], *, at: int | None, from_open: bool = False
    ) -> CrashResult:
        """Open the state directory in a new process, carry the requests out, and die at boundary `at`.

        Args:
            state_dir: whose journal is used; nobody else may have it open.
            requests: one after the other.
            at: the boundary to die at, from 0; None to live.
            from_open: count from the opening (recovery) on, rather than from the first request.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        case = {
            "state_dir": str(state_dir),
            "requests": msgspec.to_builtins(list(requests)),
            "at": at,
            "from_open": from_open,
        }
        process.stdin.write(json.dumps(case) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        return CrashResult(killed=answer["killed"], boundaries=tuple(answer["boundaries"]), error=answer["error"])


if __name__ == "__main__":
    _serve()
