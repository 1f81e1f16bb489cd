"""What a plan of a graph says of the clock, that small time limits are limits, and what is said of the smallest
budget.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from bare_graphs import graph_of
from brute_graph import least, random_graph
from layered_graph import layered
from ticking import Ticking

from tightfit.planner.cutoff import Cutoff
from tightfit.planner.graphs import incumbents, move_search
from tightfit.planner.graphs.bounds import cp_sat_model
from tightfit.planner.graphs.bounds.bound import AnyBound, ClassBound
from tightfit.planner.graphs.graph_planner import GraphPlanner
from tightfit.planner.graphs.problem.dag import dag_of
from tightfit.planner.graphs.problem.schedule import memory, peak_bytes, runs
from tightfit.planner.graphs.search import exact_moves
from tightfit.planner.graphs.search.chain_dp import as_chain, checkpoints
from tightfit.planner.graphs.search.eviction_search import EvictionSearch
from tightfit.planner.graphs.search.exact_moves import fastest_with_moves
from tightfit.planner.graphs.search.large_neighbourhood import LargeNeighbourhood
from tightfit.planner.graphs.search.subproblem import lowest_peak
from tightfit.planner.search_options import SearchOptions
from tightfit.planner.solvers import lp
from tightfit.profiles.graph_input import BareChannel, graph_profile

QUICK = dict.fromkeys(("read", "write"), BareChannel(bytes_per_second=1e10, latency_seconds=1e-6))


def chain(count, *, training=False):
    """Outputs of one byte; with a backward that reads them from last to first, none."""
    phase = {"phase": "forward"} if training else {}
    operators = [
        {"name": f"x{i}", "seconds": 1, "output_bytes": 1, "inputs": [f"x{i - 1}"] if i else [], **phase}
        for i in range(count)
    ]
    for i in reversed(range(count if training else 0)):
        inputs = [f"x{i}", *([f"b{i + 1}"] if i < count - 1 else [])]
        operators.append({"name": f"b{i}", "seconds": 1, "output_bytes": 1, "inputs": inputs, "phase": "backward"})
    return operators


# --- the clock --- ---------------------------------------------------------------------------------------------------


def past():
    """A cutoff that has struck."""
    cutoff = Cutoff(1.0, Ticking(1.0))
    assert cutoff.over
    return cutoff


def test_every_part_ends_where_the_cutoff_strikes_and_keeps_what_it_has():
    dag = dag_of(graph_profile(layered(40)))
    budget = int(0.7 * peak_bytes(dag, ()))
    any_bound, bound = AnyBound(dag, budget), ClassBound(dag, budget, frozenset())
    with pytest.raises(TimeoutError):
        any_bound.rise(past())
    assert (any_bound.seconds, any_bound.ended) == (dag.once_seconds, False)
    any_bound.rise()
    risen = any_bound.seconds
    with pytest.raises(TimeoutError):
        any_bound.rise(past())
    assert any_bound.seconds == risen
    with pytest.raises(TimeoutError):
        bound.linear(60.0, float("inf"), past())
    assert (bound.seconds, bound.ended) == (dag.once_seconds, False)
    with pytest.raises(TimeoutError):
        lowest_peak(dag, work=60.0, cutoff=past())
    with pytest.raises(TimeoutError):
        list(LargeNeighbourhood(dag, budget, past()).polished(frozenset(), work=60.0))
    search = EvictionSearch(dag, budget, past())
    assert search.fastest([()]) is None
    found = EvictionSearch(dag, budget).fastest([()])
    assert search.improved(found) == found


def test_what_little_work_does_not_reach_has_not_ended():
    dag = dag_of(graph_profile(layered(40)))
    budget = int(0.7 * peak_bytes(dag, ()))
    bound, near = ClassBound(dag, budget, frozenset()), LargeNeighbourhood(dag, budget)
    bound.linear(1e-6, float("inf"))
    assert not bound.ended
    list(near.polished(frozenset(), work=1e-6))
    assert not near.stalled
    assert not lowest_peak(dag, work=1e-6).ended
    assert lowest_peak(dag_of(graph_of(random_graph(1, most=8))), work=60.0).ended


def test_checkpoints_of_a_chain_can_be_cut():
    dag = dag_of(graph_of(chain(12, training=True)))
    found = as_chain(dag)
    assert found is not None
    assert checkpoints(dag, found, 6) is not None
    with pytest.raises(TimeoutError):
        checkpoints(dag, found, 6, past())


class Stopwatch:
    """A clock by which every solver takes all the seconds that it is given, and what lies between two readings 10 µs,
    however busy the machine is; `asked`: the seconds that solvers are given, one by one.
    """

    def __init__(self, monkeypatch):
        self.asked = []
        self.now = 0.0
        solve, solved = lp.solve_silently, cp_sat_model.solved
        monkeypatch.setattr(
            lp,
            "solve_silently",
            lambda model, seconds, *rest: self.spend(seconds, lambda: solve(model, seconds, *rest)),
        )
        monkeypatch.setattr(
            cp_sat_model,
            "solved",
            lambda solver, model: self.spend(solver.parameters.max_time_in_seconds, lambda: solved(solver, model)),
        )

    def __call__(self):
        self.now += 1e-5
        return self.now

    def spend(self, seconds, solve):
        self.asked.append(seconds)
        try:
            return solve()
        finally:
            self.now += seconds


@pytest.mark.parametrize("share", [0.05, 0.8, None], ids=["0.05", "0.8", "smallest"])
def test_solvers_are_given_what_is_left_and_no_more(monkeypatch, share):
    """The seconds that solvers are given in one call, added up."""
    limit, watch = 0.4, Stopwatch(monkeypatch)
    planner = GraphPlanner(graph_profile(layered(60)), now=watch)
    if share is None:
        planner.minimum_bytes(time_limit=limit)
    else:
        planner.plan(int(share * planner.keep_all_bytes), time_limit=limit)
    assert watch.asked
    assert sum(watch.asked) <= limit + 1e-6


@pytest.mark.slow
def test_what_the_exact_solver_had_found_when_it_was_cut_is_used(monkeypatch):
    def unproven(*args, **limits):
        return replace(fastest_with_moves(*args, **limits), proven=False)

    profile = graph_profile(layered(8).model_copy(update=QUICK))
    planner = GraphPlanner(profile)
    budget = (planner.floor_bytes + peak_bytes(planner.dag, ())) // 2
    proven = planner.plan(budget)
    assert proven.status == "optimal"
    monkeypatch.setattr(exact_moves, "fastest_with_moves", unproven)
    monkeypatch.setattr(move_search, "PRICES", ())
    made = GraphPlanner(profile).plan(budget)
    assert made.step_seconds == proven.step_seconds
    assert made.bound_seconds == pytest.approx(proven.bound_seconds)


# --- searched again --- ------------------------------------------------------------------------------------------------


def test_what_was_cut_is_searched_again_under_a_larger_limit():
    """And is then what a planner says that never was cut; under no larger one, what is known is said again."""
    profile = graph_profile(layered(24))
    dag = dag_of(profile)
    budget = int(0.75 * peak_bytes(dag, ()))
    planner, fresh = GraphPlanner(profile), GraphPlanner(profile)
    assert not planner.plan(budget, time_limit=1e-4).deterministic
    made, other = planner.plan(budget, time_limit=120), fresh.plan(budget, time_limit=120)
    assert made.deterministic
    assert made.fingerprint == other.fingerprint
    planner = GraphPlanner(profile)
    cut = planner.minimum_bytes(time_limit=1e-4)
    assert not planner.smallest_plan(time_limit=1e-4).deterministic
    whole = planner.smallest_plan(time_limit=120)
    assert whole.deterministic
    assert whole.budget_bytes == planner.minimum_bytes(time_limit=1e-4) == fresh.minimum_bytes(time_limit=120) < cut


def test_a_bound_that_was_cut_is_raised_further_by_a_later_call():
    planner = GraphPlanner(graph_profile(layered(40, training=True)))
    budget = int(0.6 * planner.keep_all_bytes)
    cut = planner.any_bound(budget, seconds=1e-6)
    whole = planner.any_bound(budget, seconds=60.0)
    assert planner.any_bound(budget, seconds=1e-6) == whole > cut == planner.dag.once_seconds


# --- the smallest budget -------------------------------------------------------------------------------------------


def test_what_is_said_of_the_smallest_budget_is_said_of_what_it_holds_for():
    met = set()
    for seed in range(60):
        operators, fixed = random_graph(seed), seed % 3
        planner = GraphPlanner(graph_of(operators, fixed))
        low = least(operators, "stages", fixed)
        if low <= 1:
            continue
        anywhere = low <= planner.floor_bytes
        met.add(anywhere)
        said = planner.plan(low - 1).minimum_budget_reason
        order = "" if anywhere else " with first runs and re-runs in this order"
        assert f"(no schedule{order} has a lower peak)" in said, seed
    assert met == {True, False}


def test_re_runs_out_of_order_may_come_lower_and_nothing_is_said_of_them():
    """Between o4 and o5 first o3 runs again and then o0: o0 o1 o2 -o0 o3 -o3 o4 o3 -o1 -o2 o0 o5 peaks at 10."""
    sizes, inputs = [2, 3, 2, 5, 1, 1], [[], [], [0, 1], [1, 2], [1, 2], [0, 3]]
    operators = [
        {"name": f"o{i}", "seconds": 1, "output_bytes": size, "inputs": [f"o{j}" for j in read]}
        for i, (size, read) in enumerate(zip(sizes, inputs, strict=True))
    ]
    assert least(operators, "first") == 10 < least(operators, "stages") == 11
    made = GraphPlanner(graph_of(operators)).plan(10)
    assert (made.status, made.minimum_budget_bytes) == ("infeasible", 11)
    assert "(no schedule with first runs and re-runs in this order has a lower peak)" in made.minimum_budget_reason


def test_a_rule_says_nothing_of_other_schedules():
    planner = GraphPlanner(graph_of(chain(12, training=True)))
    made = planner.plan(planner.floor_bytes, policy="keep-all")
    assert made.status == "infeasible"
    assert "(no lower peak under this rule)" in made.minimum_budget_reason


def test_a_proven_peak_is_one_that_sizes_add_up_to():
    """The solver's tolerances would leave the bound a little below what is found."""
    unit = 1 << 24
    operators = [
        op | {"output_bytes": unit * op["output_bytes"], "workspace_bytes": unit * op.get("workspace_bytes", 0)}
        for op in random_graph(6007, most=8)
    ]
    dag = dag_of(graph_of(operators))
    assert lowest_peak(dag, work=60).bytes == least(random_graph(6007, most=8), "stages") * unit


# --- polishing -----------------------------------------------------------------------------------------------------


def test_of_two_peaks_of_one_height_each_may_be_lowered_alone():
    """Two equal parts, each with an output that lies through the two runs of its peak and may be made again after
    them.
    """

    def part(name, start):
        names = [f"{name}{i}" for i in range(6)]
        sizes = [4, 1, 6, 1, 1, 1]
        inputs = [[start] if start else [], [names[0]], [names[1]], [names[2]], [names[3]], [names[4], names[0]]]
        return [
            {"name": n, "seconds": 1, "output_bytes": size, "inputs": read}
            for n, size, read in zip(names, sizes, inputs, strict=True)
        ]

    dag = dag_of(graph_of([*part("a", None), *part("b", "a5")]))
    top = peak_bytes(dag, ())
    held = memory(dag, runs(dag, ()))
    assert held.count(top) == 4
    once = frozenset({(5, 0)})
    both = frozenset({(5, 0), (11, 6)})
    near = LargeNeighbourhood(dag, peak_bytes(dag, both))
    assert near.budget < top == peak_bytes(dag, once)
    assert near._worth(both) < near._worth(once) < near._worth(frozenset())


def test_the_lowest_peak_is_looked_for_before_a_budget_is_given_up(monkeypatch):
    """What one call names as the smallest budget, no other calls too small."""
    asked = []

    def spied(dag, **limits):
        asked.append(limits["work"])
        return lowest_peak(dag, **limits)

    monkeypatch.setattr(incumbents, "lowest_peak", spied)
    monkeypatch.setattr(EvictionSearch, "fastest", lambda self, seeds, work=0.0: None)
    profile, options = graph_profile(layered(22, seed=3)), SearchOptions(exact=False)
    least = GraphPlanner(profile, options).minimum_bytes(time_limit=60)
    assert least < GraphPlanner(profile, options).keep_all_bytes
    asked.clear()
    made = GraphPlanner(profile, options).plan(least, time_limit=60)
    assert made.peak_bytes == least
    assert asked
    # Once it came to its end, it is known.
    planner = GraphPlanner(profile, options)
    assert planner.minimum_bytes(time_limit=60) == least
    asked.clear()
    assert planner.plan(least - 1, time_limit=60).minimum_budget_bytes == least
    assert planner.plan(least, time_limit=60).peak_bytes == least
    assert not asked
