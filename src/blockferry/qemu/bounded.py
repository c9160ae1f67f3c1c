"""Calls that may never come back: of a file system that hangs, nobody can free the thread that waits for it.

Not asyncio.to_thread: its threads are waited for at the end of the process, which would then hang as well.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

P = ParamSpec("P")
T = TypeVar("T")


@runtime_checkable
class Closes(Protocol):
    """What holds something of the system's until it is closed."""

    def close(self) -> None:
        """Give it back."""


async def apart(function: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T:
    """Call a function in a thread of its own, for as long as it takes.

    Whoever waits can be cancelled; the thread is left to itself then, and ends with the process at the latest. What it still
    gives, nobody takes: a socket or a file is closed then.

    Args:
        function: what may hang.
        arguments: its own.
        named: its own.
    """
    answer: Future[T] = Future()

    def run() -> None:
        if not answer.set_running_or_notify_cancel():
            return
        try:
            answer.set_result(function(*arguments, **named))
        except BaseException as error:  # noqa: BLE001 - the top of a thread: who asked is told
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return await asyncio.wrap_future(answer)
    except asyncio.CancelledError:
        answer.add_done_callback(_let_go)
        raise


def _let_go(answer: Future[Any]) -> None:
    """Close what came too late: a QMP socket serves one client, so one that is left open would keep all others out."""
    if not answer.cancelled() and answer.exception() is None and isinstance(late := answer.result(), Closes):
        late.close()


async def bounded(seconds: float, function: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T:
    """Call a function as `apart` does, and wait for its answer so long.

    Args:
        seconds: the bound.
        function: what may hang.
        arguments: its own.
        named: its own.

    Raises:
        TimeoutError: no answer by then.
    """
    async with asyncio.timeout(seconds):
        return await apart(function, *arguments, **named)
