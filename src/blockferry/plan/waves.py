"""Waves: which of a plan's prepared steps may be under way at the same time.

Eight disks need the same few steps each. One after the other, every step costs a durable write and a round trip; in waves
the writes are those of one disk. All of a wave may then be found half done after a crash, so every step of it has to be
one whose undo finds out by itself whether there is anything to undo.

From a freeze of the guest's file systems to their thaw is a wave too, of steps one after the other: no durable write while
the guest waits.
"""

from __future__ import annotations

from collections.abc import Sequence

from blockferry.plan.files import FlushFiles
from blockferry.plan.steps import AddNode, Freeze, Step, Thaw
from blockferry.plan.tracking import AddBitmap

Wave = tuple[tuple[int, Step], ...]


def waves(prepare: Sequence[Step]) -> tuple[Wave, ...]:
    """The steps with their indices, in their order: neighbours of one verb together, unless one stands on another.

    Beside nodes that are opened bitmaps are added, and files written out.
    """
    found: list[list[tuple[int, Step]]] = []
    for index, step in enumerate(prepare):
        if found and _joins(step, [each for _index, each in found[-1]]):
            found[-1].append((index, step))
        else:
            found.append([(index, step)])
    return tuple(tuple(wave) for wave in found)


def _joins(step: Step, wave: Sequence[Step]) -> bool:
    if isinstance(wave[0], Freeze):
        return not isinstance(wave[-1], Thaw)
    # A bitmap is a disk's, and files are the guest's, and what is opened nobody uses yet: neither waits for the other.
    if isinstance(step, FlushFiles):
        return isinstance(wave[-1], AddNode)
    beside = type(step) is type(wave[-1]) or (isinstance(step, AddBitmap) and isinstance(wave[-1], AddNode))
    opened = {each.node for each in wave if isinstance(each, AddNode)}
    return step.alongside and beside and _stands_on(step) not in opened


def _stands_on(step: Step) -> str | None:
    """The node that has to be open before."""
    if isinstance(step, AddBitmap):
        return step.node
    return step.options.get("backing") if isinstance(step, AddNode) else None
