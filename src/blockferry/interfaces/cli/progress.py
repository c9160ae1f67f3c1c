"""How the progress of a copy or a move is drawn: bars on a terminal, lines elsewhere, JSON with --json."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from blockferry.interfaces.cli import moved, render
from blockferry.interfaces.cli.text import doing, duration, rate, size
from blockferry.interfaces.cli.wire import Json

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

Show = Callable[[Json], None]
# Where no terminal is, how far a move is is said at its steps, and so often between them.
LINE_SECONDS = 5.0
# Of a name so much is drawn on a terminal: its figures are more telling.
NAME_COLUMNS = 24
# A terminal that is not so wide has no room for a bar beside the figures.
BAR_COLUMNS = 80


@contextlib.contextmanager
def display(as_json: bool) -> Iterator[Show]:
    """Give a function that draws a progress event; what it drew stays when the block ends."""
    if as_json:
        yield lambda event: click.echo(json.dumps(event))
    elif not sys.stdout.isatty():
        yield lambda event: click.echo(render.progress(event["data"]))
    else:
        with _bar() as show:
            yield show


@contextlib.contextmanager
def _bar() -> Iterator[Show]:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns) as drawn:
        task = drawn.add_task("", figures="")

        def show(event: Json) -> None:
            data = event["data"]
            figures = [f"{size(data['current'])} of {size(data['total'])}"]
            figures += [rate(data["rate"])] if data.get("rate") is not None else []
            left = data.get("remaining_seconds")
            figures += [f"{duration(left)} left"] if left is not None else []
            figures += ["not converging"] if data.get("converging") is False else []
            drawn.update(
                task,
                description=f"{data['disk']} {data['state']}",
                completed=data["current"],
                total=data["total"] or 1,
                figures="  ".join(figures),
            )

        yield show


@contextlib.contextmanager
def move_display(as_json: bool) -> Iterator[Show]:
    """Give a function that draws what is heard of a move: its events, and how far it is."""
    if as_json:
        yield lambda said: click.echo(json.dumps(said))
    elif not sys.stdout.isatty():
        yield _Lines()
    else:
        with _bars() as show:
            yield show


class _Lines:
    """A move's events as they come, and now and then how far it is."""

    def __init__(self) -> None:
        self._said = time.monotonic()
        self._phase = ""

    def __call__(self, said: Json) -> None:
        if said["kind"] == "event":
            self._say(moved.event(said))
        elif said["phase"] != self._phase or time.monotonic() >= self._said + LINE_SECONDS:
            self._phase = said["phase"]
            self._said = time.monotonic()
            self._say(moved.progress(said))

    def _say(self, line: str | None) -> None:
        if line:
            click.echo(line)


@contextlib.contextmanager
def _bars() -> Iterator[Show]:
    """A bar for each disk or file of the phase, and one for all; events go above them and stay."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column
    from rich.text import Text

    console = Console(highlight=False)
    name = TextColumn(
        "{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=NAME_COLUMNS)
    )
    bar = BarColumn(bar_width=None, table_column=Column(ratio=1))
    figures = TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True))
    columns = (name, bar, figures) if console.width >= BAR_COLUMNS else (name, figures)
    with Progress(*columns, console=console, expand=True) as bars:

        def show(said: Json) -> None:
            if said["kind"] == "event":
                line = moved.event(said)
                if line:
                    bars.console.print(Text.from_ansi(line), soft_wrap=True)
            else:
                _draw(bars, said)

        yield show
        for task in bars.tasks:
            bars.remove_task(task.id)


def _draw(bars: Bars, said: Json) -> None:
    """Draw how far a move is: a task a part, and the last one for all of them."""
    rows = [(part["name"].rpartition("/")[2], part, moved.figures(part)) for part in said["parts"]]
    rows.append((doing(said["phase"]), said, moved.figures(said)))
    for task in bars.tasks[len(rows) :]:
        bars.remove_task(task.id)
    for words, row, figures in rows[len(bars.tasks) :]:
        bars.add_task(words, completed=row["current"], total=row["total"] or 1, figures=figures)
    for task, (words, row, figures) in zip(bars.tasks, rows, strict=True):
        bars.update(task.id, description=words, completed=row["current"], total=row["total"] or 1, figures=figures)
