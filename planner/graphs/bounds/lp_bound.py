"""Lower bounds on a schedule's seconds: linear programs that enforce the budget at a few moments of the schedule only.

A moment is the first run of a chosen operator, the pivot. Memory is limited at the moments; between two of them lies a
window. Variables say, for every operator, in which windows it runs and at which moments its output lives. An operator
that runs in a window reads outputs that lived at the window's start or were made in it; an output that lives at a
moment lived at the previous one or was made since. Rows over several windows tighten that (`Path`). The bound holds

- with ``any_order=False`` for every schedule whose first runs come in the given order, whatever it runs again, and
  when;
- with ``any_order=True`` for any schedule at all: only what the graph's edges imply is used of first runs, and the
  pivots lie on one path.

With 0/1 variables more moments suffice for a better bound; in the linear relaxation that takes path rows.

Where the graph names a disk an output may also be fetched in a window, once it is written. The step then lasts at least
as long as its runs and as the disk's work; when transfers happen, and the memory they take meanwhile, is left open.

The figure is computed from the solver's dual values by weak duality, so that it is a valid bound even where they are
inexact. Numbers in brackets are those of the blocks in docs/formulation.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, pruned
from tightfit.planner.graphs.problem.work import simplex
from tightfit.planner.problem.layer_types import transfer_seconds
from tightfit.planner.solvers.lp import Linear, LinearProgram, Solution

ROUNDED = (0.3, 0.5, 0.7)
"""thresholds above which a fraction of a run, or of a live output, is rounded up to 1; none of them
is always the best
"""
ROUNDING = 1e-9
"""relative margin subtracted from bounds for floating-point errors of this module's own sums"""

Parts = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Path:
    """A path of the graph across a moment, for a row (33): `reader` reads the first of `operators` and each of them
    reads the next. All `operators` first run before the moment at `pivot`; `reader` first runs after it.

    If none of their outputs lives at the moment, the last of them must run again between the moment and the reader.
    With 0/1 variables the other rows imply that; in the linear relaxation they do not, since half of an output may
    serve half of a run in each of two windows.
    """

    pivot: int
    reader: int
    operators: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Fractions:
    """A linear program's optimal solution, by operator and window, and the dual prices of its rows."""

    runs: Parts
    """(operators, windows): fraction of the operator that runs in the window"""
    lives: Parts
    """(operators, windows): fraction of its output that lives at the moment that opens the window"""
    moments: Parts
    """(moments,): dual price of memory, 0 where the budget does not bind"""
    paths: Parts
    """(paths,): dual price of each path's row"""


@dataclass(frozen=True, kw_only=True)
class LpAnswer:
    bound_seconds: float
    """lower bound on seconds; infinity: no schedule fits"""
    reruns: tuple[frozenset[Rerun], ...] = ()
    """schedules made of the solver's best solution, which may exceed the budget between moments; of a linear program's,
    one for each threshold in `ROUNDED`
    """
    fractions: Fractions | None = None
    """the solution of a linear program that was solved to optimality"""
    solved: bool = True
    """whether the solver finished"""
    work: float = 0.0
    """units that building and solving took"""


def solve_lp(
    dag: Dag,
    budget_bytes: int,
    pivots: Sequence[int],
    *,
    any_order: bool,
    cutoff: Cutoff = NEVER,
    paths: Sequence[Path] = (),
) -> LpAnswer:
    """The linear program's bound, with moments at `pivots`, which are sorted. `paths` may be given only for a fixed
    order (`any_order` false) and a graph without a disk. Raises TimeoutError where `cutoff` strikes.
    """
    program = LpBound(dag, budget_bytes, pivots, any_order=any_order, cutoff=cutoff)
    if program.impossible:
        return LpAnswer(bound_seconds=float("inf"))
    for path in paths:
        program.follow(path)
    return program.solve()


@dataclass(frozen=True, kw_only=True)
class _Span:
    """The range of windows that an operator's first run may lie in, `low` and `high` included."""

    low: int
    high: int


class LpBound:
    """The program over the moments at `pivots`: variables and rows (29) to (34). `solve` solves its
    linear relaxation.
    """

    def __init__(self, dag: Dag, budget: int, pivots: Sequence[int], *, any_order: bool, cutoff: Cutoff) -> None:
        """Raises TimeoutError where `cutoff` strikes."""
        self.dag = dag
        self.any_order = any_order
        self.cutoff = cutoff
        self.pivots = list(pivots)
        self.windows = len(pivots) + 1
        self.program = LinearProgram()
        self.cost: list[float] = []
        """(34) per variable: seconds of runs"""
        self.disk: dict[int, float] = {}
        """(34) variable -> seconds of the disk"""
        self.constant = 0.0
        self.impossible = False
        spans = _edge_spans(dag, pivots) if any_order else _order_spans(dag, pivots)
        needed = _last_windows(dag, spans, self.windows)
        self.runs: list[dict[int, int]] = [{} for _ in range(len(dag))]
        """per operator: window -> variable; -1 where it is known to run"""
        self.lives: list[dict[int, int]] = [{} for _ in range(len(dag))]
        """per operator: moment (named by the window it opens) -> variable; -1 where the output is known to live"""
        self.fetches: list[dict[int, int]] = [{} for _ in range(len(dag))]
        """per operator: window -> variable, where the graph names a disk"""
        # (30) a pivot's inputs live at its moment
        self.pinned = {(i, k + 1) for k, pivot in enumerate(pivots) for i in dag.inputs[pivot]}
        for i, span in enumerate(spans):
            cutoff.check()
            self._operator(i, span, needed[i])
        for j in range(len(dag)):
            cutoff.check()
            for i in dag.inputs[j]:
                self._edge(i, j)
        self.moments = len(self.program.least)
        """index of the first moment's row; the other moments' rows and then those of paths follow"""
        # (32) memory at each moment
        for k, pivot in enumerate(pivots):
            self._moment(k + 1, pivot, budget)

    def _variable(self, cost: float) -> int:
        self.cost.append(cost)
        return self.program.variable(0.0, 1.0)

    def _row(self, terms: Sequence[tuple[int, float]], least: float) -> None:
        row = Linear()
        for variable, coefficient in terms:
            row.add(variable, coefficient)
        self.program.at_least(row, least)

    def _operator(self, i: int, span: _Span, last: int) -> None:
        dag, runs, lives = self.dag, self.runs[i], self.lives[i]
        sure = span.low == span.high
        # (29) windows in which it runs: the known one of its first run, those the first run may lie in, those of
        # re-runs
        for window in range(span.low, max(last, span.high) + 1):
            if sure and window == span.low:
                runs[window] = -1
                self.constant += dag.seconds[i]
            elif window <= span.high or dag.recomputable[i]:
                runs[window] = self._variable(dag.seconds[i])
            if dag.read is not None and runs.get(window) != -1:
                self.fetches[i][window] = self._variable(0.0)
                self.disk[self.fetches[i][window]] = transfer_seconds(dag.read, dag.bytes[i])
            if window > span.low:
                lives[window] = -1 if (i, window) in self.pinned else self._variable(0.0)
        if self.fetches[i]:
            assert dag.write is not None
            stored = self._variable(0.0)
            self.disk[stored] = transfer_seconds(dag.write, dag.bytes[i])
            for fetch in self.fetches[i].values():
                self._row([(stored, 1.0), (fetch, -1.0)], 0.0)
        if not sure:
            # (29) the first run lies in one of these
            self._row([(runs[w], 1.0) for w in range(span.low, span.high + 1)], 1.0)
        for window in range(span.low + 1, max(last, span.high) + 1):
            before = self._available(i, window - 1)
            if before is not None:
                # (30) An output that lives at a moment lived at the previous one, or was made or fetched since.
                living = [(lives[window], -1.0)] if lives[window] >= 0 else []
                self._row([*before, *living], 0.0 if living else 1.0)
        # (30) outputs that must be there at the end
        if dag.keep[i]:
            final = self._available(i, self.windows - 1)
            if final is not None:
                self._row(final, 1.0)

    def _available(self, i: int, window: int) -> list[tuple[int, float]] | None:
        """Terms whose sum is the fraction of output i available in a window (lived, made or fetched); None: it is known
        to be.
        """
        parts = [self.runs[i].get(window), self.lives[i].get(window), self.fetches[i].get(window)]
        if -1 in parts:
            return None
        return [(part, 1.0) for part in parts if part is not None]

    def _edge(self, i: int, j: int) -> None:
        """(31) In a window in which j runs, output i lived when the window began, or is made or fetched in it."""
        for window, run in self.runs[j].items():
            there = self._available(i, window)
            if there is None:
                continue
            if run == -1:
                self._row(there, 1.0)
            else:
                self._row([*there, (run, -1.0)], 0.0)

    def _moment(self, window: int, pivot: int, budget: int) -> None:
        """(32) The row of memory at the pivot's first run, in units of the budget."""
        dag = self.dag
        room = budget - dag.fixed_bytes - dag.own_bytes(pivot)
        if room < 0:
            self.impossible = True
            return
        terms = [
            (lives[window], -dag.bytes[i] / max(1, budget))
            for i, lives in enumerate(self.lives)
            if lives.get(window, -1) >= 0 and dag.bytes[i] and i != pivot
        ]
        self._row(terms, -room / max(1, budget))

    def follow(self, path: Path) -> None:
        """(33) Add the row of one path."""
        # The row is valid neither for other orders of first runs nor where outputs may also be fetched.
        assert not self.any_order
        assert self.dag.read is None
        begin, end = (bisect_right(self.pivots, stage) for stage in (path.pivot, path.reader))
        runs = self.runs[path.operators[-1]]
        made = [runs[window] for window in range(begin, end + 1) if window in runs]
        lives = [self.lives[i][begin] for i in path.operators]
        self._row([(part, 1.0) for part in (*made, *lives) if part >= 0], 0.0 if -1 in lives else 1.0)

    # --- solving ---------------------------------------------------------------------------------------------------

    def solve(self) -> LpAnswer:
        """Solve the linear relaxation. Raises TimeoutError where the cutoff strikes."""
        if not self.cost:
            return LpAnswer(bound_seconds=self.constant)
        unit = max(self.cost) or 1.0
        goal = Linear()
        for variable, cost in enumerate(self.cost):
            goal.add(variable, cost / unit)
        if self.disk:
            goal = self._longest(goal, unit)
        result = self.program.solve(goal, self.cutoff.left())
        work = simplex(len(self.program.matrix[2]), result.iterations)
        if result.infeasible:
            return LpAnswer(bound_seconds=float("inf"), work=work)
        if not result.optimal or result.duals is None:
            self.cutoff.check()
            return LpAnswer(bound_seconds=self.constant, solved=False, work=work)
        bound = (self.constant + self._dual_value(goal, result.duals) * unit) * (1 - ROUNDING)
        reruns, fractions = self._rounded(result), self._fractions(result)
        return LpAnswer(bound_seconds=bound, reruns=reruns, fractions=fractions, work=work)

    def _rounded(self, result: Solution) -> tuple[frozenset[Rerun], ...]:
        """Schedules of the class, one for each threshold in `ROUNDED`; none with a disk or in any order."""
        if result.values is None or self.disk or self.any_order:
            return ()
        values = np.array(result.values)
        return tuple(self.reruns((values > share).tolist()) for share in ROUNDED)

    def _fractions(self, result: Solution) -> Fractions | None:
        if result.values is None or result.duals is None:
            return None
        values, prices = [*result.values, 1.0], np.array(result.duals)
        runs, lives = np.zeros((2, len(self.dag), self.windows))
        for parts, variables in ((runs, self.runs), (lives, self.lives)):
            for i, chosen in enumerate(variables):
                for window, variable in chosen.items():
                    # -1, known to be 1, indexes the 1.0 appended to the values.
                    parts[i, window] = values[variable]
        of_moments, of_paths = np.split(prices[self.moments :], [len(self.pivots)])
        return Fractions(runs=runs, lives=lives, moments=of_moments, paths=of_paths)

    def _longest(self, runs: Linear, unit: float) -> Linear:
        """(34) A variable for the step's time beyond `constant` (runs that are known): at least all other runs, and at
        least the disk's time less `constant`. In units of `unit` seconds.
        """
        beyond = Linear().add(self.program.variable())
        work = Linear(-self.constant / unit)
        for variable, disk in self.disk.items():
            work.add(variable, disk / unit)
        self.program.at_least(beyond, runs)
        self.program.at_least(beyond, work)
        return beyond

    def _dual_value(self, goal: Linear, duals: list[float]) -> float:
        """A lower bound of `goal` by weak duality."""
        prices = np.maximum(np.array(duals, dtype=np.float64), 0.0)
        if self.disk:
            # The variable of `_longest` has no upper bound: for dual feasibility its two rows' prices may not exceed
            # its cost, 1.
            prices /= max(1.0, float(prices[-1] + prices[-2]))
        left = np.zeros(len(self.program.lower))
        for variable, cost in goal.terms.items():
            left[variable] = cost
        rows, columns, entries = self.program.matrix
        np.subtract.at(left, columns, entries * prices[rows])
        bounded = left[: len(self.cost)]
        return max(0.0, float(prices @ np.array(self.program.least)) + float(np.minimum(bounded, 0.0).sum()))

    def reruns(self, chosen: Sequence[int]) -> frozenset[Rerun]:
        """A schedule made of a rounded answer: where the answer runs an operator in a window after its first run, the
        operator runs again in that window's first stage that needs its output. `chosen`: by variable, whether it is 1.
        """
        dag = self.dag
        again = [{window for window, run in runs.items() if run >= 0 and chosen[run]} for runs in self.runs]
        opens = [*self.pivots, len(dag)]
        result: set[Rerun] = set()
        window = 0
        there: set[int] = set()

        def bring(stage: int, wanted: Iterable[int]) -> None:
            waiting = list(wanted)
            while waiting:
                i = waiting.pop()
                if i not in there and window in again[i]:
                    there.add(i)
                    result.add((stage, i))
                    waiting.extend(dag.inputs[i])

        for stage in range(len(dag)):
            if stage == opens[window]:
                # Outputs that are to live at this moment and are not there yet are made for it as re-runs of the window
                # that ends here.
                lives = {
                    i
                    for i, life in enumerate(self.lives)
                    if window + 1 in life and (life[window + 1] < 0 or chosen[life[window + 1]])
                }
                bring(stage, sorted(lives))
                window += 1
                there = lives
            bring(stage, dag.inputs[stage])
            there.add(stage)
        return pruned(dag, result)


def _order_spans(dag: Dag, pivots: Sequence[int]) -> list[_Span]:
    at = np.searchsorted(np.array(pivots), np.arange(len(dag)), side="right").tolist()
    return [_Span(low=window, high=window) for window in at]


def _edge_spans(dag: Dag, pivots: Sequence[int]) -> list[_Span]:
    """The windows of first runs in any order: an operator runs after the pivots it depends on and before those that
    depend on it.
    """
    count = len(dag)
    low = [0] * count
    high = [len(pivots)] * count
    opens = {pivot: k + 1 for k, pivot in enumerate(pivots)}
    for i in range(count):
        low[i] = max([opens.get(i, 0), *(low[j] for j in dag.inputs[i])])
    for i in reversed(range(count)):
        for j in dag.users[i]:
            high[i] = min(high[i], high[j], opens[j] - 1 if j in opens else high[i])
        if i in opens:
            high[i] = opens[i]
    return [_Span(low=a, high=b) for a, b in zip(low, high)]


def _last_windows(dag: Dag, spans: Sequence[_Span], windows: int) -> list[int]:
    """Per operator the last window in which its output can be of use to anything."""
    last = [0] * len(dag)
    for i in reversed(range(len(dag))):
        last[i] = windows - 1 if dag.keep[i] else max([spans[i].high, *(last[j] for j in dag.users[i])])
    return last
