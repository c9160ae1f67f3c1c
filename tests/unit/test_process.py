"""Telling whether a process has ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from blockferry.qemu.process import born, ends, kill, lives

# Its first thread ends (exit(2), not exit_group) while another goes on until standard input ends.
LEADER_FIRST = """
import ctypes, os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0))).start()
ctypes.CDLL(None).syscall(60, 0)
"""


def leader_first() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", LEADER_FIRST], stdin=subprocess.PIPE)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def test_a_process_whose_first_thread_has_ended_has_not() -> None:
    """As QEMU between its exit and the end of its other threads: it still holds its files, and its lock."""
    process = leader_first()
    assert process.stdin is not None
    started = born(process.pid)
    assert started is not None
    while state(process.pid) != "Z":
        pass
    assert not await ends(process.pid, started, 0.0)
    process.stdin.close()
    assert await ends(process.pid, started, 10.0)
    assert await ends(process.pid, started, 0.0), "a zombie has ended"
    assert process.wait(10) == 0
    assert await ends(process.pid, started, 0.0)


async def test_a_number_that_a_thread_of_another_process_has() -> None:
    """After a new start of the host, for one. pidfd_open(2) has an error of its own for it, which kernels do not agree on."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        assert await ends(thread.native_id, None, 0.0)
        kill(thread.native_id, None)
        assert thread.is_alive()
    finally:
        over.set()
        thread.join()


async def test_another_process_of_that_number_is_not_that_one() -> None:
    own = born(os.getpid())
    assert own is not None
    assert lives(os.getpid(), own)
    assert not await ends(os.getpid(), own, 0.0)
    assert not lives(os.getpid(), own - 1)
    assert await ends(os.getpid(), own - 1, 0.0)
