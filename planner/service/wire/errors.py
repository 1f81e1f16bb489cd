"""Errors over HTTP: one form of answer, with a code for programs, a sentence for people, and the fields that were
wrong.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from tightfit.runtime.common.errors import CapError, InfeasibleError, InputError, RunError, TightfitError

Code = Literal[
    "invalid_request",  # 422, or 400 where the body is no JSON
    "unauthorized",  # 401
    "forbidden",  # 403
    "not_found",  # 404
    "method_not_allowed",  # 405
    "request_timeout",  # 408: the headers or the body did not come in time
    "conflict",  # 409: the state of the job, or an idempotency key used for something else
    "too_large",  # 413
    "unsupported_media_type",  # 415
    "misdirected",  # 421: a Host that is not ours
    "busy",  # 429: too many jobs wait, or uploads are under way; 503: too many connections are at work
    "internal",  # 500
    "storage",  # 507: the data folder's disk is full, or cannot be written; a job waits for room instead
    # Of jobs, not of requests:
    "input",  # the library refused the input
    "infeasible",  # a run of a plan without a schedule
    "run_failed",
    "cap_passed",
    "worker_died",  # killed, or out of memory
    "too_slow",  # the job's time is over
    "interrupted",  # the service ended meanwhile
]


DISK = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN})
"""results of SQLite that come from the disk"""


class ServiceError(TightfitError):
    """An answer other than 2xx. `field` is the part of the request that was wrong, such as ``body.memory``."""

    def __init__(self, status: int, code: Code, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code: Code = code
        self.field = field

    @property
    def fields(self) -> list[tuple[str, str]]:
        """The field that was wrong, if one was, with what was wrong with it."""
        return [] if self.field is None else [(self.field, str(self))]


class UnreadableError(InputError):
    """What is stored as the object `digest` is not what was written: lost, cut off or changed on disk."""

    def __init__(self, digest: str, why: str) -> None:
        super().__init__(f"what is stored as {digest[:12]}… cannot be read ({why})")
        self.digest = digest


class StorageError(RunError):
    """The data folder's disk is full, or cannot be written: nothing was wrong with what was asked."""


@contextlib.contextmanager
def failing_disk(path: Path) -> Iterator[None]:
    """Raises StorageError, naming `path`, where the disk or the rights there do not allow what is done inside."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; free disk space and try again") from error
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in DISK:
            raise
        raise StorageError(f"{path}: {error}; free disk space and try again") from error


JOB_ERRORS: dict[type[TightfitError], Code] = {
    InputError: "input",
    InfeasibleError: "infeasible",
    RunError: "run_failed",
    CapError: "cap_passed",
    StorageError: "storage",
}
"""exception that makes a job fail -> the code of its error, for which a client raises the same exception"""


def error_json(code: Code, message: str, fields: Sequence[tuple[str, str]] = ()) -> bytes:
    """An answer's body that says what was wrong (`wire.schema.ErrorAnswer`), and in which fields. ASCII: what was sent
    may hold what cannot be encoded.
    """
    faults = [{"field": field, "message": text} for field, text in fields]
    return json.dumps({"error": {"code": code, "message": message, "fields": faults}}).encode()


def not_found(what: str, name: str, why: str = "it may have been removed by retention") -> ServiceError:
    return ServiceError(404, "not_found", f"there is no {what} {name!r}; {why}")


def invalid(field: str, message: str) -> ServiceError:
    return ServiceError(422, "invalid_request", message, f"body.{field}" if field else "body")
