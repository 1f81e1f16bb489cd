"""The file of reference log-probabilities, with which DPO compares an adapter: of every answer of a record file of
pairs, by the model with its adapter switched off.

It is computed once, before the first step, for the pairs that the run will see, and lies beside the record file. A
header of JSON padded to `HEADER_BYTES` (`format`, `version`, `pairs`, `fingerprint` of all that the values depend on)
is followed by an entry for each pair: the log-probability of the chosen answer and of the rejected one, float64, and
the crc32 of both. Entries are written in place, in any order, so that a run that is killed meanwhile goes on with those
that are missing.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from tightfit.runtime.common.errors import RunError

FORMAT = "tightfit-references"
VERSION = 1
HEADER_BYTES = 4096
ENTRY = struct.Struct("<ddI")
CHECKED = struct.Struct("<dd")


def references_path(records: str) -> str:
    """The file of a record file's references."""
    return f"{os.path.splitext(records)[0]}.references"


class References:
    """The references of `pairs` pairs, opened to be read and written; `fingerprint` is of all that their values depend
    on, and where a file was written for another one it begins anew. Raises RunError if the disk refuses.
    """

    def __init__(self, path: str, *, pairs: int, fingerprint: Mapping[str, Any]) -> None:
        self.path, self.pairs = path, pairs
        header = {"format": FORMAT, "version": VERSION, "pairs": pairs, "fingerprint": _hash(fingerprint)}
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if not self._holds(header):
                os.ftruncate(self._descriptor, 0)
                os.ftruncate(self._descriptor, HEADER_BYTES + pairs * ENTRY.size)
                os.pwrite(self._descriptor, json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n", 0)
        except OSError as error:
            raise self._refused(error) from error

    def _holds(self, header: Mapping[str, Any]) -> bool:
        """Whether the file is one of this header and of its whole size."""
        try:
            found = json.loads(os.pread(self._descriptor, HEADER_BYTES, 0))
        except ValueError:
            return False
        size = os.fstat(self._descriptor).st_size
        return bool(found == header and size == HEADER_BYTES + self.pairs * ENTRY.size)

    def get(self, pair: int) -> tuple[float, float] | None:
        """(log-probability of the chosen answer, of the rejected one) of a pair; None: they are missing or damaged."""
        entry = os.pread(self._descriptor, ENTRY.size, HEADER_BYTES + pair * ENTRY.size)
        if len(entry) != ENTRY.size:
            return None
        chosen, rejected, checksum = ENTRY.unpack(entry)
        # What was never written is all zeros, whose checksum is not 0.
        return (chosen, rejected) if checksum == zlib.crc32(entry[: CHECKED.size]) else None

    def put(self, pair: int, chosen: float, rejected: float) -> None:
        """Write the log-probabilities of a pair's answers. Raises RunError if the disk refuses."""
        checksum = zlib.crc32(CHECKED.pack(chosen, rejected))
        try:
            os.pwrite(self._descriptor, ENTRY.pack(chosen, rejected, checksum), HEADER_BYTES + pair * ENTRY.size)
        except OSError as error:
            raise self._refused(error) from error

    def sync(self) -> None:
        """Force what was written to disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refused(self, error: OSError) -> RunError:
        return RunError(f"{self.path}: {error.strerror}; free some space and start again")


def _hash(fingerprint: Mapping[str, Any]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
