"""events, operations, recover, doctor."""

from __future__ import annotations

import click

from blockferry.interfaces.cli import render, wire
from blockferry.interfaces.cli.names import domains
from blockferry.interfaces.cli.session import Session, Stopped, examples, json_option

PROBLEMS = 3  # doctor's own: it was done, and something is wrong


@click.command("events", epilog=examples("blockferry events vm1", "blockferry events --since 41 --follow --json"))
@click.argument("name", required=False, shell_complete=domains)
@click.option("--since", type=click.IntRange(min=0), metavar="N", help="Only those after number N.")
@click.option("--follow", is_flag=True, help="Go on with those that happen, and the progress of copies.")
@json_option
@click.pass_obj
def events(session: Session, name: str | None, since: int | None, follow: bool) -> None:
    """What happened, and what happens now.

    With --follow and without --since: only from now on. Ends with the host process, or with Ctrl-C.
    """
    if not follow:
        view = session.ask("events", domain=name, since=since)
        for event in view["events"]:
            session.show(event, render.event)
        return
    try:
        for event in wire.events(session.state, name, since):
            session.show(event, render.event)
    except KeyboardInterrupt:
        raise Stopped("stopped following; nothing else was stopped.") from None


class Operations(click.Group):
    """`operations [NAME]` and `operations show ID`: what is not `show` is a domain, or nothing."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the hidden verb in front of what is none."""
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [LISTING, *args]
        return super().parse_args(ctx, args)


LISTING = "[NAME]"  # no domain can have that name, and --help lists it as it is typed


@click.command(
    "operations", cls=Operations, epilog=examples("blockferry operations vm1", "blockferry operations show 7")
)
def operations() -> None:
    """What was done, step by step, with times."""


@operations.command(LISTING, epilog=examples("blockferry operations", "blockferry operations vm1 --json"))
@click.argument("name", required=False, shell_complete=domains)
@json_option
@click.pass_obj
def listing(session: Session, name: str | None) -> None:
    """All operations, or those of a domain, oldest first."""
    session.answer(render.operations, "operations", domain=name)


@operations.command("show", epilog=examples("blockferry operations show 7"))
@click.argument("number", metavar="ID", type=int)
@json_option
@click.pass_obj
def show(session: Session, number: int) -> None:
    """One operation with its steps."""
    session.answer(render.operation, "operation-show", operation=number)


@click.command("recover", epilog=examples("blockferry recover"))
@json_option
@click.pass_obj
def recover(session: Session) -> None:
    """Settle what a crash left open.

    The host process does so by itself whenever it starts; this says what it found, why, and what can be typed next.
    """
    session.answer(render.recovery, "recover")


@click.command("doctor", epilog=examples("blockferry doctor", "blockferry doctor vm1 --json"))
@click.argument("name", required=False, shell_complete=domains)
@json_option
@click.pass_obj
def doctor(session: Session, name: str | None) -> None:
    """What is wrong, and what to type.

    Without NAME: the state directory, the programs, and each domain in a line. With NAME: whether QEMU, the journal and
    the files agree on that domain. Nothing is changed. Ends with status 3 when there is a problem.
    """
    found = session.ask("doctor", domain=name)
    session.show(found, render.findings)
    if found["problems"]:
        raise click.exceptions.Exit(PROBLEMS)


COMMANDS = {"events": events, "operations": operations, "recover": recover, "doctor": doctor}
