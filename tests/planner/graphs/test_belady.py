"""Schedules in one sweep: what they hold, and that large graphs with simple schedules have plans."""

from __future__ import annotations

import pytest
from bare_graphs import graph_of
from brute_graph import random_graph

from tightfit.planner.graphs.graph_planner import GraphPlanner
from tightfit.planner.graphs.problem.dag import dag_of
from tightfit.planner.graphs.problem.schedule import peak_bytes, pruned
from tightfit.planner.graphs.search.belady import FEW, belady_schedule

MEGABYTE = 1_000_000


def pairs(count, *, source=False):
    """Outputs that are all made first and each read once, in the same order; made from nothing, or from one small
    source.
    """
    first = [{"name": "x", "seconds": 0, "output_bytes": 10, "recomputable": False}] if source else []
    inputs = ["x"] if source else []
    made = [{"name": f"a{i}", "seconds": 1e-3, "output_bytes": MEGABYTE, "inputs": inputs} for i in range(count)]
    read = [{"name": f"b{i}", "seconds": 1e-3, "output_bytes": 1, "inputs": [f"a{i}"]} for i in range(count)]
    return [*first, *made, *read]


def chain(count):
    forward = [
        {"name": f"f{i}", "seconds": 1, "output_bytes": 1, "inputs": [f"f{i - 1}"] if i else []} for i in range(count)
    ]
    backward = [
        {
            "name": f"b{i}",
            "seconds": 1,
            "output_bytes": 1,
            "inputs": [f"f{i}", *([f"b{i + 1}"] if i < count - 1 else [])],
        }
        for i in reversed(range(count))
    ]
    return [*forward, *backward]


@pytest.mark.parametrize("source", [False, True])
def test_a_sweep_fills_the_budget_and_makes_again_what_has_no_room(source):
    dag = dag_of(graph_of(pairs(300, source=source)))
    for held in (1, 2, 30, 299):
        reruns = belady_schedule(dag, held * MEGABYTE + 11)
        assert peak_bytes(dag, reruns) <= held * MEGABYTE + 11
        # One output more is there when the first is read.
        assert len(reruns) in {300 - held, 301 - held}
    assert belady_schedule(dag, 301 * MEGABYTE) == frozenset()


def test_a_sweep_runs_no_chain_from_its_start():
    dag = dag_of(graph_of(chain(1000)))
    reruns = belady_schedule(dag, dag.floor_bytes)
    assert reruns
    assert {i for _, i in reruns} <= set(range(FEW))


def test_sweeps_of_any_graph_are_schedules_without_needless_runs():
    for seed in range(200):
        dag = dag_of(graph_of(random_graph(5000 + seed, most=12)))
        most = peak_bytes(dag, ())
        for budget in range(dag.floor_bytes, most, max(1, (most - dag.floor_bytes) // 5)):
            reruns = belady_schedule(dag, budget)
            assert reruns == pruned(dag, reruns)
            assert all(dag.recomputable[i] for _, i in reruns)
            assert peak_bytes(dag, reruns) >= dag.floor_bytes


@pytest.mark.slow
def test_large_graphs_of_simple_schedules_have_plans():
    planner = GraphPlanner(graph_of(pairs(2000)))
    made = planner.plan(40 * MEGABYTE, time_limit=5)
    assert made.status in {"feasible", "optimal"}
    assert made.peak_bytes <= 40 * MEGABYTE
    # At least 1,960 outputs have no room until they are read; that is 5.960 seconds, and everything made again 6.
    assert 5.960 - 1e-6 < made.step_seconds < 6.0
    assert planner.minimum_bytes(time_limit=5) == planner.floor_bytes == MEGABYTE + 1
