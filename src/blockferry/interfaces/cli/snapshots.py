"""snapshot create, list, show, delete."""

from __future__ import annotations

from typing import TextIO

import click

from blockferry.interfaces.cli import render
from blockferry.interfaces.cli.names import disks, domain_argument, snapshots
from blockferry.interfaces.cli.session import Session, absolute, disk_name, examples, json_option
from blockferry.interfaces.cli.wire import Json
from blockferry.model.flags import SnapshotCreate, SnapshotDelete


@click.group(
    "snapshot", epilog=examples("blockferry snapshot create vm1 before --atomic", "blockferry snapshot list vm1")
)
def snapshot() -> None:
    """Snapshots of several disks at one instant, with mirrors."""


@snapshot.command(
    "create",
    epilog=examples(
        "blockferry snapshot create vm1 before --atomic",
        "blockferry snapshot create vm1 move --disk vda=/src/snap.img --mirror vda=/dest/snap.img",
        "blockferry snapshot create vm1 --xml snapshot.xml --dry-run",
    ),
)
@domain_argument
@click.argument("snap", required=False)
@click.option("--xml", type=click.File("r", encoding="utf-8"), help="A <domainsnapshot>; - reads it from stdin.")
@click.option("--disk", "named", multiple=True, metavar="TARGET[=FILE]", shell_complete=disks, help="Take only these.")
@click.option("--mirror", "mirrors", multiple=True, metavar="TARGET=FILE", help="Mirror the disk's writes to FILE.")
@click.option("--atomic", is_flag=True, help="All disks at one instant, or nothing is changed.")
@click.option("--description", metavar="TEXT", help="Free text.")
@click.option("--dry-run", is_flag=True, help="Print the steps, and do nothing.")
@json_option
@click.pass_obj
def create(
    session: Session,
    *,
    name: str,
    snap: str | None,
    xml: TextIO | None,
    named: tuple[str, ...],
    mirrors: tuple[str, ...],
    atomic: bool,
    description: str | None,
    dry_run: bool,
) -> None:
    """Take a snapshot, with mirrors if you like.

    With --disk only those disks (and mirrored ones) take part, else all that the guest can write to. With --mirror the guest
    writes to the snapshot's image and to FILE from then on, until `snapshot delete`.
    """
    if xml is not None and (named or mirrors):
        raise click.UsageError("--xml says itself which disks take part: leave out --disk and --mirror.")
    what: Json = {"wish": _wish(snap, description, named, mirrors)}
    if xml is not None:
        what = {"xml": xml.read(), "name": snap, "description": description}
    flags = int(SnapshotCreate.ATOMIC) if atomic else 0
    render_it = render.plan if dry_run else render.snapshot
    session.answer(render_it, "snapshot-create", domain=name, flags=flags, dry_run=dry_run, **what)


def _wish(snap: str | None, description: str | None, named: tuple[str, ...], mirrors: tuple[str, ...]) -> Json:
    """A SnapshotWish, as JSON."""
    disks: dict[str, Json] = {}
    for text in named:
        target, separator, file = text.partition("=")
        if disk_name(target) in disks or not target or (separator and not file):
            raise click.BadParameter(f"{text!r} is not TARGET or TARGET=FILE, once a disk.", param_hint="--disk")
        disks[disk_name(target)] = {"name": disk_name(target), **({"file": absolute(file)} if file else {})}
    for text in mirrors:
        target, _, file = text.partition("=")
        disk = disks.setdefault(disk_name(target), {"name": disk_name(target)})
        if not target or not file or "mirror" in disk:
            raise click.BadParameter(f"{text!r} is not TARGET=FILE, once a disk.", param_hint="--mirror")
        disk["mirror"] = {"file": absolute(file)}
    return {"name": snap, "description": description, "disks": list(disks.values()), "only_these": bool(named)}


@snapshot.command("list", epilog=examples("blockferry snapshot list vm1"))
@domain_argument
@json_option
@click.pass_obj
def list_(session: Session, name: str) -> None:
    """A domain's snapshots, oldest first."""
    session.answer(render.snapshots, "snapshot-list", domain=name)


@snapshot.command(
    "show", epilog=examples("blockferry snapshot show vm1 before", "blockferry snapshot show vm1 before --xml")
)
@domain_argument
@click.argument("snap", shell_complete=snapshots)
@click.option("--xml", is_flag=True, help="As libvirt writes it.")
@json_option
@click.pass_obj
def show(session: Session, name: str, snap: str, xml: bool) -> None:
    """One snapshot: its images, and its mirrors as they are now."""
    session.answer(render.xml if xml else render.snapshot, "snapshot-show", domain=name, snapshot=snap)


@snapshot.command(
    "delete",
    epilog=examples(
        "blockferry snapshot delete vm1 move --reopen-mirror", "blockferry snapshot delete vm1 before --metadata"
    ),
)
@domain_argument
@click.argument("snap", shell_complete=snapshots)
@click.option("--reopen-mirror", is_flag=True, help="The guest goes on on the mirrors, all at one instant or none.")
@click.option("--remove-mirror", is_flag=True, help="The mirrors are dropped; the guest stays on its images.")
@click.option("--metadata", is_flag=True, help="Only forget the snapshot; its images stay as they are.")
@click.option("--timeout", type=float, metavar="SEC", help="For the mirrors to be ready; 60 unless told.")
@json_option
@click.pass_obj
def delete(
    session: Session,
    *,
    name: str,
    snap: str,
    reopen_mirror: bool,
    remove_mirror: bool,
    metadata: bool,
    timeout: float | None,
) -> None:
    """Delete a snapshot, and say what becomes of its mirrors."""
    if reopen_mirror + remove_mirror + metadata > 1:
        raise click.UsageError("Only one of --reopen-mirror, --remove-mirror and --metadata can be done.")
    flags = (
        SnapshotDelete.REOPEN_MIRROR * reopen_mirror
        | SnapshotDelete.REMOVE_MIRROR * remove_mirror
        | SnapshotDelete.METADATA_ONLY * metadata
    )
    session.answer(render.done, "snapshot-delete", domain=name, snapshot=snap, flags=int(flags), timeout=timeout)


COMMANDS = {"snapshot": snapshot}
