"""The tables of the service's database."""

from __future__ import annotations

import sqlite3

from tightfit.runtime.common.errors import InputError

SCHEMA = 7
"""number of these tables' form: a database with another one is refused"""
TABLES = f"""
BEGIN IMMEDIATE;
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
    label TEXT NOT NULL,                        -- what it is called without a title: `labels`
    title TEXT,                                 -- what a person calls it
    note TEXT,
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
    paths TEXT,                                 -- of a profile that was made here: what is redacted in it, as JSON
    label TEXT NOT NULL,
    title TEXT,
    note TEXT,
    created REAL NOT NULL,
    used REAL NOT NULL,
    PRIMARY KEY (kind, id)
) WITHOUT ROWID;
CREATE INDEX longest_unused ON files (used);
CREATE INDEX newest ON files (kind, created);
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
PRAGMA user_version = {SCHEMA};
COMMIT;
"""


def make_tables(database: sqlite3.Connection, path: str) -> None:
    """Make the tables of an empty `database`, all or none. Raises InputError for a database of another version of
    tightfit.
    """
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version not in (0, SCHEMA):
        raise InputError(
            f"{path}: written by another version of tightfit (schema {version}, this one has {SCHEMA}); name another"
            " --data-dir, or remove that one with all that it keeps"
        )
    if version == 0:
        try:
            database.executescript(TABLES)
        except sqlite3.Error:
            database.rollback()
            raise
