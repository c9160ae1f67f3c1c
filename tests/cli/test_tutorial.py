"""The tutorial is typed as it stands, on a real guest; of the how-to pages every command parses, and every link leads on."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner
from commandkit import stop

from blockferry.interfaces.cli import wire
from blockferry.interfaces.cli.main import cli
from blockferry.interfaces.cli.session import Session
from blockferry.testing import build_guest, find_qemu

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs/tutorial.md"
HOW_TO = sorted((ROOT / "docs/how-to").glob("*.md"))
PLACE = "/srv/tutorial"
COMMAND_SECONDS = 120  # the guest boots in some seconds, on a loaded machine in ten times that
# What is another each time: which process, how long, how much, how far.
MASKS = (
    (r"pid \d+", "pid P"),
    (r"QEMU \d+\.\d+\.\d+", "QEMU V"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE"),
    (r"\d+\.\d+ (ms|s)\b", "TIME"),
    (r"[\d.]+ (B|KiB|MiB)\b", "SIZE"),
    (r"ACK (vd[ab]) \d+", r"ACK \1 N"),
    (r"\b(copying|catching up)(\s+\d+ %)?", "ready"),
    (r"\d+ %", "DONE"),
    (r"\s+", " "),
)


@dataclass
class Typed:
    """A command of a page, and what it prints there; `...` stands for any lines."""

    line: str
    prints: list[str] = field(default_factory=list)


def typed(page: Path) -> Iterator[Typed]:
    """The lines that begin with `$` in the indented blocks of a page, in their order."""
    found: Typed | None = None
    end: str | None = None
    for line in page.read_text().splitlines():
        text = line.removeprefix("    ")
        if end is not None and found is not None:
            found.line += f"\n{text}"
            end = None if text == end else end
        elif line.startswith("    $ "):
            if found is not None:
                yield found
            found = Typed(text.removeprefix("$ "))
            heredoc = re.search(r"<<(\w+)$", text)
            end = heredoc[1] if heredoc else None
        elif found is not None and (line.startswith("    ") or not line):
            found.prints.append(text)
        elif found is not None:
            yield found
            found = None
    if found is not None:
        yield found


def masked(text: str) -> list[str]:
    lines = []
    for line in text.splitlines():
        for pattern, word in MASKS:
            line = re.sub(pattern, word, line)  # noqa: PLW2901
        lines.append(line.strip())
    return [line for line in lines if line]


def agrees(expected: list[str], found: list[str]) -> bool:
    """Whether what was printed is what the page has, `...` standing for any lines."""
    if not expected:
        return not found
    if expected[0] == "...":
        return any(agrees(expected[1:], found[count:]) for count in range(len(found) + 1))
    return bool(found) and expected[0] == found[0] and agrees(expected[1:], found[1:])


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where /srv/tutorial is here; a guest that a failed test left behind is ended."""
    yield tmp_path
    if (tmp_path / "state").exists():
        blockferry = [sys.executable, "-m", "blockferry.interfaces.cli.main", "--state-dir", str(tmp_path / "state")]
        subprocess.run([*blockferry, "stop", "tutorial", "--force"], capture_output=True, check=False, timeout=60)
        stop(tmp_path / "state")


def test_the_tutorial(place: Path) -> None:
    # Both are of the tutorial's first line, `make setup`; what is missing is said with what installs it.
    qemu = find_qemu("distribution")
    build_guest()
    state = re.search(r"export BLOCKFERRY_STATE_DIR=(\S+)", TUTORIAL.read_text())
    assert state is not None
    folders = (str(Path(sys.executable).parent), str(qemu.system.parent), os.environ["PATH"])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("BLOCKFERRY_QEMU_DIR")},
        "PATH": os.pathsep.join(folders),
        "BLOCKFERRY_STATE_DIR": state[1].replace(PLACE, str(place)),
    }
    commands = list(typed(TUTORIAL))
    assert len(commands) > 20
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command.line.replace(PLACE, str(place))],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS,
        )
        printed = done.stdout.replace(str(place), PLACE)
        assert done.returncode == 0, f"{command.line}\n{printed}{done.stderr}"
        expected, found = masked("\n".join(command.prints)), masked(printed)
        assert agrees(expected, found), f"{command.line}\nprinted\n{printed}\nand the page has\n" + "\n".join(expected)


class Asked(Exception):
    """Raised in place of asking the host process."""


@pytest.mark.parametrize("page", [TUTORIAL, *HOW_TO], ids=lambda page: page.stem)
def test_every_command_parses(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ask(*_arguments: object) -> None:
        raise Asked

    (tmp_path / "vm1.xml").write_text("<domain/>")
    monkeypatch.chdir(tmp_path)
    for function in (wire, "submit"), (wire, "events"):
        monkeypatch.setattr(*function, ask)
    parsed = 0
    for command in typed(page):
        for line in command.line.splitlines()[0].split("|"):
            words = shlex.split(line)
            if words[:1] != ["blockferry"]:
                continue
            words = ["vm1.xml" if word == f"{PLACE}/guest.xml" else word for word in words[1:]]
            result = CliRunner().invoke(cli, words, obj=Session(), input="<domain/>")
            assert isinstance(result.exception, Asked), f"{line}\n{result.output}"
            parsed += 1
    assert parsed or page.stem == "README"


@pytest.mark.parametrize("page", [TUTORIAL, *HOW_TO], ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_how_to_is_listed() -> None:
    listed = re.findall(r"\]\(([^)/]+\.md)\)", (ROOT / "docs/how-to/README.md").read_text())
    assert sorted(listed) == [page.name for page in HOW_TO if page.stem != "README"]


@pytest.mark.parametrize(
    ("page", "printed", "agree"),
    [
        ("a\n...\nb", "a\nb", True),
        ("a\n...\nb", "a\nx\ny\nb", True),
        ("a\n...\nb", "a\nx", False),
        ("a", "a\nb", False),
        ("took 1.2 ms, pid 3", "took 99.9 ms, pid 77", True),
        ("took 1.2 ms", "took it", False),
    ],
)
def test_what_agrees(page: str, printed: str, agree: bool) -> None:
    assert agrees(masked(page), masked(printed)) is agree
