"""CP-SAT as the graph planner runs it: on one thread, so that the answer does not depend on how many cores there are."""

from __future__ import annotations

from ortools.sat.python import cp_model

from tightfit.planner.milp.solver_interrupts import interruptible


def single_worker() -> cp_model.CpSolver:
    """A solver without limits so far."""
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    # Otherwise it takes Ctrl-C for itself, and afterwards Ctrl-C ends the process on the spot.
    solver.parameters.catch_sigint_signal = False
    # Its search for rows that hold others calls answers the best that are not, where sizes of tensors lie far apart (9.15).
    solver.parameters.presolve_inclusion_work_limit = 0
    return solver


def solved(solver: cp_model.CpSolver, model: cp_model.CpModel) -> cp_model.CpSolverStatus:
    """The status of `model`, solved within the solver's limits. Raises KeyboardInterrupt at once."""
    return interruptible(lambda: solver.solve(model), solver.stop_search)


RESOLUTION = 1_000_000_000
"""seconds are counted in whole parts of the time of one run each, down, so that sums are bounds; n² such parts are below any tolerance"""
