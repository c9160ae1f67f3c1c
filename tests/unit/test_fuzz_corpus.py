"""What `make fuzz` begins with, given to each target once: the targets work, and what they once found stays mended."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "fuzz"))
from targets import TARGETS  # found by the line before

SEEDS = [(name, number) for name, (_target, seeds, _words) in TARGETS.items() for number in range(len(seeds))]
ANYTHING = [b"", b"\0", b"\xff" * 100, b"9" * 5000, b"[" * 4000, b"<" * 4000, b"\xed\xa0\x80", b'{"return": 1e999}']


@pytest.mark.parametrize(("name", "number"), SEEDS)
def test_a_seed(name: str, number: int) -> None:
    target, seeds, _words = TARGETS[name]
    target(seeds[number])
    # Cut off anywhere, it is no other than it was.
    for end in range(0, len(seeds[number]), 7):
        target(seeds[number][:end])


@pytest.mark.parametrize("name", TARGETS)
def test_anything(name: str) -> None:
    for data in ANYTHING:
        TARGETS[name][0](data)
