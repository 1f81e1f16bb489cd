"""Large-neighbourhood search: stretch after stretch of a schedule is solved anew (`subproblem`) and kept where that is better.

First the whole schedule with few places for re-runs: just before an operator whatever it reads may run again, and what that
reads, and so on to a depth that grows. Then stretches, of many stages with such chains or of few with whatever is near, with as many
places as the solver has lately come to the end of.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate

from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, memory, peak_bytes, runs, seconds
from tightfit.planner.graphs.search.subproblem import Lowest, Solved, Subproblem

DEPTHS = (1, 2, 3)
DEEPER = 2
"""times the seconds of one depth: what the next takes at least, where the schedule fits; where not, any answer may be a step"""
LARGEST = 1_200_000
"""places times operators of a program that is tried"""
LONGEST = 100_000
"""places in chains that are listed, in a fraction of a second; where there are more, stretches have what is near"""
LARGEST_PROOF = 2_000_000
"""the same for the proof of a smallest peak, which needs every place"""
SHORT = 0.75
"""a re-run is of use only where its output would otherwise lie through a moment at which keep-all holds this share of the budget"""
PLACES = 400.0
"""of re-runs in a stretch, at first"""
FEWEST, MOST = 100.0, 4000.0
WIDTH = 20
"""stages of a stretch, on average"""
STRETCH = 0.1
"""of the time there is: for one stretch at most"""
STALLED = 60
"""stretches in a row that gained nothing, after which the search ends"""


class LargeNeighbourhood:
    """The search for one graph and budget. `timely`: it and all that it solved ended by their own rules and not by the clock."""

    def __init__(self, dag: Dag, budget: int) -> None:
        self.dag = dag
        self.budget = budget
        self.random = random.Random(0)
        self.timely = True
        self.chained: dict[int, list[Rerun]] = {}
        """by depth; none where there are over `LONGEST`"""
        self.sizes = dict.fromkeys((0, *DEPTHS), PLACES)
        """places of the stretches to come, by depth of the chains; 0: all that is near"""
        self.solved: set[int] = set()
        """depths that the solver came to the end of"""

    def deepened(self, reruns: frozenset[Rerun], *, deadline: float) -> frozenset[Rerun]:
        """The best schedule found with re-runs in chains, from one that need not fit: of lower peak, or faster."""
        best = reruns
        count = len(self.dag)
        if time.monotonic() > deadline:
            self.timely = False
            return best
        fitting = [depth for depth in DEPTHS if len(self._chains(depth)) * count <= LARGEST]
        wanted = [depth for depth in fitting if depth not in self.solved and self._chains(depth)]
        fits = peak_bytes(self.dag, best) <= self.budget
        spent = 0.0
        for number, depth in enumerate(wanted):
            began = time.monotonic()
            left = deadline - began
            if left <= (DEEPER * spent if fits else 0.0):
                self.timely = False
                break
            found = self._solve(best, 0, count, self._chains(depth), left / (len(wanted) - number))
            if found.ended:
                self.solved.add(depth)
            best = self._better(best, found.reruns)
            spent = time.monotonic() - began
        return best

    def polished(self, reruns: frozenset[Rerun], *, deadline: float, enough: float = 0.0) -> frozenset[Rerun]:
        """The best schedule found by stretches, until it fits and takes at most `enough` seconds."""
        best = reruns
        longest = max(1.5, STRETCH * (deadline - time.monotonic()))
        stalled = 0
        while stalled < STALLED:
            sequence = runs(self.dag, best)
            held = memory(self.dag, sequence)
            fits = max(held) <= self.budget
            if fits and (not best or seconds(self.dag, best) <= enough):
                break
            if time.monotonic() > deadline:
                self.timely = False
                break
            if fits:
                around = sorted(best)
                stage = self.random.choices(around, [self.dag.again_seconds[i] + 1e-12 for _, i in around])[0][0]
            else:
                stage = sequence[held.index(max(held))][0]
            found = self._stretch(best, stage, min(longest, deadline - time.monotonic()))
            better = self._better(best, found.reruns)
            stalled = stalled + 1 if better is best else 0
            best = better
        return best

    def _better(self, one: frozenset[Rerun], other: frozenset[Rerun] | None) -> frozenset[Rerun]:
        """`one`, unless the other is less over the budget at its peak, or then by all of its runs, or then faster."""
        if other is None:
            return one

        def worth(reruns: frozenset[Rerun]) -> tuple[int, int, float]:
            # Peaks of one height are lowered one after the other: the highest stays as it is until the last of them is.
            over = [max(0, held - self.budget) for held in memory(self.dag, runs(self.dag, reruns))]
            return max(over), sum(over), seconds(self.dag, reruns)

        return other if worth(other) < worth(one) else one

    def _stretch(self, reruns: frozenset[Rerun], stage: int, limit: float) -> Solved:
        """A stretch around `stage` solved anew, with as many places as there is hope for: few stages and all that is near, or many and chains."""
        count = len(self.dag)
        depth = self.random.choice((0, 0, *(depth for depth in DEPTHS if self._chains(depth))))
        width = round(WIDTH * self.random.lognormvariate(0.0, 0.5))
        if depth:
            waiting = self._chains(depth)
            at = min(bisect_left(waiting, (stage, -1)), len(waiting) - 1)
            begin = max(0, at - self.random.randrange(1 + round(self.sizes[depth])))
            end = min(len(waiting) - 1, begin + round(self.sizes[depth]))
            width = max(width, waiting[end][0] - waiting[begin][0] + 1)
        width = max(2, min(count, width))
        first = max(0, min(stage - self.random.randrange(width), count - width))
        last = first + width
        if depth:
            places = {place for place in self._chains(depth) if first <= place[0] < last}
        else:
            chosen = self._candidates(reruns, first, last)
            places = {(t, i) for t in range(first, last) for i in chosen if i < t}
        found = self._solve(reruns, first, last, places, limit)
        self.sizes[depth] = min(MOST, self.sizes[depth] * 1.1) if found.ended else max(FEWEST, self.sizes[depth] * 0.8)
        return found

    def _chains(self, depth: int) -> list[Rerun]:
        if depth not in self.chained:
            self.chained[depth] = sorted(chains(self.dag, self.budget, depth, LONGEST))
        return self.chained[depth]

    def _solve(self, reruns: frozenset[Rerun], first: int, last: int, places: Iterable[Rerun], limit: float) -> Solved:
        try:
            solved = Subproblem(self.dag, self.budget, reruns, first, last, places, seconds=limit).solve()
        except TimeoutError:
            solved = Solved(reruns=None, ended=False)
        self.timely = self.timely and solved.ended
        return solved

    def _candidates(self, reruns: frozenset[Rerun], first: int, last: int) -> list[int]:
        """Operators near to what the stretch reads, as many as there are places for."""
        dag = self.dag
        distance = {i: 0 for stage, i in reruns if first <= stage < last}
        distance |= {i: 1 for stage in range(first, last) for i in (stage, *dag.inputs[stage]) if i not in distance}
        layer = list(distance)
        while layer:
            following = []
            for j in layer:
                for i in dag.again_inputs[j]:
                    if i not in distance:
                        distance[i] = distance[j] + 1
                        following.append(i)
            layer = following
        ranked = sorted(distance, key=lambda i: (distance[i] + 2 * self.random.random(), i))
        wanted = [i for i in ranked if dag.recomputable[i] and dag.bytes[i]]
        totals = accumulate(last - max(first, i + 1) for i in wanted)
        return [i for i, total in zip(wanted, totals) if total <= self.sizes[0]]


def chains(dag: Dag, budget: int, depth: int, most: int) -> set[Rerun]:
    """Places for re-runs: before each first run what it reads, what those read, and so on `depth` times; none where there are over `most`.

    Left out: what has been read since memory was last short when nothing is made again.
    """
    sequence = runs(dag, ())
    short = [0, *accumulate(int(size > SHORT * budget) for size in memory(dag, sequence))]
    last_read = [-1] * len(dag)
    places: set[Rerun] = set()
    for stage in range(len(dag)):
        layer, seen = set(dag.inputs[stage]), set(dag.inputs[stage])
        for _ in range(depth):
            for i in layer:
                if dag.recomputable[i] and dag.bytes[i] and short[stage] > short[max(last_read[i], i) + 1]:
                    places.add((stage, i))
            if len(places) > most:
                return set()
            layer = {j for i in layer for j in dag.again_inputs[i]} - seen
            seen |= layer
        for i in dag.inputs[stage]:
            last_read[i] = stage
        last_read[stage] = stage
    return places


def lowest_peak(dag: Dag, seconds: float) -> Lowest:
    """The schedule of lowest peak found within `seconds`, and bytes that no peak of the class undercuts."""
    count = len(dag)
    least = dag.floor_bytes
    best: frozenset[Rerun] = frozenset()
    if seconds <= 0.0:
        return Lowest(reruns=None, bytes=least, ended=False)
    if peak_bytes(dag, best) <= least or count**3 // 2 > LARGEST_PROOF:
        return Lowest(reruns=None, bytes=least, ended=True)
    places = {(stage, i) for stage in range(count) for i in range(stage) if dag.recomputable[i]}
    try:
        found = Subproblem(dag, least, best, 0, count, places, seconds=seconds).lowest()
    except TimeoutError:
        return Lowest(reruns=None, bytes=least, ended=False)
    return replace(found, bytes=max(least, found.bytes))
