"""Plans of a bare graph at any number of budgets; what `tightfit.planner.plan.Planner` is for profiles of models."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from tightfit.planner.graphs.bounds.bound import Bound, ClassBound, any_schedule_bound, class_bound
from tightfit.planner.graphs.incumbents import Incumbents, fastest
from tightfit.planner.graphs.plan_result import GraphOutcome, Least, finished, infeasible
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
    ANY_SHARE,
    NEIGHBOUR_BYTES,
    Progress,
    checked_budget,
    checked_gap,
    checked_limit,
    finish_seconds,
)
from tightfit.profiles.schema import Profile

EXACT_OPERATORS = 20
"""graphs up to here are solved over all schedules of the class"""
EXACT_MOVES = 8
"""operators of a graph that names a disk, up to which it is solved so"""
PRICES = (None, 0.05, 0.5, 1.0)
"""of a second of the disk, in seconds of computation, that searches are made with; None: nothing is moved"""
PRICED_OPERATORS = 32
"""up to here what memory is worth is told exactly: about all of them are solved within a second or two"""
LEAST_OPERATORS = 64
"""up to here the exact solver is asked for one byte less than the smallest budget found"""
SHARES = (0.97, 0.93, 0.85, 0.7, 0.5, 0.3)
"""of what a budget has above the floor, within which the disk is planned for as well while the gap is not closed"""
EXACT_WORK = 30.0
"""deterministic seconds of CP-SAT; such graphs take a fraction of one"""
EXACT_SECONDS = 0.5
"""that exact solutions may take by the clock in all, and a chain's checkpoints by the clock and the processor, whatever the
time limit; most take a fifth of it"""
GRANTED = 0.1
"""of the time limit, in seconds of the processor, for a first schedule that fits"""
LEAST_GRANTED = 1.0
"""the same for each try at a smaller budget, at most"""
LOWEST_SHARE = 0.3
"""of the time limit, for the lowest peak where no search finds what fits"""
SWEPT = 0.5
"""of the bytes over the budget, that a sweep may leave where a search starts from it: otherwise it helps little and takes time"""
NEAR = 1e-3
"""a search that is so near its bound has little left to gain but the proof"""
CLOSING_SHARE, CLOSING_SECONDS = 1.0, 2.0
"""times the seconds that a search has taken so far, and at least: for another try to prove the best; one that gains little is the last"""
GAINED = 0.5
"""of a gap: what such a try leaves of it, at most, where another follows"""
CLOSED_OPERATORS = 128
"""up to here a program over all places for re-runs is tried first, which proves the best where it is solved to its end"""
ROUNDS = 4000
"""of ruin and recreate"""
STARTS = 4
"""schedules, the best so far and of those that the bound gives, with so many rounds each"""


NEIGHBOUR_SHARE = 10


class GraphPlanner:
    """One bare graph, any number of budgets."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.dag = dag_of(profile)
        self.chain = as_chain(self.dag)
        self.floor_bytes = self.dag.floor_bytes
        self.lowest_bytes = self.floor_bytes
        """no schedule of the class has a lower peak, as far as that is proven"""
        self.found = Incumbents()
        """schedules found so far: where the search at other budgets starts"""
        self.interrupted = False
        """whether Ctrl-C ended the search of the latest `plan`, which was made of what had been found"""
        self._gap = EXACT
        """share of its time by which a schedule may be slower than the best where that is enough; to rounding at least"""
        self._minimum: Least | None = None
        self._lowest: Lowest | None = None
        self._any_bounds: dict[int, tuple[Bound, float]] = {}
        """by budget, and the seconds that they were given"""
        self._exact_left = EXACT_SECONDS
        for rule in rules_for(self.dag):
            self._note(RULES[rule](self.dag))
        self._note(belady_schedule(self.dag, self.floor_bytes))

    def policies(self) -> tuple[str, ...]:
        """The fixed rules that mean something for this graph."""
        return rules_for(self.dag)

    @staticmethod
    def class_bound(solved: Plan) -> float:
        """Seconds that no schedule of the class undercuts, as far as was proven for this plan."""
        return solved.bound_seconds

    @staticmethod
    def neighbour_bytes(budget_bytes: int) -> int:
        """As of models, or a tenth of the budget where that is less: graphs may hold bytes or GiB."""
        return min(NEIGHBOUR_BYTES, max(1, budget_bytes // NEIGHBOUR_SHARE))

    def plan(
        self,
        budget_bytes: int,
        *,
        policy: str | None = None,
        time_limit: float = 30.0,
        gap: float = 0.0,
        progress: Progress | None = None,
    ) -> Plan:
        """As `tightfit.planner.plan.plan`; the budget is on the bytes that are live, fixed ones included.

        Two things are done whatever the limit: the schedule is written down and replayed, in about 0.1 ms per run, and a graph
        that can be solved exactly has `EXACT_SECONDS` for it. Raises KeyboardInterrupt only where nothing was found to fit yet.
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
            # A search that was cut may not have come to what was known before it: the fixed rules, and schedules of other budgets.
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

    def bound(self, budget_bytes: int, *, time_limit: float = 30.0) -> float | None:
        """Seconds that no schedule of the class undercuts at a budget; None: none fits.

        By linear programs, which say less than a plan's own bound but at every budget as much, or exactly for few operators.
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
        found = class_bound(self.dag, budget_bytes, known, deadline=deadline)
        return None if found.seconds == float("inf") else found.seconds

    def smallest_plan(self, *, policy: str | None = None, time_limit: float = 30.0) -> Plan:
        """The plan of the smallest budget, in full."""
        time_limit = checked_limit(time_limit)
        started = time.monotonic()
        self._exact_left = EXACT_SECONDS
        deadline = started + (1 - ANY_SHARE) * self._searching(time_limit)
        least = self._least(policy or "solver", deadline, time_limit)
        budget = least.carried.peak_bytes
        any_bound = self._any_bound(budget, ANY_SHARE * time_limit)
        outcome = GraphOutcome(carried=least.carried, bound_seconds=any_bound.seconds, timely=least.timely)
        return finished(self.profile, self.dag, budget, policy or "solver", outcome, any_bound, started)

    def minimum_bytes(self, *, policy: str | None = None, time_limit: float = 30.0) -> int:
        """The smallest budget for which `plan` has a plan."""
        time_limit = checked_limit(time_limit)
        self._exact_left = EXACT_SECONDS
        return self._least(policy or "solver", time.monotonic() + time_limit, time_limit).carried.peak_bytes

    def any_bound(self, budget: int, *, seconds: float) -> float:
        """Seconds that no schedule at all undercuts at a budget, worked out within `seconds`; infinity: none fits."""
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
        """Seconds of the limit that a search may take; in the rest the answer is written down."""
        return max(0.5 * time_limit, time_limit - finish_seconds(len(self.dag), time_limit))

    @contextmanager
    def _exact_seconds(self, deadline: float) -> Iterator[float]:
        """For one exact solution: half of the time to the deadline, so that a search can follow, or what is left of the allowance."""
        started = time.monotonic()
        yield max(0.0, self._exact_left, 0.5 * (deadline - started))
        self._exact_left -= time.monotonic() - started

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
        if dag.operators <= EXACT_OPERATORS:
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
        """The graph names a disk: the exact solver for few operators, otherwise a search for each price of the disk."""
        dag = self.dag
        found: list[Carried] = []
        proven = dag.once_seconds
        if dag.operators <= EXACT_MOVES:
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
        for number, price in enumerate(PRICES):
            ends = started + 0.7 * span * (number + 1) / len(PRICES)
            reruns = self._search_moves(budget, budget, price, ends, GRANTED * span / 4, started + 0.8 * span, found)
            if reruns is not None:
                self._report(progress, started, "carried out", found[-1].seconds, dag.once_seconds)
            if price is None and reruns is not None:
                plain = self._note(reruns)
        # All is on the disk that can be: what `floor_bytes` is worth in full always fits.
        found.append(self._smallest(budget))
        best = min(found, key=lambda carried: carried.seconds)
        bound = class_bound(dag, budget, plain, deadline=started + 0.85 * span, enough=best.seconds)
        proven = max(proven, bound.seconds)
        stalled = False
        for share in SHARES:
            before = best.seconds
            for price in PRICES:
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
        """What a search at one price of the disk finds `within` so many bytes, carried out in the whole budget; its re-runs.

        Transfers take memory beside what a search counts: what fits into less may be faster in all.
        """
        dag = self.dag
        variant = dag if price is None else dag.moving(worth_moving(dag, price), price)
        search = EvictionSearch(variant, within, deadline=deadline, granted=granted, latest=latest)
        memory = search.first(self._plain_seeds(within, deadline) if price is None else [(), touch_and_go(variant)])
        reruns = None if memory is None else search.improve(memory, rounds=ROUNDS // len(PRICES))
        self._ended(search.timely)
        if reruns is not None:
            carried = carry(variant, reruns, budget)
            found.append(carried)
            self.found.moved.append(carried)
        return reruns

    def _plain_seeds(self, budget: int, deadline: float) -> list[frozenset[Rerun]]:
        """Where a search that moves nothing starts: the optimum without a disk, where it is known."""
        if self.dag.operators > EXACT_OPERATORS:
            return self._seeds(budget, deadline)
        with self._exact_seconds(deadline) as allowed:
            solved = exact.fastest(self.dag, budget, work=EXACT_WORK, seconds=allowed)
        self._ended(solved.timely)
        return [*self._seeds(budget, deadline), *([solved.reruns] if solved.reruns is not None else [])]

    def _smallest(self, budget: int) -> Carried:
        """Everything on the disk but what runs needs: `floor_bytes`."""
        variant = self.dag.moving(range(len(self.dag)), 1.0)
        return carry(variant, touch_and_go(variant), budget)

    def _report(self, progress: Progress | None, started: float, stage: str, incumbent: float, bound: float) -> None:
        if progress is not None:
            left = gap_to(incumbent, bound)
            spent = time.monotonic() - started
            progress({"stage": stage, "incumbent": incumbent, "bound": bound, "gap": left, "seconds": spent})

    def _search(self, budget: int, started: float, deadline: float, progress: Progress | None) -> GraphOutcome:
        """First to `NEAR` of the bound, or to the gap that is asked for where that is more; then on to it."""
        dag, near_enough = self.dag, max(self._gap, NEAR)

        def report(stage: str, incumbent: float, bound: float) -> None:
            self._report(progress, started, stage, incumbent, bound)

        span = deadline - started
        ends = started + 0.95 * span
        search = EvictionSearch(dag, budget, deadline=started + 0.3 * span, granted=GRANTED * span, latest=ends)
        near = LargeNeighbourhood(dag, budget)
        memory = search.first(self._seeds(budget, deadline))
        best = self.found.lowest()
        enough = float("inf")
        if memory is not None:
            # A schedule that fits is there: from here on by the clock alone.
            search.deadline, search.granted = started + 0.1 * span, 0.0
            best = self._note(search.improve(memory, rounds=ROUNDS // 4))
            report("improved", seconds(dag, best), dag.once_seconds)
            enough = seconds(dag, best) * (1 - near_enough)
        if memory is None and time.monotonic() > ends:
            self._ended(False)
            return GraphOutcome(carried=None, bound_seconds=dag.once_seconds, timely=self.found.timely)
        # Where nothing fits yet, less of the time: the rest is for the smallest budget.
        share = 0.55 if memory is not None else 0.3
        bound = ClassBound(dag, budget, best)
        bound.linear(started + share * span, enough)
        bound.whole(started + 0.2 * span, enough)
        if bound.seconds == float("inf") and memory is None:
            self.lowest_bytes = max(self.lowest_bytes, budget + 1)
            self._ended(bound.timely, search.timely)
            return GraphOutcome(carried=None, bound_seconds=dag.once_seconds, timely=self.found.timely)
        # The bound's answers hold too much between moments; what eviction makes of them is often the best there is.
        enough = bound.seconds / (1 - near_enough)
        search.deadline = min(time.monotonic() + (0.15 if bound.small else 0.2) * span, ends)
        left = enough - dag.once_seconds
        # The last programs have the best answers.
        improved = search.improve_best([best, *reversed(bound.starts)], starts=STARTS, rounds=ROUNDS, enough=left)
        if improved is None:
            # Nothing fits that eviction finds: from the lowest peak, or what is least over the budget, on.
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
            improved = search.improve_best([best], starts=1, rounds=ROUNDS, enough=left)
        best = best if improved is None else self._note(improved)
        report("bounded and improved", seconds(dag, best), bound.seconds)
        if dag.operators <= CLOSED_OPERATORS and gap_to(seconds(dag, best), bound.seconds) > self._gap:
            best = self._note(self._proven(near, bound, best, started, ends))
            report("proven as far as it goes", seconds(dag, best), bound.seconds)
        if gap_to(seconds(dag, best), bound.seconds) > near_enough:
            best = self._note(self._polished(search, near, bound, best, ends, near_enough))
            report("polished", seconds(dag, best), bound.seconds)
        if gap_to(seconds(dag, best), bound.seconds) > EXACT:
            self._ended(bound.timely, search.timely, near.timely)
        stalled = False
        if self._gap < gap_to(seconds(dag, best), bound.seconds) <= near_enough:
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
        """What is left of the gap closed as far as that goes: the schedule, and whether trying was given up before its time was over.

        A try has the time that everything before it took, and another follows only where it left half of the gap or less: where the last
        bit cannot be proven, planning takes a little more than twice as long, and not all of its limit.
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
        """The schedule, or a better one, with a bound that proves it the best of all, where the program of the whole class is solved in as
        much time as everything before it took.
        """
        dag = self.dag
        now = time.monotonic()
        allowed = min(ends - now, max(CLOSING_SECONDS, CLOSING_SHARE * (now - started)))
        places = {(stage, i) for stage in range(len(dag)) for i in range(stage) if dag.recomputable[i]}
        with suppress(TimeoutError):
            # Over all stages with all places a stretch is the whole class.
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
        """The schedule improved in parts, and the bound in whole numbers, until they are within `gap`: the better the schedule, the fewer
        the bound looks at, and its answers are schedules to start from.
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
                improved = search.improve_best([best, *reversed(answers)], starts=2, rounds=ROUNDS, enough=enough)
                best = best if improved is None else improved
        return near.polished(best, deadline=deadline, enough=bound.seconds / (1 - gap))

    def _ended(self, *timely: bool) -> None:
        """Note of searches whether they ended by their own rules."""
        self.found.timely = self.found.timely and all(timely)

    def _seeds(self, budget: int, deadline: float) -> list[frozenset[Rerun]]:
        """Schedules to start from: the fastest that fits of those found before, rules, a sweep, and checkpoints of a chain."""
        seeds = [RULES[rule](self.dag) for rule in rules_for(self.dag)]
        sweep = belady_schedule(self.dag, budget)
        if peak_bytes(self.dag, sweep) - budget <= SWEPT * (self.found.peaks[frozenset()] - budget):
            seeds.append(sweep)
        if self.chain is not None:
            with self._exact_seconds(deadline) as allowed:
                # By the clock and by the processor: a process that was held up has them all the same.
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
            seeds.extend([placed] if placed is not None else [])
        return [fastest(self.dag, budget, self.found.peaks), *seeds]

    # --- the smallest budget ---------------------------------------------------------------------------------------

    def _least(self, policy: str, deadline: float, limit: float) -> Least:
        """The schedule with the lowest peak that `plan` can find; once found, searched again under a larger limit where it was cut."""
        if policy != "solver":
            carried = carry(self.dag, rule_reruns(self.dag, policy))
            return Least(carried=carried, lowest_bytes=carried.peak_bytes)
        if self.dag.read is not None:
            return Least(carried=self._smallest(self.floor_bytes), lowest_bytes=self.floor_bytes)
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
            # Another search came lower.
            least = replace(
                least, carried=carry(self.dag, self.found.lowest()), timely=least.timely and self.found.timely
            )
            if not least.timely:
                self.found.end(None, limit, timely=False)
        self._minimum = least
        return least

    def _find_least(self, deadline: float) -> Least:
        dag = self.dag
        if dag.operators <= EXACT_OPERATORS:
            with self._exact_seconds(deadline) as allowed:
                solved = exact.smallest(dag, work=EXACT_WORK, seconds=allowed)
            if solved.proven and solved.reruns is not None:
                carried = carry(dag, solved.reruns)
                return Least(carried=carried, lowest_bytes=carried.peak_bytes)
            self._ended(solved.timely)
            self._note(solved.reruns or ())
        proving = EXACT_OPERATORS < dag.operators <= LEAST_OPERATORS
        left = max(0.0, deadline - time.monotonic())
        found_by = deadline - 0.5 * left if proving else deadline
        self._evicted_least(found_by - 0.3 * left, min(LEAST_GRANTED, GRANTED * left), found_by)
        low = self._lowest_peak(0.4 * max(0.0, found_by - time.monotonic())).bytes
        best = self.found.lowest()
        if self.found.peaks[best] > low:
            near = LargeNeighbourhood(dag, low)
            best = self._note(near.deepened(best, deadline=found_by - 0.3 * (found_by - time.monotonic())))
            best = self._note(near.polished(best, deadline=found_by))
            self._ended(near.timely)
        if proving:
            best, low = self._proven_least(best, low, deadline)
        return Least(carried=carry(dag, best), lowest_bytes=low, timely=self.found.timely)

    def _proven_least(self, best: frozenset[Rerun], low: int, deadline: float) -> tuple[frozenset[Rerun], int]:
        """The schedule of lowest peak and what none undercuts: byte by byte, since programs of parts of a budget know no single bytes."""
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
        """`lowest_peak`, until it has come to its end once."""
        if self._lowest is None or not self._lowest.ended:
            self._lowest = lowest_peak(self.dag, seconds)
            self.lowest_bytes = max(self.lowest_bytes, self._lowest.bytes)
        self._ended(self._lowest.ended)
        self._note(self._lowest.reruns or ())
        return self._lowest

    def _evicted_least(self, deadline: float, granted: float, latest: float) -> None:
        """Note schedules of ever lower peaks, as far down as eviction finds them."""
        low = self.floor_bytes - 1
        best = self.found.lowest()
        while self.found.peaks[best] - low > 1:
            if time.monotonic() > deadline:
                self._ended(False)
                break
            # Halve what is left between what cannot be and what was found, then byte by byte.
            for budget in ((low + self.found.peaks[best]) // 2, self.found.peaks[best] - 1):
                search = EvictionSearch(self.dag, budget, deadline=deadline, granted=granted, latest=latest)
                memory = search.first(self._seeds(budget, deadline))
                self._ended(search.timely)
                if memory is not None:
                    best = self._note(memory.reruns)
                    break
                low = max(low, budget)
