"""A member's own plans: one planner for every device model, whatever its exchange takes of the budget.

A floor that is higher by some bytes leaves a schedule the same room as a budget that is lower by as much. The one
difference is the peak of the process's start, which the floor does not change. So the planner here plans for a process
whose start has no peak, at the budget less the exchange; its schedules are then stated, and replayed, under the floor of
the member. One search serves all shelves, numbers of micro-batches and budgets, and members with equal profiles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

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


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A plan that was found, and what a micro-batch takes by it."""

    plan: Plan
    seconds: dict[tuple[Shelf, bool], float]
    """by where gradients lie, and whether the member is the first of the chain"""


class MemberPlans:
    """`Speed` of a device as one of several, with the plans behind it."""

    def __init__(self, profile: Profile, gap: float) -> None:
        self.profile = profile
        self.gap = gap
        self.planner: Planner = planner_of(without_start(member_profile(profile, 1, 0, "memory")))
        self._known: dict[int, _Known] = {}
        """by the room that was asked for"""
        self._too_small = 0
        """the largest room with which nothing was found"""
        self._least: int | None = None
        """the smallest room with which something was found, once that has been looked for"""

    # --- as a `Speed` ----------------------------------------------------------------------------------------------

    def seconds(self, room: int, gradients: Shelf, *, first: bool) -> float:
        return min((one.seconds[gradients, first] for one in self._fitting(room)), default=math.inf)

    def hoped(self, room: int, gradients: Shelf, *, first: bool) -> float:
        if room <= self._too_small:
            return math.inf
        larger = [self.seconds(asked, gradients, first=first) for asked in self._known if asked >= room]
        return max(larger, default=0.0)

    def bound(self, room: int, gradients: Shelf, *, first: bool) -> float:
        if room <= self._too_small:
            return math.inf
        least = max((plan.bound_seconds for plan in self._valid(room)), default=0.0)
        return max(least, shelf_seconds(self.profile, gradients, first=first))

    def plan(self, room: int, time_limit: float) -> None:
        if self.planned(room):
            return
        made = self.planner.plan(room, time_limit=max(LEAST_SECONDS, time_limit), gap=self.gap)
        if made.train is None:
            self._too_small, self._least = room, made.minimum_budget_bytes
        else:
            self._remember(room, made)
        if self.planner.interrupted:
            raise KeyboardInterrupt

    def _remember(self, room: int, made: Plan) -> None:
        on_disk = restated(made, member_profile(self.profile, 1, 0, "disk"), room)
        seconds: dict[tuple[Shelf, bool], float] = {}
        for first in (True, False):
            seconds["memory", first] = micro_batch_seconds(made, "memory", first=first)
            seconds["disk", first] = micro_batch_seconds(on_disk, "disk", first=first)
        self._known[room] = _Known(plan=made, seconds=seconds)

    def planned(self, room: int) -> bool:
        return room in self._known or room <= self._too_small

    def _fitting(self, room: int) -> list[_Known]:
        return [one for one in self._known.values() if one.plan.peak_bytes <= room]

    def _valid(self, room: int) -> list[Plan]:
        """The plans whose bounds hold with `room`."""
        return [one.plan for asked, one in self._known.items() if asked >= room]

    # --- what a member needs ---------------------------------------------------------------------------------------

    def least_room(self, time_limit: float) -> int:
        """The smallest room with which a plan was found."""
        if self._least is None:
            self._least = self.planner.minimum_bytes(time_limit=max(LEAST_SECONDS, time_limit))
        return self._least

    def member_plan(
        self, budget_bytes: int, extra_bytes: int, *, micro_batches: int, gradients: Shelf, first: bool
    ) -> Plan:
        """The fastest known plan as that of a member whose exchange takes `extra_bytes`, in a step of `micro_batches`."""
        room = budget_bytes - extra_bytes
        made = min(self._fitting(room), key=lambda one: one.seconds[gradients, first]).plan
        valid = self._valid(room)
        proven = made.model_copy(
            update={
                "bound_seconds": max((plan.bound_seconds for plan in valid), default=0.0),
                "any_schedule_bound_seconds": max((plan.any_schedule_bound_seconds for plan in valid), default=0.0),
            }
        )
        profile = member_profile(self.profile, micro_batches, extra_bytes, gradients)
        return restated(proven, profile, budget_bytes, asked=self.gap)


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
