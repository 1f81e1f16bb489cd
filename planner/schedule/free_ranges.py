"""Interval bookkeeping for the arena: which bytes are taken during which entries, and the gaps between them."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

import numpy as np

LEAF = 64
"""entries per leaf of the tree"""
ENDLESS = int(np.iinfo(np.int64).max)
Range = tuple[int, int]
"""[low, high) of bytes"""


class TakenRanges:
    """Which bytes are taken when: a binary tree (a segment tree) over the entries, so that a query is cheap however
    long the step.

    A node stands for a stretch of entries, a leaf for `LEAF` of them. It stores the bytes taken during all of its
    stretch (`always`) and those taken at any time of it (`ever`), as sorted ranges that do not touch; a leaf also lists
    the ranges taken during a part of its stretch only, each with its entries (`parts`).
    """

    def __init__(self, length: int) -> None:
        leaves = -(-length // LEAF)
        self.first_leaf = 1 << max(0, leaves - 1).bit_length()
        self.always: list[list[Range]] = [[] for _ in range(2 * self.first_leaf)]
        self.ever: list[list[Range]] = [[] for _ in range(2 * self.first_leaf)]
        self.parts: list[list[tuple[int, int, int, int]]] = [[] for _ in range(self.first_leaf)]
        """per leaf: (low byte, end byte, first entry, last entry)"""

    def taken(self, spans: list[tuple[int, int]]) -> list[Range]:
        """Ranges of bytes that are taken at any time of `spans`, sorted by their low end; they may overlap."""
        ranges: list[Range] = []
        seen_parents: set[int] = set()
        for first, last in spans:
            nodes, leaves = self._cover(first, last)
            for node in nodes:
                ranges += self.ever[node]
            for leaf in leaves:
                ranges += self.always[leaf + self.first_leaf]
                ranges += [(low, high) for low, high, begin, end in self.parts[leaf] if begin <= last and end >= first]
            for node in (*nodes, *(leaf + self.first_leaf for leaf in leaves)):
                parent = node >> 1
                while parent and parent not in seen_parents:
                    seen_parents.add(parent)
                    ranges += self.always[parent]
                    parent >>= 1
        ranges.sort()
        return ranges

    def add(self, low: int, high: int, first: int, last: int) -> None:
        """Take the bytes [low, high) from entry `first` to entry `last`, both included."""
        nodes, leaves = self._cover(first, last)
        for node in nodes:
            _add_range(self.always[node], low, high)
        for leaf in leaves:
            self.parts[leaf].append((low, high, first, last))
        for node in (*nodes, *(leaf + self.first_leaf for leaf in leaves)):
            # A node that already has these bytes in `ever` has passed them on to its ancestors before.
            upward = node
            while upward and _add_range(self.ever[upward], low, high):
                upward >>= 1

    def _cover(self, first: int, last: int) -> tuple[list[int], list[int]]:
        """The largest nodes that lie wholly within the span, and the leaves that it covers in part."""
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


def _add_range(ranges: list[Range], low: int, high: int) -> bool:
    """Merge a range into sorted ranges that do not touch each other; whether it adds any bytes."""
    index = bisect.bisect_right(ranges, (low, ENDLESS))
    if index and ranges[index - 1][1] >= low:
        index -= 1
        if ranges[index][1] >= high:
            return False
        low = ranges[index][0]
    end = index
    while end < len(ranges) and ranges[end][0] <= high:
        high = max(high, ranges[end][1])
        end += 1
    ranges[index:end] = [(low, high)]
    return True


def united(ranges: Iterable[Range]) -> list[Range]:
    """The union of the ranges, as sorted ranges that do not touch."""
    result: list[Range] = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1]:
            result[-1] = result[-1][0], max(high, result[-1][1])
        else:
            result.append((low, high))
    return result


def gap(taken: list[Range], base: int, size: int, alignment: int, *, tight: bool) -> int:
    """Offset, from `base` up, of a gap of at least `size` bytes between the ranges `taken`: the lowest such gap, or, if
    `tight`, the smallest; above all ranges where there is none.

    The ranges are sorted by their low end and may overlap; the offset is a multiple of `alignment`.
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
    """Highest aligned offset, not below `base`, at which `size` bytes lie clear of the ranges `taken` and end at `top`
    or lower; None: there is none.
    """
    end = top
    for low, high in sorted(taken, key=lambda taken: -taken[1]):
        offset = (end - size) // alignment * alignment
        if offset >= high:
            return offset if offset >= base else None
        end = min(end, low)
    offset = (end - size) // alignment * alignment
    return offset if offset >= base else None
