"""The search at one budget: columns chosen and realised as schedules within a time limit, the best schedule so far and its bound."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from tightfit.planner.problem.layer_types import Layered
from tightfit.planner.schedule.layer_schedule import Column
from tightfit.planner.schedule.multi_layer_recompute import Segments
from tightfit.planner.schedule.realize import Schedule, realize
from tightfit.planner.search_options import ALL, Progress, SearchOptions
from tightfit.planner.solve.column_generation import ColumnGeneration

GOOD = 4e-3
"""relative gap; where a schedule is this near its bound, columns are not chosen again; farther away, it may be far from the best"""
FAIR = 5e-3
"""the same after a second choice of columns gave no faster schedule"""
RESERVE = 0.01
"""share of the limit that the first choice of columns leaves free, for gaps in the arena and for transfers"""
CHOICES = 5
"""choices of columns, each with another reserve"""
MORE, TWICE = 0.05, 2
"""where a schedule waits for the disk, the next reserve: at least this share of the limit, and this many times the last reserve"""
CLOSE = 1.2
"""ratio of two reserves between which no other is worth trying"""
CARRY_SECONDS = 2.2e-4
"""that realising columns as a schedule takes, per operator of the step: a search this near its deadline stops"""
Asked = tuple[tuple[Column, ...], Segments, int]
"""columns, segments, and the bytes that their schedule is to fit into"""


@dataclass(kw_only=True)
class BudgetSearch:
    """The state of the search at a budget; it holds the result whatever ends the search."""

    problem: Layered
    limit: int
    """bytes for the arena and the instructions"""
    started: float
    """on the monotonic clock"""
    deadline: float
    progress: Progress | None = None
    options: SearchOptions = ALL
    gap: float = 0.0
    """share of its time by which a schedule may be slower than the best and still end the search"""
    bound: float = 0.0
    """seconds that no schedule of the kind searched for undercuts"""
    timely: bool = True
    """whether every search so far came to its end before the deadline"""
    found: list[Schedule] = field(default_factory=list)
    """schedules that fit"""
    carried: dict[Asked, tuple[Schedule | None, int]] = field(default_factory=dict)
    """what has been realised so far, here and in copies made by `replace`, which share this: the same question has the same answer"""
    taken: list[float] = field(default_factory=list)
    """seconds that each of these took; shared too"""

    @property
    def best(self) -> Schedule | None:
        return min(self.found, key=lambda schedule: schedule.seconds, default=None)

    @property
    def reserve(self) -> int:
        """Bytes of the limit that the first choice of columns leaves free."""
        return max(1, int(RESERVE * self.limit))

    def near(self, bound: float, tolerance: float) -> bool:
        """Whether the best schedule so far takes at most a `tolerance` of its time longer than `bound`."""
        best = self.best
        return best is not None and best.seconds - bound <= tolerance * best.seconds

    def settled(self) -> bool:
        """Whether the best schedule so far is so good that columns need not be chosen again."""
        in_vain = any(one.seconds <= self.found[-1].seconds for one in self.found[:-1])
        return self.near(self.bound, max(self.gap, FAIR if in_vain else GOOD))

    def until(self, share: float) -> float:
        """The moment at which this share of the time is over."""
        return self.started + share * (self.deadline - self.started)

    @contextmanager
    def within(self, share: float = 1.0) -> Iterator[None]:
        """End after this share of the time, and leave the rest to what follows; a TimeoutError ends only what is inside, and `timely`
        is then False.
        """
        deadline = self.deadline
        self.deadline = self.until(share)
        try:
            yield
        except TimeoutError:
            self.timely = False
        finally:
            self.deadline = deadline

    def carries_in_time(self) -> bool:
        """Whether there is time left to realise columns as a schedule."""
        # On a busy machine that takes longer than on an idle one: as long as the last time, if that is more.
        needed = max([CARRY_SECONDS * len(self.problem.graph.steps), *self.taken[-1:]])
        return self.deadline - time.monotonic() > needed

    def carry(self, columns: tuple[Column, ...], segments: Segments = ()) -> tuple[Schedule | None, int]:
        """As `realize`, once for each question; a schedule that fits is added to `found`."""
        asked = columns, segments, self.limit
        known = self.carried.get(asked)
        if known is None:
            began = time.monotonic()
            known = realize(
                self.problem, columns, self.limit, deadline=self.deadline, segments=segments, options=self.options
            )
            self.taken.append(time.monotonic() - began)
            if time.monotonic() <= self.deadline:
                self.carried[asked] = known
            else:
                # Past the deadline `realize` tries less: another call may come to more.
                self.timely = False
        schedule, excess = known
        if schedule is not None:
            self.found.append(schedule)
        return schedule, excess

    def choose_anew(self, search: ColumnGeneration, choices: int = CHOICES) -> None:
        """As `choose`, as if nothing had been found yet."""
        one = replace(self, found=[])
        try:
            one.choose(search, choices)
        finally:
            self.found += one.found
            self.timely = self.timely and one.timely

    def choose(self, search: ColumnGeneration, choices: int = CHOICES) -> None:
        """Choose whole columns within the limit less a reserve and realise them, with a larger reserve until all tensors find places.

        Once they do, and waiting for the disk is most of what the schedule lacks to the bound, the reserve grows (prefetching uses it),
        until that gains nothing twice in a row; where the schedule hardly waits, one smaller reserve is tried. Once schedules are known
        to wait, columns are priced for each further reserve: other columns are good there. Once one reserve is known with which
        schedules wait, and one with which they do not or that no columns leave, the next lies between the two. Raises TimeoutError
        where time is up before any columns are chosen.
        """
        share = self.reserve
        most = reserve = share
        between = _Between(limit=self.limit)
        exhausted = slower = False
        before: tuple[Column, ...] = ()
        while choices:
            if not self.carries_in_time():
                self.timely = False
                break
            if between.waiting and self.options.reserve_pricing:
                self._price(search, reserve)
            chosen = search.choose(self.limit - reserve)
            if chosen == before and not between.idle:
                reserve += 2 * share
                chosen = search.choose(self.limit - reserve)
            self.timely = self.timely and search.timely
            fastest = self.best
            if chosen is None and between.waiting:
                between.idle = reserve
            elif chosen is None:
                if fastest is not None or exhausted:
                    break
                reserve, exhausted = 0, True
                continue
            elif chosen == before:
                between.waiting = max(1, reserve)
            else:
                before = chosen
                choices -= 1
                schedule, excess = self.carry(chosen)
                if schedule is None:
                    reserve += max(3 * excess // 2, share // 2)
                    if fastest is not None and reserve >= most:
                        break
                    continue
                search.report("carried out", schedule.seconds, self.bound)
                if self.settled() or not self.options.reserves:
                    break
                lost = schedule.seconds - self.bound
                most = reserve
                if schedule.stalls > lost / 2:
                    between.waiting = reserve
                    faster = fastest is None or schedule.seconds < fastest.seconds
                    if slower and not (faster or between.idle):
                        break
                    slower = not faster
                elif fastest is None or between.waiting:
                    between.idle = reserve
                else:
                    break
            following = between.following(reserve)
            if following is None:
                break
            reserve = following

    def _price(self, search: ColumnGeneration, reserve: int) -> None:
        """Price columns for a limit that leaves `reserve` free, unless its bound shows that no plan there is faster than the best so far."""
        worth = min((schedule.seconds for schedule in self.found), default=math.inf)
        within = replace(search, limit_bytes=self.limit - reserve, progress=None, worth_seconds=worth)
        within.columns()
        self.timely = self.timely and within.timely


@dataclass(kw_only=True)
class _Between:
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
