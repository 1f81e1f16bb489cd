"""The packed weight store, opened: reads frozen weights from its file into the caller's buffers and unpacks them.

`tightfit.runtime.engine.weights.layout` describes the file. A q4 group is laid out as a row of PyTorch's
``quantized::embedding_bag_4bit_unpack``, which unpacks it where `tightfit.runtime.engine.weights.native` has no
compiled function. Values are computed in float32 and rounded once to the output type. Measured on two Zen 4 cores (with
PyTorch, with compiled C, a plain copy): 4864 x 896 of q4 to bfloat16 in 0.85, 0.23 and 0.12 ms, 8192 x 576 of q8 in
2.3, 0.7 and 0.3 ms.

This module is imported by the budgeted process: torch and the standard library only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import read_all
from tightfit.runtime.engine.weights import native
from tightfit.runtime.engine.weights.layout import (
    ALIGNMENT,
    ELEMENT_BYTES,
    Entry,
    Extent,
    Header,
    align,
    find_extent,
    group_bytes,
    packed_bytes,
    read_header,
)

__all__ = [
    "CHUNK_ELEMENTS",
    "RAW",
    "WORKSPACE_BYTES",
    "Entry",
    "Extent",
    "WeightStore",
    "find_extent",
    "packed_bytes",
    "unpack",
]

CHUNK_ELEMENTS = 1 << 17
"""Elements unpacked at a time: 512 KiB of float32, which stays in a core's L2."""
GATHERED_ELEMENTS = 1 << 14
"""Elements of gathered rows that are unpacked at a time."""
WORKSPACE_BYTES = CHUNK_ELEMENTS * 4 + (CHUNK_ELEMENTS // 8) * 4
"""Upper bound of the heap bytes that `unpack` and `gather_rows` use while they run."""
SCRATCH_BYTES = 64 * 1024
_unpack_q4 = torch.ops.quantized.embedding_bag_4bit_unpack.default
_native = native.functions()
_dots = native.dots()
RAW: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ELEMENT_BYTES}
"""torch's dtypes of the unquantised formats, by name."""


class WeightStore:
    """An open weight store. Reads are thread-safe and leave no page cache behind; every segment is checked when first
    read.
    """

    def __init__(self, header: Header) -> None:
        self.path = header.path
        self.header = header
        self.name = header.name
        self.config = header.config
        self.source = header.source
        self.entries = header.entries
        self._checked = bytearray(len(header.checksums))
        self._buffered = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC)
        _advise(self._buffered, 0, 0, "RANDOM")  # no read-ahead around gathered rows
        self._direct = _open_direct(header.path)
        self._scratch = mmap.mmap(-1, SCRATCH_BYTES)
        self._scratch_address = ctypes.addressof(ctypes.c_char.from_buffer(self._scratch))
        self._scratch_lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> WeightStore:
        """Open a store and check its header and length. Raises InputError on a missing, truncated or damaged file."""
        return cls(read_header(path))

    @property
    def fingerprint(self) -> str:
        """sha256 of names, shapes, formats, configuration and checksums of all tensors."""
        return self.header.fingerprint

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {len(self.entries)} tensors)"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in (self._buffered, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._buffered = self._direct = -1

    def extent(self, name: str) -> Extent:
        return find_extent(self.entries, name)

    def packed_bytes(self, name: str) -> int:
        """Staging bytes that `read_into` needs for a tensor or slice ``name[a:b]``; a multiple of 4096."""
        return self.extent(name).bytes

    def read_into(self, name: str, staging: Tensor) -> None:
        """Read the aligned extent of a tensor or slice into `staging`, contiguous uint8 [>= packed_bytes(name)].

        One `preadv` without the GIL; past the page cache (O_DIRECT) where the file system and a 4096-aligned buffer
        allow. Raises InputError where the file has shrunk or a segment read for the first time differs from its
        checksum.
        """
        extent = self.extent(name)
        if staging.dtype != torch.uint8 or staging.numel() < extent.bytes or not staging.is_contiguous():
            raise ValueError(
                f"staging for {name!r} must be contiguous uint8 of {extent.bytes} bytes, got {staging.dtype}"
                f" {list(staging.shape)}"
            )
        view = self._read(extent.entry, staging.data_ptr(), extent.offset, extent.bytes)
        self._check(extent, view)

    def unpack(self, name: str, staging: Tensor, out: Tensor) -> None:
        """Unpack a tensor or slice from `staging`, as `read_into` left it, into `out`: contiguous [rows, ...], any
        float type.
        """
        extent = self.extent(name)
        packed = staging.view(-1).narrow(0, extent.skip, extent.row_bytes)
        if out.numel() != (extent.stop - extent.start) * extent.entry.columns or not out.is_contiguous():
            raise ValueError(
                f"output for {name!r} must be contiguous of shape {list(extent.shape)}, got {list(out.shape)}"
            )
        unpack(extent.entry, packed, out)

    def gather_rows(self, name: str, rows: Tensor, out: Tensor) -> None:
        """Read and unpack rows `rows` (int64 [n], repeats allowed) of a matrix into `out` [n, columns], a few at a
        time.

        The kernel is first told of all rows (POSIX_FADV_WILLNEED) and reads them in parallel: 256 rows in 4 ms, one by
        one in 20. Raises InputError for a row outside the matrix and for a damaged file.
        """
        entry = self.extent(name).entry
        requested = sorted((row, position) for position, row in enumerate(rows.view(-1).tolist()))
        if requested and not 0 <= requested[0][0] <= requested[-1][0] < entry.rows:
            raise InputError(
                f"{self.path}: rows {requested[0][0]} to {requested[-1][0]} asked of {name!r}, which has {entry.rows};"
                " the data was tokenised for another model"
            )
        at_once = max(1, GATHERED_ELEMENTS // entry.columns)
        packed = torch.empty(min(at_once, max(1, len(requested))) * entry.row_bytes, dtype=torch.uint8)
        for row in {row for row, _ in requested}:
            _advise(self._buffered, entry.offset + row * entry.row_bytes, entry.row_bytes, "WILLNEED")
        with self._scratch_lock:
            for start in range(0, len(requested), at_once):
                part = requested[start : start + at_once]
                previous = -1
                for slot, (row, _) in enumerate(part):
                    target = packed.data_ptr() + slot * entry.row_bytes
                    if row == previous:
                        ctypes.memmove(target, target - entry.row_bytes, entry.row_bytes)
                    else:
                        self._check_row(entry, row)
                        _filled(
                            self._buffered,
                            target,
                            entry.row_bytes,
                            entry.offset + row * entry.row_bytes,
                            self.path,
                            entry.name,
                        )
                    previous = row
                unpacked = torch.empty(len(part), entry.columns, dtype=out.dtype)
                unpack(entry, packed.narrow(0, 0, len(part) * entry.row_bytes), unpacked)
                out.view(-1, entry.columns).index_copy_(0, torch.tensor([position for _, position in part]), unpacked)
        _advise(self._buffered, entry.offset, align(entry.bytes), "DONTNEED")

    def load(self, name: str, out: Tensor) -> None:
        """Read and unpack a small tensor (a constant, an initial trainable) into `out`, staged on the heap."""
        staging = torch.empty(self.packed_bytes(name), dtype=torch.uint8)
        self.read_into(name, staging)
        self.unpack(name, staging, out)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every segment that was not checked yet and check it; calls `progress(done_bytes, total_bytes)`.

        Raises InputError if one is damaged.
        """
        total, done = sum(entry.bytes for entry in self.entries.values()), 0
        with self._scratch_lock:
            for entry in self.entries.values():
                for segment in range(entry.segments):
                    self._check_row(entry, segment * entry.segment_rows)
                done += entry.bytes
                if progress:
                    progress(done, total)

    def _read(self, entry: Entry, address: int, offset: int, size: int) -> memoryview:
        if self._direct >= 0 and address % ALIGNMENT == 0:
            try:
                return _filled(self._direct, address, size, offset, self.path, entry.name)
            except OSError:
                pass  # some file systems open files with O_DIRECT and then refuse to read them
        view = _filled(self._buffered, address, size, offset, self.path, entry.name)
        _advise(self._buffered, offset, size, "DONTNEED")
        return view

    def _check(self, extent: Extent, view: memoryview) -> None:
        """Check the segments of an extent just read (`view`) that were never checked. Those of which it has a part
        alone, as of slices that do not begin where a segment does, are read for it.
        """
        entry, rows = extent.entry, extent.entry.segment_rows
        for segment in range(-(-extent.start // rows), entry.segments):
            first, last = segment * rows, min((segment + 1) * rows, entry.rows)
            if last > extent.stop:
                break
            if not self._checked[entry.segment + segment]:
                begin = extent.skip + (first - extent.start) * entry.row_bytes
                self._compare(entry, segment, zlib.crc32(view[begin : begin + (last - first) * entry.row_bytes]))
        for row in (extent.start, extent.stop - 1):
            if not self._checked[entry.segment + row // rows]:
                with self._scratch_lock:
                    self._check_row(entry, row)

    def _check_row(self, entry: Entry, row: int) -> None:
        """Read the segment of `row` through the scratch buffer and check it, unless it was checked before."""
        segment = row // entry.segment_rows
        if self._checked[entry.segment + segment]:
            return
        begin = entry.offset + segment * entry.segment_rows * entry.row_bytes
        end = min(begin + entry.segment_rows * entry.row_bytes, entry.offset + entry.bytes)
        checksum, position = 0, begin
        while position < end:
            aligned = position // ALIGNMENT * ALIGNMENT
            size = min(SCRATCH_BYTES, align(end) - aligned)
            view = self._read(entry, self._scratch_address, aligned, size)
            chunk = view[position - aligned : min(size, end - aligned)]
            checksum = zlib.crc32(chunk, checksum)
            position += len(chunk)
        self._compare(entry, segment, checksum)

    def _compare(self, entry: Entry, segment: int, checksum: int) -> None:
        if checksum != self.header.checksums[entry.segment + segment]:
            raise InputError(
                f"{self.path}: tensor {entry.name!r} is damaged (checksum differs); delete the file and profile the"
                " model again"
            )
        self._checked[entry.segment + segment] = 1


def unpack(entry: Entry, packed: Tensor, out: Tensor) -> None:
    """Unpack whole rows: `packed` uint8 [n * row_bytes], `out` contiguous with n * columns elements."""
    if entry.format in RAW:
        values, flat = packed.view(RAW[entry.format]), out.view(-1)
        if values.dtype == torch.float16 and out.dtype == torch.bfloat16:  # which PyTorch converts element by element
            for source, target in zip(values.split(CHUNK_ELEMENTS), flat.split(CHUNK_ELEMENTS), strict=True):
                target.copy_(source.float())
        else:
            flat.copy_(values)
        return
    compiled = _native.get(f"{entry.format}_{str(out.dtype).removeprefix('torch.')}")
    if compiled is not None:
        size = group_bytes(entry.format, entry.group)
        compiled(packed.data_ptr(), out.data_ptr(), out.numel() // entry.group, entry.group, size)
        return
    at_once = max(1, CHUNK_ELEMENTS // entry.group)
    if entry.format not in ("q4", "q8"):
        from tightfit.runtime.engine.weights.unpack_torch import unpack_groups

        unpack_groups(entry, packed, out)
        return
    sources = packed.view(-1, group_bytes(entry.format, entry.group)).split(at_once)
    targets = out.view(-1, entry.group).split(at_once)
    if entry.format == "q4":
        for source, target in zip(sources, targets, strict=True):
            target.copy_(_unpack_q4(source))
        return
    values = torch.empty(targets[0].shape, dtype=torch.float32)
    for source, target in zip(sources, targets, strict=True):
        value = values.narrow(0, 0, target.shape[0])
        value.copy_(source.narrow(1, 2, entry.group).view(torch.int8))
        value.mul_(source.narrow(1, 0, 2).view(torch.float16).float())
        target.copy_(value)


def multiplies(entry: Entry) -> bool:
    """Whether `multiply_row` can multiply with this tensor."""
    return entry.format in _dots and entry.group <= native.LARGEST_GROUP


def multiply_row(entry: Entry, packed: Tensor, x: Tensor, out: Tensor) -> None:
    """out float32 [n] = W x for n whole rows of W, `packed` uint8 [n * row_bytes], and x, contiguous float32 [columns]:
    in compiled C, without the unpacked rows in memory.
    """
    dot = _dots[entry.format]
    size = group_bytes(entry.format, entry.group)
    addresses = packed.data_ptr(), x.data_ptr(), out.data_ptr()
    dot(*addresses, out.numel(), entry.columns // entry.group, entry.group, size)


def _open_direct(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except (OSError, AttributeError):
        return -1


def _advise(descriptor: int, offset: int, size: int, advice: str) -> None:
    if hasattr(os, "posix_fadvise"):  # absent on macOS
        os.posix_fadvise(descriptor, offset, size, getattr(os, f"POSIX_FADV_{advice}"))


def _filled(descriptor: int, address: int, size: int, offset: int, path: Path, name: str) -> memoryview:
    """Fill `size` bytes at `address` and return them as a view. Raises InputError at the end of the file."""
    view = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
    done = read_all(descriptor, view, offset)
    if done < size:
        raise InputError(
            f"{path}: truncated while reading tensor {name!r} at byte {offset + done}; delete the file and profile the"
            " model again"
        )
    return view
