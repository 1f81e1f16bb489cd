"""The planner of bare graphs against brute force, closed forms and its own promises."""

from __future__ import annotations

import random
from math import comb

import numpy as np
import pytest
from bare_graphs import graph_of
from broken_plans import listed
from brute_graph import INFINITY, best, least, random_graph
from layered_graph import layered

from tightfit.planner.cutoff import Cutoff
from tightfit.planner.graphs.bounds.bound import FIRST, ClassBound, _shortest
from tightfit.planner.graphs.bounds.cut_generation import bytes_over, violated
from tightfit.planner.graphs.bounds.lp_bound import Fractions, Path, solve_lp
from tightfit.planner.graphs.bounds.milp_bound import solve_milp
from tightfit.planner.graphs.graph_planner import GraphPlanner
from tightfit.planner.graphs.problem.dag import dag_of
from tightfit.planner.graphs.problem.live_bytes import LiveBytes
from tightfit.planner.graphs.problem.schedule import memory, peak_bytes, runs, seconds
from tightfit.planner.graphs.search import eviction_search
from tightfit.planner.graphs.search.eviction_search import EvictionSearch
from tightfit.planner.plan import plan
from tightfit.profiles.graph_input import graph_profile
from tightfit.runtime.common.errors import InputError


def check_small_graph(seed):
    """The class's optimum and minimum are met exactly, no schedule beats the bounds, more memory is never slower."""
    operators, fixed = random_graph(seed), seed % 3
    profile = graph_of(operators, fixed)
    dag = dag_of(profile)
    planner = GraphPlanner(profile)
    low, top = least(operators, "stages", fixed), peak_bytes(dag, ())
    if low > 1:
        short = planner.plan(low - 1)
        assert (short.status, short.minimum_budget_bytes) == ("infeasible", low), seed
    before = INFINITY
    for budget in sorted({least(operators, "any", fixed), low, (low + top) // 2, top} - {0}):
        freest = best(operators, budget, "any", fixed)
        assert planner.any_bound(budget, seconds=60) <= freest * (1 + 1e-9), (seed, budget)
        if budget < low:
            continue
        made = planner.plan(budget)
        assert made.peak_bytes <= budget
        assert made.status == "optimal"
        assert made.step_seconds == pytest.approx(best(operators, budget, "stages", fixed), abs=1e-9), (seed, budget)
        assert made.any_schedule_bound_seconds <= freest * (1 + 1e-9)
        assert made.step_seconds <= before
        before = made.step_seconds


def test_small_graphs_against_brute_force():
    """Tens of thousands more: `make bench-proof`."""
    for seed in range(300, 450):
        check_small_graph(seed)


def test_the_smallest_budget_where_sizes_are_near_their_limit():
    """CP-SAT's presolve once called it infeasible."""
    half = 1 << 49
    operators = [
        {"name": "n0", "seconds": 1.0, "output_bytes": half, "workspace_bytes": 2 * half - 1},
        {
            "name": "n1",
            "seconds": 1e-9,
            "output_bytes": 2 * half,
            "inputs": ["n0"],
            "workspace_bytes": 1,
            "keep_until_end": True,
        },
        {"name": "n2", "seconds": 1e-9, "output_bytes": 2 * half - 1, "inputs": ["n1"], "keep_until_end": True},
        {"name": "n3", "seconds": 1e-9, "output_bytes": 2 * half - 1, "inputs": ["n0", "n2"]},
    ]
    assert GraphPlanner(graph_of(operators)).minimum_bytes() == least(operators, "stages") == 2814749767106558


def test_memory_by_hand():
    """a is kept for the end, which is a run of its own; b is there until e, or runs again for it."""
    operators = [
        {"name": "a", "seconds": 1, "output_bytes": 3, "keep_until_end": True},
        {"name": "b", "seconds": 2, "output_bytes": 5, "workspace_bytes": 7, "inputs": ["a"]},
        {"name": "c", "seconds": 4, "output_bytes": 11, "inputs": ["b"]},
        {"name": "d", "seconds": 8, "output_bytes": 13, "workspace_bytes": 17, "inputs": ["c"]},
        {"name": "e", "seconds": 16, "output_bytes": 19, "inputs": ["b"]},
    ]
    dag = dag_of(graph_of(operators, fixed=100))
    plain = [3, 3 + 5 + 7, 3 + 5 + 11, 3 + 5 + 11 + 13 + 17, 3 + 5 + 19, 3]
    assert memory(dag, runs(dag, ())) == [100 + held for held in plain]
    again = frozenset({(4, 1)})
    assert runs(dag, again) == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 1), (4, 4), (5, 5)]
    spared = [3, 3 + 5 + 7, 3 + 5 + 11, 3 + 11 + 13 + 17, 3 + 5 + 7, 3 + 5 + 19, 3]
    assert memory(dag, runs(dag, again)) == [100 + held for held in spared]
    assert peak_bytes(dag, again) == 100 + 44
    assert (seconds(dag, ()), seconds(dag, again)) == (31, 33)


@pytest.mark.slow
def test_bounds_from_any_moments_hold_for_every_schedule_with_first_runs_in_order():
    reached = []
    for seed in range(120):
        operators = random_graph(1000 + seed)
        dag = dag_of(graph_of(operators))
        low = least(operators, "first")
        rng = random.Random(seed)
        for budget in {low, (low + peak_bytes(dag, ())) // 2}:
            fastest = best(operators, budget, "first")
            pivots = sorted(rng.sample(range(len(dag)), rng.randint(1, len(dag))))
            found = solve_lp(dag, budget, pivots, any_order=False)
            assert found.bound_seconds <= fastest * (1 + 1e-9), (seed, budget, pivots)
            bound = ClassBound(dag, budget, frozenset())
            bound.linear(60, float("inf"))
            bound.whole(60, float("inf"), frozenset())
            found = bound.seconds
            assert found <= fastest * (1 + 1e-9), (seed, budget)
            if fastest > dag.once_seconds:
                reached.append((found - dag.once_seconds) / (fastest - dag.once_seconds))
    # A bound that says nothing would pass all of the above.
    assert sum(reached) / len(reached) > 0.5


def paths_of(dag, pivots):
    """Every path from a moment to a reader."""

    def onward(pivot, reader, operators):
        for i in dag.inputs[operators[-1] if operators else reader]:
            if i < pivot:
                yield Path(pivot=pivot, reader=reader, operators=(*operators, i))
                yield from onward(pivot, reader, (*operators, i))

    return [path for pivot in pivots for reader in range(pivot, len(dag)) for path in onward(pivot, reader, ())]


@pytest.mark.slow
def test_paths_hold_for_every_schedule():
    for seed in range(120):
        operators = random_graph(3000 + seed)
        dag = dag_of(graph_of(operators))
        low = least(operators, "first")
        pivots = range(1, len(dag))
        paths = paths_of(dag, pivots)
        for budget in {low, (low + peak_bytes(dag, ())) // 2}:
            fastest = best(operators, budget, "first")
            for given in ((), paths):
                found = solve_lp(dag, budget, pivots, any_order=False, paths=given)
                assert found.bound_seconds <= fastest * (1 + 1e-9), (seed, budget)
            # In whole numbers they say nothing new.
            plain, told = (solve_milp(dag, budget, pivots, work=60, paths=given) for given in ((), paths))
            assert told.bound_seconds <= fastest * (1 + 1e-9), (seed, budget)
            assert told.bound_seconds == pytest.approx(plain.bound_seconds, rel=1e-6), (seed, budget)


@pytest.mark.slow
def test_programs_in_whole_numbers_hold_for_every_schedule_and_crowded_runs_say_more():
    better = 0
    for seed in range(150):
        operators = random_graph(5000 + seed)
        dag = dag_of(graph_of(operators))
        low = least(operators, "first")
        rng = random.Random(seed)
        crowded = [(stage, i) for stage in range(len(dag)) for i in range(stage + 1)]
        for budget in {low - 1, low, low + 1, (low + peak_bytes(dag, ())) // 2}:
            fastest = best(operators, budget, "first")
            pivots = sorted(rng.sample(range(len(dag)), rng.randint(1, len(dag))))
            bounds = [solve_milp(dag, budget, pivots, work=60, crowded=runs).bound_seconds for runs in ((), crowded)]
            assert bounds[0] <= bounds[1] * (1 + 1e-9) <= fastest * (1 + 3e-9), (seed, budget, pivots)
            better += bounds[1] > bounds[0]
            if bounds[1] < float("inf"):
                # Where only schedules are asked for that are faster than the fastest, no more is said.
                for part in (0.9, 1.1):
                    asked = solve_milp(dag, budget, pivots, work=60, crowded=crowded, most=part * bounds[1])
                    most = max(part * bounds[1], dag.once_seconds)
                    assert asked.bound_seconds == pytest.approx(min(most, bounds[1]), rel=1e-6)
    assert better > 20


def test_bytes_are_counted_one_by_one_however_many_there_are():
    """At the smallest budget of graphs whose outputs are some 1e11 bytes larger, and at one byte less."""
    for seed in range(40):
        large = 10**11 + 7
        operators = [
            op | {"output_bytes": large * op["output_bytes"], "workspace_bytes": large * op.get("workspace_bytes", 0)}
            for op in random_graph(7000 + seed)
        ]
        dag = dag_of(graph_of(operators))
        low = least(operators, "first")
        every = range(len(dag))
        crowded = [(stage, i) for stage in every for i in range(stage + 1)]
        bounds = [solve_milp(dag, low - less, every, work=60, crowded=crowded).bound_seconds for less in (0, 1)]
        assert bounds[0] <= best(operators, low, "first") * (1 + 3e-9), seed
        assert bounds[1] >= bounds[0]
        fits = solve_milp(dag, peak_bytes(dag, ()), every, work=60, crowded=crowded)
        assert fits.bound_seconds == pytest.approx(dag.once_seconds)


@pytest.mark.slow
def test_what_a_program_says_when_its_work_is_done_holds():
    """Against what it says at its end, with answers and without. Limits are looked for: where a program comes to its
    end the next is shorter, and where it has no answers yet longer.
    """
    cut = set()
    for seed in range(2):
        dag = dag_of(graph_profile(layered(40, seed=seed)))
        budget, count = int(0.6 * peak_bytes(dag, ())), len(dag)
        pivots = sorted({(2 * turn + 1) * count // 24 for turn in range(12)})
        crowded = [(stage, i) for stage in range(1, count, 2) for i in range(stage)][::3]
        full = solve_milp(dag, budget, pivots, work=60, crowded=crowded)
        assert full.solved
        for most in (float("inf"), 1.05 * full.bound_seconds, 0.98 * full.bound_seconds):
            shortest, longest = 0.0, 2 * full.work
            for _ in range(8):
                limit = (shortest + longest) / 2
                asked = solve_milp(dag, budget, pivots, work=limit, crowded=crowded, most=most)
                assert asked.bound_seconds <= min(full.bound_seconds, max(most, dag.once_seconds)) * (1 + 3e-9)
                if not asked.solved:
                    cut.add(bool(asked.reruns))
                if asked.solved or asked.reruns:
                    longest = limit
                else:
                    shortest = limit
    assert cut == {False, True}


def test_paths_make_a_linear_program_of_many_moments_better():
    dag = dag_of(graph_profile(layered(60)))
    budget = int(0.6 * peak_bytes(dag, ()))
    pivots, paths, bounds = range(10, len(dag)), [], []
    for _ in range(4):
        found = solve_lp(dag, budget, pivots, any_order=False, paths=paths)
        bounds.append(found.bound_seconds - dag.once_seconds)
        paths += violated(dag, pivots, found.fractions)
    assert bounds == sorted(bounds)
    assert bounds[-1] > 1.1 * bounds[0]


def test_linear_programs_climb_with_the_moments_that_their_answers_leave_out():
    """Their bound is above that of the first moments alone."""
    dag = dag_of(graph_profile(layered(60)))
    budget = int(0.6 * peak_bytes(dag, ()))
    first = solve_lp(dag, budget, _shortest(dag, budget, frozenset(), FIRST), any_order=False)
    climbed = ClassBound(dag, budget, frozenset())
    climbed.linear(60, float("inf"))
    assert climbed.seconds - dag.once_seconds > 1.2 * (first.bound_seconds - dag.once_seconds)


def test_a_bound_goes_on_in_whole_numbers_where_it_had_ended():
    dag = dag_of(graph_profile(layered(40)))
    budget = int(0.6 * peak_bytes(dag, ()))
    bound = ClassBound(dag, budget, frozenset())
    bound.linear(60, float("inf"))
    climbed = bound.seconds
    with pytest.raises(TimeoutError):
        bound.whole(60, float("inf"), frozenset(), Cutoff(0.0))
    assert (bound.seconds, bound.ended) == (climbed, False)
    bound.whole(60, float("inf"), frozenset())
    once = ClassBound(dag, budget, frozenset())
    once.linear(60, float("inf"))
    once.whole(60, float("inf"), frozenset())
    assert bound.seconds == pytest.approx(once.seconds, rel=1e-6)
    assert bound.seconds > climbed * (1 + 1e-3)
    assert min(seconds(dag, start) for start in bound.starts) <= bound.seconds * (1 + 1e-6)


def test_bytes_over_are_those_of_the_schedule_where_nothing_runs_again():
    dag = dag_of(graph_profile(layered(60)))
    budget = 2 * peak_bytes(dag, ())
    opens = [0, 20, 40]
    lives = np.array(
        [[float(i < begin and any(user >= begin for user in dag.users[i])) for begin in opens] for i in range(len(dag))]
    )
    fractions = Fractions(runs=np.zeros_like(lives), lives=lives, moments=np.zeros(2), paths=np.zeros(0))
    over = bytes_over(dag, budget, opens[1:], fractions)
    expected = np.array(memory(dag, runs(dag, ()))) - budget
    expected[opens[1:]] = 0.0
    assert over.tolist() == pytest.approx(expected.tolist())


def test_the_search_alone_comes_near_the_optimum(monkeypatch):
    """As it works on graphs too large for the exact solver; it must fit and may not be far off."""
    monkeypatch.setattr(eviction_search, "ROUNDS", 60)
    excess = []
    for seed in range(150):
        operators = random_graph(2000 + seed)
        dag = dag_of(graph_of(operators))
        low, top = least(operators, "stages"), peak_bytes(dag, ())
        budget = (low + top) // 2
        search = EvictionSearch(dag, budget)
        found = search.fastest([()])
        if found is None:
            excess.append(1.0)
            continue
        reruns = search.improved(found)
        assert peak_bytes(dag, reruns) <= budget
        optimum = best(operators, budget, "stages") - dag.once_seconds
        spent = sum(dag.seconds[i] for _, i in reruns)
        assert spent >= optimum - 1e-9
        excess.append((spent - optimum) / max(1.0, dag.once_seconds))
    assert sum(excess) / len(excess) < 0.02


def unit_chain(steps):
    """Griewank's chain: states of one byte, a backward step needs its state and room to work, nothing else counts."""
    operators = [{"name": "x0", "seconds": 0, "output_bytes": 1, "recomputable": False, "phase": "forward"}]
    for i in range(1, steps):
        operators.append(
            {"name": f"x{i}", "seconds": 1, "output_bytes": 1, "inputs": [f"x{i - 1}"], "phase": "forward"}
        )
    for i in reversed(range(steps)):
        inputs = [f"x{i}", *([f"b{i + 1}"] if i < steps - 1 else [])]
        operators.append(
            {
                "name": f"b{i}",
                "seconds": 0,
                "output_bytes": 0,
                "workspace_bytes": 1,
                "inputs": inputs,
                "phase": "backward",
            }
        )
    return operators


def griewank(steps, slots):
    """Forward steps that reversing `steps` steps takes with `slots` checkpoints, the start included (Griewank 1992)."""
    repeats = 0
    while comb(slots + repeats, slots) < steps:
        repeats += 1
    return repeats * steps - comb(slots + repeats, repeats - 1) if repeats else 0


@pytest.mark.slow_but_for("2", "11")
@pytest.mark.parametrize("steps", [2, 11, 24])
def test_unit_chains_meet_the_closed_form(steps):
    profile = graph_of(unit_chain(steps))
    planner = GraphPlanner(profile)
    for slots in {1, 2, 3, 5, 8, steps}:
        # A slot for each checkpoint, the state at hand, and the one being made from it.
        made = planner.plan(slots + 2, time_limit=2)
        assert made.step_seconds == griewank(steps, slots), slots


def free_chain(steps, *, reads_own):
    """A chain of operators all alike, none of which has to be held: the first one, too, is made from nothing."""
    forward = [
        {"name": f"f{i}", "seconds": 1, "output_bytes": 1, "inputs": [f"f{i - 1}"] if i else [], "phase": "forward"}
        for i in range(steps)
    ]
    backward = []
    for i in reversed(range(steps)):
        state = i if reads_own else i - 1
        inputs = [*([f"f{state}"] if state >= 0 else []), *([f"b{i + 1}"] if i < steps - 1 else [])]
        backward.append({"name": f"b{i}", "seconds": 1, "output_bytes": 1, "inputs": inputs, "phase": "backward"})
    return [*forward, *backward]


@pytest.mark.slow_but_for("False-3", "True-7")
@pytest.mark.parametrize("budget", [3, 4, 5, 7])
@pytest.mark.parametrize("reads_own", [True, False])
def test_a_chain_need_not_hold_its_first_output(reads_own, budget):
    steps = 20
    planner = GraphPlanner(graph_of(free_chain(steps, reads_own=reads_own)))
    # The closed form's start takes no memory here, and its first step makes f0.
    reversed_steps = steps if reads_own else steps - 1
    # The state at hand and the backward's two outputs take three bytes; the rest are slots, and the start is one more.
    again = griewank(reversed_steps, budget - 2) - (reversed_steps - 1)
    assert planner.plan(budget, time_limit=5).step_seconds == 2 * steps + again


def test_memory_kept_up_to_date_is_memory_counted_anew():
    for seed in range(100):
        dag = dag_of(graph_of(random_graph(3000 + seed, most=12)))
        rng = random.Random(seed)
        kept = LiveBytes(dag)
        for _ in range(30):
            stage = rng.randrange(1, len(dag))
            rerun = (stage, rng.randrange(stage))
            (kept.remove if rerun in kept.reruns else kept.add)(*rerun)
            assert kept.bytes.tolist() == memory(dag, runs(dag, kept.reruns)), (seed, rerun)


def test_equal_inputs_give_equal_plans_unless_the_plan_says_otherwise():
    profile = graph_profile(layered(24))
    budget = int(0.8 * peak_bytes(dag_of(profile), ()))
    first, second = (plan(profile, budget, time_limit=60) for _ in range(2))
    assert first.deterministic
    assert first.fingerprint == second.fingerprint


@pytest.mark.slow
def test_the_smallest_budget_of_a_graph_too_large_to_be_exact():
    profile = graph_profile(layered(48, seed=1))
    planner = GraphPlanner(profile)
    # Five seconds of a processor prove more than that the largest operator fits; one that is shared may take longer.
    for limit in (5, 20, 80, 320):
        low = planner.minimum_bytes(time_limit=limit)
        if planner.lowest_bytes > planner.floor_bytes:
            break
    assert planner.floor_bytes < planner.lowest_bytes <= low
    made = planner.plan(low, time_limit=1)
    assert made.fits
    assert made.peak_bytes <= low
    short = planner.plan(planner.lowest_bytes - 1, time_limit=5)
    assert short.status == "infeasible"
    # The search for a plan may have come lower than the search for the smallest budget.
    assert planner.lowest_bytes <= short.minimum_budget_bytes <= low
    assert planner.plan(short.minimum_budget_bytes, time_limit=1).peak_bytes <= short.minimum_budget_bytes
    assert "no schedule with first runs and re-runs in this order" in short.minimum_budget_reason


def test_the_smallest_budget_is_proven_to_the_byte_where_no_exact_schedule_is_asked_for():
    """Programs in parts of the budget take 7 bytes of 3 GB for none."""
    large = 1_000_000_000
    operators = [
        {"name": "n0", "seconds": 0.0, "output_bytes": 7},
        {"name": "n1", "seconds": 1.0, "output_bytes": 7, "inputs": ["n0"], "keep_until_end": True},
        {
            "name": "n2",
            "seconds": 0.0,
            "output_bytes": large,
            "inputs": ["n1"],
            "workspace_bytes": 7,
            "recomputable": False,
        },
        {"name": "n3", "seconds": 0.0, "output_bytes": large, "inputs": ["n1", "n2"]},
        {"name": "n4", "seconds": 1.0, "output_bytes": 0, "inputs": ["n0", "n3"]},
    ]
    others = [{"name": f"z{i}", "seconds": 0.0, "output_bytes": 0, "inputs": ["n2"]} for i in range(20)]
    planner = GraphPlanner(graph_of([*operators, *others], fixed=large))
    assert planner.minimum_bytes() == planner.lowest_bytes == least(operators, "stages", large) == 3_000_000_007


def test_rules_that_need_a_backward_are_refused_without_one():
    profile = graph_profile(layered(30))
    with pytest.raises(InputError, match="'checkpoint-sqrt', which needs operators marked forward and backward"):
        plan(profile, 1 << 40, policy="checkpoint-sqrt")
    with pytest.raises(InputError, match="no policy for this graph is called 'mebp'; choose one of solver, keep-all"):
        plan(profile, 1 << 40, policy="mebp")


def test_what_is_kept_until_the_end_may_be_made_again_at_the_end():
    operators = [
        {"name": "scale", "seconds": 1.0, "output_bytes": 7, "keep_until_end": True},
        {"name": "wide", "seconds": 1.0, "output_bytes": 100, "inputs": ["scale"]},
        {"name": "last", "seconds": 1.0, "output_bytes": 100, "workspace_bytes": 46, "keep_until_end": True},
    ]
    planner = GraphPlanner(graph_of(operators))
    assert planner.minimum_bytes() == least(operators, "any") == 146
    made = planner.plan(146)
    assert made.step_seconds == 4.0
    assert [word[2] for word in listed(made.train) if word[0] == "run"] == [0, 1, 2, 0]
    # A rule makes nothing again that is to be there at the end.
    assert planner.plan(153, policy="keep-all").step_seconds == 3.0


@pytest.mark.parametrize("first", [1.4, 2.6])
def test_an_exact_bound_is_one_whatever_seconds_round_to(first):
    """The fastest schedule's own seconds were told as the bound, though another's rounded to the same parts."""
    operators = [
        {"name": "a", "seconds": first * 1e-9, "output_bytes": 10},
        {"name": "b", "seconds": (4.0 - first) * 1e-9, "output_bytes": 10},
        {"name": "wide", "seconds": 2.0, "output_bytes": 200, "workspace_bytes": 15},
        {"name": "end", "seconds": 0.0, "output_bytes": 1, "inputs": ["a", "b", "wide"]},
    ]
    made = GraphPlanner(graph_of(operators)).plan(225)
    fastest = best(operators, 225, "stages")
    assert 2.0 < made.bound_seconds <= fastest <= made.step_seconds <= fastest + 1e-7
