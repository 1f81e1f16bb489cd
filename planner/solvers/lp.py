"""Linear expressions and linear or integer programs that are cheap to build: variables are numbers, rows are lists.

MathOpt gets a program as a whole, in one message: building a layer's rows one by one through MathOpt's objects takes as
long as solving them.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from ortools.glop import parameters_pb2
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

from tightfit.planner.solvers.highs import patience, solve_silently
from tightfit.planner.solvers.solver_interrupts import interruptible

INFINITY = float("inf")
WARM_ITERATIONS = 0.25
"""simplex iterations per row after which a warm start is abandoned"""
NO_REDUCED_COSTS = mathopt.ModelSolveParameters(reduced_costs_filter=mathopt.VariableFilter(filtered_items=[]))
"""reduced costs are not used, and MathOpt would turn each into a Python object"""
OBJECTIVE_ONLY = mathopt.ModelSolveParameters(
    reduced_costs_filter=mathopt.VariableFilter(filtered_items=[]),
    variable_values_filter=mathopt.VariableFilter(filtered_items=[]),
    dual_values_filter=mathopt.LinearConstraintFilter(filtered_items=[]),
)
ExpressionKey = tuple[float, frozenset[tuple[int, float]]]


class Linear:
    """A linear expression over a program's variables."""

    __slots__ = ("constant", "terms")

    def __init__(self, constant: float = 0.0) -> None:
        self.constant = constant
        self.terms: dict[int, float] = {}

    @classmethod
    def sum(cls, variables: Iterable[int]) -> Linear:
        result = cls()
        result.terms = dict.fromkeys(variables, 1.0)
        return result

    def add(self, variable: int, coefficient: float = 1.0) -> Linear:
        self.terms[variable] = self.terms.get(variable, 0.0) + coefficient
        return self

    def plus(self, other: Linear, scale: float = 1.0) -> Linear:
        self.constant += scale * other.constant
        terms = self.terms
        if not terms and scale == 1.0:
            self.terms = dict(other.terms)
            return self
        for variable, coefficient in other.terms.items():
            terms[variable] = terms.get(variable, 0.0) + scale * coefficient
        return self

    def key(self) -> ExpressionKey:
        """A hashable value that is equal for equal expressions."""
        return self.constant, frozenset(self.terms.items())

    def value(self, values: Sequence[float]) -> float:
        return self.constant + sum(c * values[v] for v, c in self.terms.items())


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A solver's answer to a program; lists are indexed by the numbers of variables and rows."""

    values: list[float] | None
    """values of the variables at the best feasible point found; None: none was found"""
    duals: list[float] | None
    """dual values of the rows; None for an integer program, or where the solver has no dual solution"""
    objective: float
    bound: float
    """lower bound on the objective of every feasible point"""
    optimal: bool
    infeasible: bool
    iterations: int = 0
    """of the simplex method"""


class LinearProgram:
    """A linear or integer program to be minimised; variables and rows can be added until it is first solved."""

    def __init__(self) -> None:
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.whole: list[bool] = []
        self.least: list[float] = []
        self.most: list[float] = []
        """per row: the least and the greatest value (`least`, `most`) that the sum of its terms may have"""
        self._rows, self._columns, self._entries = array("q"), array("q"), array("d")
        """a layer has up to half a million entries, of which each as a Python object takes eight times as much"""

    def variable(self, lower: float = 0.0, upper: float = INFINITY, *, whole: bool = False) -> int:
        self.lower.append(lower)
        self.upper.append(upper)
        self.whole.append(whole)
        return len(self.lower) - 1

    def choice(self) -> int:
        """A variable that is 0 or 1."""
        return self.variable(0.0, 1.0, whole=True)

    def at_least(self, left: Linear, *right: Linear | float) -> int:
        """Add the row `left` >= the sum of `right`; returns its number."""
        row = _difference(left, right)
        return self._row(row, -row.constant, INFINITY)

    def exactly(self, left: Linear, *right: Linear | float) -> int:
        """Add the row `left` = the sum of `right`; returns its number."""
        row = _difference(left, right)
        return self._row(row, -row.constant, -row.constant)

    def _row(self, row: Linear, least: float, most: float) -> int:
        number = len(self.least)
        self.least.append(least)
        self.most.append(most)
        for variable, coefficient in row.terms.items():
            if coefficient:
                self._rows.append(number)
                self._columns.append(variable)
                self._entries.append(coefficient)
        return number

    # --- solving ---------------------------------------------------------------------------------------------------

    def solve(self, goal: Linear, seconds: float = 60.0, gap: float = 1e-6, nodes: int | None = None) -> Solution:
        """Minimise `goal`; limits and errors as of `tightfit.planner.solvers.highs.solve_silently`."""
        self._set_objective(goal)
        return self._solution(solve_silently(self._model, seconds, gap, nodes))

    def _set_objective(self, goal: Linear) -> None:
        model = self._model
        model.objective.clear()
        model.objective.offset = goal.constant
        for variable, coefficient in goal.terms.items():
            if coefficient:
                model.objective.set_linear_coefficient(self._variables[variable], coefficient)

    def _solution(self, result: mathopt.SolveResult) -> Solution:
        feasible = result.has_primal_feasible_solution()
        reason = result.termination.reason
        whole = any(self.whole)
        return Solution(
            values=result.variable_values(self._variables) if feasible else None,
            duals=result.dual_values(self._constraints) if not whole and result.has_dual_feasible_solution() else None,
            objective=result.objective_value() if feasible else INFINITY,
            bound=float(result.termination.objective_bounds.dual_bound),
            optimal=reason == mathopt.TerminationReason.OPTIMAL,
            infeasible=reason == mathopt.TerminationReason.INFEASIBLE,
            iterations=result.solve_stats.simplex_iterations,
        )

    def bounds(self, variable: int, lower: float, upper: float) -> None:
        """Change the bounds of a variable; allowed between two solutions too."""
        self.lower[variable], self.upper[variable] = lower, upper
        if "_model" in self.__dict__:
            self._variables[variable].lower_bound = lower
            self._variables[variable].upper_bound = upper

    @cached_property
    def matrix(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """(rows, columns, entries), sorted by row, then by column."""
        rows, columns = np.frombuffer(self._rows, dtype=np.int64), np.frombuffer(self._columns, dtype=np.int64)
        order = np.lexsort((columns, rows))
        return rows[order], columns[order], np.frombuffer(self._entries, dtype=np.float64)[order]

    @cached_property
    def _model(self) -> mathopt.Model:
        proto = model_pb2.ModelProto()
        count, count_rows = len(self.lower), len(self.least)
        proto.variables.ids.extend(range(count))
        proto.variables.lower_bounds.extend(self.lower)
        proto.variables.upper_bounds.extend(self.upper)
        proto.variables.integers.extend(self.whole)
        proto.linear_constraints.ids.extend(range(count_rows))
        proto.linear_constraints.lower_bounds.extend(self.least)
        proto.linear_constraints.upper_bounds.extend(self.most)
        rows, columns, entries = self.matrix
        proto.linear_constraint_matrix.row_ids.extend(rows.data)
        proto.linear_constraint_matrix.column_ids.extend(columns.data)
        proto.linear_constraint_matrix.coefficients.extend(entries.data)
        return self._loaded(proto)

    def _loaded(self, proto: model_pb2.ModelProto) -> mathopt.Model:
        model = mathopt.Model.from_model_proto(proto)
        self._variables = list(model.variables())
        self._constraints = list(model.linear_constraints())
        return model


class GrowingProgram(LinearProgram):
    """A linear program that is solved repeatedly by Glop, each time from its last basis; columns may be added in
    between.
    """

    def column(self, entries: dict[int, float]) -> int:
        """Add a variable, at least 0, with its coefficients by row; returns its number."""
        model = self._model
        variable = model.add_variable(lb=0.0)
        for row, coefficient in entries.items():
            self._constraints[row].set_coefficient(variable, coefficient)
        self._variables.append(variable)
        return self.variable()

    def row_bounds(self, row: int, least: float, most: float) -> None:
        """Change the bounds of a row; allowed between two solutions too."""
        self.least[row], self.most[row] = least, most
        if "_model" in self.__dict__:
            self._constraints[row].lower_bound = least
            self._constraints[row].upper_bound = most

    def solve(self, goal: Linear, seconds: float = 60.0, gap: float = 1e-6, nodes: int | None = None) -> Solution:
        """Minimise `goal`. Raises TimeoutError when no time is left, and KeyboardInterrupt on Ctrl-C.

        A warm start that takes too many iterations is broken off, as large programs are then solved sooner from
        scratch. Where Glop fails from scratch too, it tries again with presolve, and then HiGHS solves the program.
        """
        deadline = time.monotonic() + seconds
        self._set_objective(goal)
        for warm, presolve in ((True, False), (False, False), (False, True)):
            if warm and "_solver" not in self.__dict__:
                continue
            if not warm:
                self._forget()
            result = self._from_basis(deadline - time.monotonic(), presolve=presolve, warm=warm)
            if result is not None:
                return self._solution(result)
        self._forget()
        return super().solve(goal, deadline - time.monotonic(), gap, nodes)

    def _forget(self) -> None:
        """Drop solver and basis. The model is loaded anew too, since MathOpt's keeps track of changes for every solver
        it ever had.
        """
        if "_solver" in self.__dict__:
            self._load_anew()

    def _load_anew(self) -> None:
        self.__dict__.pop("_solver", None)
        self.__dict__["_model"] = self._loaded(self._model.export_model())

    def _from_basis(self, seconds: float, *, presolve: bool, warm: bool) -> mathopt.SolveResult | None:
        """Solve with Glop, from the last basis if there is one. None where Glop finds no optimum, or a warm start takes
        too many iterations. Raises TimeoutError where time is over.
        """
        if seconds <= 0:
            raise TimeoutError
        parameters = mathopt.SolveParameters(
            time_limit=dt.timedelta(seconds=seconds),
            iteration_limit=int(len(self.least) * WARM_ITERATIONS) if warm else None,
            # The last basis is valid for the program without presolve only.
            presolve=None if presolve else mathopt.Emphasis.OFF,
            # Scaled, the chained sums over a hundred layers leave residuals above Glop's default tolerance of 1e-6.
            glop=parameters_pb2.GlopParameters(use_scaling=False, solution_feasibility_tolerance=1e-5),
        )
        # As in `tightfit.planner.solvers.highs`: MathOpt's conversion of a result may raise these errors.
        with contextlib.suppress(RuntimeError, ValueError, AttributeError):
            try:
                # If the thread is abandoned, it keeps this solver and model, and `_load_anew` makes others.
                solver = self._solver
                # Another reason for a thread: Ctrl-C within the conversion would come out as one of these errors.
                result = interruptible(
                    lambda: solver.solve(params=parameters, model_params=NO_REDUCED_COSTS), seconds=patience(seconds)
                )
            except (KeyboardInterrupt, TimeoutError):
                self._load_anew()
                raise
            if result.termination.reason == mathopt.TerminationReason.OPTIMAL:
                return result
            if result.termination.limit == mathopt.Limit.TIME:
                raise TimeoutError
        return None

    @cached_property
    def _solver(self) -> mathopt.IncrementalSolver:
        return mathopt.IncrementalSolver(self._model, mathopt.SolverType.GLOP)


def _difference(left: Linear, right: tuple[Linear | float, ...]) -> Linear:
    if not right:
        return left
    row = Linear().plus(left)
    for term in right:
        if isinstance(term, Linear):
            row.plus(term, -1.0)
        else:
            row.constant -= term
    return row
