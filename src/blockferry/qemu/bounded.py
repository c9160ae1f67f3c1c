"""Calls that may never come back: of a file system that hangs, nobody can free the thread that waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def bounded(seconds: float, function: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T:
    """Call a function in a thread of its own, and wait for its answer so long.

    Not asyncio.to_thread: its threads are waited for at the end of the process, which would then hang as well.

    Args:
        seconds: the bound.
        function: what may hang.
        arguments: its own.
        named: its own.

    Raises:
        TimeoutError: no answer by then; the thread is left to itself, and ends with the process at the latest.
    """
    answer: Future[T] = Future()

    def run() -> None:
        answer.set_running_or_notify_cancel()
        try:
            answer.set_result(function(*arguments, **named))
        except BaseException as error:  # noqa: BLE001 - the top of a thread: who asked is told
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    async with asyncio.timeout(seconds):
        return await asyncio.wrap_future(answer)
