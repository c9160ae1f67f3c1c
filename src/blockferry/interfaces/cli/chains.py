"""rebase, commit."""

from __future__ import annotations

import click

from blockferry.interfaces.cli import render
from blockferry.interfaces.cli.copying import wait_for
from blockferry.interfaces.cli.names import disks, domain_argument
from blockferry.interfaces.cli.session import (
    Session,
    absolute,
    bandwidth_option,
    disk_name,
    dry_run_option,
    examples,
    json_option,
)

disk_argument = click.argument("disk", shell_complete=disks)
wait_option = click.option("--wait", is_flag=True, help="Show its progress until it is done.")


@click.command(
    "rebase",
    epilog=examples("blockferry rebase vm1 vda --base /src/golden.qcow2 --wait", "blockferry rebase vm1 vdb --wait"),
)
@domain_argument
@disk_argument
@click.option("--base", metavar="FILE", help="What the disk is to back onto; nothing unless told.")
@bandwidth_option
@wait_option
@dry_run_option
@json_option
@click.pass_obj
def rebase(
    session: Session, *, name: str, disk: str, base: str | None, bandwidth: int | None, wait: bool, dry_run: bool
) -> None:
    """Pull lower layers into a disk's image while the guest runs.

    What lies between the image and --base is copied into it; the layers themselves stay as they are. On a disk that is
    being copied onto the same base it joins that copy.
    """
    below = absolute(base) if base is not None else None
    wish: dict[str, object] = {"domain": name, "disk": disk_name(disk), "base": below, "bandwidth": bandwidth}
    _start(session, "rebase", wish, wait=wait, dry_run=dry_run)


@click.command(
    "commit",
    epilog=examples(
        "blockferry commit vm1 vda --wait",
        "blockferry commit vm1 vda --top /src/mid.qcow2 --base /src/base.qcow2 --wait",
    ),
)
@domain_argument
@disk_argument
@click.option("--top", metavar="FILE", help="The topmost layer that is written down; the active image unless told.")
@click.option("--base", metavar="FILE", help="What is written to; the bottom of the chain unless told.")
@bandwidth_option
@wait_option
@dry_run_option
@json_option
@click.pass_obj
def commit(
    session: Session,
    *,
    name: str,
    disk: str,
    top: str | None,
    base: str | None,
    bandwidth: int | None,
    wait: bool,
    dry_run: bool,
) -> None:
    """Write layers of a disk down into a lower one while the guest runs.

    Of the active image it ends in a pause of milliseconds, and the guest goes on on the base. Snapshots whose images are
    written over are no more; the answer names them. The files of the layers stay.
    """
    wish: dict[str, object] = {
        "domain": name,
        "disk": disk_name(disk),
        "top": absolute(top) if top is not None else None,
        "base": absolute(base) if base is not None else None,
        "bandwidth": bandwidth,
    }
    _start(session, "commit", wish, wait=wait, dry_run=dry_run)


def _start(session: Session, request: str, wish: dict[str, object], *, wait: bool, dry_run: bool) -> None:
    if dry_run:
        session.answer(render.plan, request, dry_run=True, **wish)
        return
    job = session.ask(request, **wish)
    session.show(job, render.started_chain if wait else render.left_alone)
    if not wait:
        return
    # A copy that it has joined is done when it is pivoted: that is not waited for.
    wait_for(session, job)
    if not session.json:
        click.echo(render.ended_chain(job))


COMMANDS = {"rebase": rebase, "commit": commit}
