"""Which bytes of an arena are taken when, and the gaps between them."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

import numpy as np

LEAF = 64
"""entries"""
ENDLESS = int(np.iinfo(np.int64).max)
Range = tuple[int, int]
"""[low, high) of bytes"""


class Places:
    """Which bytes are taken when: a binary tree over the entries, so that looking up costs little however long the step is.

    A node stands for a stretch of entries, the leaves for stretches of LEAF. It knows the bytes taken during all of its
    stretch and those taken at any time of it, as ranges in order that do not touch; a leaf also knows who takes what is not
    taken all the time.
    """

    def __init__(self, length: int) -> None:
        leaves = -(-length // LEAF)
        self.first_leaf = 1 << max(0, leaves - 1).bit_length()
        self.always: list[list[Range]] = [[] for _ in range(2 * self.first_leaf)]
        self.ever: list[list[Range]] = [[] for _ in range(2 * self.first_leaf)]
        self.parts: list[list[tuple[int, int, int, int]]] = [[] for _ in range(self.first_leaf)]
        """per leaf: (low, high, first, last)"""

    def taken(self, spans: list[tuple[int, int]]) -> list[Range]:
        """Ranges of bytes that are taken at any time of `spans`, sorted by their low end; they may overlap."""
        found: list[Range] = []
        above: set[int] = set()
        for first, last in spans:
            nodes, leaves = self._cover(first, last)
            for node in nodes:
                found += self.ever[node]
            for leaf in leaves:
                found += self.always[leaf + self.first_leaf]
                found += [(low, high) for low, high, begin, end in self.parts[leaf] if begin <= last and end >= first]
            for node in (*nodes, *(leaf + self.first_leaf for leaf in leaves)):
                parent = node >> 1
                while parent and parent not in above:
                    above.add(parent)
                    found += self.always[parent]
                    parent >>= 1
        found.sort()
        return found

    def add(self, low: int, high: int, first: int, last: int) -> None:
        """Take bytes from entry `first` to entry `last`."""
        nodes, leaves = self._cover(first, last)
        for node in nodes:
            _join(self.always[node], low, high)
        for leaf in leaves:
            self.parts[leaf].append((low, high, first, last))
        for node in (*nodes, *(leaf + self.first_leaf for leaf in leaves)):
            # Where the bytes are known to be taken at some time, they are known above too.
            upward = node
            while upward and _join(self.ever[upward], low, high):
                upward >>= 1

    def _cover(self, first: int, last: int) -> tuple[list[int], list[int]]:
        """The largest nodes within the span, and the leaves that it covers in part."""
        leaves = []
        left, right = first // LEAF, last // LEAF
        if first % LEAF:
            leaves.append(left)
            left += 1
        if (last + 1) % LEAF:
            if right >= left:
                leaves.append(right)
            right -= 1
        nodes = []
        low, high = left + self.first_leaf, right + self.first_leaf + 1
        while low < high:
            if low & 1:
                nodes.append(low)
                low += 1
            if high & 1:
                high -= 1
                nodes.append(high)
            low >>= 1
            high >>= 1
        return nodes, leaves


def _join(ranges: list[Range], low: int, high: int) -> bool:
    """Unite a range with others that do not touch each other; whether it adds anything."""
    at = bisect.bisect_right(ranges, (low, ENDLESS))
    if at and ranges[at - 1][1] >= low:
        at -= 1
        if ranges[at][1] >= high:
            return False
        low = ranges[at][0]
    end = at
    while end < len(ranges) and ranges[end][0] <= high:
        high = max(high, ranges[end][1])
        end += 1
    ranges[at:end] = [(low, high)]
    return True


def united(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes as ranges in order that do not touch."""
    result: list[Range] = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1]:
            result[-1] = result[-1][0], max(high, result[-1][1])
        else:
            result.append((low, high))
    return result


def gap(taken: list[Range], base: int, size: int, alignment: int, *, tight: bool) -> int:
    """Lowest offset of a gap of at least `size` from `base` up between the ranges `taken`, or of the smallest such gap.

    The ranges are sorted by their low end.
    """
    start = base + -base % alignment
    best, least = -1, ENDLESS
    for low, high in taken:
        if low - start >= size and least > low - start:
            if not tight:
                return start
            best, least = start, low - start
        if high > start:
            start = high + -high % alignment
    return start if best < 0 else best


def top_gap(taken: Iterable[Range], base: int, top: int, size: int, alignment: int) -> int | None:
    """Highest offset from `base` up at which `size` bytes end at `top` or lower between the ranges `taken`."""
    end = top
    for low, high in sorted(taken, key=lambda taken: -taken[1]):
        offset = (end - size) // alignment * alignment
        if offset >= high:
            return offset if offset >= base else None
        end = min(end, low)
    offset = (end - size) // alignment * alignment
    return offset if offset >= base else None
