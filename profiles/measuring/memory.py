"""How much memory measuring takes, counted from the programs before anything is started, and how large its buffers may
be.

The process that measures (`tightfit.profiles.measuring.worker`) holds PyTorch's kernels, those that it builds for the
operators, and then either the arena of one program or buffers that are used in turn, so that none of them is in a cache
when its turn comes. After it, the process that measures the floor (`tightfit.profiles.measuring.floor`) has one child
at a time, or two.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tightfit.profiles.measuring.placement import place
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import MIB, format_size
from tightfit.runtime.engine.start.cuda_stubs import built_for_cuda
from tightfit.runtime.engine.weights.layout import ELEMENT_BYTES, Entry

LEAST_TURNING, MOST_TURNING = 64 * MIB, 192 * MIB
"""bytes of the buffers that are used in turn, if there is memory for them: twice the processor's largest cache, within
these limits
"""
SMALLEST_TURNING = 4 * MIB
"""the same where memory is short; a weight is always whole while operators read it"""
TURNING_PARTS = 16
"""sizes between the two that are tried"""
MOST_CALLS = 200
"""calls timed for one figure, at most, and so buffers that are used in turn"""
BETWEEN_BYTES = 4 * MIB
"""of each of three tensors that are added between calls: more than a core caches by itself"""
GATHERED_ROWS = 8192

START_BYTES = 70 * MIB
"""VmHWM of a lean process once PyTorch's kernels are loaded and warm"""
CUDA_START_BYTES = 6 * MIB
"""how much more that is where PyTorch is the build for CUDA, with stubs in the place of its libraries"""
LEAN_BYTES = 40 * MIB
"""what it holds afterwards, with what measuring imports"""
PLAIN_BYTES = 190 * MIB
"""how much more both are where PyTorch is loaded with its Python"""
FLOOR_BYTES = 22 * MIB
"""of the process that measures the floor, without its child"""
PRODUCT_BYTES = 768 << 10
"""of the kernels that are built for one kind of product or convolution, and stay"""
REQUEST_FACTOR = 12
"""bytes of programs as Python's objects, by the bytes of their JSON"""
CHANNEL_BYTES = 20 * MIB
"""of the computation beside which transfers are measured, in 16 bits; in 32 twice that"""
WORKSPACE_BYTES = 6 * MIB
"""that operators take beside their inputs and outputs, at most, and the rounding of huge pages"""
CONVOLUTION_BYTES = 26 * MIB
"""the same of convolutions, beside copies of their inputs and outputs"""
PRODUCTS = ("mm", "conv", "project", "lora", "head_chunk", "linear", "attention", "lstm", "table_head")


@dataclass(frozen=True, kw_only=True)
class MeasuringMemory:
    turning_bytes: int
    """of buffers that are used in turn"""
    predicted_bytes: int
    """most that the processes which measure hold at once"""
    floor_children: int
    """processes in which the floor is measured at once: two where there is memory for them"""


class TurningBuffers(NamedTuple):
    """Sets of buffers that are used in turn."""

    rows: int
    """of each set; fewer than there are where not even one whole set has room"""
    copies: int
    row_bytes: int

    @property
    def bytes(self) -> int:
        return self.copies * self.rows * self.row_bytes


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is measured, as far as its memory depends on it."""

    programs: Sequence[Mapping[str, Any]]
    """of a profile, as dicts"""
    compute_dtype: str
    weights: Sequence[Sequence[Any]] = ()
    """(format, group, rows, columns, dtype) of those that are unpacked"""
    updates: Sequence[int] = ()
    """elements of trainables"""
    shapes: Sequence[Sequence[int]] = ()
    """theirs"""
    accumulate: int = 1
    step_bytes: int = 0
    """of the tensors of a step that is compared with PyTorch"""

    def most_turning(self, turning_bytes: int) -> int:
        """Most bytes of buffers that are used in turn, where they may have so many."""
        return max(
            [
                0,
                *(unpack_buffers(turning_bytes, *weight).bytes for weight in self.weights),
                *(update_buffers(turning_bytes, elements, self.accumulate).bytes for elements in self.updates),
                *(adafactor_buffers(turning_bytes, shape).bytes for shape in self.shapes),
            ]
        )


def measuring_memory(measured: Measured, memory: int | None = None) -> MeasuringMemory:
    """The largest buffers with which measuring takes `memory` bytes at most, or None: as large as they are best.

    Raises InputError where even the smallest take more.
    """
    least = predicted_memory(measured, SMALLEST_TURNING)
    if memory is not None and least.predicted_bytes > memory:
        raise InputError(
            f"measuring takes {format_size(least.predicted_bytes)} at least, {format_size(memory)} are given for it;"
            " take a smaller batch or sequence or a larger budget, or profile on a larger machine"
        )
    most = max(LEAST_TURNING, min(MOST_TURNING, 2 * largest_cache()))
    sizes = [SMALLEST_TURNING + (most - SMALLEST_TURNING) * part // TURNING_PARTS for part in range(TURNING_PARTS + 1)]
    rooms = (predicted_memory(measured, size, children) for size in reversed(sizes) for children in (2, 1))
    return next((room for room in rooms if memory is None or room.predicted_bytes <= memory), least)


def plain_bytes() -> int:
    """What PyTorch's Python adds to a process, where it is not left out."""
    return PLAIN_BYTES if os.environ.get("TIGHTFIT_TORCH") == "plain" else 0


def predicted_memory(measured: Measured, turning_bytes: int, floor_children: int = 1) -> MeasuringMemory:
    """What measuring takes with so many bytes of buffers that are used in turn, and so many processes for the floor at
    once.
    """
    plain = plain_bytes()
    request_bytes = REQUEST_FACTOR * sum(len(json.dumps(program)) for program in measured.programs)
    products = {
        likeness(program, operator)
        for program in measured.programs
        for operator in program["operators"]
        if any(word in operator["target"] for word in PRODUCTS)
    }
    beside = [_beside(program) for program in measured.programs]
    lean_bytes = LEAN_BYTES + request_bytes + len(products) * PRODUCT_BYTES
    channel_bytes = CHANNEL_BYTES * (2 if measured.compute_dtype == "float32" else 1)
    buffers = max(
        measured.most_turning(turning_bytes) + 3 * BETWEEN_BYTES,
        channel_bytes,
        measured.step_bytes,
        *(place(program, turning_bytes).bytes + most for program, most in zip(measured.programs, beside, strict=True)),
    )
    start_bytes = START_BYTES + (CUDA_START_BYTES if built_for_cuda() else 0)
    worker_bytes = max(start_bytes, lean_bytes + buffers)
    child_bytes = max(start_bytes, lean_bytes + max(beside, default=0))
    floor_bytes = FLOOR_BYTES + request_bytes + floor_children * child_bytes + (floor_children - 1) * plain
    return MeasuringMemory(
        turning_bytes=turning_bytes,
        predicted_bytes=plain + max(worker_bytes, floor_bytes),
        floor_children=floor_children,
    )


def unpack_buffers(turning_bytes: int, kind: str, group: int, rows: int, columns: int, dtype: str) -> TurningBuffers:
    """For unpacking a weight [rows, columns]: its packed and unpacked rows."""
    packed_row = Entry(name="row", shape=(1, columns), format=kind, group=group).row_bytes
    return _buffers(turning_bytes, rows, packed_row + columns * ELEMENT_BYTES[dtype])


def update_buffers(turning_bytes: int, elements: int, accumulate: int = 1) -> TurningBuffers:
    """For updating a trainable: value, gradient and two moments, where several steps make an update their sum, all in
    float32.
    """
    return _buffers(turning_bytes, elements, 4 * (4 + (accumulate > 1)))


def clipped_buffers(turning_bytes: int, elements: int) -> TurningBuffers:
    """For clipped updates: value, two moments and the sum."""
    return _buffers(turning_bytes * 4 // 5, elements, 4 * 4)  # the rest is for one gradient beside them


def adafactor_buffers(turning_bytes: int, shape: Sequence[int]) -> TurningBuffers:
    """For updating a trainable by Adafactor: value and gradient. There is one set."""
    rows, *others = shape or (1,)
    return _buffers(turning_bytes, rows, 2 * 4 * math.prod(others))._replace(copies=1)


def _buffers(turning_bytes: int, rows: int, row_bytes: int) -> TurningBuffers:
    rows_with_room = max(1, min(rows, turning_bytes // max(1, row_bytes)))
    copies = max(1, min(MOST_CALLS, turning_bytes // max(1, rows_with_room * row_bytes)))
    return TurningBuffers(rows_with_room, copies, row_bytes)


def largest_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the processor's largest cache; 0 if the system does not tell."""
    sizes = [0]
    for path in folder.glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes)


def _beside(program: Mapping[str, Any]) -> int:
    """Most bytes beside a program's arena: the outputs of an operator that are compared with those in the arena, as
    results and in place, and its workspace.
    """
    values = {value["name"]: value for value in program["values"]}
    return max((_beside_operator(operator, values) for operator in program["operators"]), default=0)


def _beside_operator(operator: Mapping[str, Any], values: Mapping[str, Mapping[str, Any]]) -> int:
    made: int = sum(values[name]["bytes"] for name in filter(None, operator["outputs"]))
    if "conv" not in operator["target"]:
        return 2 * made + WORKSPACE_BYTES
    read: int = sum(values[name]["bytes"] for name in operator["inputs"])
    return 2 * made + max(made, read) + CONVOLUTION_BYTES


def likeness(program: Mapping[str, Any], operator: Mapping[str, Any]) -> str:
    """A key that is equal for operators with the same target and shapes, whose kernels and workspace are therefore the
    same.
    """
    values = {value["name"]: value for value in program["values"]}
    names = [*operator["inputs"], None, *operator["outputs"]]
    shapes = [None if name is None else (values[name]["dtype"], values[name]["shape"]) for name in names]
    return json.dumps([operator["target"], shapes])
