"""Columns of the master problem: one layer type's decisions with their figures, found by pricing.

Pricing asks for the decision of a layer type that is cheapest at given prices of its figures (`FIELDS`): a mixed-integer
program. Every answer also proves that no decision is cheaper, and such a proof says something about other prices: the
cheapest cost is concave in the prices, figures are never negative, so all proofs together are an outer description
of what the layer type can do (`Hull`). Layers, and budgets, at prices between those asked before need no program of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from ortools.math_opt.python import mathopt

from planner.formulation import KIB, MS, Block, Linear
from planner.layers import Layered, LayerType
from planner.quiet import solve_quietly
from planner.windows import Column, Decision, measure

FIELDS = (
    "forward_peak",
    "backward_peak",
    "evaluate_peak",
    "between",
    "outside",
    "forward_ms",
    "backward_ms",
    "reads_forward_ms",
    "reads_backward_ms",
    "spills_forward_ms",
    "fetches_backward_ms",
    "states_fetched_ms",
    "states_spilled_ms",
    "instructions",
)
Prices = NDArray[np.float64]
"""ms per unit of each of FIELDS"""
NOTHING = 1e-12
"""prices below it are rounding"""


def figures(column: Column) -> dict[str, float]:
    """FIELDS of a column, in KiB and ms."""
    return {
        "forward_peak": column.forward_peak / KIB,
        "backward_peak": column.backward_peak / KIB,
        "evaluate_peak": column.evaluate_peak / KIB,
        "between": column.between / KIB,
        "outside": column.outside / KIB,
        "forward_ms": column.forward_seconds * MS,
        "backward_ms": column.backward_seconds * MS,
        "reads_forward_ms": column.reads_forward * MS,
        "reads_backward_ms": column.reads_backward * MS,
        "spills_forward_ms": column.spills_forward * MS,
        "fetches_backward_ms": column.fetches_backward * MS,
        "states_fetched_ms": column.states_fetched * MS,
        "states_spilled_ms": column.states_spilled * MS,
        "instructions": float(column.instructions),
    }


def figures_row(column: Column) -> Prices:
    """`figures` in the order of FIELDS."""
    return np.array(list(figures(column).values()), dtype=np.float64)


class Hull:
    """Figures that no proof so far excludes: a linear program over FIELDS, one row per proof."""

    def __init__(self, kind: LayerType) -> None:
        self.model = mathopt.Model()
        least = {
            "forward_ms": MS * sum(op.seconds for op in kind.forward),
            "backward_ms": MS * (sum(op.seconds for op in kind.backward) + sum(u.seconds for u in kind.updates)),
        }
        self.figures = [self.model.add_variable(lb=least.get(name, 0.0)) for name in FIELDS]
        self.solver = mathopt.IncrementalSolver(self.model, mathopt.SolverType.GLOP)

    def prove(self, prices: Prices, bound: float) -> None:
        """No decision costs less than `bound` at `prices`."""
        row = self.model.add_linear_constraint(lb=bound)
        for price, variable in zip(prices.tolist(), self.figures):
            if price > NOTHING:
                row.set_coefficient(variable, price)

    def bound(self, prices: Prices) -> float:
        """What the proofs say about the cheapest cost at `prices`."""
        self.model.minimize(
            mathopt.LinearSum([price * variable for price, variable in zip(prices.tolist(), self.figures) if price])
        )
        try:
            result = self.solver.solve()
        except (
            RuntimeError,
            ValueError,
            AttributeError,
        ):  # Glop gave up, and MathOpt's conversion of its status fails too
            self.solver = mathopt.IncrementalSolver(self.model, mathopt.SolverType.GLOP)
            return 0.0
        if result.termination.reason != mathopt.TerminationReason.OPTIMAL:
            return 0.0
        # A hair below, for the solver's tolerance.
        return float(result.objective_value()) * (1 - 1e-7)


@dataclass(kw_only=True)
class Pool:
    """Columns found so far, per layer type, and what was proven; shared by every budget of one profile."""

    problem: Layered
    columns: list[list[Column]] = field(default_factory=list)
    figures: list[NDArray[np.float64]] = field(default_factory=list)
    """per layer type: a row of FIELDS per column"""
    blocks: list[tuple[mathopt.Model, Block]] = field(default_factory=list)
    hulls: list[Hull] = field(default_factory=list)
    programs: int = 0
    """mixed-integer programs solved so far"""

    def __post_init__(self) -> None:
        self.columns = [[] for _ in self.problem.types]
        for kind in self.problem.types:
            model = mathopt.Model()
            self.figures.append(np.empty((0, len(FIELDS))))
            self.blocks.append((model, Block(model, kind)))
            self.hulls.append(Hull(kind))

    @property
    def binaries(self) -> int:
        """Choices of the whole step."""
        counts = [sum(variable.integer for variable in model.variables()) for model, _ in self.blocks]
        return sum(counts[kind] for kind in self.problem.layer_type)

    def add(self, kind: int, decision: Decision) -> bool:
        """Whether the decision's column is new."""
        column = measure(self.problem.types[kind], decision)
        mine = figures_row(column)
        if (self.figures[kind] <= mine).all(axis=1).any():
            return False
        self.columns[kind].append(column)
        self.figures[kind] = np.vstack([self.figures[kind], mine])
        return True

    def cheapest(self, kind: int, prices: Prices) -> float:
        """What the cheapest known column of a layer type costs at `prices`."""
        return float((self.figures[kind] @ prices).min())

    def price(self, kind: int, prices: Prices, gap: float, seconds: float) -> bool:
        """Find the cheapest decision of a layer type at these prices, to a relative `gap`, and prove a bound of its cost.

        Returns whether its column is new. Raises TimeoutError where `seconds` do not suffice.
        """
        model, block = self.blocks[kind]
        goal = Linear()
        for name, price in zip(FIELDS, prices.tolist()):
            if price > NOTHING:
                goal.plus(block.field(name), price)
        model.minimize(goal.expression())
        self.programs += 1
        result = solve_quietly(model, seconds, gap)
        if not result.has_primal_feasible_solution():
            raise TimeoutError
        self.hulls[kind].prove(prices, min(result.best_objective_bound(), result.objective_value()))
        return self.add(kind, block.decision(result.variable_values()))

    def fill(self, kind: int, prices: Prices, most: Prices, gap: float, seconds: float) -> None:
        """Add the cheapest decision at `prices` that holds no more between its windows than the figures `most`.

        Pricing alone finds corners of what a layer can do; where the master mixes two of them, this is a whole one near.
        """
        model, block = self.blocks[kind]
        rows = []
        for name in ("between", "outside"):
            held = block.field(name)
            row = model.add_linear_constraint(ub=float(most[FIELDS.index(name)]) - held.constant + 1e-6)
            for variable, coefficient in held.terms.items():
                row.set_coefficient(variable, coefficient)
            rows.append(row)
        try:
            goal = Linear()
            for name, price in zip(FIELDS, prices.tolist()):
                goal.plus(block.field(name), max(price, NOTHING))
            model.minimize(goal.expression())
            result = solve_quietly(model, seconds, gap)
            if result.has_primal_feasible_solution():
                self.add(kind, block.decision(result.variable_values()))
        finally:
            for row in rows:
                model.delete_linear_constraint(row)
