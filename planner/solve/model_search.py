"""The search at any budget, and for the smallest one: columns that `column_generation` finds, realised as schedules in
a time limit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property

from tightfit.planner.plan_result import ROUNDING
from tightfit.planner.problem.layer_figures import KIB
from tightfit.planner.problem.layer_types import LayeredStep
from tightfit.planner.schedule.column_bytes import charged_bytes
from tightfit.planner.schedule.layer_schedule import Column
from tightfit.planner.schedule.realize import CyclePart, Schedule, smallest_arena
from tightfit.planner.search_options import ALL, HELD_UP, SearchOptions, SearchProgress
from tightfit.planner.solve.column_generation import JOINT_BINARIES, ColumnGeneration
from tightfit.planner.solve.greedy import greedy
from tightfit.planner.solve.master_lp import MOVE_PRICE, MasterLp
from tightfit.planner.solve.minimum_budget import lower_peak
from tightfit.planner.solve.model_budget_search import REALIZE_SECONDS, BudgetSearch
from tightfit.planner.solve.policies import POLICIES, all_streamed, rule_columns, rule_part, smallest
from tightfit.planner.solve.pricing import ColumnPool
from tightfit.runtime.common.gc_pause import paused_collector

MINIMUM_STEP = 1e-3
"""share of the smallest budget so far by which it is lower_peak at first"""
LOWEST_SHARE = 0.6
"""share of the time after which column generation for the fewest bytes ends"""
CLEARLY = 0.95
"""share of a budget's room: where a mixture of columns takes at most that, a plan is taken to fit"""
JOINT_ROUNDS = 4
"""limits tried with one program, each lower by the bytes that the schedule before had too many"""
GREEDY_ROUNDS = 6
"""limits tried with greedy choices in the same way"""
RELAXED_SHARE, CAREFUL_SHARE = 0.5, 0.7
"""shares of the time after which column generation ends, under relaxed and under careful constraints"""
RULES_SHARE = 0.25
"""share of the time limit, at most, that is left to realise fixed rules; where they take more, they come first"""
NEAR = 1e-3
"""a fixed rule whose computation takes at most this share longer than the bound of any schedule is realised before
anything is searched for
"""
EARLY_GAP = 3e-3
"""relative gap of a mixture to the bound up to which whole columns near the mixture may make a good plan"""
EARLY_CHOICES = 4
"""choices of columns that the local search then makes"""
FINER_TOLERANCE = 1e-3
"""tolerance of column generation for a better bound, where the best schedule is not near the first one"""
CAREFUL_TOLERANCE = 8e-3
"""tolerance of column generation under careful constraints, which only guides the choice and proves nothing"""
MOST_BYTES = 1 << 50
"""no process holds more; HiGHS gives up on right-hand sides that doubles cannot count exactly"""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    schedule: Schedule | None
    bound_seconds: float
    """no plan of the class is faster; plans under which layers go forward twice are not in it"""
    any_bound_seconds: float = 0.0
    """no schedule at all is faster"""
    interrupted: bool = False
    """whether Ctrl-C ended the search"""
    stalled: bool = False
    """whether only the search for a proof was given up before the time limit"""
    fallback: bool = False
    """the time limit ended the search before it had a plan: a greedy choice or a fixed rule stands in"""
    deterministic: bool = True
    """False where the time limit, or the user, ended the search"""

    @property
    def proven_seconds(self) -> float:
        """The highest bound that holds for the schedule."""
        twice = self.schedule is not None and self.schedule.segments
        return self.any_bound_seconds if twice else max(self.bound_seconds, self.any_bound_seconds)


class Solver:
    """One problem, any number of budgets: columns and proofs are shared."""

    def __init__(self, problem: LayeredStep, options: SearchOptions = ALL) -> None:
        self.problem = problem
        self.options = options
        self.results: list[SearchResult] = []
        """the best at earlier budgets, so that a larger budget never gets a slower plan"""
        self.proven: dict[int, float] = {}
        """budget -> seconds that no plan of the class undercuts, of all searches there"""
        self._outcomes: dict[tuple[int, float], SearchResult] = {}
        """(budget, gap) -> result of a search that came to its end: another one there would find the same"""
        self._lowest: Schedule | None = None
        """the schedule of the lowest peak found"""
        self._lowest_proven = False
        """whether the search for it came to its end"""
        self._by_clock = False
        """whether the clock has ended any search: columns that are there by chance are then not tried before a budget's
        own are priced
        """

    @cached_property
    def pool(self) -> ColumnPool:
        """Columns found so far; the first are those of the fixed rules."""
        pool = ColumnPool(problem=self.problem, options=self.options)
        for rule in (*POLICIES.values(), smallest, all_streamed):
            for kind, column in zip(self.problem.layer_type, rule_columns(self.problem, rule)):
                pool.add(kind, column.decision)
        return pool

    @cached_property
    def _rules(self) -> tuple[CyclePart, ...]:
        parts = [rule_part(self.problem, policy) for policy in POLICIES]
        return tuple(sorted(parts, key=lambda part: part.computing_seconds))

    @property
    def _known(self) -> list[Schedule]:
        """The schedules of the results, and the one of the lowest peak found."""
        found = [result.schedule for result in self.results]
        return [schedule for schedule in (*found, self._lowest) if schedule is not None]

    @property
    def _one_program(self) -> bool:
        """Whether the model is so small that one program decides for all its layers."""
        return self.pool.binaries <= JOINT_BINARIES and self.options.one_program

    @cached_property
    def relaxed(self) -> MasterLp:
        """The restricted master problem under constraints that hold for any plan of the class: it gives bounds."""
        return MasterLp(self.pool, careful=False)

    @cached_property
    def careful(self) -> MasterLp:
        """The restricted master problem under constraints that plans can really keep: it guides the choice of
        columns.
        """
        return MasterLp(self.pool, careful=True)

    def room(self, budget_bytes: int) -> int:
        """Bytes for the arena and the instructions."""
        return min(budget_bytes, MOST_BYTES) - self.problem.taken_bytes

    @cached_property
    def smallest(self) -> Schedule:
        """The schedule of the smallest fixed rule, where the search for the smallest budget starts."""
        return smallest_arena(self.problem, rule_columns(self.problem, smallest))

    def tight(self, budget_bytes: int) -> bool:
        """Whether the budget may be below the smallest one: then that is found first."""
        columns = rule_columns(self.problem, smallest)
        if self.room(budget_bytes) >= 1.1 * charged_bytes(self.problem, columns):
            return False
        # Of many tiles the smallest arena takes minutes to find; one that is found at once may do.
        if (
            "smallest" not in vars(self)
            and smallest_arena(self.problem, columns, deadline=0.0).peak_bytes <= budget_bytes
        ):
            return False
        return self.smallest.peak_bytes > budget_bytes

    # --- at a budget -----------------------------------------------------------------------------------------------

    @paused_collector()
    def solve(
        self,
        budget_bytes: int,
        deadline: float,
        progress: SearchProgress | None,
        *,
        bound: float = 0.0,
        gap: float = 0.0,
    ) -> SearchResult:
        """The fastest schedule found; None where nothing was found to fit. `bound`: seconds that no schedule undercuts;
        `gap`: the share of its time by which a schedule may be slower than the best and still end the search.

        Raises KeyboardInterrupt only where there is no schedule yet.
        """
        earlier_outcome = self._outcomes.get((budget_bytes, gap))
        if earlier_outcome is None:
            outcome = self._solve(budget_bytes, deadline, progress, bound, gap)
        else:
            outcome = replace(earlier_outcome, any_bound_seconds=max(bound, earlier_outcome.any_bound_seconds))
        if outcome.deterministic:
            self._outcomes[budget_bytes, gap] = outcome
        self._by_clock = self._by_clock or not outcome.deterministic
        self.proven[budget_bytes] = max(self.proven.get(budget_bytes, 0.0), outcome.bound_seconds)
        fitting = [one for one in self.results if one.schedule is not None and one.schedule.peak_bytes <= budget_bytes]
        earlier = min(fitting, key=_seconds, default=None)
        if earlier is not None and _seconds(earlier) < _seconds(outcome):
            return replace(
                outcome,
                schedule=earlier.schedule,
                fallback=earlier.fallback,
                deterministic=earlier.deterministic and outcome.deterministic,
            )
        if earlier_outcome is None and outcome.schedule is not None:
            self.results.append(outcome)
        return outcome

    def _solve(
        self, budget_bytes: int, deadline: float, progress: SearchProgress | None, any_bound: float, gap: float
    ) -> SearchResult:
        started = time.monotonic()
        attempt = BudgetSearch(
            problem=self.problem,
            limit=self.room(budget_bytes),
            deadline=deadline,
            started=started,
            progress=progress,
            gap=max(ROUNDING, gap),
            bound=any_bound,
            options=self.options,
        )
        rules_seconds, rules_limit = self._seconds_of_rules(attempt.limit), RULES_SHARE * (deadline - started)
        rules_first = rules_seconds > rules_limit
        # On a busy machine the rules take a few times as long as on an idle one.
        attempt.deadline -= 0.0 if rules_first else min(HELD_UP * rules_seconds, rules_limit)
        fallback = interrupted = False
        try:
            self._by_rules(attempt, any_bound, most=float("inf") if rules_first else any_bound * (1 + NEAR))
            best_rule = attempt.best
            if not attempt.near(any_bound, attempt.gap):
                with attempt.within():
                    self._in_the_class(attempt)
                if attempt.best is best_rule and not attempt.timely and self.options.greedy:
                    self._greedily(attempt)
                    fallback = True
        except KeyboardInterrupt:
            if not attempt.schedules:
                raise
            attempt.timely = False
            interrupted = True
        attempt.deadline = deadline
        self._by_rules(attempt, any_bound)
        return SearchResult(
            schedule=attempt.best,
            bound_seconds=attempt.bound,
            any_bound_seconds=any_bound,
            interrupted=interrupted,
            fallback=fallback,
            deterministic=attempt.timely,
        )

    def bound(self, budget_bytes: int, deadline: float) -> float | None:
        """Seconds per step that no plan of the class undercuts at a budget; None where the model finds none that fits.

        Raises TimeoutError where the deadline strikes first.
        """
        search = ColumnGeneration(relaxation=self.relaxed, limit_bytes=self.room(budget_bytes), deadline=deadline)
        if self._one_program:
            answer = search.joint()
            return None if answer is None else answer.bound_seconds
        lower, _, limit_kept = search.columns()
        if not search.timely:
            self._by_clock = True
            raise TimeoutError
        return search.bound(lower) if limit_kept else None

    def _in_the_class(self, attempt: BudgetSearch) -> None:
        """Search plans of the class (recomputation inside a layer's own backward window), with a bound for all of
        them.
        """
        if self._one_program:
            self._jointly(attempt)
        else:
            self._by_columns(attempt)

    def _jointly(self, attempt: BudgetSearch) -> None:
        """A small model as one program; where its optimum finds no place in the arena, again with a lower limit."""
        for careful in (False, True):
            allowed = attempt.limit
            for _ in range(JOINT_ROUNDS):
                search = ColumnGeneration(
                    relaxation=self.careful if careful else self.relaxed,
                    limit_bytes=allowed,
                    deadline=attempt.deadline,
                    progress=attempt.progress,
                )
                answer = search.joint()
                if answer is None:
                    break
                if allowed == attempt.limit and not careful:
                    attempt.bound = max(attempt.bound, answer.bound_seconds)
                attempt.timely = attempt.timely and answer.proven
                schedule, excess = attempt.try_columns(answer.columns)
                if schedule is not None:
                    search.report("carried out", schedule.seconds, attempt.bound)
                    break
                allowed -= excess
            if attempt.near(attempt.bound, attempt.gap):
                return
        if attempt.near(attempt.bound, 2 * MOVE_PRICE):
            # Without its price on transfers the program may prove the schedule the best.
            search = ColumnGeneration(relaxation=self.relaxed, limit_bytes=attempt.limit, deadline=attempt.deadline)
            answer = search.joint(priced=False)
            if answer is not None:
                attempt.bound = max(attempt.bound, answer.bound_seconds)
                attempt.timely = attempt.timely and answer.proven
                if not attempt.near(attempt.bound, attempt.gap):
                    attempt.try_columns(answer.columns)

    def _by_columns(self, attempt: BudgetSearch) -> None:
        """A large model: a bound under relaxed constraints, columns chosen under those that plans can really keep."""
        relaxed = ColumnGeneration(
            relaxation=self.relaxed,
            limit_bytes=attempt.limit,
            deadline=attempt.until(RELAXED_SHARE),
            progress=attempt.progress,
        )
        careful = ColumnGeneration(
            relaxation=self.careful,
            limit_bytes=attempt.limit,
            deadline=attempt.until(CAREFUL_SHARE),
            tolerance=CAREFUL_TOLERANCE,
            progress=attempt.progress,
        )
        early = replace(attempt, schedules=[])
        chosen = False
        """whether columns chosen near the relaxed mixture have given a schedule"""
        try:
            early.bound = attempt.bound = max(attempt.bound, relaxed.bound(self.relaxed.proven(attempt.limit)))
            if self.results and not self._by_clock and self.options.early_choice:
                self._early(early, careful)
            if not early.good_enough():
                lower, _, limit_kept = relaxed.columns()
                attempt.timely = attempt.timely and relaxed.timely
                if not limit_kept:
                    return
                early.bound = attempt.bound = max(attempt.bound, relaxed.bound(lower))
                for search in (careful, relaxed):
                    if not early.good_enough() and self.options.early_choice:
                        chosen = self._early(early, search)
            if not early.good_enough():
                careful.worth_seconds = min(
                    (schedule.seconds for schedule in (*attempt.schedules, *early.schedules)), default=float("inf")
                )
                self._carefully(attempt, relaxed, careful, chosen=chosen)
        finally:
            attempt.schedules += early.schedules
            attempt.timely = attempt.timely and early.timely
        if attempt.schedules and not attempt.good_enough():
            finer = replace(relaxed, tolerance=FINER_TOLERANCE, deadline=attempt.deadline)
            attempt.bound = max(attempt.bound, finer.bound(finer.columns()[0]))
            attempt.timely = attempt.timely and finer.timely

    def _early(self, attempt: BudgetSearch, search: ColumnGeneration) -> bool:
        """A few choices among the columns known so far by the local search alone, where a mixture of them comes near
        the bound; whether that gave a schedule.
        """
        quick = replace(search, deadline=attempt.deadline, thorough=False)
        seconds, fits = quick.relaxed_seconds(attempt.limit - attempt.reserve)
        known = len(attempt.schedules)
        if fits and seconds - attempt.bound <= EARLY_GAP * seconds:
            attempt.choose_anew(quick, EARLY_CHOICES)
        return len(attempt.schedules) > known

    def _carefully(
        self, attempt: BudgetSearch, relaxed: ColumnGeneration, careful: ColumnGeneration, *, chosen: bool
    ) -> None:
        """Choose columns priced under constraints that plans can really keep, or where memory is too short for these,
        under the relaxed ones unless columns are `chosen` already.
        """
        relaxed_first = chosen or not self.options.careful or not careful.keeps_limit()
        if relaxed_first and not chosen:
            # No columns known leave memory for prefetching, and such columns are slow to find: first of all a plan.
            relaxed.deadline = attempt.deadline
            attempt.choose(relaxed)
            if attempt.good_enough():
                return
            if attempt.best is not None:
                careful.worth_seconds = min(careful.worth_seconds, attempt.best.seconds)
        if not self.options.careful:
            return
        # Where memory is too tight for prefetching, the relaxed choice is all there is; where it is nearly so, one
        # more.
        lower, _, limit_kept = careful.columns()
        attempt.timely = attempt.timely and careful.timely
        careful.deadline = relaxed.deadline = attempt.deadline
        if limit_kept and careful.bound(lower) <= careful.worth_seconds:
            attempt.choose(careful)
        if not relaxed_first and not (limit_kept and attempt.good_enough()):
            attempt.choose_anew(relaxed)

    def _by_rules(self, attempt: BudgetSearch, any_bound: float, most: float = float("inf")) -> None:
        """Realise each fixed rule that fits and may be faster: as far as there is time for it, no plan is slower than
        one of them.

        `most`: seconds that a rule's computation may take at most.
        """
        for part in self._rules if self.options.rules else ():
            best, columns = attempt.best, part.columns
            computing = part.computing_seconds
            # Plans with segments are not in the class, and its bound does not hold for them.
            bound = any_bound if part.segments else attempt.bound
            if computing > most or (best is not None and computing >= best.seconds) or attempt.near(bound, attempt.gap):
                continue
            if self._may_fit(part, attempt.limit):
                if best is not None and not attempt.has_time_to_realize():
                    attempt.timely = False
                    return
                attempt.try_columns(columns, part.segments)

    def _may_fit(self, part: CyclePart, limit: int) -> bool:
        """Whether a fixed rule may fit `limit` bytes of arena and instructions."""
        # With segments a rule holds less than its columns' figures say.
        return bool(part.segments) or charged_bytes(self.problem, part.columns) <= limit

    def _seconds_of_rules(self, limit: int) -> float:
        """That realising all fixed rules that may fit takes on an idle machine."""
        fitting = sum(self._may_fit(part, limit) for part in self._rules)
        return REALIZE_SECONDS * len(self.problem.graph.steps) * fitting

    def _greedily(self, attempt: BudgetSearch) -> None:
        reserve = attempt.reserve
        # Columns that just fit seldom find places in the arena at once; where no others fit, they are tried all the
        # same.
        limit = attempt.limit - reserve
        columns = greedy(self.problem, self.pool, limit)
        if columns is None:
            limit = attempt.limit
            columns = greedy(self.problem, self.pool, limit)
        for round_number in range(GREEDY_ROUNDS):
            if columns is None or (round_number and not attempt.has_time_to_realize()):
                return
            schedule, excess = attempt.try_columns(columns)
            if schedule is not None:
                return
            limit -= max(excess, reserve)
            columns = greedy(self.problem, self.pool, limit)

    # --- the smallest budget ---------------------------------------------------------------------------------------

    def reaches(self, budget_bytes: int, deadline: float) -> bool:
        """Whether the budget is at least the smallest one, as far as can be told in time: surely where a plan is known
        that fits, most likely where a mixture of columns takes clearly less; else as `lowest_schedule` says.
        """
        if any(schedule.peak_bytes <= budget_bytes for schedule in self._known):
            return True
        if not self._lowest_proven and not self._one_program:
            clear_kib = CLEARLY * self.room(budget_bytes) / KIB
            search = ColumnGeneration(
                relaxation=self.relaxed, limit_bytes=None, deadline=share_of(LOWEST_SHARE, deadline)
            )
            _, fewest, _ = search.columns(clear_kib)
            self._by_clock = self._by_clock or not search.timely
            if fewest <= clear_kib:
                return True
        lowest, timely = self.lowest_schedule(deadline)
        return not timely or lowest.peak_bytes <= budget_bytes

    def lowest_schedule(self, deadline: float) -> tuple[Schedule, bool]:
        """The schedule of the lowest peak found, and whether the searches behind it came to their end."""
        lowest = min([self.smallest, *self._known], key=lambda schedule: schedule.peak_bytes)
        if not self._lowest_proven or self._lowest is None or lowest.peak_bytes < self._lowest.peak_bytes:
            self._lowest = lowest
            try:
                timely = self._lower(deadline)
            except TimeoutError:
                timely = False
            self._by_clock = self._by_clock or not timely
            self._lowest_proven = timely and time.monotonic() < deadline
        assert self._lowest is not None
        by_chance = any(result.schedule is self._lowest and not result.deterministic for result in self.results)
        return self._lowest, self._lowest_proven and not by_chance

    def _lower(self, deadline: float) -> bool:
        """Search for schedules of lower peaks than the lowest so far; whether the search came to its end."""
        assert self._lowest is not None
        best = self._lowest
        now = time.monotonic()
        joint = self._one_program
        until = deadline if joint else share_of(LOWEST_SHARE, deadline)
        search = ColumnGeneration(relaxation=self.relaxed, limit_bytes=None, deadline=until)
        chosen: tuple[Column, ...] | None
        if joint:
            answer = search.joint()
            chosen = None if answer is None else answer.columns
        else:
            search.columns()
            search.deadline = deadline
            chosen = search.choose(None)
        attempt = BudgetSearch(
            problem=self.problem,
            limit=self.room(best.peak_bytes),
            deadline=deadline,
            started=now,
            options=self.options,
        )
        if chosen is not None and attempt.has_time_to_realize():
            lower = smallest_arena(self.problem, chosen, deadline)
            best = self._lowest = lower if lower.peak_bytes < best.peak_bytes else best
        timely = True

        def below(lowest: Schedule, step: int) -> Schedule | None:
            nonlocal timely
            if not attempt.has_time_to_realize():
                raise TimeoutError
            trial = replace(attempt, limit=self.room(lowest.peak_bytes - step), bound=0.0, schedules=[], realized={})
            with trial.within():
                if joint:
                    self._jointly(trial)
                else:
                    columns = search.choose(trial.limit)
                    if columns is not None:
                        trial.try_columns(columns)
            timely = timely and trial.timely
            self._lowest = trial.best or self._lowest
            return trial.best

        floor = self.problem.profile.device.floor.start_peak_bytes
        _, ended = lower_peak(best, below, floor, step=max(1, int(MINIMUM_STEP * best.peak_bytes)))
        return ended and search.timely and timely


def share_of(share: float, deadline: float) -> float:
    """The moment at which this share of the time from now to the deadline is over."""
    now = time.monotonic()
    return now + share * (deadline - now)


def _seconds(outcome: SearchResult) -> float:
    return float("inf") if outcome.schedule is None else outcome.schedule.seconds
