"""The search at one budget for a graph without a disk: eviction, bounds, and programs around the best schedule."""

from __future__ import annotations

import time
from collections.abc import Iterable

from tightfit.planner.graphs.bounds.bound import ClassBound
from tightfit.planner.graphs.incumbents import Incumbents
from tightfit.planner.graphs.plan_result import GraphOutcome, Report
from tightfit.planner.graphs.problem.actions import carry
from tightfit.planner.graphs.problem.schedule import Rerun, seconds
from tightfit.planner.graphs.search.eviction_search import EvictionSearch
from tightfit.planner.graphs.search.large_neighbourhood import LargeNeighbourhood
from tightfit.planner.graphs.search.subproblem import BETTER, Subproblem
from tightfit.planner.plan_result import EXACT, gap_to

GRANTED = 0.1
"""processor time for a first schedule that fits, as a share of the time limit"""
LOWEST_SHARE = 0.3
"""share of the time limit for the lowest peak, where no search finds a schedule that fits"""
NEAR = 1e-3
"""gap below which a search has little left to gain but the proof of optimality"""
ATTEMPT_SECONDS = 6.0
"""least time for an attempt to close the gap, which else gets as much as everything before it took"""
GAINED = 0.5
"""below `NEAR` another attempt follows only if the last one left at most this share of the gap"""

EXACT_OPERATORS = 32
"""number of operators up to which one program over the whole class is tried first"""


class GraphBudgetSearch:
    """One search, which starts from what is `found` and adds to it. It may stop at the gap `gap`."""

    def __init__(
        self, found: Incumbents, budget: int, *, gap: float, started: float, deadline: float, report: Report
    ) -> None:
        """`started` and `deadline` are on the monotonic clock."""
        self.found = found
        self.dag = found.dag
        self.options = found.options
        self.budget = budget
        self.gap = gap
        self.started = started
        self.deadline = deadline
        self.span = deadline - started
        self.ends = started + 0.95 * self.span
        """when to search no more"""
        self.report = report
        self.best = found.lowest()
        """the best schedule so far: the fastest that fits, or the one of lowest peak where none does"""
        self.bound: ClassBound
        self.eviction = EvictionSearch(
            self.dag, budget, deadline=started + 0.3 * self.span, granted=GRANTED * self.span, latest=self.ends
        )
        self.near = LargeNeighbourhood(self.dag, budget)

    def left(self) -> float:
        """The gap that is left."""
        return gap_to(seconds(self.dag, self.best), self.bound.seconds)

    def solve(self) -> GraphOutcome:
        """A schedule that fits and a bound, then attempts to close the gap between them."""
        fits = self._evicted(self.found.seeds(self.budget, self.deadline))
        if not fits and time.monotonic() > self.ends:
            self.found.ended(False)
            return self._nothing()
        if fits:
            self.report("fits", seconds(self.dag, self.best), self.dag.once_seconds)
        if self.options.exact and self.dag.operators <= EXACT_OPERATORS and self._proven():
            bound = max(self.dag.once_seconds, seconds(self.dag, self.best) - BETTER * self.dag.once_seconds)
            return GraphOutcome(carried=carry(self.dag, self.best), bound_seconds=bound)
        # From here on only the clock counts, not processor time.
        self.eviction.deadline, self.eviction.granted = self.started + 0.1 * self.span, 0.0
        if fits and self.options.ruin_and_recreate:
            self.best = self.found.note(self.eviction.improved(self.best))
        # The bound gets less time where nothing fits yet: the rest is for the smallest budget.
        self.bound = ClassBound(self.dag, self.budget, self.best, self.options)
        self.bound.linear(self.started + (0.55 if fits else 0.3) * self.span, self._enough(fits))
        fits = self._repaired(0)
        known = len(self.bound.starts)
        self.bound.whole(self.started + 0.2 * self.span, self._enough(fits), self.best)
        if self.bound.seconds == float("inf") and not fits:
            self.found.proven.above(self.budget)
            self._ended()
            return self._nothing()
        if not (self._repaired(known) or self._lowered()):
            self._ended()
            return self._nothing()
        self.report("bounded and improved", seconds(self.dag, self.best), self.bound.seconds)
        stalled = self._closed()
        if self.left() > EXACT:
            self._ended()
        return GraphOutcome(
            carried=carry(self.dag, self.best),
            bound_seconds=self.bound.seconds,
            timely=self.found.timely,
            stalled=stalled,
        )

    def _ended(self) -> None:
        """Record whether a time limit ended any part of the search."""
        self.found.ended(self.bound.timely, self.eviction.timely, self.near.timely)

    def _nothing(self) -> GraphOutcome:
        """Where no schedule fits, or none was found."""
        return GraphOutcome(carried=None, bound_seconds=self.dag.once_seconds, timely=self.found.timely)

    def _proven(self) -> bool:
        """Whether one program over the whole class finds the fastest schedule that fits, and proves it."""
        dag = self.dag
        places = [(stage, i) for stage in range(len(dag)) for i in range(stage) if dag.recomputable[i]]
        left = 0.5 * (self.ends - time.monotonic())
        try:
            solved = Subproblem(dag, self.budget, self.best, 0, len(dag), places, seconds=left).solve()
        except TimeoutError:
            return False
        self.best = self.found.note(self.best if solved.reruns is None else solved.reruns)
        return solved.ended and self.found.peaks[self.best] <= self.budget

    def _enough(self, fits: bool) -> float:
        """Seconds at which a bound is near enough."""
        return seconds(self.dag, self.best) * (1 - max(self.gap, NEAR)) if fits else float("inf")

    def _evicted(self, seeds: Iterable[frozenset[Rerun]]) -> bool:
        """Whether a schedule fits, of which eviction from `seeds` finds the fastest."""
        reruns = self.eviction.fastest(seeds)
        if reruns is None:
            return False
        self.best = self.found.note(reruns)
        return True

    def _repaired(self, known: int) -> bool:
        """Whether a schedule fits, once the bound's answers after the first `known` are looked at as well: they exceed
        the budget between moments, and repaired by eviction they are often the best schedules found.
        """
        share = 0.075 if self.bound.small else 0.1
        self.eviction.deadline = min(time.monotonic() + share * self.span, self.ends)
        # Later programs give better answers, so these come first.
        return self._evicted([self.best, *reversed(self.bound.starts[known:])])

    def _lowered(self) -> bool:
        """Whether a schedule fits that is found from the one of lowest peak, where eviction finds none."""
        least = self.found.lowest_peak(min(LOWEST_SHARE * self.span, max(0.0, self.ends - time.monotonic())))
        if least.bytes > self.budget:
            return False
        now = time.monotonic()
        until = min(max(self.started + 0.55 * self.span, now + 0.07 * self.span), self.ends)
        self.best = self.found.note(self.near.polished(self.found.lowest(), deadline=until, enough=float("inf")))
        return self.found.peaks[self.best] <= self.budget

    def _closed(self) -> bool:
        """Close the gap as far as possible; whether this was given up before the time was over.

        The time is used until the gap is `NEAR`. From there on one attempt has as much time as everything before it
        took, and another follows only if it halved the gap at least. So where the last bit cannot be proven, planning
        takes a little more than twice as long, and not all of its time limit.
        """
        near = max(self.gap, NEAR)
        if self.left() > near:
            self._attempt(self.ends, near)
        while self.gap < (before := self.left()) <= near:
            now = time.monotonic()
            if now > self.ends:
                self.found.ended(False)
                return False
            self._attempt(min(self.ends, now + max(ATTEMPT_SECONDS, now - self.started)), self.gap)
            if self.left() > GAINED * before:
                return True
        return False

    def _attempt(self, deadline: float, gap: float) -> None:
        """Improve the schedule by large-neighbourhood search and the bound by integer programs, until they are within
        `gap`.

        The two help each other: a better schedule cuts down the integer programs, and their answers are schedules to
        start from.
        """
        began = time.monotonic()
        left = deadline - began
        if self.bound.small:
            self._polish(began + 0.3 * left, gap)
            known = len(self.bound.starts)
            self.bound.whole(began + 0.75 * left, seconds(self.dag, self.best) * (1 - gap), self.best)
            if self.bound.starts[known:]:
                self._repaired(known)
        self._polish(deadline, gap)
        self.report("improved and bounded", seconds(self.dag, self.best), self.bound.seconds)

    def _polish(self, deadline: float, gap: float) -> None:
        if not self.options.polishing:
            return
        enough = self.bound.seconds / (1 - gap)
        self.best = self.found.note(self.near.polished(self.best, deadline=deadline, enough=enough))
