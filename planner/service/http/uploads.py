"""Receives uploads: the body is written to disk as it arrives, and a process of its own parses it and stores the
profile, or the description of a model that is to be traced. Files of samples are stored as they are, but for JSON
lists, which become lines.

A malicious upload can take seconds and gigabytes to parse. In that process time and memory are limited
(`service.jobs.work.upload`), and the service answers others meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import Request
from starlette.requests import ClientDisconnect

from tightfit.planner.service.jobs.orders import UPLOAD, JobOrder, UploadKind
from tightfit.planner.service.jobs.processes import WorkerProcesses, failure
from tightfit.planner.service.jobs.store import JobStore, Row, upload_row
from tightfit.planner.service.wire.errors import ServiceError, StorageError, UnreadableError
from tightfit.planner.service.wire.objects import CHUNK, ObjectStore, StoredObject, unpacked
from tightfit.planner.service.wire.settings import Settings

BYTES_UNDER_WAY = 1 << 30
"""most bytes of all bodies together that have come and are not parsed yet"""
READ_AT_ONCE = 2
"""processes that parse uploads"""
MOST_UNREAD = 64
"""whole bodies that may wait for such a process"""


class Uploads:
    def __init__(self, settings: Settings, store: JobStore, objects: ObjectStore, processes: WorkerProcesses) -> None:
        self._settings, self._store, self._objects = settings, store, objects
        self._processes = processes
        self._readers = asyncio.Semaphore(READ_AT_ONCE)
        self._bytes = self._unread = 0

    async def receive(self, request: Request, kind: UploadKind) -> tuple[Row, bool]:
        """The stored profile or description that the request's body holds, and whether it is new.

        Raises ServiceError for a body that is none, contradicts itself or is too large, and where too much is uploaded
        already; StorageError where the disk is full.
        """
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding not in {"identity", "gzip"}:
            message = f"the content encoding {encoding!r} is not understood; send gzip or none"
            raise ServiceError(415, "unsupported_media_type", message, "header.Content-Encoding")
        async with self._body(request) as path:
            # What is here already, as it is stored, is known by its checksum alone.
            checksum = await asyncio.to_thread(_checksum, path, encoding, self._settings.upload_bytes)
            with contextlib.suppress(UnreadableError):  # then it is stored anew
                if self._store.file(kind, checksum) is not None:
                    await asyncio.to_thread(self._objects.check, checksum)
                    if (known := self._store.file(kind, checksum)) is not None:  # not deleted meanwhile
                        return known, False
            file = await self._read_in_turn(path, encoding, kind)
        new = self._store.file(kind, file["id"]) is None
        return self._store.add(file), new

    async def receive_data(self, request: Request, name: str) -> tuple[Row, bool]:
        """The stored file of samples that the request's body is, and whether it is new. It is read when it is used.

        Raises ServiceError where too much is uploaded already, and StorageError where the disk is full.
        """
        async with self._body(request) as path:
            if not path.stat().st_size:
                raise ServiceError(422, "invalid_request", "the body is empty; send the file's content", "body")
            if name.lower().endswith(".json"):  # may be one list, of which lines are made
                row = await self._read_in_turn(path, "identity", "list", name)
            else:
                row = upload_row(await asyncio.to_thread(self._put, path), name)
        new = self._store.file("upload", row["id"]) is None
        return self._store.add(row), new

    def _put(self, path: Path) -> StoredObject:
        with path.open("rb") as file:
            return self._objects.put_chunks(iter(lambda: file.read(CHUNK), b""))

    async def keep(self, content: bytes, kind: UploadKind) -> Row:
        """Store what the service itself has, as if it had been uploaded."""
        path = self._objects.temporary / f"upload-{os.urandom(6).hex()}"
        try:
            path.write_bytes(content)
            return self._store.add(await self._read_in_turn(path, "identity", kind))
        except OSError as error:
            raise StorageError(f"{self._objects.folder}: {error.strerror}; free disk space and ask again") from error
        finally:
            path.unlink(missing_ok=True)

    async def _read_in_turn(self, path: Path, encoding: str, kind: UploadKind, name: str = "") -> Row:
        """`_read`, when one of the processes has time for it."""
        if self._unread >= MOST_UNREAD:
            raise _busy(f"{self._unread} uploads wait to be read")
        self._unread += 1
        try:
            async with self._readers:
                return await self._read(path, encoding, kind, name)
        finally:
            self._unread -= 1

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[Path]:
        """The request's body in a file, which is gone afterwards."""
        path = self._objects.temporary / f"upload-{os.urandom(6).hex()}"
        received = 0
        try:
            try:
                with path.open("wb") as file:
                    async for chunk in request.stream():
                        if self._bytes + len(chunk) > BYTES_UNDER_WAY:
                            raise _busy(f"{self._bytes >> 20} MiB are being uploaded")
                        received += len(chunk)
                        self._bytes += len(chunk)
                        file.write(chunk)
            except OSError as error:
                message = f"{self._objects.folder}: {error.strerror}; free disk space and ask again"
                raise StorageError(message) from error
            except ClientDisconnect as error:
                raise ServiceError(
                    400, "invalid_request", "the connection ended before the body did", "body"
                ) from error
            yield path
        finally:
            self._bytes -= received
            path.unlink(missing_ok=True)

    async def _read(self, path: Path, encoding: str, kind: UploadKind, name: str) -> Row:
        """The row of what was uploaded, whose object is on disk; samples have a `name`."""
        settings = self._settings
        most = settings.data_bytes if kind == "list" else settings.upload_bytes
        limits = {"bytes": most, "steps": settings.steps, "tensors": settings.tensors}
        order = JobOrder(
            kind="upload",
            request={"path": str(path), "encoding": encoding, "kind": kind, "name": name} | limits,
            objects=str(self._objects.folder),
            memory_bytes=settings.check_bytes,
        )
        try:
            end, last_stderr = await self._processes.ask(UPLOAD, order, settings.check_seconds)
        except TimeoutError:
            message = f"the upload took longer to read than {settings.check_seconds:g} s; send a smaller {kind}"
            raise ServiceError(413, "too_large", message, "body") from None
        if end is None or "result" not in end:
            message = (
                f"the upload takes more than {settings.check_bytes >> 20} MiB of memory to read; send a smaller {kind}"
            )
            too_much = ServiceError(413, "too_large", message, "body")
            raise failure("an upload", end, last_stderr, too_much, self._objects.folder)
        file: Row = end["files"][0]
        return file


def _busy(what: str) -> ServiceError:
    return ServiceError(429, "busy", f"{what} already; ask again in a minute")


def _checksum(path: Path, encoding: str, limit: int) -> str:
    """sha256 of a body as unpacked. Raises ServiceError for one that is too large then, or no gzip."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in unpacked(file, encoding, limit):
            digest.update(chunk)
    return digest.hexdigest()
