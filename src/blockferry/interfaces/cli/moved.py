"""A move as people read it: what was begun, how far it is, what has come of it, and what can be typed."""

from __future__ import annotations

import time

from blockferry.interfaces.cli import render
from blockferry.interfaces.cli.text import doing, duration, paint, percent, rate, size, table
from blockferry.interfaces.cli.wire import Json

# Of a move's differences so many are listed.
LISTED = 10


def begun(view: Json) -> str:
    """A move that was begun or is gone on with: each disk, and which way it goes."""
    head = f"{view['domain']}: moving {', '.join(disk['target'] for disk in view['disks'])} (operation {view['operation']})"
    late = (
        []
        if view["deadline"] is None
        else [f"  given up at {_clock(view['deadline'])} if the guest has not gone over by then"]
    )
    return "\n".join([head, *_disks(view), *late, *_left_out(view), *_notes(view)])


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _disks(view: Json) -> list[str]:
    """A line a disk, then why each goes the way that it goes; of several with the same reason it is said once."""
    methods = {file["source"]: file["method"] for file in view["files"]}
    lines, reasons = [], dict[str, list[str]]()
    for disk in view["disks"]:
        method = methods.get(disk["source"])
        way = disk["strategy"] + (f" ({method})" if method else "")
        lines.append(f"  {disk['target']}  {disk['source']} => {disk['dest']}  {disk['format']}  {way}")
        reasons.setdefault(f"{disk['strategy']}: {disk['why']}", []).append(disk["target"])
    return [*lines, *(f"  {', '.join(targets)}  {reason}" for reason, targets in reasons.items())]


def _left_out(view: Json) -> list[str]:
    return [f"left out: {target} ({reason})" for target, reason in view["left_out"].items()]


def _notes(view: Json) -> list[str]:
    return [f"note: {note}" for note in view["notes"]]


def left_alone(view: Json) -> str:
    """A move that nobody waits for."""
    so_far = "The guest is on the destinations. " if view["pivoted"] else ""
    return "\n".join([f"{begun(view)}\n{so_far}It goes on by itself:", *_commands(view)])


def goes_on(view: Json) -> str:
    """What is said when who waits for a move does so no longer."""
    head = f"stopped waiting; move {view['operation']} of {view['domain']} goes on."
    return "\n".join([head, *_commands(view)])


def _commands(view: Json) -> list[str]:
    number = view["operation"]
    cancel = f"  blockferry operations cancel {number}    give it up: every disk back to where it was"
    return [
        f"  blockferry operations show {number}      how far it is",
        f"  blockferry events {view['domain']} --follow   watch it",
        # Nobody goes back from the destinations.
        *([] if view["pivoted"] else [cancel]),
    ]


def figures(row: Json) -> str:
    """How far a part of a move, or all of it, is."""
    words = (
        [f"{percent(row['current'], row['total'])}  {size(row['current'])} of {size(row['total'])}"]
        if row["total"]
        else []
    )
    words += [row["state"]] if row.get("name") and row["state"] in ("ready", "done") else []
    words += [rate(row["rate"])] if row["rate"] is not None and row["current"] < row["total"] else []
    left = row.get("remaining_seconds")
    words += [f"{duration(left)} left"] if left is not None and row["current"] < row["total"] else []
    words += ["not converging"] if row["converging"] is False else []
    return "  ".join(words)


def progress(view: Json) -> str | None:
    """How far a move is, on one line; nothing when there is nothing to be said yet."""
    said = figures(view)
    return f"{doing(view['phase'])}  {said}" if said else None


def event(view: Json) -> str | None:
    """An event of a move that is followed; None for those that its end tells once more."""
    data = view["data"]
    match view["type"]:
        case "move-copied":
            kept = f", {size(data['kept'])} of it before" if data["kept"] else ""
            return f"copied  {data['file']}  {size(data['bytes'])} in {data['seconds']:.1f} s ({data['method']}{kept})"
        case "mirror-started":
            return f"mirror  {view['disk']} => {data['file']}"
        case "mirror-ready":
            return f"mirror  {view['disk']}  {paint('ready')}"
        case "mirror-dropped":
            return f"mirror  {view['disk']}  {paint('lost')}: {data['reason']}"
        case "move-waits":
            return (
                f"waits: a pause of {data['expected_ms']:.0f} ms is to be expected, and {data['max_pause_ms']} ms are allowed;"
                " it goes on mirroring"
            )
        case "move-pivoted":
            return f"pivot  the guest is on the destinations{_pause(data['pause_ms'])}"
        case "move-verified":
            found = f"{size(data['different'])} differ" if data["different"] else "all equal"
            return f"verify  {data['how']}: {size(data['compared'])} compared, {found}"
        case "move-unverified":
            return f"verify  not done: {data['reason']}"
    return None


def _pause(pause_ms: float | None) -> str:
    return "" if pause_ms is None else f"; it stood still for {pause_ms:.1f} ms"


def ended(view: Json) -> str:
    """What has come of a move: the pause, the verdict, and what is left at the old place."""
    number, name = view["operation"], view["domain"]
    if not view["pivoted"]:
        # What it is is said with the error.
        return "\n".join(_kept(view))
    lines = [f"{name} is on {', '.join(disk['dest'] for disk in view['disks'])} (operation {number})"]
    if view["verified"]:
        verdict = "not equal" if view["differences"] else "equal, but for what the guest has written since"
        lines.append(f"compared ({view['verified']}): {size(view['compared'])}, {verdict}")
    elif view["state"] == "done":
        lines.append("source and destination were not compared")
    lines += _differences(view)
    if view["left"] and view["state"] == "done" and not view["differences"]:
        lines += ["left at the old place; when you trust the new one:", *(f"  rm {path}" for path in view["left"])]
    elif view["left"]:
        lines += ["left at the old place:", *(f"  {path}" for path in view["left"])]
    return "\n".join([*lines, *_notes(view)])


def _kept(view: Json) -> list[str]:
    return [f"copied so far: {size(view['copied'])} of {size(view['total'])}"] if view["total"] and view["next"] else []


def _differences(view: Json) -> list[str]:
    found = view["differences"]
    lines = [f"  {each['target']}: {each['length']} bytes from {each['offset']} on" for each in found[:LISTED]]
    return [*lines, *([f"  and {len(found) - LISTED} more (--json has them all)"] if len(found) > LISTED else [])]


def move(view: Json) -> str:
    """What `operations cancel` answers, of a move."""
    return "\n".join([below_steps(view), *(f"next: {command}" for command in view["next"])])


def below_steps(view: Json) -> str:
    """`operations show` of a move, below its steps and what can be typed."""
    head = f"move {view['operation']} of {view['domain']}  {paint(view['state'])}"
    if view["next"]:
        head += f"  {doing(view['phase'])}"
    lines = [head, *_disks(view), *_left_out(view)]
    whole = {disk["source"] for disk in view["disks"]}
    for file in view["files"] if view["state"] != "cancelled" else ():
        if file["method"] is None or file["source"] not in whole:
            done = file["method"] or f"{percent(file['copied'], file['total'])} of {size(file['total'])}"
            lines.append(f"  {file['source']} => {file['file']}  {done}")
    lines += [f"reason: {view['reason']}"] if view["reason"] else []
    if view["pivoted"]:
        lines += [f"the guest stood still for {view['pause_ms']:.1f} ms"] if view["pause_ms"] is not None else []
        lines += ended(view).splitlines()
    elif view["state"] == "cancelled":
        lines.append("every disk is on the image that it was on; the copies are removed")
    return "\n".join(lines)


def storages(view: Json) -> str:
    """`storage list`."""
    rows = [[row["folder"], rate(row["bandwidth"]), str(row["writers"])] for row in view["storages"]]
    return table(rows, ("STORAGE", "LIMIT", "WRITERS")) if rows else "no storage has a limit"


def plan(view: Json) -> str:
    """`move --dry-run`."""
    rows = [[file["file"], size(file["bytes"]), file["what"]] for file in view["files"]]
    lines = [f"{view['domain']}: {view['operation']}; nothing has been done. The files:"]
    lines += [f"  {line}" for line in table(rows, ("FILE", "BYTES", "")).splitlines()]
    lines += [f"room needed on the file system of {path}: {size(room)}" for path, room in view["room"].items()]
    seconds = (
        "can't be said: nothing has been copied here yet" if view["seconds"] is None else duration(view["seconds"])
    )
    lines += [f"time of the copying: {seconds}", f"pause to expect: {view['pause_ms']:.0f} ms"]
    first, *steps = render.plan(view).splitlines()
    del first
    return "\n".join([*lines, "The steps of the beginning:", *steps])
