"""Offsets in one arena: every tensor gets a place for as long as it is resident, and no two overlap.

Offline dynamic storage allocation: an item is a tensor with its intervals of residency (tensors that are resident across
steps keep one place for all of theirs). Items are placed one by one at the lowest, or the tightest, gap that is free over
all their intervals; a few orders are tried and the lowest arena is kept. Where none of them is low enough, orders are
searched for: what found no place moves ahead, with all that is like it in other layers, and chance moves a few others
(the first is "squeaky wheel" optimization, Joslin and Clements 1999).
"""

from __future__ import annotations

import bisect
import math
import random
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.emit import Entry, made_by
from planner.graph import ALIGNMENT, PACKED_ALIGNMENT, aligned

MOVES = {"spill", "fetch"}
DIRECT_BYTES = 64 << 10
"""Tensors from this size on that move between memory and disk lie on pages: the disk then reads and writes them in place."""

LEAF = 64
"""entries"""
TRIES = 400
"""orders searched for one height; in them tensors of one size and name, numbers aside, share a rank"""
WORK = 100_000
"""tensors placed in such a search, about a second at most; counted, not timed, so that the same input gives the same arena"""
FEW = 80
"""items at most that have a rank each in every other stretch of the search, which is then twice as long"""
HALVINGS = 4
"""heights tried in between where the lowest arena is asked for"""
AROUND = 64
"""entries before and after one where places are short that are looked at together"""
SPANS = 4
"""of a tensor without a place that are looked at"""
AHEAD = (0.3, 2.0)
"""by how much the logarithm of a size is raised for an item that found no place"""
CHANCE, SPREAD = 0.2, 1.0
"""share of the other ranks that chance moves at the same time, and by how much"""
RESTART = 20
"""tries after which all ranks are again as the sizes say"""
ENDLESS = int(np.iinfo(np.int64).max)
NUMBER = re.compile(r"\d+")
"""what the names of equal tensors of different layers differ in; within a layer some that are merged too are not alike"""


@dataclass(frozen=True, kw_only=True)
class Arena:
    bytes: int
    resident: dict[str, int]
    """offsets of the tensors that are resident across steps"""
    train: dict[tuple[int, str], int]
    evaluate: dict[tuple[int, str], int]
    """(index of the entry that makes it, tensor) -> offset"""


@dataclass(kw_only=True)
class Item:
    """A tensor from when it is made until it is freed."""

    name: str
    size: int
    alignment: int
    spans: list[tuple[int, int]]
    """[first, last] entry, both inclusive, evaluate entries counted on after train's"""
    makers: list[int]
    """entries that make it; -1: it is there from the start"""
    offset: int = 0


Placed = tuple[list[Item], int]
"""every tensor in its place, and the bytes that they take"""


def placed_items(
    train: tuple[Entry, ...],
    evaluate: tuple[Entry, ...],
    resident: Iterable[str],
    sizes: dict[str, int],
    target: int = 0,
    deadline: float = math.inf,
    *,
    search: bool = True,
) -> Placed:
    """Every tensor in its place in an arena of at most `target` bytes if one is found; with 0 in the lowest that is. The
    search stops at the live bytes.

    Without `search` only the few orders are tried. Past `deadline`, on the monotonic clock, only the first order is tried.
    """
    length = len(train) + len(evaluate)
    every = _items(train, evaluate, tuple(resident), sizes)
    lowest = max(target, int(_live(every, length).max(initial=0)))
    # What is resident all the time lies at the bottom, the widest alignment first.
    whole = [item for item in every if sum(last - first + 1 for first, last in item.spans) >= length]
    whole.sort(key=lambda item: (-item.alignment, item.name))
    base = 0
    for item in whole:
        item.offset = aligned(base, item.alignment)
        base = item.offset + item.size
    inside = {id(item) for item in whole}
    items = [item for item in every if id(item) not in inside]
    best: tuple[int, list[int]] | None = None
    for order, tight in _orders(items):
        if best is not None and time.monotonic() > deadline:
            break
        offsets, failed = _assign(items, order, base, ENDLESS if best is None else best[0], length, tight=tight)
        if failed is not None:
            continue
        best = _height(items, offsets, base), offsets
        if best[0] <= lowest:
            break
    assert best is not None
    if search or len(items) <= FEW:
        best = _lower(items, base, length, best, lowest, only=target > 0, deadline=deadline)
    for item, offset in zip(items, best[1]):
        item.offset = offset
    return every, aligned(max(base, best[0]))


def _height(items: list[Item], offsets: list[int], base: int) -> int:
    return max((offset + item.size for offset, item in zip(offsets, items)), default=base)


def arena_of(items: Iterable[Item], height: int, split: int) -> Arena:
    """Offsets by the entry that makes a tensor; `split` entries of training come first."""
    fixed: dict[str, int] = {}
    train: dict[tuple[int, str], int] = {}
    evaluate: dict[tuple[int, str], int] = {}
    for item in items:
        for maker in item.makers:
            if maker < 0:
                fixed[item.name] = item.offset
            elif maker < split:
                train[maker, item.name] = item.offset
            else:
                evaluate[maker - split, item.name] = item.offset
    return Arena(bytes=height, resident=fixed, train=train, evaluate=evaluate)


def _items(
    train: tuple[Entry, ...], evaluate: tuple[Entry, ...], resident: tuple[str, ...], sizes: dict[str, int]
) -> list[Item]:
    length = len(train) + len(evaluate)
    moved = {e.name for e in (*train, *evaluate) if e.verb in MOVES and sizes[e.name] >= DIRECT_BYTES}

    def item(name: str, spans: list[tuple[int, int]], maker: int) -> Item:
        paged = name in moved or name.startswith("packed:")
        alignment = PACKED_ALIGNMENT if paged else ALIGNMENT
        return Item(name=name, size=sizes[name], alignment=alignment, spans=spans, makers=[maker])

    always = {name: item(name, [], -1) for name in resident}
    items = list(always.values())

    def close(name: str, span: tuple[int, int], maker: int) -> None:
        if name in always:
            always[name].spans.append(span)
            if maker >= 0:
                always[name].makers.append(maker)
        else:
            items.append(item(name, [span], maker))

    for entries, base in ((train, 0), (evaluate, len(train))):
        since = dict.fromkeys(resident, (base, -1))
        for index, entry in enumerate(entries, base):
            for name in made_by(entry):
                if name not in since:
                    since[name] = (index, index)
            if entry.verb == "free":
                start, maker = since.pop(entry.name)
                close(entry.name, (start, index), maker)
        for name, (start, maker) in since.items():
            close(name, (start, base + len(entries) - 1), maker)
    assert all(item.spans[-1][1] < length or length == 0 for item in items if item.spans)
    return [item for item in items if item.size]


def _live(items: list[Item], length: int) -> npt.NDArray[np.int64]:
    """Bytes by entry."""
    change = np.zeros(length + 1, dtype=np.int64)
    for item in items:
        for first, last in item.spans:
            change[first] += item.size
            change[last + 1] -= item.size
    return np.cumsum(change)


def _orders(items: list[Item]) -> Iterable[tuple[list[int], bool]]:
    """Orders to try, with lowest or tightest fit: by size, by rough size and lifetime, by lifetime, by both weighed."""
    every = range(len(items))
    life = [sum(last - first + 1 for first, last in item.spans) for item in items]
    size = [item.size for item in items]
    start = [item.spans[0][0] for item in items]
    keys: list[tuple[Callable[[int], tuple[float, ...]], bool]] = [
        (lambda i: (-size[i], -life[i], start[i]), False),
        (lambda i: (-size[i].bit_length(), -life[i], start[i]), False),
        (lambda i: (-life[i], -size[i], start[i]), True),
        (lambda i: (-size[i].bit_length(), start[i], -life[i]), False),
        (lambda i: (-size[i] * math.sqrt(life[i]), start[i]), True),
    ]
    for key, tight in keys:
        yield sorted(every, key=key), tight


def _lower(
    items: list[Item], base: int, length: int, best: tuple[int, list[int]], goal: int, *, only: bool, deadline: float
) -> tuple[int, list[int]]:
    """(height, offsets) of at most `goal`, searched for where `best` is higher; unless that `only`, of heights between too."""
    least = goal
    for turn in range(1 if only else 1 + HALVINGS):
        if best[0] <= least + (ALIGNMENT if turn else 0) or time.monotonic() > deadline:
            break
        height = (least + best[0]) // 2 if turn else goal
        found = _searched(items, base, length, height, deadline)
        if found is None:
            least = height if turn else least
        else:
            best = found
    return best


def _searched(items: list[Item], base: int, length: int, goal: int, deadline: float) -> tuple[int, list[int]] | None:
    """(height, offsets) of at most `goal`; None where TRIES orders do not come to it. Chance is the same every time.

    Layers are much alike: an order is tried on what is there while most is live, then on everything, and where that fails
    on what is there then too.
    """
    few = len(items) <= FEW
    alike = [(item.size, NUMBER.sub("", item.name)) for item in items]
    single = [(item.size, f"{number}") for number, item in enumerate(items)]
    like, raised = alike, dict.fromkeys(alike, 0.0)
    watched = np.zeros(length + 1, dtype=np.int64)

    def watch(*entries: int) -> list[int]:
        for entry in entries:
            watched[max(0, entry - AROUND) : min(length, entry + AROUND + 1)] = 1
        before = np.concatenate([[0], np.cumsum(watched)])
        return [
            n for n, item in enumerate(items) if any(before[last + 1] > before[first] for first, last in item.spans)
        ]

    def assign(numbers: Iterable[int]) -> tuple[list[int], int | None]:
        order = sorted(numbers, key=lambda number: (-math.log(items[number].size) - raised[like[number]], number))
        return _assign(items, order, base, goal + 1, length, tight=False)

    chance = random.Random(0)
    looked = watch(int(_live(items, length).argmax()))
    work = WORK
    for turn in range(1, (2 if few else 1) * TRIES + 1):
        if work <= 0 or time.monotonic() > deadline:
            break
        work -= len(looked)
        offsets, failed = assign(looked)
        if failed is None:
            work -= len(items)
            offsets, failed = assign(range(len(items)))
            if failed is None:
                return _height(items, offsets, base), offsets
            looked = watch(*(first for first, _ in items[failed].spans[:SPANS]))
        if turn % RESTART == 0:
            like = single if few and turn // RESTART % 2 else alike
            raised = dict.fromkeys(like, 0.0)
        raised[like[failed]] += chance.uniform(*AHEAD)
        for kind in raised:
            if chance.random() < CHANCE:
                raised[kind] += chance.gauss(0.0, SPREAD)
    return None


Range = tuple[int, int]
"""[low, high) of bytes"""


class _Places:
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


def _assign(
    items: list[Item], order: list[int], base: int, below: int, length: int, *, tight: bool
) -> tuple[list[int], int | None]:
    """Offsets from `base` up, placed in `order` in the lowest (or tightest) gap that is free over an item's spans; and the
    first item that would end at `below` or higher, None where all are placed.
    """
    places = _Places(length)
    offsets = [0] * len(items)
    for index in order:
        item = items[index]
        offset = gap(places.taken(item.spans), base, item.size, item.alignment, tight=tight)
        if offset + item.size >= below:
            return offsets, index
        offsets[index] = offset
        for begin, end in item.spans:
            places.add(offset, offset + item.size, begin, end)
    return offsets, None


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
