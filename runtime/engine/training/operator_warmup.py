"""Runs every operator of a job once before the weights are loaded, so that its kernels are built while memory is free.

oneDNN builds a kernel for every shape of a matrix product, and the pages of library code are mapped when they first
run. In the middle of a step, with the arena full, building would leave holes in the heap, and mapped code that no later
step needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.device.device import ALIGNMENT, Device
from tightfit.runtime.engine.start.process import apart, trim_heap
from tightfit.runtime.engine.training.executor import BoundOperator
from tightfit.runtime.engine.training.job import POSITIONS_AT

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_LASTING = 320 << 10
"""bytes: heap blocks that oneDNN keeps with a kernel are smaller (the largest has 252 KiB), most buffers of operators
are larger; those get mappings of their own during the warm-up
"""


def warm_up_operators(operators: Iterable[BoundOperator], device: Device) -> None:
    """Run the operators on zeros in the arena, and give its pages back after each.

    Operators that gather rows from the weight store are left out. Raises InputError for an operator that cannot be run.
    """
    with apart(LARGEST_LASTING):
        for operator in operators:
            if not operator.gathers:
                _run(operator, device)
                device.release()  # the next one reads zeros too: leftover values, read as indices, could be too large
                trim_heap()


def _run(operator: BoundOperator, device: Device) -> None:
    """Run one operator, its tensors side by side from the start of the arena.

    A schedule has them all in the arena at once; should they not fit side by side, the operator is skipped.
    """
    needed = {
        local: (offset + _elements(size, stride)) << shift
        for _, _, local, _, shift, size, stride, offset in operator.reads
    }
    for write in operator.writes:
        if write is not None:
            local, _, shift, size, stride, _ = write
            needed[local] = max(needed.get(local, 0), _elements(size, stride) << shift)
    where, end = {}, 0
    for local, size_bytes in needed.items():
        where[local] = end
        end += -(-size_bytes // ALIGNMENT) * ALIGNMENT
    if end > device.size:
        return
    for container, key, local, window, shift, size, stride, offset in operator.reads:
        container[key] = window(size, stride, (where[local] >> shift) + offset)
    outputs = [
        None if write is None else write[1](write[3], write[4], where[write[0]] >> write[2])
        for write in operator.writes
    ]
    try:
        operator.call(outputs)
        if operator.name in POSITIONS_AT:
            _attend_in_long_rows(operator, outputs, device)
    except (RuntimeError, TypeError) as error:
        if "alloc" in str(error):  # torch has no MemoryError
            raise
        first = str(error).splitlines()[0]
        raise InputError(
            f"operator {operator.name} is not supported ({first}); use other layers in the model"
        ) from error


def _attend_in_long_rows(operator: BoundOperator, outputs: list[Tensor | None], device: Device) -> None:
    """Run attention on rows of one sample too. As positions, zeros are rows of samples of one token, whose products are the
    smallest.
    """
    arguments = operator.reads[0][0]
    positions = arguments[POSITIONS_AT[operator.name]]
    if positions is not None:
        positions.copy_(torch.arange(positions.shape[-1]))
        device.kernels.fused[operator.name](*arguments, out=outputs)


def _elements(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements that a strided tensor spans, from its first to its last."""
    return 0 if 0 in size else 1 + sum((length - 1) * step for length, step in zip(size, stride))
