"""The whole step over its layers: bytes window by window, time, disk; small models as one program, large ones by columns.

Each layer enters through a few figures (`FIELDS`): bytes it holds between its windows and inside them, seconds of
compute and disk. A window's bytes are what every layer holds at that time plus the layer's own peak there, so two rows
per layer say the same as a row per instruction. Equal layers share columns (decisions with their figures) and pricing
problems, so the cost grows with layer types.

Bound: Lagrangian. With row duals of the master, sum of the cheapest priced column of each layer, by the pricing
problem's own proven bound (Dantzig and Wolfe 1960; for its use as a bound see Lasdon 1970).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from tightfit.planner.formulation.layer_constraints import FIELDS, KIB, MS, Block
from tightfit.planner.formulation.step_constraints import Rows, Terms, add_rows
from tightfit.planner.milp.highs import MARGIN
from tightfit.planner.milp.lp import Linear, Program
from tightfit.planner.schedule.layer_schedule import Column, measure
from tightfit.planner.search_options import Progress
from tightfit.planner.solve.integer_rounding import Rounding, Windows, rounded
from tightfit.planner.solve.master_lp import MOVE_PRICE, Relaxation, Relaxed, goal
from tightfit.planner.solve.pricing import Pool, Prices

JOINT_BINARIES = 150
"""models with fewer choices are solved as one program, to optimality"""
WHOLE_NODES = 20
"""of the search for whole columns: work is counted, not timed, so that the same input gives the same plan"""
WHOLE = 0.999
"""share of one column from which on a layer is not mixed"""
NEAR = 1e-3
"""share of the step's time; columns whose reduced cost is less may be part of a good choice"""
FEW = 5
"""such columns per layer"""
FREE = 12
"""layers at most, evenly among those that are mixed, that are not rounded where rounding all costs too much"""
CANDIDATES = 10
"""columns of each of these"""
FITTED = 30
"""columns of each layer that are fitted into what the mixtures hold"""
MARGINS = (0.0, 0.005, 0.02)
"""shares of the limit, by which these hold less than the mixtures where their transfers need more"""
FILLED = 5
"""mixed layers at most for which a column near the mixture is asked"""
WHOLE_GAP = 2e-3
"""of whole columns to the best ones"""
ENOUGH = 5e-5
"""share of the step's time; a whole column that costs so little more than a mixture stands for it"""
ROUNDS = 60
SHARE = 0.25
"""of what pricing could gain, left to the next round once there are new columns"""
Whole = tuple[float, tuple[Column, ...]]
"""a column per layer, and what the master says that they cost"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Columns chosen per layer, and the proof."""

    columns: tuple[Column, ...]
    bound_seconds: float
    """no plan of the class is faster"""
    proven: bool
    """the columns are optimal for the model, within tolerance"""


@dataclass(kw_only=True)
class Search:
    """One budget. `limit_bytes` None asks for the fewest bytes instead of the shortest step."""

    relaxation: Relaxation
    """over the columns found so far; whether its rows are careful, and which layers go forward twice: a bound is then one
    for these segments only"""
    limit_bytes: int | None
    deadline: float
    tolerance: float = 2e-3
    progress: Progress | None = None
    started: float = field(default_factory=time.monotonic)
    timely: bool = True
    """whether the search, for columns and for whole ones, came to its end before the deadline"""
    worth_seconds: float = float("inf")
    """a search for columns that shows that none of its plans is faster than this ends there"""
    thorough: bool = True
    """whether whole columns that a local search does not find are looked for by programs in whole numbers"""

    @property
    def pool(self) -> Pool:
        return self.relaxation.pool

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def _rows(self, program: Program, layers: list[Terms]) -> Rows:
        asked = self.relaxation
        return add_rows(program, self.pool.problem, layers, careful=asked.careful, segments=asked.segments)

    def report(self, stage: str, incumbent: float, bound: float) -> None:
        if self.progress is not None:
            gap = 1.0 if incumbent == float("inf") else (incumbent - bound) / incumbent if incumbent > 0 else 0.0
            seconds = time.monotonic() - self.started
            self.progress({"stage": stage, "incumbent": incumbent, "bound": bound, "gap": gap, "seconds": seconds})

    def _priced(self, stage: str, relaxed: Relaxed, best: float) -> None:
        """Where the limit is not kept, the value is one of bytes over it and says nothing of seconds."""
        kept = relaxed.over < 1e-4
        self.report(stage, relaxed.value / MS if kept else float("inf"), best / MS if kept else 0.0)

    # --- one program -----------------------------------------------------------------------------------------------

    def joint(self, *, priced: bool = True) -> Answer | None:
        """All blocks side by side: the optimum of the class. None where nothing fits. Without a price on moves the bound of its time is tight.

        Raises TimeoutError where the deadline strikes before there are columns, or a proof that none fit.
        """
        if self.limit_bytes is not None and self.limit_bytes < 0:
            return None
        problem = self.pool.problem
        program = Program()
        blocks = [Block(program, problem.types[kind]) for kind in problem.layer_type]
        layers = [{name: block.field(name) for name in FIELDS} for block in blocks]
        rows = self._rows(program, layers)
        if self.limit_bytes is not None:
            program.bounds(rows.bytes, 0.0, self.limit_bytes / KIB)
        result = program.solve(goal(rows, fewest_bytes=self.limit_bytes is None, priced=priced), self.left())
        if result.infeasible:
            return None
        if result.values is None:
            raise TimeoutError
        values = result.values
        columns = tuple(
            measure(problem.types[kind], block.decision(values)) for kind, block in zip(problem.layer_type, blocks)
        )
        return Answer(columns=columns, bound_seconds=self.bound(result.bound, priced=priced), proven=result.optimal)

    def bound(self, objective: float, *, priced: bool = True) -> float:
        """Seconds that no plan undercuts, from a bound on time + MOVE_PRICE * disk time (disk time <= time), or on time alone."""
        return max(0.0, objective * (1 - MARGIN) / (1 + (MOVE_PRICE if priced else 0.0)) / MS)

    # --- columns ---------------------------------------------------------------------------------------------------

    def columns(self, enough: float = 0.0) -> tuple[float, float, bool]:
        """Price columns until the bound meets the master, or the master is down to `enough` (ms, without a limit KiB): (bound,
        master value, whether the limit is kept).

        Past the deadline the bound is the best so far, and `timely` is False. Nothing is priced where what other budgets have
        proven shows that no plan is worth it.
        """
        limit = self.limit_bytes
        best, value, kept = 0.0 if limit is None else self.relaxation.proven(limit), float("inf"), False
        for turn in range(ROUNDS if self.bound(best) <= self.worth_seconds else 0):
            try:
                relaxed = self._relaxation(self.limit_bytes)
            except TimeoutError:
                self.timely = False
                break
            steady = value - relaxed.value <= self.tolerance / 4 * relaxed.value
            value, kept = relaxed.value, relaxed.over < 1e-4
            if value <= enough:
                break
            if turn == 0 and kept and value - best <= self.tolerance / 4 * value:
                # What other budgets have proven is good enough here.
                break
            gain, new = self._price(relaxed, best, steady=steady)
            # Where what is known from other budgets settles every layer, it is only now known how near that is.
            better = value - gain > best + self.tolerance / 16 * value
            if limit is not None and self.timely and value - gain > best:
                self.relaxation.prove(limit, value - gain, relaxed.limit_price)
            best = max(best, value - gain)
            self._priced("columns", relaxed, best)
            settled = value - best <= self.tolerance / 4 * value or not (new or better)
            if not self.timely or settled or self.bound(best) > self.worth_seconds:
                break
        return best, value, kept

    def holds(self) -> bool:
        """Whether the columns known so far, mixed, keep the limit."""
        return self.relaxed_seconds(self.limit_bytes)[1]

    def relaxed_seconds(self, limit_bytes: int | None) -> tuple[float, bool]:
        """What a step takes by the columns known so far, mixed; and whether that keeps `limit_bytes`."""
        relaxed = self._relaxation(limit_bytes)
        return relaxed.value / MS, relaxed.over < 1e-4

    def _price(self, relaxed: Relaxed, best: float, *, steady: bool) -> tuple[float, bool]:
        """Price layers until what could still be gained in the others is little: (most that could be gained, new columns).

        The most promising layer first; what its answer proves often settles layers at similar prices. Prices that still
        move are not worth a proof: unless they are `steady`, new columns end the round early.
        """
        pool, kinds, prices = self.pool, self.pool.problem.layer_type, relaxed.prices
        gap = min(1e-2, max(self.tolerance / 10, (relaxed.value - best) / relaxed.value / 10))
        least = [pool.bound(kind, prices[i]) for i, kind in enumerate(kinds)]

        def short(i: int) -> float:
            return max(0.0, relaxed.convexity[i] - least[i])

        def settled(i: int) -> bool:
            # A program is solved to `gap` of its cost: to ask again at such prices would prove no more.
            return not short(i) or pool.known(kinds[i], prices[i]) - least[i] <= 1.5 * gap * least[i]

        little = self.tolerance / 8 * relaxed.value
        some = max(little, SHARE * sum(map(short, range(len(kinds)))))
        open_ = [i for i in range(len(kinds)) if not settled(i)]
        new = False
        while open_ and sum(map(short, range(len(kinds)))) > (some if new and not steady else little):
            most = max(open_, key=short)
            try:
                new = pool.price(kinds[most], prices[most], gap, self.left()) or new
            except TimeoutError:
                self.timely = False
                break
            self._priced("pricing", relaxed, best)
            open_.remove(most)
            for i in [most, *open_]:
                if pool.stand_in[kinds[i]] == pool.stand_in[kinds[most]]:
                    least[i] = pool.bound(kinds[i], prices[i])
            open_ = [i for i in open_ if not settled(i)]
        return sum(map(short, range(len(kinds)))), new

    def _relaxation(self, limit_bytes: int | None) -> Relaxed:
        return self.relaxation.solve(limit_bytes, self.left())

    def _terms(self, kind: int, variables: list[int], columns: list[int]) -> Terms:
        """A layer's figures over the variables of some of its columns."""
        terms: Terms = {}
        for name, values in zip(FIELDS, self.pool.figures[kind][columns].T.tolist()):
            total = Linear()
            for variable, value in zip(variables, values):
                if value:
                    total.add(variable, value)
            terms[name] = total
        return terms

    def choose(self, limit_bytes: int | None) -> tuple[Column, ...] | None:
        """Good whole columns within `limit_bytes` over the pool; None where none fits.

        First those that a local search fits into what the mixtures hold. Where they cost too much, a few layers get a whole
        column near their mixture, and a few of the mixed ones are free to choose; then all are among what costs little more,
        or at last among any. Past the deadline the best so far is what there is, and `timely` is False; raises TimeoutError where
        there is none.
        """
        relaxed = self._relaxation(limit_bytes)
        if limit_bytes is not None and relaxed.over > 1e-4:
            return None
        found: Whole | None = None
        stages = (
            (0.0, self._fitted),
            (self._whole_gap, self._few_free),
            (self.tolerance / 2, self._all_near),
            (float("inf"), self._any),
        )[: None if self.thorough else 1]
        try:
            for enough, combined in stages:
                # What costs at most so much more than the mixture, as a share, is good enough.
                if found is not None and found[0] <= (1 + enough) * relaxed.value:
                    break
                whole = combined(limit_bytes, relaxed)
                if whole is not None and (found is None or whole[0] < found[0]):
                    found = whole
        except TimeoutError:
            self.timely = False
            if found is None:
                raise
        self.timely = self.timely and self.left() > 0
        return None if found is None else found[1]

    def _fitted(self, limit_bytes: int | None, relaxed: Relaxed) -> Whole | None:
        """Columns that hold no more in any window than the mixtures do; or a little less, where their transfers need more.

        Where memory has no price, the mixtures are whole but for ties; over segments' windows there is no such search.
        """
        if limit_bytes is None:
            return None
        problem, kinds = self.pool.problem, self.pool.problem.layer_type
        picks = rounded(kinds, relaxed.shares)
        if not relaxed.limit_price or self.relaxation.segments:
            return self._whole(limit_bytes, [[pick] for pick in picks])
        figures = [self.pool.figures[kind] for kind in kinds]
        mixtures = np.stack([self._mixture(relaxed, layer) for layer in range(len(kinds))])
        rounding = Rounding(kinds, figures, relaxed.prices, self._near(relaxed, FITTED))
        per_instruction = problem.profile.device.floor.instruction_bytes / KIB
        for margin in MARGINS:
            windows = Windows(relaxed.spare - margin * limit_bytes / KIB, mixtures, per_instruction)
            fitted = rounding.fitted(windows, picks, self.deadline)
            if fitted is None:
                return None
            whole = self._whole(limit_bytes, [[pick] for pick in fitted])
            if whole is not None:
                return whole
        return None

    def _few_free(self, limit_bytes: int | None, relaxed: Relaxed) -> Whole | None:
        """All rounded but for a few layers, which have candidates near their mixture and what costs least beyond."""
        kinds = self.pool.problem.layer_type
        mixed = [layer for layer, shares in enumerate(relaxed.shares) if np.max(shares) < WHOLE]
        free = {mixed[len(mixed) * turn // FREE] for turn in range(min(FREE, len(mixed)))}
        for layer in mixed[:FILLED]:
            mixture, prices = self._mixture(relaxed, layer), relaxed.prices[layer]
            best = self.pool.cheapest_within(kinds[layer], prices, mixture)
            worth = float(mixture @ prices) + ENOUGH * relaxed.value
            if best is None or self.pool.figures[kinds[layer]][best] @ prices > worth:
                try:
                    self.pool.fill(kinds[layer], prices, mixture, 1e-3, self.left())
                except TimeoutError:
                    self.timely = False
                    break
        candidates = [[pick] for pick in rounded(kinds, relaxed.shares)]
        for layer in free:
            order = np.argsort(self._reduced(relaxed, layer), kind="stable")
            candidates[layer] = order[:CANDIDATES].tolist()
        return self._whole(limit_bytes, candidates)

    def _all_near(self, limit_bytes: int | None, relaxed: Relaxed) -> Whole | None:
        """Every layer among the columns that cost little more than its mixture."""
        return self._whole(limit_bytes, self._near(relaxed, FEW))

    def _any(self, limit_bytes: int | None, _: Relaxed) -> Whole | None:
        """Every layer among all columns of its type."""
        counts = [len(self.pool.columns[kind]) for kind in self.pool.problem.layer_type]
        return self._whole(limit_bytes, [list(range(count)) for count in counts])

    def _near(self, relaxed: Relaxed, most: int) -> list[list[int]]:
        """Per layer: the columns, so many at most, that cost little more than its mixture; the best first."""
        near = []
        for layer in range(len(self.pool.problem.layer_type)):
            reduced = self._reduced(relaxed, layer)
            best = np.argsort(reduced, kind="stable")[:most].tolist()
            near.append([i for i in best if reduced[i] <= NEAR * relaxed.value])
        return near

    def _reduced(self, relaxed: Relaxed, layer: int) -> Prices:
        """By column: what it costs more than the mixture; nothing for those in it."""
        used = relaxed.shares[layer]
        reduced = self.pool.figures[self.pool.problem.layer_type[layer]] @ relaxed.prices[layer]
        reduced -= relaxed.convexity[layer]
        reduced[: len(used)][used > 1e-6] = 0.0
        return reduced

    @property
    def _whole_gap(self) -> float:
        return min(WHOLE_GAP, self.tolerance / 2)

    def _mixture(self, relaxed: Relaxed, layer: int) -> Prices:
        """FIELDS of what a layer mixes."""
        shares = relaxed.shares[layer]
        return shares @ self.pool.figures[self.pool.problem.layer_type[layer]][: len(shares)]

    def _whole(self, limit_bytes: int | None, candidates: list[list[int]]) -> Whole | None:
        """The best combination of one candidate per layer (indices into the pool's columns), with its objective.

        Raises TimeoutError when no time is left.
        """
        if limit_bytes is not None and limit_bytes < 0:
            return None
        problem = self.pool.problem
        program = Program()
        layers: list[Terms] = []
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
        result = program.solve(objective, self.left(), self._whole_gap, nodes=WHOLE_NODES)
        chosen = result.values
        if chosen is None:
            return None
        return result.objective, tuple(
            self.pool.columns[kind][allowed[max(range(len(variables)), key=lambda i: chosen[variables[i]])]]
            for kind, allowed, variables in zip(problem.layer_type, candidates, picks)
        )
