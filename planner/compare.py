"""Plans over budgets, policies and devices, as one comparison."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from planner.graphs.planner import GraphPlanner
from planner.master import Progress
from planner.plan import Planner, planner_of, rebudgeted
from planner.policies import APPROXIMATE
from planner.schema import Plan
from profiles.devices import DeviceDescription
from profiles.errors import InputError
from profiles.estimate import retarget
from profiles.schema import Profile

SOLVER = "solver"
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
    devices: Sequence[DeviceDescription | None] = (None,),
    time_limit: float = 30.0,
    progress: Stage | None = None,
    solving: Progress | None = None,
    planned: Callable[[Plan], None] | None = None,
) -> Comparison:
    """Plan every policy at every budget on every device (None: the profile's own); `time_limit` seconds each.

    Without `policies`: the solver and every fixed rule that means something for the profile.

    A fixed rule's gap is to the solver's bound at the same budget. A larger budget never gets a slower plan: where the
    search found nothing better, the smaller budget's plan stands. `progress` is called with (what, done, total), `solving`
    as the planner's own, `planned` with each plan as it is made (a smaller budget's may take its place at the end).
    KeyboardInterrupt ends the comparison with the plans made so far, or passes where there are none.
    Raises InputError for unknown policies, no budget, two devices of one name, or a profile that cannot change device.
    """
    if not budgets:
        raise InputError("no budgets to compare; name at least one, for example 600MiB")
    profiles = [profile if device is None else retarget(profile, device) for device in devices]
    planners = [planner_of(one) for one in profiles]
    known = (SOLVER, *planners[0].policies())
    nameable = known if profile.model.kind == "graph" else (*known, *APPROXIMATE)
    for policy in policies or ():
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
        found: dict[tuple[int, str], Plan] = {}
        before = len(plans)

        def tell(found: dict[tuple[int, str], Plan] = found, before: int = before, what: str = what) -> None:
            if progress is not None:
                progress(what, before + len(found), total)

        try:
            _fill(found, planner, ordered, rules, time_limit, tell, solving, planned)
        except KeyboardInterrupt:
            if not plans and not found:
                raise
            return Comparison(
                devices=names,
                budgets=ordered,
                policies=rules,
                plans=[*plans, *_monotone(found, planner, ordered, rules)],
            )
        plans += _monotone(found, planner, ordered, rules)
    if progress is not None:
        progress(what, total, total)
    return Comparison(devices=names, budgets=ordered, policies=rules, plans=plans)


def _fill(
    found: dict[tuple[int, str], Plan],
    planner: Planner | GraphPlanner,
    budgets: list[int],
    policies: list[str],
    time_limit: float,
    tell: Callable[[], None],
    solving: Progress | None,
    planned: Callable[[Plan], None] | None,
) -> None:
    """From the largest budget down, so that columns of roomy plans are there for tight ones."""
    for budget in reversed(budgets):
        for policy in sorted(policies, key=lambda name: name != SOLVER):
            tell()
            if policy == SOLVER:
                made = planner.plan(budget, time_limit=time_limit, progress=solving)
            else:
                made = planner.plan(budget, policy=policy, time_limit=time_limit)
            solved = found.get((budget, SOLVER))
            if policy != SOLVER and solved is not None and made.status != "infeasible" and made.exact:
                made = rebudgeted(made, bound_seconds=_class_bound(planner, solved))
            found[budget, policy] = made
            if planned is not None:
                planned(made)


def _class_bound(planner: Planner | GraphPlanner, solved: Plan) -> float:
    """Seconds that no plan of the class undercuts at the budget of the solver's plan."""
    return planner.class_bound(solved) if isinstance(planner, Planner) else solved.bound_seconds


def _monotone(
    found: dict[tuple[int, str], Plan], planner: Planner | GraphPlanner, budgets: list[int], policies: list[str]
) -> list[Plan]:
    """The plans in order, none slower than one of the same policy at a smaller budget."""
    for policy in policies:
        best: Plan | None = None
        for budget in budgets:
            here = found.get((budget, policy))
            if here is None or here.status == "infeasible":
                continue
            if best is not None and best.step_seconds < here.step_seconds:
                here = found[budget, policy] = rebudgeted(
                    best,
                    budget_bytes=budget,
                    bound_seconds=_class_bound(planner, here) if policy == SOLVER else here.bound_seconds,
                    any_bound=here.any_schedule_bound_seconds,
                )
            best = here
    return [found[cell] for cell in itertools.product(budgets, policies) if cell in found]
