"""Packs weights: converts float matrices to the store's formats, and writes a source into a store file, a few MiB at a
time.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from tightfit.profiles.weights.source import Source, SourceTensor, block_rows, without_names
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.files import WriteBehind, remove_orphans, sync_directory
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.engine.weights.layout import (
    ALIGNMENT,
    MAGIC,
    PREAMBLE,
    VERSION,
    Entry,
    align,
    group_bytes,
    holds,
    store_path,
)
from tightfit.runtime.engine.weights.native_judge import SCALES
from tightfit.runtime.engine.weights.store import RAW

AT_ONCE = (1 << 15) - 1
"""Elements that are rounded to 4 bit at a time: few enough that they stay in a core's cache, and that PyTorch does not
split an operation on them between cores, which takes a hundred times as long where the cores are busy."""
SPANS = (0.7, 0.775, 0.85, 0.925, 1.0)
"""Parts of a group's range that its 16 values are first spread over: below 1, the outermost weights are cut off."""
REFITS = 3
SINGLE = ("nf4", "int8")
"""Formats whose scales are float32; those of the others are float16."""
FLOAT16_MOST = 65504
MOST_MXFP4 = 252
"""largest exponent of a block of MXFP4, as it is stored"""


def pack_q4(values: Tensor, group: int, spans: Sequence[float] = SPANS) -> Tensor:
    """Round float rows [n, columns] to affine 4 bit: uint8 [n, row bytes], with little squared error in every group.

    The scale is searched as llama.cpp's make_qkx2_quants does it: from several first scales, each the group's range
    times one of `spans` divided by 15, codes and the least-squares scale and min for them take turns `REFITS` times
    (the alternation of k-means in one dimension). Of all pairs, rounded to float16, the one with the least squared
    error is kept, and improved in the same way.
    """
    rows = values.reshape(-1, group)
    parts = rows.split(max(1, AT_ONCE // group))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        blocks = list(pool.map(lambda part: _pack_q4(part.float().T.contiguous(), spans), parts))
    return torch.cat(blocks).view(values.shape[0], -1)


def _pack_q4(x: Tensor, spans: Sequence[float]) -> Tensor:
    """Blocks of groups that are the columns of `x`, float32 [group, n]."""
    low, high = x.amin(0), x.amax(0)
    mean = x.mean(0)
    codes, scratch = torch.empty_like(x), torch.empty_like(x)
    error = torch.full_like(low, math.inf)
    scale, minimum = error.clone(), error.clone()  # where no pair is finite in float16, which callers look for

    def choose_codes(scale: Tensor, minimum: Tensor) -> None:
        inverse = torch.where(scale != 0, 1 / scale, torch.zeros_like(scale))
        torch.sub(x, minimum, out=codes).mul_(inverse).round_().clamp_(0, 15)

    def refit(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
        choose_codes(scale, minimum)
        mean_code = codes.mean(0)
        variance = torch.mul(codes, codes, out=scratch).sum(0) - len(x) * mean_code * mean_code
        covariance = torch.mul(codes, x, out=scratch).sum(0) - len(x) * mean_code * mean
        slope = torch.where(variance > 0, covariance / variance.clamp_min(1e-30), scale)
        return slope, mean - slope * mean_code

    def keep_better(new_scale: Tensor, new_minimum: Tensor) -> None:
        nonlocal error, scale, minimum
        new_scale, new_minimum = _half(new_scale), _half(new_minimum)
        choose_codes(new_scale, new_minimum)
        new_error = torch.mul(codes, new_scale, out=scratch).add_(new_minimum).sub_(x).square_().sum(0)
        better = new_error < error
        error = torch.where(better, new_error, error)
        scale, minimum = torch.where(better, new_scale, scale), torch.where(better, new_minimum, minimum)

    keep_better((high - low) / 15, low)
    for span in spans:
        pair = (high - low) * (span / 15), (high + low) / 2 - (high - low) * (span / 2)
        for _ in range(REFITS):
            pair = refit(*pair)
        keep_better(*pair)
    for _ in range(2):
        keep_better(*refit(scale, minimum))
    choose_codes(scale, minimum)
    return q4_blocks(codes.T.to(torch.uint8), scale.half().view(-1, 1), minimum.half().view(-1, 1))


def q4_blocks(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Blocks of the store's q4 format, uint8, from codes uint8 [n, group] and scales and minima float16 [n, 1]."""
    nibbles = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return torch.cat([nibbles, scale.contiguous().view(torch.uint8), minimum.contiguous().view(torch.uint8)], dim=1)


def pack_q8(values: Tensor, group: int) -> Tensor:
    """Round float rows [n, columns] to symmetric 8 bit: uint8 [n, row bytes]."""
    parts = values.reshape(-1, group).split(max(1, AT_ONCE // group))
    return torch.cat([_pack_q8(part.float()) for part in parts]).view(values.shape[0], -1)


def _pack_q8(x: Tensor) -> Tensor:
    """Blocks of groups that are the rows of `x`, float32 [n, group]."""
    scale = _half(x.abs().amax(1, keepdim=True) / 127)
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    codes = (x * inverse).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), codes.view(torch.uint8)], dim=1)


def pack_rows(entry: Entry, values: Tensor) -> Tensor:
    """Pack rows of a tensor: finite floats [n, columns] to uint8 [n, row bytes], in a format that holds floats."""
    if entry.format in RAW:
        return values.to(RAW[entry.format]).contiguous().view(torch.uint8).view(values.shape[0], -1)
    return pack_q4(values, entry.group) if entry.format == "q4" else pack_q8(values, entry.group)


def _half(x: Tensor) -> Tensor:
    return x.half().float()


class StoreWriter:
    """Writes a store under a temporary name, tensor by tensor in the order of `entries`; `finish` gives it its name.

    As a context manager it finishes on success and removes the temporary file on failure. A full disk raises RunError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Iterable[Entry],
        *,
        name: str,
        config: dict[str, Any],
        source: dict[str, Any],
    ) -> None:
        self.path = Path(path)
        entries = list(entries)
        self._head = {"name": name, "config": config, "source": source}
        self._segments = sum(entry.segments for entry in entries)
        placed = self._place(entries, 0)
        for _ in range(2):  # the second time with the header's length known, since offsets may have more digits then
            placed = self._place(
                entries, align(PREAMBLE.size + len(self._header(placed)) + 4 * self._segments + 64 * len(entries))
            )
        self.entries: dict[str, Entry] = {entry.name: entry for entry in placed}
        self._pending = iter(placed)
        self._checksums = array.array("I")
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        end = placed[-1].offset + align(placed[-1].bytes) if placed else ALIGNMENT
        self._end = end
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_orphans(self.path)
            disk = os.statvfs(self.path.parent)
            if disk.f_bavail * disk.f_frsize < end:
                raise RunError(
                    f"{self.path.parent}: the weight store needs {end} bytes, {disk.f_bavail * disk.f_frsize} are free;"
                    " free some space or set TIGHTFIT_CACHE"
                )
            self._file = self._temporary.open("wb")
            self._behind = WriteBehind(self._file.fileno())
        except OSError as error:
            raise RunError(f"{self.path}: {error.strerror}; set TIGHTFIT_CACHE to a writable directory") from error

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Write the next tensor from uint8 blocks of whole rows."""
        entry = next(self._pending)
        if entry.name != name:
            raise ValueError(f"tensor {name!r} written where {entry.name!r} is due")
        try:
            self._file.seek(entry.offset)
            written, checksum, filled = 0, 0, 0
            segment = entry.segment_rows * entry.row_bytes
            for block in blocks:
                data = block.contiguous()
                view = memoryview((ctypes.c_char * data.numel()).from_address(data.data_ptr())).cast("B")
                self._file.write(view)
                written += len(view)
                self._behind.wrote(len(view))
                while len(view):
                    chunk = view[: segment - filled]
                    checksum, filled, view = zlib.crc32(chunk, checksum), filled + len(chunk), view[len(chunk) :]
                    if filled == segment:
                        self._checksums.append(checksum)
                        checksum = filled = 0
            if filled:
                self._checksums.append(checksum)
            if written != entry.bytes:
                raise ValueError(f"{written} bytes written for {name!r}, which has {entry.bytes}")
        except OSError as error:
            raise self._failure(error) from error

    def finish(self) -> Path:
        """Write the header, sync the file to disk and rename it to its final name; returns its path."""
        header = self._header(list(self.entries.values()))
        table = self._checksums
        body = header + table.tobytes()
        try:
            self._file.truncate(self._end)
            self._file.seek(0)
            self._file.write(PREAMBLE.pack(MAGIC, VERSION, len(header), len(table), zlib.crc32(body)) + body)
            self._file.flush()
            self._behind.finish()
            self._file.close()
            self._temporary.replace(self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            raise self._failure(error) from error
        return self.path

    def abandon(self) -> None:
        """Remove the temporary file."""
        with contextlib.suppress(OSError):  # closing writes the buffered rest, which may fail on a full disk
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            if not self._file.closed or self._temporary.exists():
                self.abandon()

    def _failure(self, error: OSError) -> RunError:
        return RunError(
            f"{self.path}: {error.strerror} while writing the weight store of {self._end} bytes; free some space or set"
            " TIGHTFIT_CACHE"
        )

    def _place(self, entries: list[Entry], start: int) -> list[Entry]:
        placed, offset, segment = [], start, 0
        for entry in entries:
            placed.append(
                Entry(
                    name=entry.name,
                    shape=entry.shape,
                    format=entry.format,
                    group=entry.group,
                    offset=offset,
                    segment=segment,
                )
            )
            offset, segment = offset + align(entry.bytes), segment + entry.segments
        return placed

    def _header(self, entries: list[Entry]) -> bytes:
        tensors = {entry.name: entry.header_fields() for entry in entries}
        return json.dumps(self._head | {"tensors": tensors}, separators=(",", ":")).encode()


def build_store(source: Source, directory: str | os.PathLike[str], progress: Progress | None = None) -> Path:
    """Path of the packed store of `source` in `directory`, written now, with `progress` in bytes of the packed form,
    unless an intact one is there already.

    Holds one block of rows in memory at a time. Raises InputError for weights that do not fit the model's config,
    RunError if the disk is full; no partial file is ever left under the store's name.
    """
    path = store_path(directory, source.name, source.fingerprint)
    if holds(path, source.fingerprint):
        return path
    done, total = 0, sum(entry.bytes for entry in source.entries.values())
    source_info = {"kind": source.kind, "fingerprint": source.fingerprint, "note": source.note}
    with StoreWriter(
        path, source.entries.values(), name=source.name, config=without_names(source.config), source=source_info
    ) as writer:
        for tensor in source.tensors():
            entry = tensor.entry
            writer.write(entry.name, _blocks(tensor))
            done += entry.bytes
            if progress:
                progress("pack", done, total)
    return path


def _blocks(tensor: SourceTensor) -> Iterable[Tensor]:
    """Packed blocks of whole rows. Raises InputError for NaN and infinity, which names the tensor's place."""
    entry = tensor.entry
    step = block_rows(entry)
    for start in range(0, entry.rows, step):
        stop = min(start + step, entry.rows)
        block = tensor.rows(start, stop)
        packed = block.dtype == torch.uint8 and entry.format != "uint8"
        if not _finite(entry, block, packed=packed):
            row = start + next(
                row for row, values in enumerate(block) if not _finite(entry, values[None], packed=packed)
            )
            raise InputError(
                f"{tensor.origin_of(row)} holds NaN or infinity, first in row {row}; the file is damaged or its"
                " training diverged: download it again, or use another checkpoint"
            )
        packed_block = block if packed else pack_rows(entry, block.reshape(stop - start, entry.columns))
        if not packed and not finite_groups(entry, packed_block):
            raise InputError(
                f"{tensor.origin_of(start)} holds values above {FLOAT16_MOST}, too large for 4 or 8 bit; use"
                f" {spelled('base', '16bit')}"
            )
        yield packed_block


def _finite(entry: Entry, block: Tensor, *, packed: bool) -> bool:
    if packed:
        return finite_groups(entry, block)
    return all(bool(torch.isfinite(part).all()) for part in block.reshape(-1).split(AT_ONCE))


def finite_groups(entry: Entry, packed: Tensor) -> bool:
    """Whether the floating-point numbers of packed groups, uint8 [rows, row bytes], are finite."""
    if entry.format not in SCALES:
        return True
    groups = packed.view(-1, group_bytes(entry.format, entry.group))
    if entry.format == "mxfp4":  # of which the largest code times the scale is a float32
        return not bool((groups[:, 0] > MOST_MXFP4).any())
    for index in SCALES[entry.format]:
        high = groups[:, index]
        infinite = (high & 0x7F) == 0x7F if entry.format in SINGLE else (high & 0x7C) == 0x7C
        if entry.format in SINGLE:
            infinite = infinite & (groups[:, index - 1] >= 0x80)
        if infinite.any():
            return False
    return True
