"""A member's own plans: one planner for every device model, whatever its exchange takes of the budget.

A floor that is higher by some bytes leaves a schedule the same room as a budget that is lower by as much. The one
difference is the peak of the process's start, which the floor does not change. So the planner here plans for a process
whose start has no peak, at the budget less the exchange; its schedules are then stated, and replayed, under the floor of
the member. One search serves all shelves, numbers of micro-batches and budgets, and members with equal profiles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tightfit.planner.fleet.member_profiles import member_profile
from tightfit.planner.fleet.member_times import micro_batch_seconds, shelf_seconds
from tightfit.planner.fleet.schema import Shelf
from tightfit.planner.plan import planner_of
from tightfit.planner.plan_result import answered
from tightfit.planner.protocol import Planner
from tightfit.planner.schema import Plan
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.option_names import spelled

LEAST_SECONDS = 0.5
"""time limit of a plan, at least: a search that has no time finds nothing"""
ALWAYS = 16
"""of what is to be planned for one fleet: so much is, however short the time"""

T = TypeVar("T")


def no_time() -> str:
    """Why something was not planned."""
    return f"there was no time to plan it; give {spelled('time_limit')} more"


def while_there_is_time(things: Sequence[T], until: float, always: int = ALWAYS) -> Iterator[tuple[T, float]]:
    """Each of the things to plan for with its share of the seconds that are left until `until`, on the monotonic clock; once
    that is over, of the first `always` alone. So one time limit holds for a fleet of any size.
    """
    for done, thing in enumerate(things):
        share = (until - time.monotonic()) / (len(things) - done)
        if share <= 0 and done >= always:
            return
        yield thing, share


class Speed(Protocol):
    """What is known of a member's seconds per micro-batch, by the bytes that its plan may take."""

    def seconds(self, room: int, gradients: Shelf, *, first: bool) -> float:
        """Of the fastest known plan that fits; infinite where none is known."""
        ...

    def hoped(self, room: int, gradients: Shelf, *, first: bool) -> float:
        """Of the fastest known plan with this room or more: a plan made with this room takes as long, or longer.
        Infinite where none was found to fit.
        """
        ...

    def bound(self, room: int, gradients: Shelf, *, first: bool) -> float:
        """Seconds that no plan of the class undercuts; infinite where none was found to fit."""
        ...

    def plan(self, room: int, time_limit: float) -> None:
        """Plan with this room, so that `seconds` and `bound` say what can be said there. Raises KeyboardInterrupt on
        Ctrl-C.
        """
        ...

    def planned(self, room: int) -> bool:
        """Whether that was done."""
        ...


class Found(Protocol):
    """What is kept of a plan that was found."""

    @property
    def plan(self) -> Plan: ...


K = TypeVar("K", bound=Found)


class RoomPlans(Generic[K]):
    """Plans of a profile by the room that was asked for, with what `kept` makes of each and its room."""

    def __init__(self, profile: Profile, gap: float, kept: Callable[[Plan, int], K]) -> None:
        self.planner: Planner = planner_of(without_start(profile))
        self.gap = gap
        self.found: dict[int, K] = {}
        self.too_small = 0
        """the largest room with which nothing was found"""
        self._kept = kept
        self._least: int | None = None
        """the smallest room with which something was found, once that has been looked for"""

    def planned(self, room: int) -> bool:
        return room in self.found or room <= self.too_small

    def plan(self, room: int, time_limit: float, *, bounded: bool = False) -> None:
        """Plan with this room, if that was not done; `bounded`: unless a bound says at once that nothing fits. Raises
        KeyboardInterrupt on Ctrl-C.
        """
        if self.planned(room):
            return
        limit, fits = max(LEAST_SECONDS, time_limit), True
        with suppress(TimeoutError):
            fits = not bounded or self.planner.bound(room, time_limit=limit) is not None
        made = self.planner.plan(room, time_limit=limit, gap=self.gap) if fits else None
        if made is not None and made.train is not None:
            self.found[room] = self._kept(made, room)
        if self.planner.interrupted:
            raise KeyboardInterrupt
        if room not in self.found:
            self.too_small = room
            self._least = made.minimum_budget_bytes if made else None

    def fitting(self, room: int) -> list[K]:
        """What is known of the plans that fit."""
        return [one for one in self.found.values() if one.plan.peak_bytes <= room]

    def valid(self, room: int) -> list[Plan]:
        """The plans whose bounds hold with `room`."""
        return [one.plan for asked, one in self.found.items() if asked >= room]

    def least_room(self, time_limit: float) -> int:
        """The smallest room with which a plan was found."""
        if self._least is None:
            self._least = self.planner.minimum_bytes(time_limit=max(LEAST_SECONDS, time_limit))
        return self._least

    def restated(self, made: Plan, room: int, profile: Profile, budget_bytes: int) -> Plan:
        """A plan that fits `room` as that of a member with a profile and a budget, with the best bounds that hold."""
        valid = self.valid(room)
        proven = made.model_copy(
            update={
                "bound_seconds": max((plan.bound_seconds for plan in valid), default=0.0),
                "any_schedule_bound_seconds": max((plan.any_schedule_bound_seconds for plan in valid), default=0.0),
            }
        )
        return restated(proven, profile, budget_bytes, asked=self.gap)


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A plan that was found, and what a micro-batch takes by it."""

    plan: Plan
    seconds: dict[tuple[Shelf, bool], float]
    """by where gradients lie, and whether the member is the first of the chain"""


class MemberPlans(RoomPlans[_Known]):
    """`Speed` of a device as one of several, with the plans behind it."""

    def __init__(self, profile: Profile, gap: float) -> None:
        super().__init__(member_profile(profile, 1, 0, "memory"), gap, self._known)
        self.profile = profile

    def seconds(self, room: int, gradients: Shelf, *, first: bool) -> float:
        return min((one.seconds[gradients, first] for one in self.fitting(room)), default=math.inf)

    def hoped(self, room: int, gradients: Shelf, *, first: bool) -> float:
        if room <= self.too_small:
            return math.inf
        larger = [self.seconds(asked, gradients, first=first) for asked in self.found if asked >= room]
        return max(larger, default=0.0)

    def bound(self, room: int, gradients: Shelf, *, first: bool) -> float:
        if room <= self.too_small:
            return math.inf
        least = max((plan.bound_seconds for plan in self.valid(room)), default=0.0)
        return max(least, shelf_seconds(self.profile, gradients, first=first))

    def _known(self, made: Plan, room: int) -> _Known:
        on_disk = restated(made, member_profile(self.profile, 1, 0, "disk"), room)
        seconds: dict[tuple[Shelf, bool], float] = {}
        for first in (True, False):
            seconds["memory", first] = micro_batch_seconds(made, "memory", first=first)
            seconds["disk", first] = micro_batch_seconds(on_disk, "disk", first=first)
        return _Known(plan=made, seconds=seconds)

    def member_plan(
        self, budget_bytes: int, extra_bytes: int, *, micro_batches: int, gradients: Shelf, first: bool
    ) -> Plan:
        """The fastest known plan as that of a member whose exchange takes `extra_bytes`, in a step of `micro_batches`."""
        room = budget_bytes - extra_bytes
        made = min(self.fitting(room), key=lambda one: one.seconds[gradients, first]).plan
        profile = member_profile(self.profile, micro_batches, extra_bytes, gradients)
        return self.restated(made, room, profile, budget_bytes)


def without_start(profile: Profile) -> Profile:
    """The profile for a process whose start has no peak."""
    floor = profile.device.floor.model_copy(update={"import_peak_bytes": 0})
    return profile.model_copy(update={"device": profile.device.model_copy(update={"floor": floor})})


def restated(made: Plan, profile: Profile, budget_bytes: int, *, asked: float = 0.0) -> Plan:
    """The schedule of `made` as a plan of `profile`, which differs in floor, optimizer and seconds of updates only.

    Its bounds have to hold for that profile. `asked`: the gap at which the search for the schedule could stop.
    """
    raw = made.model_copy(
        update={
            "profile_fingerprint": profile.fingerprint,
            "budget_bytes": budget_bytes,
            "floor_bytes": profile.device.floor.held_bytes,
            "peak_bytes": 0,
            "optimizer": profile.optimizer,
            "device": profile.device,
            "tensors": profile.tensors,
        }
    )
    return answered(
        raw,
        simulate(raw),
        bound_seconds=made.bound_seconds,
        any_bound=made.any_schedule_bound_seconds,
        started=time.monotonic() - made.solve_seconds,
        deterministic=bool(made.deterministic),
        asked=asked,
        stalled=made.ended_by == "stalled",
        interrupted=made.ended_by == "interrupt",
        fallback=made.status == "fallback",
    )
