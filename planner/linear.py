"""Linear expressions and programs that are cheap to build: variables are numbers, rows are lists.

MathOpt gets a program as a whole, in one message: built row by row through its own objects, the rows of a layer take as
long as solving them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

from planner.quiet import solve_quietly

INFINITY = float("inf")
Key = tuple[float, frozenset[tuple[int, float]]]


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

    def key(self) -> Key:
        """Equal for equal expressions."""
        return self.constant, frozenset(self.terms.items())

    def value(self, values: Sequence[float]) -> float:
        return self.constant + sum(c * values[v] for v, c in self.terms.items())


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What the solver says of a program, by the numbers of its variables and rows."""

    values: list[float] | None
    """of the best point found; None: none was found"""
    duals: list[float] | None
    """of a program without whole numbers, solved to its end"""
    objective: float
    bound: float
    """no point has a lower objective"""
    optimal: bool
    infeasible: bool


class Program:
    """Minimise a linear expression under rows; grows until it is first solved."""

    def __init__(self) -> None:
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.whole: list[bool] = []
        self.least: list[float] = []
        self.most: list[float] = []
        """per row: what its terms come to at least, and at most"""
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._entries: list[float] = []

    def variable(self, lower: float = 0.0, upper: float = INFINITY, *, whole: bool = False) -> int:
        self.lower.append(lower)
        self.upper.append(upper)
        self.whole.append(whole)
        return len(self.lower) - 1

    def choice(self) -> int:
        """A variable that is 0 or 1."""
        return self.variable(0.0, 1.0, whole=True)

    def at_least(self, left: Linear, *right: Linear | float) -> int:
        """Row: `left` >= the sum of `right`; its number."""
        row = _difference(left, right)
        return self._row(row, -row.constant, INFINITY)

    def exactly(self, left: Linear, *right: Linear | float) -> int:
        """Row: `left` = the sum of `right`; its number."""
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
        """As `planner.quiet.solve_quietly`; the objective is `goal`."""
        model = self._model
        model.objective.clear()
        model.objective.offset = goal.constant
        for variable, coefficient in goal.terms.items():
            if coefficient:
                model.objective.set_linear_coefficient(self._variables[variable], coefficient)
        result = solve_quietly(model, seconds, gap, nodes)
        found = result.has_primal_feasible_solution()
        reason = result.termination.reason
        whole = any(self.whole)
        return Solution(
            values=result.variable_values(self._variables) if found else None,
            duals=result.dual_values(self._constraints) if not whole and result.has_dual_feasible_solution() else None,
            objective=result.objective_value() if found else INFINITY,
            bound=float(result.termination.objective_bounds.dual_bound),
            optimal=reason == mathopt.TerminationReason.OPTIMAL,
            infeasible=reason == mathopt.TerminationReason.INFEASIBLE,
        )

    def bounds(self, variable: int, lower: float, upper: float) -> None:
        """Move the bounds of a variable, also between two solutions."""
        self.lower[variable], self.upper[variable] = lower, upper
        if "_model" in self.__dict__:
            self._variables[variable].lower_bound = lower
            self._variables[variable].upper_bound = upper

    @cached_property
    def matrix(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """(rows, columns, entries), sorted by row, then by column."""
        rows, columns = np.array(self._rows, dtype=np.int64), np.array(self._columns, dtype=np.int64)
        order = np.lexsort((columns, rows))
        return rows[order], columns[order], np.array(self._entries, dtype=np.float64)[order]

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
        proto.linear_constraint_matrix.row_ids.extend(rows.tolist())
        proto.linear_constraint_matrix.column_ids.extend(columns.tolist())
        proto.linear_constraint_matrix.coefficients.extend(entries.tolist())
        model = mathopt.Model.from_model_proto(proto)
        self._variables = list(model.variables())
        self._constraints = list(model.linear_constraints())
        return model


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
