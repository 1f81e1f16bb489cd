"""Where the tensors of a job lie between steps, in the arena or the spill file: brings them there, and reads them out
in parts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.device.device import Device, get_now, put_now
from tightfit.runtime.engine.device.spill import SpillFile
from tightfit.runtime.engine.training.job import BLOCK, Job
from tightfit.runtime.engine.training.job_tables import TensorPlace, Trainables, Weights
from tightfit.runtime.engine.weights.layout import Entry
from tightfit.runtime.engine.weights.store import WeightStore

CHUNK = 1 << 20
"""bytes that are read out at a time"""
NORM = "tightfit.dora_norm"
NORM_ELEMENTS = 1 << 17
"""of a weight that are unpacked at a time to find the lengths of its rows"""


class Storage:
    """The persistent tensors of a job."""

    def __init__(self, job: Job, device: Device, directory: str) -> None:
        """Open the job's weight store, and its spill file in `directory`."""
        header = job.header
        self.device, self._job = device, job
        self.opened = WeightStore.open(header["store"]) if header["store"] else None
        """the weight store; None where the plan reads no weights"""
        self.spill = SpillFile(directory, header["spill_bytes"])
        # The JSON forms are dropped from the header: they are many times as large as these tables.
        self.weights = Weights(header.pop("weights"), job.weights)
        self.trainables = Trainables(header.pop("trainables"), job.trainables)
        self.buffers: dict[str, list[Any]] = {name: place for name, *place in header["buffers"]}
        """name -> [dtype, shape, byte offset in the arena] of the buffers that a step changes: running statistics"""
        self._hole: tuple[int, int] = tuple(header["hole"])

    @property
    def store(self) -> WeightStore:
        if self.opened is None:
            raise InputError("the plan reads weights and names no weight store; profile the model again")
        return self.opened

    def close(self) -> None:
        self.spill.close()
        if self.opened:
            self.opened.close()

    def load_frozen(self) -> None:
        """Load the constants, and the weights that stay in the arena, packed or unpacked."""
        for name, dtype, shape, at in self._job.header.pop("constants"):
            self.load(name, at, shape, dtype)
        for weight in self.weights:
            if weight.packed_at >= 0:
                host = self.device.host(weight.packed_at, (weight.packed_bytes,), "uint8")
                self.store.read_into(weight.name, host)
                put_now(self.device, weight.packed_at, host)
            if weight.at >= 0:
                self.load(weight.name, weight.at, weight.shape, weight.dtype)

    def load(self, name: str, at: int, shape: Iterable[int], dtype: str) -> None:
        """Read a weight, constant or buffer and unpack it into the arena at offset `at`."""
        host = self.device.host(at, shape, dtype)
        self.unpack(name, host)
        put_now(self.device, at, host)

    def unpack(self, name: str, out: Tensor) -> None:
        staging = self.room(self.store.packed_bytes(name))
        self.store.read_into(name, staging)
        self.store.unpack(name, staging, out)

    def row_norms(self, name: str, out: Tensor) -> None:
        """Fill `out` with the lengths of a weight's rows as its operators read them: the magnitudes that DoRA starts
        from.

        A few rows are in memory at a time. Raises InputError where all elements of a row are zero.
        """
        entry = self.store.entries[name]
        dtype = next(weight.dtype for weight in self.weights if weight.name == name)
        step = max(1, NORM_ELEMENTS // (entry.columns * entry.segment_rows)) * entry.segment_rows
        rows = torch.empty(min(step, entry.rows), entry.columns, dtype=getattr(torch, dtype))
        # The operator that divides by the lengths, with a pair that adds nothing: the first quotients are exactly 1.
        length, a, b = self.device.kernels.fused[NORM], torch.zeros(1, entry.columns), torch.zeros(len(rows), 1)
        scratch = torch.empty(rows.shape)
        for start in range(0, entry.rows, step):
            stop = min(start + step, entry.rows)
            part = rows[: stop - start]
            self.store.load(f"{name}[{start}:{stop}]", part)
            length(part, a, b[: len(part)], 1.0, out=(out[start:stop], scratch))
        if not out.all():
            raise InputError(
                f"row {int(out.argmin())} of {name} is zero, and DoRA divides by its length; profile without"
                f" {spelled('dora')}, or leave the layer out with {spelled('lora_targets')}"
            )

    def room(self, size: int) -> Tensor:
        """A uint8 buffer [size] to read into, at the start of the arena's hole; from the heap if the hole is
        too small.
        """
        start, end = self._hole
        return (
            self.device.host(start, (size,), "uint8") if end - start >= size else torch.empty(size, dtype=torch.uint8)
        )

    def temporary(self, place: TensorPlace, shape: Sequence[int]) -> Tensor:
        """A float32 tensor of this shape, which has the bytes of the tensor `place`, to prepare a value in.

        It lies at the end of the arena's hole, where it does not overlap the packed bytes that `room` has at the
        start, or on the heap if the hole is too small.
        """
        size = self._job.sizes[place.number]
        start, end = self._hole
        if end - start >= 2 * size + 3 * BLOCK:
            return self.device.host((end - size) // BLOCK * BLOCK, shape, "float32")
        return torch.empty(tuple(shape))

    def keep(self, place: TensorPlace, value: Tensor) -> None:
        """Put a tensor in its place."""
        size = self._job.sizes[place.number]
        if place.at >= 0:
            put_now(self.device, place.at, value)
        else:
            self.spill.write(value.data_ptr(), size, self._job.extents[place.number])

    def zero(self, place: TensorPlace) -> None:
        """Fill a tensor with zeros."""
        size = self._job.sizes[place.number]
        if place.at >= 0:
            put_now(self.device, place.at, self.device.host(place.at, (size,), "uint8").zero_())
        else:
            self.spill.zero(size, self._job.extents[place.number])

    def value(self, tensor: int) -> Tensor:
        """The values of a trainable, by its number: where they lie in the arena, or a copy of what is in the spill
        file.
        """
        one = self.trainables[tensor]
        if one.value.at >= 0:
            return get_now(self.device, one.value.at, self.device.host(one.value.at, one.shape, "float32"))
        value = torch.empty(one.shape)
        self.spill.read(value.data_ptr(), self._job.sizes[one.value.number], self._job.extents[one.value.number])
        return value

    def chunks(self, place: TensorPlace) -> Iterator[memoryview]:
        """The bytes of a tensor, in parts."""
        size = self._job.sizes[place.number]
        buffer = self.room(min(CHUNK, size)) if place.at < 0 else None
        for done in range(0, size, CHUNK):
            part = min(CHUNK, size - done)
            if buffer is None:
                host = self.device.host(place.at + done, (part,), "uint8")
                get_now(self.device, place.at + done, host)
                yield memoryview((ctypes.c_char * part).from_address(host.data_ptr())).cast("B")
            else:
                address = buffer.data_ptr()
                self.spill.read(address, part, self._job.extents[place.number] + done)
                yield memoryview((ctypes.c_char * part).from_address(address)).cast("B")

    def stored_chunks(self, entry: Entry) -> Iterator[memoryview]:
        """The bytes of a tensor as the store holds it, in parts."""
        segments = max(1, CHUNK // max(1, entry.segment_rows * entry.row_bytes))
        step = segments * entry.segment_rows
        for start in range(0, entry.rows if entry.bytes else 0, step):
            rows = f"[{start}:{min(start + step, entry.rows)}]" if len(entry.shape) > 1 else ""
            extent = self.store.extent(entry.name + rows)
            staging = self.room(extent.bytes)
            self.store.read_into(entry.name + rows, staging)
            yield memoryview((ctypes.c_char * extent.row_bytes).from_address(staging.data_ptr() + extent.skip)).cast(
                "B"
            )

    def buffer_chunks(self, name: str) -> Iterator[memoryview]:
        """The present bytes of a buffer that a step changes."""
        dtype, shape, at = self.buffers[name]
        host = self.device.host(at, shape, dtype)
        get_now(self.device, at, host)
        yield memoryview((ctypes.c_char * (host.numel() * host.itemsize)).from_address(host.data_ptr())).cast("B")
