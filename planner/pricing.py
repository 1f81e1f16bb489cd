"""Columns of the master problem: one layer type's decisions with their figures, found by pricing.

Pricing asks for the decision of a layer type that is cheapest at given prices of its figures (`FIELDS`): a mixed-integer
program. Every answer also proves that no decision is cheaper, and such a proof says something about other prices: the
cheapest cost is concave in the prices, figures are never negative, so all proofs together are an outer description
of what the layer type can do (`Hull`). Layers, and budgets, at prices between those asked before need no program of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
NOTHING = 1e-12
"""prices below it are rounding"""
PRICING_GAP = 1e-4
"""relative, of one pricing problem: their sum stays well below the tolerance of a search"""


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


class Hull:
    """Figures that no proof so far excludes: a linear program over FIELDS, one row per proof."""

    def __init__(self, kind: LayerType) -> None:
        self.model = mathopt.Model()
        least = {
            "forward_ms": MS * sum(op.seconds for op in kind.forward),
            "backward_ms": MS * (sum(op.seconds for op in kind.backward) + sum(u.seconds for u in kind.updates)),
        }
        self.figures = {name: self.model.add_variable(lb=least.get(name, 0.0)) for name in FIELDS}
        self.solver = mathopt.IncrementalSolver(self.model, mathopt.SolverType.GLOP)

    def prove(self, prices: Mapping[str, float], bound: float) -> None:
        """No decision costs less than `bound` at `prices`."""
        row = self.model.add_linear_constraint(lb=bound)
        for name, variable in self.figures.items():
            if prices[name] > NOTHING:
                row.set_coefficient(variable, prices[name])

    def bound(self, prices: Mapping[str, float]) -> float:
        """What the proofs say about the cheapest cost at `prices`."""
        self.model.minimize(
            mathopt.LinearSum([prices[name] * variable for name, variable in self.figures.items() if prices[name]])
        )
        result = self.solver.solve()
        if result.termination.reason != mathopt.TerminationReason.OPTIMAL:
            return 0.0
        # A hair below, for the solver's tolerance.
        return float(result.objective_value()) * (1 - 1e-7)


@dataclass(kw_only=True)
class Pool:
    """Columns found so far, per layer type, and what was proven; shared by every budget of one profile."""

    problem: Layered
    columns: list[list[Column]] = field(default_factory=list)
    blocks: list[tuple[mathopt.Model, Block]] = field(default_factory=list)
    hulls: list[Hull] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.columns = [[] for _ in self.problem.types]
        for kind in self.problem.types:
            model = mathopt.Model()
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
        mine = figures(column)
        for other in self.columns[kind]:
            theirs = figures(other)
            if all(theirs[name] <= mine[name] for name in FIELDS):
                return False
        self.columns[kind].append(column)
        return True

    def price(self, kind: int, prices: Mapping[str, float], seconds: float) -> bool:
        """Find the cheapest decision of a layer type at these prices and prove its cost; whether its column is new."""
        model, block = self.blocks[kind]
        goal = Linear()
        for name in FIELDS:
            if prices[name] > NOTHING:
                goal.plus(block.field(name), prices[name])
        model.minimize(goal.expression())
        result = solve_quietly(model, seconds, PRICING_GAP)
        if not result.has_primal_feasible_solution():
            raise TimeoutError
        self.hulls[kind].prove(prices, min(result.best_objective_bound(), result.objective_value()))
        return self.add(kind, block.decision(result.variable_values()))
