"""The report: what machine it was, docs/performance.md's table, and the plot."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import re
import signal
import subprocess
import textwrap
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import NOTES, OURS, PEER, SIDES, Series, markdown_table

from blockferry.testing import QemuBinaries

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- figures: benchmarks/storage.py --docs -->", "<!-- end of figures -->"
TITLE_WIDTH = 80
COLOURS = {OURS: "#1f6f8b", PEER: "#b8b8b8"}


def run(work: Coroutine[Any, Any, None]) -> None:
    """Do it; ended by a signal (SIGTERM too), its guests, daemons and mounts go first."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    asyncio.run(work)


def some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """What reads names with commas between them from the command line, and refuses others than these."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}: there are {', '.join(known)}")
        return names

    return read


def machine(folder: Path, binaries: QemuBinaries, versions: dict[str, str]) -> dict[str, str]:
    """What it was run on, without the names of machines and places.

    Args:
        folder: where the images are.
        binaries: which QEMU.
        versions: of the sides.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    processor = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", processor, re.MULTILINE)
    virtual = ", a virtual machine" if "hypervisor" in processor else ""
    qemu = subprocess.run([str(binaries.system), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\S+)", qemu)
    return {
        "processor": f"{os.cpu_count()} cores of {model[1] if model else 'an unknown model'}{virtual}",
        "memory": f"{memory:.0f} GiB",
        "file system": f"{_file_system(folder)}, and tmpfs where it is said",
        "kernel": f"Linux {platform.release().split('-')[0]}",
        "QEMU": f"{found[1] if found else qemu}, TCG",
        "Python": platform.python_version(),
        **versions,
    }


def _file_system(folder: Path) -> str:
    """The kind of the file system that holds a folder: the longest mount point above it (proc_pid_mountinfo(5))."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4]
        if len(point) >= len(best) and folder.resolve().is_relative_to(point):
            best, kind = point, after.split()[0]
    return kind


def load(begun: tuple[float, float, float], ended: tuple[float, float, float]) -> str:
    """Load averages, of one minute, before and after."""
    return f"{begun[0]:.2f} when it began, {ended[0]:.2f} when it ended (one minute's average)"


def write(every: list[Series], about: dict[str, str]) -> None:
    """Put table and machine into docs/performance.md, and draw docs/performance.png."""
    notes = "\n".join(f"- {note}" for note in NOTES)
    put(BEGIN, [markdown_table(every), notes, measured_on(about)])
    draw(every, DOCS / "performance.png", SIDES, COLOURS)


def measured_on(about: dict[str, str]) -> str:
    """The table of the machine."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in about.items())
    return f"| measured on | |\n| --- | --- |\n{rows}"


def put(begin: str, parts: list[str]) -> None:
    """Put these parts between a mark of docs/performance.md and the next end of figures.

    Raises:
        ValueError: the page has no such mark.
    """
    page = DOCS / "performance.md"
    text = page.read_text()
    at = text.index(begin)
    page.write_text("\n\n".join([text[:at] + begin, *parts, text[text.index(END, at) :]]))


def draw(
    every: list[Series], path: Path, sides: Sequence[str], colours: Mapping[str, str], *, say: bool = False
) -> None:
    """Every round as a point, every median as a bar; a panel a figure, since their units differ.

    Args:
        every: the figures.
        path: of the PNG.
        sides: in the order in which they are shown.
        colours: of their bars.
        say: whether medians are written beside their bars, where they are too far apart for the eye.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = 2
    lines = (len(every) + columns - 1) // columns
    high = 0.5 + 0.25 * max(sum(side in series.rounds for side in sides) for series in every)
    drawing, axes = plt.subplots(lines, columns, figsize=(10, max(1.5, high) * lines), squeeze=False)
    for panel in axes.flat[len(every) :]:
        panel.set_visible(False)
    for panel, series in zip(axes.flat, every, strict=False):
        shown = [side for side in sides if side in series.rounds]
        for place, side in enumerate(reversed(shown)):
            values = series.rounds[side]
            panel.barh(place, series.median(side), color=colours[side], height=0.6)
            panel.plot(values, [place] * len(values), "o", color="black", markersize=3, alpha=0.6)
            if say:
                panel.annotate(f" {series.median(side):.2f}", (max(values), place), va="center", fontsize=7)
        panel.set_yticks(range(len(shown)), reversed(shown), fontsize=8)
        title = f"{series.figure.text}, {series.figure.unit} {series.figure.peer_text}"
        panel.set_title(textwrap.fill(title, TITLE_WIDTH), fontsize=8, loc="left")
        panel.set_xlim(left=0)
        panel.tick_params(axis="x", labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    drawing.tight_layout()
    drawing.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(drawing)
