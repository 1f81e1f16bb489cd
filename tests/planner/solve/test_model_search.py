"""The search at a budget: what it keeps when time or the user ends it, what it proves of which plans, what it uses
again.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import REAL, decoder_like, deep, device, small_chain

from tightfit.planner.compare import compare
from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan_result import rebudgeted
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.schedule.realize import realize
from tightfit.planner.solve.column_generation import ColumnGeneration
from tightfit.planner.solve.model_budget_search import BudgetSearch
from tightfit.planner.solve.model_search import SearchResult, Solver
from tightfit.planner.solve.policies import POLICIES, all_streamed, keep_all, mebp, rule_columns
from tightfit.planner.solve.pricing import ColumnPool, TooLargeError
from tightfit.planner.solvers import lp
from tightfit.planner.solvers.lp import GrowingProgram, Linear, LinearProgram, Solution
from tightfit.runtime.common.gc_pause import paused_collector


@pytest.fixture(scope="module")
def chain():
    """(planner of a small chain, budget between its smallest and what keeps everything)"""
    planner = ModelPlanner(small_chain(12, layers=3))
    return planner, int(planner.minimum().peak_bytes * 1.2)


@pytest.fixture(scope="module")
def decoder():
    return ModelPlanner(decoder_like(4, tokens=256, slices=3, on=device(**REAL)))


def attempt_of(planner, budget, **changes):
    figures = {"limit": planner.solver.room(budget), "cutoff": Cutoff(60)} | changes
    return BudgetSearch(problem=planner.problem, **figures)


def of_rule(planner, policy="mebp"):
    """A rule carried out where there is room for anything."""
    schedule, _ = realize(planner.problem, rule_columns(planner.problem, POLICIES[policy]), 1 << 40)
    return schedule


# --- limits --------------------------------------------------------------------------------------------------------


def test_a_budget_below_what_is_fixed_has_no_bound_and_no_columns():
    planner = ModelPlanner(small_chain(1, on=device(**REAL)))
    assert planner.solver.room(1) < 0
    assert planner.bound(1) is None
    search = ColumnGeneration(relaxation=planner.solver.relaxed, limit_bytes=-1, cutoff=NEVER)
    every = [list(range(len(planner.solver.pool.columns[kind]))) for kind in planner.problem.layer_type]
    assert search._whole(-1, every) is None
    assert planner.solver.solve(1, Cutoff(5), None).schedule is None


@pytest.mark.parametrize("infeasible", [True, False])
def test_no_columns_and_no_proof_that_none_fit(chain, monkeypatch, infeasible):
    """Only a proof says that a budget is too small; the solver's silence does not."""
    told = Solution(values=None, duals=None, objective=math.inf, bound=0.0, optimal=False, infeasible=infeasible)
    monkeypatch.setattr(LinearProgram, "solve", lambda *_: told)
    planner, budget = chain
    if infeasible:
        assert planner.bound(budget) is None
    else:
        with pytest.raises(TimeoutError):
            planner.bound(budget)


@pytest.mark.slow
def test_a_search_that_cannot_fill_in_still_chooses(decoder, monkeypatch):
    budget = int(decoder.plan(1 << 45, policy="mebp").peak_bytes * 1.3)
    limit = decoder.solver.room(budget)
    search = ColumnGeneration(relaxation=decoder.solver.relaxed, limit_bytes=limit, cutoff=Cutoff(60))
    search.columns()
    asked = []

    def large(*_):
        asked.append(1)
        raise TooLargeError

    monkeypatch.setattr(search, "_fitted", lambda *_: None)
    monkeypatch.setattr(ColumnPool, "cheapest_within", lambda *_: None)
    monkeypatch.setattr(ColumnPool, "fill", large)
    assert search.choose(limit) is not None
    assert asked == [1]


@pytest.mark.slow
def test_layers_whose_programs_are_too_large_are_searched_without(monkeypatch):
    """A plan near the one that programs find, and a bound that does not claim more."""
    profile = decoder_like(4, tokens=256, slices=3, on=device(**REAL))
    with_programs = ModelPlanner(profile)
    least = with_programs.minimum().peak_bytes
    for budget in (int(1.1 * least), int(1.4 * least)):
        best = with_programs.plan(budget)
        without = ModelPlanner(profile)
        with monkeypatch.context() as patched:
            patched.setattr("tightfit.planner.solve.pricing.MOST_PAIRS", 0)
            plan = without.plan(budget)
        assert plan.peak_bytes <= budget
        assert best.bound_seconds <= plan.step_seconds <= 1.05 * best.step_seconds
        assert plan.bound_seconds <= best.step_seconds


def test_a_solver_that_cannot_be_made_is_done_without(monkeypatch):
    growing = GrowingProgram()
    variable = growing.variable()
    growing.at_least(Linear().add(variable), 3.0)

    def broken(*_):
        raise RuntimeError

    monkeypatch.setattr(lp.mathopt, "IncrementalSolver", broken)
    assert growing.solve(Linear().add(variable)).objective == pytest.approx(3.0)


def test_a_second_opinion_gets_what_time_is_left(monkeypatch):
    growing = GrowingProgram()
    variable = growing.variable()
    granted = []
    now = itertools.count(0, 1.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    monkeypatch.setattr(lp.mathopt, "IncrementalSolver", lambda *_: {}.canonical)
    monkeypatch.setattr(LinearProgram, "solve", lambda _self, _goal, seconds, *_: granted.append(seconds))
    growing.solve(Linear().add(variable), 9.0)
    assert granted == [9.0 - 3.0]


def test_a_warm_start_that_wanders_is_broken_off(monkeypatch):
    """The optimum is the same; the program starts from nothing instead."""
    growing = GrowingProgram()
    pairs = [(growing.variable(), growing.variable()) for _ in range(40)]
    cheap, dear = Linear(), Linear()
    for one, two in pairs:
        growing.at_least(Linear().add(one).add(two), 1.0)
        cheap.add(one, 1.0).add(two, 2.0)
        dear.add(one, 4.0).add(two, 3.0)
    assert growing.solve(cheap).objective == pytest.approx(40.0)
    begun = growing._solver
    # From one optimum to the other every pair changes.
    assert growing.solve(dear).objective == pytest.approx(120.0)
    assert growing._solver is not begun
    monkeypatch.setattr(lp, "WARM_ITERATIONS", 2.0)
    begun = growing._solver
    assert growing.solve(cheap).objective == pytest.approx(40.0)
    assert growing._solver is begun


def test_the_clock_raises_in_whatever_it_cuts(chain):
    planner, _ = chain
    columns = rule_columns(planner.problem, POLICIES["mebp"])
    late = attempt_of(planner, 1 << 40, cutoff=Cutoff(-1.0))
    for stage in (
        lambda: late.try_columns(columns),
        lambda: planner.solver._by_rules(late, 0.0),
        lambda: planner.solver._in_the_class(late),
    ):
        with pytest.raises(TimeoutError):
            stage()
    assert not late.schedules
    # The first schedule is not cut: there is a plan wherever columns that are known at once fit.
    planner.solver._at_once(late)
    assert late.best.peak_bytes <= 1 << 40


@pytest.mark.parametrize("ends_at", range(3))
def test_a_stage_that_is_cut_leaves_what_the_stages_before_it_found(chain, monkeypatch, ends_at):
    """And what it found itself."""
    planner, budget = chain
    stages = ("_at_once", "_in_the_class", "_by_rules")
    best = of_rule(planner)

    def stage(number):
        def run(self, attempt, *_, most=None):
            if most is None:
                attempt.schedules.append(replace(best, seconds=10.0 - number, peak_bytes=1))
                if number == ends_at:
                    raise TimeoutError

        return run

    for number, name in enumerate(stages):
        monkeypatch.setattr(Solver, name, stage(number))
    told = Solver(planner.problem).solve(budget, Cutoff(60), None, bound=1.0)
    assert told.schedule.seconds == 10.0 - ends_at
    assert not told.deterministic


@given(
    answers=st.lists(st.sampled_from([None, "a", "b"]), min_size=1, max_size=8),
    waits=st.booleans(),
    places=st.lists(st.booleans(), min_size=1, max_size=5),
    found=st.booleans(),
    limit=st.sampled_from([1, 50, 1 << 30]),
)
@settings(max_examples=300, derandomize=True)
def test_choices_come_to_an_end_whatever_is_chosen(answers, waits, places, found, limit):
    """Columns, the same ones or none, with places or not, for any share that is left free: again and again."""
    asked, carried = [], itertools.cycle(places)

    def choose(room):
        asked.append(room)
        assert len(asked) <= 250
        return answers[len(asked) % len(answers)] if room >= 0 else None

    def carry(columns):
        if not next(carried):
            return None, 7
        schedule = SimpleNamespace(seconds=2.0 + len(asked) % 3, stalls=2.0 if waits else 0.0)
        attempt.schedules.append(schedule)
        return schedule, 0

    attempt = BudgetSearch(problem=None, limit=limit, cutoff=NEVER, bound=1.0)
    attempt.try_columns, attempt._price = carry, lambda search, reserve: None
    if found:
        attempt.schedules.append(SimpleNamespace(seconds=3.0, stalls=0.0))
    search = SimpleNamespace(choose=choose)
    attempt.choose(search)


@pytest.mark.parametrize(
    ("seconds", "carried"),
    [
        ([1.004, 1.0], 1),  # near the bound at once
        ([1.0046, 1.0045, 1.0049, 1.0], 3),  # not quite: as long as it gets faster
        ([1.0046, 1.0046, 1.0], 2),
        ([1.0046, 1.02, 1.0], 2),
        ([1.006, 1.006, 1.003, 1.0], 3),  # farther away: whatever the last one was
    ],
)
def test_what_is_near_the_bound_gets_another_choice_only_while_that_helps(seconds, carried):
    left = iter(seconds)
    attempt = BudgetSearch(problem=None, limit=1 << 30, cutoff=NEVER, bound=1.0)

    def carry(columns):
        schedule = SimpleNamespace(seconds=next(left), stalls=1.0)
        attempt.schedules.append(schedule)
        return schedule, 0

    attempt.try_columns, attempt._price = carry, lambda search, reserve: None
    search = SimpleNamespace(choose=lambda room: room)
    attempt.choose(search)
    assert len(attempt.schedules) == carried
    assert attempt.good_enough()


def test_what_another_choice_found_and_that_time_ended_it_is_kept(monkeypatch):
    attempt = BudgetSearch(problem=None, limit=1 << 30, cutoff=NEVER, bound=1.0)

    def choose(one, search, choices):
        one.schedules.append("found")
        raise TimeoutError

    monkeypatch.setattr(BudgetSearch, "choose", choose)
    with pytest.raises(TimeoutError):
        attempt.choose_anew(None)
    assert attempt.schedules == ["found"]


def test_the_collector_comes_back_after_an_interruption(monkeypatch):
    disable = gc.disable

    def interrupted():
        disable()
        raise KeyboardInterrupt

    monkeypatch.setattr(gc, "disable", interrupted)
    with pytest.raises(KeyboardInterrupt), paused_collector():
        pass
    assert gc.isenabled()


# --- layers that go forward twice ----------------------------------------------------------------------------------


def test_the_bound_of_the_class_keeps_no_rule_from_being_tried_that_runs_layers_twice():
    """A plan at the bound of its class may still be slower than a rule under which layers go forward twice."""
    planner = ModelPlanner(deep(9))
    best = replace(of_rule(planner, "keep-all"), seconds=10.0)
    for any_bound, twice in ((0.0, True), (10.0, False)):
        attempt = attempt_of(planner, 1 << 40, bound=10.0, schedules=[best])
        planner.solver._by_rules(attempt, any_bound)
        assert any(schedule.segments for schedule in attempt.schedules) == twice
        assert len(attempt.schedules) == 1 + twice


def test_a_plan_is_held_against_the_highest_bound_that_holds_for_it(chain):
    once = of_rule(chain[0])
    twice = replace(once, segments=((0, 1),))
    for schedule, proven in ((once, 2.0), (twice, 1.0)):
        assert SearchResult(schedule=schedule, bound_seconds=2.0, any_bound_seconds=1.0).proven_seconds == proven
    assert SearchResult(schedule=once, bound_seconds=0.0, any_bound_seconds=1.0).proven_seconds == 1.0


@pytest.mark.slow
def test_fixed_rules_are_held_against_the_bound_of_their_class(monkeypatch):
    """Though the solver's own plan, under which layers go forward twice, is held against one for any schedule."""
    profile = deep(4)
    planner = ModelPlanner(profile)
    budget = planner.plan(1 << 40, policy="mebp").peak_bytes
    told = planner.plan(budget, time_limit=600)
    assert told.deterministic
    weak = told.any_schedule_bound_seconds
    proven = planner.solver.proven[budget]
    assert weak < proven
    monkeypatch.setattr("tightfit.planner.compare.planner_of", lambda _: planner)
    # As of a plan under which layers go forward twice.
    plan = planner.plan

    def weakly(budget, *, policy=None, time_limit=30.0, gap=0.0, progress=None):
        made = plan(budget, policy=policy, time_limit=time_limit)
        return made if policy else made.model_copy(update={"bound_seconds": weak})

    monkeypatch.setattr(planner, "plan", weakly)
    both = compare(profile, [budget], ["solver", "mebp"], time_limit=600)
    assert both.plan(budget, "solver").bound_seconds == weak
    assert both.plan(budget, "mebp").bound_seconds == proven


# --- from budget to budget -----------------------------------------------------------------------------------------


def test_the_status_follows_the_bound(chain):
    planner, _ = chain
    made = planner.plan(1 << 40)
    assert made.status == "optimal"
    loose = rebudgeted(made, bound_seconds=made.step_seconds / 2, any_bound=made.step_seconds / 2)
    assert (loose.status, loose.gap) == ("feasible", pytest.approx(0.5))
    assert rebudgeted(loose, bound_seconds=made.step_seconds).status == "optimal"
    # A rule claims no optimum, and an infeasible budget stays one.
    rule = planner.plan(1 << 40, policy="keep-all")
    assert rebudgeted(rule, bound_seconds=rule.step_seconds).status == "feasible"


def test_a_plan_of_a_smaller_budget_is_held_against_its_own_bound(chain):
    """Faster, but under which layers go forward twice: what was proven for the class says nothing of it."""
    planner, budget = chain
    solver_ = Solver(planner.problem)
    alone = solver_.solve(budget, Cutoff(30), None)
    twice = replace(alone.schedule, segments=((0, 1),), seconds=0.9 * alone.schedule.seconds)
    solver_.results.append(SearchResult(schedule=twice, bound_seconds=0.0))
    again = solver_.solve(budget, Cutoff(30), None, bound=alone.schedule.seconds / 2)
    assert again.schedule is twice
    assert again.proven_seconds == alone.schedule.seconds / 2
    assert again.bound_seconds == alone.bound_seconds
    assert again.deterministic


def test_a_plan_that_another_run_may_not_find_says_so_at_every_budget(chain):
    planner, budget = chain
    solver_ = Solver(planner.problem)
    alone = solver_.solve(budget, Cutoff(30), None)
    assert alone.deterministic
    chance = replace(alone.schedule, seconds=0.9 * alone.schedule.seconds, peak_bytes=1)
    solver_.results.append(SearchResult(schedule=chance, bound_seconds=0.0, deterministic=False))
    assert not solver_.solve(budget, Cutoff(30), None).deterministic
    least, certain = solver_.lowest_schedule(Cutoff(30))
    assert least is chance
    assert not certain


def test_the_same_question_leaves_nothing_new_behind(chain):
    planner, budget = chain
    solver_ = Solver(planner.problem)
    first = solver_.solve(budget, Cutoff(30), None)
    assert solver_.solve(budget, Cutoff(30), None) == first
    assert solver_.results == [first]


def test_a_search_starts_from_all_that_is_kept_beside_weights_that_are_streamed():
    """No rule keeps activations and streams weights; near the fastest plans of many budgets, nothing is priced for
    it.
    """
    problem = layered(decoder_like(6, tokens=256, slices=3, on=device(**REAL)))
    pool = Solver(problem).pool
    columns = (rule_columns(problem, rule) for rule in (all_streamed, keep_all, mebp))
    for kind, streamed, kept, recipe in zip(problem.layer_type, *columns):
        assert streamed.decision.keep == kept.decision.keep
        assert streamed.decision.weights == recipe.decision.weights
        assert streamed.backward_seconds <= recipe.backward_seconds
        if streamed.decision.keep:
            assert streamed.decision not in {kept.decision, recipe.decision}
        assert any(column.decision == streamed.decision for column in pool.columns[kind])
    assert any(streamed.decision.keep for streamed in rule_columns(problem, all_streamed))
    assert not pool.programs
