"""graph."""

from __future__ import annotations

import os

import click

from blockferry.interfaces.cli import tree
from blockferry.interfaces.cli.names import domain_argument
from blockferry.interfaces.cli.session import Session, examples, json_option


@click.command("graph", epilog=examples("blockferry graph vm1", "blockferry graph vm1 --svg vm1.svg"))
@domain_argument
@click.option(
    "--svg",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Draw it as a picture into FILE, - for standard output.",
)
@json_option
@click.pass_obj
def graph(session: Session, name: str, svg: str | None) -> None:
    """A domain's block graph: devices, nodes, images, mirrors.

    Each disk's chain goes down from its device; the files are at its side, mirrors hang below it with their state.
    """
    if svg == "-" and session.json:
        raise click.UsageError("--json and --svg - both print to standard output: name a file for one of them.")
    view = session.ask("graph", domain=name)
    if svg is None:
        session.show(view, tree.graph)
        return
    from blockferry.interfaces.cli import picture

    drawn = picture.graph(view)
    if svg == "-":
        click.echo(drawn, nl=False)
        return
    try:
        write(svg, drawn)
    except OSError as error:
        raise click.FileError(svg, hint=error.strerror or str(error)) from error
    session.show(view, lambda _view: f"the block graph of {name} is drawn in {svg}")


def write(path: str, text: str) -> None:
    """Write a file that is whole or not there, readable by all; a device or a pipe is written to as it is.

    Raises:
        OSError: it can't be written; what was there is as it was.
    """
    if path.startswith("/dev/") or (os.path.exists(path) and not os.path.isfile(path)):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return
    whole = os.path.realpath(path)
    part = f"{whole}.{os.getpid()}.part"
    try:
        with open(part, "x", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
        os.replace(part, whole)
    except BaseException:
        if os.path.exists(part):
            os.unlink(part)
        raise


COMMANDS = {"graph": graph}
