"""How near the best a plan is said to be, what ends a search, and that no plan is slower than a fixed rule that
fits.
"""

from __future__ import annotations

import pytest
from layered_graph import layered
from synthetic import decoder_like, device, small_chain

from tightfit.planner.compare import compare
from tightfit.planner.graphs.graph_planner import GraphPlanner
from tightfit.planner.graphs.problem.dag import dag_of
from tightfit.planner.graphs.problem.schedule import peak_bytes, seconds
from tightfit.planner.graphs.search.subproblem import Subproblem
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan_result import EXACT, ROUNDING, ended_by
from tightfit.planner.solve.model_search import Solver
from tightfit.planner.solve.policies import POLICIES, rule_columns
from tightfit.profiles.graph_input import graph_profile
from tightfit.runtime.common.errors import InputError

REAL = {"read": 1e9, "write": 5e8, "latency": 1e-4}


def test_optimal_is_what_nothing_undercuts_and_a_gap_ends_the_search_before():
    """Too large to be solved exactly at once, and small enough that the optimum is known all the same."""
    profile = graph_profile(layered(22, seed=1))
    dag = dag_of(profile)
    budget = int(0.75 * peak_bytes(dag, ()))
    everywhere = [(stage, i) for stage in range(len(dag)) for i in range(stage)]
    known = Subproblem(dag, budget, frozenset(), 0, len(dag), everywhere).solve(60)
    assert known.ended
    best = seconds(dag, known.reruns)
    made = GraphPlanner(profile).plan(budget, time_limit=60)
    assert (made.status, made.ended_by) == ("optimal", "proof")
    assert made.gap <= EXACT
    assert made.step_seconds == pytest.approx(best, rel=2 * EXACT)
    near = GraphPlanner(profile).plan(budget, time_limit=60, gap=0.2)
    assert near.gap <= 0.2
    assert near.bound_seconds <= best * (1 + 1e-9)
    if near.gap > EXACT:
        assert (near.status, near.ended_by) == ("feasible", "gap")


@pytest.mark.parametrize(
    ("kind", "gap", "told", "expected"),
    [
        ("graph", EXACT, {}, "proof"),
        ("graph", 9e-4, {}, "stalled"),
        ("graph", 9e-4, {"asked": 1e-3}, "gap"),
        ("graph", 9e-4, {"asked": 8e-4}, "stalled"),
        ("graph", 9e-4, {"deterministic": False}, "time limit"),
        ("graph", 9e-4, {"deterministic": False, "stalled": True}, "stalled"),
        ("graph", 9e-4, {"deterministic": False, "interrupted": True}, "interrupt"),
        ("decoder", ROUNDING, {"deterministic": False}, "proof"),
        ("decoder", 1e-3, {}, "stalled"),
    ],
)
def test_what_ended_a_search(kind, gap, told, expected):
    assert ended_by(kind, gap, **{"asked": 0.0, "deterministic": True} | told) == expected


@pytest.mark.parametrize("seed", [4, 12])
def test_a_small_model_is_proven_to_rounding_though_moves_have_a_price(seed):
    """With the price of moves in it the bound of its program would be a ten-thousandth too low."""
    planner = ModelPlanner(small_chain(seed, on=device(read=1e12, write=1e12, latency=0.0, per_byte=2e-8)))
    made = planner.plan(int(planner.minimum().peak_bytes * 1.2))
    assert made.train.read_bytes
    assert (made.status, made.ended_by) == ("optimal", "proof")
    assert made.gap <= ROUNDING


@pytest.mark.parametrize("gap", [-0.1, 1, float("nan"), True, "1%"])
def test_a_gap_that_is_none_is_refused(gap):
    profile = small_chain(0)
    for planner in (ModelPlanner(profile), GraphPlanner(graph_profile(layered(8)))):
        with pytest.raises(InputError, match=r"^gap .*: it should be "):
            planner.plan(1 << 40, gap=gap)
    with pytest.raises(InputError, match=r"^gap "):
        compare(profile, [1 << 40], ["solver"], gap=gap)


@pytest.mark.slow
def test_a_model_s_search_ends_at_the_gap_that_is_asked_for():
    profile = decoder_like(2, tokens=64, hidden=96, ffn=192, slices=3, on=device(**REAL))
    budget = int(ModelPlanner(profile).solver.smallest.peak_bytes * 1.3)
    far, near = ModelPlanner(profile).plan(budget, gap=0.3), ModelPlanner(profile).plan(budget)
    assert far.gap <= 0.3
    assert (far.status, far.ended_by) == ("feasible", "gap")
    assert near.gap <= far.gap
    assert compare(profile, [budget], ["solver"], gap=0.3).plans[0].step_seconds == far.step_seconds


def test_a_search_that_finds_nothing_good_gives_at_least_the_best_rule(monkeypatch):
    """All that it has found is the slowest rule."""
    profile = decoder_like(4, tokens=256, slices=3, on=device(**REAL))
    rules = {policy: ModelPlanner(profile).plan(1 << 40, policy=policy) for policy in POLICIES}
    budget = rules["checkpoint-layers"].peak_bytes
    fitting = [made.step_seconds for made in rules.values() if made.peak_bytes <= budget]
    assert min(fitting) < rules["mesp"].step_seconds

    def poor(self, under_way):
        under_way.try_columns(rule_columns(self.problem, POLICIES["mesp"]))

    monkeypatch.setattr(Solver, "_at_once", lambda *_: None)
    monkeypatch.setattr(Solver, "_in_the_class", poor)
    made = ModelPlanner(profile).plan(budget)
    assert made.step_seconds <= min(fitting)
    assert made.deterministic


@pytest.mark.parametrize("limit", [1e-3, 0.2])
def test_a_graph_s_search_gives_at_least_the_best_rule(limit):
    profile = graph_profile(layered(60, training=True))
    budget = GraphPlanner(profile).plan(1 << 50, policy="checkpoint-layers").peak_bytes
    planner = GraphPlanner(profile)
    made = planner.plan(budget, time_limit=limit)
    rules = [planner.plan(budget, policy=policy) for policy in planner.policies()]
    assert made.step_seconds <= min(rule.step_seconds for rule in rules if rule.fits)


def test_a_search_that_was_cut_says_so_in_a_comparison():
    profile = graph_profile(layered(40, training=True))
    budget = int(0.7 * GraphPlanner(profile).keep_all_bytes)
    made = compare(profile, [budget], ["solver"], time_limit=1e-3).plans[0]
    assert (made.deterministic, made.ended_by) == (False, "time limit")
