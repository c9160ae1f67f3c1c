"""What was measured of moves: the tables of all rounds, and of what was promised; their part of docs/performance.md."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import report
from figures import Figure, Series, cell, grid, markdown
from movecases import COPIES, LIBVIRT, MIRROR, MOVES, OFFLOAD, PLAIN, READ, WAYS, WRITE, MoveCase

BEGIN = "<!-- figures: benchmarks/moves.py --docs -->"
NOTES = (
    "read: dd of the source into nothing; write: dd of as many zeroes with conv=fsync: what the machine can do",
    "qemu-img: `convert -W -m 16` of an image that nobody has open, into one image; nothing is synced",
    "cp: `--sparse=auto --reflink=auto` of all images that nobody has open; nothing is synced, checked or kept",
    "plain copy: what an offload copies with, alone: synced as it goes, with what is needed to go on from there",
    (
        "libvirt: a block copy of each disk, all at once, then a pivot of one after the other; of a chain one image is made, "
        "and so does our mirror; the offload and cp keep the chain"
    ),
    "libvirt, mirror, offload: from the call until the guest is on the copy and nothing is left to be done",
    (
        "pause: of the guest, by QEMU's clock; libvirt's is the time from the first disk's return from its pivot until the "
        "last's, in which some disks are on their copies and some not"
    ),
    (
        "a guest that writes: a Linux that writes 50 MiB/s past its cache, 64 KiB at a time, to all its disks together; "
        "latency and rate are QEMU's account of its devices, in bins of 5 %, from the call until the end, two seconds at least"
    ),
    "interrupted: our process ends when 60 % are copied; what the second run copies outside QEMU and mirrors",
)
COLOURS = {
    READ: "#dddddd",
    WRITE: "#dddddd",
    **dict.fromkeys(COPIES, "#c9b27c"),
    PLAIN: "#1f6f8b",
    LIBVIRT: "#b8b8b8",
    MIRROR: "#1f6f8b",
    OFFLOAD: "#1f6f8b",
}
# What a guest that writes has of it: text, unit.
WRITES = {
    "rate": ("writes of the guest", "MiB/s"),
    "p99": ("latency of its writes, 99th percentile", "ms"),
    "worst": ("latency of its slowest write", "ms"),
}


@dataclass
class Figures:
    """Every round of every case.

    Attributes:
        times: in seconds, by the case's name.
        pauses: in milliseconds.
        writes: by the case's name, then by what.
        again: what the second runs of interrupted moves have moved, as a part of the disk.
    """

    times: dict[str, Series] = field(default_factory=dict)
    pauses: dict[str, Series] = field(default_factory=dict)
    writes: dict[str, dict[str, Series]] = field(default_factory=dict)
    again: list[float] = field(default_factory=list)

    def add(self, case: MoveCase, way: str, values: dict[str, float]) -> None:
        """Keep a round."""
        figure = Figure(case.name, case.text, "s")
        self.times.setdefault(case.name, Series(figure)).add(way, values["move"] / 1000)
        if "split" in values:
            self.pauses.setdefault(case.name, Series(Figure(case.name, case.text))).add(way, values["split"])
        for what, (text, unit) in WRITES.items():
            if what in values:
                series = self.writes.setdefault(case.name, {})
                figure = Figure(f"{case.name}-{what}", f"{case.text}: {text}", unit)
                series.setdefault(what, Series(figure)).add(way, values[what])
                series[what].add(f"{way}, before", values[f"{what}-before"])


# --- what was promised ------------------------------------------------------------------------------------------


WORDS = {
    (True, False): "at least",
    (True, True): "more than",
    (False, False): "at most",
    (False, True): "less than",
}


@dataclass(frozen=True)
class Target:
    """Something that was promised.

    Attributes:
        text: what.
        values: round by round.
        bound: what its median has to reach.
        least: whether that is the least that it may be, rather than the most.
        unit: of them.
        beyond: whether to reach it is not enough.
    """

    text: str
    values: list[float]
    bound: float
    least: bool
    unit: str = ""
    beyond: bool = False

    @property
    def row(self) -> tuple[str, ...]:
        """Of the table."""
        middle = Series(Figure("", "", ""), {"": self.values}).median("")
        reached = middle is not None and (middle >= self.bound if self.least else middle <= self.bound)
        kept = reached and not (self.beyond and middle == self.bound)
        words = WORDS[self.least, self.beyond]
        bound = f"{words} {self.bound:g}{self.unit}"
        return (self.text, str(len(self.values)), cell(self.values, digits=2), bound, "yes" if kept else "no")


def targets(figures: Figures) -> list[Target]:
    """Those of which something was measured."""
    found = [
        *_quicker(figures, "full-xfs", LIBVIRT, OFFLOAD, 50, "offload with shared blocks: times libvirt's"),
        *_quicker(figures, "full", LIBVIRT, PLAIN, 1.2, "plain copy, full, same file system: times libvirt's"),
        *_quicker(figures, "full-tmpfs", LIBVIRT, PLAIN, 1.2, "plain copy, full, to tmpfs: times libvirt's"),
    ]
    for name in ("full", "full-tmpfs"):
        rounds = figures.times[name].rounds if name in figures.times else {}
        slower = [max(pair) for pair in zip(rounds.get(READ, []), rounds.get(WRITE, []), strict=False)]
        values = _ratios(rounds.get(PLAIN, []), slower)
        found.append(Target(f"plain copy, {name}: its time to the slower of read and write", values, 1.15, least=False))
    for series in figures.times.values():
        values = _ratios(series.rounds.get(MIRROR, []), series.rounds.get(LIBVIRT, []))
        found.append(Target(f"mirror, {series.figure.text}: its time to libvirt's", values, 1.0, least=False))
    for name, series in figures.pauses.items():
        if name.startswith("eight"):
            for way in (MIRROR, OFFLOAD):
                text = f"pause, {way}, {series.figure.text}"
                found.append(Target(text, series.rounds.get(way, []), 80, least=False, unit=" ms"))
    for each, way in itertools.product(figures.writes.values(), (MIRROR, OFFLOAD)):
        for what, least in (("p99", False), ("rate", True)):
            values = _ratios(each[what].rounds.get(way, []), each[what].rounds.get(LIBVIRT, []))
            text = f"{each[what].figure.text}, {way}: to libvirt's"
            # A mirror is to be no worse, an offload better.
            found.append(Target(text, values, 1.0, least=least, beyond=way == OFFLOAD))
    again = [100 * share for share in figures.again]
    found.append(Target("interrupted at 60 %: moved by the second run", again, 45, least=False, unit=" %"))
    return [target for target in found if target.values]


def _quicker(figures: Figures, name: str, slow: str, fast: str, bound: float, text: str) -> list[Target]:  # noqa: PLR0917
    rounds = figures.times[name].rounds if name in figures.times else {}
    return [Target(text, _ratios(rounds.get(slow, []), rounds.get(fast, [])), bound, least=True)]


def _ratios(over: list[float], under: list[float]) -> list[float]:
    return [one / other for one, other in zip(over, under, strict=False)]


# --- tables -----------------------------------------------------------------------------------------------------

Table = list[tuple[str, ...]]


def tables(figures: Figures) -> list[Table]:
    """What was promised; the times; the pauses; the guest's writes."""
    ways = [way for way in WAYS if any(way in series.rounds for series in figures.times.values())]
    moves = [way for way in MOVES if way in ways]
    promised: Table = [("what was promised", "n", "median (min to max)", "target", "kept")]
    promised += [target.row for target in targets(figures)]
    times: Table = [("seconds: median (min to max)", "n", *ways)]
    times += [_row(series, ways) for series in figures.times.values()]
    pauses: Table = [("the guest's pause, ms: median (min to max)", "n", *moves)]
    pauses += [_row(series, moves) for series in figures.pauses.values()]
    writes: Table = [("the guest's writes: median (min to max)", "n", "before", *moves)]
    for series in itertools.chain.from_iterable(each.values() for each in figures.writes.values()):
        before = [value for way in moves for value in series.rounds.get(f"{way}, before", [])]
        text, number, *cells = _row(series, moves)
        writes.append((f"{text}, {series.figure.unit}", number, cell(before, digits=2), *cells))
    return [table for table in (promised, times, pauses, writes) if len(table) > 1]


def _row(series: Series, ways: list[str]) -> tuple[str, ...]:
    counts = sorted({len(series.rounds[way]) for way in ways if way in series.rounds})
    cells = (cell(series.rounds.get(way, []), digits=2) for way in ways)
    return (series.figure.text, " to ".join(map(str, counts)), *cells)


def text(figures: Figures) -> str:
    """The tables for a terminal."""
    return "\n\n".join(grid(table) for table in tables(figures))


def write(figures: Figures, about: dict[str, str]) -> None:
    """Put the tables into docs/performance.md, and draw docs/moves.png and docs/moves-writes.png."""
    notes = "\n".join(f"- {note}" for note in NOTES)
    report.put(BEGIN, [*(markdown(table) for table in tables(figures)), notes, report.measured_on(about)])
    report.draw(list(figures.times.values()), report.DOCS / "moves.png", WAYS, COLOURS, say=True)
    writes = [series for each in figures.writes.values() for what, series in each.items() if what != "worst"]
    if writes:
        report.draw(writes, report.DOCS / "moves-writes.png", MOVES, COLOURS, say=True)
