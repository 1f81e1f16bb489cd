"""The search for the smallest budget of a graph without a disk: the schedule of lowest peak."""

from __future__ import annotations

import time

from tightfit.planner.graphs.incumbents import Incumbents
from tightfit.planner.graphs.plan_result import LowestPeak
from tightfit.planner.graphs.problem.actions import carry
from tightfit.planner.graphs.search.eviction_search import EvictionSearch
from tightfit.planner.graphs.search.large_neighbourhood import LargeNeighbourhood

GRANTED = 0.1
"""processor time for each try at a smaller budget, as a share of the time left, but no more than `MOST_GRANTED`"""
MOST_GRANTED = 1.0
"""seconds of processor time for each try at a smaller budget, at most"""


def lowest_schedule(found: Incumbents, deadline: float) -> LowestPeak:
    """The schedule of lowest peak found until `deadline`, on the monotonic clock."""
    dag = found.dag
    left = max(0.0, deadline - time.monotonic())
    _evict(found, deadline - 0.3 * left, min(MOST_GRANTED, GRANTED * left), deadline)
    low = found.lowest_peak(0.4 * max(0.0, deadline - time.monotonic())).bytes
    best = found.lowest()
    if found.peaks[best] > low:
        near = LargeNeighbourhood(dag, low)
        best = found.note(near.polished(best, deadline=deadline))
        found.ended(near.timely)
    return LowestPeak(carried=carry(dag, best), lowest_bytes=found.proven.lowest_bytes, timely=found.timely)


def _evict(found: Incumbents, deadline: float, granted: float, latest: float) -> None:
    """Note schedules of ever lower peaks, as low as eviction finds them."""
    low = found.dag.floor_bytes - 1
    best = found.lowest()
    while found.peaks[best] - low > 1:
        if time.monotonic() > deadline:
            found.ended(False)
            break
        # First bisect between the peak that eviction did not reach and the lowest one found, then go down by single
        # bytes.
        for budget in ((low + found.peaks[best]) // 2, found.peaks[best] - 1):
            search = EvictionSearch(found.dag, budget, deadline=deadline, granted=granted, latest=latest)
            reruns = search.fastest(found.seeds(budget, deadline))
            found.ended(search.timely)
            if reruns is not None:
                best = found.note(reruns)
                break
            low = max(low, budget)
