"""Whole fleets: against equal shares, with members that do not fit or do not pay, and of one device."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from fleet_kinds import plan_data
from fleet_views import computing, everyone
from synthetic import MIB, device, small_chain

from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.part_plans import MemberPlans
from tightfit.planner.fleet.simulate import simulate_fleet
from tightfit.planner.plan import planner_of
from tightfit.profiles.schema import EXCHANGE, adamw
from tightfit.runtime.common.errors import InfeasibleError, InputError


def shares(fleet):
    return {member.name: member.micro_batches for member in everyone(fleet)}


def baseline(fleet, name):
    return next(one for one in fleet.baselines if one.name == name)


@pytest.fixture(scope="module")
def four(members):
    """Devices of speeds 1, 1/2, 1/4 and 1/10 on 100 Mbit/s, and what was reported on the way."""
    told = []
    return *plan_data(members((1.0, 0.5, 0.25, 0.1)), 37, progress=told.append), told


def test_four_devices_against_equal_shares(four):
    fleet, plans, _ = four
    assert set(plans) == set("abcd")
    assert shares(fleet) == {"a": 20, "b": 10, "c": 5, "d": 2}  # by speed, 37 in all
    equal = baseline(fleet, "equal shares")
    assert equal.shares == {"a": 10, "b": 9, "c": 9, "d": 9}
    assert equal.makespan_seconds >= 3.5 * fleet.makespan_seconds
    assert 0 <= fleet.gap < 0.02
    assert fleet.gap == pytest.approx(1 - fleet.bound_seconds / fleet.makespan_seconds)
    simulate_fleet(fleet, plans)


def test_figures_of_its_members(four, members):
    fleet, plans, _ = four
    specs = {spec.name: spec for spec in members((1.0, 0.5, 0.25, 0.1))}
    rows = computing(fleet)
    assert [row.first for row in rows] == [sum(one.micro_batches for one in rows[:at]) for at in range(4)]
    for member in rows:
        plan, spec = plans[member.name], specs[member.name]
        assert plan.optimizer == {"name": EXCHANGE, "state_tensors": 0, "accumulate": 37}
        assert member.peak_bytes == plan.peak_bytes <= member.budget_bytes == spec.budget_bytes == plan.budget_bytes
        held = spec.profile.device.floor.held_bytes
        assert plan.floor_bytes == held + member.exchange_bytes
        assert member.plan == member.name
        assert member.bound_seconds <= member.micro_batch_seconds
        assert member.update_seconds == pytest.approx(4e-4 / {"a": 1, "b": 0.5, "c": 0.25, "d": 0.1}[member.name])


def test_the_fastest_alone(four, members):
    fleet, _, _ = four
    alone = baseline(fleet, "fastest alone")
    assert alone.shares == {"a": 37, "b": 0, "c": 0, "d": 0}
    fastest = members((1.0,))[0]
    profile = fastest.profile.model_copy(update={"optimizer": adamw(37)})
    assert alone.makespan_seconds == pytest.approx(
        37 * planner_of(profile).plan(fastest.budget_bytes).step_seconds, rel=1e-2
    )
    assert alone.makespan_seconds > fleet.makespan_seconds


def test_progress(four):
    fleet, _, told = four
    assert told
    assert all({"stage", "incumbent", "bound", "gap", "seconds"} <= set(one) for one in told)
    assert told[-1]["incumbent"] == pytest.approx(fleet.makespan_seconds)


def test_alike_members_give_the_same_bits(four):
    fleet, _, _ = four
    assert fleet.bit_identical
    assert fleet.differences == []


def test_the_same_fleet_again_is_the_same(planned, members):
    fleet, plans = planned
    again, others = plan_data(members((1.0, 0.5, 0.4)), 8)
    assert {name: plan.fingerprint for name, plan in others.items()} == {
        name: plan.fingerprint for name, plan in plans.items()
    }
    timeless = {"fingerprint": "", "solve_seconds": 0.0}
    assert again.model_copy(update=timeless) == fleet.model_copy(update=timeless)


def test_a_member_that_holds_no_micro_batch_takes_no_part(members):
    a, b, c = members((1.0, 1.0, 1.0))
    fleet, plans = plan_data([replace(b, budget_bytes=18 * MIB), a, c], 6)
    assert shares(fleet) == {"a": 3, "c": 3, "b": 0}
    assert set(plans) == {"a", "c"}
    idle = fleet.members[-1]
    assert (idle.name, fleet.idle) == ("b", [idle])
    assert idle.reason.startswith("it cannot hold a micro-batch: it needs ")
    assert "and may take 18.0 MiB" in idle.reason
    equal = baseline(fleet, "equal shares")
    assert equal.makespan_seconds is None
    assert equal.reason == "b cannot hold a micro-batch"
    simulate_fleet(fleet, plans)


def test_a_member_whose_start_alone_is_too_large(members, layers):
    a, b, c = members((1.0, 1.0, 1.0))
    profile = layers(on=device(import_peak=30 * MIB, resident=5 * MIB, per_instruction=50))
    fleet, _ = plan_data([a, replace(b, profile=profile), c], 4)
    assert shares(fleet) == {"a": 2, "c": 2, "b": 0}
    assert "needs 30.0 MiB and may take 26.0 MiB" in fleet.members[-1].reason


def test_a_member_that_would_make_the_step_longer_takes_no_part(members, link):
    a, b, c = members((1.0, 1.0, 1.0))
    fleet, _ = plan_data([a, replace(b, link=link(1e4)), c], 4)
    assert shares(fleet) == {"a": 2, "c": 2, "b": 0}
    assert fleet.members[-1].reason == "a step is not shorter with it"


def test_where_no_link_pays_one_device_does_everything(members):
    a, b = members((1.0, 0.5), rate=1e4)
    fleet, plans = plan_data([b, a], 3)
    assert shares(fleet) == {"a": 3, "b": 0}
    assert plans["a"].optimizer == adamw(3)
    assert fleet.makespan_seconds == pytest.approx(3 * plans["a"].step_seconds)
    assert (fleet.exchange_seconds, fleet.parts[0].exchange_bytes) == (0.0, 0)
    assert fleet.gap < 0.02
    simulate_fleet(fleet, plans)


def test_a_single_device(members):
    (a,) = members((1.0,))
    fleet, plans = plan_data([a], 5)
    assert shares(fleet) == {"a": 5}
    assert plans["a"].optimizer == adamw(5)
    assert fleet.makespan_seconds == pytest.approx(5 * fleet.parts[0].micro_batch_seconds)
    assert [one.makespan_seconds for one in fleet.baselines] == pytest.approx([fleet.makespan_seconds] * 2)
    simulate_fleet(fleet, plans)


def test_a_single_micro_batch(members):
    fleet, plans = plan_data(members((0.5, 1.0)), 1)
    assert shares(fleet) == {"b": 1, "a": 0}
    assert plans["b"].optimizer == adamw(1)
    assert baseline(fleet, "equal shares").shares == {"a": 1, "b": 0}
    assert baseline(fleet, "equal shares").makespan_seconds == pytest.approx(2 * fleet.makespan_seconds, rel=0.05)


@pytest.mark.slow
def test_nothing_fits(members):
    specs = [replace(one, budget_bytes=10 * MIB + at) for at, one in enumerate(members((1.0, 0.5)))]
    with pytest.raises(InfeasibleError) as caught:
        plan_data(specs, 4)
    message = str(caught.value)
    assert message.startswith("no device of the fleet can hold a micro-batch: a needs ")
    assert "; b needs " in message
    least = caught.value.minimum_budget_bytes
    fleet, _ = plan_data([replace(one, budget_bytes=least + 4096) for one in specs], 4)
    assert fleet.makespan_seconds < math.inf
    with pytest.raises(InfeasibleError):
        plan_data(specs[:1], 4)


def interrupted(monkeypatch, specs, after, **options):
    """Plan a fleet during which Ctrl-C is pressed once, when so many rooms have been planned."""
    once = MemberPlans.plan
    asked = []

    def plan(self, room, time_limit):
        asked.append(room)
        if len(asked) == after + 1:
            raise KeyboardInterrupt
        once(self, room, time_limit)

    monkeypatch.setattr(MemberPlans, "plan", plan)
    return plan_data(specs, 8, **options)


def test_ctrl_c_ends_the_search_with_the_best_chain_so_far(members, planned, monkeypatch):
    fleet, plans = interrupted(monkeypatch, members((1.0, 0.5, 0.4)), 3)
    assert len(fleet.names) == 3
    assert planned[0].makespan_seconds <= fleet.makespan_seconds < 1.1 * planned[0].makespan_seconds
    assert 0 < fleet.bound_seconds <= planned[0].makespan_seconds
    assert baseline(fleet, "fastest alone").reason == "it was not planned before the search was ended"
    simulate_fleet(fleet, plans)


def test_ctrl_c_before_there_is_a_chain(members, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        interrupted(monkeypatch, members((1.0, 0.5, 0.4)), 1)


# --- what cannot be planned -------------------------------------------------------------------------------------------


def refused(specs, match, micro_batches=4):
    with pytest.raises(InputError, match=match):
        plan_data(specs, micro_batches)


def test_names(members):
    a, b = members((1.0, 0.5))
    refused([], "a fleet of no members")
    refused([a, replace(b, name="a")], "two members are called a")
    for name in ("", "../a", "a b", ".a", "ä", "x" * 65):
        refused([replace(a, name=name)], "files are named after it")


def test_numbers(members):
    specs = members((1.0, 0.5))
    for count in (0, -1, 1 << 17):
        refused(specs, f"{count} micro-batches cannot make a step", count)
    for count in (True, 2.0, "4"):
        refused(specs, "are no number of them", count)
    refused([replace(specs[0], budget_bytes=0)], "a budget of 0 bytes")
    with pytest.raises(InputError, match=r"time_limit 0\.0"):
        plan_data(specs, 4, time_limit=0.0)
    with pytest.raises(InputError, match="gap"):
        plan_data(specs, 4, gap=1.0)


def other(spec, **changes):
    return replace(spec, profile=spec.profile.model_copy(update=changes))


def test_members_of_other_models(members, layers):
    a, b = members((1.0, 0.5))
    model = b.profile.model
    refused(
        [a, other(b, model=model.model_copy(update={"name": "another"}))],
        "a and b differ in model .synthetic and another",
    )
    refused([a, other(b, model=model.model_copy(update={"store_fingerprint": "1"}))], "differ in weights .none and 1")
    refused([a, other(b, model=model.model_copy(update={"lora": {"rank": 4}}))], "differ in lora")
    refused([a, other(b, batch=2)], "differ in batch .1 and 2")
    refused([a, other(b, seq=7)], "differ in seq .none and 7")
    refused([a, other(b, compute_dtype="bfloat16")], "differ in dtype .float32 and bfloat16")
    refused([a, replace(b, profile=layers(5))], "differ in tensors: ")
    refused([a, replace(b, profile=layers(trained=512 << 10))], "differ in tensors: ")
    fewer = b.profile.programs[0].model_copy(update={"operators": b.profile.programs[0].operators[1:]})
    refused([a, other(b, programs=[fewer, *b.profile.programs[1:]])], "differ in programs: ")
    moved = b.profile.layers[0].model_copy(update={"name": "elsewhere"})
    refused([a, other(b, layers=[moved, *b.profile.layers[1:]])], "differ in layers: ")


def test_models_that_no_fleet_trains(members, link):
    (a,) = members((1.0,))
    graph = a.profile.model.model_copy(update={"kind": "graph"})
    refused([other(a, model=graph)], "member a: its profile is of a bare graph")
    frozen = small_chain(3, trainables=False)
    refused([MemberSpec(name="a", profile=frozen, budget_bytes=MIB, link=link())], "nothing of synthetic is trained")


def changed_device(spec, **changes):
    return other(spec, device=spec.profile.device.model_copy(update=changes))


@pytest.mark.slow
def test_devices_that_round_differently(members):
    a, b, c = members((1.0, 1.0, 1.0))
    operators = [one.model_copy(update={"args": [3]}) for one in c.profile.programs[0].operators]
    program = c.profile.programs[0].model_copy(update={"operators": operators})
    specs = [
        changed_device(a, torch_version="2.13.0"),
        changed_device(b, threads=4, torch_version="2.13.0"),
        other(c, programs=[program, *c.profile.programs[1:]]),
    ]
    fleet, _ = plan_data(specs, 6)
    assert not fleet.bit_identical
    said = "; ".join(fleet.differences)
    assert "threads: " in said
    assert "b 4" in said
    assert "version of torch: " in said
    assert "c none" in said
    assert "how operators compute" in said
