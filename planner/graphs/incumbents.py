"""What is known of one graph: the schedules that its searches have found at any budget, kept so that answers stay
reproducible, and how low a peak can be.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

from tightfit.planner.graphs.plan_result import GraphOutcome
from tightfit.planner.graphs.problem.actions import Carried, carry
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.limit import Allowance
from tightfit.planner.graphs.problem.schedule import Rerun, peak_bytes, pruned, seconds
from tightfit.planner.graphs.search.baselines import RULES, rules_for
from tightfit.planner.graphs.search.belady import belady_schedule
from tightfit.planner.graphs.search.chain_dp import as_chain, checkpoints
from tightfit.planner.graphs.search.large_neighbourhood import lowest_peak
from tightfit.planner.graphs.search.subproblem import Lowest
from tightfit.planner.search_options import ALL, SearchOptions

EXACT_SECONDS = 0.5
"""seconds that all exact solutions may take together by the clock, and a chain's checkpoints by the clock and the
processor, whatever the time limit; most take a fifth of it
"""
SWEPT = 0.5
"""a search starts from a sweep (`belady`) only if that leaves at most this share of keep-all's excess over the budget:
otherwise it helps little and takes time
"""


class Incumbents:
    """The schedules that later searches start from. Each search has an aim (a budget, or None for the smallest) and a
    time limit in seconds.

    A search is cut if the time limit ended it. What it found, and what was found by searches that started from that,
    depends on the machine's speed. Later searches start from it all the same, with one exception: a search for the same
    aim under a larger limit starts from the pool as it was before any search was cut, and takes the cut search's
    schedules only where these are better.
    """

    def __init__(self, dag: Dag, options: SearchOptions = ALL) -> None:
        self.dag = dag
        self.options = options
        self.lowest_bytes = dag.floor_bytes
        """proven lower bound on the peak of every schedule of the class"""
        self.exact_seconds = Allowance(EXACT_SECONDS)
        """for the exact solutions of one call of the planner, which sets it anew"""
        self.peaks: dict[frozenset[Rerun], int] = {}
        """schedules and their peaks in bytes"""
        self.moved: list[Carried] = []
        """schedules with moves to the disk"""
        self.timely = True
        """whether no time limit ended any search that the schedules come from"""
        self.late: tuple[dict[frozenset[Rerun], int], list[Carried]] = {}, []
        """during a search that is repeated under a larger limit: the schedules that it does not start from"""
        self._sure: tuple[dict[frozenset[Rerun], int], list[Carried]] = {}, []
        """the pool as it was before any search was cut"""
        self._cut: dict[int | None, float] = {}
        """aims whose search was cut -> the largest limit at which it was"""
        self._chain = as_chain(dag)
        self._lowest: Lowest | None = None
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
        return self._fastest(budget, self.peaks)

    def best(self, budget: int) -> Carried | None:
        """The fastest schedule found that fits the budget, those in `late` included; None: none does."""
        return self._best(budget, self.late[0] | self.peaks, [*self.late[1], *self.moved])

    def _best(self, budget: int, peaks: Mapping[frozenset[Rerun], int], moved: Iterable[Carried]) -> Carried | None:
        fitting = [carried for carried in moved if carried.peak_bytes <= budget]
        reruns = self._fastest(budget, peaks)
        if peaks.get(reruns, budget + 1) <= budget:
            fitting.append(carry(self.dag, reruns))
        return min(fitting, key=lambda carried: carried.seconds, default=None)

    def _fastest(self, budget: int, peaks: Mapping[frozenset[Rerun], int]) -> frozenset[Rerun]:
        fitting = [reruns for reruns, peak in peaks.items() if peak <= budget]
        return min(fitting, key=lambda reruns: (seconds(self.dag, reruns), sorted(reruns)), default=frozenset())

    # --- where searches start --------------------------------------------------------------------------------------

    def seeds(self, budget: int, deadline: float) -> list[frozenset[Rerun]]:
        """Schedules to start from: the fastest found before that fits, fixed rules, a sweep (`belady`), and a chain's
        optimal checkpoints.
        """
        seeds = [RULES[rule](self.dag) for rule in rules_for(self.dag)]
        sweep = belady_schedule(self.dag, budget) if self.options.sweep else frozenset()
        if peak_bytes(self.dag, sweep) - budget <= SWEPT * (self.peaks[frozenset()] - budget):
            seeds.append(sweep)
        if self._chain is not None and self.options.chains:
            with self.exact_seconds.until(deadline) as allowed:
                # Late only if both clock and processor time are used up, so that a process that was held up gets them
                # all the same.
                ends, granted = time.monotonic() + allowed, time.process_time() + allowed
                try:
                    placed = checkpoints(
                        self.dag,
                        self._chain,
                        budget,
                        late=lambda: time.monotonic() > ends and time.process_time() > granted,
                    )
                except TimeoutError:
                    placed = None
                    self.ended(False)
            if placed is not None:
                self.note(placed)  # so it is the first seed, which is tried however late it is
        return [self.fastest(budget), *seeds]

    def lowest_peak(self, seconds: float) -> Lowest:
        """`large_neighbourhood.lowest_peak`, called again each time until its solver has finished once; the answer is
        remembered.
        """
        if self._lowest is None or not self._lowest.ended:
            self._lowest = lowest_peak(self.dag, seconds)
            self.lowest_bytes = max(self.lowest_bytes, self._lowest.bytes)
        self.ended(self._lowest.ended)
        self.note(self._lowest.reruns or ())
        return self._lowest

    # --- what the clock ended --------------------------------------------------------------------------------------

    def ended(self, *timely: bool) -> None:
        """Record for some searches whether they ended by their own rules and not by a time limit."""
        self.timely = self.timely and all(timely)

    def cut_before(self, aim: int | None, limit: float) -> bool:
        """Whether a search for `aim` was cut before, and always under a limit below `limit`."""
        return limit > self._cut.get(aim, limit)

    def begin(self, aim: int | None, limit: float) -> None:
        """A search for `aim` starts; `end` follows."""
        if self.cut_before(aim, limit):
            self.late = self.peaks, self.moved
            self.peaks, self.moved = dict(self._sure[0]), list(self._sure[1])
            self.timely = True
        elif not self._cut:
            self._sure = dict(self.peaks), list(self.moved)

    def no_slower(self, budget: int, outcome: GraphOutcome) -> GraphOutcome:
        """The outcome of a repeated search, or the schedule in `late` that fits the budget, where that is faster."""
        best = self._best(budget, *self.late)
        if best is None or (outcome.carried is not None and outcome.carried.seconds <= best.seconds):
            return outcome
        self.timely = False
        return replace(outcome, carried=best, timely=False)

    def end(self, aim: int | None, limit: float, *, timely: bool) -> None:
        """A search for `aim` has ended. `timely`: no time limit influenced its schedule. Bounds that a time limit cut
        do not count here.
        """
        if timely or self.timely:
            self._cut.pop(aim, None)
            if self.late[0] and self.timely:
                self._sure = dict(self.peaks), list(self.moved)
        else:
            self._cut[aim] = max(limit, self._cut.get(aim, limit))
        if self._cut:
            self.peaks = self.late[0] | self.peaks
            self.moved = [*self.late[1], *self.moved]
        self.timely = not self._cut
        self.late = {}, []
