"""copy, and waiting for one."""

from __future__ import annotations

import time
from collections.abc import Iterator

import click

from blockferry.interfaces.cli import render, wire
from blockferry.interfaces.cli.names import disks, domain_argument
from blockferry.interfaces.cli.progress import display
from blockferry.interfaces.cli.session import (
    Session,
    Size,
    Stopped,
    absolute,
    bandwidth_option,
    disk_name,
    dry_run_option,
    examples,
    json_option,
)
from blockferry.interfaces.cli.wire import Json
from blockferry.model.flags import BlockCopy
from blockferry.model.states import CAUGHT_UP, CHAIN, LOST, NEWEST, lost


@click.command(
    "copy",
    epilog=examples(
        "blockferry copy vm1 vda /dst/disk.img --format raw --pivot",
        "blockferry copy vm1 vdb /dst/b.qcow2 --wait --bandwidth 50M",
        "blockferry copy vm1 vda /dst/top.qcow2 --base /src/golden.qcow2 --pivot",
        "blockferry copy vm1 vda /dst/disk.img --resume --pivot",
    ),
)
@domain_argument
@click.argument("disk", shell_complete=disks)
@click.argument("dest", type=click.Path())
@click.option("--format", "format_", type=click.Choice(["qcow2", "raw"]), help="The copy's; the source's unless told.")
@click.option("--wait", is_flag=True, help="Show its progress until the copy has caught up.")
@click.option("--pivot", is_flag=True, help="Wait, then let the guest go on on the copy.")
@click.option("--finish", is_flag=True, help="Wait, then make the copy an image of one instant.")
@click.option(
    "--base", metavar="FILE", help="An image of the chain, which the copy is to back onto and which is not copied."
)
@click.option("--resume", is_flag=True, help="Go on with the copy to DEST that was cancelled or lost.")
@click.option("--reuse-ext", is_flag=True, help="DEST is an image that is there already.")
@bandwidth_option
@click.option("--granularity", type=Size(), metavar="BYTES", help="Copied at once: a power of two, 512 to 64M.")
@click.option("--buf-size", type=Size(), metavar="BYTES", help="In flight at most.")
@click.option("--converge", is_flag=True, help="Hold the guest's writes until they are on the copy too.")
@dry_run_option
@json_option
@click.pass_obj
def copy(
    session: Session,
    *,
    name: str,
    disk: str,
    dest: str,
    format_: str | None,
    wait: bool,
    pivot: bool,
    finish: bool,
    base: str | None,
    resume: bool,
    reuse_ext: bool,
    bandwidth: int | None,
    granularity: int | None,
    buf_size: int | None,
    converge: bool,
    dry_run: bool,
) -> None:
    """Copy a disk while the guest runs, and keep the copy identical.

    Without --wait, --pivot or --finish the command ends as soon as the copy has begun. Ctrl-C ends the command, never
    the copy.
    """
    if pivot and finish:
        raise click.UsageError("Only one of --pivot and --finish can be done.")
    flags = BlockCopy.REUSE_EXT * reuse_ext | BlockCopy.SYNCHRONOUS_WRITES * converge
    wish = {
        "domain": name,
        "disk": disk_name(disk),
        "dest": absolute(dest),
        "base": absolute(base) if base is not None else None,
        "format": format_,
        "bandwidth": bandwidth,
        "granularity": granularity,
        "buf_size": buf_size,
        "flags": int(flags),
        "resume": resume,
    }
    if dry_run:
        session.answer(render.plan, "copy", dry_run=True, **wish)
        return
    job = session.ask("copy", **wish)
    if not (wait or pivot or finish):
        session.show(job, render.started)
        return
    session.show(
        job,
        lambda view: render.with_notes(
            view, f"{name}: copying {view['disk']} to {view['dest']} (operation {view['operation']})"
        ),
    )
    wait_for(session, job)
    if pivot or finish:
        verb = "pivot" if pivot else "finish"
        try:
            session.answer(render.done, f"job-{verb}", domain=name, disks=[job["disk"]])
        except KeyboardInterrupt:
            raise Stopped(f"the {verb} was asked for and goes on; `blockferry job list {name}` shows it.") from None
    elif not session.json:
        click.echo(
            f"The guest's writes go to both from now on; `blockferry job pivot {name} {job['disk']}` or `finish`."
        )


def wait_for(session: Session, job: Json) -> None:
    """Show a job's progress until it has caught up or is done.

    Raises:
        Told: it was lost, removed or cancelled (job-lost, job-failed).
        Stopped: Ctrl-C; the job goes on.
    """
    try:
        _watch(session, job)
    except KeyboardInterrupt:
        raise Stopped(_goes_on(job)) from None


def _watch(session: Session, job: Json) -> None:
    with display(session.json) as show:
        for event in follow(session, job):
            show(event)
            data = event["data"]
            if data["state"] in LOST:
                error = lost(job["domain"], job["disk"], job["type"], data["state"], data["reason"])
                raise wire.Told(error.to_dict())
            if data["state"] in CAUGHT_UP:
                return


def follow(session: Session, job: Json) -> Iterator[Json]:
    """Give progress events of a job, at least one; they go on through a restart of the host process."""
    from blockferry.errors import HostProcessUnreachable

    # From here on recorded events are numbered after `since`: none is missed, whenever the watching begins.
    since = session.ask("events", domain=job["domain"], since=NEWEST)["last"]
    cut_off = False
    while True:
        try:
            yield _look(session, job)
            cut_off = False
            for event in wire.events(session.state, job["domain"], since):
                since = max(since, event["seq"])
                if event["disk"] == job["disk"]:
                    yield event if event["type"] == "progress" else _look(session, job)
        except HostProcessUnreachable:
            # It was killed. The copy is QEMU's and goes on, only questions were cut off, and the next one starts
            # another host process, unless that can't be: then it is cut off twice without an answer between.
            if cut_off:
                raise
            cut_off = True


def _look(session: Session, job: Json) -> Json:
    """How far the copy is now, as the event that says so."""
    jobs = session.ask("job-list", domain=job["domain"])["jobs"]
    now = next((row for row in jobs if row["disk"] == job["disk"]), {**job, "state": "lost", "reason": "it is unknown"})
    data = {name: now[name] for name in ("domain", "disk", "state", "current", "total", "reason")}
    head = {"version": 1, "kind": "event", "seq": 0, "time": time.time(), "type": "progress"}
    return {**head, "domain": job["domain"], "disk": job["disk"], "data": data}


def _goes_on(job: Json) -> str:
    name, disk = job["domain"], job["disk"]
    what = job["type"].removeprefix("active-") if job["type"] in CHAIN else "copy"
    return (
        f"stopped waiting; the {what} of {disk} to {job['dest']} goes on.\n"
        f"  blockferry job list {name}          how far it is\n"
        f"  blockferry events {name} --follow   watch it\n"
        f"  blockferry job cancel {name} {disk}    stop it"
    )


COMMANDS = {"copy": copy}
