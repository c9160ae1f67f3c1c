"""What the command costs before it does anything: run with the project's Python, prints a table.

    .venv/bin/python benchmarks/startup.py

The peer in the same run is the interpreter alone, `python -c pass`: what no command written in Python can go below.
Targets: `--help` under 150 ms of CPU, `list` with the host process up under 100 ms.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from blockferry.hostprocess import StateDir, ensure_running

ROUNDS = 15
END_SECONDS = 10.0


def measure(arguments: list[str], environment: dict[str, str]) -> tuple[list[float], list[float]]:
    """Wall and CPU milliseconds of each round."""
    wall, cpu = [], []
    for _ in range(ROUNDS):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        subprocess.run(arguments, env=environment, check=True, stdout=subprocess.DEVNULL)
        wall.append((time.perf_counter() - began) * 1000)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append((now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime) * 1000)
    return wall, cpu


def end(process: int) -> None:
    """End the host process, and wait: it still has files in the folder."""
    descriptor = os.pidfd_open(process)
    signal.pidfd_send_signal(descriptor, signal.SIGTERM)
    select.select([descriptor], [], [], END_SECONDS)
    os.close(descriptor)


def main() -> None:
    """Measure, and print minimum, median and maximum."""
    command = str(Path(sys.executable).parent / "blockferry")
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = f"{folder}/compiled"
        state = StateDir(f"{folder}/state")
        ensure_running(state).close()
        cases = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "blockferry --help": [command, "--help"],
            "blockferry list": [command, "--state-dir", str(state), "list"],
        }
        print(f"{'command':20} {'wall ms: min':>14} {'median':>8} {'max':>8} {'CPU ms: median':>16}")
        try:
            for name, arguments in cases.items():
                measure(arguments, environment)  # compiles
                wall, cpu = measure(arguments, environment)
                middle = statistics.median(wall)
                print(f"{name:20} {min(wall):14.0f} {middle:8.0f} {max(wall):8.0f} {statistics.median(cpu):16.0f}")
        finally:
            end(int(state.lock.read_text()))


if __name__ == "__main__":
    main()
