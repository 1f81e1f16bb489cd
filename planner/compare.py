"""`compare`: plans one profile at several budgets, by several policies, on several devices."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tightfit.planner.comparison import Comparison
from tightfit.planner.plan import planner_of
from tightfit.planner.plan_result import rebudgeted, sealed
from tightfit.planner.problem.optimizers import chosen
from tightfit.planner.protocol import Planner
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import (
    SOLVER,
    TIME_LIMIT,
    SearchProgress,
    checked_budget,
    checked_gap,
    checked_limit,
)
from tightfit.planner.solve.policies import approximate_of, refused_of
from tightfit.profiles.devices.data_sheets import DeviceDescription, find_device
from tightfit.profiles.devices.estimate import retarget
from tightfit.profiles.measuring.cpu_load import our_cores
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.forked_worker import ForkedWorker, can_be_copied
from tightfit.runtime.common.progress import Progress

TOGETHER = 2
"""number of budgets that are planned before a second process is forked: one where keep-all fits, and one at which
columns are priced
"""
SENDING = 0.3
"""seconds within which the next plan arrives, where the second process has more than one ready"""


def compare(
    profile: Profile,
    budgets: Sequence[int],
    policies: Sequence[str] | None = None,
    *,
    devices: Sequence[DeviceDescription | str | None] = (None,),
    time_limit: float = TIME_LIMIT,
    gap: float = 0.0,
    optimizer: str | None = None,
    max_grad_norm: float | None = None,
    progress: Progress | None = None,
    solving: SearchProgress | None = None,
    planned: Callable[[Plan], None] | None = None,
) -> Comparison:
    """Plan every policy at every budget, in bytes, on every device; `time_limit` seconds each, a search
    ends at `gap` as `tightfit.planner.plan.plan`'s. All of them, fixed rules too, are plans of the step with the same
    `optimizer` and `max_grad_norm`, which are as there.

    A device is None, the profile's own, or a description, or the name or file that
    `tightfit.profiles.devices.data_sheets.find_device` finds one by.

    Without `policies`: the solver and every fixed rule that means something for the profile.

    A fixed rule's gap is to the solver's bound at the same budget. A larger budget never gets a slower plan: where the
    search found nothing better, the smaller budget's plan stands. `progress` is called with (what, done, total),
    `solving` as the planner's own, `planned` with each plan as it is made (a smaller budget's may take its place at the
    end). Ctrl-C ends the comparison with the plans made so far; where there are none, KeyboardInterrupt is raised.
    Raises InputError for unknown policies, budgets and time limits that are none, unknown devices, two devices of one
    name, or a profile that cannot change device.
    """
    if not budgets:
        raise InputError("no budgets to compare; name at least one, for example 600MiB")
    if not devices or (policies is not None and not policies):
        raise InputError(f"no {'policies' if devices else 'devices'} to compare; name at least one, or leave them out")
    budgets, time_limit = [checked_budget(budget) for budget in budgets], checked_limit(time_limit)
    gap = checked_gap(gap)
    described = [find_device(device) if isinstance(device, str) else device for device in devices]
    retargeted = [profile if device is None else retarget(profile, device) for device in described]
    profiles = [chosen(device_profile, optimizer, max_grad_norm) for device_profile in retargeted]
    planners = [planner_of(device_profile) for device_profile in profiles]
    policies_known = (SOLVER, *planners[0].policies())
    nameable = (*policies_known, *approximate_of(profiles[0]))
    refused = refused_of(profiles[0])
    for policy in policies or ():
        if policy in refused:
            raise InputError(refused[policy])
        if policy not in nameable:
            raise InputError(f"no policy is called {policy!r}; choose from {', '.join(nameable)}")
    names = [device_profile.device.name for device_profile in profiles]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name} is compared with itself; name each device once")
    ordered, rules = sorted(set(budgets)), list(dict.fromkeys(policies_known if policies is None else policies))
    total = len(names) * len(ordered) * len(rules)
    plans: list[Plan] = []
    stage = "planning"
    for name, planner in zip(names, planners, strict=True):
        if len(names) > 1:
            stage = f"planning for {name}"
        plans_before = len(plans)

        def tell(done: int, plans_before: int = plans_before, stage: str = stage) -> None:
            if progress is not None:
                progress(stage, plans_before + done, total)

        table = _ComparisonTable(
            planner=planner,
            budgets=ordered,
            policies=rules,
            time_limit=time_limit,
            gap=gap,
            tell=tell,
            solving=solving,
            planned=planned,
        )
        try:
            table.fill()
            device_plans = table.monotone()
        except KeyboardInterrupt:
            if not plans and not table.compared:
                raise
            return Comparison(devices=names, budgets=ordered, policies=rules, plans=plans + table.monotone())
        plans += device_plans
    if progress is not None:
        progress(stage, total, total)
    return Comparison(devices=names, budgets=ordered, policies=rules, plans=plans)


@dataclass(frozen=True, kw_only=True)
class _ComparedPlan:
    plan: Plan
    bound_seconds: float
    """lower bound on every plan of the class at the budget, as proven when the solver planned there"""


@dataclass(frozen=True, kw_only=True)
class _ComparisonTable:
    """The plans of one planner, that is, of one device: a cell for each budget and policy."""

    planner: Planner
    budgets: list[int]
    """smallest first"""
    policies: list[str]
    time_limit: float
    gap: float
    tell: Callable[[int], None]
    """called with the number of plans made so far"""
    solving: SearchProgress | None
    planned: Callable[[Plan], None] | None
    compared: dict[tuple[int, str], _ComparedPlan] = field(default_factory=dict)

    def fill(self) -> None:
        """Plan from the largest budget down, so that the columns of large budgets are known at small ones. After the
        first `TOGETHER` budgets a second process, forked from this one, plans the smaller half of the others.
        """
        downwards = self.budgets[::-1]
        self._plan_budgets(downwards[:TOGETHER])
        middle = (len(downwards) + TOGETHER + 1) // 2
        own_budgets, forked_budgets = downwards[TOGETHER:middle], downwards[middle:]
        if not forked_budgets or SOLVER not in self.policies or not can_be_copied():
            self._plan_budgets(downwards[TOGETHER:])
            return
        with ForkedWorker(lambda: itertools.chain.from_iterable(map(self._cells, forked_budgets))) as fork:
            try:
                if our_cores() == 1:
                    # One after the other, so that each has the core while its time runs.
                    self._wait(fork)
                self._plan_budgets(own_budgets, fork)
                self._wait(fork)
            except KeyboardInterrupt:
                # Take what has arrived; nobody waits for what the fork still makes.
                for cell in fork.arrived(SENDING, until=time.monotonic()):
                    self._add(cell)
                raise
        # Plan what the fork could not, so that its error is raised here.
        self._plan_budgets(forked_budgets)

    def _plan_budgets(self, budgets: Sequence[int], fork: ForkedWorker[_ComparedPlan] | None = None) -> None:
        for budget in budgets:
            for cell in self._cells(budget, solving=self.solving, tell=self.tell):
                self._add(cell)
                for forked_cell in fork.arrived() if fork is not None else ():
                    self._add(forked_cell)

    def _wait(self, fork: ForkedWorker[_ComparedPlan]) -> None:
        self.tell(len(self.compared))
        for cell in fork.arrived(patience=None):
            self._add(cell)
            self.tell(len(self.compared))

    def _add(self, cell: _ComparedPlan) -> None:
        self.compared[cell.plan.budget_bytes, cell.plan.policy] = cell
        if self.planned is not None:
            self.planned(cell.plan)

    def _cells(
        self, budget: int, *, solving: SearchProgress | None = None, tell: Callable[[int], None] | None = None
    ) -> Iterator[_ComparedPlan]:
        """The plans at one budget that are not there yet, the solver's first: what it proves is what the gaps of fixed
        rules are to. `tell` comes before each.
        """
        planner, limit = self.planner, self.time_limit
        solver_cell = self.compared.get((budget, SOLVER))
        solver_bound = None if solver_cell is None else solver_cell.bound_seconds
        for policy in sorted(self.policies, key=lambda name: name != SOLVER):
            if (budget, policy) in self.compared:
                continue
            if tell is not None:
                tell(len(self.compared))
            if policy == SOLVER:
                plan = planner.plan(budget, time_limit=limit, gap=self.gap, progress=solving)
                bound = solver_bound = planner.class_bound(plan)
            else:
                plan = planner.plan(budget, policy=policy, time_limit=limit)
                if solver_bound is not None and plan.fits and plan.exact:
                    plan = rebudgeted(plan, bound_seconds=solver_bound)
                bound = plan.bound_seconds
            yield _ComparedPlan(plan=plan, bound_seconds=bound)
            if planner.interrupted:
                raise KeyboardInterrupt

    def monotone(self) -> list[Plan]:
        """The plans in order, made consistent across the budgets of each policy: none is slower than one at a smaller
        budget. Where none was found that fits, a larger budget's plan that does fit takes its place; where none does,
        the smallest budget stated is the smallest that any of the policy's plans knows of.
        """
        plans = {cell: compared.plan for cell, compared in self.compared.items()}
        for policy in self.policies:
            by_budget = {budget: plan for (budget, name), plan in plans.items() if name == policy}
            budgets = [budget for budget in self.budgets if budget in by_budget]
            _fitting(by_budget, budgets)
            self._none_slower(by_budget, budgets, policy)
            _one_smallest(by_budget, budgets)
            plans |= {(budget, policy): plan for budget, plan in by_budget.items()}
        return [plans[cell] for cell in itertools.product(self.budgets, self.policies) if cell in plans]

    def _none_slower(self, by_budget: dict[int, Plan], budgets: Sequence[int], policy: str) -> None:
        """Replace a plan by that of a smaller budget where the latter is faster."""
        best: Plan | None = None
        for budget in budgets:
            plan = by_budget[budget]
            if not plan.fits:
                continue
            if best is not None and best.step_seconds < plan.step_seconds:
                plan = by_budget[budget] = rebudgeted(
                    best,
                    budget_bytes=budget,
                    bound_seconds=self.compared[budget, policy].bound_seconds,
                    any_bound=plan.any_schedule_bound_seconds,
                )
            best = plan


def _fitting(by_budget: dict[int, Plan], budgets: Sequence[int]) -> None:
    """Where a policy's search found no plan, take the fastest of its plans at other budgets that fits."""
    feasible_plans = [plan for plan in by_budget.values() if plan.fits]
    for budget in budgets:
        current = by_budget[budget]
        fitting = [plan for plan in feasible_plans if plan.peak_bytes <= budget]
        if not current.fits and fitting:
            fastest = min(fitting, key=lambda plan: plan.step_seconds)
            # A lower bound at a larger budget is one at this budget too.
            any_bound = max(current.any_schedule_bound_seconds, fastest.any_schedule_bound_seconds)
            by_budget[budget] = rebudgeted(fastest, budget_bytes=budget, any_bound=any_bound)


def _one_smallest(by_budget: dict[int, Plan], budgets: Sequence[int]) -> None:
    """State the same smallest budget in all plans of a policy without a schedule: the smallest that any of
    its plans knows of.
    """
    lowest = min(by_budget.values(), key=_enough, default=None)
    for budget in budgets:
        plan = by_budget[budget]
        if lowest is not None and not plan.fits and budget < _enough(lowest) < _enough(plan):
            # The reason in this plan was about another smallest plan.
            update = {
                "minimum_budget_bytes": _enough(lowest),
                "minimum_budget_reason": None,
                "deterministic": False if lowest.deterministic is False else plan.deterministic,
            }
            by_budget[budget] = sealed(plan.model_copy(update=update))


def _enough(plan: Plan) -> int:
    """A budget in bytes that is known to be large enough for the policy, from this plan."""
    if plan.fits:
        return plan.peak_bytes
    return sys.maxsize if plan.minimum_budget_bytes is None else plan.minimum_budget_bytes
