"""The judge of pipelines: replays a step of all stages and links together, checks invariants, states makespan and peaks.

It reads the pipeline's plan and its members' plans alone and shares nothing with the search but the clock
(`pipeline_clock`). Every violated invariant raises `InvalidFleet` with the invariant's name and the member:

| invariant | what must hold |
|---|---|
| names | every member has a name of its own, and those that compute come first |
| layers | the stages follow one another, hold every layer once, and their plans are of these layers |
| ahead | no stage is ahead by less than nothing, more than a step or than the stage below allows; the last one is in turns |
| link | both directions carry something, and latency is not negative |
| plan | every member that computes has a plan, the one with the fingerprint that is stated; the others have none |
| optimizer | that plan is AdamW's of a whole step |
| model | the plans are of the pipeline's model and batch |
| messages | what a stage sends is what the next one receives, in the stated form, and so are the bytes of all messages |
| exchange | `exchange_bytes` are what the buffers of messages need, and the plan's floor has room for them |
| order | no message is taken before it has arrived, and none sent before it was made |
| budget | no peak is above its member's budget |
| peak | the stated peak is the plan's, which is what its replay finds |
| seconds | a micro-batch, and its forward alone, take what the plan's replay says |
| makespan | what is stated is what the replay finds |
| bound | no bound is above what it bounds |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tightfit.planner.fleet.pipeline_clock import Played, Station, agree, play
from tightfit.planner.fleet.pipeline_marks import Marks, marks_of
from tightfit.planner.fleet.pipeline_schema import Passed, PipelinePlan, Stage
from tightfit.planner.fleet.schema import Span
from tightfit.planner.fleet.simulate import (
    ROUNDING,
    InvalidFleet,
    check_bound,
    check_link,
    check_names,
    checked_replay,
    lane_of,
    merged_spans,
    same,
)
from tightfit.planner.fleet.stage_plans import message_bytes, messages_bytes
from tightfit.planner.fleet.stages import LOSS, RECEIVE_LAYER, SEND_LAYER
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import Layer, adamw
from tightfit.runtime.engine.fleet.message import Passing
from tightfit.runtime.engine.training.job import RECEIVE, SEND

SINGLE = 2000
"""spans of a step, at most, that are drawn one by one"""


@dataclass(frozen=True, kw_only=True)
class PipelineSimulation:
    """The figures of a pipeline's plan, as its replay finds them."""

    makespan_seconds: float
    peaks: dict[str, int]
    """predicted peak bytes of each member that computes"""
    timeline: list[Span]


def simulate_pipeline(fleet: PipelinePlan, plans: Mapping[str, Plan]) -> PipelineSimulation:
    """Replay `fleet` with the plans of its members, by name. Raises InvalidFleet where an invariant breaks, and
    `tightfit.planner.simulation.simulate.InvalidSchedule` where one does in a member's own plan.
    """
    _check_chain(fleet)
    for member in fleet.members:
        check_link(member.name, member.link)
        _check_plan(fleet, member, plans.get(member.name))
    _check_messages(fleet, plans)
    for at, member in enumerate(fleet.chain):
        _check_memory(fleet, at, member, plans[member.name])
    found = replayed(fleet, plans)
    if not same(fleet.makespan_seconds, found.makespan_seconds, found.makespan_seconds):
        raise InvalidFleet(
            "makespan",
            "makespan_seconds",
            f"{fleet.makespan_seconds} s are stated, the replay finds {found.makespan_seconds} s",
        )
    check_bound(fleet.bound_seconds, found.makespan_seconds)
    return found


def replayed(fleet: PipelinePlan, plans: Mapping[str, Plan]) -> PipelineSimulation:
    """The figures of a pipeline's step, without a check of what the pipeline states."""
    chain = fleet.chain
    marks = [marks_of(plans[member.name]) for member in chain]
    stations = [
        Station(
            train=train,
            forward=forward,
            ahead=member.ahead,
            link=member.link,
            up_bytes=message_bytes(passing_of(member.up), fleet.bits),
            down_bytes=message_bytes(passing_of(member.down), fleet.bits),
        )
        for member, (train, forward) in zip(chain, marks)
    ]
    told = play(stations, fleet.micro_batches)
    _check_order(told, stations, [member.name for member in chain])
    return PipelineSimulation(
        makespan_seconds=told.makespan,
        peaks={member.name: plans[member.name].peak_bytes for member in chain},
        timeline=_timeline(told, [member.name for member in chain]),
    )


def _timeline(told: Played, names: Sequence[str]) -> list[Span]:
    if len(told.doings) > SINGLE:
        return merged_spans(told, names)
    spans = [
        Span(
            lane=lane_of(one, names),
            what=one.what,
            begin_seconds=one.begin,
            end_seconds=one.end,
            micro_batch=one.micro_batch,
        )
        for one in told.doings
    ]
    return sorted(spans, key=lambda span: (span.begin_seconds, span.lane))


# --- what plans say of a stage -----------------------------------------------------------------------------------------


def own_layers(plan: Plan) -> list[Layer]:
    """The layers of the model that a stage's plan computes."""
    names = [layer.name for layer in plan.layers]
    first = names.index(RECEIVE_LAYER) + 1 if RECEIVE_LAYER in names else 0
    return plan.layers[first : names.index(SEND_LAYER) if SEND_LAYER in names else len(names)]


@dataclass(frozen=True)
class _Message:
    """What the operators of a stage's plan pass in one direction over one cut."""

    passed: tuple[Passed, ...]
    bits: tuple[int, ...]


def messages(plan: Plan, layer: str, target: str) -> _Message:
    """What the operators `target` of a layer (`RECEIVE_LAYER`, `SEND_LAYER`) pass, in their order."""
    program = next((one.program for one in plan.layers if one.name == layer), None)
    passed: list[Passed] = []
    bits: list[int] = []
    for one in next((one.operators for one in plan.programs if one.name == program), ()):
        if one.target != target:
            continue
        name = (one.inputs if target == SEND else one.outputs)[0]
        values = next(known.values for known in plan.programs if known.name == program)
        value = next(value for value in values if value.name == name)
        passed.append(Passed(shape=list(value.shape), dtype=value.dtype))
        bits.append(_bits(one.kwargs))
    return _Message(tuple(passed), tuple(bits))


def passing_of(passed: Sequence[Passed]) -> list[Passing]:
    return [Passing(shape=tuple(one.shape), dtype=one.dtype) for one in passed]


def _bits(options: Mapping[str, Any]) -> int:
    return int(options["bits"])


# --- invariants --------------------------------------------------------------------------------------------------------


def _check_chain(fleet: PipelinePlan) -> None:
    chain = fleet.chain
    check_names([member.name for member in fleet.members], [member.plan is not None for member in fleet.members])
    following = 0
    for member in chain:
        if member.first_layer != following or member.last_layer <= following:
            raise InvalidFleet(
                "layers",
                member.name,
                f"it holds layers {member.first_layer} to {member.last_layer} where {following} comes next",
            )
        following = member.last_layer
    if not chain:
        raise InvalidFleet("layers", "the chain", "nobody holds a layer")
    if not agree([member.ahead for member in chain]):
        raise InvalidFleet("ahead", "the chain", "a stage is farther ahead than the one below, and would wait for ever")
    for member in chain:
        last = member is chain[-1]
        if not 0 <= member.ahead <= (0 if last else fleet.micro_batches):
            raise InvalidFleet("ahead", member.name, f"it is ahead by {member.ahead} of {fleet.micro_batches}")


def _check_plan(fleet: PipelinePlan, member: Stage, plan: Plan | None) -> None:
    def fail(invariant: str, text: str) -> InvalidFleet:
        return InvalidFleet(invariant, member.name, text)

    if member.plan is None:
        if member.plan_fingerprint is not None or plan is not None:
            raise fail("plan", "it computes nothing and has a plan")
        if member.first_layer or member.last_layer:
            raise fail("layers", "it computes nothing and holds layers")
        return
    if plan is None:
        raise fail("plan", "it computes a stage and has no plan")
    if plan.fingerprint != member.plan_fingerprint:
        raise fail(
            "plan", f"its plan is {plan.fingerprint[:12]}…, the fleet's was {str(member.plan_fingerprint)[:12]}…"
        )
    if plan.optimizer != adamw(fleet.micro_batches):
        raise fail("optimizer", f"its plan is for {plan.optimizer}, a step needs {adamw(fleet.micro_batches)}")
    if (plan.model.name, plan.batch) != (fleet.model, fleet.batch):
        raise fail(
            "model",
            f"its plan is of {plan.model.name} in batches of {plan.batch}, the fleet of {fleet.model} in batches of"
            f" {fleet.batch}",
        )
    own = [layer.name for layer in own_layers(plan)]
    if len(own) != member.last_layer - member.first_layer or member.layer_names != [own[0], own[-1]]:
        raise fail(
            "layers",
            f"it holds layers {member.first_layer} to {member.last_layer} ({', '.join(member.layer_names)}), its plan is"
            f" of {len(own)} ({', '.join(own[:1] + own[-1:])})",
        )


def _check_messages(fleet: PipelinePlan, plans: Mapping[str, Plan]) -> None:
    chain = fleet.chain
    seen: set[str] = set()
    for at, member in enumerate(chain):
        plan = plans[member.name]
        twice = seen & {layer.name for layer in own_layers(plan)}
        if twice:
            raise InvalidFleet("layers", member.name, f"another stage computes {min(twice)} too")
        seen |= {layer.name for layer in own_layers(plan)}
        ends = (plan.layers[-1].name == SEND_LAYER) or plan.loss == LOSS
        if ends != (at < len(chain) - 1) or bool(messages(plan, RECEIVE_LAYER, RECEIVE).passed) != bool(at):
            raise InvalidFleet("layers", member.name, "its plan does not begin, or end, where its stage does")
        for stated, layer in ((member.up, SEND_LAYER), (member.down, RECEIVE_LAYER)):
            sent = messages(plan, layer, SEND)
            if list(sent.passed) != stated or set(sent.bits) - {fleet.bits}:
                raise InvalidFleet("messages", member.name, "its plan sends something else than is stated")
    link_bytes = []
    for one, other in pairwise(chain):
        above, below = plans[other.name], plans[one.name]
        for sent, taken, name in (
            (messages(below, SEND_LAYER, SEND), messages(above, RECEIVE_LAYER, RECEIVE), other.name),
            (messages(above, RECEIVE_LAYER, SEND), messages(below, SEND_LAYER, RECEIVE), one.name),
        ):
            if sent != taken:
                raise InvalidFleet("messages", name, "it does not receive what its neighbour sends")
        both = message_bytes(passing_of(one.up), fleet.bits) + message_bytes(passing_of(other.down), fleet.bits)
        link_bytes.append(fleet.micro_batches * both)
    if fleet.link_bytes != link_bytes:
        raise InvalidFleet("messages", "link_bytes", f"{fleet.link_bytes} bytes are stated, messages are {link_bytes}")


def _check_memory(fleet: PipelinePlan, at: int, member: Stage, plan: Plan) -> None:
    def fail(invariant: str, text: str) -> InvalidFleet:
        return InvalidFleet(invariant, member.name, text)

    chain, floor = fleet.chain, plan.device.floor
    below = chain[at - 1] if at else None
    above = chain[at + 1] if at + 1 < len(chain) else None

    def size(passed: Sequence[Passed]) -> int:
        return message_bytes(passing_of(passed), fleet.bits)

    needed = messages_bytes(
        floor,
        from_below=size(below.up) if below else 0,
        to_below=size(member.down),
        to_above=size(member.up),
        from_above=size(above.down) if above else 0,
        ahead_below=below.ahead if below else 0,
    )
    if member.exchange_bytes != needed:
        raise fail("exchange", f"{member.exchange_bytes} bytes are set aside for messages, which take {needed}")
    if plan.floor_bytes != floor.held_bytes or floor.resident_bytes < needed:
        raise fail("exchange", f"its plan's floor of {floor.held_bytes} bytes does not hold the messages' {needed}")
    found = checked_replay(plan, member.budget_bytes, member.peak_bytes, fail)
    assert found.evaluate is not None
    for stated, seconds in (
        (member.micro_batch_seconds, found.step_seconds),
        (plan.step_seconds, found.step_seconds),
        (member.forward_seconds, found.evaluate.seconds),
    ):
        if stated is None or not same(stated, seconds, seconds):
            raise fail("seconds", f"{stated} s are stated, the replay finds {seconds} s")
    bound, seconds = member.bound_seconds, found.step_seconds
    if bound is None or not 0 <= bound <= seconds * (1 + ROUNDING):
        raise fail("bound", f"{bound} s are said to be a lower bound, a micro-batch takes {seconds} s")


def _check_order(told: Played, stations: Sequence[Station], names: Sequence[str]) -> None:
    """Hold what the clock played against what each message needs, message by message."""
    does = {(one.what, one.station, one.micro_batch): one for one in told.doings if one.to is None}
    for one in told.doings:
        if one.to is None:
            continue
        source, target = stations[one.station], stations[one.to]
        latency = source.link.latency_seconds + target.link.latency_seconds
        arrived = one.end + latency
        if one.to > one.station:
            made = does["forward", one.station, one.micro_batch]
            ready = made.begin + _forward(source).send_up
            forward = does.get(("forward", one.to, one.micro_batch))
            assert forward is not None
            used = forward.end
        else:
            ready = does["backward", one.station, one.micro_batch].begin
            used = does["backward", one.to, one.micro_batch].begin
        slack = ROUNDING * told.makespan
        if one.begin < ready - slack or used < arrived - slack:
            raise InvalidFleet(
                "order",
                names[one.to],
                f"micro-batch {one.micro_batch} from {names[one.station]} is made at {ready} s, sent at {one.begin} s, there"
                f" at {arrived} s and used until {used} s",
            )


def _forward(station: Station) -> Marks:
    return station.forward if station.ahead else station.train
