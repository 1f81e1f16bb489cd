"""Split federated plans: cuts by budget and speed, the order, what they are compared with, files, mutated plans."""

import itertools
import math

import pytest
from fleet_kinds import plan_split
from fleet_views import computing, everyone, mutated, of, turned
from synthetic import MIB

from tightfit.planner.fleet.description import read_description
from tightfit.planner.fleet.io import (
    load_fleet,
    load_member_plan,
    load_part_plan,
    save_fleet,
    sealed_fleet,
)
from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.schema import Link
from tightfit.planner.fleet.simulate import InvalidFleet, simulate_fleet
from tightfit.planner.report.fleet_text import fleet_sentences
from tightfit.profiles.io import save_profile
from tightfit.profiles.schema import adamw
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.units import format_seconds

FLOWER = 2 * MIB
OPTIONS = {"flower_bytes": FLOWER, "start": 1.0, "server_start": 0.5, "time_limit": 20.0}


@pytest.fixture(scope="module")
def spec(stages, link):
    def made(name, speed, budget, rate=12.5e6, *, rank=4, accumulate=1):
        profile = stages((speed,))[0].profile
        model = profile.model.model_copy(update={"lora": {"rank": rank, "alpha": 2.0 * rank} if rank else None})
        profile = profile.model_copy(update={"model": model, "optimizer": adamw(accumulate)})
        return MemberSpec(name=name, profile=profile, budget_bytes=budget, link=link(rate))

    return made


@pytest.fixture(scope="module")
def server(spec):
    return spec("server", 0.8, 60 * MIB, 1e9)


@pytest.fixture(scope="module")
def planned(spec, server):
    devices = [spec("slow", 0.1, 30 * MIB), spec("far", 0.5, 30 * MIB, 1e6), spec("fast", 4.0, 30 * MIB)]
    return plan_split(server, devices, 6, **OPTIONS)


@pytest.mark.slow
def test_a_round_is_what_the_judge_finds(planned):
    fleet, plans = planned
    assert simulate_fleet(fleet, plans).makespan_seconds == fleet.makespan_seconds
    assert fleet.bound_seconds <= fleet.makespan_seconds
    assert fleet.gap < 0.05
    assert fleet.order_gap < 1e-5
    assert [replica.micro_batches for replica in fleet.replicas] == [2, 2, 2]
    assert fleet.bit_identical


def test_each_device_has_layers_of_its_own(planned):
    fleet, plans = planned
    layers = layers_of(fleet)
    # One that is faster than the server holds all it can, a slower one as few as it can.
    assert layers["slow"] == 1
    assert layers["fast"] == 3
    for member in computing(fleet):
        count = layers[member.name]
        assert [layer.name for layer in plans[member.name].layers] == [*(f"l{n}" for n in range(count)), "sent"]
        assert [layer.name for layer in plans[f"server/{member.name}"].layers] == [
            "received",
            *(f"l{n}" for n in range(count, 4)),
        ]
        below, above = fleet.replica(member.name).parts
        assert (below.layer_names, above.layer_names) == (["l0", f"l{count - 1}"], [f"l{count}", "l3"])
        assert member.adapter_bytes == count * 2 * MIB
        assert member.peak_bytes == plans[member.name].peak_bytes + FLOWER <= member.budget_bytes


def test_one_device_at_a_time_is_served(planned):
    turns = [replica.turn for replica in planned[0].replicas]
    for before, after in itertools.pairwise(turns):
        assert after.begin_seconds >= before.begin_seconds + before.service_seconds
        assert after.begin_seconds >= after.head_seconds


def test_less_memory_means_fewer_layers(spec, server):
    fleet, _ = plan_split(server, [spec("small", 4.0, 16 * MIB), spec("large", 4.0, 20 * MIB)], 80, **OPTIONS)
    layers = layers_of(fleet)
    assert 0 < layers["small"] < layers["large"] == 3


def test_it_is_compared_with_other_ways(planned):
    fleet, _ = planned
    described, one_cut, whole, *_ = fleet.baselines
    assert described.name == "order as described"
    assert list(described.shares) == ["slow", "far", "fast"]
    assert described.makespan_seconds >= fleet.makespan_seconds
    assert one_cut.name == "one cut for all"
    assert len(set(one_cut.shares.values())) == 1
    assert one_cut.makespan_seconds >= fleet.makespan_seconds
    assert whole.shares == dict.fromkeys(("slow", "far", "fast"), 4)
    sentences = fleet_sentences(fleet)
    assert any(sentence.startswith("With order as described it would take ") for sentence in sentences)
    assert any(sentence.startswith("Devices send the labels of their data") for sentence in sentences)


def test_a_split_that_makes_rounds_longer_says_so(spec, server):
    fleet, _ = plan_split(server, [spec(name, 4.0, 60 * MIB) for name in "abc"], 6, **OPTIONS)
    whole = next(one for one in fleet.baselines if one.name == "whole models")
    assert whole.makespan_seconds < fleet.makespan_seconds
    shorter, longer = format_seconds(whole.makespan_seconds), format_seconds(fleet.makespan_seconds)
    said = fleet_sentences(fleet)
    assert said[1] == (
        f"Leave out the server: where every device holds all layers a round takes {shorter}, with the split {longer}."
    )
    assert not any(one.startswith("With whole models") for one in said)
    assert not any(one.name == "without a device" for one in fleet.baselines)  # each takes its part of the time


@pytest.mark.slow
def test_a_device_that_makes_rounds_longer_is_named(spec, server):
    devices = {name: spec(name, speed, 30 * MIB) for name, speed in (("a", 4.0), ("snail", 0.02), ("c", 4.0))}
    fleet, _ = plan_split(server, [*devices.values()], 6, **OPTIONS)
    (without,) = (one for one in fleet.baselines if one.name == "without a device")
    assert {*without.shares} == {"a", "c"}
    others, _ = plan_split(server, [devices["a"], devices["c"]], 6, **OPTIONS)
    assert without.makespan_seconds == pytest.approx(others.makespan_seconds, rel=0.05)
    shorter, longer = format_seconds(without.makespan_seconds), format_seconds(fleet.makespan_seconds)
    assert fleet_sentences(fleet)[1] == (
        f"Leave out snail, unless its data are needed: without it a round takes {shorter}, with it {longer}."
    )


def test_shares_and_devices_without_room(spec, server):
    devices = [spec("a", 1.0, 30 * MIB), spec("b", 1.0, 30 * MIB), spec("small", 1.0, FLOWER + MIB)]
    fleet, plans = plan_split(server, devices, 6, weights={"a": 2.0}, **OPTIONS)
    assert {row.name: row.micro_batches for row in everyone(fleet)} == {"a": 4, "b": 2, "small": 0}
    assert set(plans) == {"a", "b", "server/a", "server/b"}
    (small,) = fleet.idle
    assert small.reason.startswith("none of the model's cuts leaves it and the server parts that they can hold")
    assert any(sentence.startswith("small takes no part: ") for sentence in fleet_sentences(fleet))
    fleet, _ = plan_split(server, devices[:2], 1, **OPTIONS)
    assert fleet.idle[0].reason == "its share of a round is less than an update"
    with pytest.raises(InfeasibleError, match=r"no device can take part \(small\)") as told:
        plan_split(server, devices[2:], 2, **OPTIONS)
    assert told.value.minimum_budget_bytes > FLOWER + MIB


def test_updates_of_several_steps_are_pipelined(spec, link):
    server, device = (spec(name, 1.0, 60 * MIB, 1e9, accumulate=4) for name in ("server", "a"))
    fleet, _ = plan_split(server, [device], 8, **OPTIONS)
    (member,) = computing(fleet)
    # Forward, backward and messages one after the other would take as long as the whole model does.
    assert member.ahead > 0
    assert member.step_seconds < fleet.baselines[2].makespan_seconds / 8


def test_what_cannot_be_planned_is_refused(spec, server):
    device = spec("a", 1.0, 30 * MIB)
    for steps in (0, 10**7):
        with pytest.raises(InputError, match=f"{steps} steps cannot make a round"):
            plan_split(server, [device], steps)
    with pytest.raises(InputError, match="a member is called 'server'"):
        plan_split(server, [spec("server", 1.0, 30 * MIB)], 2)
    with pytest.raises(InputError, match="differ in lora"):
        plan_split(server, [spec("a", 1.0, 30 * MIB, rank=8)], 2)
    with pytest.raises(InputError, match="train no adapter"):
        plan_split(spec("server", 1.0, 60 * MIB, rank=0), [spec("a", 1.0, 30 * MIB, rank=0)], 2)
    with pytest.raises(InputError, match="differ in the steps of an update"):
        plan_split(server, [spec("a", 1.0, 30 * MIB, accumulate=2)], 2)
    with pytest.raises(InputError, match="weight 0 of member 'a'"):
        plan_split(server, [device], 2, weights={"a": 0})
    with pytest.raises(InputError, match="weight 2 of member 'server'"):
        plan_split(server, [device], 2, weights={"server": 2})


def test_a_plan_is_read_as_it_was_written(planned, tmp_path):
    fleet, plans = planned
    save_fleet(fleet, plans, tmp_path)
    assert load_fleet(tmp_path) == fleet
    for name in fleet.names:
        assert load_member_plan(tmp_path, fleet, name) == plans[name]
        assert load_part_plan(tmp_path, fleet.replica(name).parts[-1]) == plans[f"server/{name}"]
    (tmp_path / "server" / "fast.plan.json").unlink()
    with pytest.raises(
        InputError, match=r"server/fast\.plan\.json: the plan of member 'server' is not beside the fleet's"
    ):
        load_part_plan(tmp_path, fleet.replica("fast").parts[-1])


DESCRIBED = """steps = 8
[[member]]
name = "laptop"
profile = "profile.json"
memory = "320MiB"
link = "1MB/s"
weight = 2
"""
SERVER = '[server]\nprofile = "profile.json"\nmemory = "4GiB"\n'


def test_a_description_may_have_a_server(server, tmp_path):
    save_profile(server.profile, tmp_path / "profile.json")
    file = tmp_path / "fleet.toml"
    file.write_text(DESCRIBED + SERVER)
    found = read_description(file)
    assert (found.of_rounds, found.count, found.weights) == (True, 8, {"laptop": 2.0})
    assert found.server.budget_bytes == 4 << 30
    assert found.server.link.up_bytes_per_second > 1e9
    assert read_description(file, steps=4).count == 4
    file.write_text(DESCRIBED + SERVER + 'link = "8Mbit/s"\n')
    assert read_description(file).server.link == Link(up_bytes_per_second=1e6, down_bytes_per_second=1e6)
    for text, message in (
        (DESCRIBED, "'weight' is for rounds with a \\[server\\]"),
        ((DESCRIBED + SERVER).replace("weight = 2", "weight = 0"), "'weight' is 0; give a number above 0"),
        (DESCRIBED + SERVER + "name = 'me'\n", "\\[server\\]: no key is called 'name'"),
        (DESCRIBED.replace("steps = 8", "steps = 8\nserver = 3"), "\\[server\\]: describe the server under a line"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            read_description(file)
    file.write_text((DESCRIBED + SERVER).replace("steps", "micro_batches"))
    with pytest.raises(InputError, match="'steps' is missing; say how many make a round"):
        read_description(file)
    with pytest.raises(InputError, match="are for split federated rounds"):
        read_description(file, "data")
    file.write_text(DESCRIBED.replace("weight = 2", ""))
    assert read_description(file).of_rounds
    file.write_text(DESCRIBED.replace("weight = 2", "").replace("steps = 8", "steps = 8\nmicro_batches = 4"))
    found = read_description(file)
    assert (found.of_rounds, found.count) == (False, 4)
    for found in (read_description(file, "federated"), read_description(file, steps=8)):
        assert (found.of_rounds, found.count, found.server) == (True, 8, None)
    assert not read_description(file, micro_batches=2).of_rounds


def _swapped(fleet):
    return {"replicas": [fleet.replicas[1], fleet.replicas[0], *fleet.replicas[2:]]}


def _first(place=0, **changes):
    """Makes the fleet with fields of a part of its first replica replaced."""

    def change(fleet):
        first, *others = fleet.replicas
        parts = [part.model_copy(update=changes if at == place else {}) for at, part in enumerate(first.parts)]
        return {"replicas": [first.model_copy(update={"parts": parts}), *others]}

    return change


def layers_of(fleet):
    """How many layers each device holds."""
    return {name: fleet.part(name).layers[1] for name in fleet.names}


@pytest.mark.parametrize(
    ("change", "invariant"),
    [
        (lambda fleet: {"makespan_seconds": 0.9 * fleet.makespan_seconds}, "makespan"),
        (lambda fleet: {"bound_seconds": 1.1 * fleet.makespan_seconds}, "bound"),
        (lambda fleet: {"micro_batches": 7}, "micro-batches"),
        (lambda fleet: {"accumulate": 2}, "optimizer"),
        (lambda fleet: {"accumulate": 4}, "micro-batches"),
        (lambda fleet: {"model": "another"}, "model"),
        (lambda fleet: {"rank": 2}, "model"),
        (lambda fleet: {"trained_bytes": fleet.trained_bytes + 4}, "model"),
        (_swapped, "order"),
        (of("server", budget_bytes=MIB), "budget"),
        (of("server", start_seconds=0.0), "seconds"),
        (of("server", link=Link(up_bytes_per_second=1e5, down_bytes_per_second=1e9)), "seconds"),
        (of("server", link=Link(up_bytes_per_second=math.inf, down_bytes_per_second=1e9)), "link"),
        (of("far", name="fast"), "names"),
        (turned(0, begin_seconds=0.1), "order"),
        (turned(0, head_seconds=0.5), "seconds"),
        (turned(0, service_seconds=0.5), "seconds"),
        (turned(0, tail_seconds=0.5), "seconds"),
        (of(0, start_seconds=0.5), "seconds"),
        (of(0, step_seconds=0.001), "seconds"),
        (of(0, bound_seconds=1e6), "bound"),
        (of(0, ahead=1), "exchange"),
        (of(0, exchange_bytes=0), "exchange"),
        (_first(1, exchange_bytes=0), "exchange"),
        (of(0, peak_bytes=1), "peak"),
        (_first(1, peak_bytes=1), "peak"),
        (of(0, aside_bytes=0), "peak"),
        (of(0, budget_bytes=MIB), "budget"),
        (of(0, plan_fingerprint="0" * 64), "plan"),
        (_first(1, plan_fingerprint="0" * 64), "plan"),
        (_first(1, plan="server/nobody"), "plan"),
        (of(0, adapter_bytes=4), "model"),
        (of(0, up=[]), "messages"),
        (_first(1, down=[]), "messages"),
        (of(0, link=Link(up_bytes_per_second=1e4, down_bytes_per_second=1e9)), "seconds"),
    ],
)
def test_the_judge_rejects_a_plan_that_was_changed(planned, change, invariant):
    fleet, plans = planned
    with pytest.raises(InvalidFleet) as told:
        simulate_fleet(sealed_fleet(mutated(fleet, change)), plans)
    assert told.value.invariant == invariant


def test_the_judge_rejects_plans_of_other_devices(planned):
    fleet, plans = planned
    first, second, _ = fleet.names
    with pytest.raises(InvalidFleet) as told:
        simulate_fleet(fleet, {**plans, f"server/{first}": plans[f"server/{second}"]})
    assert told.value.invariant == "plan"
    with pytest.raises(InvalidFleet) as told:
        simulate_fleet(fleet, {name: plan for name, plan in plans.items() if name != first})
    assert told.value.invariant == "plan"
