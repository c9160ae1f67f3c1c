"""events, operations, recover, doctor."""

from __future__ import annotations

import click

from blockferry.interfaces.cli import moved, render, wire
from blockferry.interfaces.cli.moving import detach_option, follow_move, newest
from blockferry.interfaces.cli.names import domains, number_argument, operations_of_all, operations_to_go_on_with
from blockferry.interfaces.cli.session import Rate, Session, Stopped, examples, json_option

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
    """`operations [NAME]`, and `operations show ID` and the like: what is no verb is a domain, or nothing."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the hidden verb in front of what is none."""
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [LISTING, *args]
        return super().parse_args(ctx, args)


LISTING = "[NAME]"  # no domain can have that name, and --help lists it as it is typed


@click.command(
    "operations",
    cls=Operations,
    epilog=examples("blockferry operations vm1", "blockferry operations show 7", "blockferry operations resume 7"),
)
def operations() -> None:
    """What was done, step by step, with times; and going on with it, or giving it up."""


@operations.command(LISTING, epilog=examples("blockferry operations", "blockferry operations vm1 --json"))
@click.argument("name", required=False, shell_complete=domains)
@json_option
@click.pass_obj
def listing(session: Session, name: str | None) -> None:
    """All operations, or those of a domain, oldest first."""
    session.answer(render.operations, "operations", domain=name)


@operations.command("show", epilog=examples("blockferry operations show 7"))
@number_argument(operations_of_all)
@json_option
@click.pass_obj
def show(session: Session, number: int) -> None:
    """One operation with its steps; of a move also how far it is.

    With --json a line for each of both.
    """
    shown = session.ask("operation-show", operation=number)
    session.show(shown, render.operation)
    if shown["what"] == "move" and shown["state"] in ("in-progress", "done"):
        if not session.json:
            click.echo()
        session.answer(moved.below_steps, "move-show", operation=number)


@operations.command(
    "resume", epilog=examples("blockferry operations resume 7", "blockferry operations resume 7 --verify none")
)
@number_argument(operations_to_go_on_with)
@click.option("--verify", type=click.Choice(["none"]), help="End the move without comparing; its sources stay.")
@detach_option
@json_option
@click.pass_obj
def resume(session: Session, *, number: int, verify: str | None, detach: bool) -> None:
    """Go on with a move that stands still, or a copy that was cancelled or lost.

    Of a move what was copied stays copied, and it is followed to its end, as `move` does.
    """
    since = newest(session)
    view = session.ask("operation-resume", operation=number, verify=verify)
    if view["kind"] != "move":
        session.show(view, render.started)
    elif detach:
        session.show(view, moved.left_alone)
    else:
        follow_move(session, view, since)


@operations.command("cancel", epilog=examples("blockferry operations cancel 7"))
@number_argument(operations_to_go_on_with)
@json_option
@click.pass_obj
def cancel(session: Session, number: int) -> None:
    """Give up a move whose guest has not gone over yet, or a copy.

    Every disk is on the image that it was on; what was written meanwhile is written down into it.
    """
    view = session.ask("operation-cancel", operation=number)
    session.show(view, moved.move if view["kind"] == "move" else render.done)


@operations.command("speed", epilog=examples("blockferry operations speed 7 50M", "blockferry operations speed 7 0"))
@number_argument(operations_to_go_on_with)
@click.argument("rate", type=Rate())
@json_option
@click.pass_obj
def speed(session: Session, number: int, rate: int) -> None:
    """Limit a move that is not over to RATE bytes per second (50M, 1G; 0 lifts the limit)."""
    session.answer(render.done, "move-speed", operation=number, bandwidth=rate)


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
