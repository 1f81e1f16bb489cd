"""What an answer of the linear program over a few moments (`lp_bound`) leaves out: moments at which it would hold too much, and
paths (33) that it runs along in parts.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tightfit.planner.graphs.bounds.lp_bound import Fractions, Parts, Path, solve_lp
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun

VIOLATED = 0.2
"""of one run: what a path asks for and the answer has not"""
NEGLIGIBLE = 1e-9
"""part of a run or a life"""


def violated(dag: Dag, pivots: Sequence[int], fractions: Fractions) -> list[Path]:
    """Paths whose rows (33) the answer violates, the worst first, as many as there are operators at most; one for each operator and
    window of readers.
    """
    opens = [0, *pivots, len(dag)]
    made = np.concatenate([np.zeros((len(dag), 1)), np.cumsum(fractions.runs, axis=1)], axis=1)
    found: list[tuple[float, int, int, int]] = []
    following: dict[int, npt.NDArray[np.int32]] = {}
    for last in range(2, len(pivots) + 1):
        begin, end = opens[last], opens[last + 1]
        # By operator and the window that the path begins in: the least that lives of a path to a reader, and who reads next.
        length = np.full((len(dag), last), np.inf)
        length[begin:end] = 0.0
        reader = following[last] = np.full((len(dag), last), -1, dtype=np.int32)
        for i in reversed(range(begin)):
            users = [j for j in dag.users[i] if j < end]
            # What first runs after the moment lies on no path from there.
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
    """Per stage: bytes over the budget at its first run, when all that runs again in a window does so just before it is read.

    0 at the pivots. An estimate: it says where a further moment may be worth having.
    """
    over = np.zeros(len(dag))
    opens = [0, *pivots, len(dag)]
    for window, (begin, end) in enumerate(pairwise(opens)):
        over[begin:end] = _held(dag, window, begin, end, fractions) - budget
    over[list(pivots)] = 0.0
    return over


def _held(dag: Dag, window: int, begin: int, end: int, fractions: Fractions) -> Parts:
    """Bytes at the first runs of the stages `begin` to `end` - 1, which are a window."""
    change = np.zeros(end - begin + 1)
    reads: list[list[tuple[int, float]]] = [[] for _ in range(end)]
    """per operator: stages in which it is read, and how far"""
    for stage in range(begin, end):
        # Its own output is there while it runs.
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
                # So much is needed until this stage.
                change[stage + 1 - begin] -= (part - needed) * dag.bytes[i]
                needed = part
        change[max(start - begin, 0)] += needed * dag.bytes[i]
        if start > begin and i < begin:
            # Until it is made again only what lived when the window began is there.
            change[0] += min(here, needed) * dag.bytes[i]
            change[start - begin] -= min(here, needed) * dag.bytes[i]
    return dag.fixed_bytes + np.array(dag.workspace[begin:end]) + np.cumsum(change)[:-1]


OVER = 0.01
"""of the budget: what a moment must be over it to be added"""
ADDED = 3
"""moments added to a linear program"""
IDLE = 2
"""rounds without a price after which a moment is dropped"""
STALLED = 12
"""rounds in which a linear program's bound must rise..."""
RISE = 0.01
"""...by this part of what it says of re-runs, or they end"""


class CutGeneration:
    """The bound of one graph and budget, from `pivots` up."""

    def __init__(self, dag: Dag, budget: int, pivots: tuple[int, ...]) -> None:
        self.dag = dag
        self.budget = budget
        self.best = dag.once_seconds
        self.pivots = pivots
        """moments of the best program"""
        self.paths: tuple[Path, ...] = ()
        """its paths that have a price"""
        self.starts: list[frozenset[Rerun]] = []
        """the answers of all programs, rounded"""

    def climb(self, deadline: float, enough: float) -> bool:
        """Solve programs until the bound is `enough` or rises no more; False where the clock ended that."""
        pivots, paths = self.pivots, self.paths
        idle = dict.fromkeys(pivots, 0)
        began = time.monotonic()
        bests: list[float] = []
        while self.best < enough:
            now = time.monotonic()
            spent, began = now - began, now
            if deadline - now <= spent:
                # The next round is hardly shorter.
                return False
            answer = solve_lp(self.dag, self.budget, pivots, any_order=False, seconds=deadline - now, paths=paths)
            self.starts.extend(answer.reruns)
            if not answer.solved:
                return False
            fractions = answer.fractions
            if fractions is None:
                # It is infeasible, or there was nothing to solve.
                self.best = max(self.best, answer.bound_seconds)
                break
            priced = [path for path, price in zip(paths, fractions.paths) if price > 0.0]
            if answer.bound_seconds > self.best:
                self.best, self.pivots, self.paths = answer.bound_seconds, pivots, tuple(priced)
            bests.append(self.best)
            if len(bests) > STALLED and bests[-1] - bests[-1 - STALLED] <= RISE * (self.best - self.dag.once_seconds):
                break
            for pivot, price in zip(pivots, fractions.moments):
                idle[pivot] = 0 if price > 0.0 else idle[pivot] + 1
            over = bytes_over(self.dag, self.budget, pivots, fractions)
            worst = np.argsort(-over, kind="stable")
            added = apart(worst[over[worst] > OVER * self.budget].tolist(), ADDED)
            followed = [] if self.dag.read is not None else violated(self.dag, pivots, fractions)
            if not added and not followed:
                break
            idle |= dict.fromkeys(added, 0)
            pivots = tuple(sorted({*(pivot for pivot in pivots if idle[pivot] < IDLE), *added}))
            paths = tuple(path for path in dict.fromkeys([*priced, *followed]) if path.pivot in pivots)
        return True


def apart(stages: Iterable[int], most: int) -> list[int]:
    """The first of `stages` that are not next to each other."""
    chosen: list[int] = []
    for stage in stages:
        if len(chosen) < most and all(abs(stage - other) > 2 for other in chosen):
            chosen.append(stage)
    return chosen
