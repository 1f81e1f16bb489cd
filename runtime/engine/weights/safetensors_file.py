"""Writes and reads safetensors files in chunks, without holding them in memory.

The format is https://github.com/huggingface/safetensors#format: 8 bytes header length, JSON header, data. The training
process does not import the package itself.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import WriteBehind, check_regular, forget, write_all
from tightfit.runtime.common.strict_json import from_json

DTYPES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
WRITE_BEHIND_BYTES = 4 << 20
LARGEST_HEADER = 100_000_000
"""bytes, the format's own limit; of a longer header, or one that ends behind its file, nothing is read"""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}


@dataclass(frozen=True, kw_only=True)
class TensorItem:
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


def write(
    path: str, items: Callable[[], Iterable[TensorItem]], metadata: Mapping[str, str], behind: int = WRITE_BEHIND_BYTES
) -> int:
    """Write and fsync `path`; returns the crc32 of the file. Raises OSError if the disk refuses.

    `items()` is called twice, once for the header: a list of a deep model's items would take megabytes. After every
    `behind` bytes the data are flushed and dropped from the page cache, which a cgroup counts as its processes'
    memory.
    """
    text = _header(items(), metadata)
    length = len(text).to_bytes(8, "little")
    checksum = zlib.crc32(text, zlib.crc32(length))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        write_all(descriptor, length)
        write_all(descriptor, text)
        del text
        waiting = WriteBehind(descriptor, behind)
        for item in items():
            for chunk in item.chunks():
                write_all(descriptor, chunk)
                checksum = zlib.crc32(chunk, checksum)
                waiting.wrote(len(chunk))
        waiting.finish()
    finally:
        os.close(descriptor)
    return checksum


def _header(items: Iterable[TensorItem], metadata: Mapping[str, str]) -> bytearray:
    text, end = bytearray(b'{"__metadata__":' + _json(dict(metadata))), 0
    for item in items:
        entry = {"dtype": DTYPES[item.dtype], "shape": item.shape, "data_offsets": [end, end + item.bytes]}
        text += b"," + _json(item.name) + b":" + _json(entry)
        end += item.bytes
    text += b"}"
    text += b" " * (-len(text) % 8)
    return text


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def header_in(descriptor: int) -> bytes:
    """The header of an open safetensors file, as text: what every reader of such files asks for first, before a library
    does.

    Raises ValueError, which says what is wrong, for one that is too long, ends behind the file or is no JSON object.
    """
    size, length = os.fstat(descriptor).st_size, int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if 8 + length > size or length > LARGEST_HEADER:
        raise ValueError(
            f"its header would have {length} bytes, the file has {size}, and {LARGEST_HEADER} are the most"
        )
    text = os.pread(descriptor, length, 8)
    if text[:1] != b"{" or text.rstrip()[-1:] != b"}":
        raise ValueError("its header is no JSON object")
    return text


class SafetensorsReader:
    """Reads a file that `write` made. Raises InputError if it is missing or its header is damaged; `verify` checks the
    rest. `advice` ends the messages: what to do about a file that is missing or damaged.

    The header is kept as text and searched for names: parsed, that of a deep model would take megabytes.
    """

    def __init__(self, path: str, advice: str = "remove this checkpoint and resume from the one before") -> None:
        self.path, self.advice = path, advice
        try:
            check_regular(path)
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; {advice}") from error
        try:
            self._header = header_in(self._descriptor)
        except ValueError as error:
            os.close(self._descriptor)
            raise InputError(f"{path}: damaged header ({error}); {advice}") from error
        self._start = 8 + len(self._header)
        self._last = 0

    def __contains__(self, name: str) -> bool:
        return self._find(name) >= 0

    def _find(self, name: str) -> int:
        """Index in the header at which a tensor's entry begins, or -1.

        The search starts at the entry found last, since tensors are mostly asked for in file order.
        """
        key = _json(name) + b":{"
        for first in (self._last, 0):
            index = self._header.find(key, first)
            while index > 0 and self._header[index - 1] not in b"{,":  # part of a longer name that has a quotation mark
                index = self._header.find(key, index + 1)
            if index > 0:
                self._last = index
                return index + len(key) - 1
        return -1

    def chunks(self, name: str, size: int = 1 << 20, *, begin: int = 0, count: int | None = None) -> Iterator[bytes]:
        """The bytes of a tensor, or `count` of them from `begin` on, at most `size` at a time. Raises InputError if it
        is not there or truncated.
        """
        first, end = self._entry(name)["data_offsets"]
        position = first + begin
        end = end if count is None else min(end, position + count)
        while position < end:
            data = os.pread(self._descriptor, min(size, end - position), self._start + position)
            if not data:
                raise InputError(f"{self.path}: truncated in tensor {name!r}; {self.advice}")
            yield data
            position += len(data)

    def described(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The type of a tensor, such as "F32", and its shape. Raises InputError if it is not there."""
        entry = self._entry(name)
        return entry["dtype"], tuple(entry["shape"])

    def _entry(self, name: str) -> dict[str, Any]:
        index = self._find(name)
        if index < 0:
            raise InputError(f"{self.path}: no tensor {name!r}; the checkpoint belongs to another model")
        entry: dict[str, Any] = from_json(self._header[index : self._header.index(b"}", index) + 1])
        return entry

    def verify(self, crc: int) -> None:
        checksum, position = 0, 0
        while data := os.pread(self._descriptor, 1 << 18, position):
            checksum = zlib.crc32(data, checksum)
            position += len(data)
        if checksum != crc:
            raise InputError(f"{self.path}: damaged (checksum {checksum:08x}, expected {crc:08x}); {self.advice}")
        forget(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)
