"""The CPU as a device: its arena is host memory, so that host tensors are the arena's own bytes and nothing is
copied.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from torch import Tensor

from tightfit.runtime.engine.cpu.arena import Arena
from tightfit.runtime.engine.cpu.direct import DIRECT
from tightfit.runtime.engine.cpu.operators import OPERATORS
from tightfit.runtime.engine.device.device import Kernels, Mark, ReachedMark
from tightfit.runtime.engine.device.meter import Meter

REACHED = ReachedMark()
KERNELS = Kernels(fused=OPERATORS, direct=DIRECT, dispatch_key="CPU")


class Cpu(Arena):
    """A `Device` whose arena has `size` bytes; its meter compares the process's resident set with the cap."""

    kernels = KERNELS

    def __init__(self, size: int, meter: Meter) -> None:
        super().__init__(size)
        self.meter = meter

    def host(self, offset: int, shape: Iterable[int], dtype: str) -> Tensor:
        return self.tensor(offset, shape, dtype)

    def mark(self) -> Mark:
        """The CPU's operators have finished when their calls return."""
        return REACHED

    def follow(self, mark: Mark) -> None:
        """The CPU's copies have finished when their calls return."""

    def put(self, offset: int, host: Tensor, after: Mark) -> Mark:
        if host.data_ptr() != self.address + offset:
            ctypes.memmove(self.address + offset, host.data_ptr(), host.numel() * host.itemsize)
        return REACHED

    def get(self, offset: int, host: Tensor, after: Mark) -> Mark:
        if host.data_ptr() != self.address + offset:
            ctypes.memmove(host.data_ptr(), self.address + offset, host.numel() * host.itemsize)
        return REACHED
