"""Plans over budgets and policies, as one comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from planner.plan import planner_of, rebudgeted
from planner.schema import Plan
from profiles.errors import InputError
from profiles.schema import Profile

SOLVER = "solver"
Stage = Callable[[str, int, int], None]


class Comparison(BaseModel):
    """Plans of one profile, by budget (smallest first), then in the order of the policies asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budgets: list[int]
    policies: list[str]
    plans: list[Plan]

    def plan(self, budget_bytes: int, policy: str) -> Plan:
        """The plan of one cell; raises KeyError where there is none."""
        for plan in self.plans:
            if plan.budget_bytes == budget_bytes and plan.policy == policy:
                return plan
        raise KeyError((budget_bytes, policy))


def compare(
    profile: Profile,
    budgets: Sequence[int],
    policies: Sequence[str] | None = None,
    *,
    time_limit: float = 30.0,
    progress: Stage | None = None,
) -> Comparison:
    """Plan every policy at every budget; `time_limit` seconds each. `progress` is called with (what, done, total).

    Without `policies`: the solver and every fixed rule that means something for the profile.

    A fixed rule's gap is to the solver's bound at the same budget. A larger budget never gets a slower plan: where the
    search found nothing better, the smaller budget's plan stands. Raises InputError for unknown policies or no budget.
    """
    if not budgets:
        raise InputError("no budgets to compare; name at least one, for example 600MiB")
    planner = planner_of(profile)
    known = (SOLVER, *planner.policies())
    names = list(dict.fromkeys(known if policies is None else policies))
    for policy in names:
        if policy not in known:
            raise InputError(f"no policy is called {policy!r}; choose from {', '.join(known)}")
    ordered = sorted(set(budgets))
    total = len(ordered) * len(names)
    found: dict[tuple[int, str], Plan] = {}
    # From the largest budget down, so that columns of roomy plans are there for tight ones.
    for budget in reversed(ordered):
        for policy in sorted(names, key=lambda name: name != SOLVER):
            if progress is not None:
                progress("planning", len(found), total)
            made = planner.plan(budget, policy=None if policy == SOLVER else policy, time_limit=time_limit)
            solved = found.get((budget, SOLVER))
            if policy != SOLVER and solved is not None and made.status != "infeasible":
                made = rebudgeted(made, bound_seconds=solved.bound_seconds)
            found[budget, policy] = made
    for policy in names:
        best: Plan | None = None
        for budget in ordered:
            here = found[budget, policy]
            if here.status == "infeasible":
                continue
            if best is not None and best.step_seconds < here.step_seconds:
                here = found[budget, policy] = rebudgeted(
                    best,
                    budget_bytes=budget,
                    bound_seconds=here.bound_seconds,
                    any_bound=here.any_schedule_bound_seconds,
                )
            best = here
    if progress is not None:
        progress("planning", total, total)
    return Comparison(
        budgets=ordered, policies=names, plans=[found[budget, policy] for budget in ordered for policy in names]
    )
