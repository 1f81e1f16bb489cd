"""Cutting planes for the linear programs of `lp_bound`: the moments and the path rows (33) that an answer violates.

A moment is violated where a schedule with the answer's fractions would exceed the budget; a path row where the answer
runs and holds its operators only in parts, in a way that no whole schedule does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.graphs.bounds.lp_bound import Fractions, LpAnswer, Parts, Path, solve_lp
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun
from tightfit.planner.search_options import ALL, SearchOptions

VIOLATED = 0.2
"""by how much an answer must fall short of a path's row, whose right-hand side is one run, for the path to be added"""
NEGLIGIBLE = 1e-9
"""fractions of a run or of a live output up to here count as 0"""


def violated(dag: Dag, pivots: Sequence[int], fractions: Fractions) -> list[Path]:
    """Paths whose rows (33) the answer violates, the worst first: one at most for each pair of the operator it begins
    with and the window its reader first runs in, and no more than there are operators.
    """
    opens = [0, *pivots, len(dag)]
    made = np.concatenate([np.zeros((len(dag), 1)), np.cumsum(fractions.runs, axis=1)], axis=1)
    found: list[tuple[float, int, int, int]] = []
    following: dict[int, npt.NDArray[np.int32]] = {}
    for last in range(2, len(pivots) + 1):
        begin, end = opens[last], opens[last + 1]
        # By operator and by the window of the path's moment: the smallest sum of live fractions on a path from the
        # operator to a reader (a shortest path), and the operator that comes next on it.
        length = np.full((len(dag), last), np.inf)
        length[begin:end] = 0.0
        reader = following[last] = np.full((len(dag), last), -1, dtype=np.int32)
        for i in reversed(range(begin)):
            users = [j for j in dag.users[i] if j < end]
            # An operator that first runs after the moment lies on no path of it.
            first = bisect_right(opens, i)
            if not users or first >= last:
                continue
            lengths = length[users, first:]
            chosen = lengths.argmin(axis=0)
            length[i, first:] = lengths.min(axis=0) + fractions.lives[i, first:last]
            reader[i, first:] = np.array(users)[chosen]
        missing = 1.0 - length[:begin] - (made[:begin, last + 1, None] - made[:begin, :last])
        for i in np.flatnonzero(missing.max(axis=1) > VIOLATED).tolist():
            window = int(missing[i].argmax())
            found.append((-float(missing[i, window]), i, window, last))
    paths = []
    for _, i, window, last in sorted(found)[: len(dag)]:
        operators = [i]
        while (j := int(following[last][operators[-1], window])) < opens[last]:
            operators.append(j)
        paths.append(Path(pivot=opens[window], reader=j, operators=tuple(reversed(operators))))
    return paths


def bytes_over(dag: Dag, budget: int, pivots: Sequence[int], fractions: Fractions) -> Parts:
    """Per stage: by how many bytes the answer exceeds the budget at the stage's first run, if every re-run of a window
    takes place just before its output is read.

    0 at the pivots. An estimate: it says where a further moment may raise the bound.
    """
    over = np.zeros(len(dag))
    opens = [0, *pivots, len(dag)]
    for window, (begin, end) in enumerate(pairwise(opens)):
        over[begin:end] = _held(dag, window, begin, end, fractions) - budget
    over[list(pivots)] = 0.0
    return over


def _held(dag: Dag, window: int, begin: int, end: int, fractions: Fractions) -> Parts:
    """Bytes held at the first runs of the stages `begin` to `end` - 1, which make up the window."""
    change = np.zeros(end - begin + 1)
    reads: list[list[tuple[int, float]]] = [[] for _ in range(end)]
    """per operator: (stage in which its output is read, fraction of the output that is needed there)"""
    for stage in range(begin, end):
        # An operator needs its own output and its inputs while it runs.
        for i in (stage, *dag.inputs[stage]):
            reads[i].append((stage, 1.0))
    final = window + 1 == fractions.lives.shape[1]
    for i in reversed(range(end)):
        left = float(dag.keep[i]) if final else float(fractions.lives[i, window + 1])
        if left > NEGLIGIBLE:
            reads[i].append((end - 1, left))
        if not reads[i]:
            continue
        start, here = i, 0.0
        if i < begin:
            start, here = min(stage for stage, _ in reads[i]), float(fractions.lives[i, window])
            if fractions.runs[i, window] > NEGLIGIBLE:
                for j in dag.inputs[i]:
                    reads[j].append((start, float(fractions.runs[i, window])))
        needed = 0.0
        for stage, part in sorted(reads[i], reverse=True):
            if part > needed:
                # This fraction is needed up to here, and no longer.
                change[stage + 1 - begin] -= (part - needed) * dag.bytes[i]
                needed = part
        change[max(start - begin, 0)] += needed * dag.bytes[i]
        if start > begin and i < begin:
            # Before the re-run only the fraction that lived when the window began is held.
            change[0] += min(here, needed) * dag.bytes[i]
            change[start - begin] -= min(here, needed) * dag.bytes[i]
    return dag.fixed_bytes + np.array(dag.workspace[begin:end]) + np.cumsum(change)[:-1]


OVER = 0.01
"""by which share of the budget a stage must exceed it to become a moment"""
ADDED = 3
"""moments added in a round, at most"""
IDLE = 2
"""rounds with a dual price of 0 after which a moment is dropped"""
STALLED = 12
"""rounds within which the bound must rise..."""
RISE = 0.01
"""...by this share of its excess over one run of every operator; otherwise cut generation ends"""


class CutGeneration:
    """The lower bound of one graph at one budget by linear programs, the first of which has its moments at `pivots`."""

    def __init__(self, dag: Dag, budget: int, pivots: tuple[int, ...], options: SearchOptions = ALL) -> None:
        self.dag = dag
        self.options = options
        self.budget = budget
        self.best = dag.once_seconds
        self.pivots = pivots
        """moments of the best program"""
        self.paths: tuple[Path, ...] = ()
        """its paths whose dual price is above 0"""
        self.starts: list[frozenset[Rerun]] = []
        """the answers of all programs, rounded to schedules"""
        self.ended = False
        """whether the bound has stopped rising"""
        self._next: tuple[tuple[int, ...], tuple[Path, ...]] = pivots, ()
        """moments and paths of the program to be solved next"""
        self._idle = dict.fromkeys(pivots, 0)
        """moment -> programs in a row in which its dual price was 0"""
        self._bests: list[float] = []

    def climb(self, work: float, enough: float, cutoff: Cutoff = NEVER) -> None:
        """Solve programs until `work` units are done, the bound reaches `enough` seconds or it has stopped rising. A
        later call goes on where this one stops. Raises TimeoutError where `cutoff` strikes.
        """
        while work > 0.0 and self.best < enough and not self.ended:
            pivots, paths = self._next
            answer = solve_lp(self.dag, self.budget, pivots, any_order=False, cutoff=cutoff, paths=paths)
            work -= answer.work
            self.starts.extend(answer.reruns)
            self.ended = not self._cut(answer, pivots, paths)

    def _cut(self, answer: LpAnswer, pivots: tuple[int, ...], paths: tuple[Path, ...]) -> bool:
        """Take up the answer to the program of these moments and paths; whether another one may raise the bound."""
        fractions = answer.fractions
        if fractions is None:
            # The program is infeasible, or has no variables, or the solver failed.
            self.best = max(self.best, answer.bound_seconds)
            return False
        priced = [path for path, price in zip(paths, fractions.paths) if price > 0.0]
        if answer.bound_seconds > self.best:
            self.best, self.pivots, self.paths = answer.bound_seconds, pivots, tuple(priced)
        self._bests.append(self.best)
        stalled = len(self._bests) > STALLED and (
            self._bests[-1] - self._bests[-1 - STALLED] <= RISE * (self.best - self.dag.once_seconds)
        )
        if stalled or not self.options.cuts:
            return False
        idle = self._idle
        for pivot, price in zip(pivots, fractions.moments):
            idle[pivot] = 0 if price > 0.0 else idle[pivot] + 1
        over = bytes_over(self.dag, self.budget, pivots, fractions)
        worst = np.argsort(-over, kind="stable")
        added = apart(worst[over[worst] > OVER * self.budget].tolist(), ADDED)
        follows = self.dag.read is None and self.options.paths
        followed = violated(self.dag, pivots, fractions) if follows else []
        idle |= dict.fromkeys(added, 0)
        pivots = tuple(sorted({*(pivot for pivot in pivots if idle[pivot] < IDLE), *added}))
        self._next = pivots, tuple(path for path in dict.fromkeys([*priced, *followed]) if path.pivot in pivots)
        return bool(added or followed)


def apart(stages: Iterable[int], most: int) -> list[int]:
    """Up to `most` of `stages`, in their order, each more than 2 stages from those chosen before it."""
    chosen: list[int] = []
    for stage in stages:
        if len(chosen) < most and all(abs(stage - other) > 2 for other in chosen):
            chosen.append(stage)
    return chosen
