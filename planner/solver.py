"""The search at one budget, and for the smallest one: what `master` finds, carried out within a limit of time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from planner.carry_out import Schedule, carry_out, smallest_arena
from planner.greedy import greedy
from planner.layers import Layered
from planner.master import JOINT_BINARIES, Progress, Search
from planner.policies import POLICIES, rule_columns, smallest
from planner.pricing import Pool
from planner.rows import charged_bytes
from planner.windows import Column

TOLERANCE = 1e-3
"""a plan this near its bound is called optimal"""
GOOD = 4e-3
"""a plan of whole columns this near its bound is not worth another choice"""
RESERVE = 0.01
"""share of the limit left to gaps of the arena and to transfers, at first"""
CHOICES = 5
"""such shares tried"""
MINIMUM_ROUNDS = 20
LOWEST_SHARE = 0.6
"""of the time, at which the search for columns of the fewest bytes ends"""
JOINT_ROUNDS = 4
GREEDY_ROUNDS = 6
CARRY_SECONDS = 2.5e-4
"""to carry out columns, per operator of the step: a search this near its deadline stops"""
RELAXED_SHARE, CAREFUL_SHARE = 0.5, 0.7
"""of the time limit, at which the search for columns ends"""
CAREFUL_TOLERANCE = 8e-3
"""of the search for columns that only guides the choice and proves nothing"""
MOST_BYTES = 1 << 50
"""no process holds more; HiGHS gives up on right-hand sides that doubles cannot count exactly"""
Status = Literal["optimal", "feasible", "fallback", "infeasible"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    schedule: Schedule | None
    bound_seconds: float
    status: Status
    deterministic: bool = True
    """False where the time limit, or the user, ended the search"""


@dataclass(kw_only=True)
class Attempt:
    """One budget under way: whatever ends it, the best schedule so far and the bound are here."""

    limit: int
    """bytes for the arena and the instructions"""
    deadline: float
    progress: Progress | None = None
    bound: float = 0.0
    timely: bool = True
    found: list[Schedule] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def best(self) -> Schedule | None:
        return min(self.found, key=lambda schedule: schedule.seconds, default=None)

    def gap(self, schedule: Schedule) -> float:
        return (schedule.seconds - self.bound) / schedule.seconds if schedule.seconds else 0.0

    def until(self, share: float) -> float:
        """The moment at which this share of the time is gone."""
        return self.started + share * (self.deadline - self.started)


class Solver:
    """One problem, any number of budgets: columns and proofs are shared."""

    def __init__(self, problem: Layered) -> None:
        self.problem = problem
        self.found: list[Schedule] = []
        """the best at budgets before, so that a larger one never gets a slower plan"""
        self._lowest: Schedule | None = None
        self._lowest_proven = False
        """whether the search for it came to its end"""

    @cached_property
    def pool(self) -> Pool:
        """Columns found so far, opened with those of the fixed rules."""
        pool = Pool(problem=self.problem)
        for rule in (*POLICIES.values(), smallest):
            for kind, column in zip(self.problem.layer_type, rule_columns(self.problem, rule)):
                pool.add(kind, column.decision)
        return pool

    def room(self, budget_bytes: int) -> int:
        """Bytes for the arena and the instructions."""
        floor = self.problem.profile.device.floor.resident_bytes
        return min(budget_bytes, MOST_BYTES) - floor - self.problem.workspace_bytes

    @cached_property
    def smallest(self) -> Schedule:
        """The smallest rule carried out: where the search for the smallest budget starts."""
        return smallest_arena(self.problem, rule_columns(self.problem, smallest))

    def tight(self, budget_bytes: int) -> bool:
        """Whether the budget may be below the minimum: there the minimum is worked out first."""
        charged = charged_bytes(self.problem, rule_columns(self.problem, smallest))
        return self.room(budget_bytes) < 1.1 * charged and self.smallest.peak_bytes > budget_bytes

    # --- at a budget -----------------------------------------------------------------------------------------------

    def solve(self, budget_bytes: int, deadline: float, progress: Progress | None, *, bound: float = 0.0) -> Outcome:
        """The fastest schedule found; None where nothing was found to fit. `bound`: seconds that none undercuts.

        Raises KeyboardInterrupt only where nothing has been carried out yet.
        """
        outcome = self._solve(budget_bytes, deadline, progress, bound)
        fitting = [schedule for schedule in self.found if schedule.peak_bytes <= budget_bytes]
        before = min(fitting, key=lambda schedule: schedule.seconds, default=None)
        if before is not None and (outcome.schedule is None or before.seconds < outcome.schedule.seconds):
            optimal = before.seconds - outcome.bound_seconds <= TOLERANCE * before.seconds
            outcome = replace(outcome, schedule=before, status="optimal" if optimal else outcome.status)
        elif outcome.schedule is not None:
            self.found.append(outcome.schedule)
        return outcome

    def _solve(self, budget_bytes: int, deadline: float, progress: Progress | None, bound: float) -> Outcome:
        attempt = Attempt(limit=self.room(budget_bytes), deadline=deadline, progress=progress, bound=bound)
        try:
            self._by_rules(attempt, most=bound * (1 + TOLERANCE))
            best = attempt.best
            if best is not None and attempt.gap(best) <= TOLERANCE:
                return Outcome(schedule=best, bound_seconds=bound, status="optimal")
            if self.pool.binaries <= JOINT_BINARIES:
                self._jointly(attempt)
            else:
                self._by_columns(attempt)
        except TimeoutError:
            attempt.timely = False
        except KeyboardInterrupt:
            if not attempt.found:
                raise
            attempt.timely = False
        if not attempt.found and not attempt.timely:
            greedily = self._greedy(attempt)
            attempt.found.extend([] if greedily is None else [greedily])
            self._by_rules(attempt)
            best = attempt.best
            return Outcome(schedule=best, bound_seconds=attempt.bound, status="fallback", deterministic=False)
        self._by_rules(attempt)
        best = attempt.best
        optimal = best is not None and attempt.gap(best) <= TOLERANCE
        return Outcome(
            schedule=best,
            bound_seconds=attempt.bound,
            status="optimal" if optimal else "feasible",
            deterministic=attempt.timely,
        )

    def bound(self, budget_bytes: int, deadline: float) -> float | None:
        """Seconds per step that no plan of the class undercuts at a budget; None where the model finds none that fits.

        Raises TimeoutError where the deadline strikes first.
        """
        search = Search(pool=self.pool, limit_bytes=self.room(budget_bytes), deadline=deadline)
        if self.pool.binaries <= JOINT_BINARIES:
            answer = search.joint()
            return None if answer is None else answer.bound_seconds
        lower, _, kept = search.columns()
        if not search.timely:
            raise TimeoutError
        return search.bound(lower) if kept else None

    def _jointly(self, attempt: Attempt) -> None:
        """A small model as one program; where the arena has no place for its optimum, again with a little less."""
        for careful in (False, True):
            allowed = attempt.limit
            for _ in range(JOINT_ROUNDS):
                search = Search(
                    pool=self.pool,
                    limit_bytes=allowed,
                    deadline=attempt.deadline,
                    careful=careful,
                    progress=attempt.progress,
                )
                answer = search.joint()
                if answer is None:
                    break
                if allowed == attempt.limit and not careful:
                    attempt.bound = max(attempt.bound, answer.bound_seconds)
                attempt.timely = attempt.timely and answer.proven
                schedule, excess = carry_out(self.problem, answer.columns, attempt.limit, unmoved=True)
                if schedule is not None:
                    attempt.found.append(schedule)
                    search.report("carried out", schedule.seconds, attempt.bound)
                    break
                allowed -= excess
            best = attempt.best
            if best is not None and attempt.gap(best) <= TOLERANCE:
                break

    def _by_columns(self, attempt: Attempt) -> None:
        """A large model: the bound from relaxed rows, columns chosen under rows that plans can really keep."""
        relaxed = Search(
            pool=self.pool,
            limit_bytes=attempt.limit,
            deadline=attempt.until(RELAXED_SHARE),
            progress=attempt.progress,
        )
        lower, _, kept = relaxed.columns()
        attempt.bound = max(attempt.bound, relaxed.bound(lower))
        attempt.timely = relaxed.timely
        if not kept:
            return
        careful = Search(
            pool=self.pool,
            limit_bytes=attempt.limit,
            deadline=attempt.until(CAREFUL_SHARE),
            careful=True,
            tolerance=CAREFUL_TOLERANCE,
            progress=attempt.progress,
        )
        if not careful.holds():
            # Memory is short for looking ahead, and columns that save some are slow to find: first of all a plan.
            relaxed.deadline = attempt.deadline
            self._choose(relaxed, attempt)
            best = attempt.best
            if best is not None and attempt.gap(best) <= GOOD:
                return
        # Where memory is too tight to look ahead, the relaxed choice is what there is.
        search = careful if careful.columns()[2] else relaxed
        attempt.timely = attempt.timely and careful.timely
        search.deadline = attempt.deadline
        self._choose(search, attempt)

    def _choose(self, search: Search, attempt: Attempt) -> None:
        """Choose whole columns and carry them out, leaving more of the limit free until they find their places.

        Once they do, one more choice leaves more free where the plan waits for the disk, and less where it does not.
        """
        share = max(1, int(RESERVE * max(0, attempt.limit)))
        most = reserve = share
        exhausted = False
        for left in reversed(range(CHOICES)):
            if not self._carries_in_time(search.deadline):
                attempt.timely = False
                break
            chosen = search.choose(attempt.limit - reserve)
            if chosen is None:
                if attempt.found or exhausted:
                    break
                reserve, exhausted = 0, True
                continue
            # In the end a plan that waits for the disk is better than none.
            unmoved = not left or exhausted
            schedule, excess = carry_out(
                self.problem, chosen, attempt.limit, deadline=attempt.deadline, unmoved=unmoved
            )
            if schedule is None:
                reserve += max(3 * excess // 2, share // 2)
                if attempt.found and reserve >= most:
                    break
                continue
            again = not attempt.found and attempt.gap(schedule) > GOOD
            attempt.found.append(schedule)
            search.report("carried out", schedule.seconds, attempt.bound)
            if not again:
                break
            most = reserve
            waits = schedule.stalls > (schedule.seconds - attempt.bound) / 2
            reserve = 3 * reserve if waits else reserve // 4

    def _by_rules(self, attempt: Attempt, most: float = float("inf")) -> None:
        """Where a fixed rule fits and may be faster, it is carried out too: no plan is slower than one of them.

        `most`: seconds that its computation may take.
        """
        for rule in POLICIES.values():
            best, columns = attempt.best, rule_columns(self.problem, rule)
            computing = sum(column.forward_seconds + column.backward_seconds for column in columns)
            if computing > most or (best is not None and (attempt.gap(best) <= TOLERANCE or computing >= best.seconds)):
                continue
            if charged_bytes(self.problem, columns) <= attempt.limit:
                schedule, _ = carry_out(self.problem, columns, attempt.limit, unmoved=True)
                attempt.found.extend([] if schedule is None else [schedule])

    def _greedy(self, attempt: Attempt) -> Schedule | None:
        allowed = attempt.limit
        for _ in range(GREEDY_ROUNDS):
            columns = greedy(self.problem, self.pool, allowed)
            if columns is None:
                return None
            schedule, excess = carry_out(self.problem, columns, attempt.limit, deadline=attempt.deadline, unmoved=True)
            if schedule is not None:
                return schedule
            # What did not fit by a little does so with a little more to spare.
            allowed -= max(excess, int(RESERVE * max(0, attempt.limit)))
        return None

    # --- the smallest budget ---------------------------------------------------------------------------------------

    def least(self, deadline: float) -> tuple[Schedule, bool]:
        """The schedule with the lowest peak found, and whether the search came to its end."""
        if not self._lowest_proven:
            before = [self.smallest, *self.found, *([self._lowest] if self._lowest is not None else [])]
            self._lowest = min(before, key=lambda schedule: schedule.peak_bytes)
            try:
                timely = self._lower(deadline)
            except TimeoutError:
                timely = False
            self._lowest_proven = timely and time.monotonic() < deadline
        assert self._lowest is not None
        return self._lowest, self._lowest_proven

    def _carries_in_time(self, deadline: float) -> bool:
        """Whether there is time left to carry columns out."""
        return deadline - time.monotonic() > CARRY_SECONDS * len(self.problem.graph.steps)

    def _lower(self, deadline: float) -> bool:
        """Look for lower peaks than that of the lowest schedule so far; whether the search came to its end."""
        assert self._lowest is not None
        best = self._lowest
        now = time.monotonic()
        joint = self.pool.binaries <= JOINT_BINARIES
        until = deadline if joint else now + LOWEST_SHARE * (deadline - now)
        search = Search(pool=self.pool, limit_bytes=None, deadline=until)
        chosen: tuple[Column, ...] | None
        if joint:
            answer = search.joint()
            chosen = None if answer is None else answer.columns
        else:
            search.columns()
            search.deadline = deadline
            chosen = search.choose(None)
        if chosen is not None and self._carries_in_time(deadline):
            lower = smallest_arena(self.problem, chosen)
            best = self._lowest = lower if lower.peak_bytes < best.peak_bytes else best
        floor = self.problem.profile.device.floor.import_peak_bytes
        for _ in range(MINIMUM_ROUNDS):
            if best.peak_bytes <= floor:
                break
            if not self._carries_in_time(deadline):
                return False
            # What fits one byte below: as long as there is something, that is the minimum.
            attempt = Attempt(limit=self.room(best.peak_bytes - 1), deadline=deadline)
            if joint:
                self._jointly(attempt)
            else:
                found = search.choose(attempt.limit)
                schedule = None if found is None else carry_out(self.problem, found, attempt.limit, unmoved=True)[0]
                attempt.found.extend([] if schedule is None else [schedule])
            if attempt.best is None:
                break
            best = self._lowest = attempt.best
        return search.timely
