"""A stretch of a schedule solved anew in whole numbers, with memory counted at every run, while the rest stays as it is.

Within the stretch (a range of stages) operators may run again at the places given. For each output there is one variable for each gap
between the places where it may be made or read: how far it lives there. With whole runs these are whole by themselves. Toward the rest
of the schedule:

- an output may be carried into the stretch that was freed before it, where the runs before have room for it;
- what later runs read before it is made again must be there at the end;
- an output may be carried out until a later run of it, which is then spared, where the runs until then have room for it.

A stretch over all stages with all places is the whole class: then what it proves holds for the class.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, gcd, isfinite

from tightfit.planner.graphs.bounds.cp_sat_model import CpSatModel
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.limit import Limit
from tightfit.planner.graphs.problem.schedule import Rerun, memory, pruned, runs
from tightfit.planner.milp.highs import MARGIN
from tightfit.planner.milp.lp import Linear, Program

SCALE = 1000.0
"""of the objective: one run of every operator"""
OVER = 1e5
"""of the objective: what a budget's worth of bytes over the budget costs, more than any re-runs that are worth it"""
BETTER = 5e-7
"""of one run of every operator: what a stretch must gain at least"""

Term = tuple[int, int]
"""(variable, bytes)"""


@dataclass(frozen=True, kw_only=True)
class Solved:
    reruns: frozenset[Rerun] | None
    """the whole schedule with the stretch solved anew; None: nothing better was found"""
    ended: bool
    """whether the solver came to its end: nothing better is to be had from these places"""


@dataclass(frozen=True, kw_only=True)
class Lowest:
    reruns: frozenset[Rerun] | None
    """the schedule of lowest peak found; None: none was found"""
    bytes: int
    """no peak with these places undercuts them"""
    ended: bool
    """whether the solver came to its end"""


class Subproblem:
    """The program of one stretch: stages `first` to `last` - 1 of the schedule that `reruns` are, which may be over the budget.

    It is built and solved within `seconds`; raises TimeoutError, here or where it is solved, if that takes longer.
    """

    def __init__(
        self,
        dag: Dag,
        budget: int,
        reruns: frozenset[Rerun],
        first: int,
        last: int,
        places: Iterable[Rerun],
        *,
        seconds: float,
    ) -> None:
        self.limit = Limit(seconds)
        self.dag = dag
        self.budget = budget
        self.reruns = reruns
        self.first, self.last = first, last
        self.program = Program()
        self.in_bytes: dict[int, int] = {}
        """rows in parts of the budget -> the budget"""
        self.inside = {rerun for rerun in reruns if first <= rerun[0] < last}
        again = {*places, *self.inside}
        self.places = sorted({*again, *((stage, stage) for stage in range(first, last))})
        self.again: dict[Rerun, int] = {}
        self.spared: dict[Rerun, int] = {}
        """later re-runs -> whether they are not needed any more"""
        self.live: dict[int, int] = {}
        """outputs that may live at the place the program has come to"""
        count = len(dag)
        self.sequence = runs(dag, reruns)
        self.held = memory(dag, self.sequence)
        self.keys = [stage * count + i for stage, i in self.sequence]
        self.start = bisect_left(self.keys, first * count)
        self.stop = bisect_left(self.keys, last * count)
        most = max(self.held[self.start : self.stop])
        self.over = self.program.variable(0.0, most / budget - 1.0) if most > budget else None
        self.made: list[list[int]] = [[] for _ in range(count)]
        self.used: list[list[int]] = [[] for _ in range(count)]
        for key, (stage, i) in zip(self.keys, self.sequence):
            self.made[i].append(key)
            for j in self._inputs(stage, i):
                self.used[j].append(key)
        self.touched = {i for _, i in self.places} | {j for place in self.places for j in self._inputs(*place)}
        self.idle_bytes = dag.fixed_bytes
        """live throughout the stretch, whatever it does"""
        self._enter()
        for stage, i in self.places:
            self.limit.check()
            self._place(stage, i)
        self._leave()

    def _inputs(self, stage: int, operator: int) -> tuple[int, ...]:
        return (self.dag.inputs if stage == operator else self.dag.again_inputs)[operator]

    # --- the border ------------------------------------------------------------------------------------------------

    def _lives_over(self, i: int, border: int) -> tuple[bool, int | None]:
        """Whether output i lives at the key `border`, and the key of its next run after."""
        made, used = bisect_left(self.made[i], border), bisect_left(self.used[i], border)
        again = self.made[i][made] if made < len(self.made[i]) else None
        reader = self.used[i][used] if used < len(self.used[i]) else None
        return (reader is not None and (again is None or reader < again)) or (self.dag.keep[i] and again is None), again

    def _enter(self) -> None:
        """What may live when the stretch begins."""
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
        """What must live when the stretch is over, and what may."""
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
        """Rows for outputs that live longer outside of the stretch: (begin, end, (whether, bytes)), by positions."""
        edges = sorted({begin for begin, _, _ in extended} | {end for _, end, _ in extended})
        for begin, end in itertools.pairwise(edges):
            # Between two of these the same outputs live: the fullest position decides.
            room = self.budget - max(self.held[begin:end])
            terms = [term for b, e, term in extended if b <= begin and end <= e]
            if sum(size for _, size in terms) > room:
                self._fits(Linear(room / self.budget), terms)

    # --- the stretch -----------------------------------------------------------------------------------------------

    def _place(self, stage: int, operator: int) -> None:
        """The place of a run, first or again."""
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
                # Making what is there already is of no use.
                program.at_least(Linear(1.0).add(run, -1.0).add(live[operator], -1.0))
                there.add(live[operator])
            program.at_least(there, Linear().add(after))
        self._fits(room if self.over is None else room.add(self.over), terms)
        live[operator] = after
        # What was read may be freed now.
        for i in inputs:
            before, live[i] = live[i], program.variable(0.0, 1.0)
            self._at_most(live[i], before)

    def _at_most(self, less: int, more: int) -> None:
        self.program.at_least(Linear().add(more).add(less, -1.0))

    def _fits(self, room: Linear, terms: Iterable[Term]) -> None:
        """Row: live bytes at most `room`, in parts of the budget."""
        row = Linear()
        for variable, size in terms:
            row.add(variable, size / self.budget)
        self.in_bytes[self.program.at_least(room, row)] = self.budget

    # --- solving ---------------------------------------------------------------------------------------------------

    def solve(self) -> Solved:
        """The best stretch found: the one least over the budget, and the fastest of those."""
        dag = self.dag
        costs = {run: dag.again_seconds[i] for (_, i), run in self.again.items()}
        costs |= {spared: -dag.again_seconds[i] for (_, i), spared in self.spared.items()}
        if self.over is None:
            spent = sum(dag.again_seconds[i] for _, i in self.inside)
            most = spent - BETTER * dag.once_seconds
            chosen = CpSatModel(self.program, self.in_bytes, self.limit).solve(costs, once=dag.once_seconds, most=most)
            return Solved(reruns=self._chosen(chosen.values), ended=chosen.ended)
        unit = (dag.once_seconds or 1.0) / SCALE
        goal = Linear().add(self.over, OVER)
        for variable, cost in costs.items():
            goal.add(variable, cost / unit)
        found = self.program.solve(goal, self.limit.left())
        return Solved(reruns=self._chosen(found.values), ended=found.infeasible or found.optimal)

    def lowest(self) -> Lowest:
        """The lowest peak. The program is over the budget."""
        assert self.over is not None
        dag = self.dag
        found = self.program.solve(Linear().add(self.over), self.limit.left())
        proven = max(0.0, found.bound) if isfinite(found.bound) else 0.0
        least = ceil(self.budget * (1.0 + proven) * (1.0 - MARGIN))
        # A peak is made of outputs and workspace: between two of their common multiples there is none.
        unit = gcd(*dag.bytes, *dag.workspace) or 1
        least += (dag.fixed_bytes - least) % unit
        return Lowest(reruns=self._chosen(found.values), bytes=least, ended=found.optimal)

    def _chosen(self, values: Sequence[float] | None) -> frozenset[Rerun] | None:
        if values is None:
            return None
        spared = {rerun for rerun, variable in self.spared.items() if values[variable] > 0.5}
        inside = {rerun for rerun, variable in self.again.items() if values[variable] > 0.5}
        return pruned(self.dag, (self.reruns - self.inside - spared) | inside)
