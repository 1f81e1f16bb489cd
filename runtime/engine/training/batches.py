"""Batches for the training process: from a decoder's record file, or from a file of whole batches of any other module.

A batch file is a JSON header padded to `HEADER_BYTES` (`format`, `version`, `count`, `tensors`: [dtype, shape] of each,
`record_bytes`, `fingerprint` of all batches), then the batches, each a crc32 and the bytes of its tensors in order.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.files import read_all
from tightfit.runtime.common.strict_json import JsonError, from_json
from tightfit.runtime.engine.training.packing import Packed
from tightfit.runtime.engine.training.records import RecordFile, TokenRecord
from tightfit.runtime.engine.training.sample_order import Apart, Rows, SampleOrder

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "tightfit-batches"
VERSION = 2
HEADER_BYTES = 1 << 16
CHECKSUM_BYTES = 4


class TrainingBatches(Protocol):
    """A source of training batches."""

    fingerprint: str
    samples: int | None
    """samples in the latest training batch; None if that is unknown"""

    def training(self, step: int, inputs: Sequence[Tensor]) -> int | None:
        """Fill `inputs` with the batch of training step `step`, counted from 0.

        Returns how many tokens it has without padding, or None if that is unknown.
        """

    def close(self) -> None: ...


class Batches(TrainingBatches, Protocol):
    """A data file, of whose batches one can train or evaluate."""

    def epoch_steps(self, batch: int, epochs: float = 1.0) -> float:
        """Steps with `batch` rows that go once through the data; where epochs differ, the mean of the first
        `epochs`.
        """
        ...

    def evaluation_count(self, inputs: Sequence[Tensor]) -> int:
        """Number of evaluation batches."""
        ...

    def evaluation(self, number: int, inputs: Sequence[Tensor]) -> list[TokenRecord]:
        """Fill `inputs` with evaluation batch `number`, from 0; returns its token records, none for a module."""
        ...


class TokenBatches:
    """Batches from a record file of `tightfit.runtime.engine.training.records`.

    `inputs` are input_ids, labels and, where samples may share rows, positions, int64 [batch, seq].
    """

    def __init__(self, path: str, seed: int, *, packing: bool = False) -> None:
        """With `packing` samples share rows."""
        self._records = records = RecordFile.open(path)
        self._order: SampleOrder = Packed(records, seed) if packing else Apart(len(records), seed)
        self.fingerprint = self._records.fingerprint
        self.samples: int | None = None

    def training(self, step: int, inputs: Sequence[Tensor]) -> int:
        found = self._fill(self._order.of_step(step, inputs[0].shape[0]), inputs)
        self.samples = len(found)
        return sum(record.length for record in found)

    def epoch_steps(self, batch: int, epochs: float = 1.0) -> float:
        return self._order.epoch_steps(batch, epochs)

    def evaluation_count(self, inputs: Sequence[Tensor]) -> int:
        return self._order.evaluation_count(inputs[0].shape[0])

    def evaluation(self, number: int, inputs: Sequence[Tensor]) -> list[TokenRecord]:
        return self._fill(self._order.of_evaluation(number, inputs[0].shape[0]), inputs)

    def close(self) -> None:
        self._records.close()

    def _fill(self, rows: Rows, inputs: Sequence[Tensor]) -> list[TokenRecord]:
        if self._order.shared:
            return self._records.fill_rows(rows, *inputs)
        return self._records.fill([index for (index,) in rows], *inputs)


class TensorBatches:
    """Batches from a batch file; training takes them in file order and starts again after the last."""

    samples: int | None = None

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; prepare the data again") from error
        self._header = _header(path, os.pread(self._descriptor, HEADER_BYTES, 0))
        self.count: int = self._header["count"]
        self.fingerprint: str = self._header["fingerprint"]
        expected = HEADER_BYTES + self.count * self._header["record_bytes"]
        if os.fstat(self._descriptor).st_size != expected:
            raise InputError(
                f"{path}: {os.fstat(self._descriptor).st_size} bytes where {expected} are expected; prepare the data"
                " again"
            )

    def training(self, step: int, inputs: Sequence[Tensor]) -> None:
        self._fill(step % self.count, inputs)

    def epoch_steps(self, batch: int, epochs: float = 1.0) -> float:
        return float(self.count)

    def evaluation_count(self, inputs: Sequence[Tensor]) -> int:
        return self.count

    def evaluation(self, number: int, inputs: Sequence[Tensor]) -> list[TokenRecord]:
        self._fill(number, inputs)
        return []

    def close(self) -> None:
        os.close(self._descriptor)

    def _fill(self, number: int, inputs: Sequence[Tensor]) -> None:
        offset, checksum = HEADER_BYTES + number * self._header["record_bytes"], 0
        expected = int.from_bytes(os.pread(self._descriptor, CHECKSUM_BYTES, offset), "little")
        offset += CHECKSUM_BYTES
        for tensor in inputs:
            size = tensor.numel() * tensor.element_size()
            if not size:
                continue  # an empty tensor's data is a null pointer, for which zlib's crc32 starts over
            view = memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
            if read_all(self._descriptor, view, offset) != size:
                raise InputError(f"{self.path}: truncated in batch {number}; prepare the data again")
            checksum = zlib.crc32(view, checksum)
            offset += size
        if checksum != expected:
            raise InputError(f"{self.path}: batch {number} is damaged (checksum differs); prepare the data again")


def open_batches(path: str, seed: int, *, packing: bool = False, loss: str | None = None) -> Batches:
    """Open a record file or a batch file; `seed` shuffles records, and with `packing` they share rows. `loss` is the
    decoder's loss of pairs, if it has one. Raises InputError if it is neither, or without the pairs that the loss is
    of.
    """
    if loss is not None:
        from tightfit.runtime.engine.training.pairs import PairBatches

        return PairBatches(path, seed, loss, packing=packing)
    try:
        with open(path, "rb") as file:
            tensors = FORMAT.encode() in file.read(256)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; prepare the data again") from error
    return TensorBatches(path) if tensors else TokenBatches(path, seed, packing=packing)


def write_batches(path: str, batches: Iterable[Sequence[Tensor]]) -> str:
    """Write a batch file, one batch in memory at a time. Returns `path`.

    Raises InputError if there is no batch or two differ in shapes or dtypes, RunError if the disk refuses.
    """
    shapes: list[list[Any]] = []
    checksums: list[int] = []
    record_bytes = 0
    temporary = f"{path}.{os.getpid()}"
    try:
        with _on_disk(path), open(temporary, "wb") as file:
            file.write(b" " * HEADER_BYTES)
        for number, batch in enumerate(batches):
            tensors = [t.detach().contiguous() for t in batch]
            found = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
            if number and found != shapes:
                raise InputError(
                    f"batch {number} has tensors {found}, batch 0 has {shapes}; all batches must have one shape"
                )
            shapes = found
            data = b"".join(map(_bytes, tensors))
            checksums.append(zlib.crc32(data))
            record_bytes = CHECKSUM_BYTES + len(data)
            with _on_disk(path), open(temporary, "ab") as file:
                file.write(checksums[-1].to_bytes(CHECKSUM_BYTES, "little") + data)
        if not checksums:
            raise InputError("no batch to train on; give at least one")
        header = {
            "format": FORMAT,
            "version": VERSION,
            "count": len(checksums),
            "tensors": shapes,
            "record_bytes": record_bytes,
            "fingerprint": f"{zlib.crc32(json.dumps([shapes, checksums]).encode()):08x}",
        }
        text = json.dumps(header).encode()
        if len(text) > HEADER_BYTES:
            raise InputError(f"batches of {len(shapes)} tensors do not fit a batch file; give fewer in one batch")
        with _on_disk(path), open(temporary, "r+b") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return path


@contextlib.contextmanager
def _on_disk(path: str) -> Iterator[None]:
    """Turn the disk's OSError into a RunError. Entered around writing alone: errors of the caller's iterator stay as
    they are.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; free some space and start again") from error


def _bytes(tensor: Tensor) -> bytes:
    size = tensor.numel() * tensor.element_size()
    return ctypes.string_at(tensor.data_ptr(), size) if size else b""


def _header(path: str, data: bytes) -> dict[str, Any]:
    try:
        header = from_json(data)
    except JsonError as error:
        raise InputError(f"{path}: damaged header; prepare the data again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
        raise InputError(f"{path}: not a batch file of this version; prepare the data again")
    return header
