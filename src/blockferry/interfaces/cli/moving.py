"""move, and following one to its end."""

from __future__ import annotations

from collections.abc import Iterator

import click

from blockferry.interfaces.cli import moved, wire
from blockferry.interfaces.cli.names import domain_argument
from blockferry.interfaces.cli.progress import move_display
from blockferry.interfaces.cli.session import (
    Session,
    Stopped,
    absolute,
    bandwidth_option,
    disk_name,
    dry_run_option,
    examples,
    json_option,
)
from blockferry.interfaces.cli.wire import Json
from blockferry.model.moving import ENDS, Following, how_it_ended
from blockferry.model.states import NEWEST

detach_option = click.option("--detach", is_flag=True, help="End the command at once; the move goes on by itself.")


def read_disks(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> dict[str, str | None]:
    """TARGET or TARGET=FILE, any number of times."""
    found: dict[str, str | None] = {}
    for each in given:
        target, equals, file = each.partition("=")
        if not target or (equals and not file):
            raise click.BadParameter(f"{each!r} is not TARGET or TARGET=FILE.")
        if disk_name(target) in found:
            raise click.BadParameter(f"{target} is named twice.")
        found[disk_name(target)] = file or None
    return found


@click.command(
    "move",
    epilog=examples(
        "blockferry move vm1 /new",
        "blockferry move vm1 /new --disk vda --disk vdb=data.img --bandwidth 200M",
        "blockferry move vm1 /new --dry-run",
        "blockferry move vm1 /new --verify full --delete-source --detach",
    ),
)
@domain_argument
@click.argument("dest_dir", metavar="DEST_DIR", type=click.Path())
@click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="TARGET[=FILE]",
    callback=read_disks,
    help="Only this disk, to a file of DEST_DIR, a block device or an NBD export. Once a disk; all unless told.",
)
@click.option(
    "--format", "format_", type=click.Choice(["keep", "qcow2", "raw"]), help="The new images'; keep unless told."
)
@click.option(
    "--chain",
    type=click.Choice(["keep", "flatten"]),
    help="Move the images under the active ones too, or make one image of each disk; keep unless told.",
)
@click.option(
    "--strategy",
    type=click.Choice(["auto", "mirror", "offload"]),
    help="QEMU copies (mirror), or images are copied outside QEMU (offload); the best for each disk unless told.",
)
@bandwidth_option
@click.option(
    "--max-pause",
    type=click.IntRange(min=1),
    metavar="MS",
    help="Go on mirroring while a longer pause is to be expected.",
)
@click.option(
    "--verify", type=click.Choice(["none", "sample", "full"]), help="Compare source and destination; full unless told."
)
@click.option(
    "--delete-source", is_flag=True, help="Remove the old images at the end: verify full, or none said out loud."
)
@click.option("--converge", is_flag=True, help="Hold the guest's writes until they are on the destination too.")
@click.option(
    "--deadline",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SEC",
    help="Give the move up if the guest has not gone over by then.",
)
@dry_run_option
@detach_option
@json_option
@click.pass_obj
def move(
    session: Session,
    *,
    name: str,
    dest_dir: str,
    disks: dict[str, str | None],
    format_: str | None,
    chain: str | None,
    strategy: str | None,
    bandwidth: int | None,
    max_pause: int | None,
    verify: str | None,
    delete_source: bool,
    converge: bool,
    deadline: float | None,
    dry_run: bool,
    detach: bool,
) -> None:
    """Move a guest's storage while it runs; all disks go over at one instant.

    Follows the move to its end. Ctrl-C ends the command, never the move; `operations cancel` does.
    """
    wish = {
        "domain": name,
        "dest": absolute(dest_dir),
        "disks": disks,
        "format": format_,
        "chain": chain,
        "strategy": strategy,
        "bandwidth": bandwidth,
        "max_pause_ms": max_pause,
        "verify": verify,
        "delete_source": delete_source,
        "converge": converge,
        "deadline": deadline,
    }
    if dry_run:
        session.answer(moved.plan, "move", dry_run=True, **wish)
        return
    since = newest(session)
    begun = session.ask("move", **wish)
    if detach:
        session.show(begun, moved.left_alone)
    else:
        follow_move(session, begun, since)


def newest(session: Session) -> int:
    """The number of the newest event there is: those after it are of what is asked for now."""
    return int(session.ask("events", since=NEWEST)["last"])


def follow_move(session: Session, begun: Json, since: int) -> None:
    """Show a move's progress until it is over, and what has come of it.

    Args:
        session: this run of the command.
        begun: the move as it was begun or gone on with.
        since: the events after this number are shown.

    Raises:
        Told: it stands still, was given up, or its copies differ.
        Stopped: Ctrl-C; the move goes on.
    """
    following = Following(begun)
    if not session.json:
        click.echo(moved.begun(begun))
    try:
        with move_display(session.json) as show:
            for said in _follow(session, following, since):
                show(said)
    except KeyboardInterrupt:
        raise Stopped(moved.goes_on(begun)) from None
    error = how_it_ended(following.move)
    session.show(following.move, moved.ended)
    if error is not None:
        raise wire.Told(error.to_dict())


def _follow(session: Session, following: Following, since: int) -> Iterator[Json]:
    """Give the events of a move and how far it is; they go on through a restart of the host process."""
    from blockferry.errors import HostProcessUnreachable

    name, number = following.move["domain"], following.move["operation"]
    cut_off = False
    while True:
        try:
            for event in session.ask("events", domain=name, since=since)["events"]:
                since = event["seq"]
                if following.concerns(event):
                    yield event
            following.look(session.ask("move-show", operation=number))
            if following.over:
                return
            yield following.progress()
            cut_off = False
            for event in wire.events(session.state, name, since):
                since = max(since, event["seq"])
                if following.hear(event):
                    yield following.progress()
                if following.concerns(event):
                    yield event
                    following.look(session.ask("move-show", operation=number))
                    if event["type"] in ENDS:
                        return
                    yield following.progress()
        except HostProcessUnreachable:
            # It was killed. Another one goes on with the move, unless that can't be: then it is cut off twice without an
            # answer between.
            if cut_off:
                raise
            cut_off = True


COMMANDS = {"move": move}
