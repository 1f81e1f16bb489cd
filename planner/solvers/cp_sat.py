"""Sets CP-SAT up for the graph planner: on one thread, so that the answer does not depend on the number of cores."""

from __future__ import annotations

from ortools.sat.python import cp_model

from tightfit.planner.solvers.solver_interrupts import interruptible


def single_worker() -> cp_model.CpSolver:
    """A CP-SAT solver on one thread; the caller sets its limits."""
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    # Otherwise CP-SAT installs a handler of its own for Ctrl-C, after which Ctrl-C ends the process on the spot.
    solver.parameters.catch_sigint_signal = False
    # OR-Tools 9.15: the presolve step that looks for rows contained in others can report a suboptimal solution as
    # optimal where tensor sizes differ widely.
    solver.parameters.presolve_inclusion_work_limit = 0
    return solver


def solved(solver: cp_model.CpSolver, model: cp_model.CpModel) -> cp_model.CpSolverStatus:
    """Solve `model` within the solver's limits and return the status. Ctrl-C raises KeyboardInterrupt at once."""
    return interruptible(lambda: solver.solve(model), solver.stop_search)


RESOLUTION = 1_000_000_000
"""CP-SAT counts seconds in integers: this is how many make up one run of every operator. Each cost is rounded down, so
that sums stay lower bounds; the error of n² roundings is below any tolerance
"""
