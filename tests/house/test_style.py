"""Rules of the house that no linter has; what to do instead is beside each."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "blockferry"
MODULES = sorted(SOURCE.rglob("*.py"))
MODULE_LINES = 600  # over that: two subjects, so two modules
FUNCTION_LINES = 70  # over that: give a part of it a name
# The tops of processes: there everything is caught, told to who started it, and ends the process.
MAY_CATCH_ALL = {"interfaces/daemon.py", "qemu/bounded.py", "testing/crash.py"}
# Modules that may sleep, and why.
MAY_SLEEP = {
    "engine/executor.py": "an image's lock may be held a moment longer by a process that ends, and nobody says when",
    "engine/keeper.py": "nobody says when a guest's agent that did not thaw its file systems would answer again",
    "hostprocess.py": "flock(2) waits without a bound, or not at all",
    "engine/filling.py": "a server is asked to flush a moment after it has, and nobody says how much it has got since",
    "engine/progress.py": "samples a job's progress once a second",
    "interfaces/api/events.py": "sleep(0): one turn of the loop",
    "interfaces/daemon.py": "looks once a second whether it is idle",
    "service/mover.py": "says once a second how far a copy is, and looks how long a pause would be",
    "qemu/session.py": "sleep(0): one turn of the loop, whatever one QEMU says",
    "testing/demo.py": "lets a guest write for a while, to be watched",
    "testing/nbd.py": "qemu-nbd does not say when it listens",
    "testing/stall.py": "the guest's kernel writes to a file, and nobody says when",
    "testing/proxy.py": "a reply that is late is what it is there for",
}

# What asks a file system, which may hang: in these rooms it is asked apart (qemu/paths.py), or all domains wait with one.
ASKS_FILES = {
    *("os.stat", "os.lstat", "os.statvfs", "os.access", "os.path.exists", "os.path.lexists"),
    *("os.path.realpath", "os.path.isfile", "os.path.isdir", "os.path.getsize", "os.path.samefile"),
}
SERVE_ALL = ("service/", "engine/")
MAY_ASK_FILES = {"service/doctor.py": "our own state directory, where the journal is as well, and /dev/kvm"}


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MODULE_LINES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_are_short(path: Path) -> None:
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    }
    assert not long


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_exceptions_are_caught_by_name(path: Path) -> None:
    """Catch what the call raises; let the rest reach the top of the host process.

    `except BaseException` is for tidying up, and ends with `raise`.
    """
    for node in nodes(path):
        if not isinstance(node, ast.ExceptHandler):
            continue
        assert node.type is not None, f"a bare except in line {node.lineno}"
        caught = ast.unparse(node.type)
        if name_of(path) in MAY_CATCH_ALL:
            continue
        assert caught != "Exception", f"line {node.lineno}"
        if caught == "BaseException":
            assert isinstance(node.body[-1], ast.Raise), f"line {node.lineno}"
            assert node.body[-1].exc is None, f"line {node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nobody_sleeps(path: Path) -> None:
    """Wait for what is to happen: an event, a queue, a lock, a pipe that closes."""
    sleeps = [
        node.lineno
        for node in nodes(path)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"asyncio.sleep", "time.sleep", "sleep"}
    ]
    assert not sleeps or name_of(path) in MAY_SLEEP


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_bound_is_a_timeout(path: Path) -> None:
    """`async with asyncio.timeout(seconds)`: in Python 3.11 wait_for swallows a cancel that comes with the result."""
    names = [ast.unparse(node) for node in nodes(path) if isinstance(node, ast.Attribute)]
    assert "asyncio.wait_for" not in names


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path).startswith(SERVE_ALL)], ids=name_of)
def test_a_file_system_that_hangs_holds_up_nobody_else(path: Path) -> None:
    asks = [node.lineno for node in nodes(path) if isinstance(node, ast.Call) and ast.unparse(node.func) in ASKS_FILES]
    assert not asks or name_of(path) in MAY_ASK_FILES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_level_state(path: Path) -> None:
    """Hand it down: a module has constants, functions and classes."""
    for node in nodes(path):
        assert not isinstance(node, ast.Global), f"line {node.lineno}"
