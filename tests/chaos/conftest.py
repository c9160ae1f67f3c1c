"""The last line of a run with cases of the matrix."""

import pytest
from matrix import Tally


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Add up what each test played; nothing was lost or left over, or a test would have failed."""
    total = Tally()
    for report in terminalreporter.getreports("passed"):
        for name, value in getattr(report, "user_properties", ()):
            if name == "chaos":
                total.cases, total.kills, total.faults = (
                    total.cases + value[0],
                    total.kills + value[1],
                    total.faults + value[2],
                )
    if total.cases and not terminalreporter.getreports("failed"):
        terminalreporter.write_line(str(total))
