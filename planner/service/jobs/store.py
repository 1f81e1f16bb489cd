"""The database of jobs, profiles and plans in SQLite; what was acknowledged is on disk (write-ahead log, synced at
every commit).

One connection, used by one thread. The files themselves are `Objects`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tightfit.planner.fleet.schema import FLEET_VERSION
from tightfit.planner.schema import PLAN_VERSION
from tightfit.planner.service.jobs.migrations import migrate
from tightfit.planner.service.wire.clients import Requester
from tightfit.planner.service.wire.errors import ServiceError, StorageError, failing_disk
from tightfit.planner.service.wire.objects import Written
from tightfit.planner.service.wire.schema import FINISHED, Error, Job, JobKind
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.runtime.common.errors import InputError

ATTEMPTS = 5
"""a job is not tried again once it was running this many times when the service died"""
SOLVE = "solve"
MOST_ASKERS = 100
"""number of clients remembered per job: a job that is cancelled goes on until all of them have cancelled it"""
NETWORK_SHARE, CLIENT_SHARE = 2, 5
"""divisors: of the jobs that may wait, one network may have half and one client a fifth"""
MOST_SERVED = 10_000
"""number of networks and clients whose last turn is remembered"""
JOBS = "SELECT jobs.*, (SELECT count(*) FROM askers WHERE job = jobs.id AND NOT let_go) AS wanted_by FROM jobs"
LIVE = frozenset({"queued", "running"})
Row = dict[str, Any]


class Store:
    def __init__(self, path: Path) -> None:
        """Raises StorageError where the disk is full, or does not let us write, and InputError for
        what we cannot read.
        """
        self._path = path
        with failing_disk(path):
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 10000"):
                    self._database.execute(f"PRAGMA {pragma}")
                migrate(self._database, str(path))
            except BaseException as error:
                self._database.close()
                if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_NOTADB:
                    raise InputError(f"{path}: damaged ({error}); restore it, or name another --data-dir") from error
                raise
        self._database.row_factory = _row
        self._touched: dict[tuple[str, str], float] = {}
        self._served: dict[tuple[str, ...], int] = {}
        self._turns = 0

    def close(self) -> None:
        with suppress(StorageError):  # that something was used is all that is lost
            self.flush()
        self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing. Raises StorageError where the disk refuses."""
        with failing_disk(self._path):
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    # --- jobs ------------------------------------------------------------------------------------------------------

    def ask(
        self,
        kind: JobKind,
        lane: str,
        request: Row,
        *,
        content: str | None,
        key: str | None,
        waiting: int,
        client: Requester,
        uses: Sequence[tuple[str, str]] = (),
        renews: str | None = None,
    ) -> tuple[Job, bool]:
        """The job of a request, and whether it is new.

        A live or succeeded job of the same `content` answers it, and so does the job that the idempotency `key` made; a
        live one goes on for `client` too then. Raises ServiceError where the key was used for another request, where
        `waiting` jobs are queued already, or where the client has its share of them.

        Where the answer is to be made anew, `renews` is the content of the request for the answer that is there: a live
        job of `content` answers, a succeeded one does not, and no job that has succeeded answers a request for either
        afterwards.
        """
        asked = _hash(kind, request)
        known = self._known(key, asked)
        if known is not None:
            return self._wanted(known, client), False
        found = self._same(content)
        if renews is not None and found is not None and found.state not in LIVE:
            found = None
        if found is not None and key is None:
            self.touch("job", found.id)
            return self._wanted(found, client), False
        now = time.time()
        identity = f"job-{os.urandom(8).hex()}"
        with self._transaction() as database:
            if found is None:
                self._room(waiting, client)
                if renews is not None:
                    database.execute(
                        "UPDATE jobs SET content = NULL WHERE content IN (?, ?) AND state = 'succeeded'",
                        (content, renews),
                    )
                database.execute(
                    "INSERT INTO jobs (id, kind, lane, state, content, request, created, used) VALUES (?, ?, ?, 'queued', ?, ?, ?, ?)",
                    (identity, kind, lane, content, json.dumps(request), now, now),
                )
                database.executemany("INSERT INTO uses VALUES (?, ?, ?)", [(identity, *use) for use in set(uses)])
                self._want(identity, client)
            if key is not None:
                database.execute(
                    "INSERT INTO idempotency VALUES (?, ?, ?)", (key, asked, found.id if found else identity)
                )
        return (self._wanted(found, client), False) if found else (self.job(identity), True)

    def _wanted(self, job: Job, client: Requester) -> Job:
        """The job, with `client` recorded as wanting it too, unless it has ended."""
        mine = "SELECT 1 FROM askers WHERE job = ? AND address = ? AND name = ? AND NOT let_go"
        if job.state not in LIVE or self._one(mine, job.id, client.address, client.name):
            return job
        with self._transaction():
            self._want(job.id, client)
        return self.job(job.id)

    def _want(self, job: str, client: Requester) -> None:
        self._database.execute(
            "INSERT INTO askers (job, network, address, name) SELECT ?1, ?2, ?3, ?4"
            " WHERE (SELECT count(*) FROM askers WHERE job = ?1 AND NOT (address = ?3 AND name = ?4)) < ?5"
            " ON CONFLICT DO UPDATE SET let_go = 0",
            (job, client.network, client.address, client.name, MOST_ASKERS),
        )

    def let_go(self, job: str, client: Requester) -> int:
        """Record that `client` no longer wants a job; returns how many others still do.

        A client that has not asked for the job under its name lets go for those at its address that gave no name; one
        that gives no name, for all at its address. Raises ServiceError where none of these has asked for the job
        either.
        """
        rows = self._all("SELECT * FROM askers WHERE job = ?", job)
        here = [row for row in rows if row["address"] == client.address]
        own = [row for row in here if row["name"] == client.name]
        meant = own or [row for row in here if not client.name or not row["name"]]
        if rows and not meant:
            told = f"the job {job} was asked for by others; only who has asked for a job can cancel it"
            raise ServiceError(403, "forbidden", told)
        with self._transaction() as database:
            database.executemany(
                "UPDATE askers SET let_go = 1 WHERE job = ? AND address = ? AND name = ?",
                [(job, row["address"], row["name"]) for row in meant],
            )
        return self._figure("SELECT count(*) AS n FROM askers WHERE job = ? AND NOT let_go", job)

    def _known(self, key: str | None, asked: str) -> Job | None:
        """The job that the idempotency key stands for. Raises ServiceError where it was used for another request."""
        row = self._one("SELECT content, job FROM idempotency WHERE key = ?", key)
        if row is None:
            return None
        if row["content"] != asked:
            raise ServiceError(
                409,
                "conflict",
                f"the idempotency key {key!r} was used for another request; use a new key for a new request",
                "header.Idempotency-Key",
            )
        return self.job(row["job"])

    def _same(self, content: str | None) -> Job | None:
        if content is None:
            return None
        row = self._one(f"{JOBS} WHERE content = ? AND state IN ('queued', 'running', 'succeeded')", content)
        return None if row is None else _job(row)

    def job(self, identity: str) -> Job:
        """Raises ServiceError 404."""
        row = self._one(f"{JOBS} WHERE id = ?", identity)
        if row is None:
            raise ServiceError(
                404, "not_found", f"there is no job {identity!r}; finished jobs are removed after a while"
            )
        return _job(row)

    def jobs(self, *, kind: str | None = None, state: str | None = None, limit: int = 100) -> list[Job]:
        """Newest first."""
        rows = self._all(
            f"{JOBS} WHERE (?1 IS NULL OR kind = ?1) AND (?2 IS NULL OR state = ?2) ORDER BY number DESC LIMIT ?3",
            kind,
            state,
            limit,
        )
        return [_job(row) for row in rows]

    def next(self, lane: str) -> Job | None:
        """Take a job that waits in `lane`: it is running from now on.

        Networks take turns, so do the clients of one network, and a client's jobs keep their order.
        """
        rows = self._all(
            "SELECT id, number, network, address, name FROM jobs LEFT JOIN askers ON job = id AND NOT let_go"
            " WHERE state = 'queued' AND lane = ?",
            lane,
        )
        if not rows:
            return None
        row = min(rows, key=lambda row: (*(self._served.get(who, 0) for who in _takers(lane, row)), row["number"]))
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET state = 'running', started = ?, attempts = attempts + 1 WHERE id = ?",
                (time.time(), row["id"]),
            )
        self._turns += 1
        self._served |= dict.fromkeys(_takers(lane, row), self._turns)
        if len(self._served) > MOST_SERVED:
            latest = sorted(self._served.items(), key=lambda served: served[1])[MOST_SERVED // 2 :]
            self._served = dict(latest)
        return self.job(row["id"])

    def finish(
        self,
        identity: str,
        state: str,
        *,
        result: Row | None = None,
        error: Error | None = None,
        files: Sequence[Row] = (),
    ) -> Job:
        """End a job that is queued or running, together with the files it made; one that has ended stays as it is."""
        now = time.time()
        with self._transaction() as database:
            ended = database.execute(
                "UPDATE jobs SET state = ?, result = ?, error = ?, finished = ?, used = ? WHERE id = ? AND state IN ('queued', 'running')",
                (
                    state,
                    None if result is None else json.dumps(result),
                    None if error is None else error.model_dump_json(),
                    now,
                    now,
                    identity,
                ),
            )
            if ended.rowcount:
                for file in files:
                    self._add(file, now)
                    database.execute(
                        "INSERT OR IGNORE INTO uses VALUES (?, ?, ?)", (identity, file["kind"], file["id"])
                    )
        return self.job(identity)

    def requeue(self, identity: str, *, counted: bool) -> Job:
        """Put a running job back where it was in the queue; an attempt that the service itself ended is not counted."""
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET state = 'queued', started = NULL, attempts = attempts - ? WHERE id = ? AND state = 'running'",
                (0 if counted else 1, identity),
            )
        return self.job(identity)

    def resume(self, identity: str, *, key: str | None = None, waiting: int, client: Requester) -> tuple[Job, bool]:
        """Put a run that ended before its last step back into the queue, for `client`; what it has saved is its own
        again.

        Returns it, and whether it goes on only now: not where `key` has asked for that already. Raises ServiceError
        where the run has not ended so, where `waiting` jobs are queued already, or where the client has its share of
        them.
        """
        asked = _hash("resume", {"run": identity})
        known = self._known(key, asked)
        if known is not None:
            return self._wanted(known, client), False
        job = self.job(identity)
        if job.state not in FINISHED - {"succeeded"}:
            raise ServiceError(409, "conflict", f"the run {identity} is {job.state}: there is nothing to go on with")
        with self._transaction() as database:
            self._room(waiting, client)
            database.execute("DELETE FROM askers WHERE job = ?", (identity,))
            self._want(identity, client)
            database.execute(
                "UPDATE jobs SET state = 'queued', started = NULL, finished = NULL, error = NULL, attempts = 0"
                " WHERE id = ?",
                (identity,),
            )
            database.execute("DELETE FROM files WHERE kind = 'folder' AND id = ?", (identity,))
            if key is not None:
                database.execute("INSERT INTO idempotency VALUES (?, ?, ?)", (key, asked, identity))
        return self.job(identity), True

    def _room(self, waiting: int, client: Requester) -> None:
        """Raises ServiceError where too many jobs wait: at all, for the client's network, or for the client."""
        queued = self._figure("SELECT count(*) AS n FROM jobs WHERE state = 'queued'")
        if queued >= waiting:
            raise ServiceError(429, "busy", f"{queued} jobs are waiting already; ask again in a minute")
        mine = "SELECT count(DISTINCT job) AS n FROM askers JOIN jobs ON jobs.id = job WHERE state = 'queued' AND network = ?"
        queued = self._figure(mine, client.network)
        if queued >= -(-waiting // NETWORK_SHARE):
            told = f"{queued} jobs from your address are waiting already, which is all that one address may have"
            raise ServiceError(429, "busy", f"{told}; ask again once some of them are done")
        queued = self._figure(f"{mine} AND address = ? AND name = ?", client.network, client.address, client.name)
        if queued >= -(-waiting // CLIENT_SHARE):
            told = f"{queued} jobs that you asked for are waiting already, which is all that one client may have"
            raise ServiceError(429, "busy", f"{told}; ask again once some of them are done")

    def recover(self) -> tuple[int, int]:
        """After a start: jobs that were running wait again, or are interrupted where that happened too often."""
        requeued = interrupted = 0
        for row in self._all("SELECT id, attempts FROM jobs WHERE state = 'running'"):
            if row["attempts"] < ATTEMPTS:
                self.requeue(row["id"], counted=True)
                requeued += 1
            else:
                message = (
                    f"the service ended {row['attempts']} times while this job was running; ask again to try it anew"
                )
                self.finish(row["id"], "interrupted", error=Error(code="interrupted", message=message))
                interrupted += 1
        return requeued, interrupted

    def counts(self) -> dict[tuple[str, str], int]:
        """(kind, state) -> jobs."""
        rows = self._all("SELECT kind, state, count(*) AS n FROM jobs GROUP BY kind, state")
        return {(row["kind"], row["state"]): row["n"] for row in rows}

    def lane(self, lane: str) -> tuple[str | None, int]:
        """The job that runs in `lane`, and how many wait."""
        running = self._one("SELECT id FROM jobs WHERE state = 'running' AND lane = ? LIMIT 1", lane)
        waiting = self._figure("SELECT count(*) AS n FROM jobs WHERE state = 'queued' AND lane = ?", lane)
        return (None if running is None else running["id"]), waiting

    # --- files -----------------------------------------------------------------------------------------------------

    def add(self, file: Row) -> Row:
        """Keep a file whose object is on disk; one of the same kind and id stays, told as now, with its explanation.

        A profile that was uploaded and is then made here counts as made, and stays so when it is uploaded again.
        """
        with self._transaction():
            self._add(file, time.time())
        found = self.file(file["kind"], file["id"])
        assert found is not None
        return found

    def _add(self, file: Row, now: float) -> None:
        self._database.execute(
            "INSERT INTO files (kind, id, digest, bytes, stored_bytes, name, origin, summary, created, used)"
            " VALUES (:kind, :id, :digest, :bytes, :stored_bytes, :name, :origin, :summary, :now, :now)"
            " ON CONFLICT DO UPDATE SET used = excluded.used,"
            " origin = CASE WHEN kind = 'profile' AND excluded.origin = 'made' THEN 'made' ELSE origin END, summary = CASE"
            " WHEN json_extract(excluded.summary, '$.explanation') IS NULL"
            " AND json_extract(summary, '$.explanation') IS NOT NULL THEN summary"
            " ELSE excluded.summary END",
            file | {"now": now},
        )

    def file(self, kind: str, identity: str) -> Row | None:
        row = self._one("SELECT * FROM files WHERE kind = ? AND id = ?", kind, identity)
        if row is not None:
            self.touch(kind, identity)
        return row

    def files(self, kind: str, *, origin: str | None = None, limit: int = 100) -> list[Row]:
        """Newest first."""
        return self._all(
            "SELECT * FROM files WHERE kind = ?1 AND (?2 IS NULL OR origin = ?2) ORDER BY created DESC LIMIT ?3",
            kind,
            origin,
            limit,
        )

    def files_of(self, job: str) -> list[Row]:
        """The files that a job needs and those that it made."""
        return self._all(
            "SELECT files.* FROM files JOIN uses ON uses.kind = files.kind AND uses.file = files.id WHERE uses.job = ?",
            job,
        )

    def digests(self) -> set[str]:
        return {row["digest"] for row in self._all("SELECT digest FROM files WHERE digest IS NOT NULL")}

    def stored_bytes(self) -> int:
        return self._figure("SELECT coalesce(sum(stored_bytes), 0) AS n FROM files")

    def count_cache(self, rows: Sequence[Row]) -> None:
        """The files of the cache are these: those that are new count from now on, those that are gone no longer."""
        known = {row["id"]: row["stored_bytes"] for row in self.files("cache", limit=1 << 30)}
        present = {row["id"]: row["stored_bytes"] for row in rows}
        if known == present:
            return
        now = time.time()
        with self._transaction() as database:
            database.executemany(
                "DELETE FROM files WHERE kind = 'cache' AND id = ?",
                [(name,) for name, size in known.items() if present.get(name) != size],
            )
            for row in rows:
                if known.get(row["id"]) != row["stored_bytes"]:
                    self._add(row, now)

    # --- retention -------------------------------------------------------------------------------------------------

    def touch(self, kind: str, identity: str) -> None:
        """Remember that something was used; written with the next `flush`, a lost one only ages it a little."""
        self._touched[kind, identity] = time.time()

    def flush(self) -> None:
        touched, self._touched = self._touched, {}
        if touched:
            with self._transaction() as database:
                for (kind, identity), now in touched.items():
                    if kind == "job":
                        database.execute("UPDATE jobs SET used = ? WHERE id = ?", (now, identity))
                    else:
                        database.execute("UPDATE files SET used = ? WHERE kind = ? AND id = ?", (now, kind, identity))

    def expire(self, *, before: float, keep_bytes: int) -> list[Row]:
        """Forget finished jobs and unused files older than `before`, then the longest unused until `keep_bytes` are
        left.

        What a queued or running job needs stays. Returns the files that are no longer wanted.
        """
        self.flush()
        live = (
            "SELECT 1 FROM uses JOIN jobs ON jobs.id = uses.job WHERE uses.kind = files.kind AND uses.file = files.id"
        )
        unfinished = f"{live} AND jobs.state IN ('queued', 'running')"
        removed: list[Row] = []
        with self._transaction() as database:
            database.execute(
                f"DELETE FROM jobs WHERE state IN ({_marks(FINISHED)}) AND used < ?",  # noqa: S608  constants
                (*FINISHED, before),
            )
            removed += database.execute(
                f"SELECT * FROM files WHERE used < ? AND NOT EXISTS ({live})",  # noqa: S608  constants
                (before,),
            ).fetchall()
            excess = self.stored_bytes() - sum(row["stored_bytes"] for row in removed) - keep_bytes
            gone = {(row["kind"], row["id"]) for row in removed}
            candidates = database.execute(
                f"SELECT * FROM files WHERE NOT EXISTS ({unfinished}) ORDER BY used, stored_bytes DESC",  # noqa: S608  constants
            )
            for row in candidates.fetchall() if excess > 0 else []:
                if (row["kind"], row["id"]) in gone:
                    continue
                removed.append(row)
                excess -= row["stored_bytes"]
                if excess <= 0:
                    break
            for row in removed:
                place = (row["kind"], row["id"])
                # A job whose answer is gone can no longer answer; of what lies in the cache a run's answer has no need.
                database.execute(
                    "DELETE FROM jobs WHERE id IN (SELECT job FROM uses WHERE kind = ?1 AND file = ?2)"
                    " AND NOT (kind = 'run' AND ?1 = 'cache')",
                    place,
                )
                database.execute("DELETE FROM files WHERE kind = ? AND id = ?", place)
        return removed

    # --- rows ------------------------------------------------------------------------------------------------------

    def _one(self, statement: str, *values: Any) -> Row | None:
        found: Row | None = self._database.execute(statement, values).fetchone()
        return found

    def _figure(self, statement: str, *values: Any) -> int:
        """The column `n` of a statement's single row."""
        found: int = self._database.execute(statement, values).fetchone()["n"]
        return found

    def _all(self, statement: str, *values: Any) -> list[Row]:
        return self._database.execute(statement, values).fetchall()


def file_row(kind: str, identity: str, written: Written, *, name: str, summary: Row, origin: str | None = None) -> Row:
    """The row of a stored object for `Store.add`."""
    return {
        "kind": kind,
        "id": identity,
        "digest": written.digest,
        "bytes": written.bytes,
        "stored_bytes": written.stored_bytes,
        "name": name,
        "origin": origin,
        "summary": json.dumps(summary),
    }


def folder_row(identity: str, size: int) -> Row:
    """The row of a run's folder for `Store.add`; it has no object, as the folder lies beside the objects."""
    sizes = {"digest": None, "bytes": size, "stored_bytes": size}
    return {"kind": "folder", "id": identity, "name": f"folder of {identity}", "origin": None, "summary": "{}", **sizes}


def cache_row(name: str, size: int) -> Row:
    """The row of a file of the service's cache for `Store.add`; it has no object either."""
    sizes = {"digest": None, "bytes": size, "stored_bytes": size}
    return {"kind": "cache", "id": name, "name": name, "origin": None, "summary": "{}", **sizes}


def content_key(kind: str, request: Row) -> str:
    """Fingerprint of a request: equal requests share one job, unless its answer is a file of a version that is no
    longer read.
    """
    versions = [PROFILE_VERSION, PLAN_VERSION, *([FLEET_VERSION] if kind == "fleet" else [])]
    return _hash(kind, request | {"versions": versions})


def _hash(kind: str, request: Row) -> str:
    return hashlib.sha256(json.dumps([kind, request], sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _takers(lane: str, row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Whose turn it is when the job of `row` is taken: a network's, and one of its clients'."""
    network = row["network"] or ""
    return (lane, network), (lane, network, row["address"] or "", row["name"] or "")


def _job(row: Row) -> Job:
    figures = ("id", "kind", "state", "created", "started", "finished", "attempts", "wanted_by")
    return Job(
        **{name: row[name] for name in figures},
        request=json.loads(row["request"]),
        progress=None,
        result=None if row["result"] is None else json.loads(row["result"]),
        error=None if row["error"] is None else Error.model_validate_json(row["error"]),
    )


def _row(cursor: sqlite3.Cursor, values: tuple[Any, ...]) -> Row:
    return {column[0]: value for column, value in zip(cursor.description, values)}


def _marks(values: Sequence[str] | frozenset[str]) -> str:
    return ", ".join("?" * len(values))
