"""The two bounds of a plan: for its class, and for any schedule at all; moments are chosen, programs solved (`lp_bound`).

For the class moments are found step by step, and paths with them: those that the linear program's last answer does
without (`cut_generation`). What has no price for some rounds is dropped again. Then few moments and the best program are
solved in whole numbers (`milp_bound`), and again with moments and crowded runs at which the answer's schedule holds too
much. All answers, made whole, are where a search may start. docs/formulation.md has the programs: (29) to (35).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tightfit.planner.graphs.bounds.cut_generation import CutGeneration, apart
from tightfit.planner.graphs.bounds.lp_bound import LpAnswer, Path, solve_lp
from tightfit.planner.graphs.bounds.milp_bound import solve_milp
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, memory, runs

ANY_MOMENTS = (1, 2, 4, 8)
FIRST = 8
"""moments to begin with"""
SHORT = 0.95
"""they lie where the best schedule known holds this share of the budget"""
FEW = (4, 8)
"""moments of programs in whole numbers that are tried first: such are often solved to their end..."""
FEW_SHARE = 0.1
"""...in this share of the time"""
SOLVED = 4000
"""operators times moments of programs in whole numbers that end within a minute"""
HARDER = 2
"""times the seconds of a program in whole numbers: what the next takes at least, with more moments"""
REFINED = 1
"""moments added to a program in whole numbers: each makes it harder"""


@dataclass(frozen=True, kw_only=True)
class Bound:
    seconds: float
    timely: bool = True
    """whether the clock left room for all that was to be tried, and every program was solved to its end"""


def path_pivots(dag: Dag, count: int) -> list[int]:
    """At most `count` operators on the path of the graph that takes in most of the memory's rise and fall."""
    length = [0.0] * len(dag)
    source = [-1] * len(dag)
    for i in range(len(dag)):
        for j in dag.inputs[i]:
            if length[j] + 1.0 > length[i]:
                length[i], source[i] = length[j] + 1.0, j
    at = max(range(len(dag)), key=length.__getitem__)
    path = []
    while at >= 0:
        path.append(at)
        at = source[at]
    path.reverse()
    return sorted({path[(2 * k + 1) * len(path) // (2 * count)] for k in range(count)})


def any_schedule_bound(dag: Dag, budget_bytes: int, *, seconds: float) -> Bound:
    """Seconds that no schedule at all undercuts, whatever it reorders; infinity where none fits."""
    deadline = time.monotonic() + seconds
    best = dag.once_seconds
    timely = True
    for count in ANY_MOMENTS:
        left = deadline - time.monotonic()
        if left <= 0:
            timely = False
            break
        pivots = path_pivots(dag, count)
        answer = solve_lp(dag, budget_bytes, pivots, any_order=True, seconds=left)
        timely = timely and answer.solved
        best = max(best, answer.bound_seconds)
        if len(pivots) < count or best == float("inf"):
            break
    return Bound(seconds=best, timely=timely)


def class_bound(
    dag: Dag, budget_bytes: int, reruns: frozenset[Rerun], *, deadline: float, enough: float = float("inf")
) -> Bound:
    """Seconds that no schedule of the class undercuts, by linear programs alone."""
    bound = ClassBound(dag, budget_bytes, reruns)
    bound.linear(deadline, enough)
    return Bound(seconds=bound.seconds, timely=bound.timely)


class ClassBound:
    """Seconds that no schedule of the class undercuts; infinity where none fits. `reruns` is the best schedule known: the first
    moments are laid where its memory is short.

    Work ends early where the bound is `enough`; slower schedules are not looked at.
    """

    def __init__(self, dag: Dag, budget_bytes: int, reruns: frozenset[Rerun]) -> None:
        self.dag = dag
        self.budget = budget_bytes
        self.seconds = dag.once_seconds
        self.timely = True
        """whether the clock left room for all that was to be tried"""
        self.starts: list[frozenset[Rerun]] = []
        """schedules but for the memory between moments: where a search may start; the last are the best"""
        self._climb = CutGeneration(dag, budget_bytes, _shortest(dag, budget_bytes, reruns, FIRST))
        self._few = [_shortest(dag, budget_bytes, reruns, count) for count in FEW]
        self._pivots = self._climb.pivots
        self._crowded: frozenset[Rerun] = frozenset()
        self._ended = False
        """whether the program in whole numbers has nothing to be refined by: moments, or runs that are not crowded yet"""

    @property
    def small(self) -> bool:
        """Whether the best program is small enough for whole numbers."""
        return len(self.dag) * len(self._pivots) <= SOLVED

    def linear(self, deadline: float, enough: float) -> None:
        """Solve linear programs as long as that raises the bound."""
        self.timely = self._climb.climb(deadline, enough)
        # As long as they raise the bound they do so in less time than programs in whole numbers.
        self._ended = not self.timely
        self.seconds = self._climb.best
        self.starts.extend(self._climb.starts)
        self._pivots = self._climb.pivots

    def whole(self, deadline: float, enough: float) -> None:
        """Solve few moments in whole numbers, then the best linear program, or go on where that was left."""
        while self._few and self.seconds < enough and not self._ended:
            self._solve(self._few.pop(0), enough, FEW_SHARE * (deadline - time.monotonic()))
        spent = 0.0
        while self.seconds < enough and not self._ended:
            began = time.monotonic()
            if deadline - began <= HARDER * spent:
                self.timely = False
                break
            paths, crowded = self._climb.paths, self._crowded
            answer = self._solve(self._pivots, enough, deadline - began, paths=paths, crowded=sorted(crowded))
            spent = time.monotonic() - began
            if not answer.solved or not answer.reruns:
                break
            finer = _refined(self.dag, self.budget, self._pivots, crowded, answer.reruns[0])
            self._ended = finer == (self._pivots, crowded)
            self._pivots, self._crowded = finer

    def _solve(
        self,
        pivots: tuple[int, ...],
        enough: float,
        seconds: float,
        *,
        paths: Sequence[Path] = (),
        crowded: Sequence[Rerun] = (),
    ) -> LpAnswer:
        answer = solve_milp(self.dag, self.budget, pivots, seconds=seconds, paths=paths, crowded=crowded, most=enough)
        self.seconds = max(self.seconds, answer.bound_seconds)
        self.starts.extend(answer.reruns)
        self.timely = self.timely and answer.solved
        return answer


def _refined(
    dag: Dag, budget_bytes: int, pivots: tuple[int, ...], crowded: frozenset[Rerun], reruns: frozenset[Rerun]
) -> tuple[tuple[int, ...], frozenset[Rerun]]:
    """The moments and the crowded runs, with all re-runs at which the schedule is over the budget, and the moment where it is furthest."""
    sequence = runs(dag, reruns)
    over = sorted((-held, run) for run, held in zip(sequence, memory(dag, sequence)) if held > budget_bytes)
    added = apart([stage for _, (stage, _) in over if stage not in pivots], REFINED)
    return tuple(sorted({*pivots, *added})), crowded.union(run for _, run in over if run[0] != run[1])


def _shortest(dag: Dag, budget_bytes: int, reruns: frozenset[Rerun], most: int) -> tuple[int, ...]:
    """Up to `most` moments, evenly laid among those where the schedule's memory is short."""
    sequence = runs(dag, reruns)
    held = {operator: size for (stage, operator), size in zip(sequence, memory(dag, sequence)) if stage == operator}
    least = min(SHORT * budget_bytes, max(held.values()))
    # At the first operator's run nothing is there that could have been dropped.
    short = [operator for operator in range(1, len(dag)) if held[operator] >= least] or [len(dag) - 1]
    return tuple(sorted({short[(2 * k + 1) * len(short) // (2 * most)] for k in range(most)}))
