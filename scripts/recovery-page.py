#!/usr/bin/env python3
"""Writes the table of docs/recovery.md from plan/recover.py; `--check` says whether it is as it would be written."""

import sys
from pathlib import Path

from blockferry.plan.recover import ACTIONS, ROWS

PAGE = Path(__file__).parents[1] / "docs/recovery.md"
BEGIN, END = "<!-- made by scripts/recovery-page.py -->\n", "<!-- end of what is made -->\n"


def table() -> str:
    """One line a row."""
    lines = ["| row | what was found, and why that is done | action |", "|-----|-----|-----|"]
    lines += [f"| {letter} | {row.why} | {row.action} |" for letter, row in ROWS.items()]
    lines += ["", "| action | what is done, and how the operation ends |", "|-----|-----|"]
    lines += [f"| {action} | {words} |" for action, words in ACTIONS.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page, or look at it."""
    old = PAGE.read_text()
    before, begin, rest = old.partition(BEGIN)
    _made, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{PAGE} has not the lines between which the table stands")
    new = f"{before}{begin}\n{table()}\n{end}{after}"
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(new)
    elif new != old:
        sys.exit(f"{PAGE} is not what {Path(__file__).name} makes")


if __name__ == "__main__":
    main()
