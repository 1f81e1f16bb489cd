"""Re-optimises a stretch of a schedule by an integer program, with memory counted at every run, while the rest stays as
it is.

A stretch is a range of stages. Within it operators may run again at the given places. Each output has one variable, in
[0, 1], for each interval between the places where it may be made or read: whether it lives there. Once runs are integer
these need not be declared so. At the borders of the stretch:

- an output that was freed before the stretch may be carried into it instead, if it fits beside the runs in between;
- an output that a later run reads before it is made again must live at the end;
- an output may be carried out of the stretch up to its next re-run, which is then spared, if it fits beside the runs in
  between.

A stretch over all stages with all places covers the whole class: what it proves then holds for the class.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.graphs.bounds.cp_sat_model import CpSatModel
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, memory, peak_bytes, pruned, runs
from tightfit.planner.solvers.cp_sat import RESOLUTION
from tightfit.planner.solvers.lp import Linear, LinearProgram

OVER = 100
"""runs of every operator that are as bad as exceeding the budget by as much again: more than any re-runs that are worth
having
"""
MOST_PROVEN = 158
"""number of operators up to which the lowest peak is proven, for which the program has all places"""
BETTER = 5e-7
"""by which share of one run of every operator the new stretch must be faster, at least"""

Term = tuple[int, int]
"""(variable, bytes)"""


@dataclass(frozen=True, kw_only=True)
class Solved:
    """Answer of `Subproblem.solve`."""

    reruns: frozenset[Rerun] | None
    """the whole schedule with the stretch re-optimised; None: nothing better was found"""
    ended: bool
    """whether the solver finished: no better stretch exists with these places"""
    work: float
    """units that building and solving took"""


@dataclass(frozen=True, kw_only=True)
class Lowest:
    """Answer of `lowest_peak`."""

    reruns: frozenset[Rerun] | None
    """the schedule of lowest peak found; None: none was found"""
    bytes: int
    """lower bound on the peak of every schedule with these places"""
    ended: bool
    """whether the solver finished"""


class Subproblem:
    """The integer program of one stretch: stages `first` to `last` - 1 of the schedule `reruns`, which may exceed the
    budget.

    `places` are where operators may run again, beside those where they do in `reruns`. `__init__`, `solve` and `lowest`
    raise TimeoutError where `cutoff` strikes before the solver begins; the solver may take so many units of `work`.
    """

    def __init__(
        self,
        dag: Dag,
        budget: int,
        reruns: frozenset[Rerun],
        first: int,
        last: int,
        places: Iterable[Rerun],
        cutoff: Cutoff = NEVER,
    ) -> None:
        self.cutoff = cutoff
        self.dag = dag
        self.budget = budget
        self.reruns = reruns
        self.first, self.last = first, last
        self.program = LinearProgram()
        self.in_bytes: dict[int, int] = {}
        """rows whose coefficients are in units of the budget -> the budget in bytes"""
        self.inside = {rerun for rerun in reruns if first <= rerun[0] < last}
        again = {*places, *self.inside}
        self.places = sorted({*again, *((stage, stage) for stage in range(first, last))})
        self.again: dict[Rerun, int] = {}
        self.spared: dict[Rerun, int] = {}
        """re-runs after the stretch -> variable: whether the re-run is spared"""
        self.live: dict[int, int] = {}
        """output -> variable: whether it lives at the place that building has reached"""
        count = len(dag)
        self.sequence = runs(dag, reruns)
        self.held = memory(dag, self.sequence)
        self.keys = [stage * count + i for stage, i in self.sequence]
        self.start = bisect_left(self.keys, first * count)
        self.stop = bisect_left(self.keys, last * count)
        most = max(self.held[self.start : self.stop])
        self.over = self.program.variable(0.0, float(most - budget)) if most > budget else None
        """bytes by which the stretch exceeds the budget"""
        self.made: list[list[int]] = [[] for _ in range(count)]
        self.used: list[list[int]] = [[] for _ in range(count)]
        for key, (stage, i) in zip(self.keys, self.sequence):
            self.made[i].append(key)
            for j in self._inputs(stage, i):
                self.used[j].append(key)
        self.touched = {i for _, i in self.places} | {j for place in self.places for j in self._inputs(*place)}
        self.idle_bytes = dag.fixed_bytes
        """fixed bytes, and outputs that live throughout the stretch whatever it decides"""
        self._enter()
        for stage, i in self.places:
            self.cutoff.check()
            self._place(stage, i)
        self._leave()

    def _inputs(self, stage: int, operator: int) -> tuple[int, ...]:
        return (self.dag.inputs if stage == operator else self.dag.again_inputs)[operator]

    # --- the border ------------------------------------------------------------------------------------------------

    def _lives_over(self, i: int, border: int) -> tuple[bool, int | None]:
        """Whether output i lives across the key `border`, and the key of its next run from there on."""
        made, used = bisect_left(self.made[i], border), bisect_left(self.used[i], border)
        again = self.made[i][made] if made < len(self.made[i]) else None
        reader = self.used[i][used] if used < len(self.used[i]) else None
        return (reader is not None and (again is None or reader < again)) or (self.dag.keep[i] and again is None), again

    def _enter(self) -> None:
        """Variables for the outputs that may live when the stretch begins."""
        extended: list[tuple[int, int, Term]] = []
        border = self.first * len(self.dag)
        for i in range(self.first):
            size = self.dag.bytes[i]
            carried, _ = self._lives_over(i, border)
            if i not in self.touched:
                self.idle_bytes += size if carried else 0
                continue
            if carried or not size:
                self.live[i] = self.program.variable(0.0, 1.0)
                continue
            touched = [keys[bisect_left(keys, border) - 1] for keys in (self.made[i], self.used[i]) if keys]
            begin = bisect_left(self.keys, max(key for key in touched if key < border)) + 1
            if self._has_room(begin, self.start, size):
                self.live[i] = self.program.choice()
                extended.append((begin, self.start, (self.live[i], size)))
        self._room(extended)

    def _leave(self) -> None:
        """Rows for the outputs that must live when the stretch ends, and variables for those that may."""
        extended: list[tuple[int, int, Term]] = []
        for i in self.live:
            needed, again = self._lives_over(i, self.last * len(self.dag))
            if needed:
                self.program.bounds(self.live[i], 1.0, 1.0)
            elif again is not None:
                end, size = bisect_left(self.keys, again), self.dag.bytes[i]
                if self._has_room(self.stop, end, size):
                    spared = self.spared[self.sequence[end]] = self.program.choice()
                    self._at_most(spared, self.live[i])
                    extended.append((self.stop, end, (spared, size)))
        self._room(extended)

    def _has_room(self, begin: int, end: int, size: int) -> bool:
        return max(self.held[begin:end], default=0) + size <= self.budget

    def _room(self, extended: Sequence[tuple[int, int, Term]]) -> None:
        """Memory rows outside of the stretch, for outputs that may live longer there: (begin, end, (variable, bytes)),
        where begin and end are positions in the sequence of runs.
        """
        edges = sorted({begin for begin, _, _ in extended} | {end for _, end, _ in extended})
        for begin, end in itertools.pairwise(edges):
            # Between two edges the same outputs may live longer, so the position with most live bytes decides.
            room = self.budget - max(self.held[begin:end])
            terms = [term for b, e, term in extended if b <= begin and end <= e]
            if sum(size for _, size in terms) > room:
                self._fits(Linear(room / self.budget), terms)

    # --- the stretch -----------------------------------------------------------------------------------------------

    def _place(self, stage: int, operator: int) -> None:
        """Add variables and rows of one place: a first run, or a possible re-run."""
        dag, program, live = self.dag, self.program, self.live
        first = operator == stage
        inputs = self._inputs(stage, operator)
        if not first and any(i not in live for i in inputs):
            return
        terms = [(here, dag.bytes[i]) for i, here in live.items()]
        own = dag.bytes[operator]
        after = program.variable(0.0, 1.0)
        if first:
            for i in inputs:
                program.bounds(live[i], 1.0, 1.0)
            own += dag.workspace[operator]
            room = Linear((self.budget - self.idle_bytes - own) / self.budget)
        else:
            run = self.again[stage, operator] = program.choice()
            for i in inputs:
                self._at_most(run, live[i])
            terms.append((run, own + dag.again_workspace[operator]))
            room = Linear((self.budget - self.idle_bytes) / self.budget)
            there = Linear().add(run)
            if operator in live:
                # Recomputing an output that is still live is of no use.
                program.at_least(Linear(1.0).add(run, -1.0).add(live[operator], -1.0))
                there.add(live[operator])
            program.at_least(there, Linear().add(after))
        self._fits(room if self.over is None else room.add(self.over, 1.0 / self.budget), terms)
        live[operator] = after
        # The inputs may be freed now.
        for i in inputs:
            before, live[i] = live[i], program.variable(0.0, 1.0)
            self._at_most(live[i], before)

    def _at_most(self, less: int, more: int) -> None:
        self.program.at_least(Linear().add(more).add(less, -1.0))

    def _fits(self, room: Linear, terms: Iterable[Term]) -> None:
        """Row: live bytes are at most `room`, which is in units of the budget."""
        row = Linear()
        for variable, size in terms:
            row.add(variable, size / self.budget)
        self.in_bytes[self.program.at_least(room, row)] = self.budget

    # --- solving ---------------------------------------------------------------------------------------------------

    def solve(self, work: float) -> Solved:
        """The best stretch found: the one that exceeds the budget least, and the fastest of those."""
        if self.over is None:
            once = self.dag.once_seconds
            spent = sum(self.dag.again_seconds[i] for _, i in self.inside)
            found = self._model().fastest(self._costs(), once=once, most=spent - BETTER * once, work=work)
            return Solved(reruns=self._chosen(found.values), ended=found.ended, work=found.work)
        scale = ceil(RESOLUTION / self.budget)
        per_second = scale * self.budget / (OVER * (self.dag.once_seconds or 1.0))
        costs = {variable: floor(per_second * cost) for variable, cost in self._costs().items()}
        found = self._model().least(costs | {self.over: scale}, work=work)
        return Solved(reruns=self._chosen(found.values), ended=found.ended, work=found.work)

    def lowest(self, work: float) -> Lowest:
        """The lowest peak. The given schedule must exceed the budget within the stretch."""
        assert self.over is not None
        found = self._model().least({self.over: 1}, work=work)
        over = max(0, ceil(found.bound)) if found.bound < float("inf") else 0
        return Lowest(reruns=self._chosen(found.values), bytes=self.budget + over, ended=found.ended)

    def _model(self) -> CpSatModel:
        return CpSatModel(self.program, self.in_bytes, self.cutoff)

    def _costs(self) -> dict[int, float]:
        """Variable -> seconds."""
        costs = {run: self.dag.again_seconds[i] for (_, i), run in self.again.items()}
        return costs | {spared: -self.dag.again_seconds[i] for (_, i), spared in self.spared.items()}

    def _chosen(self, values: Sequence[int] | None) -> frozenset[Rerun] | None:
        if values is None:
            return None
        spared = {rerun for rerun, variable in self.spared.items() if values[variable]}
        inside = {rerun for rerun, variable in self.again.items() if values[variable]}
        return pruned(self.dag, (self.reruns - self.inside - spared) | inside)


def lowest_peak(dag: Dag, *, work: float, cutoff: Cutoff = NEVER) -> Lowest:
    """The schedule of lowest peak that a solver finds in `work` units, and a lower bound in bytes on every peak of the
    class. Raises TimeoutError where `cutoff` strikes before the solver begins.
    """
    least = dag.floor_bytes
    if peak_bytes(dag, ()) <= least or len(dag) > MOST_PROVEN:
        return Lowest(reruns=None, bytes=least, ended=True)
    places = [(stage, i) for stage in range(len(dag)) for i in range(stage) if dag.recomputable[i]]
    # A stretch over all stages with all places covers the whole class.
    return Subproblem(dag, least, frozenset(), 0, len(dag), places, cutoff).lowest(work)
