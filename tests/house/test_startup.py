"""The command starts fast because of what it does not import; benchmarks/startup.py measures it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.hostprocess import StateDir, ensure_running

SLOW_TO_IMPORT = {"msgspec", "rich", "httpx", "http.client", "asyncio", "ssl", "lxml", "starlette", "subprocess"}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDir]:
    """A state directory with a host process, which ends with the test."""
    found = StateDir(tmp_path)
    ensure_running(found).close()
    yield found
    os.kill(int(found.lock.read_text()), 15)


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
