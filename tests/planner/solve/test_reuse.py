"""What one budget leaves to the next, and what carries plans out cheaply: counted in work, never in seconds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import decoder_profile
from synthetic import REAL, decoder_like, device

from tightfit.planner.cutoff import Cutoff
from tightfit.planner.formulation.any_schedule_bound import AnyScheduleBound
from tightfit.planner.formulation.layer_constraints import LayerProgram
from tightfit.planner.formulation.layer_variables import choice_count
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.problem.layer_types import LayeredStep
from tightfit.planner.schedule.free_ranges import TakenRanges, gap
from tightfit.planner.schedule.lowering import live_profile
from tightfit.planner.schedule.prefetch import clock
from tightfit.planner.schedule.prefetch_in_place import _tightest_gap, prefetch_in_place
from tightfit.planner.schedule.realize import CyclePart, realize
from tightfit.planner.solve import model_budget_search
from tightfit.planner.solve.column_generation import ColumnGeneration
from tightfit.planner.solve.model_budget_search import GOOD
from tightfit.planner.solve.model_search import Solver
from tightfit.planner.solve.policies import POLICIES, rule_columns, smallest
from tightfit.planner.solvers.lp import GrowingProgram, Linear, LinearProgram


@pytest.fixture(scope="module")
def decoder():
    return ModelPlanner(decoder_like(4, tokens=256, slices=3, on=device(**REAL)))


@pytest.fixture(scope="module")
def tall():
    return ModelPlanner(decoder_like(12, tokens=256, slices=3, on=device(**REAL)))


@pytest.mark.slow
def test_a_curve_costs_less_than_its_budgets_alone():
    """Programs priced on six budgets together: less than three times what one of them takes from nothing."""
    decoder = ModelPlanner(decoder_like(8, tokens=256, slices=3, on=device(**REAL)))
    smallest = decoder.plan(1 << 45, policy="mebp").peak_bytes
    largest = decoder.plan(1 << 45, policy="keep-all").peak_bytes
    budgets = [int(1.1 * smallest + step / 5 * (largest - 1.1 * smallest)) for step in range(6)]
    alone = ModelPlanner(decoder.profile)
    alone.plan(budgets[2])
    priced = alone.solver.pool.programs
    assert priced > 5
    plans = [decoder.plan(budget) for budget in reversed(budgets)]
    assert all(made.peak_bytes <= budget for made, budget in zip(plans, reversed(budgets)))
    assert max(made.gap for made in plans) < 0.01
    assert decoder.solver.pool.programs <= 3 * priced
    # A budget that was planned before has nothing left to price.
    before = decoder.solver.pool.programs
    decoder.plan(budgets[3])
    assert decoder.solver.pool.programs == before


@pytest.mark.slow
def test_what_one_budget_proves_holds_at_every_other(tall):
    """A bound carried over is never above the master, priced from nothing; between two near budgets it is nearly
    that.
    """
    smallest = tall.plan(1 << 45, policy="mebp").peak_bytes
    carried = ModelPlanner(tall.profile)
    for share in (1.2, 1.5, 1.8):
        carried.plan(int(share * smallest))
    for share in (1.2, 1.35, 1.6, 3.0):
        fresh = Solver(tall.problem)
        room = fresh.room(int(share * smallest))
        search = ColumnGeneration(relaxation=fresh.relaxed, limit_bytes=room, cutoff=Cutoff(600), tolerance=1e-5)
        _, master, kept = search.columns()
        assert kept
        proven = carried.solver.relaxed.proven(room)
        assert 0 < proven <= master * (1 + 1e-5)
        if share in (1.2, 1.35, 1.6):
            assert proven > 0.995 * master


def test_equal_layers_stand_in_the_any_schedule_bound_once(tall):
    """Told apart by a billionth of their unpacking times, weights have variables each, and the bounds are the same."""
    profile = tall.profile
    apart = [
        tensor.model_copy(update={"unpack_seconds": tensor.unpack_seconds * (1 + 1e-9 * number)})
        for number, tensor in enumerate(profile.tensors)
    ]
    together = AnyScheduleBound(tall.problem)
    each = AnyScheduleBound(layered(profile.model_copy(update={"tensors": apart})))
    deeper = AnyScheduleBound(layered(decoder_like(24, tokens=256, slices=3, on=device(**REAL))))
    assert len(together.program.lower) == len(deeper.program.lower) < len(each.program.lower) / 4
    smallest = tall.plan(1 << 45, policy="mebp").peak_bytes
    bounds = [together.step_seconds(int(factor * smallest)) for factor in (0.5, 0.8, 1.0, 1.5, 3.0, 10.0)]
    assert bounds == pytest.approx(
        [each.step_seconds(int(f * smallest)) for f in (0.5, 0.8, 1.0, 1.5, 3.0, 10.0)], rel=1e-6
    )
    assert bounds[0] > 1.01 * bounds[-1]


@pytest.mark.slow
def test_what_other_budgets_priced_is_tried_first():
    """Beside a budget that was planned, nothing is priced, and the plan is near its bound all the same."""
    planner = ModelPlanner(decoder_like(12, tokens=256, slices=3, on=device(**REAL)))
    budget = int(planner.plan(1 << 45, policy="mebp").peak_bytes * 1.5)
    planner.plan(budget)
    priced = planner.solver.pool.programs
    second = planner.plan(int(0.99 * budget))
    assert second.deterministic
    assert second.gap <= GOOD
    assert planner.solver.pool.programs == priced
    alone = ModelPlanner(planner.profile)
    alone.plan(int(0.99 * budget))
    assert alone.solver.pool.programs > 5


@pytest.mark.slow
def test_what_the_clock_left_behind_guides_no_plan_that_is_called_deterministic(monkeypatch):
    """What other budgets priced is not tried before this one's own prices once the clock has had a hand in it."""
    planner = ModelPlanner(decoder_like(12, tokens=256, slices=3, on=device(**REAL)))
    budget = int(planner.plan(1 << 45, policy="mebp").peak_bytes * 1.5)
    planner.plan(budget)
    asked = []
    for owner, name in ((ColumnGeneration, "columns"), (Solver, "_early")):
        method = getattr(owner, name)
        noted = lambda *given, method=method, name=name, **named: asked.append(name) or method(*given, **named)  # noqa: E731
        monkeypatch.setattr(owner, name, noted)
    planner.plan(int(0.98 * budget))
    assert asked[0] == "_early"
    with pytest.raises(TimeoutError):
        planner.solver.bound(int(0.8 * budget), Cutoff(0.0))
    asked.clear()
    planner.plan(int(0.96 * budget))
    assert asked[0] == "columns"


def test_nothing_is_carried_out_twice(decoder, monkeypatch):
    """The same columns within the same bytes, asked for by one attempt or by one made from it."""
    columns = rule_columns(decoder.problem, POLICIES["mebp"])
    room = decoder.solver.room(decoder.plan(1 << 45, policy="mebp").peak_bytes)
    carried = []
    real = model_budget_search.realize
    monkeypatch.setattr(
        model_budget_search, "realize", lambda *given, **named: carried.append(given[2]) or real(*given, **named)
    )
    one = model_budget_search.BudgetSearch(problem=decoder.problem, limit=room, cutoff=Cutoff(600))
    first, _ = one.try_columns(columns)
    other = replace(one, schedules=[])
    again, _ = other.try_columns(columns)
    assert again is first is not None
    assert other.schedules == [first]
    assert replace(one, limit=room + 1).try_columns(columns)[0] is not None
    assert carried == [room, room + 1]


@pytest.mark.slow
def test_while_the_limit_is_not_kept_no_seconds_are_told(decoder):
    """What the program says then are bytes over it."""
    told = []
    solver = Solver(decoder.problem)
    limit = solver.room(solver.smallest.peak_bytes) // 2
    search = ColumnGeneration(relaxation=solver.relaxed, limit_bytes=limit, cutoff=Cutoff(60), progress=told.append)
    assert not search.columns()[2]
    assert told
    assert all((one["incumbent"], one["bound"], one["gap"]) == (float("inf"), 0.0, 1.0) for one in told)


def test_nothing_is_built_before_it_is_priced():
    """At a limit too short for any program, a rule's columns are carried out and no program is built."""
    planner = ModelPlanner(decoder_like(6, tokens=256, slices=3, on=device(**REAL)))
    budget = int(planner.plan(1 << 45, policy="mebp").peak_bytes * 1.2)
    made = planner.plan(budget, time_limit=0.02)
    assert made.peak_bytes <= budget
    assert planner.solver.pool.programs == 0
    assert planner.solver.pool.blocks == {}


def test_choices_are_counted_as_they_are_posted(decoder):
    for kind in decoder.problem.types:
        assert choice_count(kind) == sum(LayerProgram(LinearProgram(), kind).program.whole)


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_a_growing_program_ends_where_a_fresh_one_does(seed):
    chance = np.random.default_rng(seed)
    costs, needs = chance.integers(1, 20, 8).astype(float), chance.integers(1, 9, (8, 3)).astype(float)
    growing = GrowingProgram()
    spare = growing.variable()
    rows = [growing.at_least(Linear().add(spare), 1.0) for _ in range(3)]
    shares: list[int] = []
    for count, least in ((2, 4.0), (5, 9.0), (8, 2.0)):
        while len(shares) < count:
            shares.append(growing.column(dict(zip(rows, needs[len(shares)].tolist()))))
        for row in rows:
            growing.row_bounds(row, least, float("inf"))
        goal = Linear().add(spare, 50.0)
        for share, cost in zip(shares, costs):
            goal.add(share, float(cost))
        fresh = LinearProgram()
        first = fresh.variable()
        others = [fresh.variable() for _ in range(count)]
        for row in range(3):
            total = Linear().add(first)
            for other, need in zip(others, needs[:, row]):
                total.add(other, float(need))
            fresh.at_least(total, least)
        target = Linear().add(first, 50.0)
        for other, cost in zip(others, costs):
            target.add(other, float(cost))
        assert growing.solve(goal).objective == pytest.approx(fresh.solve(target).objective)


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 300), st.integers(0, 90), st.integers(1, 9)), max_size=25),
    st.tuples(st.integers(0, 400), st.integers(0, 300)),
)
@settings(max_examples=200)
def test_bytes_taken_at_any_time_of_a_span(stays, asked):
    """The tree says what looking at every stay says."""
    places = TakenRanges(701)
    for first, length, low, size in stays:
        places.add(low, low + size, first, first + length)
    begin, end = asked[0], asked[0] + asked[1]
    taken = {byte for low, high in places.taken([(begin, end)]) for byte in range(low, high)}
    assert taken == {
        byte
        for first, length, low, size in stays
        if first <= end and first + length >= begin
        for byte in range(low, low + size)
    }


@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 20)), max_size=25),
    st.integers(0, 40),
    st.integers(1, 12),
    st.sampled_from([1, 4, 16]),
)
@settings(max_examples=300)
def test_the_tightest_gap_of_many_ranges_at_once(ranges, base, size, alignment):
    low, high = np.array([(low, low + length) for low, length in ranges], dtype=np.int64).reshape(-1, 2).T
    one_by_one = gap(sorted(zip(low.tolist(), high.tolist())), base, size, alignment, tight=True)
    assert _tightest_gap(low, high, base, size, alignment) == one_by_one


def test_transfers_move_among_tensors_in_their_places(decoder):
    """In the very bytes that the draft takes the step gets shorter, and nothing overlaps at any time."""
    problem: LayeredStep = decoder.problem
    draft = CyclePart(problem=problem, columns=rule_columns(problem, POLICIES["mebp"])).draft()
    _, still = prefetch_in_place(draft, problem.inputs, 0)
    train, arena = prefetch_in_place(draft, problem.inputs, still.bytes)
    assert arena.bytes <= still.bytes
    assert sorted(map(id, train)) == sorted(map(id, draft.train))
    assert clock(train, problem.inputs).seconds < 0.99 * clock(draft.train, problem.inputs).seconds
    lies: dict[str, tuple[int, int]] = {
        name: (offset, offset + draft.sizes[name]) for name, offset in arena.resident.items()
    }
    made = {index: [] for index in range(len(train))}
    for (index, name), offset in arena.train.items():
        made[index].append((name, offset))
    for index, entry in enumerate(train):
        for name, offset in made[index]:
            low, high = offset, offset + draft.sizes[name]
            assert all(end <= low or high <= start for start, end in lies.values()), (index, name)
            lies[name] = low, high
        if entry.verb == "free":
            lies.pop(entry.name, None)


@pytest.mark.slow_but_for("1.04")
@pytest.mark.parametrize("share", [1.005, 1.04])
def test_no_schedule_is_slower_than_transfers_moved_in_place(share):
    planner = ModelPlanner(decoder_like(4, tokens=256, slices=3, on=device(**REAL)))
    problem = planner.problem
    columns = rule_columns(problem, smallest)
    draft = CyclePart(problem=problem, columns=columns).draft()
    charged = REAL["per_instruction"] * (len(draft.train) + len(draft.evaluate))
    room = int(share * max(max(live_profile(e, draft.resident, draft.sizes)) for e in (draft.train, draft.evaluate)))
    train, arena = prefetch_in_place(draft, problem.inputs, room)
    assert arena.bytes <= room
    found, _ = realize(problem, columns, room + charged)
    assert found.arena.bytes <= room
    assert found.seconds <= clock(train, problem.inputs).seconds


@pytest.fixture(scope="module")
def sixfold():
    return ModelPlanner(decoder_like(6, tokens=256, slices=3, on=device(**REAL)))


@pytest.mark.parametrize("policy", ["smallest", *POLICIES])
def test_where_a_rule_fits_no_limit_says_that_nothing_does(sixfold, policy):
    """At the very byte that a rule needs, within a limit that ends every search at once."""
    least = sixfold.solver.smallest if policy == "smallest" else sixfold.minimum(policy=policy)
    made = ModelPlanner(sixfold.profile).plan(least.peak_bytes, time_limit=0.01)
    assert made.fits
    assert made.peak_bytes <= least.peak_bytes
    assert made.gap == pytest.approx(1 - made.bound_seconds / made.step_seconds)


@pytest.mark.slow
def test_near_the_smallest_budget_transfers_find_room():
    """Columns that leave some free are priced where a plan of the others waits for the disk for longer than is looked
    at.
    """
    profile = decoder_profile(16)
    planner = ModelPlanner(profile)
    made = ModelPlanner(profile).plan(int(1.05 * planner.minimum_bytes(time_limit=100)), time_limit=60)
    assert made.gap < 0.005
    assert made.train.stall_seconds < GOOD * made.step_seconds
