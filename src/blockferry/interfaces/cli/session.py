"""What every verb shares: the state directory, `--json`, asking and showing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from blockferry.hostprocess import StateDir, default_state_dir
from blockferry.interfaces.cli import wire
from blockferry.interfaces.cli.wire import Json

F = TypeVar("F", bound=Callable[..., Any])
Render = Callable[[Json], str]


class Session:
    """One run of the command, as click's context object."""

    def __init__(self) -> None:
        self.state_dir: str | None = None
        self.json = False

    @property
    def state(self) -> StateDir:
        """The state directory that was named, or the default."""
        return StateDir(self.state_dir or default_state_dir())

    def ask(self, request: str, **fields: object) -> Json:
        """Have a request carried out; fields that are None keep their defaults."""
        given = {name: value for name, value in fields.items() if value is not None}
        return wire.submit(self.state, {"request": request, **given})

    def show(self, view: Json, render: Render) -> None:
        """Print a view: one line of JSON with --json, else as `render` writes it for people."""
        click.echo(json.dumps(view) if self.json else render(view))

    def answer(self, render: Render, request: str, **fields: object) -> None:
        """Have a request carried out, and print the view."""
        self.show(self.ask(request, **fields), render)


class Stopped(Exception):
    """Ctrl-C, with what goes on all the same."""


def json_option(function: F) -> F:
    """Add --json to a verb; it lands in the session."""

    def store(context: click.Context, _option: click.Parameter, value: bool) -> None:
        if value and not context.resilient_parsing:
            context.ensure_object(Session).json = True

    option = click.option("--json", is_flag=True, expose_value=False, callback=store, help="Print JSON (docs/json.md).")
    return option(function)


def examples(*lines: str) -> str:
    """Write the end of a help text; click leaves the lines as they are."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def absolute(path: str) -> str:
    """A path as the host process has to see it, which works in another directory; a URI is left as it is."""
    return path if "://" in path else os.path.abspath(path)


def disk_name(text: str) -> str:
    """A DISK: the path of an image is made absolute, a target or qdev id stays."""
    return absolute(text) if "/" in text and not _is_qdev(text) else text


def _is_qdev(text: str) -> bool:
    return text.startswith("/machine/")  # the path of a device without an id, as QEMU writes it


class Size(click.ParamType["int"]):
    """Bytes: 65536, 64K, 1M; powers of 1024."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it."""
        count = value if isinstance(value, int) else read_bytes(str(value))
        if count is None:
            self.fail(f"{value!r} is no number of bytes, such as 65536, 64K or 1M.", param, ctx)
        return count


def read_bytes(text: str) -> int | None:
    """How many bytes `50M`, `1.5G`, `512KiB` or `1048576` are; None for what is no number."""
    text = text.strip().upper().removesuffix("IB").removesuffix("B")
    number, power = (text[:-1], "KMGT".index(text[-1]) + 1) if text[-1:] in set("KMGT") else (text, 0)
    count = float(number) * 1024**power if number.replace(".", "", 1).isdecimal() else math.inf
    return int(count) if math.isfinite(count) else None


class Rate(click.ParamType["int"]):
    """Bytes per second: 0, 1048576, 512K, 50M, 1.5G; powers of 1024."""

    name = "rate"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it."""
        count = value if isinstance(value, int) else read_bytes(str(value).strip().upper().removesuffix("/S"))
        if count is None:
            self.fail(f"{value!r} is not a rate: bytes per second, such as 50M, 1G, or 0 for no limit.", param, ctx)
        return count


bandwidth_option = click.option(
    "--bandwidth", type=Rate(), metavar="RATE", help="Bytes per second: 50M, 1G; 0 for no limit."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Print the steps, and do nothing.")
