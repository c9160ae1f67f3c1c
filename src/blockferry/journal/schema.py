"""The tables, as numbered migrations: the n-th tuple takes a journal from version n to n + 1. Never edit one."""

from __future__ import annotations

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
        "CREATE TABLE domain (name TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT",
        (
            "CREATE TABLE operation ("
            " id INTEGER PRIMARY KEY, domain TEXT NOT NULL, plan BLOB NOT NULL, state TEXT NOT NULL,"
            " started REAL NOT NULL, ended REAL, error TEXT, row TEXT, pause_ms REAL) STRICT"
        ),
        (
            "CREATE TABLE step ("
            " operation INTEGER NOT NULL REFERENCES operation (id), stretch TEXT NOT NULL, number INTEGER NOT NULL,"
            " record BLOB NOT NULL, PRIMARY KEY (operation, stretch, number)) STRICT"
        ),
        (
            "CREATE TABLE snapshot ("
            " domain TEXT NOT NULL, name TEXT NOT NULL, created REAL NOT NULL, record BLOB NOT NULL,"
            " PRIMARY KEY (domain, name)) STRICT"
        ),
        (
            "CREATE TABLE mirror ("
            " domain TEXT NOT NULL, target TEXT NOT NULL, record BLOB NOT NULL, PRIMARY KEY (domain, target)) STRICT"
        ),
        "CREATE TABLE event (seq INTEGER PRIMARY KEY AUTOINCREMENT, domain TEXT NOT NULL, record BLOB NOT NULL) STRICT",
        "CREATE INDEX operation_by_domain ON operation (domain, state)",
    ),
    (
        # Not only mirrors any more: commits and streams too.
        "ALTER TABLE mirror RENAME TO job",
        "UPDATE job SET record = CAST(json_set(CAST(record AS TEXT), '$.kind', 'mirror') AS BLOB)",
    ),
    (
        # Guests that we start.
        "CREATE TABLE definition (domain TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT",
    ),
    (
        # Moves, and what of the images that are copied outside QEMU has reached the disk.
        "CREATE TABLE move (operation INTEGER PRIMARY KEY, domain TEXT NOT NULL, record BLOB NOT NULL) STRICT",
        (
            "CREATE TABLE region ("
            " operation INTEGER NOT NULL, file TEXT NOT NULL, start INTEGER NOT NULL, record BLOB NOT NULL,"
            " PRIMARY KEY (operation, file, start)) STRICT"
        ),
        "CREATE TABLE storage (folder TEXT PRIMARY KEY, bandwidth INTEGER NOT NULL) STRICT",
    ),
    (
        # A state directory lives for years: what is asked all the time is not looked for among all that ever was.
        "CREATE INDEX event_by_type ON event (json_extract(CAST(record AS TEXT), '$.type'), domain)",
        (
            "CREATE INDEX event_by_job ON event (json_extract(CAST(record AS TEXT), '$.data.job'), domain)"
            " WHERE json_extract(CAST(record AS TEXT), '$.data.job') IS NOT NULL"
        ),
        "CREATE INDEX operation_by_what ON operation (domain, json_extract(CAST(plan AS TEXT), '$.what'))",
        "CREATE INDEX move_by_domain ON move (domain, json_extract(CAST(record AS TEXT), '$.state'))",
    ),
)
