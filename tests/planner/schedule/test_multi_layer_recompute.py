"""Runs of layers that go forward twice: what they hold and take, and the rule that is one."""

from __future__ import annotations

import itertools

import pytest
from synthetic import deep, device, small_chain

from tightfit.planner.cutoff import NEVER
from tightfit.planner.formulation.any_schedule_bound import AnyScheduleBound
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan_result import rebudgeted
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.report.explain import explain
from tightfit.planner.report.explanation import account
from tightfit.planner.schedule.multi_layer_recompute import (
    entering,
    equal_segments,
    repeatable,
    rerun_layers,
    sqrt_segments,
)
from tightfit.planner.schedule.realize import CyclePart, realize
from tightfit.planner.solve.model_search import SearchResult
from tightfit.planner.solve.policies import checkpoint_layers, keep_all, mebp, mesp, rule_columns


def with_random_operator(profile, program):
    """The profile with the first operator of a program not to be run again."""
    programs = [
        one.model_copy(
            update={"operators": [one.operators[0].model_copy(update={"recomputable": False}), *one.operators[1:]]}
        )
        if one.name == program
        else one
        for one in profile.programs
    ]
    return profile.model_copy(update={"programs": programs})


def test_equal_segments_leave_out_the_layers_whose_backward_follows_at_once():
    problem = layered(deep(9))
    assert repeatable(problem) == ((0, 9),)  # stem and nine layers, not the head
    assert equal_segments(problem, 3) == ((1, 3), (4, 6))
    assert equal_segments(problem, 4) == ((0, 1), (2, 5))
    assert sqrt_segments(problem) == equal_segments(problem, 3)
    assert equal_segments(problem, 1) == ()


def test_layers_with_random_operators_run_once():
    problem = layered(with_random_operator(deep(4), "stem"))
    assert repeatable(problem) == ((1, 4),)
    assert repeatable(layered(with_random_operator(deep(4), "block"))) == ((0, 0),)


def test_what_a_segment_needs_from_before_it():
    problem = layered(deep(4))
    # The rotary table is nobody's: many layers' backwards read it.
    assert entering(problem, (2, 3)) == {"cos": -1, "h1": 2}
    assert entering(problem, (0, 2)) == {}


def test_a_second_pass_makes_nothing_for_nobody():
    """Under checkpoint-layers only what makes the next layer's input runs twice before the backward's own reruns."""
    problem = layered(deep(5))
    columns = rule_columns(problem, mebp)
    plain, twice = (CyclePart(problem=problem, columns=columns, segments=s).draft().train for s in ((), ((1, 3),)))
    layers = [step.seconds for step in problem.forward_steps[1]]
    reads = [sum(entry.verb == "read" for entry in entries) for entries in (plain, twice)]
    runs = [sum(entry.seconds for entry in entries if entry.verb == "run") for entries in (plain, twice)]
    assert runs[1] - runs[0] == pytest.approx(2 * sum(layers))  # layers 1 and 2; layer 3 is made again by itself
    assert reads[1] - reads[0] == 2 * 7


@pytest.mark.parametrize("seed", range(4))
def test_any_chain_under_any_segments_passes_the_simulator(seed):
    """Every rule's columns under every segmentation of a chain of random layers."""
    profile = small_chain(seed, layers=5)
    planner = ModelPlanner(profile)
    problem = planner.problem
    most = repeatable(problem)
    assert most == ((0, 3),)
    for segments in (((0, 1),), ((1, 2),), ((0, 1), (2, 3)), ((0, 3),), ((1, 3),)):
        for rule in (keep_all, checkpoint_layers, mesp):
            schedule, excess = realize(problem, rule_columns(problem, rule), 1 << 40, segments=segments)
            assert schedule is not None
            assert excess <= 0
            told = SearchResult(schedule=schedule, bound_seconds=0.0)
            made = planner._finish(1 << 40, "solver", told, NEVER)
            assert made.step_seconds == pytest.approx(schedule.seconds)
            again = [f"l{layer}" for low, high in segments for layer in range(low, high + 1)]
            assert rerun_layers(made) == again


def test_a_step_that_runs_layers_twice_is_held_against_the_bound_for_any_schedule():
    """And its report says which layers go forward twice."""
    planner = ModelPlanner(deep(9, on=device()))
    made = planner.plan(1 << 40, policy="checkpoint-sqrt")
    assert made.any_schedule_bound_seconds == made.bound_seconds <= made.step_seconds
    # A bound of the class, however high, says nothing of it.
    assert rebudgeted(made, bound_seconds=made.step_seconds).gap == made.gap
    told = account(made)
    recomputed = sum(
        made.decisions.get(name) == "recomputed" for name in [*(f"h{index}" for index in range(10)), "cos"]
    )
    assert told.recomputation.layer_inputs == recomputed > 0
    assert told.recomputation.layers_twice == len(rerun_layers(made))
    assert any("go forward twice" in line for line in explain(made))


def test_sqrt_holds_less_than_keep_all_and_runs_less_than_twice():
    planner = ModelPlanner(deep(9, on=device()))
    plain, sqrt = (planner.plan(1 << 40, policy=policy) for policy in ("keep-all", "checkpoint-sqrt"))
    assert sqrt.peak_bytes < plain.peak_bytes
    forward = sum(step.seconds for step in planner.problem.graph.steps if step.phase == "forward")
    assert 0 < sqrt.train.recompute_seconds < forward
    assert sqrt.step_seconds == pytest.approx(plain.step_seconds + sqrt.train.recompute_seconds)
    assert rerun_layers(sqrt) == [f"layer{index}" for index in range(6)]
    recomputed = {name for name, decision in sqrt.decisions.items() if decision == "recomputed"}
    assert {"h1", "h2", "h4", "h5"} <= recomputed
    assert not {"h0", "h3", "h6", "cos"} & recomputed


@pytest.mark.slow
def test_brute_force_finds_no_segment_schedule_below_the_any_schedule_bound():
    """Every combination of a rule's column per layer and every segmentation of a small chain, simulated."""
    for seed in range(4):
        problem = layered(small_chain(seed, layers=4, on=device(read=1e12, write=1e12, latency=0.0, per_byte=2e-8)))
        by_layer = list(zip(*(rule_columns(problem, rule) for rule in (keep_all, checkpoint_layers, mesp))))
        found = []
        for columns in itertools.product(*by_layer):
            for segments in (((0, 1),), ((1, 2),), ((0, 2),)):
                schedule, _ = realize(problem, columns, 1 << 40, segments=segments)
                found.append((schedule.peak_bytes, schedule.seconds))
        for budget in sorted({peak for peak, _ in found})[::4]:
            fastest = min(seconds for peak, seconds in found if peak <= budget)
            assert AnyScheduleBound(problem).step_seconds(budget) <= fastest * (1 + 1e-9)
