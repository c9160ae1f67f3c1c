"""The command starts fast: what it costs, and what it must not import on its way."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockferry.hostprocess import StateDir, ensure_running

HELP_CPU_SECONDS = 0.150
LIST_WALL_SECONDS = 0.100
BLOCKFERRY = Path(sys.executable).parent / "blockferry"
SLOW_TO_IMPORT = {"msgspec", "rich", "httpx", "http.client", "asyncio", "ssl", "lxml", "starlette", "subprocess"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As an installed command: compiled once."""
    rest = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**rest, "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("compiled"))}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDir]:
    """A state directory with a host process, which ends with the test."""
    found = StateDir(tmp_path)
    ensure_running(found).close()
    yield found
    os.kill(int(found.lock.read_text()), 15)


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def best(clock: Callable[[], float], environment: dict[str, str], *arguments: str) -> float:
    """The best of ten: a loaded machine makes the others slower, nothing makes one faster."""
    taken = []
    for _ in range(10):
        before = clock()
        subprocess.run([BLOCKFERRY, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
        taken.append(clock() - before)
    return min(taken)


def test_help(environment: dict[str, str]) -> None:
    assert best(cpu, environment, "--help") < HELP_CPU_SECONDS


def test_list(environment: dict[str, str], state: StateDir) -> None:
    assert best(time.perf_counter, environment, "--state-dir", str(state), "list") < LIST_WALL_SECONDS


@pytest.mark.parametrize("verb", ["--help", "list"])
def test_nothing_slow_is_imported(state: StateDir, verb: str) -> None:
    script = "import sys, atexit; sys.argv = sys.argv[:1] + sys.argv[2:]\n"
    script += "atexit.register(lambda: print('\\nLOADED', *sys.modules))\n"
    script += "from blockferry.interfaces.cli.main import main; main()"
    said = subprocess.run(
        [sys.executable, "-c", script, "-", "--state-dir", str(state), verb], capture_output=True, text=True, check=True
    ).stdout
    loaded = set(said.split("LOADED")[1].split())
    assert not loaded & SLOW_TO_IMPORT
