"""Stretches of schedules solved anew: exact on small graphs against brute force, and of use where eviction finds
nothing.
"""

from __future__ import annotations

import random

import pytest
from bare_graphs import graph_of
from brute_graph import best, least, random_graph
from layered_graph import layered

from tightfit.planner.graphs.problem.dag import dag_of
from tightfit.planner.graphs.problem.schedule import peak_bytes, pruned, seconds
from tightfit.planner.graphs.search.eviction_search import EvictionSearch
from tightfit.planner.graphs.search.large_neighbourhood import LargeNeighbourhood, chains
from tightfit.planner.graphs.search.subproblem import Subproblem, lowest_peak
from tightfit.profiles.graph_input import graph_profile


def dag_from(operators, fixed):
    return dag_of(graph_of(operators, fixed))


def everywhere(dag, first, last):
    return [(stage, i) for stage in range(first, last) for i in range(stage) if dag.recomputable[i]]


def small_graphs(start, count):
    for seed in range(start, start + count):
        operators, fixed = random_graph(seed), seed % 3
        dag = dag_from(operators, fixed)
        low = least(operators, "stages", fixed)
        for budget in {low, (low + peak_bytes(dag, ())) // 2} - {0}:
            yield seed, operators, fixed, dag, budget


def test_a_stretch_over_everything_is_the_whole_class():
    """From keep-all, which mostly is over the budget, to the optimum; where that is keep-all, nothing is better."""
    for seed, operators, fixed, dag, budget in small_graphs(4000, 120):
        solved = Subproblem(dag, budget, frozenset(), 0, len(dag), everywhere(dag, 0, len(dag))).solve(60)
        reruns = solved.reruns or frozenset()
        assert solved.ended, seed
        assert peak_bytes(dag, reruns) <= budget, seed
        assert seconds(dag, reruns) == pytest.approx(best(operators, budget, "stages", fixed), abs=1e-9), seed


def test_any_stretch_of_a_schedule_that_fits_still_fits_and_is_not_slower():
    gained = 0
    for seed, operators, fixed, dag, budget in small_graphs(5000, 150):
        rng = random.Random(seed)
        current = pruned(dag, [place for place in everywhere(dag, 0, len(dag)) if rng.random() < 0.4])
        if peak_bytes(dag, current) > budget:
            continue
        optimum = best(operators, budget, "stages", fixed)
        for _ in range(4):
            first = rng.randrange(len(dag))
            last = rng.randrange(first, len(dag)) + 1
            places = [place for place in everywhere(dag, first, last) if rng.random() < 0.8]
            solved = Subproblem(dag, budget, current, first, last, places).solve(60)
            if solved.reruns is None:
                continue
            assert peak_bytes(dag, solved.reruns) <= budget, (seed, first, last)
            assert optimum - 1e-9 <= seconds(dag, solved.reruns) < seconds(dag, current), (seed, first, last)
            current = solved.reruns
            gained += 1
    assert gained > 50


def test_no_schedule_of_the_class_has_a_lower_peak_than_is_proven():
    above = 0
    for seed in range(6000, 6300):
        operators, fixed = random_graph(seed), seed % 3
        dag = dag_from(operators, fixed)
        proven = lowest_peak(dag, work=60).bytes
        assert proven <= least(operators, "stages", fixed), seed
        above += proven > fixed + max(dag.own_bytes(i) for i in range(len(dag)))
    # What the largest operator needs by itself is a bound as well, and says nothing of the others.
    assert above > 10


def test_stretches_fit_and_speed_up_what_eviction_leaves():
    dag = dag_of(graph_profile(layered(60)))
    top = peak_bytes(dag, ())
    budget = int(0.7 * top)
    evicted = EvictionSearch(dag, budget).fastest([()])
    assert evicted is not None
    near = LargeNeighbourhood(dag, budget)
    enough = 0.995 * seconds(dag, evicted)
    *_, found = near.polished(evicted, 600, enough)
    assert peak_bytes(dag, found) <= budget
    assert seconds(dag, found) <= enough


def test_chains_name_what_is_read_and_what_that_is_made_from():
    operators = [
        {"name": f"x{i}", "seconds": 1, "output_bytes": 4, "inputs": [f"x{i - 1}"] if i else []} for i in range(6)
    ]
    operators[5]["inputs"] = ["x1", "x4"]
    dag = dag_from(operators, 0)
    assert chains(dag, 8, 1, 10) == {(5, 1)}
    assert chains(dag, 8, 2, 10) == {(5, 1), (5, 0)}
    assert chains(dag, 8, 2, 1) == set()
