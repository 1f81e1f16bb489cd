"""The comparison page's section on the difference of two plans: the data for any pair, and the changes of one pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tightfit.planner.report.costs import Cost, CostLedger
from tightfit.planner.report.diff import diff, grouped
from tightfit.planner.report.memory_categories import feasible
from tightfit.planner.schema import Plan
from tightfit.runtime.common.units import format_size, unit_of

DECISIONS = ("kept", "recomputed", "offloaded", "unpacked", "packed", "streamed")
"""decisions, which the page's data give by their index here; -1 where there was nothing to decide"""
ROWS = 300
"""changes listed; the rest are in the sums above them"""
NOTHING = Cost(kind="", bytes=0, decision=None)


def diff_section(plans: Sequence[Plan]) -> dict[str, Any] | None:
    """Labels, data and the changes of the section's first pair; None where fewer than two plans hold.

    Data: `names`, `kinds`, `bytes` of every tensor that any plan decides on or pays for, and per plan the `decisions`,
    `compute` and `transfer` microseconds and `moved` bytes in the same order.
    """
    fitting = [plan for plan in plans if feasible(plan)]
    if len(fitting) < 2:
        return None
    costs = [CostLedger(plan).costs() for plan in fitting]
    tensors = {name: cost for spent in reversed(costs) for name, cost in spent.items()}
    names = list(dict.fromkeys(name for spent in costs for name in spent))
    several = len({plan.device.name for plan in fitting}) > 1
    first, second = _first_pair(fitting)
    changes = diff(fitting[first], fitting[second])
    unit = unit_of(max((cost.bytes for cost in tensors.values()), default=0))
    return {
        "labels": [
            f"{plan.policy} at {format_size(plan.budget_bytes)}" + (f" on {plan.device.name}" if several else "")
            for plan in fitting
        ],
        "first": first,
        "second": second,
        "unit": unit,
        "groups": grouped(changes),
        "changes": changes[:ROWS],
        "more": max(0, len(changes) - ROWS),
        "data": {
            "limit": ROWS,
            "unit": unit.size,
            "places": unit.places(2),
            "decisions": DECISIONS,
            "names": names,
            "kinds": [tensors[name].kind for name in names],
            "bytes": [tensors[name].bytes for name in names],
            "plans": [_columns([spent.get(name, NOTHING) for name in names]) for spent in costs],
        },
    }


def _first_pair(plans: Sequence[Plan]) -> tuple[int, int]:
    """The solver's plans at the two smallest budgets that hold; the first two plans where it has none."""
    solved = [index for index, plan in enumerate(plans) if plan.policy == "solver"]
    solved = [index for index in solved if plans[index].device.name == plans[solved[0]].device.name]
    solved.sort(key=lambda index: plans[index].budget_bytes)
    return (solved[0], solved[1]) if len(solved) > 1 else (0, 1)


def _columns(costs: Sequence[Cost]) -> dict[str, list[float]]:
    return {
        "decisions": [-1 if cost.decision is None else DECISIONS.index(cost.decision) for cost in costs],
        "compute": [round(cost.compute_seconds * 1e6, 1) for cost in costs],
        "transfer": [round(cost.transfer_seconds * 1e6, 1) for cost in costs],
        "moved": [cost.moved_bytes for cost in costs],
    }
