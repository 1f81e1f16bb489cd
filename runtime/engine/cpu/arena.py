"""The arena in host memory: one block in which every tensor of a plan lies, at offsets that the plan fixed."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.pages import make_pages


class Arena:
    """`size` bytes of anonymous memory. Pages become resident when the schedule first uses them, and stay so.

    The plan counts the whole arena as resident.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._map = make_pages(size, used=True)
        self.bytes: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.address = self.bytes.data_ptr()
        self._flat: dict[str, tuple[Tensor, int]] = {}

    def window(self, dtype: str) -> tuple[Callable[..., Tensor], int]:
        """The function that makes views of `dtype`, and log2 of an element's bytes.

        The function is `as_strided(size, stride, offset)` of the whole arena; its offset is in elements.
        """
        if dtype not in self._flat:
            kind: torch.dtype = getattr(torch, dtype)
            whole = self.bytes[: self.size // kind.itemsize * kind.itemsize]
            self._flat[dtype] = (whole.view(kind), kind.itemsize.bit_length() - 1)
        flat, shift = self._flat[dtype]
        return flat.as_strided, shift

    def tensor(self, at: int, shape: Iterable[int], dtype: str) -> Tensor:
        """A contiguous view of the arena at byte offset `at`."""
        window, shift = self.window(dtype)
        size = tuple(shape)
        stride, step = [], 1
        for length in reversed(size):
            stride.append(step)
            step *= max(1, length)
        return window(size, tuple(reversed(stride)), at >> shift)

    def raw(self, at: int, size: int) -> Tensor:
        """`size` bytes at offset `at`, uint8."""
        return self.bytes.narrow(0, at, size)

    def release(self) -> None:
        """Give all pages back to the kernel; their contents are zero afterwards."""
        self._map.madvise(mmap.MADV_DONTNEED)
