"""The command as people run it: a process of its own, on a state directory of its own, with real QEMUs."""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from blockferry.model.view import View
from blockferry.testing import TestQemu, blockdev_disk, find_qemu, legacy_drive, make_image, write_pattern

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


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "state"
    yield path
    stop(path)


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


@pytest.fixture
async def command(state_dir: Path) -> AsyncIterator[Command]:
    running = Command(state_dir)
    yield running
    await running.close()


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[TestQemu]:
    """A guest with a qcow2 disk (vda) full of data on a blockdev with an iothread, and a raw one (vdb) on a -drive."""
    qemu = find_qemu("distribution")
    first = make_image(qemu, tmp_path / "a.qcow2", "qcow2", DISK_MIB * MIB)
    second = make_image(qemu, tmp_path / "b.raw", "raw", DISK_MIB * MIB)
    write_pattern(qemu, first, "qcow2", 0, DISK_MIB * MIB, 0x5A)
    write_pattern(qemu, second, "raw", 0, MIB, 0xA5)
    disks = [*blockdev_disk("d0", first, "qcow2", iothread="io0"), *legacy_drive(second, "raw")]
    async with TestQemu(qemu, tmp_path, args=disks, paused=False) as running:
        yield running
