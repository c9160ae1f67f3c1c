"""`make power`: the power fails at every flush of every operation, on both QEMUs at once; or of those that are named.

python tests/power/run.py --seed 7
python tests/power/run.py --qemu qemu10 delete commit-middle
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))
from cuts import Tally, open_theatre, play
from operations import OPERATIONS
from worlds import playground

from blockferry.testing import QemuVersion

VERSIONS: tuple[QemuVersion, ...] = get_args(QemuVersion)
# Not those whose QEMU is gone before they begin, nor those after which nothing of before is to be there.
NAMES = tuple(name for name, each in OPERATIONS.items() if not (each.crashed or each.forgets))


def every_flush(version: QemuVersion, names: list[str], seed: int) -> tuple[Tally, list[str]]:
    """The power failing at every flush of these operations; what failed, an operation's first."""
    total, failed = Tally(), []
    with contextlib.ExitStack() as stack:
        theatres = {}
        for shares in {OPERATIONS[name].shares for name in names}:
            folder = stack.enter_context(playground(Path(tempfile.gettempdir())))
            theatres[shares] = stack.enter_context(open_theatre(version, folder, shares=shares))
        for name in names:
            tally = Tally()
            try:
                recording = asyncio.run(theatres[OPERATIONS[name].shares].record(name))
                asyncio.run(play(recording, recording.cuts(seed), tally))
            except (AssertionError, OSError, ValueError, RuntimeError) as error:
                traceback.print_exception(error)
                failed.append(f"--qemu {version} --seed {seed} {name}")
            sys.stdout.write(f"{name:18} {version:12} {tally}\n")
            sys.stdout.flush()
            total.add(tally)
    return total, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operations", nargs="*", help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--qemu", choices=VERSIONS, help="one alone, rather than both")
    arguments = parser.parse_args()
    versions = [arguments.qemu] if arguments.qemu else VERSIONS
    sys.stdout.write(f"seed {arguments.seed}\n")
    sys.stdout.flush()
    total, failed = Tally(), []
    with ProcessPoolExecutor(len(versions)) as pool:
        names = arguments.operations or list(NAMES)
        for each in [pool.submit(every_flush, version, names, arguments.seed) for version in versions]:
            tally, some = each.result()
            total.add(tally)
            failed += some
    if failed:
        sys.stdout.write("".join(f"failed: python tests/power/run.py {each}\n" for each in failed))
        sys.exit(f"{total.cuts:,} cuts, {len(failed)} operations failed")
    sys.stdout.write(f"{total}\n")


if __name__ == "__main__":
    main()
