"""The search at one budget for a graph that names a disk: one for each price of the disk's time."""

from __future__ import annotations

import time

from tightfit.planner.graphs.bounds.bound import ClassBound
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
GRANTED = 0.025
"""processor time for a first schedule that fits, as a share of the time limit"""
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
        self, found: Incumbents, budget: int, *, gap: float, started: float, deadline: float, report: Report
    ) -> None:
        """`started` and `deadline` are on the monotonic clock."""
        self.found = found
        self.dag = found.dag
        self.budget = budget
        self.gap = gap
        self.started = started
        self.span = deadline - started
        self.deadline = deadline
        self.report = report

    def solve(self) -> GraphOutcome:
        """The exact solver for few operators, otherwise a search at each price, at ever smaller shares of the budget
        while the gap is open.
        """
        dag, found, options = self.dag, self.found, self.found.options
        proven = dag.once_seconds
        if dag.operators <= exact_moves.OPERATORS and options.exact_moves:
            seconds = max(0.0, 0.5 * (self.deadline - time.monotonic()))
            solved = exact_moves.fastest_with_moves(dag, self.budget, seconds=seconds)
            if solved.actions is not None:
                found.moved.append(timed(dag, solved.actions))
                if solved.proven:
                    best = found.moved[-1]
                    return GraphOutcome(carried=best, bound_seconds=min(best.seconds, solved.bound))
            found.ended(solved.proven)
            proven = solved.bound
        plain: frozenset[Rerun] = frozenset()
        prices = PRICES if options.prices else ONE_PRICE
        for number, price in enumerate(prices, start=1):
            ends = self.started + 0.7 * self.span * number / len(prices)
            reruns = self._search(self.budget, price, ends, GRANTED * self.span, self.started + 0.8 * self.span)
            if reruns is not None:
                self.report("carried out", found.moved[-1].seconds, dag.once_seconds)
            if price is None and reruns is not None:
                plain = found.note(reruns)
        # With everything on the disk that can be, the peak is `floor_bytes`, so this schedule always fits.
        found.moved.append(with_everything_moved(dag, self.budget))
        bound = ClassBound(dag, self.budget, plain, options)
        bound.linear(self.started + 0.85 * self.span, self._best().seconds)
        proven = max(proven, bound.seconds)
        stalled = self._shared(prices, proven) if options.shares else False
        return GraphOutcome(
            carried=self._best(), bound_seconds=proven, timely=found.timely and bound.timely, stalled=stalled
        )

    def _best(self) -> Carried:
        """The fastest schedule; all that the search finds fit the budget."""
        return min(self.found.moved, key=lambda carried: carried.seconds)

    def _shared(self, prices: tuple[float | None, ...], proven: float) -> bool:
        """Search within smaller shares of the budget while the gap is open; whether that was given up before the time
        was over.
        """
        ends = self.started + 0.95 * self.span
        for share in SHARES:
            before = self._best().seconds
            within = self.dag.floor_bytes + int(share * (self.budget - self.dag.floor_bytes))
            for price in prices:
                if gap_to(self._best().seconds, proven) <= self.gap or time.monotonic() > ends:
                    break
                self._search(within, price, ends, 0.0, ends)
            if self._best().seconds >= before and gap_to(self._best().seconds, proven) <= NEAR:
                return time.monotonic() <= ends
        return False

    def _search(
        self, within: int, price: float | None, deadline: float, granted: float, latest: float
    ) -> frozenset[Rerun] | None:
        """Search at one `price` of the disk for re-runs that fit `within` bytes; None: none were found. Their full
        schedule, with transfers moved within the whole budget, is noted then.

        The search does not count the memory that early fetches and late frees take: re-runs for fewer bytes leave more
        of it, and the schedule may be faster.
        """
        dag = self.dag
        variant = dag if price is None else dag.moving(worth_moving(dag, price), price)
        search = EvictionSearch(variant, within, deadline=deadline, granted=granted, latest=latest)
        reruns = search.fastest(self.found.seeds(within, deadline) if price is None else [(), touch_and_go(variant)])
        if reruns is not None and self.found.options.ruin_and_recreate:
            reruns = search.improved(reruns)
        self.found.ended(search.timely)
        if reruns is not None:
            self.found.moved.append(carry(variant, reruns, self.budget))
        return reruns
