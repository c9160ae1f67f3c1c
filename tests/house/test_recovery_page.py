"""docs/recovery.md is what is made from the table that decides."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_from_the_table() -> None:
    check = [sys.executable, ROOT / "scripts/recovery-page.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
