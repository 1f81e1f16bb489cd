"""The fleet's judge: replays a step of all members and links together, checks invariants, states makespan and peaks.

It reads the fleet's plan and its members' plans alone and shares nothing with the search but the clock (`exchange`).
Every violated invariant raises `InvalidFleet` with the invariant's name and the member:

| invariant | what must hold |
|---|---|
| names | every member has a name of its own, and those that compute come first |
| micro-batches | the members' runs follow one another in the chain's order and cover every micro-batch once |
| link | both directions carry something, and latency is not negative |
| plan | every member that computes has a plan, the one with the fingerprint that is stated; the others have none |
| optimizer | that plan hands gradients over and accumulates a whole step; of a member alone it makes the update itself |
| model | the plans are of the fleet's model, batch and trained tensors |
| exchange | `exchange_bytes` are what shelves and buffers need, and the plan's floor has room for them |
| budget | no peak is above its member's budget |
| peak | the stated peak is the plan's, which is what its replay finds |
| seconds | a micro-batch takes what the plan's replay says |
| makespan | what is stated is what the replay finds |
| bound | no bound is above what it bounds |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tightfit.planner.fleet.exchange import Station, play
from tightfit.planner.fleet.member_profiles import exchange_optimizer
from tightfit.planner.fleet.member_times import micro_batch_seconds
from tightfit.planner.fleet.pieces import exchange_bytes, pieces_of, slots_of
from tightfit.planner.fleet.schema import FleetPlan, Link, Member, Span
from tightfit.planner.schema import Plan
from tightfit.planner.simulation.simulate import Simulation, simulate
from tightfit.profiles.schema import adamw
from tightfit.runtime.common.errors import InputError

ROUNDING = 1e-9
"""relative difference up to which two numbers of seconds are the same"""
DRAWN = 1e-3
"""share of a step: what takes less, or is done again after a shorter pause, is drawn as one span"""


class InvalidFleet(InputError):  # noqa: N818  named by what it is about, like the rest of the tree
    """A fleet's plan that breaks an invariant and must not run; says which invariant, and of which member."""

    def __init__(self, invariant: str, member: str, text: str) -> None:
        super().__init__(f"invalid fleet ({invariant}) at {member}: {text}; plan the fleet again from its profiles")
        self.invariant = invariant
        self.member = member


@dataclass(frozen=True, kw_only=True)
class FleetSimulation:
    """The figures of a fleet's plan, as its replay finds them."""

    makespan_seconds: float
    compute_seconds: float
    """until the last member has computed"""
    exchange_seconds: float
    """from there until every member has the means and has passed them on"""
    update_seconds: float
    """from there until every member has made the update"""
    peaks: dict[str, int]
    """predicted peak bytes of each member that computes"""
    timeline: list[Span]


class Done(Protocol):
    """What a device, or the link from one to another, did from `begin` to `end` (`exchange.Doing`,
    `pipeline_clock.Doing`).
    """

    @property
    def what(self) -> Any: ...
    @property
    def station(self) -> int: ...
    @property
    def to(self) -> int | None: ...
    @property
    def begin(self) -> float: ...
    @property
    def end(self) -> float: ...


class Replayed(Protocol):
    """A step as a clock played it."""

    @property
    def makespan(self) -> float: ...
    @property
    def doings(self) -> Sequence[Done]: ...


def simulate_fleet(fleet: FleetPlan, plans: Mapping[str, Plan]) -> FleetSimulation:
    """Replay `fleet` with the plans of its members, by name. Raises InvalidFleet where an invariant breaks, and
    `tightfit.planner.simulation.simulate.InvalidSchedule` where one does in a member's own plan.
    """
    _check_chain(fleet)
    for member in fleet.members:
        _check_member(fleet, member, plans.get(member.name))
    found = replayed(fleet, plans)
    for claim, stated, seconds in (
        ("makespan_seconds", fleet.makespan_seconds, found.makespan_seconds),
        ("compute_seconds", fleet.compute_seconds, found.compute_seconds),
        ("exchange_seconds", fleet.exchange_seconds, found.exchange_seconds),
        ("update_seconds", fleet.update_seconds, found.update_seconds),
    ):
        if not same(stated, seconds, found.makespan_seconds):
            raise InvalidFleet("makespan", claim, f"{stated} s are stated, the replay finds {seconds} s")
    check_bound(fleet.bound_seconds, found.makespan_seconds)
    return found


def check_bound(bound_seconds: float, makespan_seconds: float) -> None:
    """Raise InvalidFleet where a bound on a step is none: negative, or above what the replay takes."""
    if not 0 <= bound_seconds <= makespan_seconds * (1 + ROUNDING):
        raise InvalidFleet(
            "bound",
            "bound_seconds",
            f"{bound_seconds} s are said to be a lower bound, the replay takes {makespan_seconds} s",
        )


def replayed(fleet: FleetPlan, plans: Mapping[str, Plan]) -> FleetSimulation:
    """The figures of a fleet's step, without a check of what the fleet states."""
    chain = fleet.chain
    computed = [
        member.micro_batches * micro_batch_seconds(plans[member.name], member.gradients, first=not at)
        for at, member in enumerate(chain)
    ]
    peaks = {member.name: plans[member.name].peak_bytes for member in chain}
    latest = max(computed)
    spans = _computing(chain, computed)
    if len(chain) == 1:
        return FleetSimulation(
            makespan_seconds=latest,
            compute_seconds=latest,
            exchange_seconds=0.0,
            update_seconds=0.0,
            peaks=peaks,
            timeline=spans,
        )
    stations = [
        _station(member, plans[member.name], done, first=not at)
        for at, (member, done) in enumerate(zip(chain, computed))
    ]
    told = play(stations, pieces_of(plans[chain[0].name]))
    exchanged = max(told.exchanged)
    return FleetSimulation(
        makespan_seconds=told.makespan,
        compute_seconds=latest,
        exchange_seconds=exchanged - latest,
        update_seconds=told.makespan - exchanged,
        peaks=peaks,
        timeline=spans + merged_spans(told, [member.name for member in chain]),
    )


def _station(member: Member, plan: Plan, computed: float, *, first: bool) -> Station:
    return Station(
        computed_seconds=computed,
        link=member.link,
        slots=slots_of(member.micro_batches, first=first),
        gradients=member.gradients,
        states=member.states,
        update_seconds=member.update_seconds,
        read=plan.device.read,
        write=plan.device.write,
    )


def _computing(chain: list[Member], computed: list[float]) -> list[Span]:
    """The micro-batches of each member; one span for all of them where single ones would be too short to be drawn."""
    spans = []
    for member, done in zip(chain, computed):
        each = done / member.micro_batches
        if each < DRAWN * max(computed):
            spans.append(Span(lane=member.name, what="compute", begin_seconds=0.0, end_seconds=done))
            continue
        for number in range(member.micro_batches):
            begin, end = number * each, (number + 1) * each
            at = member.first + number
            spans.append(Span(lane=member.name, what="compute", begin_seconds=begin, end_seconds=end, micro_batch=at))
    return spans


def merged_spans(told: Replayed, names: Sequence[str]) -> list[Span]:
    """What stations and links did, with short pauses left out."""
    pause = DRAWN * told.makespan
    open_: dict[tuple[str, str], Span] = {}
    done: list[Span] = []
    for one in sorted(told.doings, key=lambda one: (one.begin, one.end)):
        lane = lane_of(one, names)
        before = open_.get((lane, one.what))
        if before is not None and one.begin - before.end_seconds <= pause:
            open_[lane, one.what] = before.model_copy(update={"end_seconds": max(before.end_seconds, one.end)})
            continue
        if before is not None:
            done.append(before)
        open_[lane, one.what] = Span(lane=lane, what=one.what, begin_seconds=one.begin, end_seconds=one.end)
    return sorted([*done, *open_.values()], key=lambda span: (span.begin_seconds, span.lane))


def lane_of(one: Done, names: Sequence[str]) -> str:
    """The lane of what a device does, or of the link over which it sends."""
    return names[one.station] if one.to is None else f"{names[one.station]} → {names[one.to]}"


# --- invariants --------------------------------------------------------------------------------------------------------


def _check_chain(fleet: FleetPlan) -> None:
    check_names([member.name for member in fleet.members], [bool(member.micro_batches) for member in fleet.members])
    following = 0
    for member in fleet.chain:
        if member.first != following:
            raise InvalidFleet(
                "micro-batches", member.name, f"it begins with micro-batch {member.first} where {following} comes next"
            )
        following += member.micro_batches
    if following != fleet.micro_batches:
        raise InvalidFleet(
            "micro-batches",
            "the chain",
            f"it computes {following} micro-batches of the {fleet.micro_batches} of a step",
        )
    for member in fleet.members:
        check_link(member.name, member.link)


def check_names(names: Sequence[str], computing: Sequence[bool]) -> None:
    """Members have names of their own, and those that compute come first."""
    for at, name in enumerate(names):
        if name in names[:at]:
            raise InvalidFleet("names", name, "two members have this name")
    if list(computing) != sorted(computing, reverse=True):
        late = names[computing.index(False)]
        raise InvalidFleet("names", late, "it takes no part and stands before members that do")


def check_link(member: str, link: Link) -> None:
    carried = (link.up_bytes_per_second, link.down_bytes_per_second)
    if not all(0 < rate < math.inf for rate in carried) or not 0 <= link.latency_seconds < math.inf:
        raise InvalidFleet("link", member, f"{link} carries nothing")


def _check_member(fleet: FleetPlan, member: Member, plan: Plan | None) -> None:
    def fail(invariant: str, text: str) -> InvalidFleet:
        return InvalidFleet(invariant, member.name, text)

    if not member.micro_batches:
        if member.plan is not None or member.plan_fingerprint is not None or plan is not None:
            raise fail("plan", "it computes nothing and has a plan")
        return
    if plan is None or member.plan is None:
        raise fail("plan", f"it computes {member.micro_batches} micro-batches and has no plan")
    if plan.fingerprint != member.plan_fingerprint:
        raise fail(
            "plan", f"its plan is {plan.fingerprint[:12]}…, the fleet's was {str(member.plan_fingerprint)[:12]}…"
        )
    alone = len(fleet.chain) == 1
    wanted = adamw(fleet.micro_batches) if alone else exchange_optimizer(fleet.micro_batches)
    if plan.optimizer != wanted:
        raise fail("optimizer", f"its plan is for {plan.optimizer}, a step of this fleet needs {wanted}")
    pieces = pieces_of(plan)
    if (plan.model.name, plan.batch, sum(pieces)) != (fleet.model, fleet.batch, fleet.trained_bytes):
        raise fail(
            "model",
            f"its plan trains {sum(pieces)} bytes of {plan.model.name} in batches of {plan.batch}, the fleet"
            f" {fleet.trained_bytes} of {fleet.model} in batches of {fleet.batch}",
        )
    _check_memory(fleet, member, plan, pieces, fail)


def _check_memory(
    fleet: FleetPlan,
    member: Member,
    plan: Plan,
    pieces: tuple[int, ...],
    fail: Callable[[str, str], InvalidFleet],
) -> None:
    floor, chain = plan.device.floor, fleet.chain
    first = member.name == chain[0].name
    needed = 0
    if len(chain) > 1:
        slots = slots_of(member.micro_batches, first=first)
        needed = exchange_bytes(floor, pieces, slots=slots, gradients=member.gradients, states=member.states)
    if member.exchange_bytes != needed:
        raise fail("exchange", f"{member.exchange_bytes} bytes are set aside for the exchange, which takes {needed}")
    if plan.floor_bytes != floor.held_bytes or floor.resident_bytes < needed:
        raise fail("exchange", f"its plan's floor of {floor.held_bytes} bytes does not hold the exchange's {needed}")
    simulation = checked_replay(plan, member.budget_bytes, member.peak_bytes, fail)
    seconds = micro_batch_seconds(plan, member.gradients, first=first)
    told = member.micro_batch_seconds
    if not same(plan.step_seconds, simulation.step_seconds, plan.step_seconds) or not (
        told is not None and same(told, seconds, seconds)
    ):
        raise fail(
            "seconds",
            f"the fleet states {told} s for a micro-batch, its plan {plan.step_seconds} s, the replay"
            f" {simulation.step_seconds} s, with gradients on their shelf {seconds} s",
        )
    if member.bound_seconds is None or not 0 <= member.bound_seconds <= seconds * (1 + ROUNDING):
        raise fail("bound", f"{member.bound_seconds} s are said to be a lower bound, a micro-batch takes {seconds} s")


def checked_replay(
    plan: Plan, budget_bytes: int, stated_bytes: int | None, fail: Callable[[str, str], InvalidFleet]
) -> Simulation:
    """The replay of a member's plan, whose peak has to be the one that the fleet states, and within the member's budget."""
    simulation = simulate(plan)
    if plan.peak_bytes > budget_bytes or plan.budget_bytes > budget_bytes:
        raise fail(
            "budget",
            f"its plan is for {plan.budget_bytes} bytes and peaks at {plan.peak_bytes}, {budget_bytes} are allowed",
        )
    if not stated_bytes == plan.peak_bytes == simulation.peak_bytes:
        raise fail(
            "peak",
            f"the fleet states {stated_bytes} bytes, its plan {plan.peak_bytes}, the replay {simulation.peak_bytes}",
        )
    return simulation


def same(one: float, other: float, scale: float) -> bool:
    """Whether two numbers of seconds are the same, beside a time of `scale`."""
    return abs(one - other) <= ROUNDING * scale
