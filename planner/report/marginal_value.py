"""The value of memory at a budget: by how much proven bounds, and plans made to check them, change at neighbouring
budgets.
"""

from __future__ import annotations

from tightfit.planner.plan_result import rebudgeted
from tightfit.planner.protocol import Planner
from tightfit.planner.report.explanation import Explanation, MarginalValue, account, shortfall
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import TIME_LIMIT, SearchProgress

LEAST_SECONDS = 1e-3
"""of a search for what is known already"""


def explained(planner: Planner, plan: Plan, *, left: float) -> Explanation:
    """The explanation of a plan that `planner` made; of a solver's plan with the value of memory (`neighbours`), as far
    as `left` seconds allow. That of one without a schedule comes from the smallest plan of its policy, for which the
    search goes on as long.
    """
    if not plan.fits:
        return shortfall(plan, planner.smallest_plan(policy=plan.policy, time_limit=max(LEAST_SECONDS, left)))
    explanation = account(plan)
    if plan.policy != "solver" or left <= 0:
        return explanation
    return explanation.model_copy(update={"neighbours": neighbours(planner, plan, time_limit=left / 3)})


def neighbours(
    planner: Planner, plan: Plan, *, step_bytes: int | None = None, time_limit: float = TIME_LIMIT
) -> list[MarginalValue]:
    """The class's lower bounds at the budgets `step_bytes` (by default the planner's `neighbour_bytes`) below and above
    that of `plan`, a solver's plan of the planner's profile, and how much they differ from the bound at its own.

    Each bound takes at most `time_limit` seconds; a budget whose bound is not found by then is left out. A budget below
    the floor is reported as infeasible.
    """
    step_bytes = step_bytes or planner.neighbour_bytes(plan.budget_bytes)
    own_bound = _bound(planner, plan.budget_bytes, time_limit)
    values = []
    for change in (-step_bytes, step_bytes):
        budget = plan.budget_bytes + change
        if budget <= plan.device.floor.held_bytes:
            values.append(_nothing(change, budget))
            continue
        if own_bound is None:
            continue
        try:
            bound = planner.bound(budget, time_limit=time_limit)
        except TimeoutError:
            continue
        price = None if bound is None else bound - own_bound
        values.append(MarginalValue(change_bytes=change, budget_bytes=budget, bound_seconds=bound, price_seconds=price))
    return values


def what_if(
    planner: Planner,
    plan: Plan,
    *,
    step_bytes: int | None = None,
    time_limit: float = TIME_LIMIT,
    gap: float = 0.0,
    progress: SearchProgress | None = None,
) -> tuple[Plan, list[MarginalValue]]:
    """`neighbours`, checked by planning at both budgets to a `gap`; `time_limit` seconds for each bound and each plan.

    The first result is `plan`, or the smaller budget's plan where the search found a faster step there. After Ctrl-C no
    further budget is planned.
    """
    step_bytes = step_bytes or planner.neighbour_bytes(plan.budget_bytes)
    priced = {
        worth.change_bytes: worth for worth in neighbours(planner, plan, step_bytes=step_bytes, time_limit=time_limit)
    }
    values = []
    best = plan
    interrupted = False
    for change in (-step_bytes, step_bytes):
        budget = plan.budget_bytes + change
        if budget <= plan.device.floor.held_bytes:
            values.append(_nothing(change, budget))
            continue
        if interrupted:
            continue
        planned = planner.plan(budget, time_limit=time_limit, gap=gap, progress=progress)
        interrupted = planner.interrupted
        holds = planned.fits
        if holds and change < 0 and planned.step_seconds < best.step_seconds:
            best = rebudgeted(
                planned,
                budget_bytes=plan.budget_bytes,
                bound_seconds=plan.bound_seconds,
                any_bound=plan.any_schedule_bound_seconds,
            )
        if holds and change > 0 and planned.step_seconds > best.step_seconds:
            planned = rebudgeted(
                best,
                budget_bytes=budget,
                bound_seconds=planned.bound_seconds,
                any_bound=planned.any_schedule_bound_seconds,
            )
        known = priced.get(
            change, MarginalValue(change_bytes=change, budget_bytes=budget, bound_seconds=None, price_seconds=None)
        )
        step = planned.step_seconds if holds else None
        values.append(known.model_copy(update={"step_seconds": step, "status": planned.status}))
    return best, values


def _nothing(change: int, budget: int) -> MarginalValue:
    return MarginalValue(
        change_bytes=change, budget_bytes=budget, bound_seconds=None, price_seconds=None, status="infeasible"
    )


def _bound(planner: Planner, budget: int, time_limit: float) -> float | None:
    try:
        return planner.bound(budget, time_limit=time_limit)
    except TimeoutError:
        return None
