"""docs/refusals.md is the table that the tests ask, and every refusal is in it or is tested elsewhere."""

from collections.abc import Iterable
from pathlib import Path

from refusal_kit import Row
from refusals import ROWS, SECTIONS, VANISHING

from blockferry import errors

DOCS = Path(__file__).parents[2] / "docs"

# What takes more than one request to come about: what it is, of what, and where it is tried.
ELSEWHERE = {
    "ambiguous-disk": ("an image of several disks' chains", "snapshot, copy, rebase, commit", "qemu/test_domain.py"),
    "domain-busy": ("a domain that another request has", "whatever changes something", "faults/test_hangs.py"),
    "missing-capability": ("a QEMU that lacks a command", "attach, snapshot", "qemu/test_domain.py"),
    "journal-unwritable": ("a state directory on a full disk", "whatever is written down", "qemu/test_refusals.py"),
    "unsettled": ("a domain with an unsettled operation", "whatever changes something", "qemu/test_refusals.py"),
    "job-not-dismissed": ("a stream that somebody has not dismissed", "everything", "qemu/test_refusals.py"),
    "not-resumable": (
        "a copy of which it is not known what its destination lacks",
        "copy --resume",
        "qemu/test_resume.py",
    ),
    "speed-refused": ("a job that is about to end", "speed", "qemu/test_chains.py"),
    "snapshot-has-mirrors": ("a snapshot with mirrors", "snapshot delete", "qemu/test_snapshot_delete.py"),
    "snapshot-not-current": (
        "a mirrored snapshot that is not current",
        "snapshot delete --reopen-mirror",
        "qemu/test_snapshot_delete.py",
    ),
    "snapshot-internal": ("a snapshot inside an image", "snapshot show, revert, delete", "qemu/test_redefine.py"),
    "snapshot-not-mergeable": ("a snapshot that can't be merged", "snapshot delete", "qemu/test_chains.py"),
    "not-defined": ("a guest that was attached", "start, stop, undefine, snapshot revert", "qemu/test_domain.py"),
    "already-running": ("a guest that runs", "start, define, undefine", "qemu/test_lifecycle.py"),
    "not-running": ("a guest that is shut off", "whatever needs its QEMU", "qemu/test_lifecycle.py"),
    "cannot-shut-down": ("a guest that is paused", "stop", "qemu/test_lifecycle.py"),
    "mirror-gone": ("a mirror whose destination is gone", "start --require-mirrors", "qemu/test_mirrors_survive.py"),
    "agent-unreachable": ("a guest without an agent that answers", "snapshot --quiesce", "qemu/test_quiesce.py"),
    "already-frozen": ("a guest that somebody else has frozen", "snapshot --quiesce", "qemu/test_quiesce.py"),
    "state-dir-busy": ("a state directory that is owned already", "serve", "cli/test_hostprocess.py"),
    "state-dir-unusable": ("a state directory that can't be one", "everything", "cli/test_hostprocess.py"),
}
HEAD = ["| what | of | code | exit |", "|---|---|---|---|"]


def table(rows: Iterable[Row]) -> list[str]:
    """The lines of a table: a thing with one error in one line, whatever operations it is refused of."""
    operations: dict[tuple[str, str, int], list[str]] = {}
    for row in rows:
        what, operation, code, status = row.line
        found = operations.setdefault((what, code, status), [])
        if operation not in found:
            found.append(operation)
    lines = [f"| {what} | {', '.join(of)} | `{code}` | {status} |" for (what, code, status), of in operations.items()]
    return [*HEAD, *lines]


def elsewhere() -> list[str]:
    return [
        *HEAD,
        *(
            f"| {what} | {of} | `{code}` | {errors.BY_CODE[code].exit_status} |"
            for code, (what, of, _file) in ELSEWHERE.items()
        ),
    ]


def test_the_docs_have_the_table_of_the_tests() -> None:
    sections = (DOCS / "refusals.md").read_text().split("\n## ")[1:]
    found = {
        section.partition("\n")[0]: [line for line in section.splitlines() if line.startswith("|")]
        for section in sections
    }
    tables = {title: table(rows) for title, rows in SECTIONS.items()}
    assert found == {**tables, "What takes more": elsewhere(), "A guest that vanishes": table(VANISHING)}


def test_the_table_is_linked() -> None:
    assert "(refusals.md)" in (DOCS / "errors.md").read_text()


def test_every_refusal_is_asked_for() -> None:
    refusals = {code for code, cls in errors.BY_CODE.items() if issubclass(cls, errors.Refused)}
    asked = {row.error.code for row in ROWS}
    assert asked | set(ELSEWHERE) == refusals
    assert not asked & set(ELSEWHERE)
    for code, (_what, _of, file) in ELSEWHERE.items():
        name = errors.BY_CODE[code].__name__
        assert name in (DOCS.parent / "tests" / file).read_text(), f"{code} is not tried there"
