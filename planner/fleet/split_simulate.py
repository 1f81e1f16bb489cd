"""The judge of split federated plans: recounts a round from the plans of both stages of every device, and checks what is
stated.

Every violated invariant raises `InvalidFleet` with the invariant's name and the member: names, steps (they add up, in whole
updates), link, plan (the two with the stated fingerprints), optimizer, model (both train the adapter together, each its own
part), messages (what the two plans send and receive is what is stated), exchange (bytes for messages), budget, peak (the
plans' replays, and Flower's processes), seconds (the clock of a pipeline, played with the replays), order (the server serves one at a time, devices that
are ready), makespan, bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tightfit.planner.fleet.federated_simulate import check_makespan, check_members, same_seconds
from tightfit.planner.fleet.pieces import trained_tensors
from tightfit.planner.fleet.pipeline_clock import Station, play
from tightfit.planner.fleet.pipeline_marks import Marks, marks_of
from tightfit.planner.fleet.pipeline_schema import Passed
from tightfit.planner.fleet.simulate import ROUNDING, InvalidFleet, check_link
from tightfit.planner.fleet.split_schema import SplitMember, SplitPlan
from tightfit.planner.fleet.stage_plans import message_bytes, messages_bytes
from tightfit.planner.schema import Plan
from tightfit.planner.simulation.simulate import simulate
from tightfit.runtime.engine.fleet.message import Passing
from tightfit.runtime.engine.training.job import RECEIVE, SEND


def simulate_split(fleet: SplitPlan, plans: Mapping[str, Plan], server_plans: Mapping[str, Plan]) -> float:
    """Seconds of a round of `fleet` with the plans of its devices, and the server's for each, by name. Raises InvalidFleet
    where an invariant breaks.
    """
    check_members(fleet)
    check_link("the server", fleet.server.link)
    distinct = {id(plan): plan for plan in (*plans.values(), *server_plans.values())}  # many may have one
    replays = {
        key: _Replay(peak_bytes=simulate(plan).peak_bytes, marks=marks_of(plan)) for key, plan in distinct.items()
    }
    free = last = 0.0
    for member in fleet.members:
        check_link(member.name, member.link)
        if not _takes_part(fleet, member, plans, server_plans):
            continue
        _Judged(fleet, member, plans[member.name], server_plans[member.name], replays).check()
        begin = max(free, member.head_seconds)
        if not same_seconds(member.begin_seconds, begin):
            raise InvalidFleet(
                "order", member.name, f"it is served after {member.begin_seconds} s, and both are free after {begin} s"
            )
        free = begin + member.service_seconds
        answered = free + member.tail_seconds
        if not same_seconds(member.round_seconds, answered):
            raise InvalidFleet("seconds", member.name, f"it answers after {member.round_seconds} s, not {answered} s")
        last = max(last, answered)
    check_makespan(fleet, last)
    return last


def _takes_part(
    fleet: SplitPlan, member: SplitMember, plans: Mapping[str, Plan], server_plans: Mapping[str, Plan]
) -> bool:
    if member.steps % fleet.accumulate:
        raise InvalidFleet("steps", member.name, f"it takes {member.steps} steps, an update takes {fleet.accumulate}")
    made = [member.name in plans, member.name in server_plans, member.plan is not None, member.server_plan is not None]
    if not member.steps and (any(made) or member.round_seconds):
        raise InvalidFleet("plan", member.name, "it takes no steps and has a plan")
    if member.steps and not all(made):
        raise InvalidFleet("plan", member.name, "it takes steps, and a plan of it or the server's for it is missing")
    return bool(member.steps)


@dataclass(frozen=True, kw_only=True)
class _Replay:
    """What the replay of a plan finds."""

    peak_bytes: int
    marks: tuple[Marks, Marks]


class _Judged:
    """A device with the server."""

    def __init__(
        self, fleet: SplitPlan, member: SplitMember, plan: Plan, server_plan: Plan, replays: Mapping[int, _Replay]
    ) -> None:
        self.fleet, self.member, self.plan, self.server_plan = fleet, member, plan, server_plan
        self.below, self.above = replays[id(plan)], replays[id(server_plan)]

    def fail(self, invariant: str, text: str) -> InvalidFleet:
        return InvalidFleet(invariant, self.member.name, text)

    def check(self) -> None:
        fleet, member = self.fleet, self.member
        stated = {member.plan_fingerprint: self.plan, member.server_plan_fingerprint: self.server_plan}
        for fingerprint, plan in stated.items():
            if plan.fingerprint != fingerprint:
                raise self.fail("plan", "its plan, or the server's for it, is another one")
            if plan.accumulate != fleet.accumulate or plan.optimizer.get("name", "adamw") != "adamw":
                raise self.fail("optimizer", f"a plan is for {plan.optimizer}")
        self._check_model()
        self._check_messages()
        self._check_memory()
        self._check_seconds()

    def _check_model(self) -> None:
        fleet, member = self.fleet, self.member
        lower, upper = (
            {tensor.name: tensor.bytes for tensor in trained_tensors(plan)} for plan in (self.plan, self.server_plan)
        )
        for plan in (self.plan, self.server_plan):
            lora = plan.model.lora
            if lora is None or (plan.model.name, plan.batch, lora["rank"]) != (fleet.model, fleet.batch, fleet.rank):
                raise self.fail("model", f"a plan is of {plan.model.name} in batches of {plan.batch}, adapter {lora}")
        if lower.keys() & upper.keys() or sum(lower.values()) + sum(upper.values()) != fleet.adapter_bytes:
            raise self.fail("model", "its plan and the server's do not train the whole adapter, each its own part")
        if sum(lower.values()) != member.adapter_bytes or member.rank != fleet.rank:
            raise self.fail("model", f"its plan trains {sum(lower.values())} bytes of adapter of rank {fleet.rank}")

    def _check_messages(self) -> None:
        member = self.member
        sent = [_passing(self.plan, SEND, "up"), _passing(self.server_plan, SEND, "down")]
        received = [_passing(self.server_plan, RECEIVE, "up"), _passing(self.plan, RECEIVE, "down")]
        stated = [list(map(_plain, member.up)), list(map(_plain, member.down))]
        if sent != received or sent != stated or not all(stated):
            raise self.fail("messages", "what passes over its cut is not what both plans send and receive")
        strangers = [_passing(self.plan, RECEIVE, "up"), _passing(self.server_plan, SEND, "up")]
        if any(strangers):
            raise self.fail("messages", "its plan is not of the lowest layers, or the server's not of all others")

    def _check_memory(self) -> None:
        member, server = self.member, self.fleet.server
        found, above = self.below.peak_bytes, self.above.peak_bytes
        if member.peak_bytes != found + member.flower_bytes or self.plan.peak_bytes != found:
            raise self.fail("peak", f"{member.peak_bytes} bytes are stated, the replay of its plan holds {found}")
        if member.server_peak_bytes != above or self.server_plan.peak_bytes != above:
            raise self.fail(
                "peak", f"{member.server_peak_bytes} bytes are stated of the server, the replay holds {above}"
            )
        if member.flower_bytes < 0 or member.peak_bytes > member.budget_bytes:
            raise self.fail("budget", f"it peaks at {member.peak_bytes} bytes and may take {member.budget_bytes}")
        if above > server.budget_bytes:
            raise self.fail("budget", f"the server peaks at {above} bytes and may take {server.budget_bytes}")
        up, down = self._message(member.up), self._message(member.down)
        lower = messages_bytes(self.plan.device.floor, to_above=up, from_above=down)
        upper = messages_bytes(self.server_plan.device.floor, from_below=up, to_below=down, ahead_below=member.ahead)
        for plan, stated, needed in (
            (self.plan, member.exchange_bytes, lower),
            (self.server_plan, member.server_exchange_bytes, upper),
        ):
            if stated != needed or plan.device.floor.held_bytes < needed:
                raise self.fail("exchange", f"{stated} bytes are set aside for messages, which take {needed}")

    def _check_seconds(self) -> None:
        member, server = self.member, self.fleet.server
        (train, forward), (above, above_forward) = self.below.marks, self.above.marks
        up, down = self._message(member.up), self._message(member.down)
        stations = [
            Station(train=train, forward=forward, ahead=member.ahead, link=member.link, up_bytes=up),
            Station(train=above, forward=above_forward, ahead=0, link=server.link, down_bytes=down),
        ]
        update = play(stations, self.fleet.accumulate).makespan
        step = member.step_seconds
        if step is None or not same_seconds(step, update / self.fleet.accumulate):
            raise self.fail("seconds", f"{step} s are stated for a step, the clock takes {update} s for an update")
        if member.bound_seconds is None or not 0 <= member.bound_seconds <= step * (1 + ROUNDING):
            raise self.fail("bound", f"{member.bound_seconds} s are said to be a lower bound, a step takes {step} s")
        if min(member.start_seconds, server.start_seconds) < 0:
            raise self.fail("seconds", "a start takes less than no time")
        service = server.start_seconds + member.steps * step
        link = member.link
        head = member.adapter_bytes / link.down_bytes_per_second + link.latency_seconds + member.start_seconds
        tail = member.adapter_bytes / link.up_bytes_per_second + link.latency_seconds
        for name, said, counted in (
            ("head", member.head_seconds, head),
            ("service", member.service_seconds, service),
            ("tail", member.tail_seconds, tail),
        ):
            if not same_seconds(said, counted):
                raise self.fail("seconds", f"{said} s are stated for its {name}, the count is {counted} s")

    def _message(self, passed: Sequence[Passed]) -> int:
        return message_bytes([Passing(shape=tuple(one.shape), dtype=one.dtype) for one in passed], 0)


def _passing(plan: Plan, target: str, direction: str) -> list[tuple[list[int], str]]:
    """Shapes and types of what a plan sends or receives in a direction, in the order in which it does."""
    found = {}
    for program in plan.programs:
        values = {value.name: value for value in program.values}
        for operator in program.operators:
            if operator.target == target and operator.kwargs.get("direction") == direction:
                names = operator.inputs if target == SEND else [name for name in operator.outputs if name is not None]
                value = values[names[0]]
                found[int(str(operator.kwargs["number"]))] = (list(value.shape), value.dtype)
    return [found[number] for number in sorted(found)]


def _plain(passed: Passed) -> tuple[list[int], str]:
    return list(passed.shape), passed.dtype
