"""Packs weights: converts float matrices to the store's formats, and writes a source into a store file, a few MiB at a
time.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from tightfit.profiles.weights.source import Source, without_names
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.files import sync_directory
from tightfit.runtime.engine.weights.layout import ALIGNMENT, MAGIC, PREAMBLE, VERSION, Entry, align, holds, store_path
from tightfit.runtime.engine.weights.store import RAW

BLOCK_BYTES = 8 << 20  # size in float32 of the rows that are converted at a time
Progress = Callable[[int, int, str], None]
"""Called as progress(bytes done, bytes in all, tensor name); bytes are those of the packed form."""


def pack_q4(values: Tensor, group: int) -> Tensor:
    """Round float rows [n, columns] to affine 4 bit: uint8 [n, row bytes]. Scale and min are chosen per group by least
    squares.

    Starts from the range of the group and refits scale and min to the codes twice (the alternation of k-means in one
    dimension). Per group, the pair with the least squared error after rounding both to float16 is kept.
    """
    x = values.float().view(-1, group)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale, minimum = _half((high - low) / 15), _half(low)
    codes = _codes(x, scale, minimum)
    error = _error(x, codes, scale, minimum)
    for _ in range(2):
        mean_code, mean = codes.mean(1, keepdim=True), x.mean(1, keepdim=True)
        centred = codes - mean_code
        spread = centred.square().sum(1, keepdim=True)
        slope = torch.where(spread > 0, (centred * (x - mean)).sum(1, keepdim=True) / spread.clamp_min(1e-30), scale)
        new_scale = _half(slope)
        new_minimum = _half(mean - new_scale * mean_code)
        new_codes = _codes(x, new_scale, new_minimum)
        new_error = _error(x, new_codes, new_scale, new_minimum)
        better = new_error < error
        scale, minimum = torch.where(better, new_scale, scale), torch.where(better, new_minimum, minimum)
        codes, error = torch.where(better, new_codes, codes), torch.where(better, new_error, error)
    return q4_blocks(codes.to(torch.uint8), scale.half(), minimum.half()).view(values.shape[0], -1)


def q4_blocks(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Blocks of the store's q4 format, uint8, from codes uint8 [n, group] and scales and minima float16 [n, 1]."""
    nibbles = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return torch.cat([nibbles, scale.contiguous().view(torch.uint8), minimum.contiguous().view(torch.uint8)], dim=1)


def pack_q8(values: Tensor, group: int) -> Tensor:
    """Round float rows [n, columns] to symmetric 8 bit: uint8 [n, row bytes]."""
    x = values.float().view(-1, group)
    scale = _half(x.abs().amax(1, keepdim=True) / 127)
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    codes = (x * inverse).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), codes.view(torch.uint8)], dim=1).view(values.shape[0], -1)


def pack_rows(entry: Entry, values: Tensor) -> Tensor:
    """Pack rows of a tensor: floats [n, columns] to uint8 [n, row bytes]. Raises InputError for NaN and infinity."""
    if values.is_floating_point() and not torch.isfinite(values).all():
        raise InputError(f"tensor {entry.name!r} holds NaN or infinity; the model's weights are damaged")
    if entry.format in RAW:
        return values.to(RAW[entry.format]).contiguous().view(torch.uint8).view(values.shape[0], -1)
    return pack_q4(values, entry.group) if entry.format == "q4" else pack_q8(values, entry.group)


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _codes(x: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    inverse = torch.where(scale != 0, 1 / scale, torch.zeros_like(scale))
    return ((x - minimum) * inverse).round_().clamp_(0, 15)


def _error(x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return (codes * scale + minimum - x).square_().sum(1, keepdim=True)


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
            _remove_orphans(self.path)
            disk = os.statvfs(self.path.parent)
            if disk.f_bavail * disk.f_frsize < end:
                raise RunError(
                    f"{self.path.parent}: the weight store needs {end} bytes, {disk.f_bavail * disk.f_frsize} are free; free some space or set TIGHTFIT_CACHE"
                )
            self._file = self._temporary.open("wb")
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
                while len(view):
                    part = view[: segment - filled]
                    checksum, filled, view = zlib.crc32(part, checksum), filled + len(part), view[len(part) :]
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
            os.fsync(self._file.fileno())
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
            f"{self.path}: {error.strerror} while writing the weight store of {self._end} bytes; free some space or set TIGHTFIT_CACHE"
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
        tensors = {entry.name: entry.said() for entry in entries}
        return json.dumps(self._head | {"tensors": tensors}, separators=(",", ":")).encode()


def build_store(source: Source, directory: str | os.PathLike[str], progress: Progress | None = None) -> Path:
    """Path of the packed store of `source` in `directory`, written now unless an intact one is there already.

    Holds one block of rows in memory at a time. Raises InputError for weights that do not fit the model's config,
    RunError if the disk is full; no partial file is ever left under the store's name.
    """
    path = store_path(directory, source.name, source.fingerprint)
    total = sum(entry.bytes for entry in source.entries.values())
    if holds(path, source.fingerprint):
        if progress:
            progress(total, total, "")
        return path
    done = 0
    described = {"kind": source.kind, "fingerprint": source.fingerprint, "note": source.note}
    with StoreWriter(
        path, source.entries.values(), name=source.name, config=without_names(source.config), source=described
    ) as writer:
        for tensor in source.tensors():
            entry = tensor.entry
            writer.write(entry.name, _blocks(entry, tensor.rows))
            done += entry.bytes
            if progress:
                progress(done, total, entry.name)
    return path


def _blocks(entry: Entry, rows: Callable[[int, int], Tensor]) -> Iterable[Tensor]:
    """Packed blocks of whole rows. `rows(start, stop)` returns floats, or uint8 that is already packed."""
    step = max(1, BLOCK_BYTES // (4 * entry.columns))
    for start in range(0, entry.rows, step):
        stop = min(start + step, entry.rows)
        block = rows(start, stop)
        packed = block.dtype == torch.uint8 and entry.format != "uint8"
        yield block if packed else pack_rows(entry, block.reshape(stop - start, entry.columns))


def _remove_orphans(path: Path) -> None:
    """Delete temporary files of this store that killed writers left behind."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        writer = partial.name.rsplit(".", 2)[1]
        if writer.isdigit() and not Path(f"/proc/{writer}").exists() and Path("/proc/self").exists():
            partial.unlink(missing_ok=True)
