"""The journal's tables: what is asked of them all the time, journals of before, and how much of history is read for it."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from blockferry.journal.journal import Journal
from blockferry.journal.log import LOG_BYTES
from blockferry.journal.records import StepRecord
from blockferry.journal.schema import MIGRATIONS
from blockferry.model.move import Move
from blockferry.model.operation import OPEN
from blockferry.model.view import Event
from blockferry.plan.files import ClaimFile
from blockferry.plan.plan import Plan, Record

DOMAIN = "vm"
# So many of SQLite's instructions pass between two calls of its progress handler.
INSTRUCTIONS = 10


def a_plan(what: str, *paths: str) -> Plan:
    return Plan(what=what, text=what, prepare=tuple(ClaimFile(path=path) for path in paths), record=Record())


def live(journal: Journal, count: int) -> None:
    """Operations as a domain has them: for each a move that is over, a finish, events, and a file that was made."""
    for _each in range(count):
        number = journal.reserve_operation()
        journal.begin(number, DOMAIN, a_plan("move", f"/dst/{number}"))
        step = StepRecord.begin(0, "prepare", "claim").end("done", {"device": 1, "inode": number})
        journal.step(number, step, state="preparing")
        said = Event(seq=0, time=0.0, type="mirror-ready", domain=DOMAIN, data={"job": f"bf-{number}"})
        journal.record(number, DOMAIN, Record(move=Move(domain=DOMAIN, operation=number, disks=())), events=(said,))
        journal.finish(number, "in-progress")
        journal.put_move(Move(domain=DOMAIN, operation=number, disks=(), state="done"))
        number = journal.reserve_operation()
        journal.begin(number, DOMAIN, a_plan("snapshot"))
        journal.finish(number, "done")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "journal.db")
    yield opened
    opened.close()


def test_a_move_that_is_over_ends_its_operation(journal: Journal) -> None:
    live(journal, 1)
    for state, end in (("done", "done"), ("cancelled", "undone")):
        number = journal.reserve_operation()
        move = Move(domain=DOMAIN, operation=number, disks=())
        journal.begin(number, DOMAIN, a_plan("move"))
        journal.record(number, DOMAIN, Record(move=move), lasting=True)
        other = msgspec.structs.replace(move, domain="other", operation=number + 1000)
        journal.put_move(other)
        assert journal.moves_under_way(DOMAIN) == (move,)
        assert journal.moves_under_way("other")[-1] == other
        assert journal.working(DOMAIN) == {number}
        assert [each.state for each in journal.operations(DOMAIN, since=number)] == ["in-progress"]
        journal.put_move(msgspec.structs.replace(move, state=state))
        assert not journal.moves_under_way(DOMAIN)
        assert [each.state for each in journal.operations(DOMAIN, since=number)] == [end]


def test_what_was_said(journal: Journal) -> None:
    live(journal, 3)
    assert journal.was_said(DOMAIN, "mirror-ready", "bf-1")
    assert not journal.was_said(DOMAIN, "mirror-ready", "bf-2")
    assert not journal.was_said("other", "mirror-ready", "bf-1")
    assert [event.data["job"] for event in journal.newest_first("mirror-ready")] == ["bf-5", "bf-3", "bf-1"]
    assert not list(journal.newest_first("mirror-dropped"))
    newest = journal.newest_event(DOMAIN, frozenset({"mirror-ready", "mirror-dropped"}))
    assert newest is not None
    assert (newest.seq, newest.data["job"]) == (3, "bf-5")


def test_files_that_were_made_from_an_operation_on(journal: Journal) -> None:
    live(journal, 3)
    assert [path for path, *_made in journal.claims(DOMAIN)] == ["/dst/1", "/dst/3", "/dst/5"]
    assert journal.claims(DOMAIN, 4) == (("/dst/5", 5, 1, 5),)
    assert [each.id for each in journal.operations_of(DOMAIN, "snapshot")] == [2, 4, 6]


def test_a_journal_of_before(tmp_path: Path) -> None:
    """Of every version that there was: what is in it stays, and is found."""
    whole = Journal(tmp_path / "whole.db")
    live(whole, 2)
    events = whole.events(None, 0)
    whole.close()
    for version in range(4, len(MIGRATIONS)):
        path = tmp_path / f"{version}.db"
        with sqlite3.connect(tmp_path / "whole.db") as source, sqlite3.connect(path, isolation_level=None) as old:
            for statements in MIGRATIONS[:version]:
                for statement in statements:
                    old.execute(statement)
            old.execute(f"PRAGMA user_version = {version}")
            for table in ("meta", "operation", "step", "event", "move"):
                for row in source.execute(f"SELECT * FROM {table}"):  # noqa: S608 - names of ours
                    old.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608 - as above
        opened = Journal(path)
        assert opened.version == len(MIGRATIONS)
        assert opened.events(None, 0) == events
        assert opened.was_said(DOMAIN, "mirror-ready", "bf-3")
        assert not opened.moves_under_way(DOMAIN)
        live(opened, 1)
        assert [path for path, *_made in opened.claims(DOMAIN, 4)] == ["/dst/5"]
        opened.close()


def test_the_log_is_written_within_its_length(tmp_path: Path, journal: Journal) -> None:
    """Which makes each of its writes durable in a third of the time."""
    files = [tmp_path / "journal.db", tmp_path / "journal.db-wal"]
    database, length = (path.stat().st_size for path in files)
    assert LOG_BYTES <= length < 2 * LOG_BYTES
    assert database < LOG_BYTES / 2, "what fills the log is in no table"
    live(journal, 40)
    assert files[1].stat().st_size == length
    assert len(journal.events(None, 0)) == 40


def test_a_log_that_can_not_be_made_longer(tmp_path: Path) -> None:
    _soft, hard = was = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LOG_BYTES // 2, hard))
    try:
        opened = Journal(tmp_path / "journal.db")
        live(opened, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert (tmp_path / "journal.db-wal").stat().st_size < LOG_BYTES
    assert len(opened.events(None, 0)) == 1
    opened.close()


ASKED: dict[str, Callable[[Journal, int], object]] = {
    "moves under way": lambda journal, _newest: journal.moves_under_way(DOMAIN),
    "what works": lambda journal, _newest: journal.working(DOMAIN),
    "open operations": lambda journal, _newest: journal.operations(DOMAIN, states=OPEN),
    "of a kind": lambda journal, _newest: journal.operations_of(DOMAIN, "finish"),
    "claims of a move": lambda journal, newest: journal.claims(DOMAIN, newest),
    "was it said": lambda journal, newest: journal.was_said(DOMAIN, "mirror-ready", f"bf-{newest}"),
    "newest event": lambda journal, _newest: journal.newest_event(DOMAIN, frozenset({"domain-gone", "mirror-dropped"})),
    "put a move": lambda journal, newest: journal.put_move(Move(domain=DOMAIN, operation=newest, disks=())),
}


@pytest.mark.parametrize("what", ASKED)
def test_history_is_not_read_for_it(journal: Journal, what: str) -> None:
    """As many of SQLite's instructions with much history as with little, whatever its planner thinks of it."""

    def instructions() -> int:
        called = 0

        def count() -> int:
            nonlocal called
            called += 1
            return 0

        newest = journal.next_operation()
        database = journal._db
        database.set_progress_handler(count, INSTRUCTIONS)
        ASKED[what](journal, newest)
        database.set_progress_handler(None, INSTRUCTIONS)
        return called * INSTRUCTIONS

    live(journal, 3)
    few = instructions()
    live(journal, 120)
    assert instructions() <= few + 120
