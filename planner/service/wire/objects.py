"""Content-addressed files: JSON and archives, compressed, each under the sha256 of what it holds.

Whatever process makes one writes it whole into the folder ``tmp`` (`put`). The service alone places it under its
checksum, in the transaction in which it adds the row that refers to it, and removes it in the thread in which it has
removed the last such row: an upload never meets the deletion of what it repeats. A kill at any moment leaves at most
files that nothing refers to; `ObjectStore.sweep` removes them when the service starts.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import IO

from tightfit.planner.service.wire.errors import ServiceError, UnreadableError, failing_disk
from tightfit.runtime.common.files import sync_directory

CHUNK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    digest: str
    """sha256 of the content"""
    bytes: int
    """size of the content"""
    stored_bytes: int
    """size on disk, compressed"""
    staged: str
    """name in the folder ``tmp`` until a row refers to it"""


class ObjectStore:
    """The files under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        with failing_disk(folder):
            self.temporary.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self.folder / digest[:2] / digest[2:]

    def put(self, content: bytes) -> StoredObject:
        """Write `content` for a row that is to be added. Raises StorageError where the disk refuses."""
        return self.put_chunks([content])

    def put_chunks(self, chunks: Iterable[bytes]) -> StoredObject:
        digest, size = hashlib.sha256(), 0
        staged = self.temporary / f"{os.getpid()}-{os.urandom(6).hex()}"
        with failing_disk(self.folder):
            try:
                with staged.open("wb") as raw, gzip.GzipFile("", "wb", 5, raw, mtime=0) as packed:
                    for chunk in chunks:
                        digest.update(chunk)
                        size += len(chunk)
                        packed.write(chunk)
                    packed.close()
                    raw.flush()
                    os.fsync(raw.fileno())
                    stored = raw.tell()
            except BaseException:
                staged.unlink(missing_ok=True)
                raise
        return StoredObject(digest=digest.hexdigest(), bytes=size, stored_bytes=stored, staged=staged.name)

    def place(self, digest: str, staged: str) -> None:
        """Put a file of ``tmp``, which stays there, under its checksum. Raises OSError where the disk refuses."""
        path, source, second = self.path(digest), self.temporary / staged, self.temporary / f"{staged}-placed"
        path.parent.mkdir(exist_ok=True)
        second.unlink(missing_ok=True)
        try:
            second.hardlink_to(source)
        except OSError:  # a file system without links
            copyfile(source, second)
            with second.open("rb") as file:
                os.fsync(file.fileno())
        second.rename(path)  # over what is there, too: it may be damaged
        second.unlink(missing_ok=True)  # where that was the same file
        sync_directory(path.parent)
        sync_directory(self.folder)

    def unstage(self, staged: str) -> None:
        """Remove a file of ``tmp`` whose row is in the database."""
        (self.temporary / staged).unlink(missing_ok=True)

    def read(self, digest: str) -> bytes:
        """The content. Raises UnreadableError where it is not what was written."""
        return b"".join(self.unpack(digest))

    def packed(self, digest: str) -> bytes:
        """The content as it lies there: gzip."""
        return self.path(digest).read_bytes()

    def unpack(self, digest: str) -> Iterator[bytes]:
        """The content, piece by piece. Raises UnreadableError, at its end at the latest, where it is not what was
        written.
        """
        checksum = hashlib.sha256()
        try:
            with gzip.open(self.path(digest)) as file:
                while chunk := file.read(CHUNK):
                    checksum.update(chunk)
                    yield chunk
        except (FileNotFoundError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UnreadableError(digest, str(error)) from error
        if checksum.hexdigest() != digest:
            raise UnreadableError(digest, "its checksum is another one")

    def check(self, digest: str) -> None:
        """Raises UnreadableError where the content is not what was written."""
        for _ in self.unpack(digest):
            pass

    def remove(self, digest: str) -> None:
        with suppress(FileNotFoundError):
            self.path(digest).unlink()

    def sweep(self, wanted: set[str]) -> int:
        """Remove what is not `wanted` and what was left half-written; returns how many files."""
        removed = 0
        for path in self.folder.glob("*/*"):
            if path.parent == self.temporary or path.parent.name + path.name not in wanted:
                with suppress(OSError):
                    path.unlink()
                    removed += 1
        return removed


def unpacked(file: IO[bytes], encoding: str, limit: int) -> Iterator[bytes]:
    """What a file with the `encoding` identity or gzip holds, piece by piece, at most `limit` bytes.

    Raises ServiceError for what is larger, cut off or no gzip.
    """
    unpacker = zlib.decompressobj(wbits=31) if encoding == "gzip" else None
    size = 0
    while chunk := file.read(CHUNK):
        while chunk and not (unpacker is not None and unpacker.eof):
            try:
                piece = chunk if unpacker is None else unpacker.decompress(chunk, CHUNK)
            except zlib.error as error:
                raise _no_gzip("not gzip, or damaged") from error
            chunk = b"" if unpacker is None else unpacker.unconsumed_tail
            size += len(piece)
            if size > limit:
                raise ServiceError(413, "too_large", f"the body unpacks to more than {limit} bytes", "body")
            yield piece
    if unpacker is not None and not unpacker.eof:
        raise _no_gzip("cut off")


def _no_gzip(why: str) -> ServiceError:
    return ServiceError(400, "invalid_request", f"the body is said to be gzip, but is {why}", "body")
