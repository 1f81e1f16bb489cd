"""Linear programs of `windows`, one after the other, each with moments and paths that the one before did without."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from tightfit.planner.graphs.bounds.cut_generation import bytes_over, violated
from tightfit.planner.graphs.bounds.lp_bound import Path, solve_windows
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun

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


class Climb:
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
            answer = solve_windows(self.dag, self.budget, pivots, any_order=False, seconds=deadline - now, paths=paths)
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
