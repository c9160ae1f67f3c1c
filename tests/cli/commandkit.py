"""Running the command as people do: a process of its own, on a state directory of its own."""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from blockferry.model.view import View

MIB = 1024 * 1024
DISK_MIB = 48
BLOCKFERRY = Path(sys.executable).parent / "blockferry"


@dataclass
class Result:
    stdout: str
    stderr: str
    status: int

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its JSON, an object a line."""
        return [json.loads(line) for line in self.stdout.splitlines()]


class Command:
    """`blockferry --state-dir DIR ...`."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.started: list[asyncio.subprocess.Process] = []

    async def start(self, *arguments: str, **options: Any) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            BLOCKFERRY,
            "--state-dir",
            str(self.state_dir),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            **options,
        )
        self.started.append(process)
        return process

    async def close(self) -> None:
        """Kill those that a failed test left behind."""
        for process in self.started:
            if process.returncode is None:
                process.kill()
                await process.communicate()

    async def ends(self, process: asyncio.subprocess.Process) -> Result:
        stdout, stderr = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode is not None
        return Result(stdout.decode(), stderr.decode(), process.returncode)

    async def __call__(self, *arguments: str, status: int = 0, **options: Any) -> Result:
        """Run it to its end, which must have that status."""
        result = await self.ends(await self.start(*arguments, **options))
        assert result.status == status, f"{result.stdout}{result.stderr}"
        return result

    async def json(self, *arguments: str, status: int = 0) -> dict[str, Any]:
        """Run it with --json: what it prints is one object, and every line a documented view."""
        result = await self(*arguments, "--json", status=status)
        (line,) = result.lines
        if status == 0:
            msgspec.convert(line, View)
        assert line["version"] == 1
        return line


async def line_with(stream: asyncio.StreamReader | None, word: str) -> str:
    """Read on to the line that has the word."""
    assert stream is not None
    while line := (await asyncio.wait_for(stream.readline(), 60)).decode():
        if word in line:
            return line
    raise AssertionError(f"it ended without {word!r}")


def read_all(terminal: int) -> str:
    """What was written to a terminal, until its other side is closed."""
    said = b""
    with open(terminal, "rb", buffering=0) as stream:
        while True:
            try:
                chunk = stream.read(65536)
            except OSError:  # the other side is closed: a terminal's end of file
                break
            if not chunk:
                break
            said += chunk
    return said.decode()


def owner(state_dir: Path) -> int:
    """The process id in the lock."""
    return int((state_dir / "lock").read_text())


def stop(state_dir: Path, number: signal.Signals = signal.SIGTERM) -> None:
    """End the host process, if there is one, and wait until it has let go of the lock."""
    lock = state_dir / "lock"
    if not lock.exists():
        return
    with lock.open("r+") as file:
        if (pid := file.read().strip()).isdigit() and int(pid) != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), number)
        fcntl.flock(file, fcntl.LOCK_EX)
