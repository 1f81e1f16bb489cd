"""Reads the lines of JSON that were added to a file since the last look, while another process writes it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any


class NewLines:
    """Each iteration yields the objects of the lines that are new since the one before; a line without an end waits.

    A file that was replaced or cut, as ``metrics.jsonl`` is when a run is resumed, is read from its beginning again.
    """

    def __init__(self, path: str | os.PathLike[str], *, skip: bool = False) -> None:
        """With `skip`, what is in the file now is not new."""
        self._path = path
        self._read, self._inode = 0, 0
        if skip and os.path.exists(path):
            status = os.stat(path)
            self._read, self._inode = status.st_size, status.st_ino

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            file = open(self._path, "rb")  # noqa: SIM115  the block below closes it
        except FileNotFoundError:
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._read:
                self._read, self._inode = 0, status.st_ino
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                yield json.loads(line)
