"""The file format of the packed weight store: reads its header, and finds the bytes of a tensor or of some of its rows.

Layout, little-endian::

    [0, 32)        magic "TIGHTFIT", uint32 version, header bytes, segments, crc32 of header and table, zeros
    [32, ..)       header: JSON without spaces, with `name`, `config`, `source`,
                   `tensors` {name: [shape, format, group, offset, segment]}
    [.., ..)       checksum table: uint32 crc32 of every segment of every tensor
    offset         the tensors, each 4096-aligned, padded with zeros to a multiple of 4096

A tensor is stored as a matrix of `rows` records of `row_bytes` each: its first dimension by all others; a vector is one
row. So a range of rows is contiguous, and a single row can be gathered. ``w[a:b]`` names the rows [a, b) of w. Formats
of a record, where q is a code of the group, and nibbles are ceil(group / 2) bytes, element 2j low, 2j + 1 high::

    q4             per group: nibbles, float16 scale, float16 min; q * scale + min
    q4_zero        per group: nibbles, float16 scale, uint8 zero; (q - zero) * scale (GPTQ, AWQ)
    nf4            per group: nibbles, float32 scale; NF4[q] * scale, of the 16 values in `NF4` (bitsandbytes)
    q8             per group: float16 scale, `group` int8; q * scale
    int8           per group: float32 scale, `group` int8; q * scale * INT8_STEP (LLM.int8 of bitsandbytes)
    q5_0 to q6_k, mxfp4   the blocks of llama.cpp's types of these names, byte for byte (ggml-common.h), in `BLOCKS`
    float32, bfloat16, float16, int64, int32, uint8, bool    the elements

This module is imported by the budgeted process, and by the one that prepares a run: the standard library only.
"""

from __future__ import annotations

import array
import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from sys import intern
from typing import Any

from tightfit.runtime.common.errors import InputError

MAGIC = b"TIGHTFIT"
VERSION = 2
PREAMBLE = struct.Struct("<8sIIII8x")
ALIGNMENT = 4096
SEGMENT_BYTES = 128 * 1024
"""A checksum covers at most this many bytes, or one row if that is longer."""

ELEMENT_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}
"""Bytes per element of the unquantised formats, which have the names of torch's dtypes."""
_JSON = json.JSONDecoder()
_SLICE = re.compile(r"(.+)\[(\d+):(\d+)\]")


BLOCKS = {
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "mxfp4": (32, 17),
}
"""Formats whose groups are llama.cpp's blocks: (elements, bytes) of one."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The values of NF4's codes, all float32 numbers (Dettmers et al. 2023, "QLoRA", appendix E)."""
MXFP4 = (*(0, 1, 2, 3, 4, 6, 8, 12), *(0, -1, -2, -3, -4, -6, -8, -12))
"""Twice the values of MXFP4's codes (OCP Microscaling Formats 1.0, FP4 E2M1), as in llama.cpp's kvalues_mxfp4."""
INT8_STEP = 7.874015718698502e-3
"""1 / 127 in float32: the second factor of bitsandbytes' `int8_vectorwise_dequant`."""
_GROUP_BYTES = {"q4": 4, "q4_zero": 3, "nf4": 4, "q8": 2, "int8": 4}
"""Bytes of a group in addition to its codes, by format."""
QUANTISED = (*_GROUP_BYTES, *BLOCKS)
"""The formats that have groups."""


def group_bytes(kind: str, group: int) -> int:
    """Bytes of one quantised group of `group` elements.

    Raises ValueError for a format that is not quantised, and for a group that the format does not have.
    """
    if kind in BLOCKS and BLOCKS[kind][0] == group:
        return BLOCKS[kind][1]
    if kind not in _GROUP_BYTES or group < 1:
        raise ValueError(f"groups of {group} in format {kind!r}")
    return _GROUP_BYTES[kind] + (group if kind in ("q8", "int8") else (group + 1) // 2)


def align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, kw_only=True, slots=True)  # slots: a budgeted process holds thousands of entries
class Entry:
    """One tensor of a store. `describe` makes entries without a file: their `offset` and `segment` are 0."""

    name: str
    shape: tuple[int, ...]
    format: str
    group: int = 0
    """Elements per quantised group, which divides the row length; 0 for unquantised formats."""
    offset: int = 0
    """Bytes from the start of the file, a multiple of 4096."""
    segment: int = 0
    """Index of the tensor's first checksum."""
    rows: int = field(init=False)
    columns: int = field(init=False)
    row_bytes: int = field(init=False)
    bytes: int = field(init=False)
    """Bytes of all rows, without padding."""
    segment_rows: int = field(init=False)
    """Rows per checksum: a power of two, so that slices at powers of two are whole segments."""

    def __post_init__(self) -> None:
        rows = self.shape[0] if len(self.shape) > 1 else 1
        columns = 1
        for size in self.shape[1:] if len(self.shape) > 1 else self.shape:
            columns *= size
        if self.format in ELEMENT_BYTES:
            row_bytes = columns * ELEMENT_BYTES[self.format]
        else:
            row_bytes = columns // self.group * group_bytes(self.format, self.group)
            if columns % self.group:
                raise ValueError(f"rows of {columns} elements in groups of {self.group}")
        segment_rows = 1
        while segment_rows * 2 * row_bytes <= SEGMENT_BYTES and segment_rows < 128:
            segment_rows *= 2
        derived = {
            "rows": rows,
            "columns": columns,
            "row_bytes": row_bytes,
            "bytes": rows * row_bytes,
            "segment_rows": segment_rows,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def segments(self) -> int:
        return -(-self.rows // self.segment_rows)

    def header_fields(self) -> list[Any]:
        """The entry in the header's form."""
        return [self.shape, self.format, self.group, self.offset, self.segment]


def parse_header(text: str) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Parse a header into its fields and its tensors by name.

    Tensors are parsed one at a time: parsed at once, the lists of thousands of them would leave holes in the heap
    several times as large as the entries. Raises LookupError, TypeError or ValueError if `text` is not such a header.
    """
    fields: dict[str, Any] = {}
    entries: dict[str, Entry] | None = None
    position = 0
    while text[position] in "{,":
        key, position = _JSON.raw_decode(text, position + 1)
        if key != "tensors":
            fields[key], position = _JSON.raw_decode(text, position + 1)
            continue
        position, entries = position + 1, {}
        while text[position : position + 2] != "{}" and text[position] in "{,":
            name, position = _JSON.raw_decode(text, position + 1)
            (shape, kind, group, offset, segment), position = _JSON.raw_decode(text, position + 1)
            entries[name] = Entry(
                name=name, shape=tuple(shape), format=intern(kind), group=group, offset=offset, segment=segment
            )
        position = text.index("}", position) + 1
    if entries is None or text[position:] != "}":
        raise ValueError("no tensors" if entries is None else f"it goes on at byte {position}")
    return fields, entries


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a store: what it holds, ahead of the tensors' bytes."""

    path: Path
    name: str
    config: dict[str, Any]
    source: dict[str, Any]
    entries: dict[str, Entry]
    checksums: array.array[int]
    """crc32 of every segment of every tensor"""

    @property
    def fingerprint(self) -> str:
        """sha256 of the configuration, and of name, shape, format, place and checksums of every tensor."""
        tensors = [{name: entry.header_fields() for name, entry in self.entries.items()}, self.config]
        return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode() + self.checksums.tobytes()).hexdigest()


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of the store at `path` and check the file's length against it.

    Raises InputError if the file is missing, truncated, damaged or of another version.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            preamble = file.read(PREAMBLE.size)
            if len(preamble) < PREAMBLE.size or preamble[:8] != MAGIC:
                raise InputError(f"{path}: not a weight store; profile the model again to rebuild it")
            _, version, length, segments, checksum = PREAMBLE.unpack(preamble)
            if version != VERSION:
                raise InputError(
                    f"{path}: weight store of version {version}, this tightfit reads version {VERSION}; profile the"
                    " model again to rebuild it"
                )
            body = file.read(length + 4 * segments)
            if zlib.crc32(body) != checksum:
                raise InputError(
                    f"{path}: the header is truncated or damaged (checksum differs); delete the file and profile the"
                    " model again"
                )
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; profile the model again to rebuild the weight store") from error
    try:
        fields, entries = parse_header(body[:length].decode())
        header = Header(
            path=path,
            name=fields["name"],
            config=fields["config"],
            source=fields["source"],
            entries=entries,
            checksums=array.array("I", body[length:]),
        )
    except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"{path}: the header is not that of a weight store ({error}); delete the file and profile the model again"
        ) from error
    for entry in entries.values():
        if entry.offset + align(entry.bytes) > size:
            raise InputError(
                f"{path}: truncated, tensor {entry.name!r} ends at byte {entry.offset + entry.bytes} of {size}; delete"
                " the file and profile the model again"
            )
    return header


def store_path(directory: str | os.PathLike[str], name: str, fingerprint: str) -> Path:
    """Path in `directory` of the store of the source with this name and fingerprint."""
    return Path(directory) / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{fingerprint[:16]}.store"


def holds(path: Path, fingerprint: str) -> bool:
    """Whether `path` is a store of the source with this fingerprint. A store with a damaged header is removed."""
    if not path.exists():
        return False
    try:
        return read_header(path).source.get("fingerprint") == fingerprint
    except InputError:
        path.unlink(missing_ok=True)
        return False


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Rows [start, stop) of an entry and the aligned bytes of the file that hold them."""

    entry: Entry
    start: int
    stop: int
    offset: int
    """Aligned start, bytes from the start of the file."""
    bytes: int
    """Aligned length: what a staging buffer needs."""
    skip: int
    """Bytes in the staging buffer before the first row."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.entry.shape[1:]) if len(self.entry.shape) > 1 else self.entry.shape

    @property
    def row_bytes(self) -> int:
        """Bytes of the rows themselves."""
        return (self.stop - self.start) * self.entry.row_bytes


def find_extent(entries: Mapping[str, Entry], name: str) -> Extent:
    """The extent of the tensor `name` or of the slice ``name[a:b]``.

    Raises InputError for an unknown name or rows outside the tensor.
    """
    entry = entries.get(name)
    start, stop = 0, entry.rows if entry else 0
    if entry is None:
        match = _SLICE.fullmatch(name)
        entry = entries.get(match[1]) if match else None
        if match is None or entry is None:
            raise InputError(f"no tensor {name!r} among {len(entries)} tensors; the plan was made for another model")
        start, stop = int(match[2]), int(match[3])
        if not 0 <= start < stop <= entry.rows or len(entry.shape) < 2:
            raise InputError(
                f"{name!r} is outside its tensor of shape {list(entry.shape)}; the plan was made for another model"
            )
    first = entry.offset + start * entry.row_bytes
    offset = first // ALIGNMENT * ALIGNMENT
    end = align(entry.offset + stop * entry.row_bytes)
    return Extent(entry=entry, start=start, stop=stop, offset=offset, bytes=end - offset, skip=first - offset)


def packed_bytes(entries: Mapping[str, Entry], name: str) -> int:
    """Bytes of the buffer that reading a tensor or slice needs: a multiple of 4096.

    The same for entries of `tightfit.profiles.weights.describe`, made without a file, as for those of a real store.
    """
    return find_extent(entries, name).bytes
