"""What one call of the planner has found of a graph so far: schedules, where searches start, and how low a peak can
be.
"""

from __future__ import annotations

from collections.abc import Iterable

from tightfit.planner.cutoff import Cutoff
from tightfit.planner.graphs.problem.actions import Carried, carry
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, peak_bytes, pruned, seconds
from tightfit.planner.graphs.search.baselines import RULES, rules_for
from tightfit.planner.graphs.search.belady import belady_schedule
from tightfit.planner.graphs.search.chain_dp import as_chain, checkpoints
from tightfit.planner.graphs.search.eviction_search import EvictionSearch
from tightfit.planner.graphs.search.subproblem import Lowest, lowest_peak
from tightfit.planner.search_options import ALL, SearchOptions

SWEPT = 0.5
"""a search starts from a sweep (`belady`) only if that leaves at most this share of keep-all's excess over the budget:
otherwise it helps little and takes time
"""


class ProvenPeaks:
    """What is proven of the lowest peak of a graph, which holds at every budget."""

    def __init__(self, dag: Dag) -> None:
        self.dag = dag
        self.lowest_bytes = dag.floor_bytes
        """proven lower bound on the peak of every schedule of the class"""
        self._lowest: Lowest | None = None

    def above(self, budget: int) -> None:
        """Record that no schedule of the class fits `budget`."""
        self.lowest_bytes = max(self.lowest_bytes, budget + 1)

    def lowest(self, work: float, cutoff: Cutoff) -> Lowest:
        """`lowest_peak`, called again each time until its solver has finished once; the answer is remembered."""
        if self._lowest is None or not self._lowest.ended:
            self._lowest = lowest_peak(self.dag, work=work, cutoff=cutoff)
            self.lowest_bytes = max(self.lowest_bytes, self._lowest.bytes)
        return self._lowest


class Incumbents:
    """The schedules that the searches of one call have found."""

    def __init__(self, dag: Dag, proven: ProvenPeaks, options: SearchOptions = ALL) -> None:
        self.dag = dag
        self.proven = proven
        self.options = options
        self.peaks: dict[frozenset[Rerun], int] = {}
        """schedules and their peaks in bytes"""
        self.moved: list[Carried] = []
        """schedules with moves to the disk"""
        for rule in rules_for(dag):
            self.note(RULES[rule](dag))
        if options.sweep:
            self.note(belady_schedule(dag, dag.floor_bytes))

    # --- schedules -------------------------------------------------------------------------------------------------

    def note(self, reruns: Iterable[Rerun]) -> frozenset[Rerun]:
        """Keep a schedule; returns it without re-runs that are not needed."""
        kept = pruned(self.dag, reruns)
        self.peaks[kept] = peak_bytes(self.dag, kept)
        return kept

    def lowest(self) -> frozenset[Rerun]:
        """The re-runs of the schedule with the lowest peak."""
        return min(self.peaks, key=lambda reruns: (self.peaks[reruns], sorted(reruns)))

    def fastest(self, budget: int) -> frozenset[Rerun]:
        """The fastest of the schedules without moves that fit the budget; the empty set (keep-all), which need not fit,
        where none does.
        """
        fitting = [reruns for reruns, peak in self.peaks.items() if peak <= budget]
        return min(fitting, key=lambda reruns: (seconds(self.dag, reruns), sorted(reruns)), default=frozenset())

    def best(self, budget: int) -> Carried | None:
        """The fastest schedule that fits the budget; None: none does."""
        fitting = [carried for carried in self.moved if carried.peak_bytes <= budget]
        reruns = self.fastest(budget)
        if self.peaks[reruns] <= budget:
            fitting.append(carry(self.dag, reruns))
        return min(fitting, key=lambda carried: carried.seconds, default=None)

    # --- where searches start --------------------------------------------------------------------------------------

    def seeds(self, budget: int) -> list[frozenset[Rerun]]:
        """Schedules to start from: the fastest that fits, fixed rules, and a sweep (`belady`)."""
        seeds = [RULES[rule](self.dag) for rule in rules_for(self.dag)]
        sweep = belady_schedule(self.dag, budget) if self.options.sweep else frozenset()
        if peak_bytes(self.dag, sweep) - budget <= SWEPT * (self.peaks[frozenset()] - budget):
            seeds.append(sweep)
        return [self.fastest(budget), *seeds]

    def chained(self, budget: int, cutoff: Cutoff) -> None:
        """Note a chain's optimal checkpoints."""
        chain = as_chain(self.dag)
        if chain is not None and self.options.chains:
            self.note(checkpoints(self.dag, chain, budget, cutoff) or ())

    def lower_by_eviction(self, cutoff: Cutoff) -> None:
        """Note schedules of ever lower peaks, as low as eviction finds them. Raises TimeoutError where `cutoff`
        strikes.
        """
        low = self.dag.floor_bytes - 1
        best = self.lowest()
        while self.peaks[best] - low > 1:
            # First bisect between the peak that eviction did not reach and the lowest one found, then go down by single
            # bytes.
            for budget in ((low + self.peaks[best]) // 2, self.peaks[best] - 1):
                self.chained(budget, cutoff)
                reruns = EvictionSearch(self.dag, budget, cutoff).fastest(self.seeds(budget))
                if reruns is not None:
                    best = self.note(reruns)
                    break
                cutoff.check()
                low = max(low, budget)

    def lowest_peak(self, work: float, cutoff: Cutoff) -> Lowest:
        """The lowest peak, as far as `work` units suffice, its schedule noted."""
        lowest = self.proven.lowest(work, cutoff)
        self.note(lowest.reruns or ())
        return lowest
