"""The planner's optimum against every decision tried one by one, and the layer model against the layer's own
schedule.
"""

from __future__ import annotations

import random

import pytest
from brute_force import Chain
from decisions import INSTANT, figures_of_decisions, random_decision
from synthetic import decoder_like, device, small_chain
from tiny_plans import CONFIG, decoder_profile

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan_result import ROUNDING
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.problem.layer_figures import KIB
from tightfit.planner.schedule.column_bytes import live_bytes
from tightfit.planner.schedule.layer_schedule import measure
from tightfit.planner.schedule.lowering import draft, live_profile, tensor_decisions
from tightfit.planner.search_options import SearchOptions

SEEDS = [4, 12, 13, 20, 23, 25, 30, 40, 41, 60, 62, 65, 72, 76, 77, 79, 91, 95]
"""chains with at most some thousand combinations"""


@pytest.fixture(scope="module", params=SEEDS)
def tried(request):
    """A small chain, its planner and every (peak, seconds) that its class allows."""
    profile = small_chain(request.param, on=device(**INSTANT))
    chain = Chain(profile)
    assert chain.count() < 8000
    return ModelPlanner(profile), list(chain.all())


def test_the_minimum_budget_is_the_smallest_of_all_and_one_byte_less_has_no_plan(tried):
    planner, everything = tried
    smallest = min(peak for peak, _ in everything)
    assert planner.minimum().peak_bytes == smallest
    assert planner.plan(smallest).peak_bytes == smallest
    short = planner.plan(smallest - 1)
    assert not short.fits
    assert short.minimum_bound_bytes <= short.minimum_budget_bytes == smallest
    # What is proven of bytes holds for all schedules.
    assert short.status == ("infeasible" if short.minimum_bound_bytes == smallest else "unknown")


def test_one_byte_less_than_the_smallest_budget_is_mostly_proven_to_be_too_little():
    statuses = []
    for seed in SEEDS:
        planner = ModelPlanner(small_chain(seed, on=device(**INSTANT)))
        statuses.append(planner.plan(planner.minimum().peak_bytes - 1).status)
    assert statuses.count("infeasible") > 0.8 * len(statuses), statuses


def test_the_optimum_is_the_best_of_all(tried):
    planner, everything = tried
    peaks = sorted({peak for peak, _ in everything})
    for budget in (peaks[0], peaks[len(peaks) // 4], peaks[len(peaks) // 2], peaks[-1]):
        best = min(seconds for peak, seconds in everything if peak <= budget)
        plan = planner.plan(budget)
        # Both bounds hold for every decision there is ...
        assert plan.any_schedule_bound_seconds <= best * (1 + 1e-9)
        assert plan.bound_seconds <= best * (1 + 1e-9)
        # ... the class bound is met by the best, and the plan is the best unless the arena keeps it from its place.
        assert plan.bound_seconds == pytest.approx(best, rel=2e-4)
        assert plan.step_seconds >= best * (1 - 1e-9)
        if plan.status == "optimal":
            assert plan.step_seconds == pytest.approx(best, rel=ROUNDING)


@pytest.mark.parametrize("seed", [13, 23])
def test_the_bound_of_columns_is_near_the_best_of_all_and_never_above(seed):
    """As larger models are planned: from columns, without one program for all layers."""
    profile = small_chain(seed, on=device(**INSTANT))
    everything = list(Chain(profile).all())
    planner = ModelPlanner(profile, SearchOptions(one_program=False))
    peaks = sorted({peak for peak, _ in everything})
    for budget in (peaks[len(peaks) // 4], peaks[len(peaks) // 2]):
        best = min(seconds for peak, seconds in everything if peak <= budget)
        assert 0.99 * best <= planner.plan(budget).bound_seconds <= best * (1 + 1e-9)


def test_most_small_plans_are_optimal():
    optimal = 0
    for seed in SEEDS:
        planner = ModelPlanner(small_chain(seed, on=device(**INSTANT)))
        optimal += planner.plan(int(planner.minimum().peak_bytes * 1.2)).status == "optimal"
    assert optimal >= 0.9 * len(SEEDS)


@pytest.mark.parametrize(("source", "seed"), [("decoder", 2), ("chain", 0), ("chain", 1), ("chain", 2)])
def test_the_layer_model_says_what_the_layers_schedule_does(source, seed):
    profile = decoder_like(1, tokens=64, hidden=96, ffn=192, slices=3) if source == "decoder" else small_chain(seed)
    rng = random.Random(seed)
    for kind in layered(profile).types:
        for _, told, counted in figures_of_decisions(rng, kind, 6):
            # The model counts what is certain; a rerun's further outputs may cost a free more.
            assert told.pop("instructions") <= counted.pop("instructions") + 1e-6
            assert told == pytest.approx(counted, rel=1e-6, abs=1e-5)


def test_the_layer_model_never_counts_more_in_all():
    """Where it splits a rerun over several events, its backward peak is below that of any schedule; most decisions
    leave no room for it.
    """
    rng, equal, tried = random.Random(0), 0, 0
    for seed in range(12):
        for kind in layered(small_chain(seed)).types:
            for _, told, counted in figures_of_decisions(rng, kind, 8):
                assert sum(told.values()) <= sum(counted.values()) * (1 + 1e-6) + 1e-5
                peaks = ("forward_peak", "backward_peak", "evaluate_peak")
                equal += all(told[name] == pytest.approx(counted[name], rel=1e-6, abs=1e-5) for name in peaks)
                tried += 1
    assert equal > 0.9 * tried


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("source", ["decoder", "chain", "traced"])
def test_windows_add_up_to_the_whole_schedule(source, seed, tmp_path):
    if source == "traced":
        profile = decoder_profile(tmp_path, config=CONFIG)
    elif source == "decoder":
        profile = decoder_like(2, tokens=64, hidden=96, ffn=192, slices=3)
    else:
        profile = small_chain(seed + 2, layers=4)
    problem = layered(profile)
    rng = random.Random(seed)
    by_type = [[measure(kind, random_decision(rng, kind)) for _ in range(2)] for kind in problem.types]
    columns = tuple(rng.choice(by_type[kind]) for kind in problem.layer_type)
    joined = draft(problem, columns)
    live = max(max(live_profile(entries, joined.resident, joined.sizes)) for entries in (joined.train, joined.evaluate))
    assert live == live_bytes(problem, columns)
    assert KIB == 1024


def done_with(name, joined, storages):
    """The decision that a schedule shows: what it reads, unpacks, writes and frees of a tensor."""
    verbs = [entry.verb for entry in joined.train if entry.name == name]
    if name not in storages:
        return "offloaded" if "spill" in verbs else "kept"
    if storages[name].kind == "weight":
        return "streamed" if "read" in verbs else "packed" if "unpack" in verbs else "unpacked"
    if "spill" in verbs:
        return "offloaded"
    return "recomputed" if verbs.count("free") > 1 else "kept"


def test_decisions_are_what_the_schedule_does():
    told = set()
    for seed in range(8):
        rng = random.Random(seed)
        for profile in (decoder_like(2, tokens=64, hidden=96, ffn=192, slices=3), small_chain(seed, layers=4)):
            problem = layered(profile)
            columns = tuple(
                measure(problem.types[kind], random_decision(rng, problem.types[kind])) for kind in problem.layer_type
            )
            joined = draft(problem, columns)
            decisions = tensor_decisions(problem, joined, columns)
            assert decisions == {name: done_with(name, joined, problem.graph.storages) for name in decisions}
            assert {name.removeprefix("packed:") for name in joined.resident} <= set(decisions)
            told |= {(name.startswith("adam_"), decision) for name, decision in decisions.items()}
    sorts = ("kept", "offloaded", "recomputed", "streamed", "packed", "unpacked")
    assert told == {*((False, sort) for sort in sorts), (True, "kept"), (True, "offloaded")}
