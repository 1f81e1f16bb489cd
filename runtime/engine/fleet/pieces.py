"""The trained tensors in the pieces in which they pass between the members of a fleet and lie on a shelf."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

ITEM = 4
"""bytes of a float32"""


class Slot(NamedTuple):
    """Where a tensor lies in its piece: elements [begin, end)."""

    piece: int
    begin: int
    end: int


class Pieces:
    """Whole tensors, one after the other, in pieces of at most `limit` bytes unless a tensor alone is larger.

    All members make the same pieces, since they have the same tensors in the same order. Sizes are in elements.
    """

    def __init__(self, sizes: Iterable[int], limit: int) -> None:
        """`sizes`: elements of each tensor, in order."""
        self._piece, self._begin, self._end = array("i"), array("q"), array("q")
        self.sizes = array("q")
        """elements of each piece"""
        for size in sizes:
            if not self.sizes or (self.sizes[-1] and (self.sizes[-1] + size) * ITEM > limit):
                self.sizes.append(0)
            self._piece.append(len(self.sizes) - 1)
            self._begin.append(self.sizes[-1])
            self.sizes[-1] += size
            self._end.append(self.sizes[-1])
        self._firsts = array("i", [0] * len(self.sizes))
        for tensor in reversed(range(len(self._piece))):
            self._firsts[self._piece[tensor]] = tensor

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def largest(self) -> int:
        """Elements of the largest piece."""
        return max(self.sizes, default=0)

    @property
    def total(self) -> int:
        """Elements of all pieces."""
        return sum(self.sizes)

    def slot(self, tensor: int) -> Slot:
        """Where a tensor, by its number, lies."""
        return Slot(self._piece[tensor], self._begin[tensor], self._end[tensor])

    def tensors(self, piece: int) -> Iterator[int]:
        """Numbers of the tensors in a piece, in order."""
        end = self._firsts[piece + 1] if piece + 1 < len(self._firsts) else len(self._piece)
        yield from range(self._firsts[piece], end)
