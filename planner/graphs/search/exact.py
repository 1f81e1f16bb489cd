"""The exact solver for small graphs: CP-SAT over all schedules of the class, with memory counted at every run.

The stages are Checkmate's (Jain et al. 2020). ``lives[t, i, k]`` says that output i is live while operator k runs in
stage t. It is linked from each run to the next, so that freeing is a decision of its own; the number of variables grows
with the third power of the number of operators.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import floor

from ortools.sat.python import cp_model

from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, pruned
from tightfit.planner.solvers.cp_sat import RESOLUTION, single_worker, solved

OPERATORS = 20
"""number of operators up to which a graph is solved exactly over all schedules of the class"""
WORK = 30.0
"""limit of CP-SAT's deterministic seconds; such graphs take a fraction of one"""


@dataclass(frozen=True, kw_only=True)
class ExactResult:
    """What the solver found within its work limit."""

    reruns: frozenset[Rerun] | None
    """None: no schedule of the class fits (if `proven`), or none was found"""
    proven: bool
    bound: float
    """lower bound for every schedule of the class: seconds, or bytes where the peak was minimised"""
    timely: bool = True
    """whether it ended by itself or by its work limit, not by the time limit"""


def fastest(
    dag: Dag, budget_bytes: int, *, seconds: float, work: float = WORK, until: float = float("inf")
) -> ExactResult:
    """The fastest schedule of the class within the budget.

    Limits: `seconds` of solving by the clock, `work` in CP-SAT's deterministic time, and `until`, on the monotonic
    clock, when it has to end however long the program took to build.
    """
    model = _Stages(dag)
    for row in model.rows:
        model.model.add(row <= budget_bytes - dag.fixed_bytes)
    unit = max(dag.once_seconds, 1e-300) / RESOLUTION
    model.model.minimize(sum(floor(dag.seconds[i] / unit) * again for (_, i), again in model.again.items()))
    if until < float("inf"):
        seconds = min(seconds, max(0.0, until - time.monotonic()))
    return model.solve(work, seconds, lambda extra: dag.once_seconds + max(0.0, extra) * unit)


def smallest(dag: Dag, *, seconds: float, work: float = WORK) -> ExactResult:
    """The schedule of the class with the lowest peak; limits as of `fastest`."""
    model = _Stages(dag)
    peak = model.model.new_int_var(dag.floor_bytes - dag.fixed_bytes, sum(dag.bytes) + max(dag.workspace), "peak")
    for row in model.rows:
        model.model.add(row <= peak)
    model.model.minimize(peak)
    return model.solve(work, seconds, lambda found: dag.fixed_bytes + found)


def solve_within(
    model: cp_model.CpModel, *, work: float, seconds: float
) -> tuple[cp_model.CpSolver, cp_model.CpSolverStatus, bool]:
    """The solver, its status, and whether it ended by itself or by its work limit, not by the time limit; limits as of
    `fastest`.
    """
    solver = single_worker()
    solver.parameters.max_deterministic_time = work
    solver.parameters.max_time_in_seconds = seconds
    status = solved(solver, model)
    proven = status in (cp_model.OPTIMAL, cp_model.INFEASIBLE)
    # Decided by the work done, not by the time taken: a process that other programs held up may be past its time limit
    # although the work limit ended the solver.
    return solver, status, proven or solver.deterministic_time >= work


class _Stages:
    """The model: a variable for each possible re-run, and for each output at each run it may live at."""

    def __init__(self, dag: Dag) -> None:
        self.dag = dag
        self.model = cp_model.CpModel()
        self.again: dict[Rerun, cp_model.IntVar] = {}
        self.rows: list[cp_model.LinearExprT] = []
        """live bytes and workspace at every run, without the fixed bytes"""
        before: dict[int, cp_model.IntVar] = {}
        for stage in range(len(dag)):
            for operator in range(stage + 1):
                before = self._run(stage, operator, before)
        for operator in range(len(dag)):
            if dag.keep[operator]:
                self.model.add_bool_or(before[operator])

    def _run(self, stage: int, operator: int, before: dict[int, cp_model.IntVar]) -> dict[int, cp_model.IntVar]:
        """Add the (possible) run of `operator` in `stage`. `before` and the result: operator -> whether its output
        lives at the previous run, and at this one.
        """
        dag, model = self.dag, self.model
        first = operator == stage
        if not first and not dag.recomputable[operator]:
            return before
        lives = {i: model.new_bool_var("") for i in (*before, operator)}
        again = None
        if not first:
            again = self.again[stage, operator] = model.new_bool_var("")
        for i, here in lives.items():
            if i != operator:
                model.add_implication(here, before[i])
        if again is None:
            model.add_bool_or(lives[operator])
            needed = [lives[i] for i in dag.inputs[operator]]
            for here in needed:
                model.add_bool_or(here)
        else:
            model.add_bool_or(before[operator], again, lives[operator].negated())
            # Recomputing an output that is still live is of no use.
            model.add_implication(again, before[operator].negated())
            for i in (*dag.inputs[operator], operator):
                model.add_implication(again, lives[i])
        workspace = dag.workspace[operator]
        row = sum(dag.bytes[i] * here for i, here in lives.items())
        self.rows.append(row + (workspace if again is None else workspace * again))
        return lives

    def solve(self, work: float, seconds: float, value: Callable[[float], float]) -> ExactResult:
        solver, status, timely = solve_within(self.model, work=work, seconds=seconds)
        if status == cp_model.INFEASIBLE:
            return ExactResult(reruns=None, proven=True, bound=float("inf"))
        bound = value(solver.best_objective_bound)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return ExactResult(reruns=None, proven=False, bound=bound, timely=timely)
        chosen = (rerun for rerun, again in self.again.items() if solver.boolean_value(again))
        proven = status == cp_model.OPTIMAL
        return ExactResult(reruns=pruned(self.dag, chosen), proven=proven, bound=bound, timely=timely)
