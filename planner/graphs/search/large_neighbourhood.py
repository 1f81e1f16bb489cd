"""Large-neighbourhood search: stretch after stretch of a schedule is re-optimised (`subproblem`) and kept where that is
better.

A stretch is either of few stages, with all operators nearby as places for re-runs, or of many stages with fewer places,
called chains: just before an operator its inputs may run again, and the inputs of those, and so on to some depth. The
number of places adapts to what the solver has lately solved to optimality.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, memory, runs, seconds
from tightfit.planner.graphs.search.subproblem import Solved, Subproblem

DEPTHS = (1, 2, 3)
"""of chains"""
LONGEST = 100_000
"""places up to which chains are listed, in a fraction of a second; where there are more, stretches use operators nearby
instead
"""
SHORT = 0.75
"""memory is short where keep-all holds more than this share of the budget; a re-run is of use only if its output would
otherwise be held through such a moment
"""
PLACES = 400.0
"""places for re-runs in a stretch, at first..."""
FEWEST, MOST = 100.0, 4000.0
"""...and the range in which that number adapts"""
WIDTH = 20
"""stages of a stretch, roughly on average"""
STRETCH = 0.1
"""share of the available time that one stretch may take"""
STALLED = 60
"""stretches in a row that gained nothing, after which the search ends"""


class LargeNeighbourhood:
    """The search for one graph and budget. `timely`: no time limit ended it or any program that it solved."""

    def __init__(self, dag: Dag, budget: int) -> None:
        self.dag = dag
        self.budget = budget
        self.random = random.Random(0)
        self.timely = True
        self.chained: dict[int, list[Rerun]] = {}
        """places in chains, by depth; empty where there are more than `LONGEST`"""
        self.sizes = dict.fromkeys((0, *DEPTHS), PLACES)
        """number of places for the next stretch, by depth of its chains; depth 0: operators nearby"""

    def polished(self, reruns: frozenset[Rerun], *, deadline: float, enough: float = 0.0) -> frozenset[Rerun]:
        """The best schedule found by re-optimising stretches, until it fits and takes at most `enough` seconds, or
        until `deadline`, on the monotonic clock. `reruns` may exceed the budget.
        """
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
        """`other` if it is better than `one`, which means, in this order: a smaller excess over the budget at the peak,
        a smaller sum of excesses over all runs, fewer seconds.
        """
        if other is None:
            return one

        def worth(reruns: frozenset[Rerun]) -> tuple[int, int, float]:
            # Several runs may share the highest peak, and a stretch lowers one of them: the sum shows that as progress.
            over = [max(0, held - self.budget) for held in memory(self.dag, runs(self.dag, reruns))]
            return max(over), sum(over), seconds(self.dag, reruns)

        return other if worth(other) < worth(one) else one

    def _stretch(self, reruns: frozenset[Rerun], stage: int, limit: float) -> Solved:
        """Re-optimise a stretch around `stage`, either few stages with all operators nearby or many stages with chains,
        with as many places as `sizes` says.
        """
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
        """Operators for depth 0: the nearest, in the graph and with some randomness, to what the stretch recomputes and
        reads, as many as `sizes` has places for.
        """
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
    """Places for re-runs: before each first run its inputs, their inputs, and so on `depth` times; none where there are
    more than `most`.

    Left out are outputs that under keep-all were last read, or made, after the last moment at which memory is short
    (`SHORT`): evicting them in between relieves nothing.
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
