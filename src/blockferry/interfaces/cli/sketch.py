"""A block graph put in order, to be drawn as text (tree.py) or as a picture (picture.py).

A row is a device, or a job's destination, with the chain that hangs from it: its spine. What a node of the spine uses
besides, such as its file, is at its side. A node has one place; a row that comes to it a second time joins it there.
"""

from __future__ import annotations

from typing import NamedTuple

from blockferry.interfaces.cli.text import percent
from blockferry.interfaces.cli.wire import Json

# What goes on with a chain, in this order; the rest of what a node uses is at its side.
SPINE = ("backing",)
FILTER_SPINE = ("backing", "file", "image")


WORKING = ("copying", "catching up", "running")


class Side(NamedTuple):
    """A node beside the spine. `depth` is 0 for what a layer itself uses; `here` is False for one that has its place."""

    depth: int
    role: str
    node: Json
    here: bool
    last: bool


class Layer(NamedTuple):
    """A node of a spine, its role there, and what is at its side."""

    role: str
    node: Json
    sides: tuple[Side, ...]


class Row(NamedTuple):
    """A spine with what it hangs from.

    Attributes:
        kind: `device`, `job`, `user` or `unused`.
        head: the device, job or user of the view.
        label: what it is called where another row refers to it.
        layers: its nodes, the topmost first.
        joins: role and node of another row, which its spine goes on with.
        jobs: those that work on nodes of this row and have no row of their own.
        later: the node that the spine is to go on with once the guest goes over to it.
    """

    kind: str
    head: Json
    label: str
    layers: tuple[Layer, ...]
    joins: tuple[str, Json] | None
    jobs: tuple[Json, ...] = ()
    later: Json | None = None


class Group(NamedTuple):
    """Rows that belong together: a disk's with those of its jobs; or what has a title."""

    title: str
    rows: tuple[Row, ...]


class Sketch(NamedTuple):
    """All rows.

    Attributes:
        groups: in their order.
        shared: node -> the rows that come to it, the one where it is drawn first.
        jobs: those that work nowhere in the rows.
    """

    groups: tuple[Group, ...]
    shared: dict[str, tuple[str, ...]]
    jobs: tuple[Json, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Those of all groups."""
        return tuple(row for group in self.groups for row in group.rows)


def sketch(view: Json) -> Sketch:
    """Put a view of kind `graph` in order."""
    return _Sketcher(view).sketch()


class _Sketcher:
    """Gives every node its place; chains may be long, so nothing here recurs."""

    def __init__(self, view: Json) -> None:
        self._view = view
        self._nodes: dict[str, Json] = {node["id"]: node for node in view["nodes"]}
        self._below: dict[str, list[tuple[str, str]]] = {}
        for edge in view["edges"]:
            self._below.setdefault(edge["parent"], []).append((edge["role"], edge["child"]))
        self._place: dict[str, str] = {}  # node -> label of the row where it is drawn
        self._comers: dict[str, list[str]] = {}

    def sketch(self) -> Sketch:
        devices = [self._row("device", each, each["target"], each["root"], "root") for each in self._view["devices"]]
        own: dict[str, list[Row]] = {}
        notes: dict[str, list[Json]] = {}
        for job in self._view["jobs"]:
            at = job["disk"] or self._place.get(job["source"]) or self._place.get(job["dest"]) or ""
            if self._has_row(job):
                own.setdefault(at, []).append(self._row("job", job, _called(job), job["dest"], "target"))
            else:
                notes.setdefault(at, []).append(job)
        groups = [
            Group("", (row._replace(jobs=tuple(notes.pop(row.label, ()))), *own.pop(row.label, ()))) for row in devices
        ]
        rest = [
            ("other jobs", [row for left in own.values() for row in left]),  # of a disk that is gone, or of none
            ("used by something else", [self._user(each) for each in self._view["users"]]),
            ("left over: nobody uses these nodes", [self._unused(each) for each in self._view["unused"]]),
        ]
        rest.append(("used by jobs", [self._unused(each) for each in self._tops()]))
        # What nobody uses may be a job's destination, and has its place then; what only a job uses may have none yet.
        shown = [Group(title, tuple(filter(_shows, found))) for title, found in rest]
        groups += [group for group in shown if group.rows]
        shared = {node: tuple(dict.fromkeys([self._place[node], *comers])) for node, comers in self._comers.items()}
        return Sketch(tuple(groups), shared, tuple(job for left in notes.values() for job in left))

    def _tops(self) -> list[str]:
        """What has no place, and is under nothing that has none."""
        left = self._nodes.keys() - self._place.keys()
        return sorted(left - {child for name in left for _role, child in self._below.get(name, ())})

    def _user(self, user: Json) -> Row:
        return self._row("user", user, user["name"] or "an export", user["node"], "root")

    def _unused(self, node: str) -> Row:
        return self._row("unused", {}, node, None if node in self._place else node, "")

    def _has_row(self, job: Json) -> bool:
        """Whether a job's destination is drawn below its disk: one that was lost is too, although it has no node."""
        if job["dest"] is None:
            return job["type"] in ("copy", "mirror") and job["operation"] is not None
        return job["dest"] not in self._place

    def _row(self, kind: str, head: Json, label: str, root: str | None, role: str) -> Row:
        layers: list[Layer] = []
        name, joins = root, None
        while name is not None and name in self._nodes:
            node = self._nodes[name]
            if name in self._place:
                self._comers.setdefault(name, []).append(label)
                joins = role, node
                break
            self._place[name] = label
            spine = self._spine(node)
            layers.append(Layer(role, node, self._sides(name, spine, label)))
            role, name = spine or ("", None)
        return Row(kind, head, label, tuple(layers), joins, later=self._nodes.get(head.get("base") or ""))

    def _spine(self, node: Json) -> tuple[str, str] | None:
        """What a chain goes on with below this node: (role, node)."""
        below = dict(self._below.get(node["id"], ()))
        roles = FILTER_SPINE if node["kind"] == "filter" else SPINE
        return next(((role, below[role]) for role in roles if role in below), None)

    def _sides(self, name: str, spine: tuple[str, str] | None, label: str) -> tuple[Side, ...]:
        """All that a node uses besides, and what that uses: each before what is under it."""
        found: list[Side] = []
        waiting = self._waiting(0, [each for each in self._below.get(name, ()) if each != spine])
        while waiting:
            depth, role, child, last = waiting.pop()
            here = child not in self._place
            if here:
                self._place[child] = label
                waiting += self._waiting(depth + 1, self._below.get(child, []))
            else:
                self._comers.setdefault(child, []).append(label)
            found.append(Side(depth, role, self._nodes[child], here, last))
        return tuple(found)

    def _waiting(self, depth: int, below: list[tuple[str, str]]) -> list[tuple[int, str, str, bool]]:
        """To be taken from the end, so the last one first."""
        known = [each for each in below if each[1] in self._nodes]
        return [(depth, role, child, (role, child) == known[-1]) for role, child in reversed(known)]


def _shows(row: Row) -> bool:
    return bool(row.layers) or row.kind != "unused"


def _called(job: Json) -> str:
    """How another row refers to a job's row."""
    return f"{job['disk']}'s {job['type']}" if job["disk"] else f"job {job['id']}"


def counts(view: Json) -> str:
    """A line that says how much there is."""
    amounts = [(len(view["devices"]), "disk"), (len(view["nodes"]), "node"), (len(view["jobs"]), "job")]
    if view["state"] == "shut off":
        amounts[1] = (len(view["nodes"]), "image")
    return ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in amounts if count or word != "job")


def progress_words(job: Json) -> list[str]:
    """How far a job is; of a ready mirror that is all there is to say."""
    return [percent(job["current"], job["total"])] if job["state"] in WORKING and job["total"] else []
