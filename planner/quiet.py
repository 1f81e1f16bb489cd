"""HiGHS behind MathOpt, kept from printing: some of its messages go to standard output whatever its options say, and
standard output belongs to whoever called (``--json`` prints one object there and nothing else).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import sys
from collections.abc import Iterator

from ortools.math_opt.python import mathopt
from ortools.math_opt.solvers import highs_pb2


def solve_quietly(
    model: mathopt.Model, seconds: float = 60.0, gap: float = 1e-6, nodes: int | None = None
) -> mathopt.SolveResult:
    """Solve `model` within `seconds` and branch-and-bound `nodes` to a relative `gap`. Raises TimeoutError when no time is left.

    Where HiGHS calls a point optimal that its own tolerances reject, MathOpt has no result; then Glop (linear) or SCIP
    (integers) gives a second opinion. On one thread, so that the answer does not depend on how many cores there are.
    """
    if seconds <= 0:
        raise TimeoutError
    parameters = mathopt.SolveParameters(
        time_limit=dt.timedelta(seconds=seconds),
        relative_gap_tolerance=gap,
        node_limit=nodes,
        absolute_gap_tolerance=1e-9,
        highs=highs_pb2.HighsOptionsProto(int_options={"threads": 1}, string_options={"parallel": "off"}),
    )
    with _standard_output_to_error():
        try:
            return mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters)
        except (RuntimeError, ValueError, AttributeError):  # MathOpt's conversion of HiGHS's status fails by itself
            whole = any(variable.integer for variable in model.variables())
            second = mathopt.SolverType.GSCIP if whole else mathopt.SolverType.GLOP
            if not whole:
                parameters = mathopt.SolveParameters(time_limit=dt.timedelta(seconds=seconds))
            return mathopt.solve(model, second, params=parameters)


@contextlib.contextmanager
def _standard_output_to_error() -> Iterator[None]:
    """Send the process's standard output to its standard error meanwhile."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:
        # Nobody listens at all.
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
