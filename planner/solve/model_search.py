"""The search at any budget, and for the smallest one: a sequence of stages, each of which leaves schedules that are
equal or better: what is known at once, then columns that `column_generation` finds, then fixed rules.

What a stage does, and when it ends, depends on results and on work. The clock only cuts: what is known then is the
answer, with its bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from tightfit.planner.cutoff import LONGEST, Cutoff
from tightfit.planner.plan_result import ROUNDING
from tightfit.planner.problem.layer_figures import KIB, MS
from tightfit.planner.problem.layer_types import LayeredStep
from tightfit.planner.schedule.column_bytes import charged_bytes
from tightfit.planner.schedule.layer_schedule import Column
from tightfit.planner.schedule.realize import CyclePart, Schedule, realize, smallest_arena
from tightfit.planner.search_options import ALL, SearchOptions, SearchProgress
from tightfit.planner.solve.column_generation import JOINT_BINARIES, ColumnGeneration
from tightfit.planner.solve.greedy import greedy
from tightfit.planner.solve.master_lp import MOVE_PRICE, SECOND_PRICE, MasterLp, MasterLpSolution
from tightfit.planner.solve.minimum_budget import lower_peak
from tightfit.planner.solve.model_budget_search import BudgetSearch
from tightfit.planner.solve.policies import POLICIES, all_streamed, fewest, rule_columns, rule_part, smallest
from tightfit.planner.solve.pricing import ColumnPool
from tightfit.planner.solvers.highs import MARGIN
from tightfit.runtime.common.gc_pause import paused_collector

MINIMUM_STEP = 1e-3
"""share of the smallest budget so far by which it is lower_peak at first"""
JOINT_ROUNDS = 4
"""limits tried with one program, each lower by the bytes that the schedule before had too many"""
GREEDY_ROUNDS = 3
"""limits tried with greedy choices in the same way"""
PEEK_GAIN = 0.05
"""share by which the mixture of a round of pricing takes less than the last one near which columns were chosen at once,
for them to be chosen again
"""
PEEK_GAP = 0.01
"""relative gap of the best schedule to the bound up to which that is done"""
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
        self._cut = False
        """whether the clock has cut any search: columns that are there by chance are then not tried before a budget's
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
    def _soon(self) -> SearchOptions:
        """How a schedule is realised that is wanted soon: no arena is searched for."""
        return replace(self.options, packing=False, spreading=False)

    @cached_property
    def smallest(self) -> Schedule:
        """A schedule of the rule that holds the fewest bytes, where the search for the smallest budget starts."""
        return smallest_arena(self.problem, rule_columns(self.problem, fewest), options=self._soon)

    # --- at a budget -----------------------------------------------------------------------------------------------

    @paused_collector()
    def solve(
        self,
        budget_bytes: int,
        cutoff: Cutoff,
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
            outcome = self._solve(budget_bytes, cutoff, progress, bound, gap)
        else:
            outcome = replace(earlier_outcome, any_bound_seconds=max(bound, earlier_outcome.any_bound_seconds))
        if outcome.deterministic:
            self._outcomes[budget_bytes, gap] = outcome
        self._cut = self._cut or not outcome.deterministic
        self.proven[budget_bytes] = max(self.proven.get(budget_bytes, 0.0), outcome.bound_seconds)
        fitting = [one for one in self.results if one.schedule is not None and one.schedule.peak_bytes <= budget_bytes]
        earlier = min(fitting, key=_seconds, default=None)
        if earlier is not None and _seconds(earlier) < _seconds(outcome):
            return replace(
                outcome,
                schedule=earlier.schedule,
                deterministic=earlier.deterministic and outcome.deterministic,
            )
        if earlier_outcome is None and outcome.schedule is not None:
            self.results.append(outcome)
        return outcome

    def _solve(
        self, budget_bytes: int, cutoff: Cutoff, progress: SearchProgress | None, any_bound: float, gap: float
    ) -> SearchResult:
        attempt = BudgetSearch(
            problem=self.problem,
            limit=self.room(budget_bytes),
            cutoff=cutoff,
            progress=progress,
            gap=max(ROUNDING, gap),
            bound=any_bound,
            options=self.options,
        )
        ended, interrupted = True, False
        try:
            self._stages(attempt, any_bound)
        except TimeoutError:
            ended = False
        except KeyboardInterrupt:
            if not attempt.schedules:
                raise
            ended, interrupted = False, True
        proven = ColumnGeneration(relaxation=self.relaxed, limit_bytes=attempt.limit, cutoff=cutoff)
        return SearchResult(
            schedule=attempt.best,
            bound_seconds=max(attempt.bound, proven.bound(self.relaxed.proven(attempt.limit))),
            any_bound_seconds=any_bound,
            interrupted=interrupted,
            deterministic=ended,
        )

    def _stages(self, attempt: BudgetSearch, any_bound: float) -> None:
        """The stages in their order, until a schedule is proven good enough. Raises TimeoutError where the clock
        cuts.
        """
        self._at_once(attempt)
        if attempt.near(any_bound, attempt.gap):
            return
        self._by_rules(attempt, any_bound, most=any_bound * (1 + NEAR))
        if attempt.near(any_bound, attempt.gap):
            return
        self._in_the_class(attempt)
        self._by_rules(attempt, any_bound)

    def _at_once(self, attempt: BudgetSearch) -> None:
        """A first schedule, of columns that are known, chosen greedily and realised without any search. Nothing cuts
        this, so that there is a plan wherever these columns fit.
        """
        if not self.options.greedy:
            return
        quick = replace(self._soon, moving_in_place=False)
        # Columns that just fit seldom find places in the arena at once; where no others fit, they are tried all the
        # same.
        known = [list(columns) for columns in self.pool.columns]
        for kind, column in dict(zip(self.problem.layer_type, rule_columns(self.problem, fewest))).items():
            known[kind].append(column)
        limit = attempt.limit - attempt.reserve
        columns = greedy(self.problem, known, limit)
        if columns is None:
            limit = attempt.limit
            columns = greedy(self.problem, known, limit)
        for _ in range(GREEDY_ROUNDS):
            if columns is None:
                return
            schedule, excess = realize(self.problem, columns, attempt.limit, options=quick)
            if schedule is not None:
                attempt.found(schedule)
                return
            limit -= max(excess, attempt.reserve)
            columns = greedy(self.problem, known, limit)

    def bound(self, budget_bytes: int, cutoff: Cutoff) -> float | None:
        """Seconds per step that no plan of the class undercuts at a budget; None where the model finds none that fits.

        Raises TimeoutError where the clock cuts first.
        """
        search = ColumnGeneration(relaxation=self.relaxed, limit_bytes=self.room(budget_bytes), cutoff=cutoff)
        if self._one_program:
            answer = search.joint()
            return None if answer is None else answer.bound_seconds
        try:
            lower, _, limit_kept = search.columns()
        except TimeoutError:
            self._cut = True
            raise
        return search.bound(lower) if limit_kept else None

    def _in_the_class(self, attempt: BudgetSearch) -> None:
        """Search plans of the class (recomputation inside a layer's own backward window), with a bound for all of
        them, as if no schedule were known yet: what is known by then says nothing of the reserves worth trying.
        """
        search = replace(attempt, schedules=[])
        try:
            if self._one_program:
                self._jointly(search)
            else:
                self._by_columns(search, attempt)
        finally:
            attempt.schedules += search.schedules
            attempt.bound = max(attempt.bound, search.bound)

    def _jointly(self, attempt: BudgetSearch) -> None:
        """A small model as one program; where its optimum finds no place in the arena, again with a lower limit."""
        for careful in (False, True):
            allowed = attempt.limit
            for _ in range(JOINT_ROUNDS):
                search = ColumnGeneration(
                    relaxation=self.careful if careful else self.relaxed,
                    limit_bytes=allowed,
                    cutoff=attempt.cutoff,
                    progress=attempt.progress,
                )
                answer = search.joint()
                if answer is None:
                    break
                if allowed == attempt.limit and not careful:
                    attempt.bound = max(attempt.bound, answer.bound_seconds)
                schedule, excess = attempt.try_columns(answer.columns)
                if schedule is not None:
                    break
                allowed -= excess
            if attempt.near(attempt.bound, attempt.gap):
                return
        if attempt.near(attempt.bound, 2 * MOVE_PRICE):
            # Without its price on transfers the program may prove the schedule the best.
            search = ColumnGeneration(relaxation=self.relaxed, limit_bytes=attempt.limit, cutoff=attempt.cutoff)
            answer = search.joint(priced=False)
            if answer is not None:
                attempt.bound = max(attempt.bound, answer.bound_seconds)
                if not attempt.near(attempt.bound, attempt.gap):
                    attempt.try_columns(answer.columns)

    def _by_columns(self, attempt: BudgetSearch, whole: BudgetSearch) -> None:
        """A large model: a bound under relaxed constraints, columns chosen under those that plans can really keep.
        `whole`: the search that this is a stage of, which gets a schedule now and then before columns are all priced.
        """
        relaxed = ColumnGeneration(
            relaxation=self.relaxed,
            limit_bytes=attempt.limit,
            cutoff=attempt.cutoff,
            progress=attempt.progress,
            watch=_Peeks(whole, self.relaxed, self._soon),
        )
        careful = ColumnGeneration(
            relaxation=self.careful,
            limit_bytes=attempt.limit,
            cutoff=attempt.cutoff,
            tolerance=CAREFUL_TOLERANCE,
            progress=attempt.progress,
        )
        early = replace(attempt, schedules=[])
        chosen = False
        """whether columns chosen near the relaxed mixture have given a schedule"""
        try:
            early.bound = attempt.bound = max(attempt.bound, relaxed.bound(self.relaxed.proven(attempt.limit)))
            if self.results and not self._cut and self.options.early_choice:
                self._early(early, careful)
            if not early.good_enough():
                lower, _, limit_kept = relaxed.columns()
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
        if attempt.schedules and not attempt.good_enough():
            finer = replace(relaxed, tolerance=FINER_TOLERANCE, watch=None)
            attempt.bound = max(attempt.bound, finer.bound(finer.columns()[0]))

    def _early(self, attempt: BudgetSearch, search: ColumnGeneration) -> bool:
        """A few choices among the columns known so far by the local search alone, where a mixture of them comes near
        the bound; whether that gave a schedule.
        """
        quick = replace(search, thorough=False)
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
        if limit_kept and careful.bound(lower) <= careful.worth_seconds:
            attempt.choose(careful)
        if not relaxed_first and not (limit_kept and attempt.good_enough()):
            attempt.choose_anew(relaxed)

    def _by_rules(self, attempt: BudgetSearch, any_bound: float, most: float = float("inf")) -> None:
        """Realise each fixed rule that fits and may be faster: a search that ends by itself has no plan slower than one
        of them.

        `most`: seconds that a rule's computation may take at most.
        """
        for part in self._rules if self.options.rules else ():
            best, computing = attempt.best, part.computing_seconds
            # Plans with segments are not in the class, and its bound does not hold for them.
            bound = any_bound if part.segments else attempt.bound
            if computing > most or (best is not None and computing >= best.seconds) or attempt.near(bound, attempt.gap):
                continue
            # With segments a rule holds less than its columns' figures say.
            if part.segments or charged_bytes(self.problem, part.columns) <= attempt.limit:
                attempt.try_columns(part.columns, part.segments)

    # --- the smallest budget ---------------------------------------------------------------------------------------

    @property
    def fewest_bytes(self) -> int:
        """No plan of the class that takes at most a day for a step holds fewer, as far as that is proven by now."""
        kib = self.relaxed.proven(None) * (1 - MARGIN) - SECOND_PRICE * MS * LONGEST
        arena = max(int(kib * KIB), self.relaxed.excluded + 1)
        return max(self.problem.profile.device.floor.start_peak_bytes, self.problem.taken_bytes + arena)

    def lowest_schedule(self, cutoff: Cutoff) -> tuple[Schedule, bool]:
        """The schedule of the lowest peak found, and whether the searches behind it came to their end."""
        lowest = min([self.smallest, *self._known], key=lambda schedule: schedule.peak_bytes)
        if not self._lowest_proven or self._lowest is None or lowest.peak_bytes < self._lowest.peak_bytes:
            self._lowest = lowest
            try:
                self._lowest_proven = self._lower(cutoff)
            except TimeoutError:
                self._lowest_proven = False
            self._cut = self._cut or not self._lowest_proven
        assert self._lowest is not None
        by_chance = any(result.schedule is self._lowest and not result.deterministic for result in self.results)
        return self._lowest, self._lowest_proven and not by_chance

    def _lower(self, cutoff: Cutoff) -> bool:
        """Search for schedules of lower peaks than the lowest so far; whether the search came to its end."""
        assert self._lowest is not None
        best = self._lowest
        joint = self._one_program
        search = ColumnGeneration(relaxation=self.relaxed, limit_bytes=None, cutoff=cutoff)
        chosen: tuple[Column, ...] | None
        if joint:
            answer = search.joint()
            chosen = None if answer is None else answer.columns
        else:
            search.columns()
            chosen = search.choose(None)
        if chosen is not None:
            lower = smallest_arena(self.problem, chosen, cutoff)
            best = self._lowest = lower if lower.peak_bytes < best.peak_bytes else best
        attempt = BudgetSearch(
            problem=self.problem, limit=self.room(best.peak_bytes), cutoff=cutoff, options=self.options
        )

        def below(lowest: Schedule, step: int) -> Schedule | None:
            trial = replace(attempt, limit=self.room(lowest.peak_bytes - step), schedules=[], realized={})
            try:
                if joint:
                    self._jointly(trial)
                else:
                    columns = search.choose(trial.limit)
                    if columns is not None:
                        trial.try_columns(columns)
            finally:
                self._lowest = trial.best or self._lowest
            return trial.best

        floor = self.problem.profile.device.floor.start_peak_bytes
        _, ended = lower_peak(best, below, floor, step=max(1, int(MINIMUM_STEP * best.peak_bytes)))
        return ended


class _Peeks:
    """Gives a search schedules while its columns are still priced: whole columns near the mixtures of the rounds, as
    long as these get better and the best schedule is not near the bound.
    """

    def __init__(self, attempt: BudgetSearch, relaxation: MasterLp, quick: SearchOptions) -> None:
        self.attempt, self.quick = attempt, quick
        self.search = ColumnGeneration(relaxation=relaxation, limit_bytes=attempt.limit, cutoff=attempt.cutoff)
        self.least = float("inf")
        """value of the latest mixture near which columns were chosen"""

    def __call__(self, relaxed: MasterLpSolution) -> None:
        attempt = self.attempt
        bound = max(attempt.bound, self.search.bound(self.search.relaxation.proven(attempt.limit)))
        if attempt.near(bound, PEEK_GAP) or relaxed.value > (1 - PEEK_GAIN) * self.least:
            return
        self.least = relaxed.value
        columns = self.search.near(attempt.limit, relaxed, attempt.reserve)
        if columns is not None:
            attempt.try_columns(columns, quick=self.quick)


def _seconds(outcome: SearchResult) -> float:
    return float("inf") if outcome.schedule is None else outcome.schedule.seconds
