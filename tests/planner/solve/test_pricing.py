from __future__ import annotations

import random
import signal
from dataclasses import replace

import numpy as np
import pytest
from decisions import random_decision
from swallowing import Swallowing
from synthetic import small_chain
from tiny_plans import decoder_profile

from tightfit.planner.cutoff import NEVER, Cutoff
from tightfit.planner.problem.build_layers import layered
from tightfit.planner.problem.layer_figures import FIELDS
from tightfit.planner.schedule.layer_schedule import measure
from tightfit.planner.solve.master_lp import MasterLp
from tightfit.planner.solve.model_search import Solver
from tightfit.planner.solve.policies import keep_all
from tightfit.planner.solve.pricing import LITTLE, ColumnPool, FigureHull, figures_row


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    """A decoder's step with a text in four tiles, whose operators take as long as they have letters."""
    profile = decoder_profile(tmp_path_factory.mktemp("tiled"), batch=1, seq=64, tile=16)
    programs = [
        program.model_copy(
            update={
                "operators": [
                    operator.model_copy(update={"seconds": 1e-6 * len(operator.target)})
                    for operator in program.operators
                ]
            }
        )
        for program in profile.programs
    ]
    return layered(profile.model_copy(update={"programs": programs}))


def test_a_solver_that_gives_up_proves_nothing_and_is_replaced(monkeypatch):
    """Glop ends some programs as ABNORMAL, and MathOpt then fails to say so: zero is a bound that always holds."""
    hull = FigureHull(layered(small_chain(3, layers=2)).types[0])
    prices = np.ones(len(FIELDS))
    least = hull.bound(prices)
    hull.prove(prices, least + 5.0)
    known = hull.bound(prices)
    assert known == pytest.approx(least + 5.0, rel=1e-6)
    failed = hull.solver
    monkeypatch.setattr(failed, "solve", lambda **_: {}.canonical_code)
    assert hull.bound(prices) == known  # is remembered
    assert hull.bound(2 * prices) == 0.0
    assert hull.solver is not failed
    assert hull.bound(2 * prices) == pytest.approx(2 * known)
    hull.prove(prices, least + 6.0)
    assert hull.bound(prices) == pytest.approx(least + 6.0, rel=1e-6)


def test_no_decision_is_cheaper_than_what_is_proven():
    """At the prices that were asked for, at others, and where one figure alone has a price."""
    chance, rng = np.random.default_rng(0), random.Random(0)
    for profile in (small_chain(3, layers=2), small_chain(4, layers=3)):
        pool = ColumnPool(problem=layered(profile))
        for number, kind in enumerate(pool.problem.types):
            costs = np.stack([figures_row(measure(kind, random_decision(rng, kind))) for _ in range(20)])
            asked = [chance.uniform(0.0, 1.0, len(FIELDS)) for _ in range(3)]
            for prices in asked:
                pool.price(number, prices, 0.05, NEVER)
                assert pool.bound(number, prices) >= 0.94 * pool.known(number, prices)
            others = [chance.uniform(0.0, 1.0, len(FIELDS)) for _ in range(10)]
            for prices in [*asked, *others, *np.eye(len(FIELDS))]:
                assert pool.bound(number, prices) <= (costs @ prices).min() + 1e-9
                assert pool.bound(number, prices) <= (pool.figures[number] @ prices).min() + 1e-9


def test_what_is_proven_is_the_solvers_bound_and_not_its_answer(monkeypatch):
    """Where it stops at a gap, decisions may be cheaper than the one that it found."""
    pool = ColumnPool(problem=layered(small_chain(3, layers=2)))
    prices = np.ones(len(FIELDS))
    program = pool.block(0).program
    solve, found = program.solve, []

    def stopped(*given):
        result = solve(*given)
        found.append(result.objective)
        return replace(result, bound=0.9 * result.objective)

    monkeypatch.setattr(program, "solve", stopped)
    pool.price(0, prices, 0.1, NEVER)
    assert pool.bound(0, prices) == pytest.approx(0.9 * found[0], rel=1e-6)


def test_an_answer_from_before_new_columns_is_not_given_again(monkeypatch):
    """Where time is up on the program with the new columns, the next call solves it."""
    problem = layered(small_chain(3, layers=2))
    pool = Solver(problem).pool
    relaxation = MasterLp(pool, careful=False)
    limit = Solver(problem).room(1 << 30)
    before = relaxation.solve(limit)
    assert relaxation.solve(limit) is before
    number = problem.layer_type[0]
    cheapest = pool.figures[number].min(axis=0) / 2
    pool.columns[number].append(pool.columns[number][0])
    pool.figures[number] = np.vstack([pool.figures[number], cheapest])
    with pytest.raises(TimeoutError):
        relaxation.solve(limit, Cutoff(-1.0))
    assert relaxation.solve(limit).value < before.value


def test_an_interruption_that_the_conversion_of_an_answer_swallows_is_one():
    hull = FigureHull(layered(small_chain(3, layers=2)).types[0])
    before, solver = signal.getsignal(signal.SIGINT), hull.solver
    hull.solver = Swallowing()
    with pytest.raises(KeyboardInterrupt):
        hull.bound(np.ones(len(FIELDS)))
    assert signal.getsignal(signal.SIGINT) is before
    hull.solver = solver
    assert hull.bound(np.ones(len(FIELDS))) > 0


@pytest.mark.slow
def test_no_change_of_one_fate_is_cheaper_than_what_a_search_adds(tiled):
    """At random prices: of what one operator makes, in all tiles. No decision is cheaper than what programs prove."""
    chance, gained = np.random.default_rng(0), 0
    for number, kind in enumerate(tiled.types):
        makers = {}
        for value in kind.candidates:
            first = kind.alike.get(value, value)
            makers.setdefault(kind.producer[first].index if first in kind.producer else first, set()).add(value)
        for _ in range(4 if makers else 0):
            searched, solved = Solver(tiled).pool, Solver(tiled).pool
            prices = chance.uniform(0.0, 1.0, len(FIELDS)) / np.maximum(1e-9, searched.figures[number].mean(axis=0))
            rules = (searched.figures[number] @ prices).min()
            searched.improve(number, prices, NEVER)
            costs = searched.figures[number] @ prices
            best, found = searched.columns[number][int(costs.argmin())].decision, costs.min()
            solved.price(number, prices, 1e-3, NEVER)
            assert solved.bound(number, prices) <= found * (1 + 1e-9)
            assert found <= rules
            gained += found < 0.99 * rules
            for made in makers.values():
                disk, memory = made & kind.offloadable, made - kind.offloadable
                others = [(best.keep | made, best.offload - made), (best.keep - disk | memory, best.offload | disk)]
                if not made & kind.owned and all(kind.producer[value].recomputable for value in made):
                    others.append((best.keep - made, best.offload - made))
                for keep, offload in others:
                    changed = figures_row(measure(kind, replace(best, keep=keep, offload=offload))) @ prices
                    assert changed >= found * (1 - 2 * LITTLE)
    assert gained


def test_what_cannot_be_made_again_is_kept_or_offloaded(tiled):
    for number, kind in enumerate(tiled.types):
        pool = Solver(tiled).pool
        free = np.where([name in ("between", "backward_peak") for name in FIELDS], 1.0, 0.0)
        pool.improve(number, free, NEVER)
        for column in pool.columns[number]:
            stored = column.decision.keep | column.decision.offload
            assert {v for v in kind.candidates if v in kind.owned or not kind.producer[v].recomputable} <= stored
            assert column.decision.offload <= kind.offloadable
            assert not column.decision.keep & column.decision.offload


def test_a_search_without_time_adds_nothing(tiled):
    for number, kind in enumerate(tiled.types):
        if not kind.candidates:
            continue
        pool = Solver(tiled).pool
        known = len(pool.columns[number])
        with pytest.raises(TimeoutError):
            pool.improve(number, np.ones(len(FIELDS)), Cutoff(-1.0))
        assert len(pool.columns[number]) == known


@pytest.mark.slow
def test_a_search_begins_where_nothing_is_lost_that_cannot_be_made_again(tiled):
    """A decision under which nothing runs again may do without the layer's input, which changes of it would need."""
    number = max(range(len(tiled.types)), key=lambda number: len(tiled.types[number].owned))
    kind, pool = tiled.types[number], Solver(tiled).pool
    everything = keep_all(kind, last=False)
    read = {value for operator in kind.backward for value in operator.inputs}
    assert kind.owned - read, "an input that only what runs again would read"
    bare = measure(kind, replace(everything, keep=everything.keep - (kind.owned - read)))
    pool.columns[number] = [bare, *pool.columns[number][1:]]  # it holds what keeping everything holds
    for name in FIELDS:
        pool.improve(number, np.where([other == name for other in FIELDS], 1.0, 1e-9), NEVER)
