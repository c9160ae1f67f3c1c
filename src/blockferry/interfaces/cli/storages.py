"""storage list, speed."""

from __future__ import annotations

import click

from blockferry.interfaces.cli import moved, render
from blockferry.interfaces.cli.session import Rate, Session, absolute, examples, json_option


@click.group("storage", epilog=examples("blockferry storage speed /slow 200M", "blockferry storage list"))
def storage() -> None:
    """What all moves together may write to a storage: list, speed."""


@storage.command("list", epilog=examples("blockferry storage list"))
@json_option
@click.pass_obj
def list_(session: Session) -> None:
    """The storages that have a limit, and how much writes to them now."""
    session.answer(moved.storages, "storage-list")


@storage.command("speed", epilog=examples("blockferry storage speed /slow 200M", "blockferry storage speed /slow 0"))
@click.argument("folder", metavar="DIR", type=click.Path())
@click.argument("rate", type=Rate())
@json_option
@click.pass_obj
def speed(session: Session, folder: str, rate: int) -> None:
    """Limit what all moves write to the file system of DIR to RATE bytes per second (50M, 1G; 0 lifts the limit)."""
    session.answer(render.done, "storage-speed", folder=absolute(folder), bandwidth=rate)


COMMANDS = {"storage": storage}
