"""What was measured: rounds of both sides, their medians and ranges, and the table of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

OURS, PEER = "blockferry", "libvirt"
SIDES = (OURS, PEER)
NOTES = (
    "ratio: the median of blockferry's value divided by libvirt's, round by round",
    (
        "[1] libvirt has no mirrored snapshot: a snapshot, then a shallow block copy of one disk after the other; what the "
        "guest writes in between reaches a mirror by being copied"
    ),
    (
        "[2] libvirt pivots one disk after the other and pauses nothing: from the first disk's return until the last's, "
        "in which the guest runs with some disks on their copies and some not; and the eight calls together"
    ),
)


@dataclass(frozen=True)
class Figure:
    """One thing that is measured.

    Attributes:
        key: its name in what a round answers.
        text: what it is, for people.
        unit: `ms` or `MiB/s`.
        target: what it should be, for people; "" where nothing was promised.
        peer_text: what libvirt's number is, where that is not the same.
    """

    key: str
    text: str
    unit: str = "ms"
    target: str = ""
    peer_text: str = ""


@dataclass
class Series:
    """A figure's rounds, by side, in the order in which they were run."""

    figure: Figure
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, side: str, value: float) -> None:
        """Keep a round's value."""
        self.rounds.setdefault(side, []).append(value)

    def median(self, side: str) -> float | None:
        """The middle of a side's rounds; None when it took no part."""
        values = self.rounds.get(side)
        return statistics.median(values) if values else None

    def cell(self, side: str) -> str:
        """`median (min to max)`, or a dash."""
        return cell(self.rounds.get(side, []))

    def ratio(self) -> float | None:
        """The median of blockferry's value divided by libvirt's, pair by pair: drift of the machine falls out."""
        pairs = list(zip(self.rounds.get(OURS, []), self.rounds.get(PEER, []), strict=False))
        return statistics.median(ours / peer for ours, peer in pairs) if pairs else None


def cell(values: list[float], *, digits: int = 1) -> str:
    """`median (min to max)`, or a dash; `digits` after the point of what is under a hundred."""
    if not values:
        return "-"
    middle, least, most = (
        f"{value:.0f}" if value >= 100 else f"{value:.{digits}f}"
        for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({least} to {most})"


def rows(every: list[Series]) -> list[tuple[str, ...]]:
    """The table's rows: figure, n, both sides, ratio, target."""
    table: list[tuple[str, ...]] = []
    for series in every:
        ratio = series.ratio()
        peer = series.cell(PEER)
        if series.figure.peer_text and peer != "-":
            peer += f" {series.figure.peer_text}"
        table.append(
            (
                f"{series.figure.text}, {series.figure.unit}",
                str(len(series.rounds.get(OURS, []))),
                series.cell(OURS),
                peer,
                "-" if ratio is None else f"{ratio:.2f}",
                series.figure.target or "-",
            )
        )
    return table


HEAD = ("median (min to max)", "n", OURS, PEER, "ratio", "target")


def text_table(every: list[Series]) -> str:
    """The table for a terminal."""
    return grid([HEAD, *rows(every)])


def markdown_table(every: list[Series]) -> str:
    """The table for docs/performance.md."""
    return markdown([HEAD, *rows(every)])


def grid(table: Sequence[tuple[str, ...]]) -> str:
    """A table, its head first, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(lines)


def markdown(table: Sequence[tuple[str, ...]]) -> str:
    """A table, its head first, for a page."""
    head, *below = table
    lines = [head, ("---", *["---:"] * (len(head) - 2), "---"), *below]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
