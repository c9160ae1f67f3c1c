"""What is decided while a step is carried out."""

from __future__ import annotations

import pytest

from blockferry.engine.executor import SHORT_SYNC_SECONDS, SYNC_PASSES, until_short

SHORT, LONG = SHORT_SYNC_SECONDS / 2, SHORT_SYNC_SECONDS * 20


@pytest.mark.parametrize(
    ("takes", "passes"),
    [((SHORT,), 1), ((LONG, SHORT), 2), ((LONG, LONG / 10, SHORT), 3), ((LONG,) * 9, SYNC_PASSES)],
    ids=["nobody writes", "somebody writes", "much", "more than storage takes"],
)
async def test_files_are_written_out_until_that_is_short(takes: tuple[float, ...], passes: int) -> None:
    now, left, done = 0.0, list(takes), 0

    async def sync() -> None:
        nonlocal now, done
        now += left.pop(0)
        done += 1

    await until_short(sync, lambda: now)
    assert done == passes


async def test_what_can_not_be_written_out_is_not_tried_again() -> None:
    tried = 0

    async def sync() -> None:
        nonlocal tried
        tried += 1
        raise OSError("the storage is ill")

    with pytest.raises(OSError, match="ill"):
        await until_short(sync)
    assert tried == 1
