"""The search for the division of a model that makes the shortest step: which members hold which layers, and how far
each is ahead.

Divisions are taken in the order of their bounds. The stages of the first that was not planned are planned, which raises
the bounds of all divisions that contain them; the clock says what it takes. The search ends when no bound is below the
best step so far, but for the gap. So it has tried all divisions, most of them without planning for them. Of many members it
tries some (`pipeline_bounds`), and once its time is over it plans no more than it has to.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tightfit.planner.fleet.member_plans import ALWAYS
from tightfit.planner.fleet.pipeline_bounds import Candidate, Division, DivisionBounds
from tightfit.planner.fleet.pipeline_clock import Station, agree, play
from tightfit.planner.fleet.stage_plans import Known

STAGE_SHARE = 0.25
"""of the time that is left: for the plan of one stage"""
GAIN = 1e-6
"""share of a step: what saves less is no reason to be further ahead"""
Aheads = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A division with how far its stages are ahead, and what a step takes."""

    division: Division
    aheads: Aheads
    makespan: float


@dataclass(kw_only=True)
class PipelineSearch:
    candidates: Sequence[Candidate]
    micro_batches: int
    gap: float
    deadline: float
    report: Callable[[float, float], None] = lambda makespan, bound: None
    """called with the makespan so far and the bound"""
    plans: bool = True
    """whether to plan stages that were not planned"""
    best: Pipeline | None = None
    bound: float = 0.0
    """seconds that no division undercuts"""
    tried: set[Division] = field(default_factory=set)
    """divisions all of whose stages have been planned"""
    stopped: bool = False
    """whether the time was over before all was tried"""

    @property
    def makespan(self) -> float:
        return math.inf if self.best is None else self.best.makespan

    def run(self) -> None:
        """Try divisions until none is left that may be better, or the time is up. Raises KeyboardInterrupt on Ctrl-C."""
        late = 0
        while True:
            bounds = DivisionBounds(self.candidates, self.micro_batches)
            self.bound = max(self.bound, min(bounds.least, self.makespan))
            self.report(self.makespan, self.bound)
            following = self._following(bounds)
            if following is None:
                return
            late += self._late()
            self.stopped = bool(late) and (self.best is not None or late > ALWAYS)
            if self.stopped:
                return
            self.attempt(following)

    def _following(self, bounds: DivisionBounds) -> Division | None:
        """The first division that may be better and was not tried."""
        for least, division in bounds.divisions():
            if least >= (1 - self.gap) * self.makespan:
                return None
            if division not in self.tried:
                return division
        return None

    def attempt(self, division: Division) -> Pipeline | None:
        """Plan a division's stages, and keep it if its step is the shortest so far; None: something of it does not fit,
        or it cannot be better.
        """
        for at in range(len(division) + 1):
            if DivisionBounds(self.candidates, self.micro_batches).bound(division) >= (1 - self.gap) * self.makespan:
                return None
            if at < len(division) and self.known(division, at, 0) is None:
                return None
        self.tried.add(division)
        found = self.choose(division)
        if found.makespan < self.makespan:
            self.best = found
        return found

    # --- how far stages are ahead ----------------------------------------------------------------------------------

    def choose(self, division: Division) -> Pipeline:
        """A division whose stages have been planned, with the best of how far they are ahead that is found in time.

        Where a stage is in turns, those above have one micro-batch at a time, so that they are in turns too.
        """
        ways = [self._pipeline(division, (0,) * len(division))]
        ways += [self._ahead(division, count) for count in range(1, len(division)) if not self._late()]
        return min(ways, key=lambda one: one.makespan)

    def _late(self) -> bool:
        return time.monotonic() > self.deadline

    def _ahead(self, division: Division, count: int) -> Pipeline:
        """The best found with the first `count` stages ahead."""
        aheads = self._climbed(division, count)
        found = self._pipeline(division, aheads)
        while found.makespan == math.inf and (less := self._fitting(division, aheads)) != aheads:
            aheads = less
            found = self._pipeline(division, aheads)
        while True:
            nearer = [one for one in _changed(found.aheads, count, -1) if min(one[:count]) > 0 and agree(one)]
            tried = [self._pipeline(division, one) for one in nearer]
            better = min(tried, key=lambda one: one.makespan, default=found)
            if better.makespan >= found.makespan or self._late():
                return found
            found = better

    def _climbed(self, division: Division, count: int) -> Aheads:
        """How far the first `count` stages are ahead at best, if messages took no memory."""
        aheads = tuple(int(at < count) for at in range(len(division)))
        known = [self.known(division, at, 0) for at in range(len(division))]
        best = self._played(division, aheads, known)
        while True:
            farther = [one for one in _changed(aheads, count, 1) if max(one) <= self.micro_batches and agree(one)]
            if not farther or self._late():
                return aheads
            seconds, better = min((self._played(division, one, known), one) for one in farther)
            if seconds >= best * (1 - GAIN):
                return aheads
            aheads, best = better, seconds

    def _fitting(self, division: Division, aheads: Aheads) -> Aheads:
        """Less far ahead below every stage that has no room for as many messages."""
        unfit = [self.known(division, at + 1, ahead) is None for at, ahead in enumerate(aheads[:-1])]
        fewer = [ahead - 1 if less and ahead > 1 else ahead for ahead, less in zip(aheads, unfit)]
        return (*itertools.accumulate(fewer, min), aheads[-1])

    # --- what a step takes -----------------------------------------------------------------------------------------

    def _pipeline(self, division: Division, aheads: Aheads) -> Pipeline:
        known = [self.known(division, at, aheads[at - 1] if at else 0) for at in range(len(division))]
        return Pipeline(division=division, aheads=aheads, makespan=self._played(division, aheads, known))

    def _played(self, division: Division, aheads: Aheads, known: Sequence[Known | None]) -> float:
        stations = []
        for held, ahead, one in zip(division, aheads, known):
            if one is None:
                return math.inf
            candidate = self.candidates[held.candidate]
            stations.append(
                Station(
                    train=one.train,
                    forward=one.forward,
                    ahead=ahead,
                    link=candidate.link,
                    up_bytes=candidate.plans.up_bytes.get(held.last, 0),
                    down_bytes=candidate.plans.down_bytes.get(held.first, 0),
                )
            )
        return play(stations, self.micro_batches).makespan

    def known(self, division: Division, at: int, ahead_below: int) -> Known | None:
        """The plan of a stage, which is made if there is none; but not for one below that is ahead, once the time is over."""
        held = division[at]
        candidate = self.candidates[held.candidate]
        room = candidate.plans.room(held.layers, candidate.budget_bytes, ahead_below)
        if not self.plans or (ahead_below and self._late()):
            return candidate.plans.best(held.layers, room)
        return candidate.plans.plan(held.layers, room, STAGE_SHARE * (self.deadline - time.monotonic()))


def _changed(aheads: Aheads, count: int, by: int) -> Iterator[Aheads]:
    """Neighbours among the first `count` stages, `by` micro-batches farther ahead."""
    for first in range(count):
        for last in range(first + 1, count + 1):
            yield tuple(ahead + by * (first <= at < last) for at, ahead in enumerate(aheads))
