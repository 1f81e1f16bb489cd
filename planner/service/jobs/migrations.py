"""The database's schema, step by step. A step is never changed once released: add another."""

from __future__ import annotations

import sqlite3

from tightfit.runtime.common.errors import InputError

STEPS = (
    """
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,   -- the order of the queue
        id TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL,
        lane TEXT NOT NULL,                         -- solve, or the device's name
        state TEXT NOT NULL,
        content TEXT,                               -- fingerprint of what was asked; NULL: every request is a job
        request TEXT NOT NULL,
        result TEXT,
        error TEXT,
        created REAL NOT NULL,
        started REAL,
        finished REAL,
        used REAL NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0
    );
    CREATE UNIQUE INDEX one_job_for_one_content ON jobs (content) WHERE state IN ('queued', 'running', 'succeeded');
    CREATE INDEX queue ON jobs (state, lane, number);
    CREATE TABLE files (
        kind TEXT NOT NULL,                         -- profile, plan, report, metrics, adapter, folder
        id TEXT NOT NULL,
        digest TEXT,                                -- of the object; NULL: a run's folder
        bytes INTEGER NOT NULL,
        stored_bytes INTEGER NOT NULL,
        name TEXT NOT NULL,
        origin TEXT,                                -- a plan's profile
        summary TEXT NOT NULL,
        created REAL NOT NULL,
        used REAL NOT NULL,
        PRIMARY KEY (kind, id)
    ) WITHOUT ROWID;
    CREATE INDEX longest_unused ON files (used);
    CREATE TABLE uses (                             -- what a job needs or made
        job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        kind TEXT NOT NULL,
        file TEXT NOT NULL,
        PRIMARY KEY (job, kind, file)
    ) WITHOUT ROWID;
    CREATE INDEX used_by ON uses (kind, file);
    CREATE TABLE idempotency (
        key TEXT PRIMARY KEY,
        content TEXT NOT NULL,
        job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE
    ) WITHOUT ROWID;
    """,
    "",  # once a table of the clients that have asked for a job
    """
    DROP TABLE IF EXISTS askers;
    ALTER TABLE files ADD COLUMN paths TEXT;        -- of a profile that was made here: what is redacted in it, as JSON
    """,
    """
    -- Profiles made before name paths of this machine: asked for again they are made again, and summaries name the model.
    UPDATE jobs SET content = NULL WHERE kind = 'profile' AND state = 'succeeded';
    UPDATE jobs SET result = json_set(result, '$.summary.adapter_base', json_extract(result, '$.summary.model'))
        WHERE CASE WHEN json_valid(result) THEN json_extract(result, '$.summary.adapter_base') LIKE '/%' END;
    UPDATE files SET summary = json_set(summary, '$.adapter_base', json_extract(summary, '$.model'))
        WHERE CASE WHEN json_valid(summary) THEN json_extract(summary, '$.adapter_base') LIKE '/%' END;
    """,
    """
    CREATE TABLE remote_devices (                   -- those that ask for plans and train elsewhere
        id TEXT PRIMARY KEY,
        described TEXT NOT NULL,                    -- what it says of itself, as JSON
        job TEXT,                                   -- of the plan that it has asked for last
        report TEXT,                                -- how a run of that went, as JSON
        seen REAL NOT NULL
    ) WITHOUT ROWID;
    """,
    """
    ALTER TABLE jobs ADD COLUMN title TEXT;         -- what a person calls it
    ALTER TABLE jobs ADD COLUMN note TEXT;
    ALTER TABLE jobs ADD COLUMN label TEXT;         -- what it is called without a title: `labels`
    ALTER TABLE files ADD COLUMN title TEXT;
    ALTER TABLE files ADD COLUMN note TEXT;
    ALTER TABLE files ADD COLUMN label TEXT;
    CREATE INDEX newest ON files (kind, created);
    """,
)
LATEST = len(STEPS)


def migrate(database: sqlite3.Connection, path: str) -> None:
    """Bring `database` to the newest schema, each step whole or not at all. Raises InputError for one from the future."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version > LATEST:
        raise InputError(
            f"{path}: written by a newer tightfit (schema {version}, this one knows {LATEST}); upgrade, or name another --data-dir"
        )
    for number in range(version, LATEST):
        try:
            database.executescript(f"BEGIN IMMEDIATE; {STEPS[number]} PRAGMA user_version = {number + 1}; COMMIT;")
        except sqlite3.Error:
            database.rollback()
            raise
