"""The restricted master problem: a linear program over the columns known so far, solved again and again from its last
basis.

From round to round there are a few columns more, from budget to budget another limit: the last basis is nearly the next
one, so a solution costs a fraction of the first. Numbers in brackets are those of the blocks in docs/formulation.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.formulation.step_constraints import LinearFigures, StepConstraints, add_step_constraints
from tightfit.planner.problem.layer_figures import FIELDS, KIB, LayerFigures
from tightfit.planner.solve.pricing import ColumnPool, Prices
from tightfit.planner.solvers.lp import INFINITY, GrowingProgram, Linear

MOVE_PRICE = 1e-4
"""(17) cost of a second of disk time, where a second of the step costs 1: breaks ties in favour of moving less"""
SECOND_PRICE = 1e-6
"""(17) KiB per ms of the step, where the fewest bytes are asked for: breaks ties"""
OVERFLOW_PRICE = 10.0
"""(18) ms per KiB over the limit, while no combination that fits is known"""


def goal(rows: StepConstraints, *, fewest_bytes: bool, priced: bool = True) -> Linear:
    """(17) Objective of the step: its time, with a small price on transfers where they are `priced`, or its bytes."""
    if fewest_bytes:
        return Linear().add(rows.bytes).plus(rows.total_ms, SECOND_PRICE)
    return Linear().plus(rows.total_ms).plus(rows.disk_ms, MOVE_PRICE if priced else 0.0)


@dataclass(frozen=True, kw_only=True)
class MasterLpSolution:
    """A solution of the restricted master problem: a mixture of columns for each layer, and dual prices."""

    value: float
    over: float
    """KiB by which the limit is passed"""
    prices: list[Prices]
    """per layer: dual prices of its figures"""
    convexity: list[float]
    """per layer: dual price of its convexity row, which is what its mixture costs at its prices"""
    shares: list[NDArray[np.float64]]
    """per layer: share of each of its type's columns"""
    limit_price: float
    """dual price of the limit: ms per KiB"""
    spare: NDArray[np.float64]
    """(3, layers): KiB of the limit that are free, at least, in every layer's forward, backward and evaluation; empty
    without a limit
    """


class MasterLp:
    """(18) The restricted master problem at any number of budgets, over one pool that may gain columns in between.

    With `careful` under constraints that plans can really keep (see `tightfit.planner.formulation.step_constraints`).
    """

    def __init__(self, pool: ColumnPool, *, careful: bool) -> None:
        self.pool = pool
        self.careful = careful
        self._program = program = GrowingProgram()
        self._definitions: list[list[int]] = []
        self._convexity: list[int] = []
        self._shares: list[list[int]] = [[] for _ in pool.problem.layer_type]
        layers: list[LinearFigures] = []
        for _ in pool.problem.layer_type:
            # (18) a layer's figures are those of its mixture, whose shares sum to 1; columns enter in `_grow`
            figures = [program.variable() for _ in FIELDS]
            self._definitions.append([program.at_least(Linear().add(figure)) for figure in figures])
            self._convexity.append(program.exactly(Linear(-1.0)))
            layers.append(LayerFigures(**{name: Linear().add(figure) for name, figure in zip(FIELDS, figures)}))
        rows = add_step_constraints(program, pool.problem, layers, careful=careful)
        # (18) bytes within the limit, or over it at a price
        self._over = program.variable()
        self._spare = list(rows.spare.values())
        self._bytes = rows.bytes
        self._limit = program.at_least(Linear().add(self._over).add(rows.bytes, -1.0))
        self._fastest = goal(rows, fewest_bytes=False).add(self._over, OVERFLOW_PRICE)
        self._fewest_bytes = goal(rows, fewest_bytes=True)
        self._solved: tuple[int | None, MasterLpSolution] | None = None
        """the limit last solved for, and its solution as long as no columns come in"""
        self._proven: list[tuple[int, float, float]] = []
        """(limit in bytes, lower bound of the objective there, by how many ms it falls per KiB that the limit grows)"""
        self._fewest = 0.0
        """lower bound of the objective without a limit, in KiB"""
        self.excluded = -1
        """the largest limit, in bytes, within which no plan of the class is proven to be"""

    def solve(self, limit_bytes: int | None, cutoff: Cutoff = NEVER) -> MasterLpSolution:
        """The shortest step within `limit_bytes`, or, without a limit, the fewest bytes; with dual prices of each
        layer's figures.

        Raises TimeoutError where `cutoff` strikes.
        """
        if self._grow():
            self._solved = None
        if self._solved is not None and self._solved[0] == limit_bytes:
            return self._solved[1]
        limited = limit_bytes is not None
        self._program.row_bounds(self._limit, -limit_bytes / KIB if limit_bytes is not None else -INFINITY, INFINITY)
        result = self._program.solve(self._fastest if limited else self._fewest_bytes, cutoff.left())
        duals, values = result.duals, result.values
        if duals is None or values is None:
            raise TimeoutError
        relaxed = MasterLpSolution(
            value=result.objective,
            over=values[self._over] if limited else 0.0,
            prices=[np.array([max(0.0, duals[row]) for row in rows]) for rows in self._definitions],
            convexity=[duals[row] for row in self._convexity],
            shares=[np.array([values[variable] for variable in variables]) for variables in self._shares],
            limit_price=max(0.0, duals[self._limit]),
            spare=self._free(values, limit_bytes),
        )
        self._solved = limit_bytes, relaxed
        return relaxed

    def _free(self, values: list[float], limit_bytes: int | None) -> NDArray[np.float64]:
        if limit_bytes is None:
            return np.zeros((3, 0))
        unused = limit_bytes / KIB - values[self._bytes]
        return unused + np.array([[left.value(values) for left in windows] for windows in self._spare])

    def prove(self, limit_bytes: int | None, bound: float, limit_price: float) -> None:
        """(22) Remember a Lagrangian bound of the objective at a limit, or without one; at the same prices it gives
        one at every limit.
        """
        if limit_bytes is None:
            self._fewest = max(self._fewest, bound)
            return
        self._proven.append((limit_bytes, bound, limit_price))

    def proven(self, limit_bytes: int | None) -> float:
        """(22) The highest bound of the objective at a limit that those remembered give, and at least 0; without a
        limit in KiB, with one in ms.
        """
        if limit_bytes is None:
            return self._fewest
        bounds = (bound - price * (limit_bytes - limit) / KIB for limit, bound, price in self._proven)
        return max(0.0, max(bounds, default=0.0))

    def _grow(self) -> bool:
        """Enter the columns that the pool has gained; whether there are any."""
        grown = False
        for layer, kind in enumerate(self.pool.problem.layer_type):
            shares = self._shares[layer]
            for values in self.pool.figures[kind][len(shares) :].tolist():
                entries = {row: -value for row, value in zip(self._definitions[layer], values) if value}
                shares.append(self._program.column(entries | {self._convexity[layer]: 1.0}))
                grown = True
        return grown
