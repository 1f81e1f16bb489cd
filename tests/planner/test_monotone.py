"""More memory, bandwidth or speed never makes a step slower."""

from __future__ import annotations

import pytest
from changed_operators import with_operators
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import decoder_like, small_chain

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.planner.simulation.simulate import simulate

SMALL = settings(max_examples=40, derandomize=True)


@pytest.mark.slow
@given(seed=st.integers(0, 1 << 30), layers=st.integers(2, 3), shares=st.lists(st.floats(0, 1), min_size=2, max_size=3))
@settings(max_examples=3, derandomize=True)
def test_chains_of_layers_at_larger_budgets(seed, layers, shares):
    """One planner never gets slower; planners that know nothing of each other contradict no bound."""
    profile = small_chain(seed, layers=layers)
    planner = ModelPlanner(profile)
    smallest = planner.minimum_bytes()
    largest = planner.plan(1 << 45, policy="keep-all").peak_bytes
    made = [planner.plan(int(smallest + share * max(0, largest - smallest))) for share in sorted(shares)]
    seconds = [one.step_seconds for one in made]
    assert seconds == sorted(seconds, reverse=True)
    assert all(one.peak_bytes <= one.budget_bytes for one in made)
    alone = plan(profile, made[-1].budget_bytes)
    for one in made:
        assert alone.bound_seconds <= one.step_seconds * (1 + 1e-9)
        assert alone.any_schedule_bound_seconds <= one.step_seconds * (1 + 1e-9)


@pytest.fixture(scope="module")
def moving():
    """A plan that reads, spills and computes again."""
    planner = ModelPlanner(decoder_like(2, tokens=128, hidden=96, ffn=192, slices=2))
    return planner.plan(int(planner.plan(1 << 40, policy="mebp").peak_bytes * 1.05))


@given(
    reads=st.floats(1, 100),
    writes=st.floats(1, 100),
    waits=st.floats(0, 1),
    speed=st.floats(1, 100),
    room=st.integers(0, 1 << 40),
)
@SMALL
def test_a_plan_on_a_better_device_is_never_slower(moving, reads, writes, waits, speed, room):
    assert moving.train.read_bytes
    device = moving.device
    better = {}
    for name, factor in (("read", reads), ("write", writes)):
        channel = getattr(device, name)
        better[name] = channel.model_copy(
            update={
                "bytes_per_second": channel.bytes_per_second * factor,
                "latency_seconds": channel.latency_seconds * waits,
            }
        )
    told = with_operators(moving, lambda one: {"seconds": one.seconds / speed}).model_copy(
        update={
            "device": device.model_copy(update=better),
            "budget_bytes": moving.budget_bytes + room,
        }
    )
    assert simulate(told).step_seconds <= moving.step_seconds * (1 + 1e-9)
