"""`GraphPlanner`, which plans a bare graph at any number of budgets, as `tightfit.planner.plan.Planner` does for
models.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from tightfit.planner.graphs.bounds.bound import Bound, ClassBound, any_schedule_bound
from tightfit.planner.graphs.graph_budget_search import GraphBudgetSearch
from tightfit.planner.graphs.incumbents import Incumbents, ProvenPeaks
from tightfit.planner.graphs.move_search import MoveSearch, with_everything_moved
from tightfit.planner.graphs.plan_result import GraphOutcome, LowestPeak, Report, finished, infeasible
from tightfit.planner.graphs.problem.actions import Carried, carry
from tightfit.planner.graphs.problem.dag import dag_of
from tightfit.planner.graphs.problem.schedule import peak_bytes
from tightfit.planner.graphs.search.baselines import rule_reruns, rules_for
from tightfit.planner.graphs.smallest_budget import lowest_schedule
from tightfit.planner.plan_result import EXACT, gap_to, until_known
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import (
    ALL,
    NEIGHBOUR_BYTES,
    TIME_LIMIT,
    SearchOptions,
    SearchProgress,
    checked_budget,
    checked_gap,
    checked_limit,
)
from tightfit.profiles.schema import Profile

PRICED_OPERATORS = 32
"""number of operators up to which `GraphPlanner.bound`, from which the value of memory is computed, is exact: nearly
all such graphs are solved within a second or two
"""
NEIGHBOUR_SHARE = 10
ANY_SHARE = 0.1
"""share of the time limit for the bound that holds for any schedule"""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A schedule that an earlier call found."""

    carried: Carried
    timely: bool
    """whether no time limit ended any search that it depends on"""


class GraphPlanner:
    """Plans one bare graph at any number of budgets. Each call searches by itself; where an earlier one found a faster
    schedule that fits, that is the plan.
    """

    def __init__(self, profile: Profile, options: SearchOptions = ALL) -> None:
        self.profile = profile
        self.options = options
        self.dag = dag_of(profile)
        self.floor_bytes = self.dag.floor_bytes
        self.keep_all_bytes = peak_bytes(self.dag, ())
        """peak of the schedule that keeps everything"""
        self.interrupted = False
        """whether Ctrl-C ended the search of the latest `plan`, whose plan is then the best found until then"""
        self._proven = ProvenPeaks(self.dag)
        self._known: list[Known] = []
        self._least: tuple[LowestPeak, float] | None = None
        """the schedule of lowest peak, and the time limit that it was searched for under"""
        self._any_bounds: dict[int, tuple[Bound, float]] = {}
        """budget -> (bound, seconds that its computation was given)"""

    @property
    def lowest_bytes(self) -> int:
        """Proven lower bound, in bytes, on the peak of every schedule of the class."""
        return self._proven.lowest_bytes

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
        time_limit: float | None = TIME_LIMIT,
        gap: float = 0.0,
        progress: SearchProgress | None = None,
    ) -> Plan:
        """As `tightfit.planner.plan.plan`; `budget_bytes` limits the live bytes, fixed ones included, and `time_limit`
        is in seconds.

        Whatever the time limit, the schedule is written down and replayed, in about 0.1 ms per run. Raises InputError
        for impossible arguments, and KeyboardInterrupt only where no schedule that fits was found yet.
        """
        if time_limit is None:
            return until_known(
                lambda limit: self.plan(budget_bytes, policy=policy, time_limit=limit, gap=gap, progress=progress),
                progress,
            )
        budget_bytes, time_limit, gap = checked_budget(budget_bytes), checked_limit(time_limit), checked_gap(gap)
        started = time.monotonic()
        deadline = started + time_limit
        found = Incumbents(self.dag, self._proven, self.options)
        name = policy or "solver"
        self.interrupted = False
        if name == "solver":
            report = _report(progress, started)
            outcome, any_bound = self._searched(found, budget_bytes, max(EXACT, gap), time_limit, deadline, report)
        else:
            outcome, any_bound = self._by_rule(budget_bytes, name, time_limit)
        if outcome.carried is None:
            least = self._lowest(name, found, deadline, time_limit)
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
        if self.keep_all_bytes <= budget_bytes:
            return self.dag.once_seconds
        rule = Incumbents(self.dag, self._proven, self.options).fastest(budget_bytes)
        bound = ClassBound(self.dag, budget_bytes, rule)
        bound.linear(deadline, float("inf"))
        if self.dag.read is None and self.dag.operators <= PRICED_OPERATORS:
            bound.whole(deadline, float("inf"), rule)
        return None if bound.seconds == float("inf") else bound.seconds

    def smallest_plan(self, *, policy: str | None = None, time_limit: float = TIME_LIMIT) -> Plan:
        """The plan at the smallest budget found, with its bounds."""
        time_limit = checked_limit(time_limit)
        started = time.monotonic()
        deadline = started + (1 - ANY_SHARE) * time_limit
        found = Incumbents(self.dag, self._proven, self.options)
        least = self._lowest(policy or "solver", found, deadline, time_limit)
        budget = least.carried.peak_bytes
        any_bound = self._any_bound(budget, ANY_SHARE * time_limit)
        outcome = GraphOutcome(carried=least.carried, bound_seconds=any_bound.seconds, timely=least.timely)
        return finished(self.profile, self.dag, budget, policy or "solver", outcome, any_bound, started)

    def minimum_bytes(self, *, policy: str | None = None, time_limit: float = TIME_LIMIT) -> int:
        """The smallest budget, in bytes, for which `plan` finds a plan."""
        time_limit = checked_limit(time_limit)
        found = Incumbents(self.dag, self._proven, self.options)
        return self._lowest(policy or "solver", found, time.monotonic() + time_limit, time_limit).carried.peak_bytes

    def any_bound(self, budget: int, *, seconds: float) -> float:
        """A lower bound on the seconds of any schedule at all within `budget` bytes, computed within `seconds`;
        infinity: none fits.
        """
        return self._any_bound(budget, seconds).seconds

    def _any_bound(self, budget: int, seconds: float) -> Bound:
        if self.keep_all_bytes <= budget:
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
        self, found: Incumbents, budget: int, gap: float, time_limit: float, deadline: float, report: Report
    ) -> tuple[GraphOutcome, Bound]:
        """The fastest schedule that fits, of this search, also where Ctrl-C ends it, and of those before it; and the
        bound for any schedule.
        """
        any_bound = Bound(seconds=self.dag.once_seconds, timely=False)
        try:
            any_bound = self._any_bound(budget, ANY_SHARE * time_limit)
            outcome = self._solve(found, budget, gap, time_limit, deadline, report)
        except KeyboardInterrupt:
            self.interrupted = True
            outcome = GraphOutcome(carried=found.best(budget), bound_seconds=any_bound.seconds, timely=False)
        if outcome.carried is not None:
            self._known.append(Known(carried=outcome.carried, timely=outcome.timely))
        fitting = [known for known in self._known if known.carried.peak_bytes <= budget]
        best = min(fitting, key=lambda known: known.carried.seconds, default=None)
        if best is not None and (outcome.carried is None or best.carried.seconds < outcome.carried.seconds):
            outcome = replace(outcome, carried=best.carried, timely=outcome.timely and best.timely)
        if self.interrupted and best is None:
            raise KeyboardInterrupt
        return outcome, any_bound

    def _solve(
        self, found: Incumbents, budget: int, gap: float, time_limit: float, deadline: float, report: Report
    ) -> GraphOutcome:
        """Search at one budget until `gap` is reached, or until it is proven that nothing fits."""
        dag, once = self.dag, self.dag.once_seconds
        if self.keep_all_bytes <= budget:
            return GraphOutcome(carried=carry(dag, ()), bound_seconds=once)
        if self.lowest_bytes > budget:
            return GraphOutcome(carried=None, bound_seconds=once)
        started = deadline - time_limit
        if dag.read is not None:
            return MoveSearch(found, budget, gap=gap, started=started, deadline=deadline, report=report).solve()
        return GraphBudgetSearch(found, budget, gap=gap, started=started, deadline=deadline, report=report).solve()

    def _lowest(self, policy: str, found: Incumbents, deadline: float, limit: float) -> LowestPeak:
        """The schedule with the lowest peak that `plan` can find. A search that the time limit cut is repeated under a
        larger `limit`, in seconds.
        """
        if policy != "solver":
            carried = carry(self.dag, rule_reruns(self.dag, policy))
            return LowestPeak(carried=carried, lowest_bytes=carried.peak_bytes)
        if self.dag.read is not None:
            everything = with_everything_moved(self.dag, self.floor_bytes)
            return LowestPeak(carried=everything, lowest_bytes=self.floor_bytes)
        if self._least is None or not (self._least[0].timely or limit <= self._least[1]):
            least = lowest_schedule(found, deadline)
            self._known.append(Known(carried=least.carried, timely=least.timely))
            self._least = least, limit
        least, limit = self._least
        lower = min(self._known, key=lambda known: known.carried.peak_bytes)
        if lower.carried.peak_bytes < least.carried.peak_bytes:
            least = replace(least, carried=lower.carried, timely=least.timely and lower.timely)
        self._least = replace(least, lowest_bytes=self.lowest_bytes), limit
        return self._least[0]


def _report(progress: SearchProgress | None, started: float) -> Report:
    """What hands the state of a search to `progress`; `started` is on the monotonic clock."""

    def report(stage: str, incumbent: float, bound: float) -> None:
        if progress is not None:
            left, spent = gap_to(incumbent, bound), time.monotonic() - started
            progress({"stage": stage, "incumbent": incumbent, "bound": bound, "gap": left, "seconds": spent})

    return report
