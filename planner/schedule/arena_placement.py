"""Packs tensors into the arena: by fixed rules first, and where these leave too much unused, by searching for a better
order.

A step is a stack and its mirror image. A long-lived tensor is either made in the forward and freed in the backward, or
stays from the backward to the next forward; as the bytes of the first sort grow, those of the second shrink. So the
first sort is stacked from the bottom up and the second from the top down, the longest-lived first, and the free bytes
at any time are one gap between them. Short-lived tensors, of a layer or so, go into that gap, a few dozen at a time (a
group) in the order of the step. If one finds no place, it moves ahead in the order in which its group is placed, with
all that are alike, and chance moves a few others ("squeaky wheel" optimization, Joslin and Clements 1999). If that does
not help, CP-SAT looks for places of the whole group; if it finds none, or proves that there are none beside what is
placed already, groups placed just before are placed again together with it (`by_groups`).
"""

from __future__ import annotations

import bisect
import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.problem.step_graph import ALIGNMENT
from tightfit.planner.schedule.free_ranges import ENDLESS, Range, TakenRanges, gap, top_gap, united
from tightfit.planner.search_options import ALL, SearchOptions

LONG = (1 / 64, 1 / 32, 1 / 8, math.inf)
"""a lifetime is long from this share of the step on; the shares are tried in turn until every tensor finds a place"""
GROUP = (24, 96)
"""least and most short-lived tensors in a group, which is cut off where few bytes live on"""
TRIES = 60
"""orders of a group that are tried before CP-SAT looks for its places"""
AIMS, LOWEST_AIMS = (0.25, 1.0), (0.0, 0.125, 0.25, 0.5)
"""heights that the search aims for, in turn: shares of the range from the live bytes up to the allowed height or, where
the lowest is asked for, up to the height that the rules reach
"""
BACK = 6
"""groups before a failing one that are placed again together with it, at most; one more each time"""
SOLVED = 2
"""how many times CP-SAT looks for a group's places: alone, then together with the group before"""
SOLVER_WORK = 0.003
"""limit of CP-SAT's search, in its own count of its work, so that the same input gives the same arena"""
WORK = (20_000, 5)
"""limit of a search at one height, in tensors placed: so many at least, or so many per tensor. Work is counted, not
timed, so that the same input gives the same arena
"""
AHEAD = (0.3, 2.0)
"""range of what is added to the rank (the logarithm of the size) of a tensor that found no place"""
CHANCE, SPREAD = 0.2, 1.0
"""share of ranks that chance changes at the same time, and the standard deviation of the change"""
RESTART = 20
"""tries after which all ranks are set back to the logarithms of the sizes"""
FEW = 80
"""number of tensors up to which every other such round of tries gives each tensor a rank of its own"""
NUMBER = re.compile(r"\d+")
"""digits, in which alone the names of corresponding tensors of different layers differ. Without them some tensors of
one layer also share a name, though they are not alike
"""


@dataclass(kw_only=True)
class TensorLifetime:
    """A tensor with its lifetime; one that is resident across steps may have several intervals."""

    name: str
    size: int
    alignment: int
    spans: list[tuple[int, int]]
    """(first, last) entry of each interval of residency, both included; evaluation's entries are numbered after
    training's
    """
    makers: list[int]
    """entries that make it; -1: it is resident from the start"""
    offset: int = 0


def live_bytes(items: Iterable[TensorLifetime], length: int) -> npt.NDArray[np.int64]:
    """Bytes of the items that are resident during each of `length` entries."""
    change = np.zeros(length + 1, dtype=np.int64)
    for item in items:
        for first, last in item.spans:
            change[first] += item.size
            change[last + 1] -= item.size
    return np.cumsum(change)


Packed = tuple[int, list[int]]
"""(height, offset of each item)"""


def pack(
    items: list[TensorLifetime],
    base: int,
    length: int,
    live: int,
    allowed: int,
    cutoff: Cutoff = NEVER,
    options: SearchOptions = ALL,
) -> Packed:
    """Offsets from `base` up such that the items end at byte `allowed` or lower, if such a packing is found; `allowed`
    0: as low as possible.

    If none is found the result is the lowest packing of the rules. `length`: number of entries; `live`: most bytes live
    at once, a lower bound on any height. Raises TimeoutError where `cutoff` strikes.
    """
    best: Packed | None = None
    for order, tight in _orders(items):
        cutoff.check()
        below = ENDLESS if best is None else best[0]
        offsets, failed = _assign(items, order, base, length, below=below, tight=tight)
        if failed is None:
            best = _height(items, offsets, base), offsets
            if best[0] <= max(allowed, live):
                return best
    assert best is not None
    tried = set()
    spread = (allowed or best[0]) - live
    for share in (AIMS if allowed else LOWEST_AIMS) if options.packing else ():
        goal = live + int(share * spread) // ALIGNMENT * ALIGNMENT
        if goal in tried:
            continue
        tried.add(goal)
        offsets_found = by_groups(items, base, length, goal, cutoff)
        if offsets_found is not None:
            return _height(items, offsets_found, base), offsets_found
    return best


def _height(items: list[TensorLifetime], offsets: list[int], base: int) -> int:
    return max((offset + item.size for offset, item in zip(offsets, items)), default=base)


def _lifetime(item: TensorLifetime) -> int:
    return sum(last - first + 1 for first, last in item.spans)


def _orders(items: list[TensorLifetime]) -> Iterable[tuple[list[int], bool]]:
    """Orders to try, each with lowest fit or (true) tightest fit: by size, by rough size and lifetime, by lifetime, by
    rough size and start, by size times the root of the lifetime.
    """
    indices = range(len(items))
    life = [_lifetime(item) for item in items]
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
        yield sorted(indices, key=key), tight


def _assign(
    items: list[TensorLifetime], order: list[int], base: int, length: int, *, below: int, tight: bool
) -> tuple[list[int], int | None]:
    """Place the items in `order`, each in the lowest (or, if `tight`, the smallest) gap that is free over all of its
    spans. Returns the offsets, and the first item that would end at `below` or higher, at which placement stopped;
    None: all are placed.
    """
    places = TakenRanges(length)
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


class _PlacementOrder:
    """The order in which tensors are placed: by rank, the logarithm of the size, raised for tensors that found no place
    and changed a little by chance.

    Corresponding tensors of different layers share a rank; if `few`, each tensor has its own in every other round of
    `RESTART` tries. The random numbers are seeded, so the order is reproducible.
    """

    def __init__(self, items: list[TensorLifetime], *, few: bool) -> None:
        self.few = few
        self.log_size = [math.log(item.size) for item in items]
        self.life = [_lifetime(item) for item in items]
        self.alike = [(item.size, NUMBER.sub("", item.name)) for item in items]
        self.single = [(item.size, f"{number}") for number, item in enumerate(items)]
        self.kind = self.alike
        self.raised: dict[tuple[int, str], float] = {}
        self.chance = random.Random(0)
        self.turn = 0

    def order(self, numbers: Iterable[int]) -> list[int]:
        return sorted(numbers, key=lambda i: (-self.log_size[i] - self.raised.get(self.kind[i], 0.0), -self.life[i], i))

    def blame(self, failed: int, numbers: Iterable[int]) -> None:
        """Change the ranks after a failed try: raise that of `failed`, which found no place, and by chance those of
        others in `numbers`, the tensors that were tried.
        """
        self.turn += 1
        if self.turn % RESTART == 0:
            self.kind = self.single if self.few and self.turn // RESTART % 2 else self.alike
            self.raised.clear()
        kind = self.kind[failed]
        self.raised[kind] = self.raised.get(kind, 0.0) + self.chance.uniform(*AHEAD)
        for kind in dict.fromkeys(self.kind[index] for index in numbers):
            if self.chance.random() < CHANCE:
                self.raised[kind] = self.raised.get(kind, 0.0) + self.chance.gauss(0.0, SPREAD)


def _work(items: list[TensorLifetime]) -> int:
    least, each = WORK
    return max(least, each * len(items))


def by_groups(
    items: list[TensorLifetime],
    base: int,
    length: int,
    goal: int,
    cutoff: Cutoff = NEVER,
) -> list[int] | None:
    """Offsets with a height of at most `goal`: long-lived tensors first, then the others group by group. None where
    none are found.

    Raises TimeoutError where `cutoff` strikes.
    """
    work, previous = _work(items), -1
    for share in LONG:
        if work <= 0:
            break
        groups = _GroupPacking(items, base, length, goal, share * length, work, cutoff)
        if len(groups.long) != previous and groups.succeed():
            return groups.offsets
        work, previous = groups.work, len(groups.long)
    return None


class _TakenBefore:
    """The bytes of tensors, each with its offset, that are all resident at one entry, so that they do not overlap."""

    def __init__(self, placed: list[tuple[int, TensorLifetime]]) -> None:
        placed = sorted(placed, key=lambda each: each[0])
        self.low = np.array([offset for offset, _ in placed], dtype=np.int64)
        self.high = self.low + np.array([item.size for _, item in placed], dtype=np.int64)
        self.last = np.array([item.spans[0][1] for _, item in placed], dtype=np.int64)
        self.count = -1
        self.ranges: list[Range] = []

    def until(self, entry: int) -> list[Range]:
        """The bytes of those that are still resident at `entry`, which is no earlier than that of the call before:
        sorted ranges that do not touch.
        """
        resident = self.last >= entry
        count = int(np.count_nonzero(resident))
        if count != self.count:
            low, high = self.low[resident], self.high[resident]
            parted = low[1:] > high[:-1]
            lows, highs = np.append(low[:1], low[1:][parted]), np.append(high[:-1][parted], high[-1:])
            self.count, self.ranges = count, list(zip(lows.tolist(), highs.tolist(), strict=True))
        return self.ranges


class _GroupPacking:
    """The packing at one height, where a lifetime of `longest` entries or more counts as long."""

    def __init__(
        self, items: list[TensorLifetime], base: int, length: int, goal: int, longest: float, work: int, cutoff: Cutoff
    ) -> None:
        self.items = items
        self.base = base
        self.goal = goal
        self.work = work
        self.cutoff = cutoff
        self.offsets = [0] * len(items)
        every = range(len(items))
        life = [_lifetime(item) for item in items]
        self.long = [i for i in every if life[i] >= longest or len(items[i].spans) > 1]
        self.long.sort(key=lambda i: (-life[i], -items[i].size, i))
        lasting = set(self.long)
        self.brief = sorted((i for i in every if i not in lasting), key=lambda i: (items[i].spans[0][0], i))
        self.starts = [items[i].spans[0][0] for i in self.brief]
        self.longest_brief = max((life[i] for i in self.brief), default=0)
        self.places = TakenRanges(length)
        """bytes taken by long-lived tensors"""
        self.ranks = _PlacementOrder(items, few=len(self.brief) <= FEW)

    def succeed(self) -> bool:
        """Whether every tensor finds a place; `offsets` then say where."""
        if not self._stack():
            return False
        self.cuts = self._cut()
        return all(self._fill(number) for number in range(len(self.cuts) - 1))

    def _stack(self) -> bool:
        """Place the long-lived tensors, those with several intervals from the top down; whether all find a place."""
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
        """Positions in `brief` at which groups begin, and its end. Each group ends where fewest bytes live on, so equal
        layers are cut at corresponding tensors.
        """
        ends = sorted((self.items[i].spans[0][1], self.items[i].size) for i in self.brief)
        crossing: list[float] = []
        live, ended, before = 0, 0, -1
        for start, index in zip(self.starts, self.brief):
            while ends[ended][0] < start:
                live -= ends[ended][1]
                ended += 1
            # Tensors that begin at the same entry stay in one group.
            crossing.append(live if start > before else math.inf)
            live += self.items[index].size
            before = start
        cuts = [0]
        least, most = GROUP
        while cuts[-1] + most < len(self.brief):
            cuts.append(min(range(cuts[-1] + least, cuts[-1] + most), key=crossing.__getitem__))
        return [*cuts, len(self.brief)] if self.brief else cuts

    def _fill(self, number: int) -> bool:
        """Place a group, if need be together with some of the groups before it; whether that succeeds."""
        end = self.cuts[number + 1]
        for back in range(BACK + 1):
            begin = self.cuts[max(0, number - back)]
            taken = self._taken_ranges(begin, end)
            placed = self._by_rank(taken)
            if placed is None and self.work > 0 and back < min(SOLVED, number + 1):
                placed = self._by_solver(taken)
            if placed is not None:
                for index, offset in placed.items():
                    self.offsets[index] = offset
                return True
        return False

    def _by_rank(self, taken: dict[int, list[Range]]) -> dict[int, int] | None:
        """Offsets of a group's tensors, placed in the order of their ranks, which change from try to try."""
        for _ in range(TRIES):
            if self.work <= 0:
                break
            self.cutoff.check()
            placed, failed = self._try_order(taken)
            if failed is None:
                return placed
            self.ranks.blame(failed, taken)
        return None

    def _by_solver(self, taken: dict[int, list[Range]]) -> dict[int, int] | None:
        """Offsets of a group's tensors found by CP-SAT; None where there are none, or none within `SOLVER_WORK`."""
        from ortools.sat.python import cp_model

        from tightfit.planner.solvers.cp_sat import single_worker, solved

        model = cp_model.CpModel()
        stretches: list[cp_model.IntervalVar] = []
        places: list[cp_model.IntervalVar] = []
        offsets: dict[int, cp_model.LinearExprT] = {}
        for index, ranges in taken.items():
            item = self.items[index]
            units, size = item.alignment // ALIGNMENT, -(-item.size // ALIGNMENT)
            free: list[Range] = []
            lowest = self.base
            for low, high in [*ranges, (self.goal, self.goal)]:
                first, last = -(-lowest // item.alignment), (low // ALIGNMENT - size) // units
                if first <= last:
                    free.append((first, last))
                lowest = max(lowest, high)
            if not free:
                return None
            domain = cp_model.Domain.from_intervals([[first, last] for first, last in free])
            offsets[index] = units * model.new_int_var_from_domain(domain, "")
            places.append(model.new_fixed_size_interval_var(offsets[index], size, ""))
            begins, ends = item.spans[0]
            stretches.append(model.new_fixed_size_interval_var(begins, ends - begins + 1, ""))
        model.add_no_overlap_2d(stretches, places)
        solver = single_worker()
        # Without it the search now and then goes through millions of nodes.
        solver.parameters.use_dynamic_precedence_in_disjunctive = True
        # What finds little here takes half of the time.
        solver.parameters.max_presolve_iterations = 1
        solver.parameters.cp_model_probing_level = 0
        solver.parameters.symmetry_level = 0
        solver.parameters.linearization_level = 0
        solver.parameters.max_deterministic_time = SOLVER_WORK
        solver.parameters.max_time_in_seconds = self.cutoff.left()
        status = solved(solver, model)
        self.cutoff.check()
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None
        return {index: ALIGNMENT * solver.value(offset) for index, offset in offsets.items()}

    def _taken_ranges(self, begin: int, end: int) -> dict[int, list[Range]]:
        """For each tensor of a stretch of `brief`: the bytes that long-lived tensors, and those placed before, take
        during its life.
        """
        first = bisect.bisect_left(self.starts, self.starts[begin] - self.longest_brief)
        earlier = [i for i in self.brief[first:begin] if self.items[i].spans[0][1] >= self.starts[begin]]
        placed = _TakenBefore([(self.offsets[i], self.items[i]) for i in earlier])
        taken = {}
        for index in self.brief[begin:end]:
            spans = self.items[index].spans
            taken[index] = united(self.places.taken(spans) + placed.until(spans[0][0]))
        return taken

    def _try_order(self, taken: dict[int, list[Range]]) -> tuple[dict[int, int], int | None]:
        """Place a group in the order of its ranks: the offsets, and the tensor at which that failed, or None."""
        placed: dict[int, int] = {}
        spans: list[tuple[int, int, int, int]] = []
        for index in self.ranks.order(taken):
            self.work -= 1
            item = self.items[index]
            begins, ends = item.spans[0]
            near = taken[index] + [(low, high) for low, high, first, last in spans if first <= ends and last >= begins]
            near.sort()
            offset = gap(near, self.base, item.size, item.alignment, tight=False)
            if offset + item.size > self.goal:
                return placed, index
            placed[index] = offset
            spans.append((offset, offset + item.size, begins, ends))
        return placed, None
