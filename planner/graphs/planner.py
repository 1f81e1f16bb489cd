"""`GraphPlanner`, which plans a bare graph at any number of budgets, as `tightfit.planner.plan.Planner` does for
models.
"""

from __future__ import annotations

import time
from dataclasses import replace

from tightfit.planner.graphs.bounds.bound import Bound, any_schedule_bound, class_bound
from tightfit.planner.graphs.budget_search import GraphBudgetSearch
from tightfit.planner.graphs.incumbents import EXACT_SECONDS, Incumbents
from tightfit.planner.graphs.move_search import MoveSearch, with_everything_moved
from tightfit.planner.graphs.plan_result import GraphOutcome, LowestPeak, Report, finished, infeasible
from tightfit.planner.graphs.problem.actions import carry
from tightfit.planner.graphs.problem.dag import dag_of
from tightfit.planner.graphs.problem.limit import Allowance
from tightfit.planner.graphs.problem.schedule import seconds
from tightfit.planner.graphs.search import exact
from tightfit.planner.graphs.search.baselines import rule_reruns, rules_for
from tightfit.planner.graphs.smallest_budget import SmallestBudget
from tightfit.planner.plan_result import EXACT, gap_to
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import (
    ALL,
    ANY_SHARE,
    NEIGHBOUR_BYTES,
    TIME_LIMIT,
    Progress,
    SearchOptions,
    checked_budget,
    checked_gap,
    checked_limit,
    finish_seconds,
)
from tightfit.profiles.schema import Profile

PRICED_OPERATORS = 32
"""number of operators up to which `GraphPlanner.bound`, from which the value of memory is computed, is exact: nearly
all such graphs are solved within a second or two
"""
NEIGHBOUR_SHARE = 10


class GraphPlanner:
    """Plans one bare graph at any number of budgets; later searches start from the schedules of earlier ones."""

    def __init__(self, profile: Profile, options: SearchOptions = ALL) -> None:
        self.profile = profile
        self.options = options
        self.dag = dag_of(profile)
        self.floor_bytes = self.dag.floor_bytes
        self.found = Incumbents(self.dag, options)
        """schedules found so far, from which searches at other budgets start"""
        self.interrupted = False
        """whether Ctrl-C ended the search of the latest `plan`, whose plan is then the best found until then"""
        self._smallest = SmallestBudget(self.found)
        self._any_bounds: dict[int, tuple[Bound, float]] = {}
        """budget -> (bound, seconds that its computation was given)"""

    @property
    def lowest_bytes(self) -> int:
        """Proven lower bound, in bytes, on the peak of every schedule of the class."""
        return self.found.lowest_bytes

    def policies(self) -> tuple[str, ...]:
        """The fixed rules that mean something for this graph."""
        return rules_for(self.dag)

    @staticmethod
    def class_bound(solved: Plan) -> float:
        """The lower bound, in seconds, proven for this plan's class of schedules."""
        return solved.bound_seconds

    @staticmethod
    def neighbour_bytes(budget_bytes: int) -> int:
        """Distance in bytes to the neighbouring budget that is planned to value memory: as for models, or a tenth of
        the budget where that is less, since graphs may hold bytes or GiB.
        """
        return min(NEIGHBOUR_BYTES, max(1, budget_bytes // NEIGHBOUR_SHARE))

    def plan(
        self,
        budget_bytes: int,
        *,
        policy: str | None = None,
        time_limit: float = TIME_LIMIT,
        gap: float = 0.0,
        progress: Progress | None = None,
    ) -> Plan:
        """As `tightfit.planner.plan.plan`; `budget_bytes` limits the live bytes, fixed ones included, and `time_limit`
        is in seconds.

        Two things are done whatever the time limit: the schedule is written down and replayed, in about 0.1 ms per run,
        and a graph small enough for the exact solver gets `EXACT_SECONDS` for it. Raises InputError for impossible
        arguments, and KeyboardInterrupt only where no schedule that fits was found yet.
        """
        budget_bytes, time_limit, gap = checked_budget(budget_bytes), checked_limit(time_limit), checked_gap(gap)
        started = time.monotonic()
        self.found.exact_seconds = Allowance(EXACT_SECONDS)
        deadline = started + self._searching(time_limit)
        name = policy or "solver"
        self.interrupted = False
        if name == "solver":
            report = _report(progress, started)
            outcome, any_bound = self._searched(budget_bytes, max(EXACT, gap), time_limit, started, deadline, report)
        else:
            outcome, any_bound = self._by_rule(budget_bytes, name, time_limit)
        if outcome.carried is None:
            least = self._least(name, deadline, time_limit)
            if least.carried.peak_bytes > budget_bytes:
                return infeasible(
                    self.profile,
                    self.dag,
                    budget_bytes,
                    name,
                    least,
                    any_bound,
                    started,
                    floor=self.floor_bytes,
                    timely=outcome.timely,
                )
            outcome = replace(outcome, carried=least.carried, timely=outcome.timely and least.timely)
        return finished(
            self.profile,
            self.dag,
            budget_bytes,
            name,
            outcome,
            any_bound,
            started,
            asked=gap,
            interrupted=self.interrupted,
        )

    def bound(self, budget_bytes: int, *, time_limit: float = TIME_LIMIT) -> float | None:
        """A lower bound on the seconds of every schedule of the class within `budget_bytes`; None: none fits.

        It is exact for up to `PRICED_OPERATORS` operators without a disk, where the solver finishes. Otherwise it comes
        from linear programs: weaker than a plan's own bound, but of the same kind at every budget, so that budgets can
        be compared. `time_limit` is in seconds.
        """
        time_limit = checked_limit(time_limit)
        if self.floor_bytes > budget_bytes:
            return None
        deadline = time.monotonic() + time_limit
        if self.dag.read is None and self.dag.operators <= PRICED_OPERATORS:
            solved = exact.fastest(self.dag, budget_bytes, seconds=0.5 * time_limit)
            if solved.proven:
                return None if solved.reruns is None else min(seconds(self.dag, solved.reruns), solved.bound)
        known = self.found.fastest(budget_bytes)
        found = class_bound(self.dag, budget_bytes, known, deadline=deadline, options=self.options)
        return None if found.seconds == float("inf") else found.seconds

    def smallest_plan(self, *, policy: str | None = None, time_limit: float = TIME_LIMIT) -> Plan:
        """The plan at the smallest budget found, with its bounds."""
        time_limit = checked_limit(time_limit)
        started = time.monotonic()
        self.found.exact_seconds = Allowance(EXACT_SECONDS)
        deadline = started + (1 - ANY_SHARE) * self._searching(time_limit)
        least = self._least(policy or "solver", deadline, time_limit)
        budget = least.carried.peak_bytes
        any_bound = self._any_bound(budget, ANY_SHARE * time_limit)
        outcome = GraphOutcome(carried=least.carried, bound_seconds=any_bound.seconds, timely=least.timely)
        return finished(self.profile, self.dag, budget, policy or "solver", outcome, any_bound, started)

    def minimum_bytes(self, *, policy: str | None = None, time_limit: float = TIME_LIMIT) -> int:
        """The smallest budget, in bytes, for which `plan` finds a plan."""
        time_limit = checked_limit(time_limit)
        self.found.exact_seconds = Allowance(EXACT_SECONDS)
        return self._least(policy or "solver", time.monotonic() + time_limit, time_limit).carried.peak_bytes

    def any_bound(self, budget: int, *, seconds: float) -> float:
        """A lower bound on the seconds of any schedule at all within `budget` bytes, computed within `seconds`;
        infinity: none fits.
        """
        return self._any_bound(budget, seconds).seconds

    def _any_bound(self, budget: int, seconds: float) -> Bound:
        if self.found.peaks[frozenset()] <= budget:
            return Bound(seconds=self.dag.once_seconds)
        if self.floor_bytes > budget:
            return Bound(seconds=float("inf"))
        known, given = self._any_bounds.get(budget, (None, 0.0))
        if known is None or (not known.timely and seconds > given):
            bound = any_schedule_bound(self.dag, budget, seconds=seconds)
            if known is not None and not bound.timely:
                bound = replace(bound, seconds=max(known.seconds, bound.seconds))
            known = bound
            self._any_bounds[budget] = bound, seconds
        return known

    def _searching(self, time_limit: float) -> float:
        """Seconds of the time limit that a search may take; the rest is for writing the answer down."""
        return max(0.5 * time_limit, time_limit - finish_seconds(len(self.dag), time_limit))

    def _by_rule(self, budget: int, policy: str, time_limit: float) -> tuple[GraphOutcome, Bound]:
        """The schedule of a fixed rule where it fits, and the bound for any schedule."""
        carried = carry(self.dag, rule_reruns(self.dag, policy))
        fits = carried.peak_bytes <= budget
        any_bound = Bound(seconds=self.dag.once_seconds, timely=False)
        try:
            any_bound = self._any_bound(budget, ANY_SHARE * time_limit)
        except KeyboardInterrupt:
            if not fits:
                raise
            self.interrupted = True
        return GraphOutcome(carried=carried if fits else None, bound_seconds=any_bound.seconds), any_bound

    def _searched(
        self, budget: int, gap: float, time_limit: float, started: float, deadline: float, report: Report
    ) -> tuple[GraphOutcome, Bound]:
        """What the search finds, or what is known where it is interrupted or cut; and the bound for any schedule."""
        found = self.found
        found.begin(budget, time_limit)
        any_bound = Bound(seconds=self.dag.once_seconds, timely=False)
        try:
            any_bound = self._any_bound(budget, ANY_SHARE * time_limit)
            outcome = self._solve(budget, gap, started, deadline, report)
        except KeyboardInterrupt:
            found.ended(False)
            best = found.best(budget)
            if best is None:
                found.end(budget, time_limit, timely=False)
                raise
            self.interrupted = True
            outcome = GraphOutcome(carried=best, bound_seconds=any_bound.seconds, timely=False)
        outcome = found.no_slower(budget, outcome)
        found.end(budget, time_limit, timely=outcome.timely)
        if not outcome.timely:
            # A search that a time limit cut may be worse than what was known before it: the fixed rules, and schedules
            # of other budgets.
            known = found.best(budget)
            if known is not None and (outcome.carried is None or known.seconds < outcome.carried.seconds):
                outcome = replace(outcome, carried=known)
        return outcome, any_bound

    def _solve(self, budget: int, gap: float, started: float, deadline: float, report: Report) -> GraphOutcome:
        """Search at one budget until `gap` is reached, or until it is proven that nothing fits."""
        dag, found = self.dag, self.found
        if found.peaks[frozenset()] <= budget:
            return GraphOutcome(carried=carry(dag, ()), bound_seconds=dag.once_seconds)
        if found.lowest_bytes > budget:
            return GraphOutcome(carried=None, bound_seconds=dag.once_seconds)
        if dag.read is not None:
            return MoveSearch(found, budget, gap=gap, started=started, deadline=deadline, report=report).solve()
        if self.options.exact and dag.operators <= exact.OPERATORS:
            with found.exact_seconds.until(deadline) as allowed:
                solved = exact.fastest(dag, budget, seconds=allowed)
            if solved.proven:
                carried = None if solved.reruns is None else carry(dag, solved.reruns)
                bound = dag.once_seconds if carried is None else min(carried.seconds, solved.bound)
                return GraphOutcome(carried=carried, bound_seconds=bound)
            found.ended(solved.timely)
            found.note(solved.reruns or ())
        return GraphBudgetSearch(found, budget, gap=gap, started=started, deadline=deadline, report=report).solve()

    def _least(self, policy: str, deadline: float, limit: float) -> LowestPeak:
        """The schedule with the lowest peak that `plan` can find."""
        if policy != "solver":
            carried = carry(self.dag, rule_reruns(self.dag, policy))
            return LowestPeak(carried=carried, lowest_bytes=carried.peak_bytes)
        if self.dag.read is not None:
            everything = with_everything_moved(self.dag, self.floor_bytes)
            return LowestPeak(carried=everything, lowest_bytes=self.floor_bytes)
        return self._smallest.least(deadline, limit)


def _report(progress: Progress | None, started: float) -> Report:
    """What hands the state of a search to `progress`; `started` is on the monotonic clock."""

    def report(stage: str, incumbent: float, bound: float) -> None:
        if progress is not None:
            left, spent = gap_to(incumbent, bound), time.monotonic() - started
            progress({"stage": stage, "incumbent": incumbent, "bound": bound, "gap": left, "seconds": spent})

    return report
