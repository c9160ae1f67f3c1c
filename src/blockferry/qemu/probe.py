"""Asking a program what it is: a QEMU without a machine, for a moment, and qemu-img."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from typing import Any

from blockferry.plan.installed import Program

# It answers in a tenth of a second; a loaded machine gets a hundred times that.
SECONDS = 20.0
KILL_SECONDS = 5.0
ASKED = b'{"execute": "qmp_capabilities"}\n{"execute": "query-commands"}\n{"execute": "quit"}\n'


def find_qemus(arch: str) -> tuple[str, ...]:
    """The QEMUs of that architecture in BLOCKFERRY_QEMU_DIR and on PATH, each once, the one that is taken first."""
    folders = [os.environ.get("BLOCKFERRY_QEMU_DIR"), *os.environ.get("PATH", os.defpath).split(os.pathsep)]
    paths = [shutil.which(f"qemu-system-{arch}", path=folder) for folder in folders if folder]
    real = {os.path.realpath(path): path for path in reversed(paths) if path is not None}
    return tuple(dict.fromkeys(real[os.path.realpath(path)] for path in paths if path is not None))


async def ask_qemu(path: str) -> Program:
    """Start it with no machine, no devices and no disks, ask what it can do, and end it."""
    bare = ("-M", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio")
    problem, out = await _run(path, bare, ASKED)
    if problem is not None:
        return Program(path=path, problem=problem)
    said = [_decoded(line) for line in out.splitlines()]
    version: dict[str, Any] = next((each["QMP"]["version"]["qemu"] for each in said if "QMP" in each), {})
    commands = next((each["return"] for each in said if isinstance(each.get("return"), list)), None)
    if not version or commands is None:
        return Program(path=path, problem="it does not answer as a QEMU does")
    words = ".".join(str(version[part]) for part in ("major", "minor", "micro"))
    return Program(path=path, version=words, commands=frozenset(each["name"] for each in commands))


async def ask_option(path: str, option: str, parameter: str) -> bool:
    """Whether a QEMU has that command-line option with that parameter; False as well where it can't be asked."""
    bare = ("-M", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio")
    question = {"execute": "query-command-line-options", "arguments": {"option": option}, "id": 0}
    told = b'{"execute": "qmp_capabilities"}\n' + json.dumps(question).encode() + b'\n{"execute": "quit"}\n'
    _problem, out = await _run(path, bare, told)
    answers = [
        said["return"] for line in out.splitlines() if (said := _decoded(line)).get("id") == 0 and "return" in said
    ]
    return any(each["name"] == parameter for found in answers for option in found for each in option["parameters"])


async def ask_qemu_img(path: str) -> Program:
    """Find it, and ask for its version."""
    found = shutil.which(path) or path
    problem, out = await _run(found, ("--version",), b"")
    return Program(path=found, version=out.split("\n")[0].removeprefix("qemu-img version "), problem=problem)


async def _run(path: str, words: tuple[str, ...], told: bytes) -> tuple[str | None, str]:
    """What went wrong, if anything did, and what it printed."""
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(path, *words, stdin=pipe, stdout=pipe, stderr=pipe)
    except OSError as error:
        return error.strerror or str(error), ""
    try:
        async with asyncio.timeout(SECONDS):
            out, last = await process.communicate(told)
    except TimeoutError:
        return f"no answer within {SECONDS:g} s", ""
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            with contextlib.suppress(TimeoutError):  # it waits for storage that hangs
                async with asyncio.timeout(KILL_SECONDS):
                    await process.wait()
    if process.returncode:
        lines = last.decode(errors="replace").strip().splitlines()
        return (lines[-1] if lines else f"it ended with status {process.returncode}"), ""
    return None, out.decode(errors="replace")


def _decoded(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
