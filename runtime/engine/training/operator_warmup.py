"""Every operator runs once before anything is loaded: its kernels are made, and what only making them needs is let go again.

oneDNN builds a kernel for every shape of a product, and code is mapped when it first runs. Made in the middle of a step, while the
arena is full, kernels would leave holes in the heap, and code that no later step needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.device.device import ALIGNMENT, Device
from tightfit.runtime.engine.start.process import apart, trim_heap
from tightfit.runtime.engine.training.executor import BoundOperator

LARGEST_LASTING = 320 << 10
"""bytes: what oneDNN keeps of a product is in smaller parts (the largest has 252 KiB), and most buffers of operators are larger"""


def warm_up_operators(operators: Iterable[BoundOperator], device: Device) -> None:
    """Run the operators on zeros, and give the arena's pages back.

    What gathers rows of weights is left out. Raises InputError for an operator that cannot be run.
    """
    with apart(LARGEST_LASTING):
        for operator in operators:
            if not operator.gathers:
                _run(operator, device)
                device.release()  # the next finds zeros as well: numbers that an operator takes for places have to be small
                trim_heap()


def _run(operator: BoundOperator, device: Device) -> None:
    """With its tensors one behind the other, of which a schedule has all in the arena at once."""
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
    except (RuntimeError, TypeError) as error:
        if "alloc" in str(error):  # torch has no MemoryError
            raise
        first = str(error).splitlines()[0]
        raise InputError(
            f"operator {operator.name} is not supported ({first}); use other layers in the model"
        ) from error


def _elements(size: Sequence[int], stride: Sequence[int]) -> int:
    """From the first to behind the last of a strided tensor."""
    return 0 if 0 in size else 1 + sum((length - 1) * step for length, step in zip(size, stride))
