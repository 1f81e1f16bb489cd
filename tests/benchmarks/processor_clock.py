"""Seconds of this process's processor as the clock of planner and solvers, for figures made beside other programs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ortools.sat.python import cp_model

from tightfit.planner.solvers import highs, lp

wall, processor = time.monotonic, time.process_time
cp_sat, solve_silently = cp_model.CpSolver.solve, highs.solve_silently
FOREVER = 1e6


def beside(plan: Callable[[], Any]) -> Any:
    """What `plan` returns, called in a thread: in the main one a solver is given up by the clock on the wall."""
    time.monotonic = processor
    cp_model.CpSolver.solve = _solve
    highs.solve_silently = lp.solve_silently = _solve_silently
    answers = []
    thread = threading.Thread(target=lambda: answers.append(plan()))
    thread.start()
    thread.join()
    return answers[0]


def _solve(solver: cp_model.CpSolver, model: cp_model.CpModel, *rest: Any) -> Any:
    """CP-SAT, stopped when its seconds of the processor are over."""
    ends = processor() + solver.parameters.max_time_in_seconds
    solver.parameters.max_time_in_seconds = FOREVER
    done = threading.Event()

    def watch() -> None:
        while not done.wait(min(0.25, max(0.01, 0.5 * (ends - processor())))):
            if processor() >= ends:
                solver.stop_search()
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return cp_sat(solver, model, *rest)
    finally:
        done.set()
        watcher.join()


def _solve_silently(model: Any, seconds: float = 60.0, *rest: Any) -> Any:
    """HiGHS, which cannot be stopped, given as much longer by the wall as this process has waited for the processor so
    far.
    """
    return solve_silently(model, seconds * max(1.0, (wall() - BEGUN[0]) / max(0.1, processor() - BEGUN[1])), *rest)


BEGUN = wall(), processor()
