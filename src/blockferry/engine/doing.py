"""Doing one step: what it gave, or how it failed, in the words of whoever refused it."""

from __future__ import annotations

from typing import Any

from blockferry.engine.executor import Executor
from blockferry.engine.jobsteps import StepFailed
from blockferry.engine.rescue import Rescue
from blockferry.plan import steps
from blockferry.qemu.session import CommandRefused, LostReply
from blockferry.qemu.tool import ImageError


class Failure(Exception):
    """A step that did not do what it should: its text and the reason; `unknown` when nobody knows whether it did."""

    def __init__(self, step: str, reason: str, *, unknown: bool = False) -> None:
        super().__init__(f"{step}: {reason}")
        self.step = step
        self.reason = reason
        self.unknown = unknown


async def do(executor: Executor, step: steps.Step, claims: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Do a step.

    Args:
        executor: carries it out.
        step: what to do.
        claims: by path, what is known of the files that the same plan has claimed.

    Raises:
        Failure: it did not do what it should, or nobody knows.
    """
    try:
        return await executor.do(step, claims)
    except CommandRefused as refusal:
        raise Failure(step.text, refusal.words) from refusal
    except LostReply as lost:
        raise Failure(step.text, f"no reply ({lost.reason})", unknown=True) from lost
    except (ImageError, StepFailed) as error:
        raise Failure(step.text, str(error)) from error


async def attempt(executor: Executor, step: steps.Step, claims: dict[str, dict[str, Any]]) -> dict[str, Any] | Failure:
    """As `do`, for several at the same time: a failure is an answer, so that all of them are waited for."""
    try:
        return await do(executor, step, claims)
    except Failure as failure:
        return failure


async def do_in_time(executor: Executor, step: steps.Step, rescue: Rescue) -> None:
    """As `do`, in a window: what failed because the guest had to be freed says so, and what came too late has failed."""
    result = await attempt(executor, step, {})
    if isinstance(result, Failure):
        await rescue.settled()
    if rescue.dead:
        raise Failure(step.text, rescue.words)
    if isinstance(result, Failure):
        raise result
