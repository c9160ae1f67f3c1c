"""Accidents at a chosen moment: requests carried out by a process that is killed at its n-th boundary, or has bad luck there.

A boundary is the moment before or after a durable journal write or a QMP command. `Crasher` keeps one process with
everything imported, which forks one child a case: a real `kill -9` of a real process, in a tenth of a second.

    python -m blockferry.testing.crash      reads cases on standard input, a JSON object a line, answers likewise
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import msgspec

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.request import Request
from blockferry.qemu.session import Session
from blockferry.service import Service
from blockferry.testing.nbd import tell_pause
from blockferry.testing.pen import Pen, PenPlan, listener
from blockferry.testing.sick import fail

WORK_SECONDS = 20.0  # a job of some mebibytes ends within a second
DEATH_SECONDS = 20.0  # a process that was killed has let go of its files within milliseconds


class Accident(msgspec.Struct, frozen=True, kw_only=True):
    """Something bad that happens at a boundary.

    Attributes:
        at: the boundary, from 0.
        what: `die` (the process that carries out the requests is killed), `interrupt` (it gets what Ctrl-C sends), `kill`
            (another is killed), `create` (a file that a server's fault waits for), `hold` (a server holds requests from now
            on), `fill` (a file grows until its file system is full), `cut` (connections end), `fail` (storage fails from now
            on).
        target: the process to kill, as its number or a socket that it listens on; the file to create or to fill; the socket
            that controls the server, see `tell_pause`; the one whose connections end; what fails, as `sick.order` says it.
    """

    at: int
    what: Literal["die", "interrupt", "kill", "create", "hold", "fill", "cut", "fail"]
    target: str = ""


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


class _Case(msgspec.Struct, frozen=True, kw_only=True):
    """A case, as a child is told."""

    state_dir: str
    requests: tuple[Request, ...]
    accidents: tuple[Accident, ...]
    from_open: bool = False
    to_the_end: bool = False
    pen: PenPlan | None = None
    reply_seconds: float | None = None
    marks: str | None = None


class _Witness:
    """Counts boundaries; has the guest write, and accidents happen, at them."""

    def __init__(self, accidents: tuple[Accident, ...], pen: PenPlan | None, marks: str | None) -> None:
        self.counting = False
        self._marks = os.open(marks, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if marks is not None else None
        self.passed: list[str] = []
        self._accidents = accidents
        self._every, self._first = (pen.every, pen.first) if pen is not None else (1, 0)
        self._pen = Pen(pen) if pen is not None else None

    def __call__(self, when: str, what: str) -> None:
        if not self.counting:
            return
        at = len(self.passed)
        due = [each for each in self._accidents if each.at == at]
        if self._pen is not None and (due or at % self._every == self._first):
            self._pen.write()
        for accident in due:
            # Of what fails otherwise a write says so itself.
            flushless = accident.what == "fail" and accident.target.startswith("f")
            if (flushless or accident.what in ("create", "fill")) and self._pen is not None:
                self._pen.doubt()
            _happen(accident)
        self.passed.append(f"{when} {what}")
        if self._marks is not None:
            os.write(self._marks, f"{when} {what}\n".encode())


def _happen(accident: Accident) -> None:
    match accident.what:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        case "kill":
            _kill(int(accident.target) if accident.target.isdigit() else listener(accident.target))
        case "create":
            Path(accident.target).touch()
        case "hold":
            with contextlib.suppress(OSError):
                tell_pause(Path(accident.target), b"p")
        case "fill":
            _fill(Path(accident.target))
        case "cut":
            _cut(accident.target)
        case "fail":
            fail(accident.target)


def _kill(pid: int | None) -> None:
    """Kill a process, if there is one, and wait until it has let go of what it held."""
    if pid is None:
        return
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    signal.pidfd_send_signal(process, signal.SIGKILL)
    select.select([process], [], [], DEATH_SECONDS)
    os.close(process)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(b"\xff" * size):
                    pass
            except OSError:
                continue


def _cut(path: str) -> None:
    """End this process's connections to a socket, as the other side would."""
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family == socket.AF_UNIX and connection.getpeername() == path:
                    connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue


async def _carry_out(case: _Case, witness: _Witness) -> str | None:
    witness.counting = case.from_open
    service = await Service.open(Path(case.state_dir), witness=witness)
    witness.counting = True
    try:
        for request in case.requests:
            await service.submit(request)
            if case.to_the_end:
                await _worked_out(service, getattr(request, "domain", None))
    except errors.BlockferryError as error:
        return error.code
    finally:
        witness.counting = False
        await service.close()
    return None


async def _worked_out(service: Service, domain: str | None) -> None:
    """Wait until no job that ends by itself works any more, and no move: what follows its end is the operation's too.

    Not for ever: behind a proxy nobody can see that QEMU is gone, and its jobs with it.
    """
    last = await service.submit(ask.ListEvents(since=2**62))
    assert isinstance(last, view.EventList)
    if not await _working(service, domain):
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WORK_SECONDS):
            async for _event in service.watch(domain, last.last):
                if not await _working(service, domain):
                    return


async def _working(service: Service, domain: str | None) -> bool:
    if domain is None:  # a request about an operation
        return await moving(service)
    jobs = await service.submit(ask.ListJobs(domain=domain))
    assert isinstance(jobs, view.JobList)
    return any(job.state == "running" for job in jobs.jobs) or await moving(service)


async def moving(service: Service) -> bool:
    """Whether a move is under way."""
    listed = await service.submit(ask.ListOperations())
    assert isinstance(listed, view.OperationList)
    numbers = [each.id for each in listed.operations if each.what == "move" and each.state == "in-progress"]
    moves = [await service.submit(ask.ShowMove(operation=number)) for number in numbers]
    return any(isinstance(move, view.MoveView) and move.state in ("working", "cancelling") for move in moves)


def _child(case: _Case, answer: int) -> None:
    """Carry a case out and write what became of it; never returns."""
    if case.reply_seconds is not None:
        Session.COMMAND_SECONDS = case.reply_seconds
    try:
        witness = _Witness(case.accidents, case.pen, case.marks)
        error = asyncio.run(_carry_out(case, witness))
        said = {"boundaries": witness.passed, "error": error}
    except BaseException:  # noqa: BLE001 - the top of a process: the parent is told, and nothing is unwound further
        said = {"boundaries": [], "error": traceback.format_exc()}
    os.write(answer, json.dumps(said).encode())
    os._exit(0)


def _serve() -> None:
    # What is there now stays: no child looks through it again for what is to be collected.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        case = msgspec.json.decode(line, type=_Case)
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
    """A process that carries requests out in children that die when told.

    Args:
        under: what its command line begins with: a program that watches it.
    """

    def __init__(self, under: Sequence[str] = ()) -> None:
        self._under = under
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [*self._under, sys.executable, "-m", "blockferry.testing.crash"],
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
        self,
        state_dir: Path,
        requests: Sequence[Request],
        *,
        at: int | None = None,
        from_open: bool = False,
        accidents: Sequence[Accident] = (),
        to_the_end: bool = False,
        pen: PenPlan | None = None,
        reply_seconds: float | None = None,
        marks: Path | None = None,
    ) -> CrashResult:
        """Open the state directory in a new process, carry the requests out, and have accidents happen to it.

        Args:
            state_dir: whose journal is used; nobody else may have it open.
            requests: one after the other.
            at: the boundary to die at, from 0; None to live.
            from_open: count from the opening (recovery) on, rather than from the first request.
            accidents: more that happens.
            to_the_end: wait after each request until its jobs that end by themselves have ended.
            pen: what the guest writes meanwhile.
            reply_seconds: how long a reply of QEMU's is waited for, rather than as in earnest.
            marks: a file to which each boundary is written when it is passed, for whoever traces the process.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        die = (Accident(at=at, what="die"),) if at is not None else ()
        case = _Case(
            state_dir=str(state_dir),
            requests=tuple(requests),
            accidents=(*accidents, *die),
            from_open=from_open,
            to_the_end=to_the_end,
            pen=pen,
            reply_seconds=reply_seconds,
            marks=str(marks) if marks is not None else None,
        )
        process.stdin.write(msgspec.json.encode(case).decode() + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return CrashResult(killed=answer["killed"], boundaries=tuple(answer["boundaries"]), error=answer["error"])


if __name__ == "__main__":
    _serve()
