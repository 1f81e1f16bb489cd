"""Translates 0/1 programs into integers for CP-SAT: bytes exactly, seconds in fixed fractions of one run of every
operator.

CP-SAT solves the programs of `milp_bound` and `subproblem` several times faster than HiGHS or SCIP do, with its
objective cut (`add_objective_cut`) and with linear relaxations at every node (`linearization_level` 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import floor

from ortools.sat.python import cp_model

from tightfit.planner.cutoff import Cutoff
from tightfit.planner.graphs.problem.work import building
from tightfit.planner.solvers.cp_sat import RESOLUTION, single_worker, solved
from tightfit.planner.solvers.lp import LinearProgram


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """CP-SAT's answer to a program."""

    values: list[int] | None
    """the best solution found, by variable; None: none was found"""
    bound: float
    """lower bound on the cost of every solution, in seconds or as `CpSatModel.least` counts"""
    ended: bool
    """whether the solver finished: `values` are then optimal, or, if None, the program is proven infeasible"""
    work: float
    """units that building and solving took"""


class CpSatModel:
    """A program of integer variables, nearly all of them 0 or 1; to be minimised once, with further rows before
    that.
    """

    def __init__(self, program: LinearProgram, units: Mapping[int, int], cutoff: Cutoff) -> None:
        """`units`: row -> the factor that turns its coefficients into integers (a row in parts of the budget: the
        budget in bytes); 1 for other rows. Rows have lower bounds only. Raises TimeoutError where `cutoff`
        strikes meanwhile, and so does solving; a solver that it ends answers with what it has.
        """
        assert all(most == float("inf") for most in program.most)
        self.model = cp_model.CpModel()
        self.cutoff = cutoff
        self.built = building(len(program.matrix[2]))
        self.chosen = [
            self.model.new_int_var(round(lower), round(upper), "") for lower, upper in zip(program.lower, program.upper)
        ]
        terms: list[tuple[list[cp_model.IntVar], list[int]]] = [([], []) for _ in program.least]
        for row, variable, entry in zip(*(part.tolist() for part in program.matrix)):
            variables, entries = terms[row]
            variables.append(self.chosen[variable])
            entries.append(round(entry * units.get(row, 1)))
        for row, ((variables, entries), least) in enumerate(zip(terms, program.least)):
            cutoff.check()
            self.model.add(cp_model.LinearExpr.weighted_sum(variables, entries) >= round(least * units.get(row, 1)))

    def fastest(self, seconds: Mapping[int, float], *, once: float, most: float, work: float) -> Chosen:
        """The cheapest solution, of those that cost at most `most` seconds. `seconds`: variable -> cost; `once`:
        seconds of one run of every operator, which set the resolution; `work`: units that the solver may take.
        """
        unit = max(once, 1e-300) / RESOLUTION
        spent = self._sum({variable: floor(cost / unit) for variable, cost in seconds.items()})
        if most < float("inf"):
            self.model.add(spent <= floor(most / unit))
        found = self._solve(spent, work)
        # No solution is left: those that cost more than `most` were left out.
        none = found.ended and found.values is None
        return replace(found, bound=most if none else found.bound * unit)

    def least(self, costs: Mapping[int, int], *, work: float) -> Chosen:
        """The cheapest solution by whole-numbered costs."""
        return self._solve(self._sum(costs), work)

    def _sum(self, costs: Mapping[int, int]) -> cp_model.LinearExprT:
        return cp_model.LinearExpr.weighted_sum([self.chosen[variable] for variable in costs], list(costs.values()))

    def _solve(self, cost: cp_model.LinearExprT, work: float) -> Chosen:
        self.model.minimize(cost)
        solver = single_worker()
        solver.parameters.linearization_level = 2
        solver.parameters.add_objective_cut = True
        solver.parameters.max_deterministic_time = work
        solver.parameters.max_time_in_seconds = self.cutoff.left()
        status = solved(solver, self.model)
        # CP-SAT rejects a model whose sums of bytes may come near 2^63.
        assert status != cp_model.MODEL_INVALID
        spent = self.built + solver.response_proto.deterministic_time
        if status == cp_model.INFEASIBLE:
            return Chosen(values=None, bound=float("inf"), ended=True, work=spent)
        found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
        return Chosen(
            values=[solver.value(variable) for variable in self.chosen] if found else None,
            bound=solver.best_objective_bound,
            ended=status == cp_model.OPTIMAL,
            work=spent,
        )
