"""A comparison in words: the table of its plans, cell by cell, and a sentence for each budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from tightfit.planner.report.explain import nearness, percent_within
from tightfit.planner.report.memory_categories import budgets_of, policies_of
from tightfit.planner.schema import Plan
from tightfit.planner.solve.policies import APPROXIMATE
from tightfit.profiles.schema import MOBILLM
from tightfit.runtime.common.units import format_seconds, format_size

AS_FAST = 1.005
"""times the seconds of a row's fastest plan, up to which a plan counts as one of the fastest"""


class Cell(NamedTuple):
    """What a table of plans says of one of them."""

    text: str
    role: Literal["", "best", "none"]
    """best: no plan of the row is faster; none: the plan does not fit"""


def table_rows(plans: Sequence[Plan], policies: Sequence[str]) -> list[tuple[int, list[Cell]]]:
    """Of one device's plans: each budget in bytes, smallest first, with a cell for each of the policies: seconds per
    step, or the smallest budget that is enough.
    """
    by_cell = {(plan.budget_bytes, plan.policy): plan for plan in plans}
    rows = []
    for budget in budgets_of(plans):
        row = [by_cell.get((budget, name)) for name in policies]
        best = min((plan.step_seconds for plan in row if plan and plan.fits), default=0.0)
        rows.append((budget, [_cell(plan, best) for plan in row]))
    return rows


def _cell(plan: Plan | None, best: float) -> Cell:
    if plan is None:
        return Cell("–", "")
    if not plan.fits:
        smallest = plan.minimum_budget_bytes
        less = " or less" if plan.status == "unknown" else ""
        return Cell(f"needs {format_size(smallest, round_up=True)}{less}" if smallest else "does not fit", "none")
    mark = f" ({_mark(plan)})" if plan.policy == "solver" and plan.status != "optimal" else ""
    text = f"{format_seconds(plan.step_seconds)}{mark}"
    return Cell(text, "best" if plan.step_seconds <= AS_FAST * best else "")


def _mark(plan: Plan) -> str:
    """What is known of a solver's plan that is not proven optimal."""
    cut = {"time limit": ", time limit", "interrupt": ", interrupted"}.get(plan.ended_by or "", "")
    return f"gap {percent_within(plan.gap)}{cut}"


def verdicts(plans: Sequence[Plan]) -> list[str]:
    """A sentence per budget of one device: the solver's step beside the best fixed rule that fits the same budget."""
    sentences = []
    rules = [name for name in policies_of(plans) if name not in {"solver", MOBILLM, *APPROXIMATE}]
    for budget in budgets_of(plans):
        fixed = {plan.policy: plan for plan in plans if plan.budget_bytes == budget}
        solved = fixed.pop("solver", None)
        if solved is None or not solved.fits:
            continue
        text = f"{format_size(budget)}: {format_seconds(solved.step_seconds)} per step, {nearness(solved, 'class')}"
        sentences.append(f"{text}{_beside_rules(solved, fixed, [name for name in rules if name not in fixed])}.")
    return sentences


def _beside_rules(solved: Plan, by_policy: Mapping[str, Plan], missing: Sequence[str]) -> str:
    """How the solver's step compares with the fixed rules planned for the same budget; `missing` were not, being
    interrupted.
    """
    if not by_policy:
        return f"; {', '.join(missing)} not planned" if missing else ""
    fitting = [plan for plan in by_policy.values() if plan.fits]
    exact = [plan for plan in fitting if plan.exact]
    unplanned = f" ({', '.join(missing)} not planned)" if missing else ""
    if exact:
        best = min(exact, key=lambda plan: plan.step_seconds)
        needs = (
            f"{best.step_seconds / solved.step_seconds:.2f} × as long"
            if solved.step_seconds
            else format_seconds(best.step_seconds)
        )
        return f"; {best.policy}, the fastest fixed rule that fits{unplanned}, needs {needs}"
    if fitting:
        names = " and ".join(plan.policy for plan in fitting)
        single = len(fitting) == 1
        return (
            f"; {names} {'fits' if single else 'fit'} but {'does' if single else 'do'} not follow the exact gradient,"
            f" so {'its time is' if single else 'their times are'} no measure{unplanned}"
        )
    return f"; no fixed rule compared here fits{unplanned}"
