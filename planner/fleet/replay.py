"""What a step of a fleet takes: the clocks play what the plans of its members take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tightfit.planner.fleet.clock import Marks, OneWay, Station, SumStation, play, play_sum
from tightfit.planner.fleet.part_plans import marks_of
from tightfit.planner.fleet.part_profiles import micro_batch_seconds, pieces_of, slots_of
from tightfit.planner.fleet.parts import Chain, message_bytes, passing_of, replicas
from tightfit.planner.fleet.schema import FleetPlan, PipelinePlan, SidePlan
from tightfit.planner.schema import Plan
from tightfit.planner.simulation.simulate import Simulation, simulate


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


class Replays:
    """What the replays of plans find, which live as long as this; each is replayed once, however many members have
    it.
    """

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
        return FleetSimulation(makespan_seconds=one_way(fleet).play(fleet.micro_batches).makespan)
    if isinstance(fleet, PipelinePlan):
        (parts,) = replicas(fleet)
        stations = stations_of(parts, [plans[part.member] for part in parts], fleet.bits, Replays())
        return FleetSimulation(makespan_seconds=play(stations, fleet.micro_batches).makespan)
    chain = fleet.chain
    computed = [
        member.micro_batches * micro_batch_seconds(plans[member.name], member.gradients, first=not at)
        for at, member in enumerate(chain)
    ]
    latest = max(computed)
    if len(chain) == 1:
        return FleetSimulation(makespan_seconds=latest, compute_seconds=latest)
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
