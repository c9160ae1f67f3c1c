"""Where the boxes and arrows of a block graph's picture lie: a row each of sketch.py, a column a step of the chains."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

from blockferry.interfaces.cli.sketch import Group, Row, Side, Sketch, progress_words
from blockferry.interfaces.cli.text import size, visible
from blockferry.interfaces.cli.wire import Json

CHAR, SMALL = 7.4, 6.5  # a character of a box's first line, and of the others, and a little more
LONGEST = 38  # characters of a name or path in a box; the whole of it is its tooltip
LINE, BETWEEN = 15, 16  # heights: of a line of text, and between boxes
GAP = 88  # between columns, with room for an arrow's label
LANE = 10  # between arrows that go up or down in one gap
MARGIN, TOP = 24, 76  # around everything, and above it for the title
PAD = 20  # within a disk's panel
INDENT = 32  # of a box at the side
NARROWEST = 96


class Text(NamedTuple):
    """What is in a box. `style` is a class of picture.py, `tip` says it all, `badge` is (text, style)."""

    style: str
    lines: tuple[str, ...]
    tip: str
    badge: tuple[str, str] | None = None

    @property
    def height(self) -> float:
        """Of its box."""
        return 16 + LINE * len(self.lines)

    @property
    def width(self) -> float:
        """Of its box."""
        first, *rest = self.lines
        wide = max([CHAR * cells(first), *(SMALL * cells(line) for line in rest)])
        return max(NARROWEST, wide + 24, SMALL * cells(self.badge[0]) + 72 if self.badge else 0)


class Box(NamedTuple):
    """A box with its place."""

    x: float
    y: float
    text: Text

    @property
    def middle(self) -> float:
        """Where arrows come in and go out."""
        return self.y + self.text.height / 2

    @property
    def right(self) -> float:
        """Its right edge."""
        return self.x + self.text.width

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.y + self.text.height


class Arrow(NamedTuple):
    """An arrow along points, with a label and a smaller one under it, at a place of their own."""

    points: tuple[tuple[float, float], ...]
    style: str
    label: str
    at: tuple[float, float]
    below: str = ""
    tip: str = ""


class Panel(NamedTuple):
    """What lies behind a disk's rows."""

    y: float
    height: float
    title: str = ""


class Placed(NamedTuple):
    """Everything with its place."""

    panels: tuple[Panel, ...]
    arrows: tuple[Arrow, ...]
    boxes: tuple[Box, ...]
    width: float
    height: float


def columns(rows: tuple[Row, ...]) -> dict[str, int]:
    """The column of every node of a spine: right of all that uses it. Column 0 is the devices'."""
    found: dict[str, int] = {}
    for _pass in range(len(rows) + 1):  # a node that moved moves those of other rows; there is an end to that
        before = dict(found)
        for row in rows:
            column = found.get(row.head.get("source") or "", 0) if row.kind == "job" else 0
            for node in [layer.node for layer in row.layers] + ([row.joins[1]] if row.joins else []):
                column = max(column + 1, found.get(node["id"], 0))
                found[node["id"]] = column
        if found == before:
            break
    return found


def cells(text: str) -> int:
    """How many characters wide a text is."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


def short(text: str, limit: int = LONGEST) -> str:
    """A text without its middle, where it is too long: of a path the end says more."""
    text = visible(text)
    if cells(text) <= limit:
        return text
    head, tail = text[: limit // 3], text[-(limit - limit // 3 - 1) :]
    while cells(head + tail) >= limit:
        tail = tail[1:]
    return f"{head}…{tail}"


# --- what is in the boxes -------------------------------------------------------------------------------------


def texts(row: Row, drawn: Sketch) -> dict[str, Text]:
    """The boxes of a row, by their node; the one that it hangs from is under the empty name."""
    found: dict[str, Text] = {}
    if row.kind in ("device", "user"):
        found[""] = _device(row.head) if row.kind == "device" else _user(row.head)
    elif row.kind == "job" and not row.layers and row.joins is None:
        found[""] = _lost(row.head)
    badges = _badges(row, drawn)
    state = f" {row.head['state']}" if row.kind == "job" else ""
    for number, layer in enumerate(row.layers):
        node = layer.node
        found[node["id"]] = _node(node, node["kind"] + ("" if number else state), badges.get(node["id"]))
        for side in layer.sides:
            if side.here:
                found[side.node["id"]] = _node(side.node, "side " + side.node["kind"], badges.get(side.node["id"]))
    return found


def _device(device: Json) -> Text:
    lines = [f"{device['bus']} {device['device']}", *(["read-only"] if device["read_only"] else [])]
    lines += [] if device["root"] is not None else ["empty"]
    return Text("device", (device["target"], " · ".join(lines)), f"{device['target']}\n{visible(device['qdev'])}")


def _user(user: Json) -> Text:
    name = visible(user["name"])
    return Text("user", (short(name), "no disk") if name else ("no name", "such as an export"), name or "no name")


def _lost(job: Json) -> Text:
    lines = [short(job["file"] or job["id"]), short(job["reason"] or "")]
    if job["operation"] is None:
        lines.insert(0, f"{job['type']} · {job['state']}")
    return Text(f"ghost {job['state']}", tuple(line for line in lines if line), job_tip(job))


def _node(node: Json, style: str, badge: tuple[str, str] | None) -> Text:
    about = [node["driver"]]
    about += [size(node["virtual_size"])] if node["kind"] in ("format", "image") and node["virtual_size"] else []
    about += [short(node["file"])] if node["file"] and node["kind"] != "image" else []
    about += ["read-only"] if node["read_only"] and node["kind"] in ("format", "image") else []
    tip = [node["id"], f"{node['driver']}, {size(node['virtual_size'])}", node["file"] or ""]
    tip += ["read-only" if node["read_only"] else "writable"]
    return Text(style, (short(node["id"]), " · ".join(about)), "\n".join(visible(line) for line in tip if line), badge)


def _badges(row: Row, drawn: Sketch) -> dict[str, tuple[str, str]]:
    """What is said at a node's corner: that other rows come to it too, or which job writes to it."""
    found = {node: ("shared", "shared") for node, rows in drawn.shared.items() if rows != (row.label,)}
    for job in row.jobs:
        words = " ".join([job["type"], job["state"], *progress_words(job)])
        node = job["dest"] or job["source"]
        if node is not None:
            found[node] = (words, job["state"])
    return found


def job_tip(job: Json) -> str:
    """All that is known of a job."""
    lines = [f"{job['type']} {job['state']}", job["id"], job["file"] or "", job["reason"] or ""]
    lines += [f"of snapshot {job['snapshot']}"] if job["snapshot"] else []
    lines += ["not started by blockferry"] if job["operation"] is None else []
    return "\n".join(visible(line) for line in lines if line)


# --- where they are -------------------------------------------------------------------------------------------


def place(drawn: Sketch) -> Placed:
    """Give everything its place."""
    return _Placer(drawn).place()


class _Placer:
    """Columns get their widths and rows their heights from what is in them; then come the arrows."""

    def __init__(self, drawn: Sketch) -> None:
        nowhere = tuple(Row("job", job, job["id"], (), None) for job in drawn.jobs)
        self._groups = (*drawn.groups, *([Group("other jobs", nowhere)] if nowhere else []))
        self._rows = drawn.rows + nowhere
        self._texts = [texts(row, drawn) for row in self._rows]
        self._column = columns(self._rows)
        self._left, self._lanes, self._right = self._measure()
        self._boxes: dict[str, Box] = {}
        self._heads: list[Box | None] = []  # a row each
        self._arrows: list[Arrow] = []

    def place(self) -> Placed:
        panels = self._place_groups()
        for row, head in zip(self._rows, self._heads, strict=True):
            self._draw(row, head)
        boxes = [*self._boxes.values(), *(box for box in self._heads if box is not None)]
        bottom = panels[-1].y + panels[-1].height if panels else TOP
        return Placed(tuple(panels), tuple(self._arrows), tuple(boxes), self._right + PAD + MARGIN, bottom + MARGIN)

    def _measure(self) -> tuple[list[float], dict[str, int], float]:
        """The left edge of each column, the lane of each node that other rows join, and the right end of all."""
        widths: dict[int, float] = {0: NARROWEST}
        for row, found in zip(self._rows, self._texts, strict=True):
            if "" in found:
                column = self._head_column(row)
                widths[column] = max(widths.get(column, 0), found[""].width)
            for layer in row.layers:
                column = self._column[layer.node["id"]]
                own = [found[layer.node["id"]].width]
                own += [INDENT * (each.depth + 1) + found[each.node["id"]].width for each in layer.sides if each.here]
                widths[column] = max(widths.get(column, 0), *own)
        lanes: dict[str, int] = {}
        used: dict[int, int] = {}
        for row in self._rows:
            for node in [each["id"] for each in (row.joins[1] if row.joins else None, row.later) if each is not None]:
                if node in self._column and node not in lanes:
                    column = self._column[node]
                    lanes[node] = used[column] = used.get(column, -1) + 1
        left: list[float] = []
        x: float = MARGIN + PAD
        for column in range(max(widths) + 1):
            x += (GAP + LANE * used.get(column, 0)) if column else 0
            left.append(x)
            x += widths.get(column, 0)
        return left, lanes, x

    def _head_column(self, row: Row) -> int:
        return self._column.get(row.head["source"] or "", 0) + 1 if row.kind == "job" else 0

    def _place_groups(self) -> list[Panel]:
        panels: list[Panel] = []
        y: float = TOP
        found = iter(self._texts)
        for group in self._groups:
            top = y
            y += PAD + (PAD if group.title else 0)
            for row in group.rows:
                y = self._place_row(row, next(found), y) + BETWEEN
            y += PAD - BETWEEN
            panels.append(Panel(top, y - top, group.title))
            y += BETWEEN
        return panels

    def _place_row(self, row: Row, found: dict[str, Text], y: float) -> float:
        """Place the boxes of a row.

        Returns:
            Where they end.
        """
        head = Box(self._left[self._head_column(row)], y, found[""]) if "" in found else None
        self._heads.append(head)
        bottom = head.bottom if head is not None else y
        for layer in row.layers:
            name = layer.node["id"]
            box = self._boxes[name] = Box(self._left[self._column[name]], y, found[name])
            below = box.bottom
            for side in layer.sides:
                if side.here:
                    x = box.x + INDENT * (side.depth + 1)
                    hung = self._boxes[side.node["id"]] = Box(x, below + BETWEEN, found[side.node["id"]])
                    below = hung.bottom
            bottom = max(bottom, below)
        return bottom

    def _draw(self, row: Row, head: Box | None) -> None:
        """The arrows of a row."""
        before, role = head, "root"
        if row.kind == "job":
            before = None
            self._hang(row, head)
        for layer in row.layers:
            box = self._boxes[layer.node["id"]]
            if before is not None:
                points = ((before.right, before.middle), (box.x, box.middle))
                self._arrows.append(Arrow(points, "chain", layer.role, (before.right + 8, before.middle - 6)))
            self._draw_sides(box, layer.sides)
            before = box
        if row.joins is not None and before is not None:
            role, node = row.joins
            self._join(before, role, node["id"], "chain")
        if row.later is not None and before is not None:
            self._join(before, "backing", row.later["id"], "later", "at the pivot")

    def _draw_sides(self, box: Box, sides: tuple[Side, ...]) -> None:
        above = [box]
        for side in sides:
            del above[side.depth + 1 :]
            user, used = above[side.depth], self._boxes[side.node["id"]]
            x = user.x + 18
            if not side.here:
                self._arrows.append(
                    Arrow(((x, user.bottom), (used.x, used.middle)), "chain", side.role, (x, user.bottom + 11))
                )
                continue
            points = ((x, user.bottom), (x, used.middle), (used.x, used.middle))
            self._arrows.append(Arrow(points, "chain", side.role, (x + 6, used.y - 4)))
            above.append(used)

    def _join(self, box: Box, role: str, node: str, style: str, below: str = "") -> None:
        """An arrow to a node of another row: along its own, then up or down just before that node."""
        into = self._boxes[node]
        x = into.x - 18 - LANE * self._lanes.get(node, 0)
        points = ((box.right, box.middle), (x, box.middle), (x, into.middle), (into.x, into.middle))
        self._arrows.append(Arrow(points, style, role, (box.right + 8, box.middle - 6), below))

    def _hang(self, row: Row, head: Box | None) -> None:
        """A job's arrow, from where its data comes from: the filter above its disk, or the disk itself."""
        job = row.head
        into = head if head is not None else self._boxes[row.layers[0].node["id"]]
        source = self._boxes.get(job["source"] or "") or self._device(job["disk"])
        if source is None:
            return
        x = source.x + (26 if source.text.style == "filter" else 8)  # below round corners, beside what is at the side
        points = ((x, source.bottom), (x, into.middle), (into.x, into.middle))
        label = " ".join([job["type"], "·", job["state"], *progress_words(job)])
        below = f"of snapshot {job['snapshot']}" if job["snapshot"] else ""
        below = below if job["operation"] is not None else f"{short(job['id'], 20)}, not blockferry's"
        self._arrows.append(Arrow(points, f"job {job['state']}", label, (x + 10, into.middle - 7), below, job_tip(job)))

    def _device(self, target: str | None) -> Box | None:
        heads = zip(self._rows, self._heads, strict=True)
        return next((head for row, head in heads if row.kind == "device" and row.label == target), None)
