"""The block graph as text: a disk's chain goes down, files are at its side, mirrors hang below it."""

from __future__ import annotations

import click

from blockferry.interfaces.cli.sketch import Layer, Row, Side, Sketch, counts, progress_words, sketch
from blockferry.interfaces.cli.text import paint, size, visible
from blockferry.interfaces.cli.wire import Json


def graph(view: Json) -> str:
    """`graph`: the guest, then each disk with its chain and its mirrors, then what is left over."""
    drawn = sketch(view)
    lines = ["  ".join([visible(view["domain"]), paint(view["state"]), counts(view)])]
    for group in drawn.groups:
        lines += ["", *([click.style(group.title, bold=True)] if group.title else [])]
        for number, row in enumerate(group.rows):
            lines += _row(row, drawn, below=number > 0)
    if drawn.jobs:
        lines += ["", click.style("other jobs", bold=True), *(f"  {job_words(job)}" for job in drawn.jobs)]
    return "\n".join(lines)


def _row(row: Row, drawn: Sketch, *, below: bool) -> list[str]:
    if row.kind == "job":
        return [*_hangs(row.head, below=below, drawn=bool(row.layers)), *(f"    {line}" for line in _spine(row, drawn))]
    heads = {"device": _device, "user": _user}
    lines = [heads[row.kind](row.head)] if row.kind in heads else []
    if row.kind == "device" and not row.layers and row.joins is None:
        lines.append("(empty)")
    lines += _spine(row, drawn)
    for job in row.jobs:
        lines += _hangs(job, below=True, drawn=False)
    return lines


def _hangs(job: Json, *, below: bool, drawn: bool) -> list[str]:
    return [*(["║"] if below else []), f"╚═▶ {job_words(job, drawn=drawn)}"]


def _device(device: Json) -> str:
    words = [click.style(device["target"], bold=True), f"{device['bus']} {device['device']}", visible(device["qdev"])]
    return "  ".join([*words, *(["read-only"] if device["read_only"] else [])])


def _user(user: Json) -> str:
    return click.style(visible(user["name"]) or "something without a name, such as an export", bold=True)


def _spine(row: Row, drawn: Sketch) -> list[str]:
    """A line a node of the chain, a line each for what is at its side; the roles are a column of their own."""
    roles = (
        [layer.role for layer in row.layers]
        + ([row.joins[0]] if row.joins else [])
        + (["backing"] if row.later else [])
    )
    wide = max(map(len, roles), default=0)
    lines: list[str] = []
    for number, layer in enumerate(row.layers, 1):
        lines.append(
            f"{'▼' if layer.role else '●'} {layer.role:{wide}}  {_node(layer.node, _others(layer, row, drawn))}"
        )
        rail = "│" if number < len(row.layers) or row.joins or row.later else " "
        lines += [f"{rail} {'':{wide}}  {branch}" for branch in _sides(layer.sides, drawn)]
    if row.joins:
        role, node = row.joins
        lines.append(f"▼ {role:{wide}}  {_reference(node, drawn)}")
    if row.later:
        words = [click.style(visible(row.later["id"]), bold=True), row.later["driver"], "(once the guest goes over)"]
        lines.append(f"▽ {'backing':{wide}}  {'  '.join(words)}")
    return lines


def _others(layer: Layer, row: Row, drawn: Sketch) -> str:
    """The other rows that come to a node."""
    comers = [label for label in drawn.shared.get(layer.node["id"], ()) if label != row.label]
    return f"shared with {', '.join(map(visible, comers))}" if comers else ""


def _node(node: Json, more: str = "") -> str:
    words = [click.style(visible(node["id"]), bold=True), node["driver"]]
    words += [size(node["virtual_size"])] if node["kind"] in ("format", "image") and node["virtual_size"] else []
    words += [visible(node["file"])] if node["file"] and node["kind"] != "image" else []
    words += ["read-only"] if node["read_only"] and node["kind"] != "filter" else []
    words += [click.style(more, fg="cyan")] if more else []
    return "  ".join(words)


def _reference(node: Json, drawn: Sketch) -> str:
    where = drawn.shared[node["id"]][0]
    return "  ".join([click.style(visible(node["id"]), bold=True), node["driver"], f"(shared: see {visible(where)})"])


def _sides(sides: tuple[Side, ...], drawn: Sketch) -> list[str]:
    lines: list[str] = []
    rails: list[str] = []
    for side in sides:
        del rails[side.depth :]
        corner = "└─" if side.last else "├─"
        shown = _node(side.node) if side.here else _reference(side.node, drawn)
        lines.append(f"{''.join(rails)}{corner} {side.role}  {shown}")
        rails.append("   " if side.last else "│  ")
    return lines


def job_words(job: Json, *, drawn: bool = False) -> str:
    """A job on one line: what it is, how far, and whose; and where it goes, if that is not drawn below it."""
    words = [job["type"], paint(job["state"]), *progress_words(job)]
    words += [f"of snapshot {job['snapshot']}"] if job["snapshot"] else []
    words += [visible(job["id"])]
    words += [f"into {visible(job['file'] or job['dest'])}"] if (job["file"] or job["dest"]) and not drawn else []
    words += [f"not started by blockferry{_on(job)}"] if job["operation"] is None else []
    words += [f"({visible(job['reason'])})"] if job["reason"] else []
    return "  ".join(words)


def _on(job: Json) -> str:
    return f", works on {visible(job['source'])}" if job["source"] else ""
