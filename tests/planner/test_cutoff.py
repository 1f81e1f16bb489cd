"""A clock that is slow, jumps or stands still cuts a search, and changes nothing else: plans whose search ends by itself
are the same to the byte, and more time never gives a slower plan.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
from layered_graph import layered
from synthetic import REAL, decoder_like, device, small_chain
from ticking import Stopping, Ticking

from tightfit.planner import plan_result
from tightfit.planner.cutoff import LONGEST, NEVER, Cutoff
from tightfit.planner.graphs.graph_planner import GraphPlanner
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan_result import until_known
from tightfit.profiles.graph_input import graph_profile

MIB = 1 << 20


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def decoder(request):
    """(profile of a small decoder, budgets from the smallest on)"""
    return _decoder(request.param)


@cache
def _decoder(layers):
    profile = decoder_like(layers, tokens=128, slices=3, on=device(**REAL))
    planner = ModelPlanner(profile)
    least = planner.minimum_bytes(time_limit=60)
    return profile, [int(times * least) for times in (1.0, 1.05, 1.3)]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow), "graph"])
def searched(request):
    """(makes a planner of a profile; budgets that fit)"""
    if request.param != "graph":
        profile, budgets = _decoder(request.param)
        return partial(ModelPlanner, profile), budgets[1:]
    profile = graph_profile(layered(30, seed=1, training=True))
    keep_all = GraphPlanner(profile).keep_all_bytes
    return partial(GraphPlanner, profile), [int(share * keep_all) for share in (0.6, 0.8)]


def test_a_cutoff_counts_down_and_strikes_once_and_for_all():
    now = [10.0]
    cutoff = Cutoff(5.0, lambda: now[0])
    assert (cutoff.elapsed, cutoff.over, cutoff.left()) == (0.0, False, 5.0)
    cutoff.check()
    now[0] = 15.0
    assert (cutoff.elapsed, cutoff.over) == (5.0, True)
    for ended in (cutoff.left, cutoff.check):
        with pytest.raises(TimeoutError):
            ended()
    assert NEVER.left() == LONGEST
    assert not NEVER.over


@pytest.mark.parametrize(
    "clock", [lambda: Ticking(1e-6), lambda: Ticking(0.01, 10.0), Stopping], ids=["slow", "jumping", "stopping"]
)
def test_a_plan_whose_search_ends_by_itself_does_not_depend_on_the_clock(searched, clock):
    planner, budgets = searched
    for budget in budgets:
        usual = planner().plan(budget, time_limit=3600)
        other = planner(now=clock()).plan(budget, time_limit=LONGEST)
        assert usual.deterministic
        assert other.deterministic
        assert other.fingerprint == usual.fingerprint


@pytest.mark.parametrize("tick", [0.05, 0.3])
def test_more_time_never_gives_a_slower_plan_and_no_limit_is_passed(searched, tick):
    """Every limit by a planner of its own."""
    planner, budgets = searched
    cut = False
    for budget in budgets:
        seconds, ended = [], []
        for limit in (1, 2, 4, 8, 16, 32, 64):
            made = planner(now=Ticking(tick)).plan(budget, time_limit=limit)
            assert made.fits
            assert made.peak_bytes <= budget
            assert made.solve_seconds <= 1.1 * limit + 2
            assert made.bound_seconds <= made.step_seconds
            seconds.append(made.step_seconds)
            ended.append(bool(made.deterministic))
        assert seconds == sorted(seconds, reverse=True)
        assert ended == sorted(ended)
        cut |= not ended[0]
    assert cut


@pytest.mark.parametrize("seed", range(6))
def test_nothing_that_fits_is_called_infeasible_however_early_it_is_cut(seed):
    profile = small_chain(seed, on=device(**REAL))
    least = ModelPlanner(profile).minimum_bytes(time_limit=60)
    for tick in (1e-3, 0.1, 1.0, 10.0):
        made = ModelPlanner(profile, now=Ticking(tick)).plan(least, time_limit=1)
        assert made.fits or (made.status == "unknown" and made.minimum_bound_bytes <= least)
        assert made.fits or made.ended_by == "time limit"
        below = ModelPlanner(profile, now=Ticking(tick)).plan(108 * MIB - 1, time_limit=1)
        assert below.status == "infeasible"


def test_a_search_with_neither_a_plan_nor_a_proof_goes_on_where_no_limit_is_given(decoder, monkeypatch, tmp_path):
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    profile, least = decoder[0], int(1.002 * decoder[1][0])
    short = ModelPlanner(profile, now=Ticking(5.0)).plan(least, time_limit=1)
    assert (short.status, short.ended_by) == ("unknown", "time limit")
    monkeypatch.setattr(plan_result, "TIME_LIMIT", 1.0)
    told = []
    made = ModelPlanner(profile, now=Ticking(5.0)).plan(least, time_limit=None, progress=told.append)
    assert made.fits
    assert sum("going on" in state["stage"] for state in told) >= 1
    assert made.peak_bytes <= least


def test_what_is_known_is_not_searched_for_again(monkeypatch):
    profile = small_chain(3, on=device(**REAL))
    fits, asked = ModelPlanner(profile).plan(1 << 40), []
    assert until_known(lambda limit: asked.append(limit) or fits) is fits
    none = ModelPlanner(profile).plan(1)
    assert until_known(lambda limit: asked.append(limit) or none) is none
    assert asked == [plan_result.TIME_LIMIT] * 2
