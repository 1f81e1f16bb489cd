"""The search for the smallest budget of a graph without a disk: the schedule of lowest peak."""

from __future__ import annotations

import time
from dataclasses import replace

from tightfit.planner.graphs.incumbents import Incumbents
from tightfit.planner.graphs.plan_result import LowestPeak
from tightfit.planner.graphs.problem.actions import carry
from tightfit.planner.graphs.problem.schedule import Rerun
from tightfit.planner.graphs.search import exact
from tightfit.planner.graphs.search.eviction_search import EvictionSearch
from tightfit.planner.graphs.search.large_neighbourhood import LargeNeighbourhood

GRANTED = 0.1
"""processor time for each try at a smaller budget, as a share of the time left, but no more than `MOST_GRANTED`"""
MOST_GRANTED = 1.0
"""seconds of processor time for each try at a smaller budget, at most"""
PROVEN_OPERATORS = 64
"""number of operators up to which the exact solver is asked for a schedule one byte below the smallest budget found"""


class SmallestBudget:
    """The schedule of lowest peak that is found, remembered."""

    def __init__(self, found: Incumbents) -> None:
        self.found = found
        self.dag = found.dag
        self._least: LowestPeak | None = None

    def least(self, deadline: float, limit: float) -> LowestPeak:
        """The schedule; a search that the time limit cut is repeated under a larger `limit`, in seconds."""
        found = self.found
        least = self._least
        if least is None or found.cut_before(None, limit):
            found.begin(None, limit)
            try:
                least = self._search(deadline)
            except KeyboardInterrupt:
                found.ended(False)
                found.end(None, limit, timely=False)
                raise
            found.lowest_bytes = max(found.lowest_bytes, least.lowest_bytes)
            beaten = any(peak < least.carried.peak_bytes for peak in found.late[0].values())
            found.ended(not beaten)
            least = replace(least, lowest_bytes=found.lowest_bytes, timely=least.timely and not beaten)
            found.end(None, limit, timely=least.timely)
        if min(found.peaks.values()) < least.carried.peak_bytes:
            # Another search has found a lower peak since.
            least = replace(least, carried=carry(self.dag, found.lowest()), timely=least.timely and found.timely)
            if not least.timely:
                found.end(None, limit, timely=False)
        self._least = least
        return least

    def _search(self, deadline: float) -> LowestPeak:
        dag, found = self.dag, self.found
        if found.options.exact and dag.operators <= exact.OPERATORS:
            with found.exact_seconds.until(deadline) as allowed:
                solved = exact.smallest(dag, seconds=allowed)
            if solved.proven and solved.reruns is not None:
                carried = carry(dag, solved.reruns)
                return LowestPeak(carried=carried, lowest_bytes=carried.peak_bytes)
            found.ended(solved.timely)
            found.note(solved.reruns or ())
        proving = exact.OPERATORS < dag.operators <= PROVEN_OPERATORS
        left = max(0.0, deadline - time.monotonic())
        found_by = deadline - 0.5 * left if proving else deadline
        self._evict(found_by - 0.3 * left, min(MOST_GRANTED, GRANTED * left), found_by)
        low = found.lowest_peak(0.4 * max(0.0, found_by - time.monotonic())).bytes
        best = found.lowest()
        if found.peaks[best] > low:
            near = LargeNeighbourhood(dag, low, found.options)
            best = found.note(near.polished(best, deadline=found_by))
            found.ended(near.timely)
        if proving:
            best, low = self._proven(best, low, deadline)
        return LowestPeak(carried=carry(dag, best), lowest_bytes=low, timely=found.timely)

    def _evict(self, deadline: float, granted: float, latest: float) -> None:
        """Note schedules of ever lower peaks, as low as eviction finds them."""
        low = self.dag.floor_bytes - 1
        best = self.found.lowest()
        while self.found.peaks[best] - low > 1:
            if time.monotonic() > deadline:
                self.found.ended(False)
                break
            # First bisect between the peak that eviction did not reach and the lowest one found, then go down by single
            # bytes.
            for budget in ((low + self.found.peaks[best]) // 2, self.found.peaks[best] - 1):
                search = EvictionSearch(self.dag, budget, deadline=deadline, granted=granted, latest=latest)
                reruns = search.fastest(self.found.seeds(budget, deadline))
                self.found.ended(search.timely)
                if reruns is not None:
                    best = self.found.note(reruns)
                    break
                low = max(low, budget)

    def _proven(self, best: frozenset[Rerun], low: int, deadline: float) -> tuple[frozenset[Rerun], int]:
        """The schedule of lowest peak and a lower bound on every peak, in bytes, by asking the exact solver again and
        again for one byte less: the other programs count memory in units of the budget, too coarsely for single bytes.
        """
        while self.found.peaks[best] > low:
            left = deadline - time.monotonic()
            if left <= 0:
                self.found.ended(False)
                break
            budget = self.found.peaks[best] - 1
            solved = exact.fastest(self.dag, budget, seconds=left, until=deadline)
            if solved.reruns is None:
                self.found.ended(solved.timely)
                return best, self.found.peaks[best] if solved.proven else low
            best = self.found.note(solved.reruns)
        return best, low
