"""The two lower bounds of a bare graph's plan: one for schedules of its class, one for any schedule at all.

Both come from the programs of `lp_bound` over a few moments of the schedule. For the class, linear programs are solved
in sequence, and each gets the moments and paths that the previous answer violates (`cut_generation`); those whose dual
price stays 0 for some rounds are dropped. Then a program with few moments and the best linear program are solved with
0/1 variables (`milp_bound`), and again with the moments and crowded runs (35) at which the answer's schedule exceeds
the budget. All answers, rounded to schedules, are starting points for the search. docs/formulation.md has the programs:
(29) to (35).
"""

from __future__ import annotations

from collections.abc import Sequence

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.graphs.bounds.cut_generation import CutGeneration, apart
from tightfit.planner.graphs.bounds.lp_bound import LpAnswer, Path, solve_lp
from tightfit.planner.graphs.bounds.milp_bound import solve_milp
from tightfit.planner.graphs.problem.dag import Dag
from tightfit.planner.graphs.problem.schedule import Rerun, memory, peak_bytes, runs
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
FEW_WORK = 0.5
"""...in so many units of work each"""
SOLVED = 4000
"""operators times moments up to which integer programs are of use"""
HARDER = 2
"""an integer program with more moments takes at least this many times the work of the one before it"""
REFINED = 1
"""moments added to an integer program in one round: each makes it harder"""


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


class AnyBound:
    """A lower bound on the seconds of any schedule within `budget` bytes, whatever it reorders, which `rise` raises;
    infinity where none fits.
    """

    def __init__(self, dag: Dag, budget: int) -> None:
        self.dag = dag
        self.budget = budget
        self.seconds = dag.once_seconds if dag.floor_bytes <= budget else float("inf")
        open_ = dag.floor_bytes <= budget < peak_bytes(dag, ())
        self._waiting = list(ANY_MOMENTS) if open_ else []

    @property
    def ended(self) -> bool:
        """Whether no program is left to solve."""
        return not self._waiting

    def rise(self, cutoff: Cutoff = NEVER) -> None:
        """Solve one program more, with more moments. Raises TimeoutError where `cutoff` strikes."""
        if not self._waiting:
            return
        pivots = path_pivots(self.dag, self._waiting[0])
        answer = solve_lp(self.dag, self.budget, pivots, any_order=True, cutoff=cutoff)
        self.seconds = max(self.seconds, answer.bound_seconds)
        count = self._waiting.pop(0)
        if len(pivots) < count or self.seconds == float("inf"):
            self._waiting.clear()


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
        self._climb = CutGeneration(dag, budget_bytes, _shortest(dag, budget_bytes, reruns, FIRST), options)
        self.starts = self._climb.starts
        """the programs' answers as schedules, which may exceed the budget between moments: starting points for a
        search; the last are the best
        """
        self._proven = dag.once_seconds
        """the bound of the integer programs"""
        self._few = list(FEW) if options.few_moments else []
        self._pivots: tuple[int, ...] | None = None
        """moments of the next integer program; None: those of the best linear program"""
        self._crowded: frozenset[Rerun] = frozenset()
        self._ended = not options.refined
        """whether no integer program is to be solved any more: the last one's schedule suggests no further moment or
        crowded run, or there are too many moments
        """

    @property
    def seconds(self) -> float:
        """The bound."""
        return max(self._climb.best, self._proven)

    @property
    def ended(self) -> bool:
        """Whether no work raises the bound any more."""
        return self._climb.ended and not self._few and self._ended

    def linear(self, work: float, enough: float, cutoff: Cutoff = NEVER) -> None:
        """Solve linear programs as long as they raise the bound, in `work` units."""
        self._climb.climb(work, enough, cutoff)

    def whole(self, work: float, enough: float, reruns: frozenset[Rerun], cutoff: Cutoff = NEVER) -> None:
        """Solve integer programs in `work` units: first those of few moments, at which the schedule `reruns` nearly
        fills the budget, then the best linear program's, refined round by round. A later call goes on where the one
        before stopped.

        While linear programs still raise the bound, they do so with less work: then this does nothing.
        """
        if not self._climb.ended:
            return
        while self._few and self.seconds < enough:
            self._solve(_shortest(self.dag, self.budget, reruns, self._few.pop(0)), enough, FEW_WORK, cutoff)
        latest = 0.0
        while self.seconds < enough and not self._ended and work > HARDER * latest:
            pivots = self._climb.pivots if self._pivots is None else self._pivots
            if len(self.dag) * len(pivots) > SOLVED:
                self._ended = True
                break
            crowded = self._crowded
            answer = self._solve(pivots, enough, work, cutoff, paths=self._climb.paths, crowded=sorted(crowded))
            latest = answer.work
            work -= latest
            if not answer.solved or not answer.reruns:
                break
            finer = _refined(self.dag, self.budget, pivots, crowded, answer.reruns[0])
            if not self.options.crowded:
                finer = finer[0], crowded
            self._ended = finer == (pivots, crowded)
            self._pivots, self._crowded = finer

    def _solve(
        self,
        pivots: tuple[int, ...],
        enough: float,
        work: float,
        cutoff: Cutoff,
        *,
        paths: Sequence[Path] = (),
        crowded: Sequence[Rerun] = (),
    ) -> LpAnswer:
        answer = solve_milp(
            self.dag, self.budget, pivots, work=work, cutoff=cutoff, paths=paths, crowded=crowded, most=enough
        )
        self._proven = max(self._proven, answer.bound_seconds)
        self.starts.extend(answer.reruns)
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
