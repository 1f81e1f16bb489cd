"""`GraphPlanner`, which plans a bare graph at any number of budgets, as `tightfit.planner.plan.Planner` does for
models.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from tightfit.planner.graphs.bounds.bound import Bound, ClassBound, any_schedule_bound, class_bound
from tightfit.planner.graphs.incumbents import Incumbents, fastest
from tightfit.planner.graphs.plan_result import GraphOutcome, LowestPeak, finished, infeasible
from tightfit.planner.graphs.problem.actions import Carried, carry, timed, touch_and_go, worth_moving
from tightfit.planner.graphs.problem.dag import dag_of
from tightfit.planner.graphs.problem.schedule import Rerun, peak_bytes, pruned, seconds
from tightfit.planner.graphs.search import exact
from tightfit.planner.graphs.search.baselines import RULES, rule_reruns, rules_for
from tightfit.planner.graphs.search.belady import belady_schedule
from tightfit.planner.graphs.search.chain_dp import as_chain, checkpoints
from tightfit.planner.graphs.search.eviction_search import EvictionSearch
from tightfit.planner.graphs.search.exact_moves import fastest_with_moves
from tightfit.planner.graphs.search.large_neighbourhood import LargeNeighbourhood, lowest_peak
from tightfit.planner.graphs.search.subproblem import BETTER, Lowest, Subproblem
from tightfit.planner.plan_result import EXACT, gap_to
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import (
    ALL,
    ANY_SHARE,
    NEIGHBOUR_BYTES,
    TIME_LIMIT,
    Progress,
    SearchOptions,
    checked_budget,
    checked_gap,
    checked_limit,
    finish_seconds,
)
from tightfit.profiles.schema import Profile

EXACT_OPERATORS = 20
"""number of operators up to which a graph is solved exactly over all schedules of the class"""
EXACT_MOVES = 8
"""the same for a graph that names a disk"""
PRICES = (None, 0.05, 0.5, 1.0)
"""prices of a second of the disk, in seconds of computation, with which searches are made; None: nothing is moved"""
ONE_PRICE = (None, 0.5)
"""these where `SearchOptions.prices` is off"""
PRICED_OPERATORS = 32
"""number of operators up to which `GraphPlanner.bound`, from which the value of memory is computed, is exact: nearly
all such graphs are solved within a second or two
"""
LEAST_OPERATORS = 64
"""number of operators up to which the exact solver is asked for a schedule one byte below the smallest budget found"""
SHARES = (0.97, 0.93, 0.85, 0.7, 0.5, 0.3)
"""while the gap is open, schedules with moves are also searched for within these shares of the budget above the floor;
transfers then use the rest
"""
EXACT_WORK = 30.0
"""limit of CP-SAT's deterministic seconds; such graphs take a fraction of one"""
EXACT_SECONDS = 0.5
"""seconds that all exact solutions may take together by the clock, and a chain's checkpoints by the clock and the
processor, whatever the time limit; most take a fifth of it
"""
GRANTED = 0.1
"""processor time for a first schedule that fits, as a share of the time limit"""
LEAST_GRANTED = 1.0
"""the same for each try at a smaller budget, in seconds at most"""
LOWEST_SHARE = 0.3
"""share of the time limit for the lowest peak, where no search finds a schedule that fits"""
SWEPT = 0.5
"""a search starts from a sweep (`belady`) only if that leaves at most this share of keep-all's excess over the budget:
otherwise it helps little and takes time
"""
NEAR = 1e-3
"""gap below which a search has little left to gain but the proof of optimality"""
CLOSING_SHARE, CLOSING_SECONDS = 1.0, 2.0
"""time for one more attempt to close the gap: this multiple of the seconds taken so far, and so
many seconds at least
"""
GAINED = 0.5
"""another attempt follows only if the last one left at most this share of the gap"""
CLOSED_OPERATORS = 128
"""number of operators up to which one program over all places for re-runs is tried first; solved to optimality, it is a
proof for the class
"""
ROUNDS = 4000
"""rounds of ruin and recreate"""
STARTS = 4
"""schedules that ruin and recreate starts from, of the best so far and those rounded from the bound's answers, with
`ROUNDS` each
"""


NEIGHBOUR_SHARE = 10


class GraphPlanner:
    """Plans one bare graph at any number of budgets; later searches start from the schedules of earlier ones."""

    def __init__(self, profile: Profile, options: SearchOptions = ALL) -> None:
        self.profile = profile
        self.options = options
        self.dag = dag_of(profile)
        self.chain = as_chain(self.dag)
        self.floor_bytes = self.dag.floor_bytes
        self.lowest_bytes = self.floor_bytes
        """proven lower bound on the peak of every schedule of the class"""
        self.found = Incumbents()
        """schedules found so far, from which searches at other budgets start"""
        self.interrupted = False
        """whether Ctrl-C ended the search of the latest `plan`, whose plan is then the best found until then"""
        self._gap = EXACT
        """gap at which the search may stop: what the caller asked for, or `EXACT` where that is more"""
        self._minimum: LowestPeak | None = None
        self._lowest: Lowest | None = None
        self._any_bounds: dict[int, tuple[Bound, float]] = {}
        """budget -> (bound, seconds that its computation was given)"""
        self._exact_left = EXACT_SECONDS
        for rule in rules_for(self.dag):
            self._note(RULES[rule](self.dag))
        if options.sweep:
            self._note(belady_schedule(self.dag, self.floor_bytes))

    def policies(self) -> tuple[str, ...]:
        """The fixed rules that mean something for this graph."""
        return rules_for(self.dag)

    @staticmethod
    def class_bound(solved: Plan) -> float:
        """The lower bound, in seconds, proven for this plan's class of schedules."""
        return solved.bound_seconds

    @staticmethod
    def neighbour_bytes(budget_bytes: int) -> int:
        """Distance in bytes to the neighbouring budget that is planned to value memory: as for models, or a tenth of
        the budget where that is less, since graphs may hold bytes or GiB.
        """
        return min(NEIGHBOUR_BYTES, max(1, budget_bytes // NEIGHBOUR_SHARE))

    def plan(
        self,
        budget_bytes: int,
        *,
        policy: str | None = None,
        time_limit: float = TIME_LIMIT,
        gap: float = 0.0,
        progress: Progress | None = None,
    ) -> Plan:
        """As `tightfit.planner.plan.plan`; `budget_bytes` limits the live bytes, fixed ones included, and `time_limit`
        is in seconds.

        Two things are done whatever the time limit: the schedule is written down and replayed, in about 0.1 ms per run,
        and a graph small enough for the exact solver gets `EXACT_SECONDS` for it. Raises InputError for impossible
        arguments, and KeyboardInterrupt only where no schedule that fits was found yet.
        """
        budget_bytes, time_limit, gap = checked_budget(budget_bytes), checked_limit(time_limit), checked_gap(gap)
        started = time.monotonic()
        self._exact_left = EXACT_SECONDS
        self._gap = max(EXACT, gap)
        deadline = started + self._searching(time_limit)
        name = policy or "solver"
        self.interrupted = False
        any_bound = Bound(seconds=self.dag.once_seconds, timely=False)
        if name == "solver":
            self.found.begin(budget_bytes, time_limit)
            try:
                any_bound = self._any_bound(budget_bytes, ANY_SHARE * time_limit)
                outcome = self._solve(budget_bytes, started, deadline, progress)
            except KeyboardInterrupt:
                self._ended(False)
                best = self.found.best(self.dag, budget_bytes)
                if best is None:
                    self.found.end(budget_bytes, time_limit, timely=False)
                    raise
                self.interrupted = True
                outcome = GraphOutcome(carried=best, bound_seconds=any_bound.seconds, timely=False)
            outcome = self.found.no_slower(self.dag, budget_bytes, outcome)
            self.found.end(budget_bytes, time_limit, timely=outcome.timely)
        else:
            carried = carry(self.dag, rule_reruns(self.dag, name))
            fits = carried.peak_bytes <= budget_bytes
            try:
                any_bound = self._any_bound(budget_bytes, ANY_SHARE * time_limit)
            except KeyboardInterrupt:
                if not fits:
                    raise
                self.interrupted = True
            outcome = GraphOutcome(carried=carried if fits else None, bound_seconds=any_bound.seconds)
        if name == "solver" and not outcome.timely:
            # A search that a time limit cut may be worse than what was known before it: the fixed rules, and schedules
            # of other budgets.
            known = self.found.best(self.dag, budget_bytes)
            if known is not None and (outcome.carried is None or known.seconds < outcome.carried.seconds):
                outcome = replace(outcome, carried=known)
        if outcome.carried is None:
            least = self._least(name, deadline, time_limit)
            if least.carried.peak_bytes > budget_bytes:
                return infeasible(
                    self.profile,
                    self.dag,
                    budget_bytes,
                    name,
                    least,
                    any_bound,
                    started,
                    floor=self.floor_bytes,
                    timely=outcome.timely,
                )
            outcome = replace(outcome, carried=least.carried, timely=outcome.timely and least.timely)
        return finished(
            self.profile,
            self.dag,
            budget_bytes,
            name,
            outcome,
            any_bound,
            started,
            asked=gap,
            interrupted=self.interrupted,
        )

    def bound(self, budget_bytes: int, *, time_limit: float = TIME_LIMIT) -> float | None:
        """A lower bound on the seconds of every schedule of the class within `budget_bytes`; None: none fits.

        It is exact for up to `PRICED_OPERATORS` operators without a disk, where the solver finishes. Otherwise it comes
        from linear programs: weaker than a plan's own bound, but of the same kind at every budget, so that budgets can
        be compared. `time_limit` is in seconds.
        """
        time_limit = checked_limit(time_limit)
        if self.floor_bytes > budget_bytes:
            return None
        deadline = time.monotonic() + time_limit
        if self.dag.read is None and self.dag.operators <= PRICED_OPERATORS:
            solved = exact.fastest(self.dag, budget_bytes, work=EXACT_WORK, seconds=0.5 * time_limit)
            if solved.proven:
                return None if solved.reruns is None else min(seconds(self.dag, solved.reruns), solved.bound)
        known = fastest(self.dag, budget_bytes, self.found.peaks)
        found = class_bound(self.dag, budget_bytes, known, deadline=deadline, options=self.options)
        return None if found.seconds == float("inf") else found.seconds

    def smallest_plan(self, *, policy: str | None = None, time_limit: float = TIME_LIMIT) -> Plan:
        """The plan at the smallest budget found, with its bounds."""
        time_limit = checked_limit(time_limit)
        started = time.monotonic()
        self._exact_left = EXACT_SECONDS
        deadline = started + (1 - ANY_SHARE) * self._searching(time_limit)
        least = self._least(policy or "solver", deadline, time_limit)
        budget = least.carried.peak_bytes
        any_bound = self._any_bound(budget, ANY_SHARE * time_limit)
        outcome = GraphOutcome(carried=least.carried, bound_seconds=any_bound.seconds, timely=least.timely)
        return finished(self.profile, self.dag, budget, policy or "solver", outcome, any_bound, started)

    def minimum_bytes(self, *, policy: str | None = None, time_limit: float = TIME_LIMIT) -> int:
        """The smallest budget, in bytes, for which `plan` finds a plan."""
        time_limit = checked_limit(time_limit)
        self._exact_left = EXACT_SECONDS
        return self._least(policy or "solver", time.monotonic() + time_limit, time_limit).carried.peak_bytes

    def any_bound(self, budget: int, *, seconds: float) -> float:
        """A lower bound on the seconds of any schedule at all within `budget` bytes, computed within `seconds`;
        infinity: none fits.
        """
        return self._any_bound(budget, seconds).seconds

    def _any_bound(self, budget: int, seconds: float) -> Bound:
        if self.found.peaks[frozenset()] <= budget:
            return Bound(seconds=self.dag.once_seconds)
        if self.floor_bytes > budget:
            return Bound(seconds=float("inf"))
        known, given = self._any_bounds.get(budget, (None, 0.0))
        if known is None or (not known.timely and seconds > given):
            bound = any_schedule_bound(self.dag, budget, seconds=seconds)
            if known is not None and not bound.timely:
                bound = replace(bound, seconds=max(known.seconds, bound.seconds))
            known = bound
            self._any_bounds[budget] = bound, seconds
        return known

    def _searching(self, time_limit: float) -> float:
        """Seconds of the time limit that a search may take; the rest is for writing the answer down."""
        return max(0.5 * time_limit, time_limit - finish_seconds(len(self.dag), time_limit))

    @contextmanager
    def _exact_seconds(self, deadline: float) -> Iterator[float]:
        """Time for one exact solution: half of the time to `deadline`, so that a search can follow, or what is left of
        `EXACT_SECONDS`, whichever is more.
        """
        started = time.monotonic()
        yield max(0.0, self._exact_left, 0.5 * (deadline - started))
        self._exact_left -= time.monotonic() - started

    @property
    def _exactly(self) -> bool:
        """Whether the exact solver is asked for this graph."""
        return self.options.exact and self.dag.operators <= EXACT_OPERATORS

    @property
    def _rounds(self) -> int:
        """Rounds of ruin and recreate."""
        return ROUNDS if self.options.ruin_and_recreate else 0

    # --- the search ------------------------------------------------------------------------------------------------

    def _note(self, reruns: Iterable[Rerun]) -> frozenset[Rerun]:
        kept = pruned(self.dag, reruns)
        self.found.peaks[kept] = peak_bytes(self.dag, kept)
        return kept

    def _solve(self, budget: int, started: float, deadline: float, progress: Progress | None) -> GraphOutcome:
        dag = self.dag
        if self.found.peaks[frozenset()] <= budget:
            return GraphOutcome(carried=carry(dag, ()), bound_seconds=dag.once_seconds)
        if self.lowest_bytes > budget:
            return GraphOutcome(carried=None, bound_seconds=dag.once_seconds)
        if dag.read is not None:
            return self._solve_with_moves(budget, started, deadline, progress)
        if self._exactly:
            with self._exact_seconds(deadline) as allowed:
                solved = exact.fastest(dag, budget, work=EXACT_WORK, seconds=allowed)
            if solved.proven:
                carried = None if solved.reruns is None else carry(dag, solved.reruns)
                bound = dag.once_seconds if carried is None else min(carried.seconds, solved.bound)
                return GraphOutcome(carried=carried, bound_seconds=bound)
            self._ended(solved.timely)
            self._note(solved.reruns or ())
        return self._search(budget, started, deadline, progress)

    def _solve_with_moves(
        self, budget: int, started: float, deadline: float, progress: Progress | None
    ) -> GraphOutcome:
        """The search for a graph that names a disk: the exact solver for few operators, otherwise a search for each
        price of the disk.
        """
        dag = self.dag
        found: list[Carried] = []
        proven = dag.once_seconds
        if dag.operators <= EXACT_MOVES and self.options.exact_moves:
            with self._exact_seconds(deadline) as allowed:
                solved = fastest_with_moves(dag, budget, work=EXACT_WORK, seconds=allowed)
            if solved.actions is not None:
                found.append(timed(dag, solved.actions))
            if solved.proven and found:
                return GraphOutcome(carried=found[-1], bound_seconds=min(found[-1].seconds, solved.bound))
            self._ended(solved.timely)
            proven = solved.bound
        span = deadline - started
        found.extend(carried for carried in self.found.moved if carried.peak_bytes <= budget)
        plain: frozenset[Rerun] = frozenset()
        prices = PRICES if self.options.prices else ONE_PRICE
        for number, price in enumerate(prices):
            ends = started + 0.7 * span * (number + 1) / len(prices)
            reruns = self._search_moves(budget, budget, price, ends, GRANTED * span / 4, started + 0.8 * span, found)
            if reruns is not None:
                self._report(progress, started, "carried out", found[-1].seconds, dag.once_seconds)
            if price is None and reruns is not None:
                plain = self._note(reruns)
        # With everything on the disk that can be, the peak is `floor_bytes`, so this schedule always fits.
        found.append(self._smallest(budget))
        best = min(found, key=lambda carried: carried.seconds)
        bound = class_bound(
            dag, budget, plain, deadline=started + 0.85 * span, enough=best.seconds, options=self.options
        )
        proven = max(proven, bound.seconds)
        stalled = False
        for share in SHARES if self.options.shares else ():
            before = best.seconds
            for price in prices:
                if gap_to(best.seconds, proven) <= self._gap or time.monotonic() > started + 0.95 * span:
                    break
                lower = self.floor_bytes + int(share * (budget - self.floor_bytes))
                ends = started + 0.95 * span
                self._search_moves(lower, budget, price, ends, 0.0, ends, found)
                best = min(found, key=lambda carried: carried.seconds)
            if best.seconds >= before and gap_to(best.seconds, proven) <= NEAR:
                stalled = time.monotonic() <= started + 0.95 * span
                break
        self.found.moved.append(best)
        return GraphOutcome(
            carried=best, bound_seconds=proven, timely=self.found.timely and bound.timely, stalled=stalled
        )

    def _search_moves(
        self,
        within: int,
        budget: int,
        price: float | None,
        deadline: float,
        granted: float,
        latest: float,
        found: list[Carried],
    ) -> frozenset[Rerun] | None:
        """Search at one `price` of the disk for re-runs that fit `within` bytes; None: none were found. Their full
        schedule, with transfers moved within the whole `budget`, is appended to `found`.

        The search does not count the memory that early fetches and late frees take: re-runs for fewer bytes leave more
        of it, and the schedule may be faster.
        """
        dag = self.dag
        variant = dag if price is None else dag.moving(worth_moving(dag, price), price)
        search = EvictionSearch(variant, within, deadline=deadline, granted=granted, latest=latest)
        memory = search.first(self._plain_seeds(within, deadline) if price is None else [(), touch_and_go(variant)])
        reruns = None if memory is None else search.improve(memory, rounds=self._rounds // len(PRICES))
        self._ended(search.timely)
        if reruns is not None:
            carried = carry(variant, reruns, budget)
            found.append(carried)
            self.found.moved.append(carried)
        return reruns

    def _plain_seeds(self, budget: int, deadline: float) -> list[frozenset[Rerun]]:
        """Starting points of a search that moves nothing, with the exact optimum without a disk where the graph is
        small enough.
        """
        if not self._exactly:
            return self._seeds(budget, deadline)
        with self._exact_seconds(deadline) as allowed:
            solved = exact.fastest(self.dag, budget, work=EXACT_WORK, seconds=allowed)
        self._ended(solved.timely)
        return [*self._seeds(budget, deadline), *([solved.reruns] if solved.reruns is not None else [])]

    def _smallest(self, budget: int) -> Carried:
        """The schedule of lowest peak, `floor_bytes`: every output is on disk unless the current operator needs it. Its
        transfers may use `budget` bytes.
        """
        variant = self.dag.moving(range(len(self.dag)), 1.0)
        return carry(variant, touch_and_go(variant), budget)

    def _report(self, progress: Progress | None, started: float, stage: str, incumbent: float, bound: float) -> None:
        if progress is not None:
            left = gap_to(incumbent, bound)
            spent = time.monotonic() - started
            progress({"stage": stage, "incumbent": incumbent, "bound": bound, "gap": left, "seconds": spent})

    def _search(self, budget: int, started: float, deadline: float, progress: Progress | None) -> GraphOutcome:
        """The search without a disk: first until the gap is `NEAR`, or the gap that was asked for where that is more,
        then on to the latter.
        """
        dag, near_enough = self.dag, max(self._gap, NEAR)

        def report(stage: str, incumbent: float, bound: float) -> None:
            self._report(progress, started, stage, incumbent, bound)

        span = deadline - started
        ends = started + 0.95 * span
        search = EvictionSearch(dag, budget, deadline=started + 0.3 * span, granted=GRANTED * span, latest=ends)
        near = LargeNeighbourhood(dag, budget, self.options)
        memory = search.first(self._seeds(budget, deadline))
        best = self.found.lowest()
        enough = float("inf")
        if memory is not None:
            # A schedule that fits has been found: from here on only the clock counts, not processor time.
            search.deadline, search.granted = started + 0.1 * span, 0.0
            best = self._note(search.improve(memory, rounds=self._rounds // 4))
            report("improved", seconds(dag, best), dag.once_seconds)
            enough = seconds(dag, best) * (1 - near_enough)
        if memory is None and time.monotonic() > ends:
            self._ended(False)
            return GraphOutcome(carried=None, bound_seconds=dag.once_seconds, timely=self.found.timely)
        # The bound gets less time where nothing fits yet: the rest is for the smallest budget.
        share = 0.55 if memory is not None else 0.3
        bound = ClassBound(dag, budget, best, self.options)
        bound.linear(started + share * span, enough)
        bound.whole(started + 0.2 * span, enough)
        if bound.seconds == float("inf") and memory is None:
            self.lowest_bytes = max(self.lowest_bytes, budget + 1)
            self._ended(bound.timely, search.timely)
            return GraphOutcome(carried=None, bound_seconds=dag.once_seconds, timely=self.found.timely)
        # The bound's answers exceed the budget between moments; repaired by eviction they are often the best schedules
        # found.
        enough = bound.seconds / (1 - near_enough)
        search.deadline = min(time.monotonic() + (0.15 if bound.small else 0.2) * span, ends)
        left = enough - dag.once_seconds
        # Later programs give better answers, so these come first.
        improved = search.improve_best([best, *reversed(bound.starts)], starts=STARTS, rounds=self._rounds, enough=left)
        if improved is None:
            # Eviction finds nothing that fits: go on from the schedule of lowest peak.
            least = self._lowest_peak(min(LOWEST_SHARE * span, max(0.0, ends - time.monotonic())))
            if least.bytes > budget:
                self._ended(bound.timely, search.timely)
                return GraphOutcome(carried=None, bound_seconds=dag.once_seconds, timely=self.found.timely)
            best = self.found.lowest()
            until = min(max(started + 0.53 * span, time.monotonic() + 0.05 * span), ends)
            best = self._note(near.deepened(best, deadline=until))
            best = self._note(near.polished(best, deadline=min(until + 0.02 * span, ends), enough=float("inf")))
            if self.found.peaks[best] > budget:
                self._ended(bound.timely, search.timely, near.timely)
                return GraphOutcome(carried=None, bound_seconds=dag.once_seconds, timely=self.found.timely)
            search.deadline = started + 0.8 * span
            improved = search.improve_best([best], starts=1, rounds=self._rounds, enough=left)
        best = best if improved is None else self._note(improved)
        report("bounded and improved", seconds(dag, best), bound.seconds)
        whole = self.options.whole_class and dag.operators <= CLOSED_OPERATORS
        if whole and gap_to(seconds(dag, best), bound.seconds) > self._gap:
            best = self._note(self._proven(near, bound, best, started, ends))
            report("proven as far as it goes", seconds(dag, best), bound.seconds)
        if gap_to(seconds(dag, best), bound.seconds) > near_enough:
            best = self._note(self._polished(search, near, bound, best, ends, near_enough))
            report("polished", seconds(dag, best), bound.seconds)
        if gap_to(seconds(dag, best), bound.seconds) > EXACT:
            self._ended(bound.timely, search.timely, near.timely)
        stalled = False
        if self.options.closing and self._gap < gap_to(seconds(dag, best), bound.seconds) <= near_enough:
            best, stalled = self._closed(search, near, bound, best, started, ends)
            report("closed", seconds(dag, best), bound.seconds)
        return GraphOutcome(
            carried=carry(dag, best), bound_seconds=bound.seconds, timely=self.found.timely, stalled=stalled
        )

    def _closed(
        self,
        search: EvictionSearch,
        near: LargeNeighbourhood,
        bound: ClassBound,
        best: frozenset[Rerun],
        started: float,
        ends: float,
    ) -> tuple[frozenset[Rerun], bool]:
        """Close what is left of the gap as far as possible: the schedule, and whether this was given up before the time
        was over.

        One attempt has as much time as everything before it took, and another follows only if it halved the gap at
        least. So where the last bit cannot be proven, planning takes a little more than twice as long, and not all of
        its time limit.
        """
        dag = self.dag

        def left() -> float:
            return gap_to(seconds(dag, best), bound.seconds)

        while left() > self._gap:
            before, now = left(), time.monotonic()
            allowed = max(CLOSING_SECONDS, CLOSING_SHARE * (now - started))
            if now + allowed > ends:
                self._ended(False)
                return best, False
            best = self._note(self._polished(search, near, bound, best, now + allowed, self._gap))
            if left() > GAINED * before:
                self._ended(bound.timely, search.timely, near.timely)
                return best, True
        return best, False

    def _proven(
        self, near: LargeNeighbourhood, bound: ClassBound, best: frozenset[Rerun], started: float, ends: float
    ) -> frozenset[Rerun]:
        """Try to solve one program over the whole class, in as much time as everything before it took: `best` or a
        better schedule. Where the solver finishes, `bound` is raised so that it proves the schedule optimal.
        """
        dag = self.dag
        now = time.monotonic()
        allowed = min(ends - now, max(CLOSING_SECONDS, CLOSING_SHARE * (now - started)))
        places = {(stage, i) for stage in range(len(dag)) for i in range(stage) if dag.recomputable[i]}
        with suppress(TimeoutError):
            # A stretch over all stages with all places covers the whole class.
            found = Subproblem(dag, near.budget, best, 0, len(dag), places, seconds=allowed).solve()
            best = found.reruns or best
            if found.ended:
                bound.seconds = max(bound.seconds, seconds(dag, best) - BETTER * dag.once_seconds)
        return best

    def _polished(
        self,
        search: EvictionSearch,
        near: LargeNeighbourhood,
        bound: ClassBound,
        best: frozenset[Rerun],
        deadline: float,
        gap: float,
    ) -> frozenset[Rerun]:
        """Improve the schedule by large-neighbourhood search and the bound by integer programs, until they are within
        `gap`.

        The two help each other: a better schedule cuts down the integer programs, and their answers are schedules to
        start from.
        """
        began = time.monotonic()
        left = deadline - began
        best = near.deepened(best, deadline=began + (0.2 if bound.small else 0.6) * left)
        if bound.small:
            best = near.polished(best, deadline=began + 0.2 * left, enough=bound.seconds / (1 - gap))
            known = len(bound.starts)
            bound.whole(began + 0.75 * left, seconds(self.dag, best) * (1 - gap))
            answers = bound.starts[known:]
            if answers:
                search.deadline = began + 0.85 * left
                enough = bound.seconds / (1 - gap) - self.dag.once_seconds
                improved = search.improve_best([best, *reversed(answers)], starts=2, rounds=self._rounds, enough=enough)
                best = best if improved is None else improved
        return near.polished(best, deadline=deadline, enough=bound.seconds / (1 - gap))

    def _ended(self, *timely: bool) -> None:
        """Record for some searches whether they ended by their own rules and not by a time limit."""
        self.found.timely = self.found.timely and all(timely)

    def _seeds(self, budget: int, deadline: float) -> list[frozenset[Rerun]]:
        """Schedules to start from: the fastest found before that fits, fixed rules, a sweep (`belady`), and a chain's
        optimal checkpoints.
        """
        seeds = [RULES[rule](self.dag) for rule in rules_for(self.dag)]
        sweep = belady_schedule(self.dag, budget) if self.options.sweep else frozenset()
        if peak_bytes(self.dag, sweep) - budget <= SWEPT * (self.found.peaks[frozenset()] - budget):
            seeds.append(sweep)
        if self.chain is not None and self.options.chains:
            with self._exact_seconds(deadline) as allowed:
                # Late only if both clock and processor time are used up, so that a process that was held up gets them
                # all the same.
                ends, granted = time.monotonic() + allowed, time.process_time() + allowed
                try:
                    placed = checkpoints(
                        self.dag,
                        self.chain,
                        budget,
                        late=lambda: time.monotonic() > ends and time.process_time() > granted,
                    )
                except TimeoutError:
                    placed = None
                    self._ended(False)
            if placed is not None:
                self._note(placed)  # so it is the first seed, which is tried however late it is
        return [fastest(self.dag, budget, self.found.peaks), *seeds]

    # --- the smallest budget ---------------------------------------------------------------------------------------

    def _least(self, policy: str, deadline: float, limit: float) -> LowestPeak:
        """The schedule with the lowest peak that `plan` can find. It is remembered; a search that the time limit cut is
        repeated under a larger `limit`.
        """
        if policy != "solver":
            carried = carry(self.dag, rule_reruns(self.dag, policy))
            return LowestPeak(carried=carried, lowest_bytes=carried.peak_bytes)
        if self.dag.read is not None:
            return LowestPeak(carried=self._smallest(self.floor_bytes), lowest_bytes=self.floor_bytes)
        least = self._minimum
        if least is None or self.found.cut_before(None, limit):
            self.found.begin(None, limit)
            try:
                least = self._find_least(deadline)
            except KeyboardInterrupt:
                self._ended(False)
                self.found.end(None, limit, timely=False)
                raise
            self.lowest_bytes = max(self.lowest_bytes, least.lowest_bytes)
            beaten = any(peak < least.carried.peak_bytes for peak in self.found.late[0].values())
            self._ended(not beaten)
            least = replace(least, lowest_bytes=self.lowest_bytes, timely=least.timely and not beaten)
            self.found.end(None, limit, timely=least.timely)
        if min(self.found.peaks.values()) < least.carried.peak_bytes:
            # Another search has found a lower peak since.
            least = replace(
                least, carried=carry(self.dag, self.found.lowest()), timely=least.timely and self.found.timely
            )
            if not least.timely:
                self.found.end(None, limit, timely=False)
        self._minimum = least
        return least

    def _find_least(self, deadline: float) -> LowestPeak:
        dag = self.dag
        if self._exactly:
            with self._exact_seconds(deadline) as allowed:
                solved = exact.smallest(dag, work=EXACT_WORK, seconds=allowed)
            if solved.proven and solved.reruns is not None:
                carried = carry(dag, solved.reruns)
                return LowestPeak(carried=carried, lowest_bytes=carried.peak_bytes)
            self._ended(solved.timely)
            self._note(solved.reruns or ())
        proving = EXACT_OPERATORS < dag.operators <= LEAST_OPERATORS
        left = max(0.0, deadline - time.monotonic())
        found_by = deadline - 0.5 * left if proving else deadline
        self._evicted_least(found_by - 0.3 * left, min(LEAST_GRANTED, GRANTED * left), found_by)
        low = self._lowest_peak(0.4 * max(0.0, found_by - time.monotonic())).bytes
        best = self.found.lowest()
        if self.found.peaks[best] > low:
            near = LargeNeighbourhood(dag, low, self.options)
            best = self._note(near.deepened(best, deadline=found_by - 0.3 * (found_by - time.monotonic())))
            best = self._note(near.polished(best, deadline=found_by))
            self._ended(near.timely)
        if proving:
            best, low = self._proven_least(best, low, deadline)
        return LowestPeak(carried=carry(dag, best), lowest_bytes=low, timely=self.found.timely)

    def _proven_least(self, best: frozenset[Rerun], low: int, deadline: float) -> tuple[frozenset[Rerun], int]:
        """The schedule of lowest peak and a lower bound on every peak, in bytes, by asking the exact solver again and
        again for one byte less: the other programs count memory in units of the budget, too coarsely for single bytes.
        """
        while self.found.peaks[best] > low:
            left = deadline - time.monotonic()
            if left <= 0:
                self._ended(False)
                break
            budget = self.found.peaks[best] - 1
            solved = exact.fastest(self.dag, budget, work=EXACT_WORK, seconds=left, until=deadline)
            if solved.reruns is None:
                self._ended(solved.timely)
                return best, self.found.peaks[best] if solved.proven else low
            best = self._note(solved.reruns)
        return best, low

    def _lowest_peak(self, seconds: float) -> Lowest:
        """`lowest_peak`, called again each time until its solver has finished once; the answer is remembered."""
        if self._lowest is None or not self._lowest.ended:
            self._lowest = lowest_peak(self.dag, seconds)
            self.lowest_bytes = max(self.lowest_bytes, self._lowest.bytes)
        self._ended(self._lowest.ended)
        self._note(self._lowest.reruns or ())
        return self._lowest

    def _evicted_least(self, deadline: float, granted: float, latest: float) -> None:
        """Note schedules of ever lower peaks, as low as eviction finds them."""
        low = self.floor_bytes - 1
        best = self.found.lowest()
        while self.found.peaks[best] - low > 1:
            if time.monotonic() > deadline:
                self._ended(False)
                break
            # First bisect between the peak that eviction did not reach and the lowest one found, then go down by single
            # bytes.
            for budget in ((low + self.found.peaks[best]) // 2, self.found.peaks[best] - 1):
                search = EvictionSearch(self.dag, budget, deadline=deadline, granted=granted, latest=latest)
                memory = search.first(self._seeds(budget, deadline))
                self._ended(search.timely)
                if memory is not None:
                    best = self._note(memory.reruns)
                    break
                low = max(low, budget)
