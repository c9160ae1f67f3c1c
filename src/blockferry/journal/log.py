"""The length of SQLite's write-ahead log, on which it depends how fast a write is durable."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

# SQLite begins its log anew after so many pages of 4 KiB (sqlite.org/pragma.html#pragma_wal_autocheckpoint), and with the
# transaction that was longer than that: half as much as it does by itself, so that making the log that long takes little.
LOG_PAGES, LOG_BYTES = 480, 2 << 20
# What has to be free for that: a full disk is not filled further.
ROOM_BYTES = 256 << 20


def lengthen(database: sqlite3.Connection, folder: Path) -> None:
    """Have the write-ahead log as long as it gets before SQLite begins it anew.

    A write within a file's length reaches the disk in a third of the time of one that makes the file longer, for which the
    file system has a journal of its own to flush. Where there is little room, or none, it is left as it is.

    Args:
        database: in WAL mode, its tables made.
        folder: where it is.
    """
    found = os.statvfs(folder)
    if found.f_bavail * found.f_frsize < ROOM_BYTES:
        return
    (pages,), (version,) = (database.execute(f"PRAGMA {name}").fetchone() for name in ("cache_size", "user_version"))
    database.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES:d}")
    database.execute("PRAGMA cache_size = 8")
    try:
        # What the cache does not hold goes to the log at once, and is nothing without its COMMIT; the log keeps its length.
        database.execute("BEGIN IMMEDIATE")
        database.execute("CREATE TABLE filling (zeroes BLOB)")
        database.execute("INSERT INTO filling VALUES (zeroblob(?))", (LOG_BYTES,))
        database.execute("ROLLBACK")
        # The next write would have all of that to flush: not one that a guest stands still for.
        database.execute(f"PRAGMA user_version = {version:d}")
    except sqlite3.OperationalError:  # whoever has to write says so
        if database.in_transaction:
            database.execute("ROLLBACK")
    finally:
        database.execute(f"PRAGMA cache_size = {pages:d}")
