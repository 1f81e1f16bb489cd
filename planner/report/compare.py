"""`compare`: plans one profile at several budgets, by several policies, on several devices."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from tightfit.planner.plan import planner_of
from tightfit.planner.plan_result import rebudgeted, sealed
from tightfit.planner.problem.optimizers import chosen
from tightfit.planner.protocol import Planner
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import SOLVER, TIME_LIMIT, Progress, checked_budget, checked_gap, checked_limit
from tightfit.planner.solve.policies import approximate_of, refused_of
from tightfit.profiles.devices.data_sheets import DeviceDescription, find_device
from tightfit.profiles.devices.estimate import retarget
from tightfit.profiles.measuring.cpu_load import our_cores
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.forked_worker import ForkedWorker, can_be_copied

TOGETHER = 2
"""number of budgets that are planned before a second process is forked: one where keep-all fits, and one at which
columns are priced
"""
SENDING = 0.3
"""seconds within which the next plan arrives, where the second process has more than one ready"""
Stage = Callable[[str, int, int], None]


class Comparison(BaseModel):
    """Plans of one profile, by device, then by budget (smallest first), then in the order of the policies asked for.

    A comparison that was interrupted lacks the plans that were not made.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    devices: list[str]
    budgets: list[int]
    policies: list[str]
    plans: list[Plan]

    def plan(self, budget_bytes: int, policy: str, device: str | None = None) -> Plan:
        """The plan of one cell, on the first device unless one is named; raises KeyError where there is none."""
        where = device or self.devices[0]
        for plan in self.plans:
            if (plan.budget_bytes, plan.policy, plan.device.name) == (budget_bytes, policy, where):
                return plan
        raise KeyError((budget_bytes, policy, where))


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
    progress: Stage | None = None,
    solving: Progress | None = None,
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
    end). KeyboardInterrupt ends the comparison with the plans made so far, or passes where there are none. Raises
    InputError for unknown policies, budgets and time limits that are none, unknown devices, two devices of one name, or
    a profile that cannot change device.
    """
    if not budgets:
        raise InputError("no budgets to compare; name at least one, for example 600MiB")
    if not devices or (policies is not None and not policies):
        raise InputError(f"no {'policies' if devices else 'devices'} to compare; name at least one, or leave them out")
    budgets, time_limit = [checked_budget(budget) for budget in budgets], checked_limit(time_limit)
    gap = checked_gap(gap)
    described = [find_device(device) if isinstance(device, str) else device for device in devices]
    here = [profile if device is None else retarget(profile, device) for device in described]
    profiles = [chosen(one, optimizer, max_grad_norm) for one in here]
    planners = [planner_of(one) for one in profiles]
    known = (SOLVER, *planners[0].policies())
    nameable = (*known, *approximate_of(profiles[0]))
    refused = refused_of(profiles[0])
    for policy in policies or ():
        if policy in refused:
            raise InputError(refused[policy])
        if policy not in nameable:
            raise InputError(f"no policy is called {policy!r}; choose from {', '.join(nameable)}")
    names = [one.device.name for one in profiles]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name} is compared with itself; name each device once")
    ordered, rules = sorted(set(budgets)), list(dict.fromkeys(known if policies is None else policies))
    total = len(names) * len(ordered) * len(rules)
    plans: list[Plan] = []
    what = "planning"
    for name, planner in zip(names, planners, strict=True):
        if len(names) > 1:
            what = f"planning for {name}"
        before = len(plans)

        def tell(done: int, before: int = before, what: str = what) -> None:
            if progress is not None:
                progress(what, before + done, total)

        table = _Table(
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
            made = table.monotone()
        except KeyboardInterrupt:
            if not plans and not table.found:
                raise
            return Comparison(devices=names, budgets=ordered, policies=rules, plans=plans + table.monotone())
        plans += made
    if progress is not None:
        progress(what, total, total)
    return Comparison(devices=names, budgets=ordered, policies=rules, plans=plans)


@dataclass(frozen=True, kw_only=True)
class _Cell:
    plan: Plan
    bound_seconds: float
    """lower bound on every plan of the class at the budget, as proven when the solver planned there"""


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The plans of one planner, that is, of one device: a cell for each budget and policy."""

    planner: Planner
    budgets: list[int]
    """smallest first"""
    policies: list[str]
    time_limit: float
    gap: float
    tell: Callable[[int], None]
    """called with the number of plans made so far"""
    solving: Progress | None
    planned: Callable[[Plan], None] | None
    found: dict[tuple[int, str], _Cell] = field(default_factory=dict)

    def fill(self) -> None:
        """Plan from the largest budget down, so that the columns of large budgets are known at small ones. After the
        first `TOGETHER` budgets a second process, forked from this one, plans the smaller half of the others.
        """
        downwards = self.budgets[::-1]
        self._work(downwards[:TOGETHER])
        half = (len(downwards) + TOGETHER + 1) // 2
        here, there = downwards[TOGETHER:half], downwards[half:]
        if not there or SOLVER not in self.policies or not can_be_copied():
            self._work(downwards[TOGETHER:])
            return
        with ForkedWorker(lambda: itertools.chain.from_iterable(map(self._cells, there))) as beside:
            try:
                if our_cores() == 1:
                    # One after the other, so that each has the core while its time runs.
                    self._wait(beside)
                self._work(here, beside)
                self._wait(beside)
            except KeyboardInterrupt:
                # What is made from now on nobody waits for.
                for other in beside.arrived(SENDING, until=time.monotonic()):
                    self._note(other)
                raise
        # What failed there fails here again, and says why.
        self._work(there)

    def _work(self, budgets: Sequence[int], beside: ForkedWorker[_Cell] | None = None) -> None:
        for budget in budgets:
            for cell in self._cells(budget, solving=self.solving, tell=self.tell):
                self._note(cell)
                for other in beside.arrived() if beside is not None else ():
                    self._note(other)

    def _wait(self, beside: ForkedWorker[_Cell]) -> None:
        self.tell(len(self.found))
        for other in beside.arrived(patience=None):
            self._note(other)
            self.tell(len(self.found))

    def _note(self, cell: _Cell) -> None:
        self.found[cell.plan.budget_bytes, cell.plan.policy] = cell
        if self.planned is not None:
            self.planned(cell.plan)

    def _cells(
        self, budget: int, *, solving: Progress | None = None, tell: Callable[[int], None] | None = None
    ) -> Iterator[_Cell]:
        """The plans at one budget that are not there yet, the solver's first: what it proves is what the gaps of fixed
        rules are to. `tell` comes before each.
        """
        planner, limit = self.planner, self.time_limit
        known = self.found.get((budget, SOLVER))
        solved = None if known is None else known.bound_seconds
        for policy in sorted(self.policies, key=lambda name: name != SOLVER):
            if (budget, policy) in self.found:
                continue
            if tell is not None:
                tell(len(self.found))
            if policy == SOLVER:
                made = planner.plan(budget, time_limit=limit, gap=self.gap, progress=solving)
                bound = solved = planner.class_bound(made)
            else:
                made = planner.plan(budget, policy=policy, time_limit=limit)
                if solved is not None and made.status != "infeasible" and made.exact:
                    made = rebudgeted(made, bound_seconds=solved)
                bound = made.bound_seconds
            yield _Cell(plan=made, bound_seconds=bound)
            if planner.interrupted:
                raise KeyboardInterrupt

    def monotone(self) -> list[Plan]:
        """The plans in order, made consistent across the budgets of each policy: none is slower than one at a smaller
        budget. Where none was found that fits, a larger budget's plan that does fit takes its place; where none does,
        the smallest budget stated is the smallest that any of the policy's plans knows of.
        """
        plans = {cell: found.plan for cell, found in self.found.items()}
        for policy in self.policies:
            mine = {budget: plan for (budget, name), plan in plans.items() if name == policy}
            budgets = [budget for budget in self.budgets if budget in mine]
            _fitting(mine, budgets)
            self._none_slower(mine, budgets, policy)
            _one_smallest(mine, budgets)
            plans |= {(budget, policy): plan for budget, plan in mine.items()}
        return [plans[cell] for cell in itertools.product(self.budgets, self.policies) if cell in plans]

    def _none_slower(self, mine: dict[int, Plan], budgets: Sequence[int], policy: str) -> None:
        """Replace a plan by that of a smaller budget where the latter is faster."""
        best: Plan | None = None
        for budget in budgets:
            here = mine[budget]
            if here.status == "infeasible":
                continue
            if best is not None and best.step_seconds < here.step_seconds:
                here = mine[budget] = rebudgeted(
                    best,
                    budget_bytes=budget,
                    bound_seconds=self.found[budget, policy].bound_seconds,
                    any_bound=here.any_schedule_bound_seconds,
                )
            best = here


def _fitting(mine: dict[int, Plan], budgets: Sequence[int]) -> None:
    """Where a policy's search found no plan, take the fastest of its plans at other budgets that fits."""
    made = [plan for plan in mine.values() if plan.status != "infeasible"]
    for budget in budgets:
        here = mine[budget]
        fitting = [plan for plan in made if plan.peak_bytes <= budget]
        if here.status == "infeasible" and fitting:
            fastest = min(fitting, key=lambda plan: plan.step_seconds)
            # A lower bound at a larger budget is one at this budget too.
            any_bound = max(here.any_schedule_bound_seconds, fastest.any_schedule_bound_seconds)
            mine[budget] = rebudgeted(fastest, budget_bytes=budget, any_bound=any_bound)


def _one_smallest(mine: dict[int, Plan], budgets: Sequence[int]) -> None:
    """State the same smallest budget in all infeasible plans of a policy: the smallest that any of
    its plans knows of.
    """
    lowest = min(mine.values(), key=_enough, default=None)
    for budget in budgets:
        here = mine[budget]
        if lowest is not None and here.status == "infeasible" and budget < _enough(lowest) < _enough(here):
            # The reason in this plan was about another smallest plan.
            update = {
                "minimum_budget_bytes": _enough(lowest),
                "minimum_budget_reason": None,
                "deterministic": False if lowest.deterministic is False else here.deterministic,
            }
            mine[budget] = sealed(here.model_copy(update=update))


def _enough(plan: Plan) -> int:
    """A budget in bytes that is known to be large enough for the policy, from this plan."""
    if plan.status != "infeasible":
        return plan.peak_bytes
    return sys.maxsize if plan.minimum_budget_bytes is None else plan.minimum_budget_bytes
