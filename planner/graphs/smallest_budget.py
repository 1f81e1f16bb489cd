"""The search for the smallest budget of a graph without a disk: the schedule of lowest peak."""

from __future__ import annotations

from tightfit.planner.cutoff import Cutoff
from tightfit.planner.graphs.incumbents import Incumbents
from tightfit.planner.graphs.plan_result import LowestPeak
from tightfit.planner.graphs.problem.actions import carry
from tightfit.planner.graphs.search.large_neighbourhood import LargeNeighbourhood

FIRST_WORK = 2.0
"""units of the first attempts to lower and to prove the peak; the next ones get twice as many each time"""


def lowest_schedule(found: Incumbents, cutoff: Cutoff) -> LowestPeak:
    """The schedule of lowest peak found until the search ends or is cut."""
    ended = True
    try:
        found.lower_by_eviction(cutoff)
        _lower(found, cutoff)
    except TimeoutError:
        ended = False
    best = carry(found.dag, found.lowest())
    return LowestPeak(carried=best, lowest_bytes=found.proven.lowest_bytes, deterministic=ended)


def _lower(found: Incumbents, cutoff: Cutoff) -> None:
    """Prove and lower the peak, until it is proven or neither has come further with twice the work."""
    work, before = FIRST_WORK, -1
    while True:
        low, best = found.lowest_peak(work, cutoff), found.lowest()
        if found.peaks[best] <= low.bytes:
            return
        near = LargeNeighbourhood(found.dag, low.bytes, cutoff)
        for lower in near.polished(best, work):
            found.note(lower)
        left = found.peaks[found.lowest()] - low.bytes
        if near.stalled and (low.ended or left == before):
            return
        work, before = 2 * work, left
