"""The judge of pipelines: what a valid one takes, and that every broken one is rejected by the invariant that it
breaks.
"""

from __future__ import annotations

import pytest
from fleet_views import changed, computing

from tightfit.planner.fleet import simulate
from tightfit.planner.fleet.clock import play
from tightfit.planner.fleet.schema import Passed
from tightfit.planner.fleet.simulate import InvalidFleet, simulate_fleet
from tightfit.planner.plan_result import sealed
from tightfit.planner.simulation.simulate import InvalidSchedule
from tightfit.profiles.schema import adamw


def rejected(fleet, plans, invariant, member=None):
    with pytest.raises(InvalidFleet) as caught:
        simulate_fleet(fleet, plans)
    assert caught.value.invariant == invariant, str(caught.value)
    if member is not None:
        assert caught.value.member == member


def with_plan(fleet, plans, name, **changes):
    """The same with another plan of a stage, whose fingerprint the fleet knows."""
    plan = sealed(plans[name].model_copy(update=changes))
    return changed(fleet, name, plan_fingerprint=plan.fingerprint), {**plans, name: plan}


def test_its_figures_are_the_plan_s(pipelined):
    fleet, plans = pipelined
    found = simulate_fleet(fleet, plans)
    assert len(fleet.names) == 2
    assert found.makespan_seconds == fleet.makespan_seconds


def test_names(pipelined):
    fleet, plans = pipelined
    rejected(changed(fleet, fleet.names[1], name=fleet.names[0]), plans, "names")
    idle = fleet.members[0].model_copy(update={"name": "idle"})
    simulate_fleet(fleet.model_copy(update={"members": [*fleet.members, idle]}), plans)


def test_layers(pipelined):
    fleet, plans = pipelined
    first, last = fleet.parts
    cut, end = last.layers
    for part, broken in (
        (first, {"layers": [1, cut]}),
        (first, {"layers": [0, cut - 1]}),
        (first, {"layers": []}),
        (last, {"layers": [cut + 1, end]}),
        (last, {"layers": [cut, cut]}),
        (last, {"layers": [cut, end + 1]}),
        (first, {"layer_names": ["l0", "l3"]}),
    ):
        rejected(changed(fleet, part.member, **broken), plans, "layers")
    rejected(with_parts(fleet, last, first), plans, "layers")


def with_parts(fleet, *parts):
    """The fleet with other parts."""
    return fleet.model_copy(update={"replicas": [fleet.replicas[0].model_copy(update={"parts": list(parts)})]})


def test_a_stage_that_another_one_computes(pipelined):
    """The first stage's plan twice: its layers follow by their numbers, but hold the same tensors."""
    fleet, plans = pipelined
    first, last = fleet.parts
    twice = first.model_copy(update={"layers": last.layers, "member": last.member, "ahead": 0})
    rejected(with_parts(fleet, first, twice), {first.plan: plans[first.plan]}, "model", first.member)


def test_how_far_stages_are_ahead(pipelined):
    fleet, plans = pipelined
    one, other = fleet.names
    rejected(changed(fleet, other, ahead=1), plans, "ahead", other)
    rejected(changed(fleet, one, ahead=-1), plans, "ahead")
    rejected(changed(fleet, one, ahead=fleet.micro_batches + 1), plans, "ahead", one)
    # One farther ahead takes another message of memory above, and another time.
    rejected(changed(fleet, one, ahead=fleet.parts[0].ahead - 1), plans, "exchange", other)


@pytest.mark.parametrize("broken", [{"up_bytes_per_second": 0.0}, {"latency_seconds": -1e-3}])
def test_links(pipelined, broken):
    fleet, plans = pipelined
    link = fleet.member(fleet.names[1]).link.model_copy(update=broken)
    rejected(changed(fleet, fleet.names[1], link=link), plans, "link", fleet.names[1])


def test_plans(pipelined):
    fleet, plans = pipelined
    one, other = fleet.names
    rejected(fleet, {one: plans[one]}, "plan", other)
    rejected(fleet, {**plans, other: plans[one]}, "plan", other)
    rejected(changed(fleet, fleet.names[1], plan_fingerprint="0" * 64), plans, "plan", other)
    rejected(*with_plan(fleet, plans, fleet.names[1], optimizer=adamw(3)), "optimizer", other)
    rejected(*with_plan(fleet, plans, fleet.names[1], batch=2), "model", other)
    model = plans[other].model.model_copy(update={"name": "another"})
    rejected(*with_plan(fleet, plans, fleet.names[1], model=model), "model", other)


def test_messages(pipelined):
    fleet, plans = pipelined
    first, last = computing(fleet)
    rejected(changed(fleet, fleet.names[0], up=[]), plans, "messages", first.name)
    rejected(changed(fleet, fleet.names[1], down=[Passed(shape=[1], dtype="float32")]), plans, "messages", last.name)
    rejected(fleet.model_copy(update={"bits": 8}), plans, "messages", first.name)
    programs = []
    for program in plans[last.name].programs:
        operators = [
            one.model_copy(update={"kwargs": one.kwargs | {"bits": 8}}) if one.target == "tightfit.receive" else one
            for one in program.operators
        ]
        programs.append(program.model_copy(update={"operators": operators}))
    rejected(*with_plan(fleet, plans, fleet.names[1], programs=programs), "messages", last.name)


@pytest.mark.parametrize("by", [-4096, 4096])
def test_messages_have_the_memory_that_they_take(pipelined, by):
    fleet, plans = pipelined
    rejected(changed(fleet, fleet.names[1], exchange_bytes=fleet.parts[1].exchange_bytes + by), plans, "exchange")
    rejected(*with_plan(fleet, plans, fleet.names[1], floor_bytes=plans[fleet.names[1]].floor_bytes + by), "exchange")


def test_peaks(pipelined):
    fleet, plans = pipelined
    last = computing(fleet)[1]
    rejected(changed(fleet, fleet.names[1], budget_bytes=plans[last.name].budget_bytes - 1), plans, "budget", last.name)
    rejected(changed(fleet, fleet.names[1], peak_bytes=last.peak_bytes - 1), plans, "peak", last.name)


def test_seconds(pipelined):
    fleet, plans = pipelined
    last = computing(fleet)[1]
    rejected(
        changed(fleet, fleet.names[1], micro_batch_seconds=0.9 * last.micro_batch_seconds), plans, "seconds", last.name
    )
    rejected(changed(fleet, fleet.names[1], forward_seconds=0.9 * last.forward_seconds), plans, "seconds", last.name)
    rejected(changed(fleet, fleet.names[1], forward_seconds=None), plans, "seconds", last.name)
    rejected(changed(fleet, fleet.names[1], bound_seconds=1.1 * last.micro_batch_seconds), plans, "bound", last.name)
    rejected(fleet.model_copy(update={"makespan_seconds": 0.9 * fleet.makespan_seconds}), plans, "makespan")
    rejected(fleet.model_copy(update={"bound_seconds": 1.1 * fleet.makespan_seconds}), plans, "bound")


def test_a_broken_schedule_of_a_stage_is_found(pipelined):
    fleet, plans = pipelined
    train = plans[fleet.names[1]].train
    cut = train.model_copy(update={"instructions": train.instructions[:-1]})
    with pytest.raises(InvalidSchedule):
        simulate_fleet(*with_plan(fleet, plans, fleet.names[1], train=cut))


@pytest.mark.parametrize("what", ["early", "late"])
def test_no_message_is_sent_before_it_is_made_or_taken_before_it_is_there(pipelined, what, monkeypatch):
    """A clock that is wrong by one message is found out."""
    fleet, plans = pipelined

    def wrong(stations, micro_batches):
        told = play(stations, micro_batches)
        at, message = next((at, one) for at, one in enumerate(told.doings) if one.to is not None and one.number == 1)
        shift = -0.1 if what == "early" else 10.0
        moved = type(message)(
            what=message.what,
            station=message.station,
            to=message.to,
            number=message.number,
            begin=message.begin + shift,
            end=message.end + shift,
        )
        return type(told)(makespan=told.makespan, doings=[*told.doings[:at], moved, *told.doings[at + 1 :]])

    monkeypatch.setattr(simulate, "play", wrong)
    rejected(fleet, plans, "order")
