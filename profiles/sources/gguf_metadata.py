"""Reads the header of a GGUF file: its metadata, which are key-value pairs, and where its tensors lie.

The gguf package's reader keeps several arrays for each string, about 1.6 KB: 160 MiB for the 98,000 strings of
SmolLM2's tokenizer. Of this reader's, a long list of texts stays in the file until it is asked for. It uses the
standard library only, because the process that prepares a run reads tokenizers with it.
"""

from __future__ import annotations

import array
import hashlib
import itertools
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's number of a value type -> format letter of `struct` (values are little-endian)."""
STRING, ARRAY = 8, 9
MOST_PAIRS = 1 << 16
MOST_DIMENSIONS = 4
"""those that llama.cpp's tensors have"""
ALIGNMENT = 32
"""bytes, where the metadata name none"""
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""GGUF's number of a tensor type -> (name, elements and bytes of a block), as ggml.h has them."""
LONG = 1024
"""texts of a list that is not kept in memory"""
BLOCK = 1 << 16
MARKED = 256
"""Of each so many-th text of such a list the place in the file is known."""
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class MetadataValue:
    """A value of the metadata; `kind` and `inner` (of a list's elements) are GGUF's numbers of types."""

    value: Any
    kind: int
    inner: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufEntry:
    """Where a file has a tensor."""

    name: str
    kind: str
    """The name of its type."""
    shape: tuple[int, ...]
    """Rows first, as PyTorch has it."""
    start: int
    """Its first byte in the file."""
    bytes: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    metadata: dict[str, Any]
    """As of `read_metadata`."""
    tensors: list[GgufEntry]
    bytes: int
    """Where the tensors' data begin."""


def read_header(path: Path) -> GgufHeader:
    """What a model is made from. Raises InputError as `read_metadata`, and if the file ends before a tensor does."""
    try:
        with open_regular(path) as file:
            return _Header(path, file).read_header()
    except (OSError, ValueError, struct.error) as error:
        raise _unreadable(path, error) from error


class TextList(Sequence[str]):
    """A long list of texts, read from the file at each use. Raises InputError where the file cannot be read any
    more.
    """

    def __init__(self, path: Path, count: int, places: array.array[int]) -> None:
        self._path, self._count, self._places = path, count, places

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return self._from(0)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self)[index]
        if not -self._count <= index < self._count:
            raise IndexError(f"text {index} of {self._count}")
        index %= self._count
        return next(itertools.islice(self._from(index // MARKED), index % MARKED, None))

    def _from(self, mark: int) -> Iterator[str]:
        try:
            with open_regular(self._path) as file:
                file.seek(self._places[mark])
                for _ in range(self._count - mark * MARKED):
                    size = _LENGTH.unpack(file.read(_LENGTH.size))[0]
                    text = file.read(size)
                    if len(text) < size:
                        raise ValueError("it ends inside its header")
                    yield str(text, "utf-8")
        except (OSError, ValueError, struct.error) as error:
            raise _unreadable(self._path, error) from error


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key of the header with its value: numbers, strings, lists of strings (long ones as `TextList`) and lists of
    numbers (as arrays).

    Raises InputError if the file cannot be read, is truncated, or is not a GGUF file of a known version.
    """
    return {key: typed.value for key, typed in read_typed(path).items()}


def read_with_digest(path: Path) -> tuple[dict[str, Any], str, int]:
    """The same, with a digest of all of it and its bytes. Raises InputError as `read_metadata` does."""
    try:
        with open_regular(path) as file:
            pairs = _Header(path, file).read()
            left = size = file.tell()
            digest = hashlib.sha256()
            file.seek(0)
            while block := file.read(min(left, BLOCK)):
                digest.update(block)
                left -= len(block)
    except (OSError, ValueError, struct.error) as error:
        raise _unreadable(path, error) from error
    return {key: typed.value for key, typed in pairs.items()}, digest.hexdigest(), size


def read_typed(path: Path) -> dict[str, MetadataValue]:
    """Every key with its value and the types of that."""
    try:
        with open_regular(path) as file:
            return _Header(path, file).read()
    except (OSError, ValueError, struct.error) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: not a readable GGUF file ({error}); it is truncated or damaged, download it again")


class _Header:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        self._tensors = 0

    def read_header(self) -> GgufHeader:
        metadata = {key: typed.value for key, typed in self.read().items()}
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment {alignment!r}, which is no power of two")
        described = [self._tensor() for _ in range(self._tensors)]
        start = -(-self._file.tell() // alignment) * alignment
        tensors = {tensor.name: self._placed(tensor, start) for tensor in described}
        if len(tensors) != len(described):
            raise ValueError("two of its tensors have the same name")
        return GgufHeader(metadata=metadata, tensors=list(tensors.values()), bytes=start)

    def _tensor(self) -> GgufEntry:
        """The next description of a tensor; `start` is counted from where the data begin."""
        name, dimensions = self._string(), self._number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} with {dimensions} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        number = self._number("I")
        if number not in TYPES:
            raise ValueError(f"tensor {name!r} of type {number}, which is not known")
        kind, elements, size = TYPES[number]
        if shape[-1] % elements:
            raise ValueError(f"tensor {name!r} with rows of {shape[-1]}, which are no whole number of {kind}'s blocks")
        return GgufEntry(
            name=name, kind=kind, shape=shape, start=self._number("Q"), bytes=math.prod(shape) // elements * size
        )

    def _placed(self, tensor: GgufEntry, start: int) -> GgufEntry:
        placed = replace(tensor, start=start + tensor.start)
        if placed.start + placed.bytes > self._size:
            raise ValueError(
                f"it ends at byte {self._size}, tensor {tensor.name!r} at byte {placed.start + placed.bytes}"
            )
        return placed

    def read(self) -> dict[str, MetadataValue]:
        if self._bytes(4) != MAGIC:
            raise ValueError("GGUF magic invalid")
        version = self._number("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, versions 2 and 3 are known")
        self._tensors, count = self._number("Q"), self._number("Q")
        if count > MOST_PAIRS:
            raise ValueError(f"{count} keys in its header")
        values: dict[str, MetadataValue] = {}
        for _ in range(count):
            key = self._string()
            if key in values:
                raise ValueError(f"the key {key!r} twice")
            values[key] = self._value(self._number("I"))
        return values

    def _value(self, kind: int) -> MetadataValue:
        if kind == STRING:
            return MetadataValue(value=self._string(), kind=kind)
        if kind == ARRAY:
            inner, count = self._number("I"), self._number("Q")
            return MetadataValue(value=self._list(inner, count), kind=kind, inner=inner)
        return MetadataValue(value=self._number(_letter(kind)), kind=kind)

    def _list(self, kind: int, count: int) -> Any:
        if count > self._size:  # an element takes at least a byte
            raise ValueError(f"a list of {count} elements in {self._size} bytes")
        if kind == STRING:
            return self._texts(count) if count > LONG else [self._string() for _ in range(count)]
        letter = _letter(kind)
        data = self._bytes(count * struct.calcsize(letter))
        if letter == "?":
            return [bool(byte) for byte in data]
        numbers = array.array(letter)
        numbers.frombytes(data)
        return numbers

    def _texts(self, count: int) -> TextList:
        """A long list of texts, each of which is looked at and not kept."""
        places, place = array.array("Q"), self._file.tell()
        read = self._file.read
        for number in range(count):
            if number % MARKED == 0:
                places.append(place)
            place += _LENGTH.size
            size = _LENGTH.unpack(read(_LENGTH.size))[0] if place <= self._size else 0
            place += size
            if place > self._size:
                raise self._too_short()
            str(read(size), "utf-8")
        return TextList(self._path, count, places)

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._bytes(struct.calcsize(letter)))[0]

    def _string(self) -> str:
        return str(self._bytes(self._number("Q")), "utf-8")

    def _bytes(self, count: int) -> bytes:
        """The next `count` bytes. Raises ValueError if the file ends before that."""
        if count > self._size - self._file.tell():
            raise self._too_short()
        return self._file.read(count)

    def _too_short(self) -> ValueError:
        return ValueError(f"it ends at byte {self._size}, inside its header")


def _letter(kind: int) -> str:
    if kind not in NUMBERS:
        raise ValueError(f"a value of type {kind}")
    return NUMBERS[kind]
