"""Fuzz all targets, two at a time, with atheris (libFuzzer); the last line says how many inputs, and how many crashes.

    fuzz/run.py [--inputs N] [--seed N] [TARGET...]      all of them, 1,050,000 inputs: about a minute of processor time each
                                                         (21 minutes in all on two cores with a load of 20)
    fuzz/run.py --one TARGET LIBFUZZER-OPTION...         one, in this process

A crash is an exception that is no refusal. Its input is kept in .cache/fuzz/TARGET; `--one TARGET FILE` shows it again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "fuzz"
NAMES = ("domain", "disk", "snapshot", "qcow2", "qmp", "api", "words")
# What reads; all else would only take time.
INSTRUMENTED = ["blockferry.formats", "blockferry.plan.machine", "blockferry.plan.plugs", "blockferry.plan.copy"]
INSTRUMENTED += [f"blockferry.qemu.{name}" for name in ("header", "replies", "observe")]
INPUTS = 1_050_000
LENGTH_MAX = 4096
MEMORY_MIB = 1024
ONE_SECONDS = 10


def one(name: str, options: list[str]) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from targets import TARGETS

    atheris.Setup([name, *options], TARGETS[name][0])
    atheris.Fuzz()


def prepared(name: str) -> tuple[Path, Path]:
    """The seeds and the words of a target, as files."""
    from targets import TARGETS

    _target, seeds, words = TARGETS[name]
    corpus = CACHE / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    dictionary = CACHE / name / "words"
    dictionary.write_text("".join(f'"{word}"\n' for word in words.split()))
    return corpus, dictionary


def fuzz(name: str, inputs: int, seed: int) -> tuple[int, int]:
    """How many inputs a target had, and how many crashes that made: its process ends with the first."""
    corpus, dictionary = prepared(name)
    began = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, __file__, "--one", name),
            *(f"-runs={inputs}", f"-seed={seed}", f"-max_len={LENGTH_MAX}", f"-dict={dictionary}"),
            *(f"-rss_limit_mb={MEMORY_MIB}", f"-timeout={ONE_SECONDS}", "-print_final_stats=1", "-verbosity=1"),
            *(f"-artifact_prefix={CACHE / name}/", str(corpus)),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        cwd=HERE,
    )
    said = (done.stdout + done.stderr).decode(errors="replace")
    ran = re.findall(r"number_of_executed_units: *(\d+)", said)
    count = int(ran[-1]) if ran else 0
    print(f"{name}: {count} inputs in {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode:
        print("\n".join(said.splitlines()[-40:]), flush=True)
    return count, int(done.returncode != 0)


def main() -> int:
    """Fuzz as the arguments say; the exit status."""
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=INPUTS, help="of all targets together")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same inputs, but for the corpus")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(NAMES))
    options = parser.parse_args()
    names = options.targets or NAMES
    each = -(-options.inputs // len(names))
    with ThreadPoolExecutor(max_workers=2) as workers:
        ended = list(workers.map(lambda name: fuzz(name, each, options.seed), names))
    inputs, crashes = (sum(figures) for figures in zip(*ended, strict=True))
    print(f"{inputs} inputs of {len(names)} targets, {crashes} crashes")
    return int(crashes > 0 or inputs < options.inputs)


if __name__ == "__main__":
    sys.exit(main())
