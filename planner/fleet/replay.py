"""What a step of a fleet takes: the clocks play what the plans of its members take, and the picture of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tightfit.planner.fleet.clock import Doing, Marks, OneWay, Played, Station, SumStation, play, play_sum
from tightfit.planner.fleet.part_plans import marks_of
from tightfit.planner.fleet.part_profiles import micro_batch_seconds, pieces_of, slots_of
from tightfit.planner.fleet.parts import Chain, message_bytes, passing_of, replicas
from tightfit.planner.fleet.schema import FleetPlan, Member, PipelinePlan, SidePlan, Span
from tightfit.planner.schema import Plan
from tightfit.planner.simulation.simulate import Simulation, simulate

DRAWN = 1e-3
"""share of a step: what takes less, or is done again after a shorter pause, is drawn as one span"""
SINGLE = 2000
"""spans of a chain's step, at most, that are drawn one by one"""


@dataclass(frozen=True, kw_only=True)
class FleetSimulation:
    """The figures of a fleet's plan, as its replay finds them."""

    makespan_seconds: float
    """of a step, or a round"""
    compute_seconds: float = 0.0
    """data parallel: until the last member has computed"""
    exchange_seconds: float = 0.0
    """from there until every member has the means and has passed them on"""
    update_seconds: float = 0.0
    """from there until every member has made the update"""
    timeline: list[Span] = field(default_factory=list)


class Replays:
    """What the replays of plans find, which live as long as this; each is replayed once, however many members have it."""

    def __init__(self) -> None:
        self._found: dict[int, Simulation] = {}
        self._marks: dict[int, tuple[Marks, Marks]] = {}

    def of(self, plan: Plan) -> Simulation:
        if id(plan) not in self._found:
            self._found[id(plan)] = simulate(plan)
        return self._found[id(plan)]

    def marks(self, plan: Plan) -> tuple[Marks, Marks]:
        """When its training schedule, and its forward alone, reach their messages."""
        if id(plan) not in self._marks:
            self._marks[id(plan)] = marks_of(plan)
        return self._marks[id(plan)]


def replayed(fleet: FleetPlan | PipelinePlan | SidePlan, plans: Mapping[str, Plan]) -> FleetSimulation:
    """The figures of a step with the plans of its members, by name, without a check of what the fleet states."""
    if isinstance(fleet, SidePlan):
        return drawn(one_way(fleet).play(fleet.micro_batches), [member.name for member in fleet.members])
    if isinstance(fleet, PipelinePlan):
        (parts,) = replicas(fleet)
        stations = stations_of(parts, [plans[part.member] for part in parts], fleet.bits, Replays())
        return drawn(play(stations, fleet.micro_batches), [part.name for part in parts])
    chain = fleet.chain
    computed = [
        member.micro_batches * micro_batch_seconds(plans[member.name], member.gradients, first=not at)
        for at, member in enumerate(chain)
    ]
    latest = max(computed)
    spans = _computing(chain, computed)
    if len(chain) == 1:
        return FleetSimulation(makespan_seconds=latest, compute_seconds=latest, timeline=spans)
    told = play_sum(
        [
            SumStation(
                computed_seconds=done,
                link=member.link,
                slots=slots_of(member.micro_batches, first=not at),
                gradients=member.gradients,
                states=member.states,
                update_seconds=member.update_seconds,
                read=plans[member.name].device.read,
                write=plans[member.name].device.write,
            )
            for at, (member, done) in enumerate(zip(chain, computed))
        ],
        pieces_of(plans[chain[0].name]),
    )
    exchanged = max(told.exchanged)
    return FleetSimulation(
        makespan_seconds=told.makespan,
        compute_seconds=latest,
        exchange_seconds=exchanged - latest,
        update_seconds=told.makespan - exchanged,
        timeline=spans + _merged(told, [member.name for member in chain]),
    )


def stations_of(chain: Chain, plans: Sequence[Plan], bits: int, replays: Replays) -> list[Station]:
    """The parts of a chain with their plans, as they stand on the clock of pipelines."""
    stations = []
    for part, plan in zip(chain, plans):
        train, forward = replays.marks(plan)
        stations.append(
            Station(
                train=train,
                forward=forward,
                ahead=part.ahead,
                link=part.link,
                up_bytes=message_bytes(passing_of(part.up), bits),
                down_bytes=message_bytes(passing_of(part.down), bits),
            )
        )
    return stations


def one_way(fleet: SidePlan, *, bounds: bool = False) -> OneWay:
    """The clock of mobillm's step, of what the plans take or, with `bounds`, of what no plans undercut."""
    device, server = fleet.members
    return OneWay(
        device_seconds=device.bound_seconds if bounds else device.micro_batch_seconds,
        server_seconds=server.bound_seconds if bounds else server.micro_batch_seconds,
        message_bytes=fleet.message_bytes,
        device_link=device.link,
        server_link=server.link,
    )


# --- pictures -----------------------------------------------------------------------------------------------------------


def drawn(told: Played, names: Sequence[str]) -> FleetSimulation:
    """A step of a chain as the clock played it, with its picture."""
    spans = _merged(told, names)
    if len(told.doings) <= SINGLE:
        spans = [
            Span(
                lane=_lane(one, names),
                what=one.what,
                begin_seconds=one.begin,
                end_seconds=one.end,
                micro_batch=one.number,
            )
            for one in told.doings
        ]
        spans.sort(key=lambda span: (span.begin_seconds, span.lane))
    return FleetSimulation(makespan_seconds=told.makespan, timeline=spans)


def _computing(chain: Sequence[Member], computed: Sequence[float]) -> list[Span]:
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


def _merged(told: Played, names: Sequence[str]) -> list[Span]:
    """What stations and links did, with short pauses left out."""
    pause = DRAWN * told.makespan
    open_: dict[tuple[str, str], Span] = {}
    done: list[Span] = []
    for one in sorted(told.doings, key=lambda one: (one.begin, one.end)):
        lane = _lane(one, names)
        before = open_.get((lane, one.what))
        if before is not None and one.begin - before.end_seconds <= pause:
            open_[lane, one.what] = before.model_copy(update={"end_seconds": max(before.end_seconds, one.end)})
            continue
        if before is not None:
            done.append(before)
        open_[lane, one.what] = Span(lane=lane, what=one.what, begin_seconds=one.begin, end_seconds=one.end)
    return sorted([*done, *open_.values()], key=lambda span: (span.begin_seconds, span.lane))


def _lane(one: Doing, names: Sequence[str]) -> str:
    """The lane of what a device does, or of the link over which it sends."""
    return names[one.station] if one.to is None else f"{names[one.station]} → {names[one.to]}"
