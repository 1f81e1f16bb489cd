"""The arena in host memory: one block in which every tensor of a plan lies, at offsets that the plan fixed."""

from __future__ import annotations

import math
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
        self._windows: dict[str, Callable[[int, int], Tensor]] = {}

    def window(self, dtype: str) -> Callable[[int, int], Tensor]:
        """The function that makes a flat tensor of `dtype` from a byte offset and a number of elements.

        The tensor's storage begins at that offset and ends with the tensor. Some of PyTorch's kernels copy the storage
        of an operand from its beginning on: in a storage of the whole arena that would be all that lies before it.
        """
        if dtype not in self._windows:
            torch_dtype: torch.dtype = getattr(torch, dtype)
            pages = self._map

            def window(offset: int, elements: int) -> Tensor:
                if not elements:
                    return torch.empty(0, dtype=torch_dtype)
                return torch.frombuffer(pages, dtype=torch_dtype, count=elements, offset=offset)

            self._windows[dtype] = window
        return self._windows[dtype]

    def tensor(self, offset: int, shape: Iterable[int], dtype: str) -> Tensor:
        """A contiguous view of the arena at byte offset `offset`."""
        size = tuple(shape)
        return self.window(dtype)(offset, math.prod(size)).view(size)

    def raw(self, offset: int, size: int) -> Tensor:
        """`size` bytes at `offset`, uint8."""
        return self.window("uint8")(offset, size)

    def release(self) -> None:
        """Give all pages back to the kernel; their contents are zero afterwards."""
        self._map.madvise(mmap.MADV_DONTNEED)
