"""snapshot create, list, show, delete."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

import click

from blockferry.interfaces.cli import render
from blockferry.interfaces.cli.names import disks, domain_argument, snapshots
from blockferry.interfaces.cli.session import (
    Session,
    Stopped,
    absolute,
    disk_name,
    dry_run_option,
    examples,
    json_option,
)
from blockferry.interfaces.cli.wire import Json
from blockferry.model.flags import SnapshotCreate, SnapshotDelete

MODES = ("existing", "absolute", "relative", "none")


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
        "blockferry snapshot create vm1 calm --atomic --quiesce",
        "blockferry snapshot create vm1 --xml snapshot.xml --dry-run",
        "blockferry snapshot create vm1 ours --disk vda=/src/made.qcow2 --reuse-ext",
        "blockferry snapshot create vm1 --xml snapshot.xml --redefine",
    ),
)
@domain_argument
@click.argument("snap", required=False)
@click.option("--xml", type=click.File("r", encoding="utf-8"), help="A <domainsnapshot>; - reads it from stdin.")
@click.option("--disk", "named", multiple=True, metavar="TARGET[=FILE]", shell_complete=disks, help="Take only these.")
@click.option("--mirror", "mirrors", multiple=True, metavar="TARGET=FILE", help="Mirror the disk's writes to FILE.")
@click.option("--mirror-backing", "backings", multiple=True, metavar="TARGET=FILE", help="What the mirror backs onto.")
@click.option("--mode", "modes", multiple=True, metavar="TARGET=MODE", help=f"What headers say: {', '.join(MODES)}.")
@click.option("--atomic", is_flag=True, help="All disks at one instant, or nothing is changed.")
@click.option("--quiesce", is_flag=True, help="The guest agent freezes the guest's file systems meanwhile.")
@click.option("--reuse-ext", is_flag=True, help="Take overlays that are there already, none is made; --atomic with it.")
@click.option("--no-metadata", is_flag=True, help="Don't remember the snapshot, only switch to the new images.")
@click.option("--redefine", is_flag=True, help="Take none: remember one that was taken, from its --xml.")
@click.option("--current", is_flag=True, help="With --redefine: only if the guest is on its images.")
@click.option("--description", metavar="TEXT", help="Free text.")
@dry_run_option
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
    backings: tuple[str, ...],
    modes: tuple[str, ...],
    atomic: bool,
    quiesce: bool,
    reuse_ext: bool,
    no_metadata: bool,
    redefine: bool,
    current: bool,
    description: str | None,
    dry_run: bool,
) -> None:
    """Take a snapshot, with mirrors if you like.

    With --disk only those disks (and mirrored ones) take part, else all that the guest can write to. With --mirror the guest
    writes to the snapshot's image and to FILE from then on, until `snapshot delete`.
    """
    if xml is not None and (named or mirrors or backings or modes):
        raise click.UsageError(
            "--xml says itself what is done with which disk: leave out --disk, --mirror, --mirror-backing and --mode."
        )
    if redefine and (xml is None or atomic or reuse_ext or no_metadata):
        raise click.UsageError(
            "--redefine remembers a snapshot that was taken: it wants its --xml, and no word on how one is taken."
        )
    if current and not redefine:
        raise click.UsageError("--current is for --redefine.")
    what: Json = {"wish": {"name": snap, "description": description, **_disks(named, mirrors, backings, modes)}}
    if xml is not None:
        what = {"xml": _read(xml), "name": snap, "description": description}
    flags = (
        SnapshotCreate.ATOMIC * (atomic or reuse_ext)
        | SnapshotCreate.QUIESCE * quiesce
        | SnapshotCreate.REUSE_EXT * reuse_ext
        | SnapshotCreate.NO_METADATA * no_metadata
        | SnapshotCreate.REDEFINE * redefine
        | SnapshotCreate.CURRENT * current
    )
    render_it = render.plan if dry_run else render.snapshot
    session.answer(render_it, "snapshot-create", domain=name, flags=int(flags), dry_run=dry_run, **what)


def _disks(named: tuple[str, ...], mirrors: tuple[str, ...], backings: tuple[str, ...], modes: tuple[str, ...]) -> Json:
    """The disks of a SnapshotWish, as JSON."""
    disks: dict[str, Json] = {}
    for text in named:
        target, separator, file = text.partition("=")
        if disk_name(target) in disks or not target or (separator and not file):
            raise click.BadParameter(f"{text!r} is not TARGET or TARGET=FILE, once a disk.", param_hint="--disk")
        disks[disk_name(target)] = {"name": disk_name(target), **({"file": absolute(file)} if file else {})}
    for target, file in _pairs(mirrors, "--mirror", "FILE"):
        disks.setdefault(target, {"name": target})["mirror"] = {"file": absolute(file)}
    for target, file in _pairs(backings, "--mirror-backing", "FILE"):
        if "mirror" not in disks.get(target, {}):
            raise click.BadParameter(
                f"{target} has no --mirror that could back onto it.", param_hint="--mirror-backing"
            )
        disks[target]["mirror"]["backing"] = absolute(file)
    for target, mode in _pairs(modes, "--mode", "MODE"):
        if mode not in MODES:
            raise click.BadParameter(f"{mode!r} is none of {', '.join(MODES)}.", param_hint="--mode")
        disks.setdefault(target, {"name": target})["mode"] = mode
    return {"disks": list(disks.values()), "only_these": bool(named)}


def _pairs(texts: tuple[str, ...], option: str, what: str) -> Iterator[tuple[str, str]]:
    """The two halves of each TARGET=..., once a disk."""
    seen: set[str] = set()
    for text in texts:
        target, _, value = text.partition("=")
        if not target or not value or disk_name(target) in seen:
            raise click.BadParameter(f"{text!r} is not TARGET={what}, once a disk.", param_hint=option)
        seen.add(disk_name(target))
        yield disk_name(target), value


def _read(xml: TextIO) -> str:
    try:
        return xml.read()
    except UnicodeDecodeError as error:
        from blockferry.errors import InvalidXml

        raise InvalidXml(element="document", reason="it is not UTF-8 text") from error


@snapshot.command("list", epilog=examples("blockferry snapshot list vm1"))
@domain_argument
@json_option
@click.pass_obj
def list_(session: Session, name: str) -> None:
    """A domain's snapshots, oldest first; below them those that are inside its images."""
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
        "blockferry snapshot delete vm1 before",
        "blockferry snapshot delete vm1 move --reopen-mirror",
        "blockferry snapshot delete vm1 before --metadata",
    ),
)
@domain_argument
@click.argument("snap", shell_complete=snapshots)
@click.option("--merge", is_flag=True, help="Merge its images down into what they back onto: the default.")
@click.option("--children", is_flag=True, help="Merge its descendants with it.")
@click.option("--children-only", is_flag=True, help="Merge its descendants alone.")
@click.option("--reopen-mirror", is_flag=True, help="The guest goes on on the mirrors, all at one instant or none.")
@click.option("--remove-mirror", is_flag=True, help="The mirrors are dropped; the guest stays on its images.")
@click.option("--metadata", is_flag=True, help="Only forget the snapshot; its images stay as they are.")
@click.option("--timeout", type=float, metavar="SEC", help="For the mirrors to be ready; 60 unless told.")
@click.option("--dry-run", is_flag=True, help="Print the steps of a merge, and do nothing.")
@json_option
@click.pass_obj
def delete(
    session: Session,
    *,
    name: str,
    snap: str,
    merge: bool,
    children: bool,
    children_only: bool,
    reopen_mirror: bool,
    remove_mirror: bool,
    metadata: bool,
    timeout: float | None,
    dry_run: bool,
) -> None:
    """Delete a snapshot: merge it, forget it, or go over to its mirrors.

    A merge writes what its images hold down into the images under them, and removes its files: nothing that the guest sees
    changes. It costs what was written since the snapshot. Ctrl-C ends the command, not the merge.
    """
    if children + children_only + reopen_mirror + remove_mirror + metadata > 1 or (
        merge and reopen_mirror + remove_mirror + metadata
    ):
        raise click.UsageError(
            "Only one of --merge, --children, --children-only, --reopen-mirror, --remove-mirror and --metadata can be done."
        )
    if dry_run and reopen_mirror + remove_mirror + metadata:
        raise click.UsageError("--dry-run is for a merge.")
    flags = (
        SnapshotDelete.CHILDREN * children
        | SnapshotDelete.CHILDREN_ONLY * children_only
        | SnapshotDelete.REOPEN_MIRROR * reopen_mirror
        | SnapshotDelete.REMOVE_MIRROR * remove_mirror
        | SnapshotDelete.METADATA_ONLY * metadata
    )
    wish = {"domain": name, "snapshot": snap, "flags": int(flags), "timeout": timeout}
    if dry_run:
        session.answer(render.plan, "snapshot-delete", dry_run=True, **wish)
        return
    try:
        session.answer(render.done, "snapshot-delete", **wish)
    except KeyboardInterrupt:
        raise Stopped(f"it was asked for and goes on; `blockferry job list {name}` shows how far it is.") from None


@snapshot.command(
    "revert", epilog=examples("blockferry snapshot revert vm1 before", "blockferry snapshot revert vm1 before --start")
)
@domain_argument
@click.argument("snap", shell_complete=snapshots)
@click.option("--start", is_flag=True, help="Start it again.")
@click.option("--pause", is_flag=True, help="Start it again, and leave it paused before its first instruction.")
@json_option
@click.pass_obj
def revert(session: Session, name: str, snap: str, start: bool, pause: bool) -> None:
    """Bring a defined guest back to a snapshot.

    One that runs is ended first, as by `stop --force`. It goes on on new overlays; what it wrote since the snapshot stays on
    the images that it leaves, until somebody deletes them.
    """
    if start and pause:
        raise click.UsageError("Only one of --start and --pause can be done.")
    session.answer(
        render.domain, "snapshot-revert", domain=name, snapshot=snap, start=start or None, pause=pause or None
    )


COMMANDS = {"snapshot": snapshot}
