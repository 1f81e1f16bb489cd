"""Record files: tokenised samples without padding, which the training process reads one by one.

Layout, little-endian::

    [0, 4096)          one JSON object padded with spaces, last byte a newline (`HEADER_BYTES`)
    then               the records, one after the other: 5 + 2 * length int32 words each
    `index` ..         count + 1 uint64: where each record begins, and where the last one ends

    word 0             example: index of the sample in the source data (the choices of one question share it)
    word 1             choice: 0, 1, ... for the candidate answers of a question, -1 for a plain sample
    word 2             answer: 1 where this choice is the right one, else 0
    word 3             length: input positions, at most `seq`
    word 4             crc32 of words 0-3 and of the two blocks below
    words 5 ..         input_ids [length]
    then               labels [length]: the token that position t must predict, -100 where nothing is asked

Header keys: `format` ("tightfit-records"), `version`, `seq`, `count` (records), `examples`, `pad_token`, `vocab_size`
(every token is below it), `tokens` (input positions, summed), `labelled` (positions with a label, summed), `index` (its
offset in bytes), `fingerprint` (sha256 of all records), `source` (what the data was made from, in words) and, where
each example is a pair of answers, `pairs`: record 2n is the chosen answer of pair n, record 2n + 1 the rejected one.

Training order needs no state: sample number ``step * batch + i`` falls in epoch ``n // count`` at place ``n % count``,
and a keyed permutation (`shuffled`) maps the place to a record in constant memory. A run that resumes at step N
therefore sees exactly what it would have seen. Where samples share rows, `tightfit.runtime.engine.training.packing`
says which samples a step or an evaluation batch has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.files import check_regular, read_all
from tightfit.runtime.common.strict_json import JsonError, from_json

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "tightfit-records"
VERSION = 2
HEADER_BYTES = 4096
PREFIX_WORDS = 5
PLACE_BYTES = 8
"""of the index, for each record"""
IGNORED = -100
SOURCE_CHARACTERS = 256
"""kept of `source`; JSON may escape a character with twelve bytes, and the header has room for so many"""


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """One sample. `input_ids` and `labels` are int32 [length]."""

    example: int
    choice: int
    answer: bool
    length: int
    input_ids: Tensor
    labels: Tensor
    begin: int = 0
    """place in a batch at which it begins, all of whose rows are counted through"""


def shuffled(place: int, count: int, seed: int, epoch: int) -> int:
    """Where `place` of [0, count) goes in the permutation of (seed, epoch): a four-round Feistel network, cycle-walked.

    Balanced Feistel networks over a power of four at least `count` are bijections; walking until the value falls below
    `count` restricts the bijection to [0, count) (Black and Rogaway, 2002). At most four walks are expected.
    """
    if not 0 <= place < count:
        raise ValueError(f"place {place} is outside [0, {count})")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = struct.unpack("<4Q", hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=32).digest())
    while True:
        left, right = place >> half, place & mask
        for key in keys:
            mixed = (right + key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32 & mask)
        place = left << half | right
        if place < count:
            return place


class RecordFile:
    """Reader of a record file: two `pread`s per record, nothing kept in memory."""

    def __init__(self, path: Path, header: dict[str, Any], descriptor: int) -> None:
        self.path = path
        self.header = header
        self.seq: int = header["seq"]
        self.count: int = header["count"]
        self.examples: int = header["examples"]
        self.pad_token: int = header["pad_token"]
        self.vocab_size: int = header["vocab_size"]
        self.tokens: int = header["tokens"]
        self.labelled: int = header["labelled"]
        self.fingerprint: str = header["fingerprint"]
        self.pairs: bool = header.get("pairs", False)
        self._index: int = header["index"]
        self._descriptor = descriptor
        self._buffer = bytearray(4 * (PREFIX_WORDS + 2 * self.seq))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RecordFile:
        """Open and check `path`. Raises InputError where it is missing, truncated or not a record file."""
        path = Path(path)
        try:
            check_regular(path)
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; prepare the data again") from error
        try:
            header = _header(path, os.pread(descriptor, HEADER_BYTES, 0))
            expected = header["index"] + PLACE_BYTES * (header["count"] + 1)
            found = os.fstat(descriptor).st_size
            if found != expected:
                raise InputError(
                    f"{path}: {found} bytes where {header['count']} records need {expected}; the file is truncated or"
                    " damaged, prepare the data again"
                )
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, header, descriptor)

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"RecordFile({str(self.path)!r}, count={self.count}, seq={self.seq})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, index: int) -> TokenRecord:
        """Record `index`. Its tensors are views of one buffer that the next `read` overwrites."""
        import torch

        begin, size = self._place(index)
        record = memoryview(self._buffer)[:size]
        read = read_all(self._descriptor, record, begin)
        example, choice, answer, length, checksum = struct.unpack_from("<iiiiI", record)
        if read != size or size != _bytes(length) or checksum != _checksum(record):
            raise self._damaged(index)
        words = torch.frombuffer(self._buffer, dtype=torch.int32)[PREFIX_WORDS:]
        return TokenRecord(
            example=example,
            choice=choice,
            answer=bool(answer),
            length=length,
            input_ids=words[:length],
            labels=words[length : 2 * length],
        )

    def length(self, index: int) -> int:
        """Input positions of record `index`, found without reading it."""
        return (self._place(index)[1] // 4 - PREFIX_WORDS) // 2

    def _place(self, index: int) -> tuple[int, int]:
        """Where record `index` begins, and its bytes."""
        if not 0 <= index < self.count:
            raise ValueError(f"record {index} is outside [0, {self.count})")
        places = os.pread(self._descriptor, 2 * PLACE_BYTES, self._index + PLACE_BYTES * index)
        if len(places) != 2 * PLACE_BYTES:
            raise self._damaged(index)
        begin, end = struct.unpack("<QQ", places)
        if not HEADER_BYTES <= begin < end <= self._index or not _bytes(0) <= end - begin <= len(self._buffer):
            raise self._damaged(index)
        return begin, end - begin

    def _damaged(self, index: int) -> InputError:
        return InputError(f"{self.path}: record {index} is damaged (checksum differs); prepare the data again")

    def fill(
        self, indices: Sequence[int], input_ids: Tensor, labels: Tensor, positions: Tensor | None = None
    ) -> list[TokenRecord]:
        """Write records into `input_ids` and `labels` (integer [batch, length], with room for each), one a row, from
        its beginning; rows beyond `indices` are all padding. `positions`, of the same shape, is counted from 0 in each
        row.

        The returned records say where they begin; their tensors are in rows of the two arguments.
        """
        if len(indices) > input_ids.shape[0]:
            raise ValueError(f"{len(indices)} records do not fit a batch of shape {list(input_ids.shape)}")
        self._clear(input_ids, labels, positions)
        return [self._put(index, row, 0, input_ids, labels) for row, index in enumerate(indices)]

    def fill_rows(
        self, rows: Sequence[Sequence[int]], input_ids: Tensor, labels: Tensor, positions: Tensor
    ) -> list[TokenRecord]:
        """The same with several records a row, one after the other: `rows` has the indices of each.

        `positions` is counted from 0 in each record, and in the padding behind them.
        """
        import torch

        self._clear(input_ids, labels, positions)
        records = []
        for row, indices in enumerate(rows):
            end = 0
            for index in indices:
                record = self._put(index, row, end, input_ids, labels)
                torch.arange(record.length, out=positions[row, end : end + record.length])
                records.append(record)
                end += record.length
            torch.arange(positions.shape[1] - end, out=positions[row, end:])
        return records

    def _clear(self, input_ids: Tensor, labels: Tensor, positions: Tensor | None) -> None:
        """Make all of a batch padding."""
        import torch

        input_ids.fill_(self.pad_token)
        labels.fill_(IGNORED)
        if positions is not None:
            positions.copy_(torch.arange(positions.shape[1]))

    def _put(self, index: int, row: int, begin: int, input_ids: Tensor, labels: Tensor) -> TokenRecord:
        record = self.read(index)
        if begin + record.length > input_ids.shape[1]:
            raise ValueError(
                f"record {index}, of {record.length} positions, does not fit a batch of shape {list(input_ids.shape)}"
                f" from place {begin} on"
            )
        place = slice(begin, begin + record.length)
        input_ids[row, place].copy_(record.input_ids)
        labels[row, place].copy_(record.labels)
        return replace(
            record, input_ids=input_ids[row, place], labels=labels[row, place], begin=row * input_ids.shape[1] + begin
        )


class RecordWriter:
    """Writes a record file under a temporary name and gives it its own name in `finish`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        seq: int,
        pad_token: int,
        vocab_size: int,
        source: str,
        pairs: bool = False,
    ) -> None:
        self.path = Path(path)
        self.pairs = pairs
        self.seq = seq
        self.pad_token = pad_token
        self.vocab_size = vocab_size
        self.source = source
        self.count = 0
        self._examples = 0
        self._tokens = 0
        self._labelled = 0
        self._digest = hashlib.sha256()
        self._end = HEADER_BYTES
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        places = self.path.with_name(f".{self.path.name}.index.{os.getpid()}")
        try:
            self._file = self._temporary.open("wb")
            self._places = places.open("w+b")  # on disk meanwhile: it grows with the data
            places.unlink()
        except OSError as error:
            raise self._refused(error) from error
        self._file.write(b" " * HEADER_BYTES)

    def add(
        self, input_ids: Sequence[int], labels: Sequence[int], *, example: int, choice: int = -1, answer: bool = False
    ) -> None:
        """Append one record; both sequences have the same length, at most `seq`."""
        length = len(input_ids)
        if length != len(labels) or length > self.seq:
            raise ValueError(f"{length} tokens and {len(labels)} labels do not fit a record of {self.seq}")
        words = [example, choice, int(answer), length, 0, *input_ids, *labels]
        data = bytearray(struct.pack(f"<{len(words)}i", *words))
        struct.pack_into("<I", data, 16, _checksum(data))
        self._file.write(data)
        self._places.write(struct.pack("<Q", self._end))
        self._end += len(data)
        self._digest.update(data)
        self._examples = max(self._examples, example + 1)
        self._tokens += length
        self._labelled += sum(label != IGNORED for label in labels)
        self.count += 1

    def finish(self) -> Path:
        self._places.write(struct.pack("<Q", self._end))
        self._places.seek(0)
        shutil.copyfileobj(self._places, self._file)
        self._places.close()
        header = {
            "format": FORMAT,
            "version": VERSION,
            "seq": self.seq,
            "count": self.count,
            "examples": self._examples,
            "pad_token": self.pad_token,
            "vocab_size": self.vocab_size,
            "tokens": self._tokens,
            "labelled": self._labelled,
            "index": self._end,
            "fingerprint": self._digest.hexdigest(),
            "source": self.source[:SOURCE_CHARACTERS],
            **({"pairs": True} if self.pairs else {}),
        }
        self._file.seek(0)
        self._file.write(json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self.path)
        return self.path

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # the buffered rest finds no space on a full disk either
            self._file.close()
        with contextlib.suppress(OSError):
            self._places.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._file.closed:
            try:
                self.finish()
            except OSError as failure:
                self.abandon()
                raise self._refused(failure) from failure
        elif kind is not None:
            self.abandon()
            if isinstance(error, OSError):
                raise self._refused(error) from error

    def _refused(self, error: OSError) -> RunError:
        return RunError(f"{self.path}: {error.strerror}; free some space and start again")


def _bytes(length: int) -> int:
    """Bytes of a record of `length` positions."""
    return 4 * (PREFIX_WORDS + 2 * length)


def _checksum(data: bytearray | memoryview) -> int:
    view = memoryview(data)
    return zlib.crc32(view[20:], zlib.crc32(view[:16]))


def _header(path: Path, data: bytes) -> dict[str, Any]:
    try:
        header = from_json(data)
    except JsonError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(f"{path}: not a record file (no {FORMAT!r} header); prepare the data again")
    if header.get("version") != VERSION:
        raise InputError(
            f"{path}: record file of version {header.get('version')}, this tightfit reads version {VERSION}; prepare"
            " the data again"
        )
    return header
