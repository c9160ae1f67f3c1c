"""What tests/power and tests/chaos share, an operation's setting and the verdict, lies in tests/chaos."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))
