"""Offsets in one arena: every tensor gets a place for as long as it is resident, and no two overlap.

Offline dynamic storage allocation: an item is a tensor with its intervals of residency (tensors that are resident across
steps keep one place for all of theirs). Items are placed one by one at the lowest, or the tightest, gap that is free over
all their intervals; a few orders are tried and the lowest arena is kept.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.emit import Entry, made_by
from planner.graph import ALIGNMENT, PACKED_ALIGNMENT, aligned

MOVES = {"spill", "fetch"}
DIRECT_BYTES = 64 << 10
"""Tensors from this size on that move between memory and disk lie on pages: the disk then reads and writes them in place."""

Offsets = NDArray[np.int64]
FEW = 80
SHUFFLES = 200
"""random orders tried for arenas of at most FEW items"""
ENDLESS = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, kw_only=True)
class Arena:
    bytes: int
    resident: dict[str, int]
    """offsets of the tensors that are resident across steps"""
    train: dict[tuple[int, str], int]
    evaluate: dict[tuple[int, str], int]
    """(index of the entry that makes it, tensor) -> offset"""


@dataclass(kw_only=True)
class _Item:
    name: str
    size: int
    alignment: int
    spans: list[tuple[int, int]]
    """[first, last] entry, both inclusive, evaluate entries counted on after train's"""
    makers: list[int]
    """entries that make it; -1: it is there from the start"""
    offset: int = 0


def place(
    train: tuple[Entry, ...],
    evaluate: tuple[Entry, ...],
    resident: Iterable[str],
    sizes: dict[str, int],
    target: int = 0,
    deadline: float = math.inf,
) -> Arena:
    """The lowest arena found; stops at one of at most `target` bytes or at the live bytes.

    Past `deadline`, on the monotonic clock, only the first order is tried.
    """
    length = len(train) + len(evaluate)
    every = _items(train, evaluate, tuple(resident), sizes)
    lowest = max(target, _live_peak(every, length))
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
        offsets = _assign(items, order, base, ENDLESS if best is None else best[0], tight=tight)
        if offsets is None:
            continue
        height = max((offset + item.size for offset, item in zip(offsets, items)), default=base)
        best = height, offsets
        if height <= lowest:
            break
    assert best is not None
    for item, offset in zip(items, best[1]):
        item.offset = offset
    return _arena(every, max(base, best[0]), len(train))


def _arena(items: list[_Item], height: int, split: int) -> Arena:
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
    return Arena(bytes=aligned(height), resident=fixed, train=train, evaluate=evaluate)


def _items(
    train: tuple[Entry, ...], evaluate: tuple[Entry, ...], resident: tuple[str, ...], sizes: dict[str, int]
) -> list[_Item]:
    length = len(train) + len(evaluate)
    moved = {e.name for e in (*train, *evaluate) if e.verb in MOVES and sizes[e.name] >= DIRECT_BYTES}

    def item(name: str, spans: list[tuple[int, int]], maker: int) -> _Item:
        paged = name in moved or name.startswith("packed:")
        alignment = PACKED_ALIGNMENT if paged else ALIGNMENT
        return _Item(name=name, size=sizes[name], alignment=alignment, spans=spans, makers=[maker])

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


def _live_peak(items: list[_Item], length: int) -> int:
    change = np.zeros(length + 1, dtype=np.int64)
    for item in items:
        for first, last in item.spans:
            change[first] += item.size
            change[last + 1] -= item.size
    return int(np.cumsum(change).max(initial=0))


def _orders(items: list[_Item]) -> Iterable[tuple[list[int], bool]]:
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
    if len(items) <= FEW:
        # Few items: chance finds what rules miss, always the same way.
        chance = random.Random(0)
        for _ in range(SHUFFLES):
            weights = [math.log(1 + size[i]) + chance.gauss(0.0, 1.0) for i in every]
            yield sorted(every, key=weights.__getitem__, reverse=True), chance.random() < 0.5


class _Places:
    """What lies in the arena so far, sorted by offset."""

    def __init__(self, capacity: int) -> None:
        self.count = 0
        self.low = np.empty(capacity, dtype=np.int64)
        self.high = np.empty(capacity, dtype=np.int64)
        self.first = np.empty(capacity, dtype=np.int32)
        self.last = np.empty(capacity, dtype=np.int32)

    def neighbours(self, spans: list[tuple[int, int]]) -> NDArray[np.intp]:
        """Positions of what is resident at any time of `spans`."""
        first, last = self.first[: self.count], self.last[: self.count]
        hit = (first <= spans[0][1]) & (last >= spans[0][0])
        for begin, end in spans[1:]:
            hit |= (first <= end) & (last >= begin)
        return np.flatnonzero(hit)

    def add(self, low: int, high: int, first: int, last: int) -> None:
        at = int(np.searchsorted(self.low[: self.count], low))
        for column, value in ((self.low, low), (self.high, high), (self.first, first), (self.last, last)):
            column[at + 1 : self.count + 1] = column[at : self.count]
            column[at] = value
        self.count += 1


def _assign(items: list[_Item], order: list[int], base: int, below: int, *, tight: bool) -> list[int] | None:
    """Offsets from `base` up, placed in `order` in the lowest (or tightest) gap that is free over an item's spans.

    None as soon as an item ends at `below` or higher.
    """
    places = _Places(sum(len(item.spans) for item in items))
    offsets = [0] * len(items)
    for index in order:
        item = items[index]
        near = places.neighbours(item.spans)
        offset = _gap(places.low[near], places.high[near], base, item.size, item.alignment, tight=tight)
        if offset + item.size >= below:
            return None
        offsets[index] = offset
        for begin, end in item.spans:
            places.add(offset, offset + item.size, begin, end)
    return offsets


def _gap(low: Offsets, high: Offsets, base: int, size: int, alignment: int, *, tight: bool) -> int:
    """Lowest offset of a gap of at least `size` between the occupied ranges, or of the smallest such gap."""
    starts = np.empty(len(low) + 1, dtype=np.int64)
    starts[0] = base
    np.maximum.accumulate(high, out=starts[1:])
    np.maximum(starts, base, out=starts)
    starts += -starts % alignment
    room = np.empty(len(low) + 1, dtype=np.int64)
    np.subtract(low, starts[:-1], out=room[:-1])
    room[-1] = ENDLESS - 1
    if tight:
        return int(starts[np.argmin(np.where(room >= size, room, ENDLESS))])
    return int(starts[np.argmax(room >= size)])
