"""How fast jobs are, and whether they get ready."""

from __future__ import annotations

import pytest

from blockferry.engine.progress import Pace, Sample, pace_of


@pytest.mark.parametrize(
    ("samples", "pace"),
    [
        (((0.0, 0, 100),), Pace()),
        (((0.0, 5, 100), (0.0, 5, 100)), Pace()),
        (((0.0, 0, 100), (2.0, 20, 100)), Pace(rate=10, dirty_rate=0, converging=True, remaining_seconds=8)),
        (((0.0, 0, 100), (2.0, 20, 110)), Pace(rate=10, dirty_rate=5, converging=True, remaining_seconds=18)),
        (((0.0, 0, 100), (2.0, 20, 120)), Pace(rate=10, dirty_rate=10, converging=False)),
        (((0.0, 0, 100), (2.0, 20, 160)), Pace(rate=10, dirty_rate=30, converging=False)),
        (((0.0, 9, 100), (2.0, 9, 100)), Pace(rate=0, dirty_rate=0)),
        (((0.0, 0, 0), (1.0, 16, 100)), Pace()),
        (
            ((0.0, 0, 0), (1.0, 16, 100), (2.0, 26, 100)),
            Pace(rate=10, dirty_rate=0, converging=True, remaining_seconds=7.4),
        ),
        (((0.0, 90, 100), (2.0, 110, 110)), Pace(rate=10, dirty_rate=5, converging=True, remaining_seconds=0)),
    ],
    ids=[
        "first",
        "no time",
        "nobody writes",
        "somebody writes",
        "as fast as it copies",
        "faster",
        "stands still",
        "its total just set",
        "its total set a while ago",
        "through",
    ],
)
def test_pace(samples: tuple[Sample, ...], pace: Pace) -> None:
    assert pace_of(samples) == pace
