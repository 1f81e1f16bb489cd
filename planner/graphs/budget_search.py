"""The search at one budget for a graph without a disk: eviction, bounds, and programs around the best schedule."""

from __future__ import annotations

import time
from contextlib import suppress

from tightfit.planner.graphs.bounds.bound import ClassBound
from tightfit.planner.graphs.incumbents import Incumbents
from tightfit.planner.graphs.plan_result import GraphOutcome, Report
from tightfit.planner.graphs.problem.actions import carry
from tightfit.planner.graphs.problem.schedule import seconds
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
CLOSING_SHARE, CLOSING_SECONDS = 1.0, 2.0
"""time for one more attempt to close the gap: this multiple of the seconds taken so far, and so
many seconds at least
"""
GAINED = 0.5
"""another attempt follows only if the last one left at most this share of the gap"""
CLOSED_OPERATORS = 128
"""number of operators up to which one program over all places for re-runs is tried first; solved to optimality, it is a
proof for the class
"""


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
        self.near_enough = max(gap, NEAR)
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
        self.near = LargeNeighbourhood(self.dag, budget, self.options)

    def left(self) -> float:
        """The gap that is left."""
        return gap_to(seconds(self.dag, self.best), self.bound.seconds)

    def solve(self) -> GraphOutcome:
        """First until the gap is `NEAR`, or the one that was asked for where that is more, then on to the latter."""
        fits = self._first()
        if not fits and time.monotonic() > self.ends:
            self.found.ended(False)
            return self._nothing()
        # The bound gets less time where nothing fits yet: the rest is for the smallest budget.
        share, enough = (0.55, seconds(self.dag, self.best) * (1 - self.near_enough)) if fits else (0.3, float("inf"))
        self.bound = ClassBound(self.dag, self.budget, self.best, self.options)
        self.bound.linear(self.started + share * self.span, enough)
        self.bound.whole(self.started + 0.2 * self.span, enough)
        if self.bound.seconds == float("inf") and not fits:
            self.found.lowest_bytes = max(self.found.lowest_bytes, self.budget + 1)
            self.found.ended(self.bound.timely, self.eviction.timely)
            return self._nothing()
        if not self._improved():
            return self._nothing()
        self._told("bounded and improved")
        if self.options.whole_class and self.dag.operators <= CLOSED_OPERATORS and self.left() > self.gap:
            self._prove()
            self._told("proven as far as it goes")
        if self.left() > self.near_enough:
            self._polish(self.ends, self.near_enough)
            self._told("polished")
        if self.left() > EXACT:
            self._ended()
        stalled = False
        if self.options.closing and self.gap < self.left() <= self.near_enough:
            stalled = self._closed()
            self._told("closed")
        return GraphOutcome(
            carried=carry(self.dag, self.best),
            bound_seconds=self.bound.seconds,
            timely=self.found.timely,
            stalled=stalled,
        )

    def _told(self, stage: str) -> None:
        self.report(stage, seconds(self.dag, self.best), self.bound.seconds)

    def _ended(self) -> None:
        """Record whether a time limit ended any part of the search."""
        self.found.ended(self.bound.timely, self.eviction.timely, self.near.timely)

    def _nothing(self) -> GraphOutcome:
        """Where no schedule fits, or none was found."""
        return GraphOutcome(carried=None, bound_seconds=self.dag.once_seconds, timely=self.found.timely)

    def _first(self) -> bool:
        """Whether eviction finds a schedule that fits."""
        reruns = self.eviction.fastest(self.found.seeds(self.budget, self.deadline))
        if reruns is None:
            return False
        # From here on only the clock counts, not processor time.
        self.eviction.deadline, self.eviction.granted = self.started + 0.1 * self.span, 0.0
        self.best = self.found.note(self.eviction.improved(reruns) if self.options.ruin_and_recreate else reruns)
        self.report("improved", seconds(self.dag, self.best), self.dag.once_seconds)
        return True

    def _improved(self) -> bool:
        """Whether a schedule fits, once the bound's answers are looked at as well: they exceed the budget between
        moments, and repaired by eviction they are often the best schedules found.
        """
        share = 0.075 if self.bound.small else 0.1
        self.eviction.deadline = min(time.monotonic() + share * self.span, self.ends)
        # Later programs give better answers, so these come first.
        reruns = self.eviction.fastest([self.best, *reversed(self.bound.starts)])
        if reruns is None:
            return self._lowered()
        self.best = self.found.note(reruns)
        return True

    def _lowered(self) -> bool:
        """Whether a schedule fits that is found from the one of lowest peak, where eviction finds none."""
        least = self.found.lowest_peak(min(LOWEST_SHARE * self.span, max(0.0, self.ends - time.monotonic())))
        if least.bytes > self.budget:
            self.found.ended(self.bound.timely, self.eviction.timely)
            return False
        now = time.monotonic()
        until = min(max(self.started + 0.55 * self.span, now + 0.07 * self.span), self.ends)
        self.best = self.found.note(self.near.polished(self.found.lowest(), deadline=until, enough=float("inf")))
        if self.found.peaks[self.best] > self.budget:
            self._ended()
            return False
        return True

    def _prove(self) -> None:
        """Try to solve one program over the whole class, in as much time as everything before it took. Where the solver
        finishes, `bound` is raised so that it proves the schedule optimal.
        """
        dag, now = self.dag, time.monotonic()
        allowed = min(self.ends - now, max(CLOSING_SECONDS, CLOSING_SHARE * (now - self.started)))
        places = {(stage, i) for stage in range(len(dag)) for i in range(stage) if dag.recomputable[i]}
        with suppress(TimeoutError):
            # A stretch over all stages with all places covers the whole class.
            solved = Subproblem(dag, self.budget, self.best, 0, len(dag), places, seconds=allowed).solve()
            self.best = self.found.note(solved.reruns or self.best)
            if solved.ended:
                self.bound.seconds = max(self.bound.seconds, seconds(dag, self.best) - BETTER * dag.once_seconds)

    def _polish(self, deadline: float, gap: float) -> None:
        """Improve the schedule by large-neighbourhood search and the bound by integer programs, until they are within
        `gap`.

        The two help each other: a better schedule cuts down the integer programs, and their answers are schedules to
        start from.
        """
        began = time.monotonic()
        left = deadline - began
        best = self.best
        if self.bound.small:
            best = self.near.polished(best, deadline=began + 0.3 * left, enough=self.bound.seconds / (1 - gap))
            known = len(self.bound.starts)
            self.bound.whole(began + 0.75 * left, seconds(self.dag, best) * (1 - gap))
            answers = self.bound.starts[known:]
            if answers:
                self.eviction.deadline = began + 0.8 * left
                best = self.eviction.fastest([best, *reversed(answers)]) or best
        best = self.near.polished(best, deadline=deadline, enough=self.bound.seconds / (1 - gap))
        self.best = self.found.note(best)

    def _closed(self) -> bool:
        """Close what is left of the gap as far as possible; whether this was given up before the time was over.

        One attempt has as much time as everything before it took, and another follows only if it halved the gap at
        least. So where the last bit cannot be proven, planning takes a little more than twice as long, and not all of
        its time limit.
        """
        while self.left() > self.gap:
            before, now = self.left(), time.monotonic()
            allowed = max(CLOSING_SECONDS, CLOSING_SHARE * (now - self.started))
            if now + allowed > self.ends:
                self.found.ended(False)
                return False
            self._polish(now + allowed, self.gap)
            if self.left() > GAINED * before:
                self._ended()
                return True
        return False
