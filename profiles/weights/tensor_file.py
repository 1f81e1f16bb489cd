"""Reads parts of model files into memory of our own: of a file that is mapped, every page that was touched would count
as this process's. What was read is dropped from the page cache, which a cgroup counts as its processes' memory.

PyTorch is imported only by what returns tensors.
"""

from __future__ import annotations

import math
import os
import struct
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import check_regular, forget, read_all
from tightfit.runtime.common.strict_json import from_json
from tightfit.runtime.engine.weights.safetensors_file import header_in

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 4 << 20
"""bytes of a file, or of a tensor in float32, that are in memory at a time"""
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Types in safetensors files of which tensors can be read -> torch's names."""
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits of an element of every type in safetensors files."""
_LETTERS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B", "BOOL": "?"}
"""Format letters of `struct`; bfloat16 has none."""


class FileParts:
    """A file that is open for as long as this object lives. Raises OSError if it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        check_regular(path)
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.bytes = os.fstat(self.descriptor).st_size
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, start: int, size: int) -> bytearray:
        """`size` bytes from `start` on. Raises InputError if the file ends before that, or cannot be read."""
        content = bytearray(size)
        self.read_into(memoryview(content), start)
        # From the start of the file on, since the kernel keeps a piece of its cache of which this is only a part.
        forget(self.descriptor, 0, start + size)
        return content

    def read_into(self, memory: memoryview, start: int) -> None:
        """Fill `memory` with the bytes from `start` on; they stay in the page cache."""
        try:
            done = read_all(self.descriptor, memory, start)
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror} while reading it; check the disk") from error
        if done < len(memory):
            raise InputError(
                f"{self.path}: it ends at byte {start + done} where {start + len(memory)} is due; it was changed"
                " meanwhile, or is truncated: download it again"
            )

    def chunks(self, start: int, size: int) -> Iterator[memoryview]:
        """The same, a few MiB at a time."""
        for done in range(0, size, PIECE):
            yield memoryview(self.read(start + done, min(PIECE, size - done)))


class TensorFile:
    """A safetensors file that is open for reading. Raises InputError, which ends with `advice`, where it is damaged."""

    def __init__(self, path: Path, advice: str = "download it again") -> None:
        self.path = path
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        """name -> (type under the format's own name, shape)"""
        self._ranges: dict[str, tuple[int, int]] = {}
        """name -> (first byte in the file, number of bytes)"""
        try:
            self._parts = FileParts(path)
            self.header = header_in(self._parts.descriptor)
            self._read_header(from_json(self.header))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{path}: not a readable safetensors file ({reason}); {advice}") from error

    def _read_header(self, header: Mapping[str, Any]) -> None:
        """Check the header against the file as the safetensors package does: no tensor overlaps another, no byte is
        left.
        """
        start = end = 8 + len(self.header)
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        for name, entry in entries:
            dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if dtype not in BITS:
                raise ValueError(f"tensor {name!r} has the unknown type {dtype!r}")
            if not all(isinstance(number, int) and number >= 0 for number in (*shape, first, last)):
                raise ValueError(f"tensor {name!r} has the shape {list(shape)} at bytes {first} to {last}")
            if (last - first) * 8 != math.prod(shape) * BITS[dtype]:
                raise ValueError(f"tensor {name!r}, {dtype} {list(shape)}, would have {last - first} bytes")
            self.tensors[name], self._ranges[name] = (dtype, shape), (start + first, last - first)
        for first, size in sorted(self._ranges.values()):
            if first != end:
                raise ValueError(f"a tensor begins at byte {first} where {end} is due")
            end += size
        if end != self._parts.bytes:
            raise ValueError(f"its tensors end at byte {end}, the file has {self._parts.bytes}")

    @property
    def stat(self) -> os.stat_result:
        return os.fstat(self._parts.descriptor)

    def tensor(self, name: str) -> FileTensor:
        """The tensor `name`, of which parts are read when they are asked for."""
        dtype, shape = self.tensors[name]
        return FileTensor(file=self, name=name, dtype=dtype, shape=shape)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, a few MiB at a time."""
        return self._parts.chunks(*self._ranges[name])

    def content(self, name: str) -> bytes:
        """All bytes of a small tensor."""
        return b"".join(self.chunks(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor of at least two dimensions, or elements of one with less, in the type of the file."""
        dtype, shape = self.tensors[name]
        row_bytes = self._item_bytes(name) * math.prod(shape[1:])
        content = self._parts.read(self._ranges[name][0] + start * row_bytes, (stop - start) * row_bytes)
        return _tensor(content, dtype, (stop - start, *shape[1:]))

    def matrix_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor seen as a matrix with the columns of its last dimension, [stop - start, columns]."""
        dtype, (*_, width) = self.tensors[name]
        row_bytes = self._item_bytes(name) * width
        content = self._parts.read(self._ranges[name][0] + start * row_bytes, (stop - start) * row_bytes)
        return _tensor(content, dtype, (stop - start, width))

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns of a matrix, [rows, stop - start], in the type of the file."""
        dtype, (count, width) = self.tensors[name]
        item_bytes, (first, size) = self._item_bytes(name), self._ranges[name]
        length = (stop - start) * item_bytes
        content = bytearray(count * length)
        with memoryview(content) as memory:
            for row in range(count):
                self._parts.read_into(
                    memory[row * length : (row + 1) * length], first + (row * width + start) * item_bytes
                )
        if stop == width:  # until then each page holds columns that are still to be read
            forget(self._parts.descriptor, 0, first + size)
        return _tensor(content, dtype, (count, stop - start))

    def _item_bytes(self, name: str) -> int:
        """Bytes of an element. Raises InputError for a type that PyTorch's kernels do not read."""
        dtype, _ = self.tensors[name]
        if dtype not in TORCH_NAMES:
            raise InputError(
                f"{self.path}: tensor {name!r} is {dtype}, which cannot be read; use the model's 16-bit weights"
            )
        return BITS[dtype] // 8


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """A tensor in a safetensors file."""

    file: TensorFile
    name: str
    dtype: str
    """Its type under the format's own name."""
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.file.rows(self.name, start, stop)

    def matrix_rows(self, start: int, stop: int) -> Tensor:
        return self.file.matrix_rows(self.name, start, stop)

    def columns(self, start: int, stop: int) -> Tensor:
        return self.file.columns(self.name, start, stop)

    def whole(self) -> Tensor:
        return self.file.rows(self.name, 0, self.shape[0] if self.shape else 1).view(self.shape)

    def content(self) -> bytes:
        return self.file.content(self.name)

    def numbers(self) -> list[float]:
        """The values of a small tensor, without PyTorch. Raises InputError for a type that has no number in Python."""
        content = self.content()
        if self.dtype == "BF16":
            content = b"".join(b"\0\0" + content[place : place + 2] for place in range(0, len(content), 2))
        letter = _LETTERS.get("F32" if self.dtype == "BF16" else self.dtype)
        if letter is None:
            raise InputError(f"{self.file.path}: tensor {self.name!r} is {self.dtype}, which cannot be read")
        return [number for (number,) in struct.iter_unpack(f"<{letter}", content)]


def contents(values: Tensor) -> memoryview:
    """A copy of the bytes of a tensor."""
    import torch

    flat = values.contiguous().view(-1).view(torch.uint8)
    content = bytearray(flat.numel())
    if content:
        torch.frombuffer(content, dtype=torch.uint8).copy_(flat)
    return memoryview(content)


def _tensor(content: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    import torch

    kind = getattr(torch, TORCH_NAMES[dtype])
    return torch.frombuffer(content, dtype=kind).view(shape) if content else torch.empty(shape, dtype=kind)
