"""Record files: tokenised samples of one fixed shape, which the training process reads one by one.

Layout, little-endian::

    [0, 4096)                 one JSON object padded with spaces, last byte a newline (`HEADER_BYTES`)
    4096 + i * record_bytes   record i: 5 + 2 * seq int32 words

    word 0             example: index of the sample in the source data (the choices of one question share it)
    word 1             choice: 0, 1, ... for the candidate answers of a question, -1 for a plain sample
    word 2             answer: 1 where this choice is the right one, else 0
    word 3             length: input positions before padding
    word 4             crc32 of words 0-3 and of the two blocks below
    words 5 ..         input_ids [seq], right-padded with `pad_token`
    words 5 + seq ..   labels [seq]: the token that position t must predict, -100 where nothing is asked

Header keys: `format` ("tightfit-records"), `version`, `seq`, `count` (records), `examples`, `pad_token`, `vocab_size`
(every token is below it), `tokens` (input positions before padding, summed), `labelled` (positions with a label,
summed), `fingerprint` (sha256 of all records) and `source` (what the data was made from, in words).

Training order needs no state: sample number ``step * batch + i`` falls in epoch ``n // count`` at place ``n % count``,
and a keyed permutation (`shuffled`) maps the place to a record in constant memory. A run that resumes at step N
therefore sees exactly what it would have seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tightfit.runtime.common.errors import InputError, RunError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "tightfit-records"
VERSION = 1
HEADER_BYTES = 4096
PREFIX_WORDS = 5
IGNORED = -100
SOURCE_CHARACTERS = 256
"""kept of `source`; JSON may escape a character with twelve bytes, and the header has room for so many"""


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """One sample. `input_ids` and `labels` are int32 [seq]."""

    example: int
    choice: int
    answer: bool
    length: int
    input_ids: Tensor
    labels: Tensor


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
    """Reader of a record file: one `pread` per record, nothing kept in memory."""

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
        self.record_bytes = 4 * (PREFIX_WORDS + 2 * self.seq)
        self._descriptor = descriptor
        self._buffer = bytearray(self.record_bytes)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RecordFile:
        """Open and check `path`. Raises InputError where it is missing, truncated or not a record file."""
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; prepare the data again") from error
        try:
            header = _header(path, os.pread(descriptor, HEADER_BYTES, 0))
            expected = HEADER_BYTES + header["count"] * 4 * (PREFIX_WORDS + 2 * header["seq"])
            found = os.fstat(descriptor).st_size
            if found != expected:
                raise InputError(
                    f"{path}: {found} bytes where {header['count']} records need {expected}; the file is truncated or damaged, prepare the data again"
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

        if not 0 <= index < self.count:
            raise ValueError(f"record {index} is outside [0, {self.count})")
        read = os.preadv(self._descriptor, [self._buffer], HEADER_BYTES + index * self.record_bytes)
        example, choice, answer, length, checksum = struct.unpack_from("<iiiiI", self._buffer)
        if read != self.record_bytes or checksum != _checksum(self._buffer):
            raise InputError(f"{self.path}: record {index} is damaged (checksum differs); prepare the data again")
        words = torch.frombuffer(self._buffer, dtype=torch.int32)[PREFIX_WORDS:]
        return TokenRecord(
            example=example,
            choice=choice,
            answer=bool(answer),
            length=length,
            input_ids=words[: self.seq],
            labels=words[self.seq :],
        )

    def index(self, step: int, row: int, batch: int, seed: int) -> int:
        """The record that stands in `row` of the batch of training step `step` (from 0)."""
        epoch, place = divmod(step * batch + row, self.count)
        return shuffled(place, self.count, seed, epoch)

    def fill(self, indices: Sequence[int], input_ids: Tensor, labels: Tensor) -> list[TokenRecord]:
        """Write records into `input_ids` and `labels` (integer [batch, seq]); rows beyond `indices` are all padding.

        The returned records carry the prefix words only; their tensors are rows of the two arguments.
        """
        if len(indices) > input_ids.shape[0] or input_ids.shape[1] != self.seq:
            raise ValueError(
                f"{len(indices)} records of length {self.seq} do not fit a batch of shape {list(input_ids.shape)}"
            )
        records = []
        for row, index in enumerate(indices):
            record = self.read(index)
            input_ids[row].copy_(record.input_ids)
            labels[row].copy_(record.labels)
            records.append(
                TokenRecord(
                    example=record.example,
                    choice=record.choice,
                    answer=record.answer,
                    length=record.length,
                    input_ids=input_ids[row],
                    labels=labels[row],
                )
            )
        input_ids[len(indices) :].fill_(self.pad_token)
        labels[len(indices) :].fill_(IGNORED)
        return records

    def training_batch(self, step: int, seed: int, input_ids: Tensor, labels: Tensor) -> list[TokenRecord]:
        """Fill the batch of training step `step` (from 0): the same for every process that asks with the same seed."""
        batch = input_ids.shape[0]
        return self.fill([self.index(step, row, batch, seed) for row in range(batch)], input_ids, labels)

    def evaluation_batch(self, number: int, input_ids: Tensor, labels: Tensor) -> list[TokenRecord]:
        """Fill batch `number` (from 0) in file order; the last one may hold fewer records than rows."""
        batch = input_ids.shape[0]
        return self.fill(range(number * batch, min((number + 1) * batch, self.count)), input_ids, labels)


class RecordWriter:
    """Writes a record file under a temporary name and gives it its own name in `finish`."""

    def __init__(self, path: str | os.PathLike[str], *, seq: int, pad_token: int, vocab_size: int, source: str) -> None:
        self.path = Path(path)
        self.seq = seq
        self.pad_token = pad_token
        self.vocab_size = vocab_size
        self.source = source
        self.count = 0
        self._examples = 0
        self._tokens = 0
        self._labelled = 0
        self._digest = hashlib.sha256()
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self._file = self._temporary.open("wb")
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
        padding = self.seq - length
        words = [
            example,
            choice,
            int(answer),
            length,
            0,
            *input_ids,
            *[self.pad_token] * padding,
            *labels,
            *[IGNORED] * padding,
        ]
        data = bytearray(struct.pack(f"<{len(words)}i", *words))
        struct.pack_into("<I", data, 16, _checksum(data))
        self._file.write(data)
        self._digest.update(data)
        self._examples = max(self._examples, example + 1)
        self._tokens += length
        self._labelled += sum(label != IGNORED for label in labels)
        self.count += 1

    def finish(self) -> Path:
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
            "fingerprint": self._digest.hexdigest(),
            "source": self.source[:SOURCE_CHARACTERS],
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


def _checksum(data: bytearray) -> int:
    view = memoryview(data)
    return zlib.crc32(view[20:], zlib.crc32(view[:16]))


def _header(path: Path, data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(f"{path}: not a record file (no {FORMAT!r} header); prepare the data again")
    if header.get("version") != VERSION:
        raise InputError(
            f"{path}: record file of version {header.get('version')}, this tightfit reads version {VERSION}; prepare the data again"
        )
    return header
