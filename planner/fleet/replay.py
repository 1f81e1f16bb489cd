"""What a step of a fleet takes: the clocks play what the plans of its members take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tightfit.planner.fleet.clock import Marks, OneWay, Station, SumStation, play, play_sum
from tightfit.planner.fleet.part_plans import marks_of
from tightfit.planner.fleet.part_profiles import micro_batch_seconds, pieces_of, slots_of
from tightfit.planner.fleet.parts import message_bytes, passing_of
from tightfit.planner.fleet.schema import FleetPlan, Replica
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


def replayed(fleet: FleetPlan, plans: Mapping[str, Plan]) -> FleetSimulation:
    """The figures of a step with the plans of its parts, by name, without a check of what the fleet states."""
    first = fleet.replicas[0]
    if fleet.one_way:
        return FleetSimulation(makespan_seconds=one_way(fleet).play(fleet.micro_batches).makespan)
    if fleet.cut:
        return FleetSimulation(
            makespan_seconds=play(stations_of(fleet, first, plans, Replays()), fleet.micro_batches).makespan
        )
    computed = [
        replica.micro_batches * micro_batch_seconds(plans[part.plan], replica.gradients, first=replica is first)
        for replica, part in zip(fleet.replicas, fleet.parts)
    ]
    latest = max(computed)
    if len(computed) == 1:
        return FleetSimulation(makespan_seconds=latest, compute_seconds=latest)
    played = play_sum(
        [
            SumStation(
                computed_seconds=done,
                link=fleet.member(part.member).link,
                slots=slots_of(replica.micro_batches, first=replica is first),
                gradients=replica.gradients,
                states=replica.states,
                update_seconds=replica.update_seconds,
                read=plans[part.plan].device.read,
                write=plans[part.plan].device.write,
            )
            for replica, part, done in zip(fleet.replicas, fleet.parts, computed)
        ],
        pieces_of(plans[first.parts[0].plan]),
    )
    exchanged = max(played.exchanged)
    return FleetSimulation(
        makespan_seconds=played.makespan,
        compute_seconds=latest,
        exchange_seconds=exchanged - latest,
        update_seconds=played.makespan - exchanged,
    )


def stations_of(fleet: FleetPlan, replica: Replica, plans: Mapping[str, Plan], replays: Replays) -> list[Station]:
    """The parts of a replica with their plans, as they stand on the clock of pipelines."""
    stations = []
    for part in replica.parts:
        train, forward = replays.marks(plans[part.plan])
        stations.append(
            Station(
                train=train,
                forward=forward,
                ahead=part.ahead,
                link=fleet.member(part.member).link,
                up_bytes=message_bytes(passing_of(part.up), fleet.bits),
                down_bytes=message_bytes(passing_of(part.down), fleet.bits),
            )
        )
    return stations


def one_way(fleet: FleetPlan, *, bounds: bool = False) -> OneWay:
    """The clock of mobillm's step, of what the plans take or, with `bounds`, of what no plans undercut."""
    device, server = fleet.parts
    return OneWay(
        device_seconds=device.bound_seconds if bounds else device.micro_batch_seconds,
        server_seconds=server.bound_seconds if bounds else server.micro_batch_seconds,
        message_bytes=message_bytes(passing_of(device.up), fleet.bits),
        device_link=fleet.member(device.member).link,
        server_link=fleet.member(server.member).link,
    )
