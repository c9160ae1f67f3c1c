"""job list, pivot, finish, cancel, speed."""

from __future__ import annotations

import click

from blockferry.interfaces.cli import render
from blockferry.interfaces.cli.names import disks, domain_argument
from blockferry.interfaces.cli.session import Rate, Session, disk_name, examples, json_option

disks_argument = click.argument("disks", nargs=-1, required=True, metavar="DISK...", shell_complete=disks)
timeout_option = click.option(
    "--timeout", type=float, metavar="SEC", help="For the mirrors to be ready; 60 unless told."
)


@click.group("job", epilog=examples("blockferry job list vm1", "blockferry job pivot vm1 vda vdb"))
def job() -> None:
    """Block jobs that work: list, pivot, finish, cancel, speed."""


@job.command("list", epilog=examples("blockferry job list vm1"))
@domain_argument
@json_option
@click.pass_obj
def list_(session: Session, name: str) -> None:
    """The block jobs of a domain, and how the last one on each disk ended."""
    session.answer(render.jobs, "job-list", domain=name)


@job.command("pivot", epilog=examples("blockferry job pivot vm1 vda vdb --timeout 300"))
@domain_argument
@disks_argument
@timeout_option
@json_option
@click.pass_obj
def pivot(session: Session, name: str, disks: tuple[str, ...], timeout: float | None) -> None:
    """The guest goes on on the copies: all these disks at one instant, or none."""
    session.answer(render.done, "job-pivot", domain=name, disks=list(map(disk_name, disks)), timeout=timeout)


@job.command("finish", epilog=examples("blockferry job finish vm1 vda"))
@domain_argument
@disks_argument
@timeout_option
@json_option
@click.pass_obj
def finish(session: Session, name: str, disks: tuple[str, ...], timeout: float | None) -> None:
    """The copies become images of one instant; the guest stays where it is."""
    session.answer(render.done, "job-finish", domain=name, disks=list(map(disk_name, disks)), timeout=timeout)


@job.command("cancel", epilog=examples("blockferry job cancel vm1 vda"))
@domain_argument
@disks_argument
@json_option
@click.pass_obj
def cancel(session: Session, name: str, disks: tuple[str, ...]) -> None:
    """Stop jobs; what was written of copies stays, chains are as they were."""
    session.answer(render.done, "job-cancel", domain=name, disks=list(map(disk_name, disks)))


@job.command("speed", epilog=examples("blockferry job speed vm1 vda 50M", "blockferry job speed vm1 vda 0"))
@domain_argument
@click.argument("disk", shell_complete=disks)
@click.argument("rate", type=Rate())
@json_option
@click.pass_obj
def speed(session: Session, name: str, disk: str, rate: int) -> None:
    """Limit a job to RATE bytes per second (50M, 1G; 0 lifts the limit)."""
    session.answer(render.done, "job-speed", domain=name, disk=disk_name(disk), bandwidth=rate)


COMMANDS = {"job": job}
