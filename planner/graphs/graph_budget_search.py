"""The search at one budget for a graph without a disk: eviction, bounds, and programs around the best schedule."""

from __future__ import annotations

from collections.abc import Iterable

from tightfit.planner.cutoff import Cutoff
from tightfit.planner.graphs.bounds.bound import AnyBound, ClassBound
from tightfit.planner.graphs.incumbents import Incumbents
from tightfit.planner.graphs.plan_result import GraphOutcome, Report
from tightfit.planner.graphs.problem.actions import carry
from tightfit.planner.graphs.problem.schedule import Rerun, seconds
from tightfit.planner.graphs.search.eviction_search import EvictionSearch
from tightfit.planner.graphs.search.large_neighbourhood import LargeNeighbourhood
from tightfit.planner.graphs.search.subproblem import BETTER, Subproblem
from tightfit.planner.plan_result import gap_to

EXACT_OPERATORS, EXACT_WORK = 32, 10.0
"""number of operators up to which one program over the whole class is tried first, and units of work that it may take
"""
IMPROVED = 4.0
"""units of work of ruin and recreate"""
FIRST_WORK = 1.0
"""units of work that each of a round's searches has in the first round; in the next ones it is twice as much each time
"""
NEAR = 1e-3
"""gap below which a search has little left to gain but the proof of optimality"""
NEAR_WORK = 4.0
"""units of work that each of a round's searches has below it at least"""
GAINED = 0.5
"""below `NEAR` another round follows only if the last one left at most this share of the gap"""
REPAIRED = 0.25
"""units of work, for each unit of a round's searches, in which the bound's answers are repaired"""


class GraphBudgetSearch:
    """One search, which starts from what is `found` and adds to it. It may stop at the gap `gap`."""

    def __init__(
        self, found: Incumbents, budget: int, any_bound: AnyBound, *, gap: float, cutoff: Cutoff, report: Report
    ) -> None:
        self.found = found
        self.dag = found.dag
        self.options = found.options
        self.budget = budget
        self.any_bound = any_bound
        self.gap = gap
        self.cutoff = cutoff
        self.report = report
        self.best = found.lowest()
        """the best schedule so far: the fastest that fits, or the one of lowest peak where none does"""
        self.bound: ClassBound | None = None
        self.exact_bound = self.dag.once_seconds
        """what the one program over the whole class has proven"""
        self.eviction = EvictionSearch(self.dag, budget, cutoff)
        self.near = LargeNeighbourhood(self.dag, budget, cutoff)

    @property
    def fits(self) -> bool:
        """Whether the best schedule fits."""
        return self.found.peaks[self.best] <= self.budget

    @property
    def proven(self) -> float:
        """Lower bound in seconds on every schedule of the class; infinity: none fits."""
        return self.exact_bound if self.bound is None else self.bound.seconds

    def left(self) -> float:
        """The gap that is left; 1 where nothing fits yet."""
        return gap_to(seconds(self.dag, self.best), self.proven) if self.fits else 1.0

    def solve(self) -> GraphOutcome:
        """A schedule that fits and a bound, then rounds that close the gap between them."""
        ended, stalled = True, False
        try:
            stalled = self._closed()
            while not self.any_bound.ended:
                self.any_bound.rise(self.cutoff)
        except TimeoutError:
            ended = False
        return GraphOutcome(
            carried=carry(self.dag, self.best) if self.fits else None,
            bound_seconds=self.proven if self.fits else self.dag.once_seconds,
            deterministic=ended,
            stalled=stalled,
        )

    def _closed(self) -> bool:
        """Search until the gap is closed as far as it will be; whether it was given up before that. Raises TimeoutError
        where the cutoff strikes.

        Rounds of twice the work each follow each other until the gap is `NEAR`; below that only as long as one leaves
        at most half of it.
        """
        self._evict(self.found.seeds(self.budget))
        self.found.chained(self.budget, self.cutoff)
        self._evict([self.found.fastest(self.budget)])
        self.cutoff.check()
        if self.fits:
            self.report("fits", seconds(self.dag, self.best), self.proven)
        else:
            self.found.lower_by_eviction(self.cutoff)
            self.best = self.found.lowest()
        self.any_bound.rise(self.cutoff)
        if self.options.exact and self.dag.operators <= EXACT_OPERATORS and self._solved():
            return False
        if self.fits and self.options.ruin_and_recreate:
            self.best = self.found.note(self.eviction.improved(self.best, IMPROVED))
        self.cutoff.check()
        self.bound = ClassBound(self.dag, self.budget, self.best, self.options)
        work = FIRST_WORK
        while (before := self.left()) > self.gap:
            work = max(work, NEAR_WORK) if before <= NEAR else work
            lowest = self._round(self.bound, work)
            if not self.fits and self._nothing_fits():
                return False
            if before <= NEAR:
                if self.left() > GAINED * before:
                    return True
            elif self.left() >= before and lowest and self.bound.ended and self._still:
                return True
            work *= 2
        return False

    @property
    def _still(self) -> bool:
        """Whether improving the schedule has come to nothing."""
        return self.near.stalled or not self.options.polishing

    def _solved(self) -> bool:
        """Whether one program over the whole class finds the fastest schedule that fits, and proves it."""
        dag = self.dag
        places = [(stage, i) for stage in range(len(dag)) for i in range(stage) if dag.recomputable[i]]
        solved = Subproblem(dag, self.budget, self.best, 0, len(dag), places, self.cutoff).solve(EXACT_WORK)
        if solved.reruns is not None:
            self.best = self.found.note(solved.reruns)
        self.cutoff.check()
        if not (solved.ended and self.fits):
            return False
        self.exact_bound = max(dag.once_seconds, seconds(dag, self.best) - BETTER * dag.once_seconds)
        return True

    def _nothing_fits(self) -> bool:
        """Whether that is proven."""
        if self.proven == float("inf"):
            self.found.proven.above(self.budget)
        return self.found.proven.lowest_bytes > self.budget or self.any_bound.seconds == float("inf")

    def _evict(self, seeds: Iterable[frozenset[Rerun]], work: float = float("inf")) -> None:
        """Take the fastest schedule that eviction makes of `seeds` in `work` units, if one fits."""
        reruns = self.eviction.fastest(seeds, work)
        if reruns is not None:
            self.best = self.found.note(reruns)

    def _round(self, bound: ClassBound, work: float) -> bool:
        """Raise the bound, repair its answers and improve the schedule. They help each other: a better schedule cuts
        down the integer programs, and their answers are schedules to start from. Returns whether the search for the
        lowest peak has ended, without which a budget that nothing fits yet is not given up.
        """
        target = self.gap if self.left() <= max(self.gap, NEAR) else max(self.gap, NEAR)
        for whole in (False, True):
            known = len(bound.starts)
            enough = seconds(self.dag, self.best) * (1 - target) if self.fits else float("inf")
            if whole:
                bound.whole(work, enough, self.best, self.cutoff)
            else:
                bound.linear(work, enough, self.cutoff)
            if bound.starts[known:]:
                # The answers exceed the budget between moments. Later programs give better ones.
                self._evict([self.best, *reversed(bound.starts[known:])], REPAIRED * work)
            self.cutoff.check()
        lowest = True
        if not self.fits and not self._nothing_fits():
            lowest = self.found.lowest_peak(work, self.cutoff).ended
            self.best = self.found.lowest()
        if self.options.polishing:
            enough = self.proven / (1 - target) if self.fits else float("inf")
            for better in self.near.polished(self.best, work, enough):
                self.best = self.found.note(better)
        self.report("improved and bounded", seconds(self.dag, self.best) if self.fits else float("inf"), self.proven)
        self.any_bound.rise(self.cutoff)
        return lowest
