"""One budget under way: columns chosen and carried out within its limit of time, the best schedule so far and its bounds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from tightfit.planner.problem.layer_types import Layered
from tightfit.planner.schedule.layer_schedule import Column
from tightfit.planner.schedule.multi_layer_recompute import Segments
from tightfit.planner.schedule.realize import Schedule, carry_out
from tightfit.planner.search_options import Progress
from tightfit.planner.solve.column_generation import Search

GOOD = 4e-3
"""a plan of whole columns this near its bound is not worth another choice; one farther away may be far from the best one too"""
FAIR = 5e-3
"""a plan this near its bound is not worth a third choice, where the second gave none that is faster"""
RESERVE = 0.01
"""share of the limit left to gaps of the arena and to transfers, at first"""
CHOICES = 5
"""such shares tried"""
MORE, TWICE = 0.05, 2
"""share of the limit left free, at least, where a plan waits for the disk, and how many times what it leaves free"""
CLOSE = 1.2
"""ratio of two shares between which no other is worth trying"""
CARRY_SECONDS = 2.2e-4
"""to carry out columns, per operator of the step: a search this near its deadline stops"""
Asked = tuple[tuple[Column, ...], Segments, int]
"""columns, segments, and the bytes that they are to fit into"""


@dataclass(kw_only=True)
class Attempt:
    """Whatever ends the search at a budget, what it has come to is here."""

    problem: Layered
    limit: int
    """bytes for the arena and the instructions"""
    started: float
    """on the monotonic clock"""
    deadline: float
    progress: Progress | None = None
    gap: float = 0.0
    """share of its time by which a schedule may be slower than the best where that is enough"""
    bound: float = 0.0
    """seconds that none of the schedules looked for undercuts"""
    timely: bool = True
    """whether every search so far came to its end before the deadline"""
    found: list[Schedule] = field(default_factory=list)
    carried: dict[Asked, tuple[Schedule | None, int]] = field(default_factory=dict)
    """what has been carried out so far, here and by attempts that were made from this one: the same has the same answer"""
    taken: list[float] = field(default_factory=list)
    """seconds that each took, and the attempts share it too"""

    @property
    def best(self) -> Schedule | None:
        return min(self.found, key=lambda schedule: schedule.seconds, default=None)

    @property
    def reserve(self) -> int:
        """Bytes of the limit that the first choice leaves free."""
        return max(1, int(RESERVE * self.limit))

    def near(self, bound: float, tolerance: float) -> bool:
        """Whether the best schedule so far takes at most a `tolerance` of its time longer than `bound`."""
        best = self.best
        return best is not None and best.seconds - bound <= tolerance * best.seconds

    def settled(self) -> bool:
        """Whether the best schedule so far is not worth another choice."""
        in_vain = any(one.seconds <= self.found[-1].seconds for one in self.found[:-1])
        return self.near(self.bound, max(self.gap, FAIR if in_vain else GOOD))

    def until(self, share: float) -> float:
        """The moment at which this share of the time is gone."""
        return self.started + share * (self.deadline - self.started)

    @contextmanager
    def within(self, share: float = 1.0) -> Iterator[None]:
        """Leave the rest of the time to others; TimeoutError ends no more than this share, and `timely` says so."""
        deadline = self.deadline
        self.deadline = self.until(share)
        try:
            yield
        except TimeoutError:
            self.timely = False
        finally:
            self.deadline = deadline

    def carries_in_time(self) -> bool:
        """Whether there is time left to carry columns out."""
        # On a busy machine it takes longer than alone, as the latest told.
        needed = max([CARRY_SECONDS * len(self.problem.graph.steps), *self.taken[-1:]])
        return self.deadline - time.monotonic() > needed

    def carry(self, columns: tuple[Column, ...], segments: Segments = ()) -> tuple[Schedule | None, int]:
        """As `carry_out`; a schedule that fits is among those found."""
        asked = columns, segments, self.limit
        known = self.carried.get(asked)
        if known is None:
            began = time.monotonic()
            known = carry_out(self.problem, columns, self.limit, deadline=self.deadline, segments=segments)
            self.taken.append(time.monotonic() - began)
            if time.monotonic() <= self.deadline:
                self.carried[asked] = known
            else:
                # What is carried out past the deadline is carried out less thoroughly.
                self.timely = False
        schedule, excess = known
        if schedule is not None:
            self.found.append(schedule)
        return schedule, excess

    def choose_anew(self, search: Search, choices: int = CHOICES, bound: float | None = None) -> None:
        """As `choose`, as if nothing had been found yet; `bound`: another one for what it looks for."""
        one = replace(self, bound=self.bound if bound is None else bound, found=[])
        try:
            one.choose(search, choices)
        finally:
            self.found += one.found
            self.timely = self.timely and one.timely

    def choose(self, search: Search, choices: int = CHOICES) -> None:
        """Choose whole columns and carry them out, leaving more of the limit free until they find their places.

        Once they do, other choices leave more free as long as the plan waits for the disk for most of what it is slower than it could
        be, and got faster but for once; or one leaves less, where it does not. What leaves so much free is priced anew: columns that
        do without it are others. Between one that waits and one that does not, or what nothing leaves free, the others halve what lies
        there. Raises TimeoutError where time is up before any columns are chosen.
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
            if between.waiting:
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
                schedule, excess = self.carry(chosen, search.relaxation.segments)
                if schedule is None:
                    reserve += max(3 * excess // 2, share // 2)
                    if fastest is not None and reserve >= most:
                        break
                    continue
                search.report("carried out", schedule.seconds, self.bound)
                if self.settled():
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

    def _price(self, search: Search, reserve: int) -> None:
        """Price columns for a limit that leaves `reserve` free, as far as plans of them may be faster than the best so far."""
        worth = min((schedule.seconds for schedule in self.found), default=math.inf)
        within = replace(search, limit_bytes=self.limit - reserve, progress=None, worth_seconds=worth)
        within.columns()
        self.timely = self.timely and within.timely


@dataclass(kw_only=True)
class _Between:
    """Where the bytes to leave free lie: between what plans still wait with and what they do not wait with, or there are none."""

    limit: int
    waiting: int = 0
    idle: int = 0
    """0: not known yet"""

    def following(self, reserve: int) -> int | None:
        """What to leave free next after `reserve`; None: nothing else is worth trying."""
        if self.waiting and self.idle:
            middle = math.isqrt(self.waiting * self.idle)
            return None if self.idle <= CLOSE * self.waiting or middle == self.waiting else middle
        return max(TWICE * reserve, int(MORE * self.limit)) if self.waiting else reserve // 4
