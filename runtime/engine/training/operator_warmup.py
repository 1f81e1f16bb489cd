"""Runs every operator of a job once before the weights are loaded, so that its kernels are built while memory is free.

oneDNN builds a kernel for every shape of a matrix product, and the pages of library code are mapped when they first
run. In the middle of a step, with the arena full, building would leave holes in the heap, and mapped code that no later
step needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.device.device import Device, aligned
from tightfit.runtime.engine.device.expert_blocks import BLOCK_ROWS
from tightfit.runtime.engine.start.process import apart, trim_heap
from tightfit.runtime.engine.training.executor import BoundOperator
from tightfit.runtime.engine.training.job import BEGINS_AT, EXPERTS_AT, POSITIONS_AT, TILES_AT

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_LASTING = 320 << 10
"""bytes: heap blocks that oneDNN keeps with a kernel are smaller (the largest has 252 KiB), most buffers of operators
are larger; those get mappings of their own during the warm-up
"""


def warm_up_operators(operators: Iterable[BoundOperator], device: Device) -> None:
    """Run the operators on zeros in the arena, and give its pages back after each.

    Operators that gather rows from the weight store are left out; experts, chunks of the head and attention to tiles
    are not called where others before them made the same products. Raises InputError for an operator that cannot be
    run.
    """
    met: set[tuple[object, ...]] = set()
    with apart(LARGEST_LASTING):
        for operator in {operator.call: operator for operator in operators}.values():  # those of equal tiles are one
            work = _work(operator)
            if operator.gathers or not _placed(operator, device) or work in met:
                continue
            _run(operator, device)
            device.release()  # the next one reads zeros too: leftover values, read as indices, could be too large
            trim_heap()
            if work:
                met.add(work)


def _work(operator: BoundOperator) -> tuple[object, ...]:
    """What tells which products an operator makes, of those of which many make the same; empty: it is no such one."""
    arguments = operator.reads[0].container if operator.reads else []
    read = [(read.dtype, read.size, read.stride) for read in operator.reads]
    if operator.name in TILES_AT and not arguments[-1]:
        return operator.name, min(len(arguments[TILES_AT[operator.name]]), 2), frozenset(read)
    return (operator.name, *read) if operator.name in BEGINS_AT else ()


def _placed(operator: BoundOperator, device: Device) -> bool:
    """Make an operator's views of its tensors, side by side from the start of the arena: they stay. Whether they fit
    there; a schedule has them all in the arena at once, but not side by side.
    """
    views = [*operator.reads, *(write for write in operator.writes if write is not None)]
    needed: dict[int, int] = {}
    for view in views:
        needed[view.place] = max(needed.get(view.place, 0), aligned(view.bytes))
    where, end = {}, 0
    for place, size in needed.items():
        where[place] = end
        end += size
    if end > device.size:
        return False
    for view in views:
        view.move(where[view.place])
    return True


def _run(operator: BoundOperator, device: Device) -> None:
    """Run one operator on the tensors that it has views of."""
    outputs = [None if write is None else write.tensor for write in operator.writes]
    try:
        operator.call(outputs)
        if operator.name in POSITIONS_AT:
            _attend_in_long_rows(operator, outputs, device)
        if operator.name in EXPERTS_AT:
            _meet_every_block(operator, outputs, device)
    except (RuntimeError, TypeError) as error:
        if "alloc" in str(error):  # torch has no MemoryError
            raise
        first = str(error).splitlines()[0]
        raise InputError(
            f"operator {operator.name} is not supported ({first}); use other layers in the model"
        ) from error


def _meet_every_block(operator: BoundOperator, outputs: list[Tensor | None], device: Device) -> None:
    """Run experts on every size of the blocks in which their rows are multiplied."""
    arguments = operator.reads[0].container
    at, _, first = EXPERTS_AT[operator.name]
    index = arguments[at]
    for rows in BLOCK_ROWS:
        index.fill_(-1)
        index[:rows, 0].fill_(arguments[first])
        device.kernels.fused[operator.name](*arguments, out=outputs)


def _attend_in_long_rows(operator: BoundOperator, outputs: list[Tensor | None], device: Device) -> None:
    """Run attention on rows of one sample too. As positions, zeros are rows of samples of one token, whose products are
    the smallest.
    """
    arguments = operator.reads[0].container
    positions = arguments[POSITIONS_AT[operator.name]]
    if positions is not None:
        positions.copy_(torch.arange(positions.shape[-1]))
        device.kernels.fused[operator.name](*arguments, out=outputs)
