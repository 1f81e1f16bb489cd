"""The comparison page's section on the difference of two plans: the data for any pair, and one pair
already rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tightfit.planner.report.costs import CostLedger
from tightfit.planner.report.diff import ChangeGroup, PlanChange, diff, grouped, transfer_seconds
from tightfit.planner.report.memory_categories import feasible
from tightfit.planner.schema import Plan
from tightfit.runtime.common.units import Unit, format_size, unit_of

DECISIONS = ("kept", "recomputed", "offloaded", "unpacked", "packed", "streamed")
"""decisions, which the page's data give by their index here; -1 where there was nothing to decide"""
ROWS = 300
"""changes listed; the rest are in the sums above them"""


def diff_section(plans: Sequence[Plan]) -> dict[str, Any] | None:
    """Labels, data and the first diff of the section; None where fewer than two plans hold.

    Data: `names`, `kinds`, `bytes` of every tensor that any plan decides on or pays for, and per plan the `decisions`,
    `compute` and `transfer` microseconds and `moved` bytes in the same order.
    """
    fitting = [plan for plan in plans if feasible(plan)]
    if len(fitting) < 2:
        return None
    costs = [CostLedger(plan).costs() for plan in fitting]
    names = list(dict.fromkeys(name for spent in costs for name in spent))
    facts = {name: cost for spent in reversed(costs) for name, cost in spent.items()}
    several = len({plan.device.name for plan in fitting}) > 1
    labels = [
        f"{plan.policy} at {format_size(plan.budget_bytes)}" + (f" on {plan.device.name}" if several else "")
        for plan in fitting
    ]
    first, second = _first_pair(fitting)
    changes = diff(fitting[first], fitting[second])
    unit = unit_of(max((cost.bytes for cost in facts.values()), default=0))
    return {
        "labels": labels,
        "first": first,
        "second": second,
        "unit": unit.name,
        "sums": [_sum_row(group, unit) for group in grouped(changes)],
        "rows": [_row(change, unit) for change in changes[:ROWS]],
        "more": max(0, len(changes) - ROWS),
        "limit": ROWS,
        "data": {
            "limit": ROWS,
            "unit": unit.size,
            "places": unit.places(2),
            "decisions": DECISIONS,
            "names": names,
            "kinds": [facts[name].kind for name in names],
            "bytes": [facts[name].bytes for name in names],
            "plans": [
                {
                    "decisions": [_code(spent[name].decision) if name in spent else -1 for name in names],
                    "compute": [round(spent[name].compute_seconds * 1e6, 1) if name in spent else 0 for name in names],
                    "transfer": [
                        round(transfer_seconds(spent[name]) * 1e6, 1) if name in spent else 0 for name in names
                    ],
                    "moved": [
                        spent[name].read_bytes + spent[name].write_bytes if name in spent else 0 for name in names
                    ],
                }
                for spent in costs
            ],
        },
    }


def _first_pair(plans: Sequence[Plan]) -> tuple[int, int]:
    """The solver's plans at the two smallest budgets that hold; the first two plans where it has none."""
    solved = [index for index, plan in enumerate(plans) if plan.policy == "solver"]
    solved = [index for index in solved if plans[index].device.name == plans[solved[0]].device.name]
    solved.sort(key=lambda index: plans[index].budget_bytes)
    return (solved[0], solved[1]) if len(solved) > 1 else (0, 1)


def _code(decision: str | None) -> int:
    return -1 if decision is None else DECISIONS.index(decision)


def _sum_row(group: ChangeGroup, unit: Unit) -> list[str]:
    return [_change(group), f"{group.tensors}", *_figures(group, unit)]


def _row(change: PlanChange, unit: Unit) -> list[str]:
    return [change.name, _change(change), *_figures(change, unit)]


def _change(change: PlanChange | ChangeGroup) -> str:
    before, after = change.before or "–", change.after or "–"
    what = before if before == after else f"{before} → {after}"
    return f"{change.kind}: {what}" if isinstance(change, ChangeGroup) else what


def _figures(change: PlanChange | ChangeGroup, unit: Unit) -> list[str]:
    """As the page's script prints them: bytes in `unit`, ms of the cores, ms of the channels, bytes moved in `unit`."""
    return [
        unit.amount(change.bytes, 2),
        f"{change.compute_seconds * 1e3:+.2f}",
        f"{change.transfer_seconds * 1e3:+.2f}",
        unit.amount(change.moved_bytes, 2, sign="+"),
    ]
