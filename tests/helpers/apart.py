"""A test device whose arena is separate from host memory: bytes that the engine forgets to copy are garbage; copies are
counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tightfit.runtime.common.errors import CapError
from tightfit.runtime.engine.cpu.arena import Arena
from tightfit.runtime.engine.cpu.cpu import KERNELS
from tightfit.runtime.engine.device.device import Mark, ReachedMark
from tightfit.runtime.engine.device.meter import Meter

GARBAGE = 0xA5


class Apart:
    """The device, with at most `most` bytes of memory.

    Its operators are the CPU's, so that results are equal to the bit.
    """

    kernels = KERNELS

    def __init__(self, size: int, meter: Meter, most: int | None = None) -> None:
        if most is not None and size > most:
            raise CapError(f"the arena has {size} bytes and the device {most}")
        self.size, self.meter = size, meter
        self._memory = Arena(size)
        self._memory.bytes.fill_(GARBAGE)
        self.put_bytes = self.got_bytes = 0

    def window(self, dtype: str):
        return self._memory.window(dtype)

    def tensor(self, at: int, shape: Iterable[int], dtype: str) -> Tensor:
        return self._memory.tensor(at, shape, dtype)

    def raw(self, at: int, size: int) -> Tensor:
        return self._memory.raw(at, size)

    def host(self, at: int, shape: Iterable[int], dtype: str) -> Tensor:
        shape, kind = tuple(shape), getattr(torch, dtype)
        # Page-aligned, as direct I/O needs it.
        heap = torch.full((math.prod(shape) * kind.itemsize + 4096,), GARBAGE, dtype=torch.uint8)
        skip = -heap.data_ptr() % 4096
        return heap[skip : skip + math.prod(shape) * kind.itemsize].view(kind).view(shape)

    def mark(self) -> ReachedMark:
        return ReachedMark()

    def follow(self, mark: Mark) -> None:
        """Operators have finished when their calls return, and copies too."""

    def put(self, at: int, host: Tensor, after: Mark) -> Mark:
        flat = host.reshape(-1).view(torch.uint8)
        assert not self._inside(flat)
        self._memory.raw(at, flat.numel()).copy_(flat)
        self.put_bytes += flat.numel()
        return ReachedMark()

    def get(self, at: int, host: Tensor, after: Mark) -> Mark:
        flat = host.view(-1).view(torch.uint8)
        assert not self._inside(flat)
        flat.copy_(self._memory.raw(at, flat.numel()))
        self.got_bytes += flat.numel()
        return ReachedMark()

    def release(self) -> None:
        self._memory.bytes.fill_(GARBAGE & 0)

    def _inside(self, host: Tensor) -> bool:
        start = self._memory.address
        return start <= host.data_ptr() < start + self.size
