"""The search at one budget for a graph that names a disk: one for each price of the disk's time."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.planner.cutoff import Cutoff
from tightfit.planner.graphs.bounds.bound import AnyBound, ClassBound
from tightfit.planner.graphs.incumbents import Incumbents
from tightfit.planner.graphs.plan_result import GraphOutcome, Report
from tightfit.planner.graphs.problem.actions import Carried, carry, timed, touch_and_go, worth_moving
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun
from tightfit.planner.graphs.search import exact_moves
from tightfit.planner.graphs.search.eviction_search import EvictionSearch
from tightfit.planner.plan_result import gap_to

PRICES = (None, 0.05, 0.5, 1.0)
"""prices of a second of the disk, in seconds of computation, with which searches are made; None: nothing is moved"""
ONE_PRICE = (None, 0.5)
"""these where `SearchOptions.prices` is off"""
SHARES = (0.97, 0.93, 0.85, 0.7, 0.5, 0.3)
"""while the gap is open, schedules with moves are also searched for within these shares of the budget above the floor;
transfers then use the rest
"""
EXACT_WORK = 10.0
"""units of work of the exact solver"""
IMPROVED = 2.0
"""units of work of ruin and recreate, each time"""
FIRST_WORK = 4.0
"""units of work for a bound, before the schedules are improved"""
NEAR = 1e-3
"""gap below which smaller shares are given up once one gains nothing"""


def with_everything_moved(dag: Dag, budget: int) -> Carried:
    """The schedule of lowest peak, `floor_bytes`: every output is on disk unless the current operator needs it. Its
    transfers may use `budget` bytes.
    """
    variant = dag.moving(range(len(dag)), 1.0)
    return carry(variant, touch_and_go(variant), budget)


class MoveSearch:
    """One search, which starts from what is `found` and adds to it. It may stop at the gap `gap`."""

    def __init__(
        self, found: Incumbents, budget: int, any_bound: AnyBound, *, gap: float, cutoff: Cutoff, report: Report
    ) -> None:
        self.found = found
        self.dag = found.dag
        self.budget = budget
        self.any_bound = any_bound
        self.gap = gap
        self.cutoff = cutoff
        self.report = report
        self.proven = self.dag.once_seconds
        """lower bound in seconds on every schedule of the class"""

    def solve(self) -> GraphOutcome:
        """The exact solver for few operators, otherwise a search at each price, at ever smaller shares of the budget
        while the gap is open.
        """
        # With everything on the disk that can be, the peak is `floor_bytes`, so this schedule always fits.
        self.found.moved.append(with_everything_moved(self.dag, self.budget))
        ended, stalled = True, False
        try:
            stalled = self._closed()
            while not self.any_bound.ended:
                self.any_bound.rise(self.cutoff)
        except TimeoutError:
            ended = False
        best = self._best()
        return GraphOutcome(
            carried=best, bound_seconds=min(best.seconds, self.proven), deterministic=ended, stalled=stalled
        )

    def _best(self) -> Carried:
        """The fastest schedule; all that the search finds fit the budget."""
        return min(self.found.moved, key=lambda carried: carried.seconds)

    def _closed(self) -> bool:
        """Search until the gap is closed as far as it will be; whether it was given up before that. Raises TimeoutError
        where the cutoff strikes.
        """
        options = self.found.options
        if self.dag.operators <= exact_moves.OPERATORS and options.exact_moves:
            solved = exact_moves.fastest_with_moves(self.dag, self.budget, work=EXACT_WORK, cutoff=self.cutoff)
            self.proven = max(self.proven, solved.bound)
            if solved.actions is not None:
                self.found.moved.append(timed(self.dag, solved.actions))
            self.cutoff.check()
            if solved.proven:
                return False
        prices = PRICES if options.prices else ONE_PRICE
        searches = [self._searched(self.budget, price) for price in prices]
        self.report("carried out", self._best().seconds, self.proven)
        self.any_bound.rise(self.cutoff)
        bound = ClassBound(self.dag, self.budget, self.found.fastest(self.budget), options)
        self._raise(bound, FIRST_WORK)
        for searched in searches:
            self._improve(searched)
        stalled = self._shared(prices) if options.shares else False
        self._raise(bound, float("inf"))
        return stalled

    def _raise(self, bound: ClassBound, work: float) -> None:
        try:
            bound.linear(work, self._best().seconds, self.cutoff)
        finally:
            self.proven = max(self.proven, bound.seconds)

    def _shared(self, prices: tuple[float | None, ...]) -> bool:
        """Search within smaller shares of the budget while the gap is open; whether that was given up."""
        for share in SHARES:
            before = self._best().seconds
            within = self.dag.floor_bytes + int(share * (self.budget - self.dag.floor_bytes))
            for price in prices:
                if gap_to(self._best().seconds, self.proven) <= self.gap:
                    return False
                self._improve(self._searched(within, price))
            self.report("within less memory", self._best().seconds, self.proven)
            if self._best().seconds >= before and gap_to(self._best().seconds, self.proven) <= NEAR:
                return True
        return False

    def _searched(self, within: int, price: float | None) -> _Searched:
        """Search at one `price` of the disk for re-runs that fit `within` bytes.

        The search does not count the memory that early fetches and late frees take: re-runs for fewer bytes leave more
        of it, and the schedule may be faster.
        """
        dag = self.dag
        variant = dag if price is None else dag.moving(worth_moving(dag, price), price)
        if price is None:
            self.found.chained(within, self.cutoff)
        search = EvictionSearch(variant, within, self.cutoff)
        reruns = search.fastest(self.found.seeds(within) if price is None else [(), touch_and_go(variant)])
        if reruns is not None:
            self._note(variant, price, reruns)
        self.cutoff.check()
        return _Searched(search=search, price=price, reruns=reruns)

    def _improve(self, searched: _Searched) -> None:
        """Ruin and recreate what was found."""
        if searched.reruns is not None and self.found.options.ruin_and_recreate:
            better = searched.search.improved(searched.reruns, IMPROVED)
            if better != searched.reruns:
                self._note(searched.search.dag, searched.price, better)
            self.cutoff.check()

    def _note(self, variant: Dag, price: float | None, reruns: frozenset[Rerun]) -> None:
        """Note the full schedule of the re-runs, with transfers moved within the whole budget."""
        self.found.moved.append(carry(variant, reruns, self.budget))
        if price is None:
            self.found.note(reruns)


@dataclass(frozen=True, kw_only=True)
class _Searched:
    """A search at one price of the disk, which has found these re-runs; None: none that fit."""

    search: EvictionSearch
    price: float | None
    reruns: frozenset[Rerun] | None
