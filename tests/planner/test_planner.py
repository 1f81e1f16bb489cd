"""Plans as a user meets them: budgets, policies, bounds, limits of time, and what an infeasible answer says."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
from layered_graph import layered
from synthetic import MIB, REAL, decoder_like, device, small_chain

from tightfit.planner.compare import compare
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import minimum_budget, plan, planner_of
from tightfit.planner.problem.step_graph import step_graph
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.graph_input import graph_profile
from tightfit.runtime.common.errors import InputError


@pytest.fixture(scope="module")
def decoder():
    """Two layers on a device with a floor."""
    return ModelPlanner(decoder_like(2, tokens=256, slices=3, on=device(**REAL)))


@pytest.mark.parametrize("policy", ["keep-all", "checkpoint-sqrt", "mebp"])
def test_fragmentation_is_small(decoder, policy):
    made = decoder.plan(decoder.minimum(policy=policy).peak_bytes, policy=policy)
    assert made.arena_bytes <= 1.02 * simulate(made).live_bytes + 64 * len(made.resident)


@pytest.mark.slow_but_for("keep-all")
@pytest.mark.parametrize("policy", ["keep-all", "checkpoint-sqrt", "mebp"])
def test_policies_are_plans_of_the_same_kind_and_never_faster(decoder, policy):
    made = decoder.plan(1 << 40, policy=policy)
    assert (made.policy, made.status) == (policy, "feasible")
    assert simulate(made).peak_bytes == made.peak_bytes
    same = decoder.plan(made.peak_bytes)
    assert same.step_seconds <= made.step_seconds * (1 + 1e-9)
    assert same.bound_seconds <= made.step_seconds
    smallest = decoder.minimum(policy=policy).peak_bytes
    assert decoder.plan(smallest, policy=policy).peak_bytes == smallest
    short = decoder.plan(smallest - 1, policy=policy)
    assert (short.fits, short.minimum_budget_bytes) == (False, smallest)
    assert (short.resident, short.decisions, short.steps) == ({}, {}, [])


def test_what_the_policies_do(decoder):
    keep_all = decoder.plan(1 << 40, policy="keep-all")
    assert (keep_all.train.recompute_seconds, keep_all.train.read_bytes, keep_all.train.unpack_seconds) == (0, 0, 0)
    checkpoint = decoder.plan(1 << 40, policy="checkpoint-layers")
    forward = sum(o.seconds for o in checkpoint.programs[1].operators if o.phase == "forward")
    # Everything runs again but what only makes the layer's output.
    assert 0.5 * 2 * forward < checkpoint.train.recompute_seconds < 2 * forward
    mebp = decoder.plan(1 << 40, policy="mebp")
    packed = sum(t.packed_bytes for t in mebp.tensors if t.kind == "weight" and t.name.startswith("layer"))
    assert mebp.train.read_bytes >= 2 * packed
    assert mebp.train.recompute_seconds == pytest.approx(checkpoint.train.recompute_seconds)


@pytest.mark.slow
def test_the_same_input_gives_the_same_plan():
    profile = decoder_like(3, tokens=128, slices=2, on=device(**REAL))
    budget = int(plan(profile, 1 << 40, policy="mebp").peak_bytes * 1.02)
    first, second = (plan(profile, budget, time_limit=600) for _ in range(2))
    assert first.deterministic
    assert first.fingerprint == second.fingerprint
    assert first.train == second.train


def test_below_the_floor():
    profile = small_chain(1, on=device(**REAL))
    answer = plan(profile, 100 * MIB)
    assert answer.status == "infeasible"
    assert answer.train is None
    assert answer.minimum_budget_bytes == minimum_budget(profile) >= 108 * MIB
    assert answer.minimum_budget_reason.startswith(f"importing Python and PyTorch alone reaches {108 * MIB} bytes")


@pytest.mark.parametrize(
    ("version", "stubs", "hint"),
    [("2.14.1+cu130", False, True), ("2.14.1+cu130", True, False), ("2.13.0+cpu", False, False), (None, False, False)],
)
def test_below_the_floor_of_a_build_for_cuda(version, stubs, hint):
    on = device(**REAL)
    floor = on.floor.model_copy(update={"cuda_stubs": stubs})
    built = on.model_copy(update={"torch_version": version, "floor": floor})
    answer = plan(small_chain(1, on=built), 100 * MIB)
    assert answer.status == "infeasible"
    assert ("pip install torch --index-url" in answer.minimum_budget_reason) is hint
    assert ("built for CUDA" in answer.minimum_budget_reason) is hint


@pytest.mark.slow
def test_between_floor_and_feasible(decoder):
    answer = decoder.plan(decoder.minimum(time_limit=600).peak_bytes - 1)
    assert not answer.fits
    assert decoder.plan(answer.minimum_bound_bytes - 1).status == "infeasible"
    reason = answer.minimum_budget_reason
    assert "the smallest plan peaks at" in reason
    assert "head: chunk (forward)" in reason or "layer" in reason
    assert decoder.plan(answer.minimum_budget_bytes).peak_bytes <= answer.minimum_budget_bytes


def test_an_unknown_policy():
    with pytest.raises(InputError, match="no policy is called 'greedy'; choose one of solver, keep-all"):
        plan(small_chain(1), 1 << 30, policy="greedy")


def test_a_short_time_limit_still_gives_a_plan():
    planner = ModelPlanner(decoder_like(6, tokens=256, slices=3, on=device(**REAL)))
    simple = planner.plan(1 << 40, policy="mebp")
    budget = int(simple.peak_bytes * 1.2)
    made = planner.plan(budget, time_limit=0.01)
    assert (made.status, made.deterministic) == ("feasible", False)
    assert made.peak_bytes <= budget
    assert made.step_seconds <= simple.step_seconds * (1 + 1e-6)
    assert made.gap == pytest.approx(1 - made.bound_seconds / made.step_seconds)


def test_the_time_limit_covers_everything():
    """Whatever the search is at when time is up, it stops: by a clock that goes 10 ms ahead whenever it is read."""
    now = itertools.count(0, 0.01)
    planner = ModelPlanner(decoder_like(4, tokens=256, slices=3, on=device(**REAL)), now=lambda: next(now))
    made = planner.plan(140 * MIB, time_limit=0.4)
    assert made.solve_seconds <= 0.44 + 1e-9
    assert made.status == "feasible"
    assert not made.deterministic


def test_an_interruption_returns_the_best_so_far():
    planner = ModelPlanner(small_chain(7, layers=3))
    budget = int(planner.minimum().peak_bytes * 1.3)
    told = []

    def interrupt(state):
        told.append(state)
        raise KeyboardInterrupt

    made = planner.plan(budget, progress=interrupt)
    assert made.peak_bytes <= budget
    assert set(told[0]) == {"stage", "incumbent", "bound", "gap", "seconds"}
    assert told[0]["stage"] == "carried out"


def test_the_graph():
    profile = decoder_like(2, tokens=64, hidden=96, ffn=192, slices=2)
    flat = step_graph(profile)
    assert [step.index for step in flat.steps] == list(range(len(flat.steps)))
    assert [flat.layers[step.layer] for step in flat.steps if step.target == "attention_backward"] == [
        "layer1",
        "layer0",
    ]
    assert flat.storages["layer0/mid"].layer == 1


def test_profiles_that_contradict_themselves():
    profile = small_chain(2)
    layers = [profile.layers[0].model_copy(update={"program": "gone"}), *profile.layers[1:]]
    with pytest.raises(InputError, match="layer l0 names the program 'gone'"):
        plan(profile.model_copy(update={"layers": layers}), 1 << 30)
    with pytest.raises(InputError, match="before any operator makes it"):
        plan(profile.model_copy(update={"layers": list(reversed(profile.layers))}), 1 << 30)


def test_the_package_itself_imports_nothing():
    code = "import sys, planner; print([m for m in ('ortools', 'pydantic', 'networkx', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow
def test_the_cost_grows_with_layer_types_not_with_layers():
    """Few programs are priced however many equal layers there are, and the plan is near its bound."""
    programs = []
    for layers in (6, 24):
        planner = ModelPlanner(decoder_like(layers, tokens=256, slices=3, on=device(**REAL)))
        assert len(planner.problem.types) <= 5
        budget = int(planner.plan(1 << 40, policy="mebp").peak_bytes * 1.3)
        made = planner.plan(budget, time_limit=600)
        assert made.deterministic
        assert made.peak_bytes <= budget
        assert made.gap < 0.01
        programs.append(planner.solver.pool.programs)
    assert programs[1] < 2.5 * programs[0]


@pytest.mark.parametrize("make", [lambda: small_chain(7, layers=3), lambda: graph_profile(layered(8))])
@pytest.mark.parametrize(
    ("budget", "limit", "message"),
    [
        (0, 3, "a budget of 0 bytes is no budget; name a positive size such as 600MiB"),
        (-5, 3, "a budget of -5 bytes"),
        (
            "600MiB",
            3,
            "a budget is an int of bytes, not '600MiB'; `tightfit.parse_size` makes one of '600MiB'",
        ),
        (
            520.5,
            3,
            "a budget is an int of bytes, not 520.5; `tightfit.parse_size` makes one of '600MiB'",
        ),
        (1 << 40, 0, "time_limit 0: it should be greater than 0"),
        (1 << 40, float("inf"), "time_limit inf: it should be a finite number"),
        (1 << 40, float("nan"), "time_limit nan: it should be a finite number"),
        (
            True,
            3,
            "a budget is an int of bytes, not True; `tightfit.parse_size` makes one of '600MiB'",
        ),
    ],
)
def test_budgets_and_limits_that_are_none(make, budget, limit, message):
    for call in (lambda: plan(make(), budget, time_limit=limit), lambda: compare(make(), [budget], time_limit=limit)):
        with pytest.raises(InputError, match=re.escape(message)):
            call()


@pytest.mark.parametrize("make", [lambda: small_chain(7, layers=3), lambda: graph_profile(layered(8))])
def test_budgets_and_limits_may_be_numpy_s(make):
    made = plan(make(), np.int64(1 << 40), time_limit=np.float32(300))
    assert type(made.budget_bytes) is int
    assert made.fingerprint == plan(make(), 1 << 40, time_limit=300).fingerprint
    assert compare(make(), [np.int64(1 << 40)], ["keep-all"], time_limit=np.int64(3)).budgets == [1 << 40]


@pytest.mark.parametrize("make", [lambda: small_chain(7, layers=3), lambda: graph_profile(layered(8))])
@pytest.mark.parametrize("limit", [0, -1, float("inf"), "3"])
def test_limits_of_smallest_budgets_and_bounds_that_are_none(make, limit):
    planner = planner_of(make())
    for call in (planner.minimum_bytes, planner.smallest_plan, lambda **limits: planner.bound(1 << 40, **limits)):
        with pytest.raises(InputError, match=re.escape(f"time_limit {limit!r}: it should be")):
            call(time_limit=limit)
