"""Plans that clip gradients: the layer model beside the layer's schedule, bounds beside schedules that were carried
out, what the simulator rejects, what plans say and what is refused.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
from broken_plans import changed, rejected
from decisions import bounds_of_schedules, figures_of_decisions
from pydantic import ValidationError
from sample_plans import sample_plan
from synthetic import SLICE, decoder_like, device, small_chain, tables

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.problem.clipping import accumulate_seconds, clipped, clipped_seconds
from tightfit.planner.report.explain import explain
from tightfit.planner.report.explanation import account
from tightfit.planner.report.summary import plan_summary
from tightfit.planner.schedule.column_bytes import live_bytes
from tightfit.planner.schedule.prefetch import clock
from tightfit.planner.schedule.realize import realize
from tightfit.planner.schema import Plan
from tightfit.planner.simulation.simulate import InvalidSchedule, simulate
from tightfit.planner.solve.policies import POLICIES, refused_of, rule_columns, smallest
from tightfit.profiles.schema import EXCHANGE, Profile, Tensor, adamw
from tightfit.runtime.common.errors import InputError

STEPS = (1, 3)
"""of an update"""


def clipping(profile: Profile, steps: int = 1) -> Profile:
    return clipped(profile.model_copy(update={"optimizer": adamw(steps)}), 1.0)


def profiles(steps: int) -> list[Profile]:
    """Tables whose values may lie on disk, random layers, and a decoder."""
    disk = device(per_instruction=64)
    made = [
        tables(3, in_layer=1),
        tables(2, in_layer=3),
        *(small_chain(seed, layers=4, weights=False, on=disk) for seed in range(4)),
    ]
    made.append(decoder_like(2, tokens=64, hidden=96, ffn=192, slices=3, on=disk))
    return [clipping(profile, steps) for profile in made]


@pytest.mark.parametrize("steps", STEPS)
def test_the_layer_model_says_what_the_layers_schedule_does(steps: int) -> None:
    rng = random.Random(steps)
    apart = 0
    for profile in profiles(steps)[:-1]:
        for kind in layered(profile).types:
            for decision, told, counted in figures_of_decisions(rng, kind, 5):
                apart += bool(decision.states)
                # The model counts what is certain; a rerun's further outputs may cost a free more.
                assert told.pop("instructions") <= counted.pop("instructions") + 1e-6
                assert told == pytest.approx(counted, rel=1e-6, abs=1e-5)
    assert apart > 10


@pytest.mark.slow
@pytest.mark.parametrize("steps", STEPS)
def test_windows_add_up_and_no_schedule_is_faster_than_its_bounds(steps: int) -> None:
    rng = random.Random(steps)
    bounds = [bound for profile in profiles(steps) for bound in bounds_of_schedules(rng, profile, 3)]
    assert len(bounds) >= 15
    assert min(bounds) > 0


def test_small_budgets_put_sums_on_disk_and_plans_are_near_their_bounds() -> None:
    steps = 3
    planner = ModelPlanner(clipping(tables(4), steps))
    least = planner.minimum().peak_bytes
    # The update has value, two moments and the sum of one slice; nothing else of the table is there.
    assert 4 * SLICE < least < 5 * SLICE
    assert not planner.plan(least - 1).fits
    roomy = planner.plan(1 << 40)
    plans = [planner.plan(least + part * (roomy.peak_bytes - least) // 3) for part in range(4)]
    for made in plans:
        found = simulate(made)
        assert found.step_seconds == made.step_seconds
        assert made.update is not None
        assert made.train is not None
        assert made.step_seconds == pytest.approx(made.train.seconds + made.update.seconds / steps)
        assert made.bound_seconds <= made.step_seconds
    places = [{made.decisions[name] for name in made.decisions if name.startswith("grad_sum:")} for made in plans]
    assert places[0] == {"offloaded"}
    assert places[-1] == {"kept"}
    seconds = [made.step_seconds for made in plans]
    assert all(before >= after for before, after in pairwise(seconds))
    assert plans[-1].status == "optimal"


@pytest.mark.parametrize("steps", STEPS)
def test_the_next_trainable_is_fetched_while_one_is_updated(steps: int) -> None:
    problem = layered(clipping(tables(4), steps))
    columns = rule_columns(problem, smallest)
    found = {}
    for room in (0, 1 << 30):
        schedule, _ = realize(problem, columns, live_bytes(problem, columns) + (1 << 20) + room)
        assert schedule is not None
        verbs = [entry.verb for entry in schedule.draft.update]
        found[room] = verbs[: verbs.index("update")].count("fetch"), clock(schedule.draft.update, problem.inputs)
    # One trainable has its value and three states on disk.
    assert found[0][0] == 4
    assert found[1 << 30][0] > 4
    assert found[1 << 30][1].seconds < found[0][1].seconds


def test_one_step_alone_reads_no_sum_and_none_is_written_after_its_update() -> None:
    for steps in STEPS:
        planner = ModelPlanner(clipping(tables(2), steps))
        made = planner.plan(planner.minimum().peak_bytes)
        assert made.train is not None
        assert made.update is not None

        def count(phase: Any, verb: str) -> int:
            return sum(one.verb == verb and getattr(one, "tensor", "").startswith("grad_sum:") for one in phase)

        assert count(made.train.instructions, "fetch") == (0 if steps == 1 else 2)
        assert count(made.train.instructions, "spill") == 2
        assert count(made.update.instructions, "fetch") == 2
        assert count(made.update.instructions, "spill") == 0


@pytest.fixture(scope="module", params=STEPS)
def away(request: pytest.FixtureRequest) -> Plan:
    """A plan at the smallest budget."""
    planner = ModelPlanner(clipping(tables(2), request.param))
    return planner.plan(planner.minimum().peak_bytes)


@pytest.fixture(scope="module")
def kept() -> Plan:
    return ModelPlanner(clipping(tables(2))).plan(1 << 40)


def without(verb: str, name: str, count: int = 1) -> Any:
    """An edit that leaves out the instructions of this verb and name."""

    def edit(instructions: list[list[Any]]) -> None:
        left = [one for one in instructions if one[:2] != [verb, name]]
        assert len(instructions) - len(left) == count
        instructions[:] = left

    return edit


def twice(verb: str, name: str) -> Any:
    def edit(instructions: list[list[Any]]) -> None:
        at = next(index for index, one in enumerate(instructions) if one[:2] == [verb, name])
        instructions.insert(at, instructions[at])

    return edit


def at_start(*one: Any) -> Any:
    return lambda instructions: instructions.insert(0, list(one))


TABLE = "table[1.0]"
ADDED = f"grad_sum:{TABLE}"


def test_what_is_no_clipped_step_is_rejected(kept: Plan) -> None:
    simulate(kept)
    at = kept.resident[ADDED]
    rejected(changed(kept, without("accumulate", TABLE)), "sum-once")
    rejected(changed(kept, twice("accumulate", TABLE)), "sum-once")
    rejected(changed(kept, at_start("accumulate", TABLE, at), "update"), "sum-once")
    rejected(changed(kept, at_start("accumulate", TABLE, at), "evaluate"), "sum-once")
    rejected(changed(kept, without("update", TABLE), "update"), "update-once")
    rejected(changed(kept, twice("update", TABLE), "update"), "update-once")
    # An update before the norm is known, at the end of the backward.
    found = rejected(changed(kept, lambda told: told.append(["update", TABLE])), "update-once")
    assert "before the norm of all gradients is known" in str(found)
    rejected(changed(kept, at_start("update", TABLE), "evaluate"), "update-once")
    rejected(changed(kept, at_start("run", "first", 0, [0]), "update"), "operator-order")
    rejected(kept.model_copy(update={"update": None}), "update-once")
    rejected(kept.model_copy(update={"optimizer": adamw()}), "update-once")
    rejected(kept.model_copy(update={"budget_bytes": kept.peak_bytes - 1}), "budget")


def test_a_gradient_that_is_not_complete_is_not_added(kept: Plan) -> None:
    def early(instructions: list[list[Any]]) -> None:
        at = next(index for index, one in enumerate(instructions) if one[:2] == ["accumulate", TABLE])
        added = instructions.pop(at)
        makes = max(i for i, one in enumerate(instructions[:at]) if one[0] == "run")
        instructions.insert(makes, added)

    rejected(changed(kept, early), "use-before-resident")


def test_sums_and_states_that_are_lost_are_rejected(away: Plan) -> None:
    simulate(away)
    rejected(changed(away, without("spill", ADDED)), "lost-state")
    for name in (TABLE, f"adam_m:{TABLE}", f"adam_v:{TABLE}"):
        rejected(changed(away, without("spill", name), "update"), "lost-state")
    for name in (TABLE, f"adam_m:{TABLE}", f"adam_v:{TABLE}", ADDED):
        rejected(changed(away, without("fetch", name), "update"), "use-before-resident")
        with pytest.raises(InvalidSchedule) as caught:
            simulate(changed(away, without("free", name), "update"))
        assert caught.value.invariant in {"leak", "overlap"}
    if away.accumulate > 1:
        rejected(changed(away, without("fetch", ADDED)), "use-before-resident")


def test_a_sum_lies_where_it_is_said_to(kept: Plan) -> None:
    def elsewhere(instructions: list[list[Any]]) -> None:
        next(one for one in instructions if one[:2] == ["accumulate", TABLE])[2] += 64

    rejected(changed(kept, elsewhere), "sum-once")


def test_seconds_are_those_of_sums_and_of_an_update_of_their_own(kept: Plan) -> None:
    assert kept.train is not None
    assert kept.update is not None
    trained = [tensor for tensor in kept.tensors if tensor.kind == "trainable"]
    adding = sum(accumulate_seconds(tensor, kept.optimizer) for tensor in trained)
    operators = {(layer.name, n): op for layer in kept.layers for program in kept.programs
                 if program.name == layer.program for n, op in enumerate(program.operators)}  # fmt: skip
    ran = sum(operators[one.layer, one.operator].seconds for one in kept.train.instructions if one.verb == "run")
    assert kept.train.seconds == pytest.approx(ran + adding)
    assert kept.update.seconds == pytest.approx(sum(clipped_seconds(tensor, kept.optimizer) for tensor in trained))


def test_times_that_were_not_measured_follow_from_the_bytes_that_are_touched() -> None:
    """An update by AdamW makes seven passes over a tensor, and with four steps to an update 3 + 10 / 4 per step."""
    tensor = Tensor(name="t", kind="trainable", shape=[1], dtype="float32", bytes=4, update_seconds=7.0)
    assert accumulate_seconds(tensor, adamw()) == pytest.approx(2 + 2)
    assert clipped_seconds(tensor, adamw()) == pytest.approx(9)
    shared = tensor.model_copy(update={"update_seconds": 5.5})
    assert accumulate_seconds(shared, adamw(4)) == pytest.approx(3 + 2 / 4)
    assert clipped_seconds(shared, adamw(4)) == pytest.approx(9)
    measured = tensor.model_copy(update={"accumulate_seconds": 0.25, "clipped_seconds": 0.5})
    assert (accumulate_seconds(measured, adamw(4)), clipped_seconds(measured, adamw(4))) == (0.25, 0.5)


def test_exact_rules_clip_too_and_others_are_refused_by_name() -> None:
    profile = decoder_like(4, tokens=64, hidden=96, ffn=192, slices=3)
    for policy in POLICIES:
        made = plan(profile, 1 << 40, policy=policy, max_grad_norm=0.5)
        assert made.max_grad_norm == 0.5
        simulate(made)
    for policy in ("mezo", "lcsb"):
        with pytest.raises(
            InputError, match=rf"max_grad_norm 0.5 needs the gradients of all.*which {policy} never has"
        ):
            plan(profile, 1 << 40, policy=policy, max_grad_norm=0.5)
    assert {"mezo", "lcsb", "mobillm"} <= refused_of(clipped(profile, 0.5)).keys()
    with pytest.raises(InputError, match=r"max_grad_norm 0.5 needs .* which mobillm never has"):
        plan(profile, 1 << 40, policy="mobillm", max_grad_norm=0.5)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.inf, math.nan, True])
def test_a_limit_that_is_none_is_refused(limit: float) -> None:
    with pytest.raises(InputError, match=rf"max_grad_norm {limit!r}: it should be "):
        plan(tables(1), 1 << 40, max_grad_norm=limit)


@pytest.mark.parametrize("limit", [0.0, math.inf, "1", True])
def test_a_plan_with_another_limit_in_its_file_is_refused(limit: Any) -> None:
    with pytest.raises(ValidationError, match="max_grad_norm is"):
        sample_plan(optimizer={"name": "adamw", "state_tensors": 3, "max_grad_norm": limit})
    with pytest.raises(ValidationError, match=r"state_tensors is 2; with accumulate 1 and max_grad_norm 1.0 it is 3"):
        sample_plan(optimizer={"name": "adamw", "state_tensors": 2, "max_grad_norm": 1.0})


def test_members_of_fleets_and_bare_graphs_are_refused() -> None:
    member = tables(1).model_copy(update={"optimizer": {"name": EXCHANGE, "state_tensors": 0}})
    with pytest.raises(InputError, match="a member of a fleet does not know the gradients of the others"):
        plan(member, 1 << 40, max_grad_norm=1.0)
    model = tables(1).model.model_copy(update={"kind": "graph"})
    with pytest.raises(InputError, match="a bare graph has no gradients by name"):
        plan(tables(1).model_copy(update={"model": model}), 1 << 40, max_grad_norm=1.0)


def test_a_plan_says_what_clipping_takes(away: Plan, kept: Plan) -> None:
    told = next(sentence for sentence in explain(away) if "clipped" in sentence)
    assert told.startswith("gradients are clipped to a norm of 1: their sums take 4.0 MiB, 4.0 MiB of them on disk;")
    assert ("shared by 3 steps" in told) == (away.accumulate == 3)
    assert "of them on disk" not in next(sentence for sentence in explain(kept) if "clipped" in sentence)
    found = account(away).clipping
    assert found is not None
    assert found.sum_bytes == found.sum_bytes_on_disk == 2 * SLICE
    assert found.seconds == pytest.approx(found.adding_seconds + found.update_seconds / away.accumulate)
    assert (found.read_bytes, found.write_bytes) == (2 * 4 * SLICE, 2 * 3 * SLICE)
    summary = plan_summary(away)
    assert summary["max_grad_norm"] == 1.0
    assert summary["update"]["peak_bytes"] <= away.peak_bytes
    assert plan_summary(plan(tables(1), 1 << 40))["update"] is None
    assert account(plan(tables(1), 1 << 40)).clipping is None


def test_the_update_may_set_the_peak(away: Plan) -> None:
    assert away.update is not None
    peak = account(away).peak
    assert peak is not None
    assert peak.phase == "update"
    assert any("set in the update by" in sentence for sentence in explain(away))
