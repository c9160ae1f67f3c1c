"""serve."""

from __future__ import annotations

import os
import sys

import click

from blockferry.interfaces.cli.session import Session, examples, json_option


@click.command(
    "serve",
    epilog=examples("blockferry --state-dir /var/lib/blockferry serve", "blockferry serve --storage-root /srv/images"),
)
@click.option(
    "--storage-root",
    "storage_roots",
    metavar="DIR",
    multiple=True,
    type=click.Path(),
    help="A folder in which images may lie; can be given again. Nothing outside is opened, whoever names it. Without any "
    "(BLOCKFERRY_STORAGE_ROOTS has them, divided by colons): what callers name, and what is in or below its folder.",
)
@click.option(
    "--window-seconds",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="How long a guest may stand still before a pivot, a finish or a reopen is left (2; BLOCKFERRY_WINDOW_SECONDS).",
)
@json_option
@click.pass_obj
def serve(session: Session, storage_roots: tuple[str, ...], window_seconds: float | None) -> None:
    """Run the host process in the foreground.

    For systemd; other commands start one in the background when they need it. Ends with SIGTERM or Ctrl-C.
    """
    command = [sys.executable, "-P", "-m", "blockferry.interfaces.daemon", "--state-dir", str(session.state)]
    for root in storage_roots:
        command += ["--storage-root", os.path.abspath(root)]
    command += ["--ready-fd", "1"] if session.json else []
    command += [f"--window-seconds={window_seconds:g}"] if window_seconds is not None else []
    # In place of this process: the same process id for systemd, and nothing of the command left in memory.
    os.execv(sys.executable, command)  # noqa: S606 (no shell is wanted)


COMMANDS = {"serve": serve}
