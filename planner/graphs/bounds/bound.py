"""The two lower bounds of a bare graph's plan: one for schedules of its class, one for any schedule at all.

Both come from the programs of `lp_bound` over a few moments of the schedule. For the class, linear programs are solved
in sequence, and each gets the moments and paths that the previous answer violates (`cut_generation`); those whose dual
price stays 0 for some rounds are dropped. Then a program with few moments and the best linear program are solved with
0/1 variables (`milp_bound`), and again with the moments and crowded runs (35) at which the answer's schedule exceeds
the budget. All answers, rounded to schedules, are starting points for the search. docs/formulation.md has the programs:
(29) to (35).
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
from tightfit.planner.search_options import ALL, SearchOptions

ANY_MOMENTS = (1, 2, 4, 8)
"""moments of the programs for any schedule, solved one after the other"""
FIRST = 8
"""moments of the first linear program for the class"""
SHORT = 0.95
"""the first moments are chosen among first runs at which the best schedule known holds at least this share of the
budget
"""
FEW = (4, 8)
"""moments of the integer programs that are tried first: so few that they are often solved to optimality..."""
FEW_SHARE = 0.1
"""...in this share of the remaining time, which is the limit of each"""
SOLVED = 4000
"""operators times moments up to which an integer program ends within a minute"""
HARDER = 2
"""an integer program with more moments takes at least this many times as long as the one before it"""
REFINED = 1
"""moments added to an integer program in one round: each makes it harder"""


@dataclass(frozen=True, kw_only=True)
class Bound:
    seconds: float
    timely: bool = True
    """whether the clock left room for all that was to be tried, and every program was solved to its end"""


def path_pivots(dag: Dag, count: int) -> list[int]:
    """At most `count` operators, evenly spaced on the graph's longest path (in operators): along it memory rises and
    falls most.
    """
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
    """A lower bound on the seconds of any schedule within `budget_bytes`, whatever it reorders; infinity where none
    fits.

    `seconds` limit the work.
    """
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


class ClassBound:
    """A lower bound on the seconds of every schedule of the class, which `linear` and `whole` raise; infinity where
    none fits.

    `reruns` is the best schedule known: the first moments are chosen where it nearly fills the budget. Work stops once
    the bound reaches `enough` seconds, and the integer programs leave out schedules that take longer than that.
    """

    def __init__(self, dag: Dag, budget_bytes: int, reruns: frozenset[Rerun], options: SearchOptions = ALL) -> None:
        self.dag = dag
        self.options = options
        self.budget = budget_bytes
        self.seconds = dag.once_seconds
        self.timely = True
        """whether the clock left room for all that was to be tried"""
        self.starts: list[frozenset[Rerun]] = []
        """the programs' answers as schedules, which may exceed the budget between moments: starting points for a
        search; the last are the best
        """
        self._climb = CutGeneration(dag, budget_bytes, _shortest(dag, budget_bytes, reruns, FIRST), options)
        self._few = list(FEW) if options.few_moments else []
        self._pivots = self._climb.pivots
        self._crowded: frozenset[Rerun] = frozenset()
        self._ended = False
        """whether no integer program is to be solved any more: the last one's schedule suggests no further moment or
        crowded run, or the linear programs ran out of time
        """

    @property
    def small(self) -> bool:
        """Whether the best linear program is small enough to be solved with 0/1 variables."""
        return len(self.dag) * len(self._pivots) <= SOLVED

    def linear(self, deadline: float, enough: float) -> None:
        """Solve linear programs as long as they raise the bound, until `deadline` at most."""
        self.timely = self._climb.climb(deadline, enough)
        # While linear programs still raise the bound, they do so faster than integer programs: these are skipped then.
        self._ended = not self.timely
        self.seconds = self._climb.best
        self.starts.extend(self._climb.starts)
        self._pivots = self._climb.pivots

    def whole(self, deadline: float, enough: float, reruns: frozenset[Rerun]) -> None:
        """Solve integer programs: first those of few moments, at which the schedule `reruns` nearly fills the budget,
        then the best linear program's, refined round by round. A later call goes on where the one before stopped.
        """
        while self._few and self.seconds < enough and not self._ended:
            pivots = _shortest(self.dag, self.budget, reruns, self._few.pop(0))
            self._solve(pivots, enough, FEW_SHARE * (deadline - time.monotonic()))
        spent = 0.0
        while self.options.refined and self.seconds < enough and not self._ended:
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
            if not self.options.crowded:
                finer = finer[0], crowded
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
    """`pivots` and `crowded`, plus what the schedule `reruns` violates: the first run at which it exceeds the budget
    most as a moment, and every re-run at which it exceeds the budget as a crowded run.
    """
    sequence = runs(dag, reruns)
    over = sorted((-held, run) for run, held in zip(sequence, memory(dag, sequence)) if held > budget_bytes)
    added = apart([stage for _, (stage, _) in over if stage not in pivots], REFINED)
    return tuple(sorted({*pivots, *added})), crowded.union(run for _, run in over if run[0] != run[1])


def _shortest(dag: Dag, budget_bytes: int, reruns: frozenset[Rerun], most: int) -> tuple[int, ...]:
    """Up to `most` moments, evenly spaced among the first runs at which the schedule nearly fills
    the budget (`SHORT`).
    """
    sequence = runs(dag, reruns)
    held = {operator: size for (stage, operator), size in zip(sequence, memory(dag, sequence)) if stage == operator}
    least = min(SHORT * budget_bytes, max(held.values()))
    # When the first operator runs there is no output yet that could have been freed.
    short = [operator for operator in range(1, len(dag)) if held[operator] >= least] or [len(dag) - 1]
    return tuple(sorted({short[(2 * k + 1) * len(short) // (2 * most)] for k in range(most)}))
