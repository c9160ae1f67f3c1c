"""Views as people read them, one function a kind."""

from __future__ import annotations

import json

from blockferry.interfaces.cli.text import doing, duration, moment, paint, percent, printable, rate, size, table
from blockferry.interfaces.cli.wire import Json


def domains(view: Json) -> str:
    """`list`."""
    rows = [
        [row["name"], paint(row["state"]), str(row["pid"] or "-"), str(row["disks"]), str(row["mirrors"]), row["qmp"]]
        for row in view["domains"]
    ]
    return table(rows, ("NAME", "STATE", "PID", "DISKS", "MIRRORS", "QMP")) or "no domain is attached or defined"


def domain(view: Json) -> str:
    """`show`: the guest, then each disk with its chain, active image first, and its mirror."""
    head = [view["name"], paint(view["state"])]
    head += [f"pid {view['pid']}"] if view["pid"] else []
    head += [f"QEMU {view['qemu']}"] if view["qemu"] else []
    head += [f"snapshot {view['current_snapshot']}"] if view["current_snapshot"] else []
    lines = ["  ".join(head), *([f"qmp  {view['qmp']}"] if view["state"] != "shut off" else [])]
    lines += [f"agent  {view['agent']}"] if view.get("agent") else []
    if view["reason"]:
        lines.append(view["reason"])
    for disk in view["disks"]:
        lines += ["", *_disk(disk)]
    lines += ["", *(f"note: {note}" for note in view["notes"])] if view.get("notes") else []
    return "\n".join(lines)


def _disk(disk: Json) -> list[str]:
    head = [disk["target"], disk["bus"], size(disk["virtual_size"]), disk["qdev"]]
    head += [disk["device"]] if disk["device"] != "disk" else []
    head += ["read-only"] if disk["read_only"] else []
    lines = ["  ".join(head)]
    if disk["source"] is None:
        lines.append("  (empty)")
    for depth, image in enumerate(disk["chain"]):
        arrow = "  " + "   " * (depth - 1) + "<- " if depth else "  "
        lines.append(f"{arrow}{image['file']}  {image['format']}")
    # An older host process knows of no moves.
    if moving := disk.get("moving"):
        lines.append(f"  => {_moving(moving)}")
    elif disk["mirror"]:
        lines.append(f"  => {_mirror(disk['mirror'])}")
    return lines


def _moving(moving: Json) -> str:
    words = [moving["file"], f"move {moving['operation']}", doing(moving["phase"])]
    words += [percent(moving["current"], moving["total"])] if moving["total"] else []
    return "  ".join(words)


def _mirror(mirror: Json) -> str:
    words = [mirror["file"], mirror["format"], "mirror", paint(mirror["state"])]
    if mirror["state"] in ("copying", "catching up") and mirror["total"]:
        words.append(percent(mirror["current"] or 0, mirror["total"]))
    words += [f"of snapshot {mirror['snapshot']}"] if mirror["snapshot"] else []
    words += [f"({mirror['reason']})"] if mirror["reason"] else []
    return "  ".join(words)


def xml(view: Json) -> str:
    """`--xml`."""
    return str(view["xml"] or "").rstrip()


def snapshots(view: Json) -> str:
    """`snapshot list`: a tree, each snapshot under the one that it was taken on; then the internal ones."""
    rows = [
        [
            ("* " if row["current"] else "  ") + branch + row["name"],
            moment(row["created"]),
            row["state"],
            " ".join(disk["target"] for disk in row["disks"]),
            " ".join(f"{disk['target']}:{paint(disk['mirror']['state'])}" for disk in row["disks"] if disk["mirror"])
            or "-",
            row["parent"] or "-",
        ]
        for branch, row in _tree(view["snapshots"])
    ]
    rows += [
        ["  " + printable(row["name"]), moment(row["created"]), "internal", row["target"], "-", "-"]
        for row in view.get("internal", ())
    ]
    heading = ("  NAME", "CREATED", "STATE", "DISKS", "MIRRORS", "PARENT")
    return table(rows, heading) or f"{view['domain']} has no snapshots"


def _tree(rows: list[Json]) -> list[tuple[str, Json]]:
    """The snapshots, each after its parent, with the branch that is drawn before its name."""
    names = {row["name"] for row in rows}
    roots = [row for row in rows if row["parent"] not in names]
    found: list[tuple[str, Json]] = []
    waiting = [(0, row) for row in reversed(roots)]
    while waiting:
        depth, row = waiting.pop()
        found.append(("   " * (depth - 1) + "└─ " if depth else "", row))
        waiting += [(depth + 1, each) for each in reversed(rows) if each["parent"] == row["name"]]
    return found


def snapshot(view: Json) -> str:
    """`snapshot create` and `snapshot show`."""
    head = [f"snapshot {view['name']} of {view['domain']}", moment(view["created"]), f"guest {paint(view['state'])}"]
    head += ["current"] if view["current"] else []
    lines = ["  ".join(head)]
    lines += [view["description"]] if view["description"] else []
    lines += [f"after snapshot {view['parent']}"] if view["parent"] else []
    lines += [f"before snapshot {', '.join(view['children'])}"] if view["children"] else []
    for disk in view["disks"]:
        lines += ["", disk["target"], f"  {disk['source']}  {disk['format']}"]
        # An older host process does not say it.
        spoilt = "  written into by a commit that has not ended" if disk.get("written_into") else ""
        lines.append(f"  <- {disk['backing']}  {disk['backing_format']}{spoilt}")
        lines += [f"  => {_mirror(disk['mirror'])}"] if disk["mirror"] else []
    lines += _left_out(view) + _frozen(view)
    return with_notes(view, "\n".join(lines))


def _frozen(view: Json) -> list[str]:
    # An older host process does not say it.
    frozen = view.get("frozen_ms")
    return [] if frozen is None else [f"the guest's file systems stood frozen for {frozen:.1f} ms"]


def with_notes(view: Json, text: str) -> str:
    """A text, and below it what to know."""
    return "\n".join([text, *_notes(view)])


def _notes(view: Json) -> list[str]:
    return [f"note: {note}" for note in view.get("notes", ())]


def _left_out(view: Json) -> list[str]:
    return [f"left out: {target} ({reason})" for target, reason in view.get("left_out", {}).items()]


def plan(view: Json) -> str:
    """--dry-run."""
    steps = [f"{number:3}  {step}" for number, step in enumerate(view["steps"], 1)]
    return "\n".join(
        [
            f"{view['domain']}: {view['operation']}; nothing has been done. The steps:",
            *steps,
            *_left_out(view),
            *_notes(view),
        ]
    )


def started(view: Json) -> str:
    """`copy` without --wait."""
    job, disk = view["domain"], view["disk"]
    text = (
        f"{job}: copying {disk} to {view['dest']} ({view['format']}, operation {view['operation']}). It goes on by itself:\n"
        f"  blockferry job list {job}          how far it is\n"
        f"  blockferry job pivot {job} {disk}     the guest goes on on the copy, once it is ready\n"
        f"  blockferry job finish {job} {disk}    the copy becomes an image of one instant\n"
        f"  blockferry job cancel {job} {disk}    stop it"
    )
    return with_notes(view, text)


def started_chain(view: Json) -> str:
    """`rebase` and `commit` with --wait."""
    name, disk, ours = view["domain"], view["disk"], view["type"].removeprefix("active-")
    work = f"{ours} of {disk} into" if ours in ("rebase", "commit") else f"copying {disk} to"
    return with_notes(view, f"{name}: {work} {view['dest']} (operation {view['operation']})")


def left_alone(view: Json) -> str:
    """`rebase` and `commit` without --wait."""
    name, disk = view["domain"], view["disk"]
    hints = (
        ". It goes on by itself:",
        f"  blockferry job list {name}          how far it is",
        f"  blockferry job cancel {name} {disk}    stop it",
    )
    first, *notes = started_chain(view).splitlines()
    return "\n".join([first + hints[0], *hints[1:], *notes])


def ended_chain(view: Json) -> str:
    """What a rebase or commit has come to, at the end of --wait."""
    disk, dest, base = view["disk"], view["dest"], view["base"]
    if view["type"] == "rebase":
        return f"{disk} now backs onto {base}" if base else f"{disk} now backs onto nothing"
    if view["type"] == "active-commit":
        return f"{disk} now on {dest}"
    if view["type"] == "commit":
        return f"{view['source']} is committed into {dest}"
    return f"the copy has caught up; `blockferry job pivot {view['domain']} {disk}` lets the guest go on on it"


def _amounts(job: Json) -> tuple[str, str, str]:
    """How far a job is; of one that has ended QEMU tells nothing any more."""
    if job["state"] not in ("copying", "catching up", "ready", "running") or (
        job["state"] != "ready" and not job["total"]
    ):
        return "-", "-", "-"
    limit = rate(job["speed"]) if job["speed"] else "no limit"
    return percent(job["current"], job["total"]), f"{size(job['current'])} of {size(job['total'])}", limit


def jobs(view: Json) -> str:
    """`job list`."""
    rows = [
        [
            job["disk"],
            job["type"],
            paint(job["state"]),
            *_amounts(job),
            job["dest"],
            job["reason"] or (f"snapshot {job['snapshot']}" if job["snapshot"] else f"operation {job['operation']}"),
        ]
        for job in view["jobs"]
    ]
    heading = ("DISK", "JOB", "STATE", "DONE", "BYTES", "LIMIT", "DESTINATION", "")
    return table(rows, heading) or f"{view['domain']} has no jobs"


def progress(data: Json) -> str:
    """One line of `copy --wait`, and of a progress event."""
    words = [data["disk"], paint(data["state"])]
    if data["total"] or data["state"] == "ready":  # QEMU says nothing of a job between two, or of one that is over
        words += [percent(data["current"], data["total"]), f"{size(data['current'])} of {size(data['total'])}"]
    words += [rate(data["rate"])] if data.get("rate") is not None else []
    words += [f"{duration(data['remaining_seconds'])} left"] if data.get("remaining_seconds") is not None else []
    words += ["not converging"] if data.get("converging") is False else []
    words += [data["reason"]] if data.get("reason") else []
    return "  ".join(words)


def events(view: Json) -> str:
    """`events`."""
    return "\n".join(map(event, view["events"])) or "no events"


def event(view: Json) -> str:
    """One event on one line."""
    number = str(view["seq"]) if view["seq"] else "-"
    head = f"{number:>5}  {moment(view['time'])}  {view['domain']}  {view['type']}"
    if view["type"] == "progress":
        return f"{head}  {progress(view['data'])}"
    values = [f"{name}={_plain(value)}" for name, value in view["data"].items() if value is not None]
    return "  ".join([head, *([view["disk"]] if view["disk"] else []), *values])


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def operations(view: Json) -> str:
    """`operations`."""
    rows = [
        [
            str(row["id"]),
            moment(row["started"]),
            _took(row),
            row["domain"],
            row["what"],
            paint(row["state"]),
            row["text"],
        ]
        for row in view["operations"]
    ]
    return table(rows, ("ID", "STARTED", "TOOK", "DOMAIN", "WHAT", "STATE", "")) or "no operations"


def _took(row: Json) -> str:
    return "-" if row["ended"] is None else f"{row['ended'] - row['started']:.2f} s"


def _step_took(step: Json) -> str:
    return "-" if step["ended"] is None else f"{1000 * (step['ended'] - step['started']):.1f} ms"


def operation(view: Json) -> str:
    """`operations show`: the steps with their times, from the operation's beginning."""
    head = [f"operation {view['id']}", view["domain"], view["what"], paint(view["state"])]
    lines = ["  ".join(head), view["text"], f"started {moment(view['started'])}, took {_took(view)}"]
    lines += [f"the guest stood still for {view['pause_ms']:.1f} ms"] if view["pause_ms"] is not None else []
    lines += _frozen(view)
    lines += [f"recovery's row {view['row']}"] if view["row"] else []
    lines += [f"error: {view['error']}"] if view["error"] else []
    rows = [
        [
            str(step["index"]),
            step["stretch"],
            paint(step["state"]),
            f"+{step['started'] - view['started']:.3f} s",
            _step_took(step),
            step["text"] + (f": {step['error']}" if step["error"] else ""),
        ]
        for step in view["steps"]
    ]
    lines += ["", table(rows, ("STEP", "STRETCH", "STATE", "BEGAN", "TOOK", ""))] if rows else []
    return "\n".join([*lines, *_next(view)])


def _next(view: Json) -> list[str]:
    return [f"next: {command}" for command in view["next"]]


def recovery(view: Json) -> str:
    """`recover`."""
    lines = []
    for row in view["operations"]:
        lines.append(f"operation {row['operation']}  {row['domain']}  {row['what']}  {paint(row['state'])}")
        lines += [f"  row {row['row']}: {row['why']}", *(f"  {line}" for line in _next(row))]
    lines += [f"{name} can't be asked: {reason}" for name, reason in view["unreachable"].items()]
    return "\n".join(lines) or "everything is settled"


def findings(view: Json) -> str:
    """`doctor`: each finding, and under it what to type."""
    lines = []
    for row in view["findings"]:
        whose = row["domain"] if view["domain"] is None else None
        about = " ".join(word for word in (whose, row["disk"]) if word)
        padding = " " * (len("problem  ") - len(row["severity"]))
        lines.append(f"{paint(row['severity'])}{padding}{f'{about}: ' if about else ''}{row['text']}  [{row['code']}]")
        lines += [f"{' ' * 13}{command}" for command in row["next"]]
    count = view["problems"]
    return "\n".join([*lines, f"{count} problem{'s' if count != 1 else ''}" if count else "no problems"])


def done(view: Json) -> str:
    """What was done."""
    pause = "" if view["pause_ms"] is None else f" The guest stood still for {view['pause_ms']:.1f} ms."
    number = "" if view["operation"] is None else f" (operation {view['operation']})"
    return f"{view['text']}{number}{'.' if pause else ''}{pause}"
