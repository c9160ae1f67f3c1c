"""define, undefine, start, stop, suspend, resume."""

from __future__ import annotations

from typing import TextIO

import click

from blockferry.interfaces.cli import render
from blockferry.interfaces.cli.names import domain_argument
from blockferry.interfaces.cli.session import Session, examples, json_option


@click.command(
    "define", epilog=examples("blockferry define vm1.xml", "virsh dumpxml vm2 --inactive | blockferry define -")
)
@click.argument("file", type=click.File("r", encoding="utf-8"), metavar="FILE")
@json_option
@click.pass_obj
def define(session: Session, file: TextIO) -> None:
    """Remember a guest that blockferry starts.

    FILE is libvirt's domain XML, - for standard input. What of it is not carried out is kept, and named.
    """
    session.answer(render.domain, "define", xml=file.read())


@click.command("undefine", epilog=examples("blockferry undefine vm1"))
@domain_argument
@json_option
@click.pass_obj
def undefine(session: Session, name: str) -> None:
    """Forget a guest that is shut off; its images stay."""
    session.answer(render.done, "undefine", domain=name)


@click.command("start", epilog=examples("blockferry start vm1", "blockferry start vm1 --paused"))
@domain_argument
@click.option("--paused", is_flag=True, help="Leave it paused before its first instruction; resume lets it run.")
@click.option("--require-mirrors", is_flag=True, help="Not without all of its mirrors.")
@json_option
@click.pass_obj
def start(session: Session, name: str, paused: bool, require_mirrors: bool) -> None:
    """Start a defined guest.

    Its QEMU is a process of its own, which goes on whatever becomes of blockferry. Mirrors that it had are established again
    before its first instruction; one whose destination is gone is dropped, and said to be.
    """
    session.answer(render.domain, "start", domain=name, paused=paused or None, require_mirrors=require_mirrors or None)


@click.command("stop", epilog=examples("blockferry stop vm1", "blockferry stop vm1 --force"))
@domain_argument
@click.option("--timeout", type=float, metavar="SEC", help="For the guest to shut down; 60 unless told.")
@click.option("--force", is_flag=True, help="End it as it is, which to the guest is like pulling the plug.")
@json_option
@click.pass_obj
def stop(session: Session, name: str, timeout: float | None, force: bool) -> None:
    """Shut a defined guest down, by ACPI."""
    session.answer(render.done, "stop", domain=name, timeout=timeout, force=force or None)


@click.command("suspend", epilog=examples("blockferry suspend vm1"))
@domain_argument
@json_option
@click.pass_obj
def suspend(session: Session, name: str) -> None:
    """Pause a guest's processors."""
    session.answer(render.done, "suspend", domain=name)


@click.command("resume", epilog=examples("blockferry resume vm1"))
@domain_argument
@json_option
@click.pass_obj
def resume(session: Session, name: str) -> None:
    """Let a paused guest run."""
    session.answer(render.done, "resume", domain=name)


COMMANDS = {
    "define": define,
    "undefine": undefine,
    "start": start,
    "stop": stop,
    "suspend": suspend,
    "resume": resume,
}
