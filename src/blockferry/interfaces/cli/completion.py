"""Completion for bash, zsh and fish: click's script, and names that the running host process knows."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from blockferry.interfaces.cli.session import Session, examples, json_option


@click.command(
    "completion",
    epilog=examples('eval "$(blockferry completion bash)"', "blockferry completion fish | source"),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the shell's completion script.

    Names of domains, disks and snapshots, and numbers of operations, come from the host process if one runs; completing never starts one.
    """
    made = get_completion_class(shell)
    assert made is not None  # noqa: S101 (click.Choice above)
    script = made(context.find_root().command, {}, "blockferry", "_BLOCKFERRY_COMPLETE").source()
    session: Session = context.obj
    session.show(
        {"version": 1, "kind": "completion", "shell": shell, "script": script}, lambda view: str(view["script"])
    )


COMMANDS = {"completion": completion}
