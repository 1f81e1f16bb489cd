"""The exact solver for small graphs with a disk: CP-SAT over re-runs and moves, with memory and time counted at every
run.

The stages are Checkmate's (Jain et al. 2020). Before each run, in this order: resident outputs are written to the disk
(each once), outputs are freed, outputs on the disk are fetched, each in the graph's order. The disk does one transfer
at a time in the order of issue. A run waits for the fetches of its inputs, a free for the write of the output that it
frees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ortools.sat.python import cp_model

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.graphs.problem.actions import Action
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.problem.layer_types import transfer_seconds
from tightfit.planner.solvers.cp_sat import single_worker, solved

RESOLUTION = 1_000_000_000
"""ticks into which an upper bound on a stage's time is divided; times are rounded to ticks, at an error of a few per
action
"""

OPERATORS = 8
"""number of operators up to which a graph that names a disk is solved exactly"""


@dataclass(frozen=True, kw_only=True)
class ExactMoves:
    """What the solver found."""

    actions: tuple[Action, ...] | None
    """None: no schedule of the class fits (if `proven`), or none was found"""
    proven: bool
    bound: float
    """lower bound on the seconds of every schedule of the class"""


def fastest_with_moves(dag: Dag, budget_bytes: int, *, work: float, cutoff: Cutoff = NEVER) -> ExactMoves:
    """The fastest schedule of the class within the budget; the solver takes at most `work` units, and answers with what
    it has where `cutoff` strikes.
    """
    return _Moves(dag, budget_bytes).solve(work, cutoff)


class _Moves:
    """The model: for each run, possible or sure, which outputs live at it, which are written and fetched before it, and
    when it and its transfers end.
    """

    def __init__(self, dag: Dag, budget: int) -> None:
        assert dag.read is not None
        assert dag.write is not None
        self.dag = dag
        self.model = model = cp_model.CpModel()
        count = len(dag)
        # Upper bound on the time of one stage: no schedule worth having computes everything twice and moves everything
        # once in it.
        longest = 2 * dag.once_seconds + sum(dag.trip_seconds(i) for i in range(count))
        self.unit = max(longest, 1e-300) / RESOLUTION
        self.writes = [self._ticks(transfer_seconds(dag.write, size)) for size in dag.bytes]
        self.reads = [self._ticks(transfer_seconds(dag.read, size)) for size in dag.bytes]
        self.runs = [self._ticks(second) for second in dag.seconds]
        self.most = (count + 1) * RESOLUTION
        zero = model.new_constant(0)
        false = model.new_constant(0)
        self.slots: list[tuple[int, int, cp_model.IntVar | None]] = []
        self.spills: list[dict[int, cp_model.IntVar]] = []
        self.fetches: list[dict[int, cp_model.IntVar]] = []
        self.lives: list[dict[int, cp_model.IntVar]] = []
        self.end, self.disk = zero, zero
        self.written = [self._moment() for _ in range(count)]
        self.landed = [zero] * count
        self.stored: list[cp_model.IntVar] = [false] * count
        live: dict[int, cp_model.IntVar] = {}
        for stage in range(count):
            for operator in range(stage + 1):
                if operator == stage or dag.recomputable[operator]:
                    live = self._slot(stage, operator, live, budget - dag.fixed_bytes)
        for i in range(count):
            if dag.keep[i]:
                model.add_bool_or(live[i])
        self.total = self._moment()
        model.add(self.total >= self.end)
        model.add(self.total >= self.disk)
        model.minimize(self.total)

    def _ticks(self, seconds: float) -> int:
        return round(seconds / self.unit)

    def _moment(self) -> cp_model.IntVar:
        return self.model.new_int_var(0, self.most, "")

    def _slot(
        self, stage: int, operator: int, before: dict[int, cp_model.IntVar], room: int
    ) -> dict[int, cp_model.IntVar]:
        """Add the (possible) run of `operator` in `stage` and the moves before it. `before` and the result: operator ->
        whether its output lives at the previous run, and at this one.
        """
        dag, model = self.dag, self.model
        run = None if operator == stage else model.new_bool_var("")
        self.slots.append((stage, operator, run))

        def only_with_run(move: cp_model.IntVar) -> None:
            if run is not None:
                model.add_implication(move, run)

        lives = {i: model.new_bool_var("") for i in (*before, operator)}
        spills: dict[int, cp_model.IntVar] = {}
        fetches: dict[int, cp_model.IntVar] = {}
        # Writes.
        base = self._moment()
        model.add(base >= self.disk)
        model.add(base >= self.end)
        queue: Any = base
        stored = list(self.stored)
        for i in sorted(before):
            spill = spills[i] = model.new_bool_var("")
            only_with_run(spill)
            model.add_implication(spill, before[i])
            queue = queue + self.writes[i] * spill
            model.add(self.written[i] >= queue).only_enforce_if(spill)
            stored[i] = model.new_bool_var("")
            model.add(stored[i] == self.stored[i] + spill)
        # Frees.
        freed = self._moment()
        model.add(freed >= self.end)
        for i, there in before.items():
            if i == operator:
                continue
            gone = model.new_bool_var("")
            only_with_run(gone)
            model.add(gone >= there - lives[i])
            model.add_implication(gone, there)
            model.add(freed >= self.written[i]).only_enforce_if([gone, stored[i]])
        # Fetches.
        issue = self._moment()
        model.add(issue >= queue)
        model.add(issue >= freed)
        queue = issue
        landed = list(self.landed)
        for i in sorted(before):
            if i == operator:
                continue
            fetch = fetches[i] = model.new_bool_var("")
            only_with_run(fetch)
            model.add_implication(fetch, before[i].negated())
            model.add_implication(fetch, stored[i])
            model.add_implication(fetch, lives[i])
            queue = queue + self.reads[i] * fetch
            landed[i] = self._moment()
            model.add(landed[i] >= self.landed[i])
            model.add(landed[i] >= queue).only_enforce_if(fetch)
            model.add_bool_or(before[i], fetch, lives[i].negated())
        # The run.
        begins = self._moment()
        model.add(begins >= freed)
        for i in dag.inputs[operator]:
            if run is None:
                model.add_bool_or(lives[i])
                model.add(begins >= landed[i])
            else:
                model.add_implication(run, lives[i])
                model.add(begins >= landed[i]).only_enforce_if(run)
        if run is None:
            model.add_bool_or(lives[operator])
        else:
            model.add_implication(run, before[operator].negated())
            model.add_implication(run, lives[operator])
            model.add_bool_or(before[operator], run, lives[operator].negated())
            # Without the run its output stays as it was: nothing is freed in a slot that is not used.
            model.add_bool_or(run, before[operator].negated(), lives[operator])
        workspace = dag.workspace[operator]
        row = sum(dag.bytes[i] * here for i, here in lives.items())
        model.add(row + (workspace if run is None else workspace * run) <= room)
        self.spills.append(spills)
        self.fetches.append(fetches)
        self.lives.append(lives)
        self.end = self._moment()
        model.add(self.end >= begins + (self.runs[operator] if run is None else self.runs[operator] * run))
        self.disk = self._moment()
        model.add(self.disk >= queue)
        self.stored, self.landed = stored, landed
        return lives

    def solve(self, work: float, cutoff: Cutoff) -> ExactMoves:
        solver = single_worker()
        solver.parameters.max_deterministic_time = work
        solver.parameters.max_time_in_seconds = cutoff.left()
        status = solved(solver, self.model)
        if status == cp_model.INFEASIBLE:
            return ExactMoves(actions=None, proven=True, bound=float("inf"))
        bound = max(self.dag.once_seconds, (solver.best_objective_bound - self._slack()) * self.unit)
        found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
        actions = self._actions(solver) if found else None
        return ExactMoves(actions=actions, proven=status == cp_model.OPTIMAL, bound=bound)

    def _slack(self) -> int:
        """Ticks by which rounding may have lengthened a schedule: at most half a tick for each run, write and fetch."""
        return sum(1 + len(spills) for spills in self.spills)

    def _actions(self, solver: cp_model.CpSolver) -> tuple[Action, ...]:
        actions: list[Action] = []
        before: set[int] = set()
        for (_, operator, run), spills, fetches, lives in zip(self.slots, self.spills, self.fetches, self.lives):
            if run is not None and not solver.boolean_value(run):
                continue
            there = {i for i, here in lives.items() if solver.boolean_value(here)}
            actions.extend(("spill", i) for i, move in spills.items() if solver.boolean_value(move))
            actions.extend(("free", i) for i in sorted(before - there - {operator}))
            actions.extend(("fetch", i) for i, move in fetches.items() if solver.boolean_value(move))
            actions.append(("run", operator))
            before = there
        actions.extend(("free", i) for i in sorted(before) if not self.dag.keep[i])
        fetched = {i for verb, i in actions if verb == "fetch"}
        return tuple((verb, i) for verb, i in actions if verb != "spill" or i in fetched)
