"""Safetensors files, written and read in chunks: 8 bytes header length, JSON header, data.

The format is https://github.com/huggingface/safetensors#format; the package itself is left out of the lean process.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from profiles.errors import InputError
from profiles.files import write_all

DTYPES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One tensor to write; `chunks` yields its bytes in order."""

    name: str
    dtype: str
    shape: list[int]
    chunks: Callable[[], Iterable[memoryview | bytes]]

    @property
    def bytes(self) -> int:
        size = ITEM_BYTES[self.dtype]
        for length in self.shape:
            size *= length
        return size


def write(path: str, items: Iterable[Item], metadata: Mapping[str, str]) -> int:
    """Write and fsync `path`; returns the crc32 of the file. Raises OSError where the disk refuses."""
    items = list(items)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for item in items:
        header[item.name] = {"dtype": DTYPES[item.dtype], "shape": item.shape, "data_offsets": [end, end + item.bytes]}
        end += item.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    checksum = zlib.crc32(head)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        write_all(descriptor, head)
        for item in items:
            for chunk in item.chunks():
                write_all(descriptor, chunk)
                checksum = zlib.crc32(chunk, checksum)
        os.fsync(descriptor)
        _forget(descriptor)
    finally:
        os.close(descriptor)
    return checksum


class Reader:
    """Reads one file; `crc` is checked by `verify`. Raises InputError where it is damaged."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror}; the checkpoint is incomplete, remove its directory and resume from the one before"
            ) from error
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        try:
            self.header: dict[str, Any] = json.loads(os.pread(self._descriptor, length, 8)) if length < 1 << 26 else {}
            self.metadata: dict[str, str] = self.header.pop("__metadata__", {})
        except ValueError as error:
            raise InputError(
                f"{path}: damaged header; remove this checkpoint and resume from the one before"
            ) from error
        self._start = 8 + length

    def chunks(self, name: str, size: int = 1 << 20) -> Iterator[bytes]:
        """The bytes of a tensor."""
        if name not in self.header:
            raise InputError(f"{self.path}: no tensor {name!r}; the checkpoint belongs to another model")
        place, end = self.header[name]["data_offsets"]
        while place < end:
            data = os.pread(self._descriptor, min(size, end - place), self._start + place)
            if not data:
                raise InputError(
                    f"{self.path}: truncated in tensor {name!r}; remove this checkpoint and resume from the one before"
                )
            yield data
            place += len(data)

    def verify(self, crc: int) -> None:
        found, place = 0, 0
        while data := os.pread(self._descriptor, 1 << 18, place):
            found = zlib.crc32(data, found)
            place += len(data)
        if found != crc:
            raise InputError(
                f"{self.path}: damaged (checksum {found:08x}, expected {crc:08x}); remove this checkpoint and resume from the one before"
            )
        _forget(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def _forget(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
