"""Shelves: where a member of a fleet keeps gradients and the optimizer's states, in memory or in a file without a name.

A shelf has rows, each of which has room for every piece of the trained tensors: a row for the gradients of each
micro-batch, or one for each state.
"""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Protocol

from tightfit.runtime.engine.cpu.pages import make_pages
from tightfit.runtime.engine.device.spill import BLOCK, SpillFile
from tightfit.runtime.engine.fleet.pieces import ITEM, Pieces

if TYPE_CHECKING:
    from torch import Tensor


class Shelf(Protocol):
    """Rows of pieces, float32; what was never written is zero."""

    def read(self, row: int, piece: int, out: Tensor) -> Tensor:
        """A piece of a row as a tensor [elements of the piece]: `out`, filled, or the shelf's own memory."""
        ...

    def write(self, row: int, piece: int, values: Tensor) -> None:
        """Put a piece of a row; nothing is done for a tensor that `read` gave out of the shelf's own memory."""
        ...

    def zero(self) -> None:
        """Make every row zero."""
        ...

    def close(self) -> None: ...


class MemoryShelf:
    """A shelf in anonymous memory, apart from the heap."""

    def __init__(self, pieces: Pieces, rows: int) -> None:
        import torch

        self._starts = [0]
        for size in pieces.sizes:
            self._starts.append(self._starts[-1] + size)
        self._rows = [
            torch.frombuffer(make_pages(pieces.total * ITEM), dtype=torch.float32)[: pieces.total] for _ in range(rows)
        ]

    def read(self, row: int, piece: int, out: Tensor | None = None) -> Tensor:
        return self._rows[row][self._starts[piece] : self._starts[piece + 1]]

    def write(self, row: int, piece: int, values: Tensor) -> None:
        own = self.read(row, piece)
        if own.data_ptr() != values.data_ptr():
            own.copy_(values)

    def zero(self) -> None:
        for row in self._rows:
            row.zero_()

    def close(self) -> None:
        self._rows.clear()


class DiskShelf:
    """A shelf in a file without a name, read and written past the page cache. Several threads may use it."""

    def __init__(self, pieces: Pieces, rows: int, directory: str) -> None:
        """Raises RunError where `directory` lacks the space."""
        self._sizes = pieces.sizes
        self._starts = [0]
        for size in pieces.sizes:
            self._starts.append(self._starts[-1] + -(-size * ITEM // BLOCK) * BLOCK)
        self._rows = rows
        self._file = SpillFile(directory, rows * self._starts[-1])
        self._lock = threading.Lock()
        """held while the file's staging buffer may be in use"""

    def read(self, row: int, piece: int, out: Tensor) -> Tensor:
        values = out[: self._sizes[piece]]
        with self._lock:
            self._file.read(values.data_ptr(), values.numel() * ITEM, self._at(row, piece))
        return values

    def write(self, row: int, piece: int, values: Tensor) -> None:
        with self._lock:
            self._file.write(values.data_ptr(), values.numel() * ITEM, self._at(row, piece))

    def zero(self) -> None:
        with self._lock:
            for row in range(self._rows):
                for piece, size in enumerate(self._sizes):
                    self._file.zero(size * ITEM, self._at(row, piece))

    def close(self) -> None:
        self._file.close()

    def _at(self, row: int, piece: int) -> int:
        return row * self._starts[-1] + self._starts[piece]


class Buffers:
    """Page-aligned float32 buffers of `size` elements, which are taken and given back; at most `count` at a time."""

    def __init__(self, size: int, count: int) -> None:
        import torch

        each = -(-max(1, size) * ITEM // BLOCK) * BLOCK
        self._pages = make_pages(count * each)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        assert address % BLOCK == 0  # so that whole blocks pass to the disk without a copy
        whole = torch.frombuffer(self._pages, dtype=torch.float32)
        step = each // ITEM
        self._free = [whole[n * step : n * step + size] for n in range(count)]
        self._changed = threading.Condition()

    def take(self) -> Tensor:
        """A free buffer; waits until one is given back."""
        with self._changed:
            while not self._free:
                self._changed.wait()
            return self._free.pop()

    def take_at_once(self) -> Tensor | None:
        """A free buffer; None if there is none."""
        with self._changed:
            return self._free.pop() if self._free else None

    def give_back(self, buffer: Tensor) -> None:
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()
