"""Trainables whose values may lie on disk: the layer model beside the layer's schedule, both bounds beside schedules
that were carried out, what plans do at small and large budgets, and schedules that lose values.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from decisions import bounds_of_schedules, figures_of_decisions
from synthetic import SLICE, WIDE, device, tables
from tiny_plans import CONFIG, decoder_profile

from tightfit.planner.instructions import Fetch, Spill
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.report.explain import explain
from tightfit.planner.schedule.lowering import draft
from tightfit.planner.simulation.simulate import InvalidSchedule, simulate
from tightfit.planner.solve.policies import keep_all, rule_columns, smallest


@pytest.mark.parametrize("in_layer", [1, 2, 5])
def test_the_layer_model_says_what_the_layers_schedule_does(in_layer: int) -> None:
    rng = random.Random(in_layer)
    modes = set()
    for kind in layered(tables(2, in_layer=in_layer)).types:
        for decision, told, counted in figures_of_decisions(rng, kind, 12):
            modes |= {mode for _, mode in decision.weights}
            assert told == pytest.approx(counted, rel=1e-6, abs=1e-5)
    assert len(modes) == 3


def test_windows_add_up_and_no_schedule_is_faster_than_its_bounds() -> None:
    assert len(bounds_of_schedules(random.Random(0), tables(4, in_layer=2), 5)) >= 4


def held(plan) -> int:
    """How many values stay in memory between steps."""
    return sum(name.startswith("table[") for name in plan.resident)


@pytest.mark.slow
def test_the_smallest_budget_needs_one_slice_and_more_memory_keeps_more() -> None:
    count = 4
    planner = ModelPlanner(tables(count))
    least = planner.minimum().peak_bytes
    # An update has value, gradient and two states of one slice; nothing else of the table is there.
    assert 4 * SLICE < least < 4 * SLICE + 6 * WIDE
    most = planner.plan(1 << 40)
    assert held(most) == count
    assert most.train is not None
    assert not any(isinstance(one, Fetch | Spill) for one in most.train.instructions)
    plans = [planner.plan(least + part * (most.peak_bytes - least) // 4) for part in range(5)]
    for plan in plans:
        simulate(plan)
        assert plan.bound_seconds <= plan.step_seconds
    assert held(plans[0]) == 0
    assert any(0 < held(plan) < count for plan in plans)
    seconds = [plan.step_seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)
    assert plans[-1].status == "optimal"
    # Where values cannot move, all of them are there at any budget.
    assert ModelPlanner(tables(count, movable=False)).minimum().peak_bytes > least + (count - 2) * SLICE


def test_rules_keep_values_and_the_smallest_decision_moves_them() -> None:
    problem = layered(tables(3))
    values = {f"table[{index}.0]" for index in range(3)}
    assert values <= set(draft(problem, rule_columns(problem, keep_all)).resident)
    assert not values & set(draft(problem, rule_columns(problem, smallest)).resident)


@pytest.mark.slow
def test_pairs_lie_on_disk_where_memory_is_small(tmp_path: Path) -> None:
    """Those of layers whose forward runs again in their backward, and which every tile of a text reads."""
    made = decoder_profile(tmp_path, config=CONFIG | {"num_hidden_layers": 4}, batch=1, rank=64, tile=12)
    made = made.model_copy(update={"device": device(per_instruction=20)})
    kind = next(kind for kind in layered(made).types if any(w.trained and w.recomputing for w in kind.weights.values()))
    rng = random.Random(3)
    for _, told, counted in figures_of_decisions(rng, kind, 12):
        assert told.pop("backward_peak") == pytest.approx(counted.pop("backward_peak"), rel=0.02)
        assert told.pop("instructions") <= counted.pop("instructions") + 1e-6
        assert told == pytest.approx(counted, rel=1e-6, abs=1e-5)
    fixed = made.model_copy(update={"tensors": [one.model_copy(update={"movable": False}) for one in made.tensors]})
    planner = ModelPlanner(made)
    least = planner.minimum().peak_bytes
    pairs = {one.name: one.bytes for one in made.tensors if one.kind == "trainable"}
    assert least < ModelPlanner(fixed).minimum().peak_bytes - sum(pairs.values()) / 2
    plan = planner.plan(least)
    simulate(plan)
    assert sum(size for name, size in pairs.items() if plan.decisions[name] == "offloaded") > sum(pairs.values()) / 2
    assert any("values of what is trained" in sentence for sentence in explain(plan))
    kept = planner.plan(1 << 40)
    assert {kept.decisions[name] for name in pairs} == {"kept"}
    assert kept.bound_seconds <= plan.step_seconds


def test_a_plan_says_where_values_are() -> None:
    planner = ModelPlanner(tables())
    plan = planner.plan(planner.minimum().peak_bytes)
    assert plan.decisions["table[0.0]"] == "offloaded"
    assert any(
        "values of what is trained: 5 on disk while no operator reads them (10.0 MiB)" in s for s in explain(plan)
    )
    kept = planner.plan(1 << 40)
    assert kept.decisions["table[0.0]"] == "kept"
    assert not any("values of what is trained" in sentence for sentence in explain(kept))


def test_values_that_were_updated_are_not_thrown_away() -> None:
    planner = ModelPlanner(tables())
    plan = planner.plan(planner.minimum().peak_bytes)
    assert plan.train is not None
    without = [one for one in plan.train.instructions if one != Spill("table[2.0]")]
    assert len(without) == len(plan.train.instructions) - 1
    changed = plan.model_copy(update={"train": plan.train.model_copy(update={"instructions": without})})
    with pytest.raises(InvalidSchedule) as caught:
        simulate(changed)
    assert (caught.value.invariant, caught.value.tensor) == ("lost-state", "table[2.0]")
