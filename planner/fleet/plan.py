"""The fleet planner's entry point: which devices take part in a step, what each computes and holds, and the proof.

`plan_fleet` searches the chains of two members or more (`search`) and the members that take part alone (`alone`), lets
the judge (`simulate`) state the figures of the best, and adds what it is to be compared with (`worth`).
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex, TypeVar

from tightfit.planner.fleet.alone import AlonePlans, AloneSearch
from tightfit.planner.fleet.io import plan_file, sealed_fleet
from tightfit.planner.fleet.member_plans import MemberPlans, no_time
from tightfit.planner.fleet.member_profiles import alone_profile, check_one_model, differences, update_seconds
from tightfit.planner.fleet.member_times import micro_batch_seconds, shelf_seconds
from tightfit.planner.fleet.pieces import pieces_of
from tightfit.planner.fleet.replay import replayed
from tightfit.planner.fleet.schema import LARGEST_STEPS, NAME, F, FleetPlan, Link, Member
from tightfit.planner.fleet.search import Candidate, ChainSearch
from tightfit.planner.fleet.simulate import simulate_fleet
from tightfit.planner.fleet.worth import baselines, prices
from tightfit.planner.plan_result import gap_to
from tightfit.planner.problem.gradients import refuse_preference
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import Progress, checked_budget, checked_gap, checked_limit
from tightfit.profiles.options import MOST_ACCUMULATED
from tightfit.profiles.schema import Profile, without_shorter
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.units import format_size

__all__ = ["MemberSpec", "plan_fleet"]

T = TypeVar("T")
UNJUDGED: dict[str, Any] = {
    "fingerprint": "",
    "makespan_seconds": 0.0,
    "bound_seconds": 0.0,
    "gap": 0.0,
    "solve_seconds": 0.0,
}
"""fields of a plan whose figures are not known yet"""
CHAIN_SHARE, PRICE_SHARE = 0.6, 0.25
"""of the time limit: for the chains, and for prices; where these are not asked for, chains have their share too"""
LEAST_SHARE = 0.05
"""of the time limit: to find out how much memory a member lacks"""


@dataclass(frozen=True, kw_only=True)
class MemberSpec:
    """A device that may take part: its profile of the model, its budget, and its connection to the others.

    The members of a fleet exchange tensors of one shape, so that all batches are whole, and shorter steps are left out.
    """

    name: str
    profile: Profile
    budget_bytes: int
    link: Link

    def __post_init__(self) -> None:
        refuse_preference(self.profile, "a fleet")
        if self.profile.shorter:
            object.__setattr__(self, "profile", without_shorter(self.profile))


def plan_fleet(
    members: Sequence[MemberSpec],
    micro_batches: int,
    *,
    time_limit: float = 120.0,
    gap: float = 1e-3,
    prices: bool = True,
    progress: Progress | None = None,
) -> tuple[FleetPlan, dict[str, Plan]]:
    """The shortest step found of `micro_batches` micro-batches, with its proof, and the plans of its members by name.

    Members that cannot hold a micro-batch, or would not make the step shorter, take no part; the plan says why. The
    search ends once the step is proven to be within `gap` of the best, nothing is left to try, or `time_limit` seconds
    are over. With `prices` it also says what more memory and a faster link would bring for each member. `progress` is
    called with stage, incumbent, bound, gap and seconds. Raises InputError for members that cannot train together, or
    a number that cannot be used, and InfeasibleError where no device can hold a micro-batch.
    """
    specs = _checked(members)
    planner = _FleetPlanner(
        specs,
        checked_count(micro_batches),
        time_limit=checked_limit(time_limit),
        gap=checked_gap(gap),
        progress=progress,
    )
    return planner.plan(priced=prices)


def _checked(members: Sequence[MemberSpec]) -> list[MemberSpec]:
    specs = checked_members(members)
    check_one_model({spec.name: spec.profile for spec in specs})
    return specs


def checked_members(members: Sequence[MemberSpec]) -> list[MemberSpec]:
    """The members with budgets as whole numbers of bytes. Raises InputError for names and budgets that cannot be used."""
    if not members:
        raise InputError("a fleet of no members; name at least one device, with its profile, budget and link")
    names: set[str] = set()
    for spec in members:
        if not NAME.fullmatch(spec.name):
            raise InputError(
                f"a member called {spec.name!r}: files are named after it; use up to 64 letters, digits, '-', '_' and '.'"
            )
        if spec.name in names:
            raise InputError(f"two members are called {spec.name}; give every member a name of its own")
        names.add(spec.name)
    return [replace(spec, budget_bytes=checked_budget(spec.budget_bytes)) for spec in members]


def checked_count(micro_batches: object) -> int:
    """The number of micro-batches of a step. Raises InputError for what is no such number."""
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, SupportsIndex):
        raise InputError(f"{micro_batches!r} micro-batches are no number of them; give a whole number from 1")
    count = operator.index(micro_batches)
    if not 1 <= count <= MOST_ACCUMULATED:
        raise InputError(f"{count} micro-batches cannot make a step; give a number from 1 to {MOST_ACCUMULATED}")
    return count


def checked_steps(steps: int, accumulate: int) -> int:
    """The local steps of a round, in whole updates. Raises InputError for what is no such number."""
    if not 1 <= steps <= LARGEST_STEPS:
        raise InputError(f"{steps} steps cannot make a round; give a whole number from 1 to {LARGEST_STEPS}")
    if steps % accumulate:
        raise InputError(
            f"{steps} steps of a round: an update takes {accumulate} steps, as profiled; give a multiple of that"
        )
    return steps


def described(spec: MemberSpec) -> dict[str, Any]:
    """What plans say of a device, whatever it does."""
    return {
        "name": spec.name,
        "device": spec.profile.device.name,
        "measured": spec.profile.device.measured,
        "budget_bytes": spec.budget_bytes,
        "link": spec.link,
    }


def figures_of(makespan: float, bound: float) -> dict[str, Any]:
    """What a plan says of the seconds of a step or a round, where nothing takes less than `bound`."""
    bound = min(bound, makespan)
    return {"makespan_seconds": makespan, "bound_seconds": bound, "gap": gap_to(makespan, bound)}


def judged(
    fleet: F, plans: Mapping[str, Plan], started: float, server_plans: Mapping[str, Plan] | None = None, **more: Any
) -> F:
    """The fleet's plan with `more` fields and the seconds since `started` (time.monotonic), sealed, and found to be valid."""
    fleet = sealed_fleet(fleet.model_copy(update={**more, "solve_seconds": time.monotonic() - started}))
    simulate_fleet(fleet, plans, server_plans)
    return fleet


def report(progress: Progress | None, stage: str, started: float, makespan: float, bound: float) -> None:
    """Tell `progress` how far a search is that began at `started` (time.monotonic); the makespan is infinite where there is none yet."""
    if progress is not None:
        told = {"incumbent": makespan, "bound": bound, "seconds": time.monotonic() - started}
        gap = 1.0 if makespan == math.inf else gap_to(makespan, bound)
        progress({"stage": stage, "gap": gap, **told})


class _FleetPlanner:
    def __init__(
        self,
        specs: Sequence[MemberSpec],
        micro_batches: int,
        *,
        time_limit: float,
        gap: float,
        progress: Progress | None,
    ) -> None:
        self.specs = specs
        self.names = [spec.name for spec in specs]
        self.micro_batches = micro_batches
        self.time_limit = time_limit
        self.progress = progress
        self.started = time.monotonic()
        self.pieces = pieces_of(specs[0].profile)
        profiles = [spec.profile for spec in specs]
        several = len(specs) > 1 and micro_batches > 1
        # Half of the gap is for the members' plans, the rest for their allotment.
        self.speeds = shared(profiles, lambda one: MemberPlans(one, gap / 2)) if several else []
        candidates = [
            Candidate(
                name=spec.name,
                link=spec.link,
                budget_bytes=spec.budget_bytes,
                device=spec.profile.device,
                update_seconds=update_seconds(spec.profile),
                speed=speed,
            )
            for spec, speed in zip(specs, self.speeds)
        ]
        self.search = ChainSearch(
            candidates=candidates,
            pieces=self.pieces,
            micro_batches=micro_batches,
            gap=gap,
            deadline=self.started,
            report=self._report,
        )
        self.alone = AloneSearch(
            plans=shared(profiles, lambda one: AlonePlans(alone_profile(one, micro_batches), micro_batches, gap / 2)),
            budgets=[spec.budget_bytes for spec in specs],
        )

    def plan(self, *, priced: bool) -> tuple[FleetPlan, dict[str, Plan]]:
        search, alone = self.search, self.alone
        interrupted = False
        try:
            search.deadline = self._until(CHAIN_SHARE if priced else CHAIN_SHARE + PRICE_SHARE)
            search.run()
            alone.run(self._until(1 - PRICE_SHARE if priced else 1.0))
        except KeyboardInterrupt:
            interrupted = True
        if min(search.makespan(search.best), alone.makespan) == math.inf:
            if interrupted:
                raise KeyboardInterrupt
            raise self._nothing_fits()
        search.prove()
        fleet, plans = self._assembled()
        more: dict[str, Any] = {"baselines": baselines(search, alone, self.names, self._until(1.0))}
        try:
            if priced and not interrupted:
                more["prices"] = prices(fleet, search, alone, self.names, self._until(1.0))
        except KeyboardInterrupt:
            more["prices"] = []  # the plan is what was asked for first
        return judged(fleet, plans, self.started, **more), plans

    def _until(self, share: float) -> float:
        return self.started + share * self.time_limit

    def _report(self, makespan: float, bound: float) -> None:
        report(self.progress, "sharing out micro-batches", self.started, makespan, bound)

    # --- the answer ------------------------------------------------------------------------------------------------

    def _assembled(self) -> tuple[FleetPlan, dict[str, Plan]]:
        """The fleet's plan with the figures of its replay, and its members' plans."""
        together = self.search.makespan(self.search.best) <= self.alone.makespan
        parts, plans = self._chain() if together else self._single()
        taking = [member.name for member in parts]
        idle = [
            _member(spec).model_copy(update={"reason": self._reason(at)})
            for at, spec in enumerate(self.specs)
            if spec.name not in taking
        ]
        unlike = differences({spec.name: spec.profile for spec in self.specs if spec.name in taking})
        profile = self.specs[0].profile
        fleet = FleetPlan(
            **UNJUDGED,
            model=profile.model.name,
            micro_batches=self.micro_batches,
            batch=profile.batch,
            trained_bytes=sum(self.pieces),
            members=[*parts, *idle],
            compute_seconds=0.0,
            exchange_seconds=0.0,
            update_seconds=0.0,
            bit_identical=not unlike,
            differences=unlike,
        )
        found = replayed(fleet, plans)
        figures = figures_of(found.makespan_seconds, min(self.search.bound, self.alone.bound)) | {
            "timeline": found.timeline,
            "compute_seconds": found.compute_seconds,
            "exchange_seconds": found.exchange_seconds,
            "update_seconds": found.update_seconds,
        }
        return fleet.model_copy(update=figures), plans

    def _chain(self) -> tuple[list[Member], dict[str, Plan]]:
        """The members of the best chain, in its order."""
        assert self.search.best is not None
        members: list[Member] = []
        plans: dict[str, Plan] = {}
        following = 0
        for at, place in enumerate(self.search.best):
            first = not at
            spec = self.specs[place.candidate]
            extra = self.search.extra_bytes(place, first=first)
            plan = self.speeds[place.candidate].member_plan(
                spec.budget_bytes,
                extra,
                micro_batches=self.micro_batches,
                gradients=place.gradients,
                first=first,
            )
            plans[spec.name] = plan
            part = {
                "first": following,
                "micro_batches": place.micro_batches,
                "micro_batch_seconds": micro_batch_seconds(plan, place.gradients, first=first),
                "bound_seconds": max(plan.bound_seconds, shelf_seconds(plan, place.gradients, first=first)),
                "exchange_bytes": extra,
                "gradients": place.gradients,
                "states": place.states,
            }
            members.append(_member(spec, plan).model_copy(update=part))
            following += place.micro_batches
        return members, plans

    def _single(self) -> tuple[list[Member], dict[str, Plan]]:
        """The one member that does everything, where that is the shortest step."""
        assert self.alone.best is not None
        spec = self.specs[self.alone.best]
        plan = self.alone.plans[self.alone.best].plan(spec.budget_bytes, self.time_limit)
        part = {
            "micro_batches": self.micro_batches,
            "micro_batch_seconds": plan.step_seconds,
            "bound_seconds": plan.bound_seconds,
            "gradients": "memory",
            "states": "memory",
        }
        return [_member(spec, plan).model_copy(update=part)], {spec.name: plan}

    # --- members that take no part ---------------------------------------------------------------------------------

    def _reason(self, at: int) -> str:
        """Why a member takes no part."""
        if time.monotonic() > self._until(1.0) and self.search.candidates:
            planned = self.speeds[at].planned(self.search.lean(at))
            return "a step is not shorter with it" if planned else no_time()
        needed, allowed = self._needed(at), self.specs[at].budget_bytes
        if needed <= allowed:
            return "a step is not shorter with it"
        return f"it cannot hold a micro-batch: it {lacking(needed, allowed)}"

    def _needed(self, at: int) -> int:
        """The smallest budget found with which a member can take part in a chain; where there can be none, alone."""
        spec = self.specs[at]
        start = spec.profile.device.floor.start_peak_bytes
        if not self.search.candidates:
            plan = self.alone.plans[at].plan(spec.budget_bytes, LEAST_SHARE * self.time_limit)
            return plan.minimum_budget_bytes or plan.peak_bytes
        room = self.search.lean(at)
        if self.speeds[at].seconds(room, "disk", first=False) < math.inf:
            return start
        extra = spec.budget_bytes - room
        return max(start, extra + self.speeds[at].least_room(LEAST_SHARE * self.time_limit))

    def _nothing_fits(self) -> InfeasibleError:
        needed = [self._needed(at) for at in range(len(self.specs))]
        told = "; ".join(f"{spec.name} {lacking(least, spec.budget_bytes)}" for spec, least in zip(self.specs, needed))
        return InfeasibleError(
            f"no device of the fleet can hold a micro-batch: {told}; give one of them more memory, or profile with a"
            " smaller batch or a shorter sequence",
            min(needed),
        )


def lacking(needed: int, allowed: int) -> str:
    """What a device needs and has; in bytes where rounding would hide the difference."""
    one, other = format_size(needed), format_size(allowed)
    if one == other:
        one, other = f"{needed} bytes", f"{allowed}"
    return f"needs {one} and may take {other}"


def _member(spec: MemberSpec, plan: Plan | None = None) -> Member:
    return Member(
        **described(spec),
        plan=None if plan is None else plan_file(spec.name),
        plan_fingerprint=None if plan is None else plan.fingerprint,
        peak_bytes=None if plan is None else plan.peak_bytes,
        update_seconds=update_seconds(spec.profile),
    )


def shared(profiles: Sequence[Profile], make: Callable[[Profile], T]) -> list[T]:
    """What `make` makes of each profile; equal ones share it."""
    made: list[tuple[Profile, T]] = []
    result: list[T] = []
    for profile in profiles:
        found = next((one for known, one in made if known is profile or known == profile), None)
        if found is None:
            found = make(profile)
            made.append((profile, found))
        result.append(found)
    return result
