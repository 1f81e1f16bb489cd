"""The programs of `lp_bound` with 0/1 variables, and bytes counted exactly."""

from __future__ import annotations

from collections.abc import Sequence

from tightfit.planner.graphs.bounds.cp_sat_model import CpSatModel
from tightfit.planner.graphs.bounds.lp_bound import ROUNDING, LpAnswer, LpBound, Path
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.limit import Limit


def solve_milp(
    dag: Dag,
    budget_bytes: int,
    pivots: Sequence[int],
    *,
    seconds: float,
    paths: Sequence[Path] = (),
    most: float = float("inf"),
) -> LpAnswer:
    """The bound from the moments at `pivots`, which are sorted, for schedules with first runs in the given order.

    The rows of `paths` are implied, but shorten the solver's work. Schedules that take longer than `most` seconds are
    left out: where there are no others the bound is about `most`. `seconds` limit building and solving; past them the
    bound is that of every operator run once.
    """
    # The disk's time (35) is not in this objective.
    assert dag.read is None
    limit = Limit(seconds)
    try:
        windows = LpBound(dag, budget_bytes, pivots, any_order=False, limit=limit)
        if windows.impossible:
            return LpAnswer(bound_seconds=float("inf"))
        for path in paths:
            windows.follow(path)
        # Rows of moments are in units of the budget; times the budget their coefficients are whole bytes.
        rows = range(windows.moments, windows.moments + len(pivots))
        model = CpSatModel(windows.program, dict.fromkeys(rows, budget_bytes), limit)
        costs = {variable: cost for variable, cost in enumerate(windows.cost) if cost}
        # Twice `ROUNDING`, so that after the bound's own margin it still covers schedules of exactly `most` seconds.
        extra = most * (1 + 2 * ROUNDING) - windows.constant
        found = model.solve(costs, once=dag.once_seconds, most=extra)
    except TimeoutError:
        return LpAnswer(bound_seconds=dag.once_seconds, solved=False)
    bound = (windows.constant + max(0.0, found.bound_seconds)) * (1 - ROUNDING)
    reruns = () if found.values is None else (windows.reruns(found.values),)
    return LpAnswer(bound_seconds=bound, reruns=reruns, solved=found.ended)
