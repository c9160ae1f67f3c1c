"""Values as people read them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import click

GOOD = frozenset({"running", "ready", "done", "working", "pivoted", "finished", "serving", "ok"})
BAD = frozenset({"lost", "gone", "unreachable", "failed", "unsettled", "io-error", "problem", "standing still"})
BUSY = frozenset(
    {
        "copying",
        "catching up",
        "in-progress",
        "intent",
        "undone",
        "cancelled",
        "removed",
        "paused",
        "note",
        "cancelling",
    }
)

# What is done in a move's phases. Until the guest goes over there is nothing to be seen of a pivot but mirrors that catch up.
DOING = {
    "copy": "copying",
    "mirror": "mirroring",
    "pivot": "mirroring",
    "verify": "comparing",
    "end": "ending",
    "back": "going back",
}


def paint(word: str) -> str:
    """Colour a state; taken away again where no terminal shows it."""
    colour = "green" if word in GOOD else "red" if word in BAD else "yellow" if word in BUSY else None
    return click.style(word, fg=colour) if colour else word


def doing(phase: str) -> str:
    """What is done in a phase of a move."""
    return DOING.get(phase, phase)


def visible(text: str) -> str:
    """A name of somebody else's making, with what a terminal would obey, or XML can't hold, written as Python does."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def size(count: float | None) -> str:
    """Bytes: 512 B, 1.5 KiB, 10.0 GiB."""
    if count is None:
        return "-"
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} PiB"


def rate(count: float | None) -> str:
    """Bytes per second."""
    return "-" if count is None else f"{size(count)}/s"


def duration(seconds: float | None) -> str:
    """Minutes and seconds, hours when there are any: 0:31, 1:02:00."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(current: int, total: int) -> str:
    """How much of it: never 100 % before it is."""
    return f"{min(100, int(100 * current / total)) if total else 100} %"


def moment(seconds: float) -> str:
    """A time of day with its date, here."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def printable(text: str) -> str:
    """What others have written, without characters that a terminal takes for commands."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def table(rows: Sequence[Sequence[str]], heading: Sequence[str] = ()) -> str:
    """Columns, two spaces apart; the heading only when there are rows."""
    lines = [list(heading), *map(list, rows)] if heading and rows else list(map(list, rows))
    widths = [max(len(click.unstyle(cell)) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell + " " * (width - len(click.unstyle(cell))) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )
