"""attach, detach, list, show."""

from __future__ import annotations

import click

from blockferry.interfaces.cli import render
from blockferry.interfaces.cli.names import domain_argument
from blockferry.interfaces.cli.session import Session, absolute, examples, json_option


@click.command(
    "attach",
    epilog=examples(
        "blockferry attach vm1 --qmp /run/vm1.qmp",
        "blockferry attach vm1 --qmp /run/vm1.qmp --agent /run/vm1.agent",
        "blockferry attach vm1 --qmp /run/vm1.qmp --resume-mirrors",
    ),
)
@click.argument("name")
@click.option("--qmp", required=True, metavar="SOCKET", type=click.Path(), help="The guest's QMP socket.")
@click.option("--agent", metavar="SOCKET", type=click.Path(), help="Of its guest agent, which --quiesce needs.")
@click.option("--resume-mirrors", is_flag=True, help="Establish the mirrors again that it had when its QEMU ended.")
@click.option("--timeout", type=float, metavar="SEC", help="For QEMU's greeting; 5 unless told.")
@json_option
@click.pass_obj
def attach(
    session: Session, *, name: str, qmp: str, agent: str | None, resume_mirrors: bool, timeout: float | None
) -> None:
    """Take charge of a running guest.

    NAME is what it is called from now on. The guest does not notice.
    """
    where = {"qmp": absolute(qmp), "agent": absolute(agent) if agent is not None else None}
    session.answer(
        render.domain, "attach", domain=name, timeout=timeout, resume_mirrors=resume_mirrors or None, **where
    )


@click.command("detach", epilog=examples("blockferry detach vm1"))
@domain_argument
@json_option
@click.pass_obj
def detach(session: Session, name: str) -> None:
    """Let go of a guest; it runs on.

    Refused while a copy or mirror of it works.
    """
    session.answer(render.done, "detach", domain=name)


@click.command("list", epilog=examples("blockferry list", "blockferry list --json"))
@json_option
@click.pass_obj
def list_(session: Session) -> None:
    """All domains, attached and defined."""
    session.answer(render.domains, "list")


@click.command("show", epilog=examples("blockferry show vm1", "blockferry show vm1 --xml --inactive"))
@domain_argument
@click.option("--xml", is_flag=True, help="The XML, as libvirt writes it: of the guest as it runs.")
@click.option("--inactive", is_flag=True, help="With --xml: of what is started next.")
@json_option
@click.pass_obj
def show(session: Session, name: str, xml: bool, inactive: bool) -> None:
    """A domain's disks, chains and mirrors.

    Each chain begins with the image that the guest writes to; what it backs onto follows behind <-, a mirror behind =>.
    """
    session.answer(render.xml if xml or inactive else render.domain, "show", domain=name, inactive=inactive or None)


COMMANDS = {"attach": attach, "detach": detach, "list": list_, "show": show}
