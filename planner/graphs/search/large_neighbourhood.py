"""Large-neighbourhood search: stretch after stretch of a schedule is re-optimised (`subproblem`) and kept where that is
better.

A stretch is either of few stages, with all operators nearby as places for re-runs, or of many stages with fewer places,
called chains: just before an operator its inputs may run again, and the inputs of those, and so on to some depth. The
number of places adapts to what the solver has lately solved to optimality.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from tightfit.planner.cutoff import NEVER, Cutoff
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
STRETCH, SHORTEST = 0.1, 0.5
"""share of the available work that the solver may take for one stretch, and units that it may take in any case"""
STALLED = 60
"""stretches in a row that gained nothing, after which the search ends"""


class LargeNeighbourhood:
    """The search for one graph and budget."""

    def __init__(self, dag: Dag, budget: int, cutoff: Cutoff = NEVER) -> None:
        self.dag = dag
        self.budget = budget
        self.cutoff = cutoff
        self.random = random.Random(0)
        self.stalled = False
        """whether the latest search ended since stretch after stretch gained nothing"""
        self.chained: dict[int, list[Rerun]] = {}
        """places in chains, by depth; empty where there are more than `LONGEST`"""
        self.sizes = dict.fromkeys((0, *DEPTHS), PLACES)
        """number of places for the next stretch, by depth of its chains; depth 0: operators nearby"""

    def polished(self, reruns: frozenset[Rerun], work: float, enough: float = 0.0) -> Iterator[frozenset[Rerun]]:
        """Ever better schedules, found by re-optimising stretches until one fits and takes at most `enough` seconds, or
        `work` is done. `reruns` may exceed the budget. Raises TimeoutError where the cutoff strikes.
        """
        best = reruns
        longest = max(SHORTEST, STRETCH * work)
        gained_nothing = 0
        while work > 0.0 and gained_nothing < STALLED:
            sequence = runs(self.dag, best)
            held = memory(self.dag, sequence)
            fits = max(held) <= self.budget
            if fits and (not best or seconds(self.dag, best) <= enough):
                break
            if fits:
                around = sorted(best)
                stage = self.random.choices(around, [self.dag.again_seconds[i] + 1e-12 for _, i in around])[0][0]
            else:
                stage = sequence[held.index(max(held))][0]
            found = self._stretch(best, stage, longest)
            work -= found.work
            gained_nothing += 1
            if found.reruns is not None and self._worth(found.reruns) < self._worth(best):
                best, gained_nothing = found.reruns, 0
                yield best
        self.stalled = gained_nothing >= STALLED

    def _worth(self, reruns: frozenset[Rerun]) -> tuple[int, int, float]:
        """What the best schedule has least of: bytes over the budget at the peak, the sum of these over all runs,
        seconds. Several runs may share the highest peak, and a stretch lowers one of them: the sum shows that.
        """
        over = [max(0, held - self.budget) for held in memory(self.dag, runs(self.dag, reruns))]
        return max(over), sum(over), seconds(self.dag, reruns)

    def _stretch(self, reruns: frozenset[Rerun], stage: int, work: float) -> Solved:
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
        found = Subproblem(self.dag, self.budget, reruns, first, last, places, self.cutoff).solve(work)
        self.sizes[depth] = min(MOST, self.sizes[depth] * 1.1) if found.ended else max(FEWEST, self.sizes[depth] * 0.8)
        return found

    def _chains(self, depth: int) -> list[Rerun]:
        if depth not in self.chained:
            self.chained[depth] = sorted(chains(self.dag, self.budget, depth, LONGEST))
        return self.chained[depth]

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
