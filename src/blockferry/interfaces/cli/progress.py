"""How a copy's progress is drawn: a bar on a terminal, lines elsewhere, JSON with --json."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator

import click

from blockferry.interfaces.cli import render
from blockferry.interfaces.cli.text import duration, rate, size
from blockferry.interfaces.cli.wire import Json

Show = Callable[[Json], None]


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
            drawn.update(
                task,
                description=f"{data['disk']} {data['state']}",
                completed=data["current"],
                total=data["total"] or 1,
                figures="  ".join(figures),
            )

        yield show
