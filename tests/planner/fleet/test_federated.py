"""Federated rounds: steps shared out against brute force and an integer program, budgets, bounds, files, mutated
plans.
"""

import itertools
import math
import random

import pytest
from fleet_kinds import plan_federated
from fleet_views import computing, mutated, of, turned
from synthetic import MIB

from tightfit.planner.fleet.io import load_fleet, load_member_plan, save_fleet, sealed_fleet
from tightfit.planner.fleet.members import MemberSpec
from tightfit.planner.fleet.programs import Pace, makespan_of, shared_out
from tightfit.planner.fleet.schema import Link
from tightfit.planner.fleet.simulate import InvalidFleet, simulate_fleet
from tightfit.planner.report.fleet_text import fleet_sentences
from tightfit.planner.solvers.lp import Linear, LinearProgram
from tightfit.runtime.common.errors import InfeasibleError, InputError

FLOWER = 12 * MIB


def adapted(spec, rank=4, **changes):
    """The member with an adapter of some rank."""
    model = spec.profile.model.model_copy(update={"lora": {"rank": rank, "alpha": 2.0 * rank}})
    return MemberSpec(
        name=changes.get("name", spec.name),
        profile=spec.profile.model_copy(update={"model": model}),
        budget_bytes=changes.get("budget_bytes", spec.budget_bytes + FLOWER),
        link=changes.get("link", spec.link),
    )


@pytest.fixture(scope="module")
def devices(members):
    return [adapted(spec) for spec in members((1.0, 0.5, 0.25, 0.1))]


@pytest.fixture(scope="module")
def planned(devices):
    return plan_federated(devices, 40, flower_bytes=FLOWER, start=1.0, time_limit=20.0)


def drawn(seed):
    draw = random.Random(seed)
    paces = [
        Pace(
            fixed_seconds=draw.choice([0.0, 1.0, draw.uniform(0, 9)]),
            step_seconds=draw.choice([1.0, draw.uniform(0.1, 3)]),
        )
        for _ in range(draw.randint(1, 4))
    ]
    return draw, paces


@pytest.mark.parametrize("seed", range(20))
def test_no_other_way_to_share_steps_out_ends_sooner(seed):
    draw, paces = drawn(seed)
    steps = draw.randint(1, 9)
    taken = shared_out(paces, steps)
    assert sum(taken) == steps
    assert min(taken) >= 0
    ways = (way for way in itertools.product(range(steps + 1), repeat=len(paces)) if sum(way) == steps)
    assert makespan_of(paces, taken) == pytest.approx(min(makespan_of(paces, way) for way in ways), rel=1e-12)


@pytest.mark.parametrize("seed", range(100, 110))
def test_an_integer_program_finds_nothing_shorter(seed):
    draw, paces = drawn(seed)
    unit = draw.choice([1, 2, 5])
    steps = unit * draw.randint(1, 60)
    program = LinearProgram()
    makespan = program.variable()
    counts = [program.variable(0.0, float(steps // unit), whole=True) for _ in paces]
    chosen = [program.choice() for _ in paces]
    for pace, count, taken in zip(paces, counts, chosen):
        program.at_least(Linear().add(taken, float(steps // unit)), Linear().add(count))
        spent = Linear().add(taken, pace.fixed_seconds).add(count, unit * pace.step_seconds)
        program.at_least(Linear().add(makespan), spent)
    program.exactly(Linear.sum(counts), steps / unit)
    solution = program.solve(Linear().add(makespan), 20.0, 0.0)
    found = shared_out(paces, steps, unit)
    assert all(count % unit == 0 for count in found)
    assert makespan_of(paces, found) == pytest.approx(solution.objective, rel=1e-6)


def test_devices_that_cannot_hold_a_step_get_none():
    paces = [Pace(fixed_seconds=1.0, step_seconds=math.inf), Pace(fixed_seconds=0.0, step_seconds=1.0)]
    assert shared_out(paces, 3) == [0, 3]


def test_an_adapter_comes_and_goes(planned):
    fleet, _ = planned
    for member in computing(fleet):
        link = member.link
        comes, goes = fleet.trained_bytes / link.down_bytes_per_second, member.adapter_bytes / link.up_bytes_per_second
        taken = (
            comes + goes + 2 * link.latency_seconds + member.start_seconds + member.micro_batches * member.step_seconds
        )
        assert member.turn.answered_seconds == pytest.approx(taken)


def test_a_round_ends_for_all_at_about_the_same_time(planned):
    fleet, plans = planned
    assert sum(replica.micro_batches for replica in fleet.replicas) == 40
    assert simulate_fleet(fleet, plans).makespan_seconds == fleet.makespan_seconds
    slowest = max(replica.step_seconds for replica in fleet.replicas)
    assert all(one.turn.answered_seconds > fleet.makespan_seconds - slowest for one in fleet.replicas)
    assert fleet.bound_seconds <= fleet.makespan_seconds
    assert fleet.gap <= 0.02
    equal, alone = fleet.baselines
    assert (equal.name, alone.name) == ("equal steps", "fastest alone")
    assert equal.makespan_seconds > 2 * fleet.makespan_seconds
    assert equal.shares == dict.fromkeys("abcd", 10)
    assert alone.shares == {"a": 40, "b": 0, "c": 0, "d": 0}
    assert alone.makespan_seconds > fleet.makespan_seconds


def test_budgets_count_flower(planned, devices):
    fleet, plans = planned
    for spec, member in zip(devices, computing(fleet)):
        assert plans[member.name].budget_bytes == spec.budget_bytes - FLOWER
        assert member.peak_bytes == plans[member.name].peak_bytes + FLOWER <= spec.budget_bytes


def test_devices_without_room_or_use_take_no_part(devices):
    small = adapted(devices[1], name="small", budget_bytes=FLOWER + MIB)
    far = adapted(devices[0], name="far", link=Link(up_bytes_per_second=1e3, down_bytes_per_second=1e3))
    fleet, plans = plan_federated([devices[0], small, far], 5, flower_bytes=FLOWER, start=0.0, time_limit=10.0)
    assert set(plans) == {"a"}
    reasons = {member.name: member.reason for member in fleet.members}
    assert reasons["a"] is None
    assert reasons["small"].startswith("it cannot hold a step: it needs ")
    assert "12.0 MiB for Flower" in reasons["small"]
    assert reasons["far"] == "a round would only wait for it"
    assert fleet.baselines[0].reason == "small cannot hold a step"
    sentences = fleet_sentences(fleet)
    assert any(sentence.startswith("far takes no part: ") for sentence in sentences)
    assert any("there would be no round" in sentence for sentence in sentences)


def test_where_nothing_fits_it_says_what_is_lacking(devices):
    small = adapted(devices[0], budget_bytes=FLOWER + MIB)
    with pytest.raises(InfeasibleError, match="no device can hold a step: a needs") as told:
        plan_federated([small], 5, flower_bytes=FLOWER, time_limit=5.0)
    assert told.value.minimum_budget_bytes > FLOWER + MIB


def test_steps_are_whole_updates(devices):
    with pytest.raises(InputError, match="0 steps cannot make a round"):
        plan_federated(devices, 0)
    optimizer = {**devices[0].profile.optimizer, "accumulate": 4}
    several = [
        MemberSpec(
            name=spec.name,
            profile=spec.profile.model_copy(update={"optimizer": optimizer}),
            budget_bytes=spec.budget_bytes,
            link=spec.link,
        )
        for spec in devices[:2]
    ]
    with pytest.raises(InputError, match="10 steps of a round: an update takes 4 steps"):
        plan_federated(several, 10)


def test_devices_have_to_train_one_model(devices, members):
    with pytest.raises(InputError, match=r"member a: its profile of .* trains no adapter"):
        plan_federated(members((1.0,)), 5)
    other = adapted(devices[1])
    model = other.profile.model.model_copy(update={"lora": {"rank": 2, "alpha": 8.0}})
    other = MemberSpec(
        name="b",
        profile=other.profile.model_copy(update={"model": model}),
        budget_bytes=other.budget_bytes,
        link=other.link,
    )
    with pytest.raises(InputError, match=r"members a and b differ in the adapter's scale \(2.0 and 4.0\)"):
        plan_federated([devices[0], other], 5)
    longer = devices[1].profile.model_copy(update={"batch": 3})
    other = MemberSpec(name="b", profile=longer, budget_bytes=other.budget_bytes, link=other.link)
    with pytest.raises(InputError, match=r"members a and b differ in batch \(\d+ and 3\)"):
        plan_federated([devices[0], other], 5)


@pytest.mark.parametrize(
    ("setting", "option"),
    [({"rank_pattern": {"q_proj": 4}}, "rank_pattern"), ({"use_dora": True}, "dora")],
)
def test_what_rounds_cannot_add_up_is_refused(devices, setting, option):
    lora = {"rank": 2, "alpha": 4.0} | setting
    made = [
        MemberSpec(
            name=spec.name,
            profile=spec.profile.model_copy(update={"model": spec.profile.model.model_copy(update={"lora": lora})}),
            budget_bytes=spec.budget_bytes,
            link=spec.link,
        )
        for spec in devices[:2]
    ]
    with pytest.raises(InputError, match=f"member a: its adapter was profiled with {option}"):
        plan_federated(made, 5)


def test_settings_of_the_adapters_have_to_be_alike(devices):
    def made(spec, lora):
        model = spec.profile.model.model_copy(update={"lora": lora})
        return MemberSpec(
            name=spec.name,
            profile=spec.profile.model_copy(update={"model": model}),
            budget_bytes=spec.budget_bytes,
            link=spec.link,
        )

    plain = {"rank": 4, "alpha": 8.0}
    with pytest.raises(InputError, match="differ in the adapter's other settings"):
        plan_federated([made(devices[0], plain), made(devices[1], plain | {"lora_dropout": 0.1})], 5)
    # alpha / sqrt(rank), not alpha / rank
    stable = {"rank": 16, "alpha": 8.0, "use_rslora": True}
    with pytest.raises(InputError, match=r"differ in the adapter's scale \(2.0 and 4.0\)"):
        plan_federated([made(devices[0], stable), made(devices[1], stable | {"rank": 4})], 5)


def test_a_plan_is_read_as_it_was_written(planned, tmp_path):
    fleet, plans = planned
    save_fleet(fleet, plans, tmp_path)
    assert load_fleet(tmp_path) == fleet
    for name in fleet.names:
        assert load_member_plan(tmp_path, fleet, name) == plans[name]
    with pytest.raises(
        InputError,
        match=r"of another kind \(federated\); `tightfit fleet federate run` runs it",
    ):
        load_fleet(tmp_path, in_rounds=False)


@pytest.mark.parametrize(
    ("change", "invariant"),
    [
        (lambda fleet: {"makespan_seconds": 0.9 * fleet.makespan_seconds}, "makespan"),
        (lambda fleet: {"bound_seconds": 1.1 * fleet.makespan_seconds}, "bound"),
        (lambda fleet: {"micro_batches": 41}, "micro-batches"),
        (lambda fleet: {"accumulate": 7}, "micro-batches"),
        (lambda fleet: {"model": "another"}, "model"),
        (lambda fleet: {"rank": 2}, "model"),
        (lambda fleet: {"trained_bytes": fleet.trained_bytes + 4}, "seconds"),
        (of("b", name="a"), "names"),
        (turned(0, service_seconds=0.5), "seconds"),
        (of("a", step_seconds=0.001), "seconds"),
        (of("a", bound_seconds=1e6), "bound"),
        (of("a", peak_bytes=1), "peak"),
        (of("a", aside_bytes=0), "peak"),
        (of("a", budget_bytes=MIB), "budget"),
        (of("a", plan_fingerprint="0" * 64), "plan"),
        (of("a", adapter_bytes=4), "model"),
        (of("a", link=Link(up_bytes_per_second=math.inf, down_bytes_per_second=1.0)), "link"),
        (of("a", start_seconds=0.0), "seconds"),
    ],
)
def test_the_judge_rejects_a_plan_that_was_changed(planned, change, invariant):
    fleet, plans = planned
    with pytest.raises(InvalidFleet) as told:
        simulate_fleet(sealed_fleet(mutated(fleet, change)), plans)
    assert told.value.invariant == invariant
