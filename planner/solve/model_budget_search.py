"""The search at one budget: columns chosen and realised as schedules, the best schedule so far and its bound."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from tightfit.planner.cutoff import Cutoff
from tightfit.planner.problem.layer_types import LayeredStep
from tightfit.planner.schedule.layer_schedule import Column
from tightfit.planner.schedule.multi_layer_recompute import Segments
from tightfit.planner.schedule.realize import Schedule, realize
from tightfit.planner.search_options import ALL, SearchOptions, SearchProgress
from tightfit.planner.solve.column_generation import ColumnGeneration, report

GOOD = 4e-3
"""relative gap; where a schedule is this near its bound, columns are not chosen again; farther away, it may be far from
the best
"""
FAIR = 5e-3
"""the same gap, once a second choice of columns gave no faster schedule"""
RESERVE = 0.01
"""share of the limit that the first choice of columns leaves free, for gaps in the arena and for transfers"""
CHOICES = 5
"""choices of columns, each with another reserve"""
MORE, TWICE = 0.05, 2
"""where a schedule waits for the disk, the next reserve: at least this share of the limit, and this many times the last
reserve
"""
CLOSE = 1.2
"""ratio of two reserves between which no other is worth trying"""
RealizeQuestion = tuple[tuple[Column, ...], Segments, int, SearchOptions]
"""columns, segments, the bytes that their schedule is to fit into, and how it is looked for"""


@dataclass(kw_only=True)
class BudgetSearch:
    """The state of the search at a budget; it holds the result whatever ends the search."""

    problem: LayeredStep
    limit: int
    """bytes for the arena and the instructions"""
    cutoff: Cutoff
    progress: SearchProgress | None = None
    options: SearchOptions = ALL
    gap: float = 0.0
    """share of its time by which a schedule may be slower than the best and still end the search"""
    bound: float = 0.0
    """seconds that no schedule of the kind searched for undercuts"""
    schedules: list[Schedule] = field(default_factory=list)
    """schedules that fit"""
    realized: dict[RealizeQuestion, tuple[Schedule | None, int]] = field(default_factory=dict)
    """each question so far -> its schedule, if one fits, and the bytes that it has too many; copies made by `replace`
    share it
    """

    @property
    def best(self) -> Schedule | None:
        return min(self.schedules, key=lambda schedule: schedule.seconds, default=None)

    @property
    def reserve(self) -> int:
        """Bytes of the limit that the first choice of columns leaves free."""
        return max(1, int(RESERVE * self.limit))

    def near(self, bound: float, tolerance: float) -> bool:
        """Whether the best schedule so far takes at most a `tolerance` of its time longer than `bound`."""
        best = self.best
        return best is not None and best.seconds - bound <= tolerance * best.seconds

    def good_enough(self) -> bool:
        """Whether the best schedule so far is so good that columns need not be chosen again."""
        repeated = any(schedule.seconds <= self.schedules[-1].seconds for schedule in self.schedules[:-1])
        return self.near(self.bound, max(self.gap, FAIR if repeated else GOOD))

    def try_columns(
        self, columns: tuple[Column, ...], segments: Segments = (), quick: SearchOptions | None = None
    ) -> tuple[Schedule | None, int]:
        """As `realize`, once for each question, with the options `quick` where the schedule is wanted soon; one that
        fits is added to `schedules`. Raises TimeoutError where the search is cut.
        """
        options = self.options if quick is None else quick
        question = columns, segments, self.limit, options
        if question not in self.realized:
            self.realized[question] = realize(
                self.problem, columns, self.limit, segments=segments, options=options, cutoff=self.cutoff
            )
        schedule, excess = self.realized[question]
        if schedule is not None:
            self.found(schedule)
        return schedule, excess

    def found(self, schedule: Schedule) -> None:
        """Enter a schedule that fits, and report it."""
        self.schedules.append(schedule)
        report(self.progress, self.cutoff, "carried out", schedule.seconds, self.bound)

    def choose_anew(self, search: ColumnGeneration, choices: int = CHOICES) -> None:
        """As `choose`, as if nothing had been found yet."""
        fresh = replace(self, schedules=[])
        try:
            fresh.choose(search, choices)
        finally:
            self.schedules += fresh.schedules

    def choose(self, search: ColumnGeneration, choices: int = CHOICES) -> None:
        """Choose whole columns within the limit less a reserve and realise them, with a larger reserve until all
        tensors find places.

        Once they do, and waiting for the disk is most of what the schedule lacks to the bound, the reserve grows
        (prefetching uses it), until that gains nothing twice in a row; where the schedule hardly waits, one smaller
        reserve is tried. Once schedules are known to wait, columns are priced for each further reserve: other columns
        are good there. Once one reserve is known with which schedules wait, and one with which they do not or that no
        columns leave, the next lies between the two. Raises TimeoutError where the search is cut.
        """
        reserve_step = self.reserve
        largest_reserve = reserve = reserve_step
        reserves = _ReserveRange(limit=self.limit)
        exhausted = slower = False
        previous: tuple[Column, ...] = ()
        while choices:
            if reserves.waiting and self.options.reserve_pricing:
                self._price(search, reserve)
            chosen = search.choose(self.limit - reserve)
            if chosen == previous and not reserves.idle:
                reserve += 2 * reserve_step
                chosen = search.choose(self.limit - reserve)
            fastest = self.best
            if chosen is None and reserves.waiting:
                reserves.idle = reserve
            elif chosen is None:
                if fastest is not None or exhausted:
                    break
                reserve, exhausted = 0, True
                continue
            elif chosen == previous:
                reserves.waiting = max(1, reserve)
            else:
                previous = chosen
                choices -= 1
                schedule, excess = self.try_columns(chosen)
                if schedule is None:
                    reserve += max(3 * excess // 2, reserve_step // 2)
                    if fastest is not None and reserve >= largest_reserve:
                        break
                    continue
                if self.good_enough() or not self.options.reserves:
                    break
                lost_seconds = schedule.seconds - self.bound
                largest_reserve = reserve
                if schedule.stalls > lost_seconds / 2:
                    reserves.waiting = reserve
                    faster = fastest is None or schedule.seconds < fastest.seconds
                    if slower and not (faster or reserves.idle):
                        break
                    slower = not faster
                elif fastest is None or reserves.waiting:
                    reserves.idle = reserve
                else:
                    break
            following = reserves.following(reserve)
            if following is None:
                break
            reserve = following

    def _price(self, search: ColumnGeneration, reserve: int) -> None:
        """Price columns for a limit that leaves `reserve` free, unless its bound shows that no plan there is faster
        than the best so far.
        """
        best_seconds = min((schedule.seconds for schedule in self.schedules), default=math.inf)
        pricing = replace(search, limit_bytes=self.limit - reserve, progress=None, worth_seconds=best_seconds)
        pricing.columns()


@dataclass(kw_only=True)
class _ReserveRange:
    """The range in which the best reserve lies; 0: not known yet."""

    limit: int
    waiting: int = 0
    """the latest reserve with which a schedule waits for the disk"""
    idle: int = 0
    """a reserve with which schedules do not wait, or that no columns leave"""

    def following(self, reserve: int) -> int | None:
        """The reserve to try next after `reserve`; None: nothing else is worth trying."""
        if self.waiting and self.idle:
            middle = math.isqrt(self.waiting * self.idle)
            return None if self.idle <= CLOSE * self.waiting or middle == self.waiting else middle
        return max(TWICE * reserve, int(MORE * self.limit)) if self.waiting else reserve // 4
