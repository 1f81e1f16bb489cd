"""The database of jobs, profiles and plans in SQLite; what was acknowledged is on disk (write-ahead log, synced at
every commit).

One connection, used by one thread. The files themselves are in an `ObjectStore`. A job that could not be shown is not
stored. A job or a file that cannot be read or shown any more is set aside: it is moved out of the database into a file
of its name, so that neither the service's start nor a list fails, and it can be requested anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, Json

from tightfit.planner.schema import PLAN_VERSION
from tightfit.planner.service.jobs.labels import file_label, job_label
from tightfit.planner.service.jobs.tables import make_tables
from tightfit.planner.service.wire.errors import ServiceError, StorageError, failing_disk, not_found
from tightfit.planner.service.wire.objects import ObjectStore, StoredObject
from tightfit.planner.service.wire.schema import (
    FINISHED,
    Digest,
    Error,
    Listed,
    ServiceJob,
    StoredFile,
)
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.runtime.common.errors import InputError, TightfitError
from tightfit.runtime.common.files import write_whole
from tightfit.runtime.common.strict_json import read_json

ATTEMPTS = 5
"""a job is not tried again once it was running this many times when the service died"""
SET_ASIDE = "set-aside"
"""folder beside the database, with what could not be read: ``JOB.json`` for a job, ``KIND-ID.json`` for a file"""
JOB_ID = re.compile("job-[0-9a-f]{16}")
FILE = re.compile("[a-z]+-([0-9a-f]{64}|job-[0-9a-f]{16})")
OF_JOBS = frozenset({"report", "metrics", "adapter", "folder", "cache"})
"""kinds of files that are not listed: they belong to a run, or to nobody"""
IN_SUMMARY = {"profile": ("policies",), "plan": ("status", "budget_bytes", "explanation")}
"""kind of a file -> what its summary has to have"""
ORIGINS = {"profile": "origin", "plan": "profile"}
"""kind of a file -> what is shown of its column `origin`"""
NAMING = {
    (table, column): f"UPDATE {table} SET {column} = ? WHERE id = ?"  # noqa: S608  constants
    for table in ("jobs", "files")
    for column in ("title", "note")
}
"""table and column -> how what a person says is written there"""
ASKED = (
    "(title IS NOT NULL OR note IS NOT NULL OR (CASE WHEN json_valid(summary) THEN json_extract(summary,"
    " '$.budget_bytes') > 1 END AND EXISTS (SELECT 1 FROM uses JOIN jobs ON jobs.id = uses.job WHERE uses.kind ="
    " files.kind AND uses.file = files.id AND jobs.kind <> 'comparison')))"
)
"""Of a plan: somebody named it, or a job other than a comparison made or used it. One byte is a question for the
smallest budget.
"""
Row = dict[str, Any]
T = TypeVar("T")
log = logging.getLogger("tightfit.service")


class FileRow(BaseModel, strict=True):
    """A file's row, of whatever kind. Checks its JSON, more strictly than json.loads."""

    kind: str
    id: str
    digest: Digest | None
    bytes: int
    stored_bytes: int
    name: str
    origin: str | None
    summary: Json[dict[str, Any]]
    paths: Json[dict[str, str]] | None
    created: float
    used: float
    title: str | None
    note: str | None
    label: str


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    """Some of a list, newest first."""

    items: list[T]
    next: str | None
    """`after` for those that follow; None: there are no more"""


class JobStore:
    def __init__(self, path: Path, objects: ObjectStore) -> None:
        """`objects` hold what the rows of files refer to. Raises StorageError where the disk is full or cannot be
        written, and InputError for a file that is no database, or one of another version.
        """
        self._path, self._objects = path, objects
        with failing_disk(path):
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 10000"):
                    self._database.execute(f"PRAGMA {pragma}")
                make_tables(self._database, str(path))
            except BaseException as error:
                self._database.close()
                if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_NOTADB:
                    raise InputError(f"{path}: damaged ({error}); restore it, or name another --data-dir") from error
                raise
        self._database.row_factory = _row
        self._database.text_factory = lambda data: data.decode(errors="surrogateescape")
        self._database.create_function("mentioned", -1, _mentioned, deterministic=True)
        self._touched: dict[tuple[str, str], float] = {}

    def close(self) -> None:
        with suppress(StorageError):  # only the times of last use would be lost
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

    def enqueue(
        self,
        kind: str,
        lane: str,
        request: Row,
        *,
        content: str | None,
        key: str | None,
        waiting: int,
        uses: Sequence[tuple[str, str]] = (),
        renews: str | None = None,
    ) -> tuple[ServiceJob, bool]:
        """The job of a request, and whether it is new.

        A live or succeeded job of the same `content` answers it, and so does the job that the idempotency `key` made.
        Raises ServiceError where the key was used for another request, or where `waiting` jobs are queued already.

        Where the answer is to be made anew, `renews` is the content of the request for the answer that is there: a live
        job of `content` answers, a succeeded one does not, and no job that has succeeded answers a request for either
        afterwards.
        """
        fingerprint = _hash(kind, request)
        known_job = self._known(key, fingerprint)
        if known_job is not None:
            return known_job, False
        equal = self._same(content)
        if renews is not None and equal is not None and equal.state in FINISHED:
            equal = None
        if equal is not None and key is None:
            self.touch("job", equal.id)
            return equal, False
        now = time.time()
        identity = f"job-{os.urandom(8).hex()}"
        try:
            label = job_label(kind, request, self._file)
            _showable(
                ServiceJob(
                    id=identity, kind=kind, state="queued", created=now, attempts=0, request=request, label=label
                )
            )
        except Exception as error:
            message = (
                f"the request cannot be repeated as JSON ({error}); leave out what is no text or nested without end"
            )
            raise ServiceError(422, "invalid_request", message, "body") from error
        with self._transaction() as database:
            if equal is None:
                self._check_queue(waiting)
                if renews is not None:
                    database.execute(
                        "UPDATE jobs SET content = NULL WHERE content IN (?, ?) AND state = 'succeeded'",
                        (content, renews),
                    )
                database.execute(
                    "INSERT INTO jobs (id, kind, lane, state, content, request, label, created, used)"
                    " VALUES (?, ?, ?, 'queued', ?, ?, ?, ?, ?)",
                    (identity, kind, lane, content, json.dumps(request), label, now, now),
                )
                database.executemany("INSERT INTO uses VALUES (?, ?, ?)", [(identity, *use) for use in set(uses)])
            if key is not None:
                database.execute(
                    "INSERT INTO idempotency VALUES (?, ?, ?)", (key, fingerprint, equal.id if equal else identity)
                )
        return (equal, False) if equal else (self.job(identity), True)

    def _known(self, key: str | None, fingerprint: str) -> ServiceJob | None:
        """The job that the idempotency key stands for. Raises ServiceError where it was used for another request."""
        row = self._get("SELECT content, job FROM idempotency WHERE key = ?", key)
        if row is None:
            return None
        if row["content"] != fingerprint:
            raise ServiceError(
                409,
                "conflict",
                f"the idempotency key {key!r} was used for another request; use a new key for a new request",
                "header.Idempotency-Key",
            )
        return self.job(row["job"])

    def _same(self, content: str | None) -> ServiceJob | None:
        if content is None:
            return None
        row = self._get("SELECT * FROM jobs WHERE content = ? AND state IN ('queued', 'running', 'succeeded')", content)
        return None if row is None else self._read(row)

    def job(self, identity: str) -> ServiceJob:
        """Raises ServiceError 404."""
        row = self._get("SELECT * FROM jobs WHERE id = ?", identity)
        job = None if row is None else self._read(row)
        if job is None:
            raise self.missing("job", identity, "finished jobs are removed after a while")
        return job

    def missing(self, kind: str, identity: str, *why: str) -> ServiceError:
        """The error 404, which says that it was set aside, or else `why`."""
        name = identity if kind == "job" else f"{kind}-{identity}"
        if name in self.set_aside(kind):
            why = (f"it could not be read and was set aside as {SET_ASIDE}/{name}.json in the service's data folder",)
        return not_found(kind, identity, *why)

    def jobs(
        self,
        *,
        kind: str | None = None,
        state: str | None = None,
        search: str | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> Page[ServiceJob]:
        """Those of a kind and in a state that mention all words of `search`, from `next` of the page before on."""
        rows = self._page("jobs", "number", {"kind": kind, "state": state}, search, after, limit)
        return Page(items=[job for job in map(self._read, rows.items) if job is not None], next=rows.next)

    def job_ids(self) -> set[str]:
        return {row["id"] for row in self._rows("SELECT id FROM jobs")}

    def name_job(self, identity: str, names: Mapping[str, str | None]) -> ServiceJob:
        """Give a job another `title` or `note`. Raises ServiceError 404."""
        self.job(identity)
        with self._transaction() as database:
            for column, text in names.items():
                database.execute(NAMING["jobs", column], (text, identity))
        return self.job(identity)

    def remove_job(self, identity: str) -> list[Row]:
        """Forget a job and the files that it alone has: of a run report, metrics, adapter and folder, which are
        returned. What it made besides stays. Raises ServiceError 404, and 409 where it has not ended or another live
        job needs what it made.
        """
        job = self.job(identity)
        if job.state not in FINISHED:
            raise ServiceError(409, "conflict", f"the job {identity} is {job.state}; cancel it first")
        files = self._rows("SELECT * FROM files WHERE id = ?", identity)
        for row in files:
            self._check_unused(row)
        with self._transaction() as database:
            database.execute("DELETE FROM jobs WHERE id = ?", (identity,))
            database.execute("DELETE FROM files WHERE id = ?", (identity,))
        return files

    def _check_unused(self, file: Row) -> None:
        """Raises ServiceError 409 where a live job needs a file."""
        user = self._get(
            "SELECT jobs.id, jobs.kind, jobs.state, jobs.title, jobs.label FROM jobs JOIN uses ON uses.job = jobs.id"
            " WHERE uses.kind = ? AND uses.file = ? AND jobs.state IN ('queued', 'running') LIMIT 1",
            file["kind"],
            file["id"],
        )
        if user is not None:
            called = [row["title"] or row["label"] for row in (user, file)]
            message = (
                f"the {user['kind']} “{called[0]}” ({user['id']}) is {user['state']} and needs the {file['kind']}"
                f" “{called[1]}”"
            )
            raise ServiceError(409, "conflict", f"{message}; cancel it first, or wait for its end")

    def _read(self, row: Row) -> ServiceJob | None:
        """The job of a row; None where it cannot be read or shown, whatever is in it: it is set aside then."""
        try:
            return _showable(_job(row))
        except Exception as error:
            name = f"{row['id']}" if JOB_ID.fullmatch(f"{row['id']}") else f"job-number-{row['number']}"
            with self._setting_aside(name, row, str(error)) as database:
                database.execute("DELETE FROM jobs WHERE number = ?", (row["number"],))
            return None

    @contextmanager
    def _setting_aside(self, name: str, row: Row, reason: str) -> Iterator[sqlite3.Connection]:
        """Write a row that cannot be read to a file; what is done inside removes it from the database."""
        try:
            file = write_whole(self._path.parent / SET_ASIDE / f"{name}.json", json.dumps(row, default=repr))
        except TightfitError as refusal:
            raise StorageError(str(refusal)) from refusal
        with self._transaction() as database:
            yield database
        log.error("cannot be read: set aside", extra={"what": name, "file": str(file), "why": reason})

    def set_aside(self, kind: str = "") -> list[str]:
        """What could not be read, of one kind or of all, by the names of the files."""
        return sorted(path.stem for path in (self._path.parent / SET_ASIDE).glob(f"{kind}*.json"))

    def next(self, lane: str) -> ServiceJob | None:
        """Take the job that has waited longest in `lane`: it is running from now on."""
        waiting = "SELECT * FROM jobs WHERE state = 'queued' AND lane = ? ORDER BY number LIMIT 1"
        while (row := self._get(waiting, lane)) is not None:
            if self._read(row) is not None:
                with self._transaction() as database:
                    database.execute(
                        "UPDATE jobs SET state = 'running', started = ?, attempts = attempts + 1 WHERE id = ?",
                        (time.time(), row["id"]),
                    )
                return self.job(row["id"])
        return None

    def finish(
        self,
        identity: str,
        state: str,
        *,
        result: Row | None = None,
        error: Error | None = None,
        files: Sequence[Row] = (),
    ) -> ServiceJob:
        """End a job that is queued or running, together with the files it made; one that has ended stays as it is.

        Raises ValueError for a result that could not be shown.
        """
        _showable(self.job(identity).model_copy(update={"result": result, "error": error}))
        now = time.time()
        with self._transaction() as database:
            ended = database.execute(
                "UPDATE jobs SET state = ?, result = ?, error = ?, finished = ?, used = ? WHERE id = ? AND state IN"
                " ('queued', 'running')",
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
        self._unstage(files)
        return self.job(identity)

    def requeue(self, identity: str, *, counted: bool) -> ServiceJob:
        """Put a running job back where it was in the queue; an attempt that the service itself ended is not counted."""
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET state = 'queued', started = NULL, attempts = attempts - ? WHERE id = ? AND state ="
                " 'running'",
                (0 if counted else 1, identity),
            )
        return self.job(identity)

    def resume(self, identity: str, *, key: str | None = None, waiting: int) -> tuple[ServiceJob, bool]:
        """Put a run that ended before its last step back into the queue; its folder no longer counts as a stored file.

        Returns the job, and whether this call resumed it: an earlier one with the same `key` may have. Raises
        ServiceError where the run has not ended so, or where `waiting` jobs are queued already.
        """
        fingerprint = _hash("resume", {"run": identity})
        known_job = self._known(key, fingerprint)
        if known_job is not None:
            return known_job, False
        job = self.job(identity)
        if job.state not in FINISHED - {"succeeded"}:
            raise ServiceError(409, "conflict", f"the run {identity} is {job.state}: there is nothing to go on with")
        with self._transaction() as database:
            self._check_queue(waiting)
            database.execute(
                "UPDATE jobs SET state = 'queued', started = NULL, finished = NULL, error = NULL, attempts = 0"
                " WHERE id = ?",
                (identity,),
            )
            database.execute("DELETE FROM files WHERE kind = 'folder' AND id = ?", (identity,))
            if key is not None:
                database.execute("INSERT INTO idempotency VALUES (?, ?, ?)", (key, fingerprint, identity))
        return self.job(identity), True

    def _check_queue(self, waiting: int) -> None:
        """Raises ServiceError where `waiting` jobs are queued already."""
        queued = self._count("SELECT count(*) AS n FROM jobs WHERE state = 'queued'")
        if queued >= waiting:
            raise ServiceError(429, "busy", f"{queued} jobs are waiting already; ask again in a minute")

    def recover(self) -> tuple[int, int]:
        """After a start: what cannot be read is set aside; jobs that were running wait again, or are interrupted where
        that happened too often.
        """
        for row in self._rows("SELECT * FROM jobs"):
            self._read(row)
        self._readable([row for row in self._database.execute("SELECT * FROM files") if _fault(row) is not None])
        requeued = interrupted = 0
        for row in self._rows("SELECT id, attempts FROM jobs WHERE state = 'running'"):
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
        rows = self._rows("SELECT kind, state, count(*) AS n FROM jobs GROUP BY kind, state")
        return {(row["kind"], row["state"]): row["n"] for row in rows}

    def lane(self, lane: str) -> tuple[str | None, int]:
        """The job that runs in `lane`, and how many wait."""
        running = self._get("SELECT id FROM jobs WHERE state = 'running' AND lane = ? LIMIT 1", lane)
        waiting = self._count("SELECT count(*) AS n FROM jobs WHERE state = 'queued' AND lane = ?", lane)
        return (None if running is None else running["id"]), waiting

    # --- files -----------------------------------------------------------------------------------------------------

    def add(self, file: Row) -> Row:
        """Keep a file whose object is staged; one of the same kind and id stays, with the new summary and its own
        explanation.

        A profile that was uploaded and is then made here counts as made, and stays so when it is uploaded again.
        """
        with self._transaction():
            self._add(file, time.time())
        self._unstage([file])
        row = self.file(file["kind"], file["id"])
        assert row is not None
        return row

    def _unstage(self, files: Sequence[Row]) -> None:
        for file in files:
            if file["digest"] is not None:
                self._objects.unstage(file["staged"])

    def _add(self, file: Row, now: float) -> None:
        """Within a transaction; the object stays staged until that is on disk."""
        if file["digest"] is not None:
            self._objects.place(file["digest"], file["staged"])
        self._database.execute(
            "INSERT INTO files (kind, id, digest, bytes, stored_bytes, name, origin, summary, paths, label, created,"
            " used) VALUES (:kind, :id, :digest, :bytes, :stored_bytes, :name, :origin, :summary, :paths, :label, :now,"
            " :now) ON CONFLICT DO UPDATE SET used = excluded.used, label = excluded.label, paths ="
            " coalesce(excluded.paths, paths), origin = CASE WHEN kind = 'profile' AND excluded.origin = 'made' THEN"
            " 'made' ELSE origin END, summary = CASE WHEN json_extract(excluded.summary, '$.explanation') IS NULL AND"
            " json_extract(summary, '$.explanation') IS NOT NULL THEN summary ELSE excluded.summary END",
            file | {"label": file_label(file), "now": now},
        )

    def file(self, kind: str, identity: str) -> Row | None:
        rows = self._readable(self._rows("SELECT * FROM files WHERE kind = ? AND id = ?", kind, identity))
        if not rows:
            return None
        self.touch(kind, identity)
        return rows[0]

    def needed(self, kind: str, identity: str, field: str | None = None) -> Row:
        """A file's row. Raises ServiceError 404, naming the field of the request's body that asked for it."""
        row = self.file(kind, identity)
        if row is None:
            error = self.missing(kind, identity)
            raise ServiceError(error.status, error.code, str(error), field and f"body.{field}")
        return row

    def _file(self, kind: str, identity: str) -> Row | None:
        """A file's row as it is, which does not count as a use."""
        return self._get("SELECT * FROM files WHERE kind = ? AND id = ?", kind, identity)

    def files(
        self,
        kind: str,
        *,
        origin: str | None = None,
        asked: bool = False,
        search: str | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> Page[Row]:
        """Those of a kind and an origin that mention all words of `search`, from `next` of the page before on; of plans
        only those that were `asked` for, if so.
        """
        equal = {"kind": kind, "origin": origin}
        rows = self._page("files", "created", equal, search, after, limit, *([ASKED] if asked else []))
        return Page(items=self._readable(rows.items), next=rows.next)

    def name_file(self, kind: str, identity: str, names: Mapping[str, str | None]) -> Row:
        """Give a file another `title` or `note`. Returns its row; raises ServiceError 404."""
        self.needed(kind, identity)
        with self._transaction() as database:
            for column, text in names.items():
                database.execute(f"{NAMING['files', column]} AND kind = ?", (text, identity, kind))
        return self.needed(kind, identity)

    def remove_file(self, kind: str, identity: str, *, with_plans: bool = False) -> list[Row]:
        """Forget a file, a profile together with its plans if `with_plans`, and the jobs that have ended and answered
        with what goes, but for runs. Returns the rows that went. Raises ServiceError 404, and 409 where a live job
        needs what is to go, or where plans of a profile exist and are not to go.
        """
        row = self.needed(kind, identity)
        plans = (
            self._rows("SELECT * FROM files WHERE kind = 'plan' AND origin = ?", identity) if kind == "profile" else []
        )
        if plans and not with_plans:
            count = f"{len(plans)} plans" if len(plans) > 1 else "a plan"
            called = row["title"] or row["label"]
            message = f"{count} of the profile “{called}” would be without it; delete them too (with_plans=true)"
            raise ServiceError(409, "conflict", message)
        removed = [row, *plans]
        for file in removed:
            self._check_unused(file)
        with self._transaction() as database:
            for file in removed:
                _forget(database, file, runs=False)
        return removed

    def job_using(self, file: str, identity: str, kind: str) -> ServiceJob | None:
        """The latest job of a kind that has succeeded with a file, whose kind is `file`."""
        row = self._get(
            "SELECT jobs.* FROM jobs JOIN uses ON uses.job = jobs.id WHERE uses.kind = ? AND uses.file = ? AND"
            " jobs.kind = ? AND state = 'succeeded' ORDER BY number DESC LIMIT 1",
            file,
            identity,
            kind,
        )
        return None if row is None else self._read(row)

    def files_of(self, job: str) -> list[Row]:
        """The files that a job needs and those that it made."""
        rows = self._rows(
            "SELECT files.* FROM files JOIN uses ON uses.kind = files.kind AND uses.file = files.id WHERE uses.job = ?",
            job,
        )
        return self._readable(rows)

    def _readable(self, rows: Sequence[Row]) -> list[Row]:
        """Those of some files' rows that can be read and shown, whatever is in them; the others are set aside."""
        faults = [_fault(row) for row in rows]
        for row, fault in zip(rows, faults, strict=True):
            if fault is not None:
                self._set_aside(row, str(fault))
        return [row for row, fault in zip(rows, faults, strict=True) if fault is None]

    def _set_aside(self, row: Row, reason: str) -> str:
        """Returns the name under which a file is set aside. Jobs whose answer it was no longer answer."""
        name = f"{row['kind']}-{row['id']}"
        if not FILE.fullmatch(name):
            name = f"file-{hashlib.sha256(repr(_kind_and_id(row)).encode()).hexdigest()[:16]}"
        with self._setting_aside(name, row, reason) as database:
            _forget(database, row, runs=False)
        return name

    def damaged(self, digest: str, reason: str) -> ServiceError:
        """Set aside the files whose object cannot be read; says which they are."""
        names = [self._set_aside(row, reason) for row in self._rows("SELECT * FROM files WHERE digest = ?", digest)]
        files = ", ".join(f"{SET_ASIDE}/{name}.json" for name in names) or "nothing, as it was removed meanwhile"
        return ServiceError(
            404, "not_found", f"{reason}; set aside as {files} in the service's data folder; make it again"
        )

    def digests(self) -> set[str]:
        """Digests of all objects that are kept, those of files that were set aside among them."""
        rows: list[Any] = self._rows("SELECT digest FROM files WHERE digest IS NOT NULL")
        for name in self.set_aside():
            with suppress(OSError, InputError):
                rows.append(read_json(self._path.parent / SET_ASIDE / f"{name}.json"))
        return {row["digest"] for row in rows if isinstance(row, dict) and isinstance(row.get("digest"), str)}

    def stored_bytes(self) -> int:
        return self._count("SELECT coalesce(sum(stored_bytes), 0) AS n FROM files")

    def count_cache(self, rows: Sequence[Row]) -> None:
        """The files of the cache are these: those that are new count from now on, those that are gone no longer."""
        stored = {row["id"]: row["stored_bytes"] for row in self.files("cache", limit=1 << 30).items}
        present = {row["id"]: row["stored_bytes"] for row in rows}
        if stored == present:
            return
        now = time.time()
        with self._transaction() as database:
            database.executemany(
                "DELETE FROM files WHERE kind = 'cache' AND id = ?",
                [(name,) for name, size in stored.items() if present.get(name) != size],
            )
            for row in rows:
                if stored.get(row["id"]) != row["stored_bytes"]:
                    self._add(row, now)

    # --- retention -------------------------------------------------------------------------------------------------

    def touch(self, kind: str, identity: str) -> None:
        """Remember that something was used now; the next `flush` writes it down."""
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
            database.execute("DELETE FROM jobs WHERE state NOT IN ('queued', 'running') AND used < ?", (before,))
            removed += database.execute(
                f"SELECT * FROM files WHERE used < ? AND NOT EXISTS ({live})",  # noqa: S608  constants
                (before,),
            ).fetchall()
            excess = self.stored_bytes() - sum(row["stored_bytes"] for row in removed) - keep_bytes
            removed_files = {(row["kind"], row["id"]) for row in removed}
            candidates = database.execute(
                f"SELECT * FROM files WHERE NOT EXISTS ({unfinished}) ORDER BY used, stored_bytes DESC",  # noqa: S608  constants
            )
            for row in candidates.fetchall() if excess > 0 else []:
                if (row["kind"], row["id"]) in removed_files:
                    continue
                removed.append(row)
                excess -= row["stored_bytes"]
                if excess <= 0:
                    break
            for row in removed:  # a run's result needs neither its profile nor its data nor the cache
                _forget(database, row, runs=row["kind"] not in {"cache", "profile", "upload"})
        return removed

    # --- rows ------------------------------------------------------------------------------------------------------

    def _page(
        self,
        table: str,
        place: str,
        equal: Mapping[str, str | None],
        search: str | None,
        after: str | None,
        limit: int,
        *also: str,
    ) -> Page[Row]:
        """Rows by the column `place`, and by id where that is the same, the last first: those whose columns are `equal`
        to what is given, and for which the conditions of `also` hold.
        """
        conditions: dict[str, tuple[Any, ...]] = {
            f"{column} = ?": (value,) for column, value in equal.items() if value is not None
        }
        if after is not None:
            position, _, identity = after.partition("_")
            conditions[f"({place}, id) < (?, ?)"] = (float(position), identity)
        if search is not None and search.split():
            conditions["mentioned(?, title, note, label, id)"] = (search,)
        conditions |= dict.fromkeys(also, ())
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        rows = self._rows(
            f"SELECT * FROM {table} {where} ORDER BY {place} DESC, id DESC LIMIT ?",  # noqa: S608  constants
            *(value for values in conditions.values() for value in values),
            limit + 1,
        )
        last = rows[limit - 1] if len(rows) > limit else None
        return Page(items=rows[:limit], next=None if last is None else f"{last[place]!r}_{last['id']}")

    def _get(self, statement: str, *values: Any) -> Row | None:
        row: Row | None = self._database.execute(statement, values).fetchone()
        return row

    def _count(self, statement: str, *values: Any) -> int:
        """The column `n` of a statement's single row."""
        figure: int = self._database.execute(statement, values).fetchone()["n"]
        return figure

    def _rows(self, statement: str, *values: Any) -> list[Row]:
        return self._database.execute(statement, values).fetchall()


def file_row(
    kind: str,
    identity: str,
    written: StoredObject,
    *,
    name: str,
    summary: Row,
    origin: str | None = None,
    paths: Row | None = None,
) -> Row:
    """The row of a staged object for `JobStore.add`."""
    return {
        "kind": kind,
        "id": identity,
        "digest": written.digest,
        "staged": written.staged,
        "bytes": written.bytes,
        "stored_bytes": written.stored_bytes,
        "name": name,
        "origin": origin,
        "summary": json.dumps(summary),
        "paths": None if paths is None else json.dumps(paths),
    }


def upload_row(written: StoredObject, name: str) -> Row:
    """The row of a staged file of samples: under another name it is another upload."""
    identity = hashlib.sha256(f"{written.digest} {name}".encode()).hexdigest()
    return file_row("upload", identity, written, name=name, summary={})


def folder_row(identity: str, size: int) -> Row:
    """The row of a run's folder for `JobStore.add`; it has no object, as the folder lies beside the objects."""
    return _without_object("folder", identity, f"folder of {identity}", size)


def cache_row(name: str, size: int) -> Row:
    """The row of a file of the service's cache for `JobStore.add`; it has no object either."""
    return _without_object("cache", name, name, size)


def _without_object(kind: str, identity: str, name: str, size: int) -> Row:
    sizes = {"digest": None, "bytes": size, "stored_bytes": size}
    return {"kind": kind, "id": identity, "name": name, "origin": None, "summary": "{}", "paths": None, **sizes}


def content_key(kind: str, request: Row) -> str:
    """Fingerprint of a request: equal requests share one job, unless its answer is a file of a version that is no
    longer read.
    """
    return _hash(kind, request | {"versions": [PROFILE_VERSION, PLAN_VERSION]})


def _hash(kind: str, request: Row) -> str:
    return hashlib.sha256(json.dumps([kind, request], sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _mentioned(search: str, *texts: str | None) -> bool:
    """Whether every word of `search` stands in some of the texts, in capitals or not."""
    all_texts = "\n".join(text for text in texts if isinstance(text, str)).casefold()
    return all(word in all_texts for word in search.casefold().split())


def _job(row: Row) -> ServiceJob:
    figures = ("id", "kind", "state", "created", "started", "finished", "attempts", "label", "title", "note")
    return ServiceJob(
        **{name: row[name] for name in figures},
        request=json.loads(row["request"]),
        progress=None,
        result=None if row["result"] is None else json.loads(row["result"]),
        error=None if row["error"] is None else Error.model_validate_json(row["error"]),
    )


def _showable(job: ServiceJob) -> ServiceJob:
    """The job itself, once it has been serialised as in a list of jobs. Raises what that raises."""
    Listed(items=[job]).model_dump_json()
    return job


def listed(row: Mapping[str, Any]) -> StoredFile:
    """A file as it is listed. Raises whatever reading and showing it raises."""
    kind, summary = row["kind"], json.loads(row["summary"])
    for name in IN_SUMMARY.get(kind, ()):
        summary[name]
    figures = {name: row[name] for name in ("id", "name", "created", "bytes", "label", "title", "note")}
    figures |= {field: row["origin"] for of, field in ORIGINS.items() if of == kind}
    return StoredFile(**figures, summary=summary)


def _fault(row: Row) -> Exception | None:
    """Why a file's row cannot be read or shown; None where it can."""
    try:
        FileRow(**row).model_dump_json()
        if row["kind"] not in OF_JOBS:
            listed(row)
    except Exception as error:
        return error
    return None


def _kind_and_id(row: Row) -> dict[str, bytes]:
    """Kind and id of a file's row, whatever is in them, for statements that compare them with bytes."""
    kind, identity = (
        value if isinstance(value, bytes) else str(value).encode(errors="surrogateescape")
        for value in (row["kind"], row["id"])
    )
    return {"kind": kind, "id": identity}


def _forget(database: sqlite3.Connection, row: Row, *, runs: bool) -> None:
    """Remove a file's row, and the jobs that have ended and cannot answer without it; those whose results are folders
    of their own, runs and what was merged of them, only if `runs`, together with the rows of these folders.
    """
    of_file = "kind IN (:kind, CAST(:kind AS TEXT)) AND {} IN (:id, CAST(:id AS TEXT))"
    gone = database.execute(
        f"DELETE FROM jobs WHERE id IN (SELECT job FROM uses WHERE {of_file.format('file')})"  # noqa: S608  constants
        f" AND state NOT IN ('queued', 'running') AND (:runs OR kind NOT IN ('run', 'merge')) RETURNING id",
        _kind_and_id(row) | {"runs": runs},
    ).fetchall()
    database.execute(f"DELETE FROM files WHERE {of_file.format('id')}", _kind_and_id(row))  # noqa: S608  constants
    database.executemany("DELETE FROM files WHERE kind = 'folder' AND id = ?", [(job["id"],) for job in gone])


def _row(cursor: sqlite3.Cursor, values: tuple[Any, ...]) -> Row:
    return {column[0]: value for column, value in zip(cursor.description, values)}
