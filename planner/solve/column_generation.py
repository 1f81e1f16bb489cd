"""Decisions for all layers at one budget: small models as one mixed-integer program, large ones by column generation.

Each layer enters through a few figures (`FIELDS`): bytes it holds between its windows and inside them, seconds of
computation and disk. A window's bytes are what every layer holds at that time plus the layer's own peak there, so two
constraints per layer say the same as one per instruction. Equal layers share columns (decisions with their figures) and
pricing problems, so the cost grows with the number of layer types.

The bound is Lagrangian (20): at the master's dual prices, the least cost of each layer, as far as its pricing problem's
own bound proves it (Dantzig and Wolfe 1960; for its use as a bound see Lasdon 1970). Numbers in brackets are those of
the blocks in docs/formulation.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tightfit.planner.cutoff import Cutoff
from tightfit.planner.formulation.layer_constraints import LayerProgram
from tightfit.planner.formulation.step_constraints import LinearFigures, StepConstraints, add_step_constraints
from tightfit.planner.problem.layer_figures import FIELDS, KIB, MS, LayerFigures
from tightfit.planner.schedule.layer_schedule import Column, measure
from tightfit.planner.search_options import SearchProgress
from tightfit.planner.solve.integer_rounding import ColumnRounding, WindowBytes, rounded
from tightfit.planner.solve.master_lp import MOVE_PRICE, MasterLp, MasterLpSolution, goal
from tightfit.planner.solve.pricing import ColumnPool, Prices, TooLargeError
from tightfit.planner.solvers.highs import MARGIN
from tightfit.planner.solvers.lp import Linear, LinearProgram

JOINT_BINARIES = 150
"""models with at most so many integer variables are solved as one program, to optimality"""
WHOLE_NODES = 20
"""nodes of branch and bound for whole columns: work is counted, not timed, so that the same input gives the same
plan
"""
WHOLE = 0.999
"""share of one column from which on a layer counts as not mixed"""
NEAR = 1e-3
"""share of the step's time; only columns whose reduced cost is at most that are tried as whole columns near a
mixture
"""
FEW = 5
"""such columns per layer, where every layer chooses among them"""
FREE = 12
"""mixed layers at most, evenly spaced, that `_few_free` does not round"""
CANDIDATES = 10
"""columns that each of these layers chooses among"""
FITTED = 30
"""columns of each layer that the local search chooses among"""
MARGINS = (0.0, 0.005, 0.02)
"""shares of the limit by which what the local search chooses holds less than the mixtures, one after the other until it
fits
"""
FILLED = 5
"""mixed layers at most for which a new column near the mixture is sought"""
WHOLE_GAP = 2e-3
"""relative gap to which the programs over whole columns are solved"""
ENOUGH = 5e-5
"""share of the step's time; a whole column that costs at most that much more than a mixture stands for it"""
ROUNDS = 60
"""rounds of column generation at most"""
SHARE = 0.25
"""share of what pricing could still gain that is left to the next round, once there are new columns"""
WholeColumns = tuple[float, tuple[Column, ...]]
"""(objective, a column per layer)"""


def report(progress: SearchProgress | None, cutoff: Cutoff, stage: str, incumbent: float, bound: float) -> None:
    """Tell `progress` where a search is: seconds of a step of the best so far, and proven for all."""
    if progress is not None:
        gap = 1.0 if incumbent == float("inf") else (incumbent - bound) / incumbent if incumbent > 0 else 0.0
        elapsed = cutoff.elapsed
        progress({"stage": stage, "incumbent": incumbent, "bound": bound, "gap": gap, "seconds": elapsed})


@dataclass(frozen=True, kw_only=True)
class ChosenColumns:
    """Columns chosen per layer, and the proof."""

    columns: tuple[Column, ...]
    bound_seconds: float
    """no plan of the class is faster"""
    proven: bool
    """the columns are optimal for the model, within tolerance"""


@dataclass(kw_only=True)
class ColumnGeneration:
    """One budget. `limit_bytes` None asks for the fewest bytes instead of the shortest step."""

    relaxation: MasterLp
    """the restricted master problem; it says whether constraints are careful"""
    limit_bytes: int | None
    cutoff: Cutoff
    tolerance: float = 2e-3
    progress: SearchProgress | None = None
    watch: Callable[[MasterLpSolution], None] | None = None
    """called with the mixture of every round of column generation that keeps the limit"""
    worth_seconds: float = float("inf")
    """column generation ends once its bound shows that none of its plans is faster than this"""
    thorough: bool = True
    """whether integer programs look for whole columns where the local search finds none that are good enough"""

    @property
    def pool(self) -> ColumnPool:
        return self.relaxation.pool

    def _rows(self, program: LinearProgram, layers: list[LinearFigures]) -> StepConstraints:
        return add_step_constraints(program, self.pool.problem, layers, careful=self.relaxation.careful)

    def report_pricing(self, stage: str, relaxed: MasterLpSolution, best: float) -> None:
        """Report progress; where the limit is passed, the value is mostly the price of that and says nothing of
        seconds.
        """
        within_limit = relaxed.over < 1e-4
        incumbent, bound = (relaxed.value / MS, best / MS) if within_limit else (float("inf"), 0.0)
        report(self.progress, self.cutoff, stage, incumbent, bound)

    # --- one program -----------------------------------------------------------------------------------------------

    def joint(self, *, priced: bool = True) -> ChosenColumns | None:
        """(1) to (17) as one program: the optimum of the class; None where nothing fits. Without a price on transfers
        (`priced`) the bound of its time is tight.

        Raises TimeoutError where `cutoff` strikes before there are columns, or a proof that none fit.
        """
        limit = self.limit_bytes
        if limit is not None and limit < 0:
            return None
        problem = self.pool.problem
        program = LinearProgram()
        blocks = [LayerProgram(program, problem.types[kind]) for kind in problem.layer_type]
        layers = [block.figures() for block in blocks]
        rows = self._rows(program, layers)
        if limit is not None:
            program.bounds(rows.bytes, 0.0, limit / KIB)
        result = program.solve(goal(rows, fewest_bytes=limit is None, priced=priced), self.cutoff.left())
        if result.infeasible:
            if limit is not None and not self.relaxation.careful:
                self.relaxation.excluded = max(self.relaxation.excluded, limit)
            return None
        if limit is None:
            self.relaxation.prove(None, result.bound, 0.0)
        if result.values is None:
            raise TimeoutError
        values = result.values
        columns = tuple(
            measure(problem.types[kind], block.decision(values)) for kind, block in zip(problem.layer_type, blocks)
        )
        return ChosenColumns(
            columns=columns, bound_seconds=self.bound(result.bound, priced=priced), proven=result.optimal
        )

    def bound(self, objective: float, *, priced: bool = True) -> float:
        """Seconds that no plan undercuts, from a bound of time + MOVE_PRICE * disk time (disk time <= time), or of time
        alone.
        """
        return max(0.0, objective * (1 - MARGIN) / (1 + (MOVE_PRICE if priced else 0.0)) / MS)

    # --- columns ---------------------------------------------------------------------------------------------------

    def columns(self, enough: float = 0.0) -> tuple[float, float, bool]:
        """Column generation until the Lagrangian bound (20) meets the master's value, or that is at most `enough` (ms,
        without a limit KiB): (bound, master's value, whether the limit is kept).

        Raises TimeoutError where `cutoff` strikes; what is proven then is remembered (22). Nothing is priced where what
        other budgets have proven shows that no plan is worth it.
        """
        limit = self.limit_bytes
        best, value, within_limit = self.relaxation.proven(limit), float("inf"), False
        for round_number in range(ROUNDS if self.bound(best) <= self.worth_seconds else 0):
            relaxed = self._relaxation(limit)
            steady = value - relaxed.value <= self.tolerance / 4 * relaxed.value
            value, within_limit = relaxed.value, relaxed.over < 1e-4
            if value <= enough:
                break
            if round_number == 0 and within_limit and value - best <= self.tolerance / 4 * value:
                # What other budgets have proven is good enough here.
                break
            if self.watch is not None and within_limit:
                self.watch(relaxed)
            pricing = _PricingRound(self, relaxed, best)
            try:
                has_new = pricing.run(steady=steady)
            finally:
                # (20) the Lagrangian bound of this round, also where it is cut
                bound = value - pricing.gain()
                if bound > best:
                    self.relaxation.prove(limit, bound, relaxed.limit_price)
            # Proofs of other budgets may have settled every layer: then the bound has risen without a new column.
            has_risen = bound > best + self.tolerance / 16 * value
            best = max(best, bound)
            self.report_pricing("columns", relaxed, best)
            settled = value - best <= self.tolerance / 4 * value or not (has_new or has_risen)
            if settled or self.bound(best) > self.worth_seconds:
                break
        return best, value, within_limit

    def keeps_limit(self) -> bool:
        """Whether a mixture of the columns known so far keeps the limit."""
        return self.relaxed_seconds(self.limit_bytes)[1]

    def relaxed_seconds(self, limit_bytes: int | None) -> tuple[float, bool]:
        """Seconds of a step by the best mixture of the columns known so far, and whether it keeps `limit_bytes`."""
        relaxed = self._relaxation(limit_bytes)
        return relaxed.value / MS, relaxed.over < 1e-4

    def _relaxation(self, limit_bytes: int | None) -> MasterLpSolution:
        return self.relaxation.solve(limit_bytes, self.cutoff)

    def _terms(self, kind: int, variables: list[int], columns: list[int]) -> LinearFigures:
        """A layer's figures over the variables of some of its columns."""
        by_figure = dict(zip(FIELDS, self.pool.figures[kind][columns].T.tolist()))

        def mixed(name: str) -> Linear:
            total = Linear()
            for variable, value in zip(variables, by_figure[name]):
                if value:
                    total.add(variable, value)
            return total

        return LayerFigures.of(mixed)

    def choose(self, limit_bytes: int | None) -> tuple[Column, ...] | None:
        """(23) Good whole columns within `limit_bytes` from the pool; None where none fits.

        First those that a local search fits into what the mixtures hold. Where they cost too much, a few layers get a
        new column near their mixture, and integer programs choose: for a few of the mixed layers, then for all layers
        among columns that cost little more than the mixture, at last among all columns. Raises TimeoutError where
        `cutoff` strikes.
        """
        relaxed = self._relaxation(limit_bytes)
        if limit_bytes is not None and relaxed.over > 1e-4:
            return None
        best: WholeColumns | None = None
        options = self.pool.options
        stages = (
            (0.0, self._fitted, options.rounding),
            (self._whole_gap, self._few_free, options.few_free),
            (self.tolerance / 2, self._all_near, options.all_near),
            (float("inf"), self._any, True),
        )[: None if self.thorough else 1]
        for enough, stage, enabled in stages:
            if not enabled:
                continue
            # What costs at most this share more than the mixture is good enough.
            if best is not None and best[0] <= (1 + enough) * relaxed.value:
                break
            whole = stage(limit_bytes, relaxed)
            if whole is not None and (best is None or whole[0] < best[0]):
                best = whole
        return None if best is None else best[1]

    def near(self, limit_bytes: int, relaxed: MasterLpSolution, reserve: int) -> tuple[Column, ...] | None:
        """Whole columns within `limit_bytes` less `reserve`, near the mixture of `relaxed` at that limit, by the local
        search alone; None: it finds none.
        """
        whole = self._fitted(limit_bytes - reserve, relaxed, reserve)
        return None if whole is None else whole[1]

    def _fitted(self, limit_bytes: int | None, relaxed: MasterLpSolution, reserve: int = 0) -> WholeColumns | None:
        """Columns that hold no more in any window than the mixtures do less `reserve`, or a little less where their
        transfers need more memory.

        Where memory has no price, the mixtures are whole but for ties.
        """
        if limit_bytes is None:
            return None
        problem, kinds = self.pool.problem, self.pool.problem.layer_type
        picks = rounded(kinds, relaxed.shares)
        if not relaxed.limit_price:
            return self._whole(limit_bytes, [[pick] for pick in picks])
        figures = [self.pool.figures[kind] for kind in kinds]
        mixtures = np.stack([self._mixture(relaxed, layer) for layer in range(len(kinds))])
        rounding = ColumnRounding(kinds, figures, relaxed.prices, self._near(relaxed, FITTED))
        per_instruction = problem.profile.device.floor.instruction_bytes / KIB
        for margin in MARGINS:
            windows = WindowBytes(relaxed.spare - (reserve + margin * limit_bytes) / KIB, mixtures, per_instruction)
            fitted = rounding.fitted(windows, picks, self.cutoff)
            if fitted is None:
                return None
            whole = self._whole(limit_bytes, [[pick] for pick in fitted])
            if whole is not None:
                return whole
        return None

    def _few_free(self, limit_bytes: int | None, relaxed: MasterLpSolution) -> WholeColumns | None:
        """Every layer rounded but a few, which choose among the columns of least reduced cost; first, new columns are
        sought near a few of the mixtures.
        """
        kinds = self.pool.problem.layer_type
        mixed = [layer for layer, shares in enumerate(relaxed.shares) if np.max(shares) < WHOLE]
        free = {mixed[len(mixed) * number // FREE] for number in range(min(FREE, len(mixed)))}
        for layer in mixed[:FILLED]:
            mixture, prices = self._mixture(relaxed, layer), relaxed.prices[layer]
            best = self.pool.cheapest_within(kinds[layer], prices, mixture)
            worth = float(mixture @ prices) + ENOUGH * relaxed.value
            if best is None or self.pool.figures[kinds[layer]][best] @ prices > worth:
                try:
                    self.pool.fill(kinds[layer], prices, mixture, 1e-3, self.cutoff)
                except TooLargeError:
                    break
        candidates = [[pick] for pick in rounded(kinds, relaxed.shares)]
        for layer in free:
            order = np.argsort(self._reduced(relaxed, layer), kind="stable")
            candidates[layer] = order[:CANDIDATES].tolist()
        return self._whole(limit_bytes, candidates)

    def _all_near(self, limit_bytes: int | None, relaxed: MasterLpSolution) -> WholeColumns | None:
        """Every layer chooses among the columns that cost little more than its mixture."""
        return self._whole(limit_bytes, self._near(relaxed, FEW))

    def _any(self, limit_bytes: int | None, _: MasterLpSolution) -> WholeColumns | None:
        """Every layer chooses among all columns of its type."""
        counts = [len(self.pool.columns[kind]) for kind in self.pool.problem.layer_type]
        return self._whole(limit_bytes, [list(range(count)) for count in counts])

    def _near(self, relaxed: MasterLpSolution, most: int) -> list[list[int]]:
        """Per layer: the columns, `most` of them at most, that cost little more than its mixture; the best first."""
        near = []
        for layer in range(len(self.pool.problem.layer_type)):
            reduced = self._reduced(relaxed, layer)
            best = np.argsort(reduced, kind="stable")[:most].tolist()
            near.append([i for i in best if reduced[i] <= NEAR * relaxed.value])
        return near

    def _reduced(self, relaxed: MasterLpSolution, layer: int) -> Prices:
        """Reduced cost of each column of the layer's type; 0 for those in its mixture."""
        used = relaxed.shares[layer]
        reduced = self.pool.figures[self.pool.problem.layer_type[layer]] @ relaxed.prices[layer]
        reduced -= relaxed.convexity[layer]
        reduced[: len(used)][used > 1e-6] = 0.0
        return reduced

    @property
    def _whole_gap(self) -> float:
        return min(WHOLE_GAP, self.tolerance / 2)

    def _mixture(self, relaxed: MasterLpSolution, layer: int) -> Prices:
        """FIELDS of a layer's mixture."""
        shares = relaxed.shares[layer]
        return shares @ self.pool.figures[self.pool.problem.layer_type[layer]][: len(shares)]

    def _whole(self, limit_bytes: int | None, candidates: list[list[int]]) -> WholeColumns | None:
        """(23) The best combination of one candidate per layer (indices into the pool's columns), with its objective.

        Raises TimeoutError where `cutoff` strikes.
        """
        if limit_bytes is not None and limit_bytes < 0:
            return None
        problem = self.pool.problem
        program = LinearProgram()
        layers: list[LinearFigures] = []
        picks: list[list[int]] = []
        for kind, allowed in zip(problem.layer_type, candidates):
            variables = [program.choice() for _ in allowed]
            program.exactly(Linear.sum(variables), 1.0)
            layers.append(self._terms(kind, variables, allowed))
            picks.append(variables)
        rows = self._rows(program, layers)
        if limit_bytes is not None:
            program.bounds(rows.bytes, 0.0, limit_bytes / KIB)
        objective = goal(rows, fewest_bytes=limit_bytes is None)
        result = program.solve(objective, self.cutoff.left(), self._whole_gap, nodes=WHOLE_NODES)
        self.cutoff.check()
        chosen = result.values
        if chosen is None:
            return None
        return result.objective, tuple(
            self.pool.columns[kind][allowed[max(range(len(variables)), key=lambda i: chosen[variables[i]])]]
            for kind, allowed, variables in zip(problem.layer_type, candidates, picks)
        )


class _PricingRound:
    """Pricing at the dual prices of one solution of the master."""

    def __init__(self, search: ColumnGeneration, relaxed: MasterLpSolution, best: float) -> None:
        self.search, self.relaxed, self.best = search, relaxed, best
        self.kinds = search.pool.problem.layer_type
        self.accuracy = min(1e-2, max(search.tolerance / 10, (relaxed.value - best) / relaxed.value / 10))
        """relative gap to which programs are solved"""
        self.least = [search.pool.bound(kind, relaxed.prices[layer]) for layer, kind in enumerate(self.kinds)]
        """per layer: the proven least cost of a column"""

    def gain(self) -> float:
        """Most that could still be gained in all layers."""
        return sum(map(self._short, range(len(self.kinds))))

    def run(self, *, steady: bool) -> bool:
        """Price layers until little could be gained in the others; whether there are new columns.

        The layer with the most to gain comes first; what its solution proves often settles layers at similar prices.
        Prices that still change much are not worth a full proof: unless they are `steady`, new columns end the round
        early. Raises TimeoutError where the search is cut.
        """
        pool, kinds, prices = self.search.pool, self.kinds, self.relaxed.prices
        negligible = self.search.tolerance / 8 * self.relaxed.value
        worthwhile = max(negligible, SHARE * self.gain())
        unsettled = [layer for layer in range(len(kinds)) if not self._settled(layer)]
        has_new = False
        while unsettled and self.gain() > (worthwhile if has_new and not steady else negligible):
            chosen = max(unsettled, key=self._short)
            try:
                has_new = pool.price(kinds[chosen], prices[chosen], self.accuracy, self.search.cutoff) or has_new
            except TooLargeError:
                return self._improve() or has_new
            self.search.report_pricing("pricing", self.relaxed, self.best)
            unsettled.remove(chosen)
            for layer in [chosen, *unsettled]:
                if pool.stand_in[kinds[layer]] == pool.stand_in[kinds[chosen]]:
                    self.least[layer] = pool.bound(kinds[layer], prices[layer])
            unsettled = [layer for layer in unsettled if not self._settled(layer)]
        return has_new

    def _short(self, layer: int) -> float:
        """Most that pricing the layer could gain: its mixture's cost less the proven least cost."""
        return max(0.0, self.relaxed.convexity[layer] - self.least[layer])

    def _settled(self, layer: int) -> bool:
        # A pricing problem is solved to `accuracy` of its cost: solving it again at such prices would prove no more.
        known = self.search.pool.known(self.kinds[layer], self.relaxed.prices[layer])
        return not self._short(layer) or known - self.least[layer] <= 1.5 * self.accuracy * self.least[layer]

    def _improve(self) -> bool:
        """Look for a new column of each type without programs, at the prices of its middle layer; whether there are
        any.
        """
        pool, has_new = self.search.pool, False
        for kind in range(len(pool.columns)):
            layers = [layer for layer, other in enumerate(self.kinds) if other == kind]
            prices = self.relaxed.prices[layers[len(layers) // 2]]
            has_new = pool.improve(kind, prices, self.search.cutoff) or has_new
        return has_new
