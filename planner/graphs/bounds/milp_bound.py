"""The programs of `lp_bound` with 0/1 variables, bytes counted exactly, and rows for memory between two moments (35).

Row (35) is added for a re-run that is called crowded: an output that lives at both ends of a window and is not made in
it stays throughout, so all such outputs, the run's inputs and its own bytes must fit together, whatever else happens in
the window and in which order. In a linear relaxation the row would be void: of an output that is half live at either
end, nothing need stay throughout.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from ortools.sat.python import cp_model

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.graphs.bounds.cp_sat_model import CpSatModel
from tightfit.planner.graphs.bounds.lp_bound import ROUNDING, LpAnswer, LpBound, Path
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun


def solve_milp(
    dag: Dag,
    budget_bytes: int,
    pivots: Sequence[int],
    *,
    work: float,
    cutoff: Cutoff = NEVER,
    paths: Sequence[Path] = (),
    crowded: Sequence[Rerun] = (),
    most: float = float("inf"),
) -> LpAnswer:
    """The bound from the moments at `pivots`, which are sorted, for schedules with first runs in the given order.

    The rows of `paths` are implied, but shorten the solver's work; `crowded` are the re-runs with a row (35). Schedules
    that take longer than `most` seconds are left out: where there are no others the bound is about `most`. The solver
    may take so many units of `work`. Raises TimeoutError where `cutoff` strikes before it begins.
    """
    # (35) takes an output without a run in the window to be unchanged in it; a fetch would break that.
    assert dag.read is None
    windows = LpBound(dag, budget_bytes, pivots, any_order=False, cutoff=cutoff)
    if windows.impossible:
        return LpAnswer(bound_seconds=float("inf"))
    for path in paths:
        windows.follow(path)
    model = _Whole(windows, budget_bytes, cutoff)
    for window, operator in sorted({(bisect_left(pivots, stage), operator) for stage, operator in crowded}):
        model.crowd(window, operator)
    return model.solve(most, work)


class _Whole:
    def __init__(self, windows: LpBound, budget: int, cutoff: Cutoff) -> None:
        self.windows = windows
        self.budget = budget
        # Rows of moments are in units of the budget; times the budget their coefficients are whole bytes.
        rows = range(windows.moments, windows.moments + len(windows.pivots))
        self.counted = CpSatModel(windows.program, dict.fromkeys(rows, budget), cutoff)
        self.stays: dict[tuple[int, int], cp_model.IntVar | None] = {}
        """(operator, window) -> a variable that is 1 where its output stays throughout the window; None: it is known
        not to
        """

    def crowd(self, window: int, operator: int) -> None:
        """(35) Add the row of an operator that runs in a window: outputs that stay throughout, its inputs, output and
        workspace fit together.
        """
        windows, dag = self.windows, self.windows.dag
        run = windows.runs[operator].get(window)
        if run is None:
            return
        self.counted.cutoff.check()
        there = {operator, *dag.inputs[operator]}
        room = self.budget - dag.fixed_bytes - dag.workspace[operator] - sum(dag.bytes[i] for i in there)
        others = [(i, self._stays(i, window)) for i in range(len(dag)) if i not in there and dag.bytes[i]]
        staying = [(dag.bytes[i], stays) for i, stays in others if stays is not None]
        held = cp_model.LinearExpr.weighted_sum([stays for _, stays in staying], [size for size, _ in staying])
        row = self.counted.model.add(held <= room)
        if run != -1:
            row.only_enforce_if(self.counted.chosen[run])

    def _stays(self, i: int, window: int) -> cp_model.IntVar | None:
        if (i, window) not in self.stays:
            lives, run = self.windows.lives[i], self.windows.runs[i].get(window)
            ends = [lives.get(window), lives.get(window + 1)]
            if None in ends or run == -1:
                self.stays[i, window] = None
            else:
                stays = self.stays[i, window] = self.counted.model.new_bool_var("")
                missing = [self.counted.chosen[end].negated() for end in ends if end is not None and end >= 0]
                again = [self.counted.chosen[run]] if run is not None else []
                self.counted.model.add_bool_or([stays, *missing, *again])
        return self.stays[i, window]

    def solve(self, most: float, work: float) -> LpAnswer:
        """The bound, with schedules of at most `most` seconds."""
        windows = self.windows
        costs = {variable: cost for variable, cost in enumerate(windows.cost) if cost}
        # Twice `ROUNDING`, so that after the bound's own margin it still covers schedules of exactly `most` seconds.
        extra = most * (1 + 2 * ROUNDING) - windows.constant
        found = self.counted.fastest(costs, once=windows.dag.once_seconds, most=extra, work=work)
        bound = (windows.constant + max(0.0, found.bound)) * (1 - ROUNDING)
        reruns = () if found.values is None else (windows.reruns(found.values),)
        return LpAnswer(bound_seconds=bound, reruns=reruns, solved=found.ended, work=found.work)
