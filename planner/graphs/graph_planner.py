"""`GraphPlanner`, which plans a bare graph at any number of budgets, as `tightfit.planner.plan.Planner` does for
models.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace

from tightfit.planner.cutoff import Clock, Cutoff
from tightfit.planner.graphs.bounds.bound import AnyBound, ClassBound
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
PRICED_WORK = 10.0
"""units of work of its integer programs"""
NEIGHBOUR_SHARE = 10


@dataclass(frozen=True, kw_only=True)
class Known:
    """A schedule that an earlier call found."""

    carried: Carried
    deterministic: bool
    """whether no time limit cut any search that it depends on"""


class GraphPlanner:
    """Plans one bare graph at any number of budgets. Each call searches by itself; where an earlier one found a faster
    schedule that fits, that is the plan.
    """

    def __init__(self, profile: Profile, options: SearchOptions = ALL, now: Clock = time.monotonic) -> None:
        """`now`: the clock by which time limits are kept."""
        self.profile, self.options, self.now = profile, options, now
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
        self._any_bounds: dict[int, AnyBound] = {}
        """by budget"""

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
        budget, time_limit, gap = checked_budget(budget_bytes), checked_limit(time_limit), checked_gap(gap)
        cutoff = Cutoff(time_limit, self.now)
        found, any_bound = Incumbents(self.dag, self._proven, self.options), self._any_bound(budget)
        name = policy or "solver"
        self.interrupted = False
        if name == "solver":
            outcome = self._searched(found, budget, any_bound, max(EXACT, gap), cutoff, _report(progress, cutoff))
        else:
            outcome = self._by_rule(budget, any_bound, name, cutoff)
        if outcome.carried is None:
            least = self._lowest(name, found, cutoff, time_limit)
            if least.carried.peak_bytes > budget:
                certain = outcome.deterministic
                return infeasible(self.profile, self.dag, budget, name, least, any_bound, cutoff, deterministic=certain)
            certain = outcome.deterministic and least.deterministic
            outcome = replace(outcome, carried=least.carried, deterministic=certain)
        return finished(
            self.profile,
            self.dag,
            budget,
            name,
            outcome,
            any_bound,
            cutoff,
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
        if self.keep_all_bytes <= budget_bytes:
            return self.dag.once_seconds
        cutoff = Cutoff(time_limit, self.now)
        rule = Incumbents(self.dag, self._proven, self.options).fastest(budget_bytes)
        bound = ClassBound(self.dag, budget_bytes, rule)
        with contextlib.suppress(TimeoutError):
            bound.linear(float("inf"), float("inf"), cutoff)
            if self.dag.read is None and self.dag.operators <= PRICED_OPERATORS:
                bound.whole(PRICED_WORK, float("inf"), rule, cutoff)
        return None if bound.seconds == float("inf") else bound.seconds

    def smallest_plan(self, *, policy: str | None = None, time_limit: float = TIME_LIMIT) -> Plan:
        """The plan at the smallest budget found, with its bounds."""
        cutoff = Cutoff(checked_limit(time_limit), self.now)
        found = Incumbents(self.dag, self._proven, self.options)
        least = self._lowest(policy or "solver", found, cutoff, time_limit)
        budget = least.carried.peak_bytes
        any_bound = self._any_bound(budget)
        ended = self._raised(any_bound, cutoff) and least.deterministic
        outcome = GraphOutcome(carried=least.carried, bound_seconds=any_bound.seconds, deterministic=ended)
        return finished(self.profile, self.dag, budget, policy or "solver", outcome, any_bound, cutoff)

    def minimum_bytes(self, *, policy: str | None = None, time_limit: float = TIME_LIMIT) -> int:
        """The smallest budget, in bytes, for which `plan` finds a plan."""
        cutoff = Cutoff(checked_limit(time_limit), self.now)
        found = Incumbents(self.dag, self._proven, self.options)
        return self._lowest(policy or "solver", found, cutoff, time_limit).carried.peak_bytes

    def any_bound(self, budget: int, *, seconds: float) -> float:
        """A lower bound on the seconds of any schedule at all within `budget` bytes, computed within `seconds`;
        infinity: none fits.
        """
        bound = self._any_bound(budget)
        self._raised(bound, Cutoff(seconds, self.now))
        return bound.seconds

    def _any_bound(self, budget: int) -> AnyBound:
        """The bound for any schedule, as far as it has been raised."""
        if budget not in self._any_bounds:
            self._any_bounds[budget] = AnyBound(self.dag, budget)
        return self._any_bounds[budget]

    @staticmethod
    def _raised(bound: AnyBound, cutoff: Cutoff) -> bool:
        """Raise the bound to its end; whether it got there."""
        with contextlib.suppress(TimeoutError):
            while not bound.ended:
                bound.rise(cutoff)
        return bound.ended

    def _by_rule(self, budget: int, any_bound: AnyBound, policy: str, cutoff: Cutoff) -> GraphOutcome:
        """The schedule of a fixed rule where it fits, with the bound for any schedule."""
        carried = carry(self.dag, rule_reruns(self.dag, policy))
        fits, ended = carried.peak_bytes <= budget, False
        try:
            ended = self._raised(any_bound, cutoff)
        except KeyboardInterrupt:
            if not fits:
                raise
            self.interrupted = True
        return GraphOutcome(carried=carried if fits else None, bound_seconds=any_bound.seconds, deterministic=ended)

    def _searched(
        self, found: Incumbents, budget: int, any_bound: AnyBound, gap: float, cutoff: Cutoff, report: Report
    ) -> GraphOutcome:
        """The fastest schedule that fits, of this search, also where Ctrl-C ends it, and of those before it."""
        try:
            outcome = self._solve(found, budget, any_bound, gap, cutoff, report)
        except KeyboardInterrupt:
            self.interrupted = True
            outcome = GraphOutcome(carried=found.best(budget), bound_seconds=any_bound.seconds, deterministic=False)
        if outcome.carried is not None:
            self._known.append(Known(carried=outcome.carried, deterministic=outcome.deterministic))
        fitting = [known for known in self._known if known.carried.peak_bytes <= budget]
        best = min(fitting, key=lambda known: known.carried.seconds, default=None)
        if best is not None and (outcome.carried is None or best.carried.seconds < outcome.carried.seconds):
            certain = outcome.deterministic and best.deterministic
            outcome = replace(outcome, carried=best.carried, deterministic=certain)
        if self.interrupted and best is None:
            raise KeyboardInterrupt
        return outcome

    def _solve(
        self, found: Incumbents, budget: int, any_bound: AnyBound, gap: float, cutoff: Cutoff, report: Report
    ) -> GraphOutcome:
        """Search at one budget until `gap` is reached, or until it is proven that nothing fits."""
        dag, once = self.dag, self.dag.once_seconds
        if self.keep_all_bytes <= budget:
            return GraphOutcome(carried=carry(dag, ()), bound_seconds=once)
        if self.lowest_bytes > budget:
            return GraphOutcome(carried=None, bound_seconds=once, deterministic=self._raised(any_bound, cutoff))
        search = GraphBudgetSearch if dag.read is None else MoveSearch
        return search(found, budget, any_bound, gap=gap, cutoff=cutoff, report=report).solve()

    def _lowest(self, policy: str, found: Incumbents, cutoff: Cutoff, limit: float) -> LowestPeak:
        """The schedule with the lowest peak that `plan` can find. A search that the time limit cut is repeated under a
        larger `limit`, in seconds.
        """
        if policy != "solver":
            carried = carry(self.dag, rule_reruns(self.dag, policy))
            return LowestPeak(carried=carried, lowest_bytes=carried.peak_bytes)
        if self.dag.read is not None:
            everything = with_everything_moved(self.dag, self.floor_bytes)
            return LowestPeak(carried=everything, lowest_bytes=self.floor_bytes)
        if self._least is None or not (self._least[0].deterministic or limit <= self._least[1]):
            least = lowest_schedule(found, cutoff)
            self._known.append(Known(carried=least.carried, deterministic=least.deterministic))
            self._least = least, limit
        least, limit = self._least
        lower = min(self._known, key=lambda known: known.carried.peak_bytes)
        if lower.carried.peak_bytes < least.carried.peak_bytes:
            certain = least.deterministic and lower.deterministic
            least = replace(least, carried=lower.carried, deterministic=certain)
        self._least = replace(least, lowest_bytes=self.lowest_bytes), limit
        return self._least[0]


def _report(progress: SearchProgress | None, cutoff: Cutoff) -> Report:
    """What hands the state of a search to `progress`."""

    def report(stage: str, incumbent: float, bound: float) -> None:
        if progress is not None:
            left = gap_to(incumbent, bound) if incumbent < float("inf") else 1.0
            progress({"stage": stage, "incumbent": incumbent, "bound": bound, "gap": left, "seconds": cutoff.elapsed})

    return report
