"""Runs HiGHS through MathOpt without letting it print.

Some of its messages go to standard output whatever its options say, and standard output belongs to the caller
(``--json`` prints one object there and nothing else).
"""

from __future__ import annotations

import datetime as dt
import os
import sys
import threading
import time
from dataclasses import replace
from typing import TextIO

from ortools.math_opt.python import mathopt
from ortools.math_opt.solvers import highs_pb2

from tightfit.planner.solvers.solver_interrupts import interruptible


def solve_silently(
    model: mathopt.Model, seconds: float = 60.0, gap: float = 1e-6, nodes: int | None = None
) -> mathopt.SolveResult:
    """Solve `model` to a relative `gap`, within `seconds` and at most `nodes` of branch and bound.

    On one thread, so that the answer does not depend on the number of cores. If HiGHS reports as optimal a point that
    its own tolerances reject, MathOpt raises an error instead of a result; then Glop (linear programs) or SCIP (integer
    programs) solves the model in the time left. Raises TimeoutError where no time is left, or where neither takes the
    model, as its numbers are beyond what they compute with; and KeyboardInterrupt at once on Ctrl-C. HiGHS cannot be
    interrupted: after Ctrl-C, or where it overruns its time limit (TimeoutError), its thread is abandoned and runs to
    its end.
    """
    if seconds <= 0:
        raise TimeoutError
    deadline = time.monotonic() + seconds
    parameters = mathopt.SolveParameters(
        time_limit=dt.timedelta(seconds=seconds),
        relative_gap_tolerance=gap,
        node_limit=nodes,
        absolute_gap_tolerance=1e-9,
        highs=highs_pb2.HighsOptionsProto(int_options={"threads": 1}, string_options={"parallel": "off"}),
    )
    try:
        return _solved(model, mathopt.SolverType.HIGHS, parameters)
    except (RuntimeError, ValueError, AttributeError):  # MathOpt's conversion of HiGHS's status fails by itself
        integer = any(variable.integer for variable in model.variables())
        other_solver = mathopt.SolverType.GSCIP if integer else mathopt.SolverType.GLOP
        rest = dt.timedelta(seconds=deadline - time.monotonic())
        if rest <= dt.timedelta():
            raise TimeoutError from None
        parameters = replace(parameters, time_limit=rest) if integer else mathopt.SolveParameters(time_limit=rest)
        try:
            return _solved(model, other_solver, parameters)
        except (RuntimeError, ValueError, AttributeError) as refused:  # numbers beyond what a solver computes with
            raise TimeoutError(f"neither HiGHS nor {other_solver.name} takes the model: {refused}") from None


LATE_SHARE, LEAST_LATE, MOST_LATE = 0.5, 0.25, 1.0
"""how long to wait for a solver beyond its time limit, as it may answer late: a share of the limit, in seconds at
least, and at most
"""


def patience(seconds: float) -> float:
    """Seconds to wait for a solver whose time limit is `seconds`."""
    return seconds + min(max(LATE_SHARE * seconds, LEAST_LATE), MOST_LATE)


def _solved(
    model: mathopt.Model, solver: mathopt.SolverType, parameters: mathopt.SolveParameters
) -> mathopt.SolveResult:
    assert parameters.time_limit is not None
    seconds = parameters.time_limit.total_seconds()
    abandoned = threading.Event()

    def solve() -> mathopt.SolveResult:
        with _silent_output:
            if abandoned.is_set():
                raise TimeoutError
            return mathopt.solve(model, solver, params=parameters)

    try:
        return interruptible(solve, seconds=patience(seconds))
    except (KeyboardInterrupt, TimeoutError):
        abandoned.set()
        _silent_output.let_python_out()
        raise


MARGIN = 1e-5
"""relative error that a solver's proven bound may have, because of its tolerances"""


class _SilentOutput:
    """A context in which file descriptor 1, the process's standard output, leads to /dev/null.

    There is one for all threads: the first solver to begin redirects the descriptor, and the last to end restores it.
    After Ctrl-C an abandoned solver may hold it for long; until then `sys.stdout` writes to a copy of the original
    descriptor.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._solving = 0
        self._saved: int | None = None
        """copy of the original descriptor 1; None while no solver runs, or where descriptor 1 is closed"""
        self._replaced: tuple[TextIO, TextIO] | None = None
        """(original `sys.stdout`, its stand-in) while a stand-in is in use"""

    def __enter__(self) -> None:
        with self._lock:
            if not self._solving:
                self._saved = _silenced_stdout()
            self._solving += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._solving -= 1
            if not self._solving and self._saved is not None:
                os.dup2(self._saved, 1)
                os.close(self._saved)
                self._saved = None
                if self._replaced is not None:
                    original, stand_in = self._replaced
                    self._replaced = None
                    if sys.stdout is stand_in:
                        stand_in.close()
                        sys.stdout = original

    def let_python_out(self) -> None:
        """Let Python print again, through a copy of the original descriptor, while an abandoned solver still runs."""
        with self._lock:
            if self._saved is None or self._replaced is not None or not _is_descriptor_1(sys.stdout):
                return
            stdout = sys.stdout
            stand_in = os.fdopen(os.dup(self._saved), "w", encoding=stdout.encoding, errors=stdout.errors, buffering=1)
            self._replaced = stdout, stand_in
            sys.stdout = stand_in


def _is_descriptor_1(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.fileno() == 1
    except (OSError, ValueError):
        return False


def _silenced_stdout() -> int | None:
    """Redirect descriptor 1 to /dev/null and return a copy of what it was; None: it is closed."""
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        copy = os.dup(1)
    except OSError:
        return None
    try:
        null = os.open(os.devnull, os.O_WRONLY)
    except OSError:
        os.close(copy)
        raise
    os.dup2(null, 1)
    os.close(null)
    return copy


_silent_output = _SilentOutput()
