"""Calls that may never come back: who waits goes on without them, and what they give too late is given back."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable

import pytest

from blockferry.qemu.bounded import apart, bounded


class Late:
    """What is to be closed when nobody takes it."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


async def test_what_is_called_apart_answers_or_raises() -> None:
    assert await apart(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await apart(divmod, 7, 0)


def hangs(until: threading.Event, late: Late) -> Callable[[], Late]:
    def call() -> Late:
        until.wait()
        return late

    return call


async def test_what_comes_after_the_bound_is_closed() -> None:
    until, late = threading.Event(), Late()
    with pytest.raises(TimeoutError):
        await bounded(0.05, hangs(until, late))
    assert not late.closed.is_set()
    until.set()
    assert late.closed.wait(10)


async def test_what_has_come_when_its_taker_is_cancelled_is_closed() -> None:
    """The answer and the cancellation in one turn of the loop: the taker has not seen it yet."""
    late, given = Late(), threading.Event()

    def call() -> Late:
        given.set()
        return late

    taker = asyncio.create_task(apart(call))
    await asyncio.sleep(0)  # it waits
    given.wait(10)
    taker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taker
    assert late.closed.wait(10)


@pytest.mark.parametrize("call", [lambda: None, lambda: 1 // 0], ids=["nothing", "a failure"])
async def test_a_late_failure_and_a_late_nothing_disturb_nobody(
    call: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    """What a callback of a future raises is logged, and nothing else."""
    until, before = threading.Event(), set(threading.enumerate())

    def waits() -> object:
        until.wait()
        return call()

    with pytest.raises(TimeoutError):
        await bounded(0.05, waits)
    (thread,) = set(threading.enumerate()) - before
    until.set()
    thread.join(10)
    assert caplog.records == []


async def test_a_socket_that_is_connected_too_late_lets_its_server_go() -> None:
    ours, theirs = socket.socketpair()
    until = threading.Event()

    def connects() -> socket.socket:
        until.wait()
        return ours

    with theirs:
        with pytest.raises(TimeoutError):
            await bounded(0.05, connects)
        until.set()
        theirs.settimeout(10)
        assert theirs.recv(1) == b""
