"""Columns of the master problem: one layer type's decisions with their figures, found by pricing.

The pricing problem asks for the decision of a layer type that is cheapest at given prices of its figures (`FIELDS`): a
mixed-integer program. Each solution also proves that no decision is cheaper, and such a proof says something about
other prices: the least cost is concave in the prices and figures are never negative, so all proofs together are an
outer description of the figures that the layer type can have (`FigureHull`). Layers, and budgets, at prices between
those asked before need no program of their own. Numbers in brackets are those of the blocks in docs/formulation.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from ortools.math_opt.python import mathopt

from tightfit.planner.cutoff import Cutoff
from tightfit.planner.formulation.layer_constraints import LayerProgram
from tightfit.planner.formulation.layer_variables import choice_count
from tightfit.planner.problem.layer_figures import FIELDS, MS
from tightfit.planner.problem.layer_types import LayeredStep, LayerType
from tightfit.planner.schedule.layer_schedule import Column, Decision, measure
from tightfit.planner.search_options import ALL, SearchOptions
from tightfit.planner.solvers.lp import INFINITY, OBJECTIVE_ONLY, Linear, LinearProgram
from tightfit.planner.solvers.solver_interrupts import uninterrupted

HELD = ("between", "outside")
"""those of FIELDS that a layer holds between its windows"""
HOLDING = [FIELDS.index(name) for name in HELD]
ROUNDING = 1e-6
"""KiB that a sum may be off"""
Prices = NDArray[np.float64]
"""ms per unit of each of FIELDS"""
MOST_PAIRS = 500_000
"""pairs of a layer type's operators up to which its program is built: time and rows grow with them"""
NOTHING = 1e-12
"""ms per unit; lower prices are taken for 0"""
LITTLE = 1e-3
"""share of its cost by which a decision is cheaper than another at least to be preferred"""


class TooLargeError(Exception):
    """The program of a layer type would be too large to build."""


def figures_row(column: Column) -> Prices:
    """A column's figures in the order of FIELDS, in KiB and ms."""
    return np.array(column.row, dtype=np.float64)


class FigureHull:
    """(21) Figures that no proof so far excludes: a linear program over FIELDS, one row per proof."""

    def __init__(self, kind: LayerType) -> None:
        self.model = mathopt.Model()
        least = {
            "forward_seconds": MS * sum(op.seconds for op in kind.forward),
            "backward_seconds": MS * (sum(op.seconds for op in kind.backward) + sum(u.seconds for u in kind.updates)),
        }
        self.figures = [self.model.add_variable(lb=least.get(name, 0.0)) for name in FIELDS]
        self.solver = mathopt.IncrementalSolver(self.model, mathopt.SolverType.GLOP)
        self._bounds: dict[bytes, float] = {}
        """prices -> bound, since the last proof: equal layers are often at equal prices"""

    def prove(self, prices: Prices, bound: float) -> None:
        """No decision costs less than `bound` at `prices`."""
        self._bounds.clear()
        row = self.model.add_linear_constraint(lb=bound)
        for price, variable in zip(prices.tolist(), self.figures):
            if price > NOTHING:
                row.set_coefficient(variable, price)

    def bound(self, prices: Prices) -> float:
        """A lower bound of the least cost at `prices`, from the proofs."""
        key = prices.tobytes()
        bound = self._bounds.get(key)
        if bound is None:
            bound = self._bound(prices)
            if bound:
                self._bounds[key] = bound
        return bound

    def _bound(self, prices: Prices) -> float:
        self.model.minimize(
            mathopt.LinearSum([price * variable for price, variable in zip(prices.tolist(), self.figures) if price])
        )
        try:
            result = uninterrupted(lambda: self.solver.solve(model_params=OBJECTIVE_ONLY))
        except (
            RuntimeError,
            ValueError,
            AttributeError,
        ):  # as in `tightfit.planner.solvers.highs`: MathOpt's conversion fails by itself
            # Glop now and then fails in a warm start; without its answer there is no bound.
            self.solver = mathopt.IncrementalSolver(self.model, mathopt.SolverType.GLOP)
            return 0.0
        if result.termination.reason != mathopt.TerminationReason.OPTIMAL:
            return 0.0
        # A hair below, for the solver's tolerance.
        return float(result.objective_value()) * (1 - 1e-7)


@dataclass(kw_only=True)
class ColumnPool:
    """Columns found so far, per layer type, and what was proven of others; shared by every budget of one profile."""

    problem: LayeredStep
    options: SearchOptions = ALL
    columns: list[list[Column]] = field(default_factory=list)
    figures: list[NDArray[np.float64]] = field(default_factory=list)
    """per layer type: a row of FIELDS per column"""
    stand_in: list[int] = field(default_factory=list)
    """per layer type: the type, itself or another, whose programs and proofs stand for its own"""
    blocks: dict[int, LayerProgram] = field(default_factory=dict)
    """programs built so far, of the types that stand in"""
    _tried: set[tuple[int, Decision]] = field(default_factory=set)
    hulls: dict[int, FigureHull] = field(default_factory=dict)
    """type that stands in -> its proofs"""
    answers: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    """type that stands in -> a row of FIELDS, as the program counts them, per program solved"""
    programs: int = 0
    """mixed-integer programs solved so far"""

    def __post_init__(self) -> None:
        self.columns = [[] for _ in self.problem.types]
        types = self.problem.types
        for kind in types:
            self.figures.append(np.empty((0, len(FIELDS))))
            own_number = len(self.stand_in)
            candidates = range(len(types)) if self.options.stand_ins else (own_number,)
            stand_ins = [candidate for candidate in candidates if _undercuts(types[candidate], kind)]
            self.stand_in.append(min(stand_ins, key=lambda candidate: len(types[candidate].leaves_evaluate)))
        for number in sorted(set(self.stand_in)):
            self.hulls[number] = FigureHull(types[number])
            self.answers[number] = np.empty((0, len(FIELDS)))

    @property
    def binaries(self) -> int:
        """Integer variables of the whole step as one program."""
        counts = [choice_count(kind) for kind in self.problem.types]
        return sum(counts[kind] for kind in self.problem.layer_type)

    def block(self, number: int) -> LayerProgram:
        """The program of a type that stands in. Raises TooLargeError where the type has too many operators."""
        if number not in self.blocks:
            kind = self.problem.types[number]
            if (len(kind.forward) + len(kind.backward)) ** 2 > MOST_PAIRS:
                raise TooLargeError
            self.blocks[number] = LayerProgram(LinearProgram(), kind)
        return self.blocks[number]

    def bound(self, kind: int, prices: Prices) -> float:
        """(21) A lower bound of a layer type's least cost at `prices`, from its proofs."""
        return self.hulls[self.stand_in[kind]].bound(prices)

    def add(self, kind: int, decision: Decision) -> bool:
        """Add the decision's column, with figures counted on its schedule; whether it is new and no column is as good
        in every figure.
        """
        if (kind, decision) in self._tried:
            return False
        self._tried.add((kind, decision))
        column = measure(self.problem.types[kind], decision)
        row = figures_row(column)
        if (self.figures[kind] <= row).all(axis=1).any():
            return False
        self.columns[kind].append(column)
        self.figures[kind] = np.vstack([self.figures[kind], row])
        return True

    def known(self, kind: int, prices: Prices) -> float:
        """What the cheapest solution of a layer type's programs so far costs at `prices`.

        As the program counts, that is: it leaves out a few instructions of which it is not certain (10).
        """
        return float(np.min(self.answers[self.stand_in[kind]] @ prices, initial=INFINITY))

    def price(self, kind: int, prices: Prices, gap: float, cutoff: Cutoff) -> bool:
        """(19) Find the cheapest decision of a layer type at these prices, to a relative `gap`, and prove a bound of
        its cost.

        Returns whether its column is new. Raises TimeoutError where `cutoff` strikes, and TooLargeError.
        """
        stand_in = self.stand_in[kind]
        block = self.block(stand_in)
        goal = Linear()
        figures = block.figures().values()
        for figure, price in zip(figures, prices.tolist()):
            if price > NOTHING:
                goal.plus(figure, price)
        self.programs += 1
        result = block.program.solve(goal, cutoff.left(), gap)
        if result.values is None:
            raise TimeoutError
        self.hulls[stand_in].prove(prices, min(result.bound, result.objective))
        values = [figure.value(result.values) for figure in figures]
        self.answers[stand_in] = np.vstack([self.answers[stand_in], values])
        decision = block.decision(result.values)
        new = [other for other, shared in enumerate(self.stand_in) if shared == stand_in and self.add(other, decision)]
        return kind in new

    def improve(self, kind: int, prices: Prices, cutoff: Cutoff) -> bool:
        """Add the cheapest decision at `prices` that changing one fate at a time leads to, from the cheapest column
        known that stores all that cannot be made again; whether it is new.

        For layers whose program is too large to build. It proves nothing. Raises TimeoutError where `cutoff` strikes.
        """
        layer_type = self.problem.types[kind]
        stored = [layer_type.lasting <= column.decision.keep | column.decision.offload for column in self.columns[kind]]
        costs = np.where(stored, self.figures[kind] @ prices, INFINITY)
        best, least = self.columns[kind][int(np.argmin(costs))].decision, float(np.min(costs))
        groups = _decided_together(layer_type)
        unchanged = 0
        for group in itertools.cycle(groups):
            unchanged += 1
            for decision in _other_fates(layer_type, best, group):
                cutoff.check()
                cost = float(figures_row(measure(layer_type, decision)) @ prices)
                if cost < (1 - LITTLE) * least:
                    best, least, unchanged = decision, cost, 0
            if unchanged >= len(groups):
                break
        return self.add(kind, best)

    def cheapest_within(self, kind: int, prices: Prices, most: Prices) -> int | None:
        """The cheapest column known that holds no more between its windows than the figures `most`."""
        fits = (self.figures[kind][:, HOLDING] <= most[HOLDING] + ROUNDING).all(axis=1)
        return int(np.argmin(np.where(fits, self.figures[kind] @ prices, INFINITY))) if fits.any() else None

    def fill(self, kind: int, prices: Prices, most: Prices, gap: float, cutoff: Cutoff) -> None:
        """Add the cheapest decision at `prices` that holds no more between its windows than the figures `most`.

        Pricing alone finds vertices of the convex hull of a layer's figures; where the master mixes two of them, this
        is a whole column near the mixture. Raises TimeoutError where `cutoff` strikes, and TooLargeError.
        """
        block = self.block(self.stand_in[kind])
        limited = (block.most_between, block.most_outside)
        for variable, name in zip(limited, HELD):
            block.program.bounds(variable, 0.0, float(most[FIELDS.index(name)]) + ROUNDING)
        try:
            goal = Linear()
            for figure, price in zip(block.figures().values(), prices.tolist()):
                goal.plus(figure, max(price, NOTHING))
            result = block.program.solve(goal, cutoff.left(), gap)
            cutoff.check()
            if result.values is not None:
                self.add(kind, block.decision(result.values))
        finally:
            for variable in limited:
                block.program.bounds(variable, 0.0, INFINITY)


def _decided_together(kind: LayerType) -> list[frozenset[str]]:
    """The candidates in groups of one fate: what one operator makes, in all tiles."""
    groups: dict[int | str, set[str]] = {}
    for value in kind.candidates:
        first = kind.alike.get(value, value)
        maker = kind.producer.get(first)
        groups.setdefault(first if maker is None else maker.index, set()).add(value)
    return [frozenset(group) for group in groups.values()]


def _other_fates(kind: LayerType, decision: Decision, group: frozenset[str]) -> Iterator[Decision]:
    """The decisions under which all of `group` is kept, or offloaded as far as it may be, or made again where it can
    be.
    """
    keep, offload = decision.keep - group, decision.offload - group
    to_disk = group & kind.offloadable
    fates = [(keep | group, offload), (keep | group - to_disk, offload | to_disk)]
    if group.isdisjoint(kind.lasting):
        fates.append((keep, offload))
    for kept, offloaded in dict.fromkeys(fates):
        if (kept, offloaded) != (decision.keep, decision.offload):
            yield replace(decision, keep=kept, offload=offloaded)


def _undercuts(stand_in: LayerType, other: LayerType) -> bool:
    """Whether no decision costs `stand_in` more than `other`: they differ only in what an evaluation leaves, `stand_in`
    no more.
    """
    leaves_no_more = stand_in.leaves_evaluate <= other.leaves_evaluate
    return leaves_no_more and replace(stand_in, leaves_evaluate=other.leaves_evaluate) == other
