"""Where tensors lie: by rules, and where these leave too much unused, in an order that is searched for.

A step is a stack and its mirror image. What lives long is either made on the way forward and freed on the way back, or
stays from the way back to the next way forward; the one grows as the other shrinks. So the first is stacked from the
bottom up and the second from the top down, the longest-lived first, and what is free at any time is one gap between them.
What lives for a layer or so goes into that gap, a few dozen tensors at a time in the order of the step. Where one finds
no place, it moves ahead in their order, with all that is like it, and chance moves a few others ("squeaky wheel"
optimization, Joslin and Clements 1999); when that does not help, what was placed just before is taken up again too.

Where there is nothing to spare, the large ones have to come first whatever their lives, and the small ones fill what is
left of the same places in every layer: then everything is placed in one such order.
"""

from __future__ import annotations

import bisect
import math
import random
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from tightfit.planner.problem.step_graph import ALIGNMENT
from tightfit.planner.schedule.free_ranges import ENDLESS, Places, Range, gap, top_gap, united

LONG = (1 / 64, 1 / 8, math.inf)
"""shares of the step from which on a life is long, one after the other until everything finds a place"""
GROUP = (24, 96)
"""tensors of short lives placed together: from a moment at which few bytes go on to live to the next one"""
TRIES = 400
"""orders tried, of a group or of everything"""
AROUND = 64
"""entries before and after one where places are short that are looked at together"""
SPANS = 4
"""of a tensor without a place that are looked at"""
BACK = 60
"""tries after which another group before it is placed anew with it"""
WORK = (20_000, 5)
"""tensors placed in the search at one height, at least, and per tensor: counted, not timed, so that the same input gives the
same arena"""
AHEAD = (0.3, 2.0)
"""by how much the logarithm of a size is raised for a tensor that found no place"""
CHANCE, SPREAD = 0.2, 1.0
"""share of the other ranks that chance moves at the same time, and by how much"""
RESTART = 20
"""tries after which all ranks are again as the sizes say"""
FEW = 80
"""tensors of short lives at most that have a rank each in every other such stretch"""
NUMBER = re.compile(r"\d+")
"""what the names of equal tensors of different layers differ in; within a layer some that are merged too are not alike"""


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


def live_bytes(items: Iterable[Item], length: int) -> npt.NDArray[np.int64]:
    """Bytes by entry."""
    change = np.zeros(length + 1, dtype=np.int64)
    for item in items:
        for first, last in item.spans:
            change[first] += item.size
            change[last + 1] -= item.size
    return np.cumsum(change)


Packed = tuple[int, list[int]]
"""height, and offsets by item"""
Stretch = tuple[int, int]
"""[first, last] entry at which tensors begin that found no places together"""


def pack(
    items: list[Item],
    base: int,
    length: int,
    live: int,
    most: int,
    deadline: float = math.inf,
    short: list[Stretch] | None = None,
) -> Packed:
    """Offsets from `base` up with a height of at most `most`, if that is found; with 0 the lowest that is.

    `length`: entries of the step; `live`: most bytes at a time, which nothing is below. Past `deadline`, on the monotonic
    clock, the first rule is all there is. Where nothing comes down to `most`, `short` gains the stretches at which the searches
    for it ended.
    """
    best: Packed | None = None
    for order, tight in _orders(items):
        if best is not None and time.monotonic() > deadline:
            return best
        below = ENDLESS if best is None else best[0]
        offsets, failed = _assign(items, order, base, length, below=below, tight=tight)
        if failed is None:
            best = _height(items, offsets, base), offsets
            if best[0] <= max(most, live):
                return best
    assert best is not None
    tried = set()
    spread = (most or best[0]) - live
    asked = live + spread // ALIGNMENT * ALIGNMENT
    ended: list[Stretch] = []
    for share, search in SEARCHES if most else LOWEST_SEARCHES:
        goal = live + int(share * spread) // ALIGNMENT * ALIGNMENT
        if (search, goal) in tried:
            continue
        tried.add((search, goal))
        # By ranks, what stands in the way may be anywhere.
        seek = partial(by_groups, short=ended) if search is by_groups and goal == asked else search
        try:
            found = seek(items, base, length, goal, deadline)
        except TimeoutError:
            break
        if found is not None:
            return _height(items, found, base), found
    if short is not None:
        short += ended
    return best


def _height(items: list[Item], offsets: list[int], base: int) -> int:
    return max((offset + item.size for offset, item in zip(offsets, items)), default=base)


def _life(item: Item) -> int:
    return sum(last - first + 1 for first, last in item.spans)


def _orders(items: list[Item]) -> Iterable[tuple[list[int], bool]]:
    """Orders to try, with lowest or tightest fit: by size, by rough size and lifetime, by lifetime, by both weighed."""
    every = range(len(items))
    life = [_life(item) for item in items]
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


def _assign(
    items: list[Item], order: list[int], base: int, length: int, *, below: int, tight: bool
) -> tuple[list[int], int | None]:
    """Offsets from `base` up, placed in `order` in the lowest (or tightest) gap that is free over an item's spans; and the
    first item that would end at `below` or higher, None where all are placed.
    """
    places = Places(length)
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


class _Ranks:
    """Tensors in the order of their ranks: the logarithm of their size, raised for what found no place, and a little by chance.

    What is alike in different layers shares a rank; in every other stretch of tries, if `few`, each tensor has its own.
    Chance is the same every time.
    """

    def __init__(self, items: list[Item], *, few: bool) -> None:
        self.few = few
        self.log_size = [math.log(item.size) for item in items]
        self.life = [_life(item) for item in items]
        self.alike = [(item.size, NUMBER.sub("", item.name)) for item in items]
        self.single = [(item.size, f"{number}") for number, item in enumerate(items)]
        self.kind = self.alike
        self.raised: dict[tuple[int, str], float] = {}
        self.chance = random.Random(0)
        self.turn = 0

    def order(self, numbers: Iterable[int]) -> list[int]:
        return sorted(numbers, key=lambda i: (-self.log_size[i] - self.raised.get(self.kind[i], 0.0), -self.life[i], i))

    def blame(self, failed: int, numbers: Iterable[int]) -> None:
        """The next ranks, of what was tried in vain because of one."""
        self.turn += 1
        if self.turn % RESTART == 0:
            self.kind = self.single if self.few and self.turn // RESTART % 2 else self.alike
            self.raised.clear()
        kind = self.kind[failed]
        self.raised[kind] = self.raised.get(kind, 0.0) + self.chance.uniform(*AHEAD)
        for kind in dict.fromkeys(self.kind[index] for index in numbers):
            if self.chance.random() < CHANCE:
                self.raised[kind] = self.raised.get(kind, 0.0) + self.chance.gauss(0.0, SPREAD)


def _work(items: list[Item]) -> int:
    least, each = WORK
    return max(least, each * len(items))


def by_ranks(items: list[Item], base: int, length: int, goal: int, deadline: float = math.inf) -> list[int] | None:
    """Offsets with a height of at most `goal`, every tensor placed in the order of its rank; None where none are found.

    Raises TimeoutError at the deadline, on the monotonic clock.

    An order is tried on what is there while most is live, then on everything, and where that fails on what is there then too.
    """
    watched = np.zeros(length + 1, dtype=np.int64)

    def watch(*entries: int) -> list[int]:
        for entry in entries:
            watched[max(0, entry - AROUND) : min(length, entry + AROUND + 1)] = 1
        before = np.concatenate([[0], np.cumsum(watched)])
        return [
            n for n, item in enumerate(items) if any(before[last + 1] > before[first] for first, last in item.spans)
        ]

    ranks = _Ranks(items, few=len(items) <= FEW)
    looked = watch(int(np.argmax(live_bytes(items, length))))
    work = _work(items)
    for _ in range(TRIES):
        if work <= 0:
            break
        if time.monotonic() > deadline:
            raise TimeoutError
        work -= len(looked)
        offsets, failed = _assign(items, ranks.order(looked), base, length, below=goal + 1, tight=False)
        if failed is None:
            work -= len(items)
            offsets, failed = _assign(items, ranks.order(range(len(items))), base, length, below=goal + 1, tight=False)
            if failed is None:
                return offsets
            looked = watch(*(first for first, _ in items[failed].spans[:SPANS]))
        ranks.blame(failed, looked)
    return None


def by_groups(
    items: list[Item],
    base: int,
    length: int,
    goal: int,
    deadline: float = math.inf,
    short: list[Stretch] | None = None,
) -> list[int] | None:
    """Offsets with a height of at most `goal`, group by group between what lives long; None where none are found, and `short`
    then gains the stretches of groups without places.

    Raises TimeoutError at the deadline, on the monotonic clock.
    """
    work, before = _work(items), -1
    for share in LONG:
        if work <= 0:
            break
        groups = _Groups(items, base, length, goal, share * length, work, deadline)
        if len(groups.long) != before and groups.succeed():
            return groups.offsets
        if short is not None:
            short += groups.failed
        work, before = groups.work, len(groups.long)
    return None


class _Groups:
    """One height, with lives from `longest` entries on taken as long."""

    def __init__(
        self, items: list[Item], base: int, length: int, goal: int, longest: float, work: int, deadline: float
    ) -> None:
        self.items = items
        self.base = base
        self.goal = goal
        self.work = work
        self.deadline = deadline
        self.offsets = [0] * len(items)
        every = range(len(items))
        life = [_life(item) for item in items]
        self.long = [i for i in every if life[i] >= longest or len(items[i].spans) > 1]
        self.long.sort(key=lambda i: (-life[i], -items[i].size, i))
        lasting = set(self.long)
        self.brief = sorted((i for i in every if i not in lasting), key=lambda i: (items[i].spans[0][0], i))
        self.starts = [items[i].spans[0][0] for i in self.brief]
        self.longest_brief = max((life[i] for i in self.brief), default=0)
        self.places = Places(length)
        """of what lives long"""
        self.ranks = _Ranks(items, few=len(self.brief) <= FEW)
        self.failed: list[Stretch] = []
        """of the group that was tried in vain"""

    def succeed(self) -> bool:
        """Whether everything finds a place; `offsets` then say where."""
        if not self._stack():
            return False
        self.cuts = self._cut()
        return all(self._fill(number) for number in range(len(self.cuts) - 1))

    def _stack(self) -> bool:
        """Place what lives long."""
        for index in self.long:
            item = self.items[index]
            taken = self.places.taken(item.spans)
            if len(item.spans) > 1:
                offset = top_gap(taken, self.base, self.goal, item.size, item.alignment)
            else:
                offset = gap(taken, self.base, item.size, item.alignment, tight=True)
            if offset is None or offset + item.size > self.goal:
                return False
            self.offsets[index] = offset
            for first, last in item.spans:
                self.places.add(offset, offset + item.size, first, last)
        return True

    def _cut(self) -> list[int]:
        """Positions of `brief` at which its groups begin, and its end. Equal layers come apart at equal places."""
        ends = sorted((self.items[i].spans[0][1], self.items[i].size) for i in self.brief)
        crossing: list[float] = []
        live, ended, before = 0, 0, -1
        for start, index in zip(self.starts, self.brief):
            while ends[ended][0] < start:
                live -= ends[ended][1]
                ended += 1
            # What begins at the same moment stays together.
            crossing.append(live if start > before else math.inf)
            live += self.items[index].size
            before = start
        cuts = [0]
        least, most = GROUP
        while cuts[-1] + most < len(self.brief):
            cuts.append(min(range(cuts[-1] + least, cuts[-1] + most), key=crossing.__getitem__))
        return [*cuts, len(self.brief)] if self.brief else cuts

    def _fill(self, number: int) -> bool:
        """Place a group, if need be with some before it."""
        begin, end = self.cuts[number : number + 2]
        taken = self._taken(begin, end)
        for turn in range(1, TRIES + 1):
            if self.work <= 0:
                break
            if time.monotonic() > self.deadline:
                raise TimeoutError
            placed, failed = self._tried(taken)
            if failed is None:
                for index, offset in placed.items():
                    self.offsets[index] = offset
                return True
            if turn % BACK == 0 and begin:
                begin = self.cuts[max(0, number - turn // BACK)]
                taken = self._taken(begin, end)
            self.ranks.blame(failed, taken)
        if turn > 1:
            self.failed.append((self.starts[self.cuts[number]], self.starts[end - 1]))
        return False

    def _taken(self, begin: int, end: int) -> dict[int, list[Range]]:
        """Per tensor of a stretch of `brief`: bytes that are taken during its life by what lives long or was placed before."""
        group = self.brief[begin:end]
        first = bisect.bisect_left(self.starts, self.starts[begin] - self.longest_brief)
        before = [(*self.items[i].spans[0], self.offsets[i], self.items[i].size) for i in self.brief[first:begin]]
        taken = {}
        for index in group:
            begins = self.items[index].spans[0][0]
            there = [(low, low + size) for _, last, low, size in before if last >= begins]
            taken[index] = united(self.places.taken(self.items[index].spans) + there)
        return taken

    def _tried(self, taken: dict[int, list[Range]]) -> tuple[dict[int, int], int | None]:
        """Offsets of a group in the order of its ranks, and the first that found no place."""
        placed: dict[int, int] = {}
        lie: list[tuple[int, int, int, int]] = []
        for index in self.ranks.order(taken):
            self.work -= 1
            item = self.items[index]
            begins, ends = item.spans[0]
            near = taken[index] + [(low, high) for low, high, first, last in lie if first <= ends and last >= begins]
            near.sort()
            offset = gap(near, self.base, item.size, item.alignment, tight=False)
            if offset + item.size > self.goal:
                return placed, index
            placed[index] = offset
            lie.append((offset, offset + item.size, begins, ends))
        return placed, None


SEARCHES = ((0.25, by_groups), (1.0, by_groups), (1.0, by_ranks))
LOWEST_SEARCHES = ((0.0, by_ranks), (0.0, by_groups), (0.125, by_groups), (0.25, by_groups), (0.5, by_groups))
"""one after the other: heights as shares of what is between the live bytes and the most that is allowed, or, for the lowest,
what the rules come to
"""
