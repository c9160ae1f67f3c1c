"""The entry point: the verbs, loaded when they are used, and what an error looks like."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

import click

from blockferry.interfaces.cli.session import Session, Stopped, examples
from blockferry.interfaces.cli.wire import Json, Told

if TYPE_CHECKING:
    from blockferry.errors import BlockferryError

INTERRUPTED = 130  # 128 + SIGINT, as a shell says it
USAGE = 2  # as click and most commands
# verb -> (module, what --help says): the list of verbs is printed without loading any of them.
VERBS = {
    "attach": ("domains", "Take charge of a running guest."),
    "detach": ("domains", "Let go of a guest; it runs on."),
    "define": ("lifecycle", "Remember a guest that blockferry starts."),
    "undefine": ("lifecycle", "Forget a guest that is shut off; its images stay."),
    "start": ("lifecycle", "Start a defined guest."),
    "stop": ("lifecycle", "Shut a defined guest down, by ACPI."),
    "suspend": ("lifecycle", "Pause a guest's processors."),
    "resume": ("lifecycle", "Let a paused guest run."),
    "list": ("domains", "All domains, attached and defined."),
    "show": ("domains", "A domain's disks, chains and mirrors."),
    "graph": ("graphs", "A domain's block graph: devices, nodes, images, mirrors."),
    "snapshot": ("snapshots", "Snapshots of several disks at one instant, with mirrors."),
    "copy": ("copying", "Copy a disk while the guest runs, and keep the copy identical."),
    "move": ("moving", "Move a guest's storage while it runs; all disks go over at one instant."),
    "rebase": ("chains", "Pull lower layers into a disk's image while the guest runs."),
    "commit": ("chains", "Write layers of a disk down into a lower one while the guest runs."),
    "job": ("jobs", "Block jobs that work: list, pivot, finish, cancel, speed."),
    "storage": ("storages", "What all moves together may write to a storage: list, speed."),
    "events": ("history", "What happened, and what happens now."),
    "operations": ("history", "What was done, step by step, with times; and going on with it, or giving it up."),
    "recover": ("history", "Settle what a crash left open."),
    "doctor": ("history", "What is wrong, and what to type."),
    "serve": ("serving", "Run the host process in the foreground."),
    "completion": ("completion", "Print the shell's completion script."),
}


class Verbs(click.Group):
    """The verbs of VERBS, each loaded from its module when it is called."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """In the order in which one meets them."""
        return list(VERBS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one."""
        if cmd_name not in VERBS:
            return None
        module = import_module(f"blockferry.interfaces.cli.{VERBS[cmd_name][0]}")
        command: click.Command = module.COMMANDS[cmd_name]
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List them without loading them."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, summary) for verb, (_module, summary) in VERBS.items()])


def _print_version(context: click.Context, _option: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        import blockferry

        click.echo(f"blockferry {blockferry.__version__}")
        context.exit()


@click.command(
    "blockferry",
    cls=Verbs,
    epilog=examples(
        "blockferry attach vm1 --qmp /run/vm1.qmp",
        "blockferry snapshot create vm1 before --atomic --mirror vda=/dest/snap.img",
        "blockferry snapshot delete vm1 before --reopen-mirror",
        "blockferry copy vm1 vdb /dst/disk.img --format raw --pivot",
        "blockferry move vm1 /new",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--state-dir", metavar="DIR", envvar="BLOCKFERRY_STATE_DIR", help="Where state is kept.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Its version."
)
@click.pass_obj
def cli(session: Session, state_dir: str | None) -> None:
    """Manage the disks of running QEMU guests: snapshots, mirrors, block copy, moves.

    The first command starts a host process that owns the state directory; it goes away by itself when it has nothing
    to do. What a command starts goes on when the command ends.
    """
    session.state_dir = state_dir


def main() -> NoReturn:
    """Run the command, and end with its exit status."""
    session = Session()
    try:
        status = cli.main(prog_name="blockferry", standalone_mode=False, obj=session, color=_colour())
    except click.UsageError as error:
        status = _usage(error)
    except click.ClickException as error:
        status = _fail(session.json, _local("usage", USAGE, error.format_message()))
    except click.Abort:
        click.echo("blockferry: interrupted. What was asked for goes on; `blockferry operations` shows it.", err=True)
        status = INTERRUPTED
    except Stopped as stopped:
        click.echo(f"\nblockferry: {stopped}", err=True)
        status = INTERRUPTED
    except Told as told:
        status = _fail(session.json, told.error)
    except _errors() as error:  # looked up, and loaded, only when something was raised
        status = _fail(session.json, error.to_dict())
    sys.exit(status)


def _errors() -> type[BlockferryError]:
    from blockferry.errors import BlockferryError

    return BlockferryError


def _usage(error: click.UsageError) -> int:
    """An error in the command line itself. --json may not have been read yet, so it is looked for."""
    if "--json" in sys.argv:
        return _fail(True, _local("usage", USAGE, error.format_message()))
    error.show()
    return USAGE


def _local(code: str, status: int, message: str) -> Json:
    return {"code": code, "outcome": "refused", "exit_status": status, "message": message, "fields": {}}


def _fail(as_json: bool, error: Json) -> int:
    """Say an error; with --json as an object on stdout too."""
    if as_json:
        click.echo(json.dumps({"version": 1, "kind": "error", "error": error}))
    click.echo(f"blockferry: {error['message']}", err=True)
    return int(error["exit_status"])


def _colour() -> bool | None:
    """None: colour where a terminal shows it."""
    return False if os.environ.get("NO_COLOR") else None


if __name__ == "__main__":
    main()
