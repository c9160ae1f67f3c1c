"""The journal: one writer, every write one durable transaction.

WAL with synchronous=FULL: a committed write has reached the disk (sqlite.org/pragma.html#pragma_synchronous) before the
QMP command that depends on it is sent. Past beliefs only: what is so now is asked of QEMU.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from blockferry import errors
from blockferry.journal import log
from blockferry.journal.records import Defined, DomainRecord, OperationRecord, StepRecord
from blockferry.journal.schema import MIGRATIONS
from blockferry.model.blockjob import WORKING, BlockJob, ChainJob, JobEnd, Mirror
from blockferry.model.move import UNDER_WAY, Move, Region
from blockferry.model.operation import ALL, ENDED, OPEN, OperationState
from blockferry.model.snapshot import Snapshot
from blockferry.model.view import Event
from blockferry.plan.files import ClaimFile, CreateImage
from blockferry.plan.history import in_order
from blockferry.plan.plan import Plan, Record

# Called before and after every durable write with ("before"|"after", what): for tests that die there.
Witness = Callable[[str, str], None]


OPERATION = "SELECT id, domain, plan, state, started, ended, error, row, pause_ms FROM operation"


def _nobody(_when: str, _what: str) -> None:
    pass


class Journal:
    """The tables of one state directory.

    Args:
        path: the database's file; created 0600.
        witness: told of every write.

    Raises:
        StateDirUnusable: it is no journal of ours, or of a newer version.
    """

    def __init__(self, path: Path, witness: Witness = _nobody) -> None:
        self._witness = witness
        self._reserved = 0
        path.touch(mode=0o600)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._migrate()
            log.lengthen(self._db, path.parent)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise errors.StateDirUnusable(state_dir=str(path.parent), reason=f"{path.name}: {error}") from error
        self.tag: str = self._one("SELECT value FROM meta WHERE key = 'tag'")[0]

    def _migrate(self) -> None:
        (version,) = self._one("PRAGMA user_version")
        if version > len(MIGRATIONS):
            raise sqlite3.DatabaseError(f"its version is {version}, and this blockferry knows {len(MIGRATIONS)}")
        for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
            with self._write(f"migration {number}"):
                for statement in statements:
                    self._db.execute(statement)
                if number == 1:
                    # Two state directories on one guest must not give the same node names.
                    self._db.execute("INSERT INTO meta VALUES ('tag', ?)", (secrets.token_hex(2),))
                self._db.execute(f"PRAGMA user_version = {number:d}")

    @property
    def version(self) -> int:
        """How many migrations have made it."""
        return int(self._one("PRAGMA user_version")[0])

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    @contextlib.contextmanager
    def _write(self, what: str) -> Iterator[None]:
        self._witness("before", what)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise errors.JournalUnwritable(reason=str(error)) from error
        self._witness("after", what)

    def _one(self, statement: str, values: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        row: tuple[Any, ...] = self._db.execute(statement, values).fetchone()
        return row

    def _all(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        return self._db.execute(statement, values).fetchall()

    # --- domains ----------------------------------------------------------------------------------------------

    def domains(self) -> tuple[DomainRecord, ...]:
        """All attached domains, by name."""
        rows = self._all("SELECT record FROM domain ORDER BY name")
        return tuple(msgspec.json.decode(row[0], type=DomainRecord) for row in rows)

    def domain(self, name: str) -> DomainRecord | None:
        """The domain of that name."""
        rows = self._all("SELECT record FROM domain WHERE name = ?", (name,))
        return msgspec.json.decode(rows[0][0], type=DomainRecord) if rows else None

    def put_domain(self, record: DomainRecord) -> None:
        """Remember a domain, or what changed of it."""
        if self.domain(record.name) == record:
            return
        with self._write(f"domain {record.name}"):
            self._db.execute("INSERT OR REPLACE INTO domain VALUES (?, ?)", (record.name, msgspec.json.encode(record)))

    def forget_domain(self, name: str) -> None:
        """Forget a domain; its operations, snapshots and events stay."""
        with self._write(f"forget domain {name}"):
            self._db.execute("DELETE FROM domain WHERE name = ?", (name,))

    def definition(self, name: str) -> Defined | None:
        """The definition of a domain that we start; None for another."""
        rows = self._all("SELECT record FROM definition WHERE domain = ?", (name,))
        return msgspec.json.decode(rows[0][0], type=Defined) if rows else None

    def define(self, record: DomainRecord, definition: Defined) -> None:
        """Remember a domain that we start, or its new definition."""
        with self._write(f"define {record.name}"):
            self._db.execute("INSERT OR REPLACE INTO domain VALUES (?, ?)", (record.name, msgspec.json.encode(record)))
            self._put_definition(record.name, definition)

    def _put_definition(self, name: str, definition: Defined) -> None:
        self._db.execute("INSERT OR REPLACE INTO definition VALUES (?, ?)", (name, msgspec.json.encode(definition)))

    def undefine(self, name: str) -> None:
        """Forget a domain that we start, its snapshots and jobs; its operations and events stay."""
        with self._write(f"undefine {name}"):
            self._db.execute("DELETE FROM domain WHERE name = ?", (name,))
            for table in ("definition", "snapshot", "job"):
                self._db.execute(f"DELETE FROM {table} WHERE domain = ?", (name,))  # noqa: S608 - our own names

    def _put_images(self, domain: str, record: Record) -> None:
        """What a domain that we start is to be started on from now on."""
        definition = self.definition(domain)
        if definition is None or not record.formats:
            return
        images = {target: (record.authoritative[target], found) for target, found in record.formats.items()}
        self._put_definition(domain, msgspec.structs.replace(definition, images=definition.images | images))

    # --- operations -------------------------------------------------------------------------------------------

    def next_operation(self) -> int:
        """The number that the next operation will have."""
        (newest,) = self._one("SELECT COALESCE(MAX(id), 0) FROM operation")
        return max(int(newest), self._reserved) + 1

    def reserve_operation(self) -> int:
        """The next number, for the caller alone: another domain's request may come before it is written."""
        self._reserved = self.next_operation()
        return self._reserved

    def begin(self, operation: int, domain: str, plan: Plan, *intents: StepRecord) -> None:
        """Write a plan down, and with it the intents of its first steps, where it prepares anything."""
        with self._write(f"plan {plan.what}"):
            self._db.execute(
                "INSERT INTO operation (id, domain, plan, state, started) VALUES (?, ?, ?, ?, ?)",
                (operation, domain, msgspec.json.encode(plan), "preparing" if intents else "planned", time.time()),
            )
            for intent in intents:
                self._put_step(operation, intent)

    def note(self, operation: int, *, error: str | None = None, row: str | None = None) -> None:
        """Remember why an operation stands still, or the row of the recovery table that it fell into."""
        with self._write("note"):
            self._db.execute(
                "UPDATE operation SET error = COALESCE(?, error), row = COALESCE(?, row) WHERE id = ?",
                (error, row, operation),
            )

    def step(self, operation: int, *records: StepRecord, state: OperationState | None = None) -> None:
        """Write an outcome, the next intent, or both; and with them, when told, the operation's new state."""
        what = " ".join(f"{record.state} {record.index}" for record in records)
        with self._write(f"step {what}" if records else f"operation {state}"):
            for record in records:
                self._put_step(operation, record)
            if state is not None:
                self._db.execute("UPDATE operation SET state = ? WHERE id = ?", (state, operation))

    def _put_step(self, operation: int, record: StepRecord) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO step VALUES (?, ?, ?, ?)",
            (operation, record.stretch, record.index, msgspec.json.encode(record)),
        )

    def record(
        self,
        operation: int,
        domain: str,
        record: Record,
        *,
        steps: tuple[StepRecord, ...] = (),
        events: tuple[Event, ...] = (),
        lasting: bool | None = None,
        pause_ms: float | None = None,
    ) -> tuple[Event, ...]:
        """Write the point of no return: in one transaction, everything that is true from then on.

        Args:
            operation: its number.
            domain: whose.
            record: what is true.
            steps: outcomes that were not written yet.
            events: what is said of it.
            lasting: the operation ends with it, see `end_of`; None when something is to be settled yet.
            pause_ms: of one that ends with it: how long the guest stood still, in milliseconds.

        Returns:
            The events with their numbers.
        """
        with self._write("record"):
            for name in record.forget:
                self._db.execute("DELETE FROM snapshot WHERE domain = ? AND name = ?", (domain, name))
            for snapshot in (
                *record.changed,
                *([record.snapshot] if record.snapshot is not None and record.metadata else []),
            ):
                self._put_snapshot(snapshot)
            for target, end in record.ended.items():
                self._end_job(domain, target, end, record.reason)
            for job in record.jobs:
                self._put_job(job)
            if record.move is not None:
                self._put_move(record.move)
            self._put_images(domain, record)
            for step in steps:
                self._put_step(operation, step)
            numbered = tuple(self._put_event(event) for event in events)
            state = "recorded" if lasting is None else self.end_of(operation, domain, lasting=lasting)
            self._put_state(operation, state, pause_ms=pause_ms if lasting is not None else None)
            self._close_in_progress(domain)
        return numbered

    def end_of(self, operation: int, domain: str, *, lasting: bool) -> OperationState:
        """How an operation ends that was recorded: in progress as long as its jobs work, or its move, if it is one that lasts."""
        return "in-progress" if lasting and operation in self.working(domain) else "done"

    def _put_state(
        self,
        operation: int,
        state: OperationState,
        *,
        error: str | None = None,
        row: str | None = None,
        pause_ms: float | None = None,
    ) -> None:
        self._db.execute(
            "UPDATE operation SET state = ?, ended = ?, error = COALESCE(?, error), row = COALESCE(?, row),"
            " pause_ms = COALESCE(?, pause_ms) WHERE id = ?",
            (state, time.time() if state in ENDED else None, error, row, pause_ms, operation),
        )

    def finish(
        self,
        operation: int,
        state: OperationState,
        steps: tuple[StepRecord, ...] = (),
        *,
        error: str | None = None,
        row: str | None = None,
        pause_ms: float | None = None,
        events: tuple[Event, ...] = (),
        changed: tuple[Snapshot, ...] = (),
    ) -> tuple[Event, ...]:
        """Write an operation's end, with the outcomes of its last stretch; the events get their numbers."""
        with self._write(f"operation {state}"):
            for snapshot in changed:
                self._put_snapshot(snapshot)
            for step in steps:
                self._put_step(operation, step)
            self._put_state(operation, state, error=error, row=row, pause_ms=pause_ms)
            return tuple(self._put_event(event) for event in events)

    def operations(
        self, domain: str | None = None, *, states: frozenset[OperationState] = ALL, since: int = 0
    ) -> tuple[OperationRecord, ...]:
        """Operations in these states, oldest first, of one domain or of all, from number `since` on."""
        whose = "domain = ?1" if domain is not None else "?1 IS NULL"
        rows = self._all(
            f"{OPERATION} WHERE {whose} AND state IN (SELECT value FROM json_each(?2)) AND id >= ?3 ORDER BY id",  # noqa: S608 - words of ours
            (domain, json.dumps(sorted(states)), since),
        )
        return tuple(_operation(row) for row in rows)

    def operations_of(self, domain: str, what: str) -> tuple[OperationRecord, ...]:
        """A domain's operations of a kind (`Plan.what`), oldest first."""
        rows = self._all(
            f"{OPERATION} WHERE domain = ? AND json_extract(CAST(plan AS TEXT), '$.what') = ? ORDER BY id",
            (domain, what),
        )
        return tuple(_operation(row) for row in rows)

    def operation(self, number: int) -> OperationRecord | None:
        """The operation of that number."""
        rows = self._all(f"{OPERATION} WHERE id = ?", (number,))
        return _operation(rows[0]) if rows else None

    def open_operations(self, domain: str | None = None) -> tuple[OperationRecord, ...]:
        """Those that recovery has something to do with."""
        return self.operations(domain, states=OPEN)

    def steps(self, operation: int) -> tuple[StepRecord, ...]:
        """An operation's steps, in the order in which they were begun."""
        rows = self._all("SELECT record FROM step WHERE operation = ?", (operation,))
        records = [msgspec.json.decode(row[0], type=StepRecord) for row in rows]
        return tuple(sorted(records, key=lambda record: (record.started, record.index)))

    def claim(self, operation: int, path: str) -> tuple[int, int] | None:
        """Device and inode of the file that an operation created there; None when it created none."""
        record = self.operation(operation)
        for step in self.steps(operation) if record is not None else ():
            begun = record.plan.prepare[step.index] if record is not None and step.stretch == "prepare" else None
            if isinstance(begun, ClaimFile) and begun.path == path and step.outcome:
                return int(step.outcome["device"]), int(step.outcome["inode"])
        return None

    def claims(self, domain: str, since: int = 0) -> tuple[tuple[str, int, int, int], ...]:
        """(path, operation, device, inode) of every file that a domain's operations, from number `since` on, have created."""
        found = []
        for record in self.operations(domain, since=since):
            claims = {index for index, step in enumerate(record.plan.prepare) if isinstance(step, ClaimFile)}
            for step in self.steps(record.id) if claims else ():
                begun = record.plan.prepare[step.index] if step.stretch == "prepare" else None
                if isinstance(begun, ClaimFile) and step.outcome:
                    made = int(step.outcome["device"]), int(step.outcome["inode"])
                    found.append((begun.path, record.id, *made))
        return tuple(found)

    def made_blank(self, operation: int, path: str) -> bool:
        """Whether an operation made an image there of which one could see that it held nothing."""
        record = self.operation(operation)
        if record is None:
            return False
        return any(
            step.stretch == "prepare"
            and isinstance(begun := record.plan.prepare[step.index], CreateImage)
            and begun.path == path
            and step.outcome.get("blank", False)
            for step in self.steps(operation)
        )

    # --- snapshots and jobs -----------------------------------------------------------------------------------

    def _put_snapshot(self, snapshot: Snapshot) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO snapshot VALUES (?, ?, ?, ?)",
            (snapshot.domain, snapshot.name, snapshot.created, msgspec.json.encode(snapshot)),
        )

    def snapshots(self, domain: str) -> tuple[Snapshot, ...]:
        """A domain's snapshots, oldest first, each after its parent."""
        rows = self._all("SELECT record FROM snapshot WHERE domain = ? ORDER BY created, name", (domain,))
        return in_order(tuple(msgspec.json.decode(row[0], type=Snapshot) for row in rows))

    def _put_job(self, job: BlockJob) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO job VALUES (?, ?, ?)", (job.domain, job.target, msgspec.json.encode(job))
        )

    def limit_job(self, job: ChainJob, bandwidth: int) -> None:
        """Write down the limit of a job that works, and of what comes after it."""
        with self._write("job"):
            self._put_job(msgspec.structs.replace(job, speed=bandwidth))

    def _end_job(self, domain: str, target: str, end: JobEnd, reason: str | None) -> None:
        for job in self.jobs(domain):
            if job.target == target:
                self._put_job(msgspec.structs.replace(job, state=end, reason=reason))

    def working(self, domain: str) -> frozenset[int]:
        """The numbers of a domain's operations whose jobs work, or whose move is not over."""
        jobs = {job.operation for job in self.jobs(domain) if job.state in WORKING}
        return frozenset(jobs | {move.operation for move in self.moves_under_way(domain)})

    def _close_in_progress(self, domain: str) -> None:
        """An operation in progress ends with its last job, or its move: undone, if that was given up."""
        working = self.working(domain)
        for (number,) in self._all("SELECT id FROM operation WHERE domain = ? AND state = 'in-progress'", (domain,)):
            if number not in working:
                move = self.move(number)
                state = "undone" if move is not None and move.state == "cancelled" else "done"
                self._db.execute("UPDATE operation SET state = ?, ended = ? WHERE id = ?", (state, time.time(), number))

    def jobs(self, domain: str) -> tuple[BlockJob, ...]:
        """The newest job of each disk, by target: those that work, and how the others ended."""
        rows = self._all("SELECT record FROM job WHERE domain = ? ORDER BY target", (domain,))
        return tuple(msgspec.json.decode(row[0], type=BlockJob) for row in rows)

    def mirrors(self, domain: str) -> tuple[Mirror, ...]:
        """Those of `jobs` that are mirrors."""
        return tuple(job for job in self.jobs(domain) if isinstance(job, Mirror))

    def lose_jobs(self, domain: str, lost: dict[str, str], kept: tuple[BlockJob, ...] = ()) -> tuple[Event, ...]:
        """Write down in one transaction which jobs were lost, why, and how the others are now.

        Returns:
            An event for each that was lost.
        """
        mirrored = {mirror.target for mirror in self.mirrors(domain)}
        with self._write("jobs"):
            for target, reason in lost.items():
                self._end_job(domain, target, "lost", reason)
            for job in kept:
                self._put_job(job)
            self._close_in_progress(domain)
            return tuple(
                self._put_event(
                    Event(
                        seq=0,
                        time=time.time(),
                        type="mirror-dropped" if target in mirrored else "job-lost",
                        domain=domain,
                        disk=target,
                        data={"reason": why},
                    )
                )
                for target, why in lost.items()
            )

    # --- moves ------------------------------------------------------------------------------------------------

    def _put_move(self, move: Move) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO move VALUES (?, ?, ?)", (move.operation, move.domain, msgspec.json.encode(move))
        )

    def put_move(self, move: Move, events: tuple[Event, ...] = ()) -> tuple[Event, ...]:
        """Remember a move as it is now, and what is to be said of it; the events get their numbers."""
        with self._write("move"):
            self._put_move(move)
            self._close_in_progress(move.domain)
            return tuple(self._put_event(event) for event in events)

    def moves(self, domain: str) -> tuple[Move, ...]:
        """All moves of a domain, oldest first; those that have ended too."""
        rows = self._all("SELECT record FROM move WHERE domain = ? ORDER BY operation", (domain,))
        return tuple(msgspec.json.decode(row[0], type=Move) for row in rows)

    def moves_under_way(self, domain: str) -> tuple[Move, ...]:
        """The moves of a domain that are not over, oldest first."""
        rows = self._all(
            "SELECT record FROM move WHERE domain = ? AND json_extract(CAST(record AS TEXT), '$.state') IN (?, ?)"
            " ORDER BY operation",
            (domain, *UNDER_WAY),
        )
        return tuple(msgspec.json.decode(row[0], type=Move) for row in rows)

    def move(self, operation: int) -> Move | None:
        """The move of that operation's number."""
        rows = self._all("SELECT record FROM move WHERE operation = ?", (operation,))
        return msgspec.json.decode(rows[0][0], type=Move) if rows else None

    def put_regions(self, operation: int, file: str, regions: tuple[Region, ...]) -> None:
        """Remember which regions of a copy have reached the disk."""
        with self._write("regions"):
            for region in regions:
                self._db.execute(
                    "INSERT OR REPLACE INTO region VALUES (?, ?, ?, ?)",
                    (operation, file, region.start, msgspec.json.encode(region)),
                )

    def begin_again(self, move: Move, file: str) -> None:
        """Remember a move as it is now, and no region of one of its copies: none of it counts as copied any more."""
        with self._write("regions"):
            self._put_move(move)
            self._db.execute("DELETE FROM region WHERE operation = ? AND file = ?", (move.operation, file))

    def regions(self, operation: int, file: str) -> tuple[Region, ...]:
        """The regions of a copy that have reached the disk."""
        rows = self._all("SELECT record FROM region WHERE operation = ? AND file = ? ORDER BY start", (operation, file))
        return tuple(msgspec.json.decode(row[0], type=Region) for row in rows)

    def put_storage(self, folder: str, bandwidth: int) -> None:
        """Remember how many bytes per second all moves together may write to the storage of a folder; 0 forgets it."""
        with self._write("storage"):
            self._db.execute("DELETE FROM storage WHERE folder = ?", (folder,))
            if bandwidth:
                self._db.execute("INSERT INTO storage VALUES (?, ?)", (folder, bandwidth))

    def storages(self) -> dict[str, int]:
        """By folder, the bytes per second that all moves together may write to its storage."""
        return dict(self._all("SELECT folder, bandwidth FROM storage ORDER BY folder"))

    # --- events -----------------------------------------------------------------------------------------------

    def _put_event(self, event: Event) -> Event:
        cursor = self._db.execute("INSERT INTO event (domain, record) VALUES (?, ?)", (event.domain, b"{}"))
        numbered = msgspec.structs.replace(event, seq=int(cursor.lastrowid or 0))
        self._db.execute("UPDATE event SET record = ? WHERE seq = ?", (msgspec.json.encode(numbered), numbered.seq))
        return numbered

    def put_event(self, event: Event) -> Event:
        """Record an event; it gets its number."""
        with self._write(f"event {event.type}"):
            return self._put_event(event)

    def events(self, domain: str | None, since: int) -> tuple[Event, ...]:
        """Events after number `since`, oldest first."""
        rows = self._all(
            "SELECT record FROM event WHERE seq > ?1 AND (?2 IS NULL OR domain = ?2) ORDER BY seq", (since, domain)
        )
        return tuple(msgspec.json.decode(row[0], type=Event) for row in rows)

    def newest_first(self, kind: str) -> Iterator[Event]:
        """The events of one type, of all domains, the newest first."""
        found = self._db.execute(
            "SELECT record FROM event WHERE json_extract(CAST(record AS TEXT), '$.type') = ? ORDER BY seq DESC", (kind,)
        )
        for (record,) in found:
            yield msgspec.json.decode(record, type=Event)

    def newest_event(self, domain: str, kinds: frozenset[str]) -> Event | None:
        """The newest event of one of these types; None when there is none."""
        wanted = ", ".join("?" * len(kinds))
        rows = self._all(
            f"SELECT record FROM event WHERE domain = ? AND json_extract(CAST(record AS TEXT), '$.type') IN ({wanted})"  # noqa: S608 - question marks
            " ORDER BY seq DESC LIMIT 1",
            (domain, *sorted(kinds)),
        )
        return msgspec.json.decode(rows[0][0], type=Event) if rows else None

    def was_said(self, domain: str, kind: str, job: str) -> bool:
        """Whether an event of that type about that job is recorded."""
        (count,) = self._one(
            "SELECT COUNT(*) FROM event WHERE domain = ?1 AND json_extract(CAST(record AS TEXT), '$.type') = ?2"
            " AND json_extract(CAST(record AS TEXT), '$.data.job') = ?3",
            (domain, kind, job),
        )
        return bool(count)

    def last_event(self) -> int:
        """The newest event's number, 0 when there is none."""
        return int(self._one("SELECT COALESCE(MAX(seq), 0) FROM event")[0])


def _operation(row: tuple[Any, ...]) -> OperationRecord:
    number, domain, plan, state, started, ended, error, table_row, pause_ms = row
    return OperationRecord(
        id=number,
        domain=domain,
        plan=msgspec.json.decode(plan, type=Plan),
        state=state,
        started=started,
        ended=ended,
        error=error,
        row=table_row,
        pause_ms=pause_ms,
    )
