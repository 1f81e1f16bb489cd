"""Ctrl-C beside solvers written in C++: seen at once, and after them still Python's."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from layered_graph import layered
from ortools.math_opt.python import mathopt
from ortools.sat.python import cp_model
from swallowing import Swallowing
from synthetic import small_chain

from tightfit.planner.compare import compare
from tightfit.planner.graphs.graph_planner import GraphPlanner
from tightfit.planner.plan import minimum_budget
from tightfit.planner.report.marginal_value import what_if
from tightfit.planner.solvers.cp_sat import single_worker, solved
from tightfit.planner.solvers.highs import solve_silently
from tightfit.planner.solvers.lp import GrowingProgram, Linear
from tightfit.planner.solvers.solver_interrupts import interruptible
from tightfit.profiles.graph_input import graph_profile


def interrupted(seconds, call):
    """`call` ends by the Ctrl-C that comes after so many seconds. However late anything is, that is nowhere but where
    it is caught.

    Python drops what is raised in the callback of a weak reference: no garbage of other tests may be collected
    meanwhile.
    """
    gc.collect()
    gc.disable()
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))

    def begun():
        timer.start()
        call()
        timer.cancel()
        timer.join()

    try:
        with pytest.raises(KeyboardInterrupt):
            begun()
    finally:
        gc.enable()


def test_answers_and_errors_pass():
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)


def test_what_cannot_be_stopped_is_left_alone():
    released = threading.Event()
    interrupted(0.1, lambda: interruptible(lambda: released.wait(60)))
    assert not released.is_set()
    released.set()


def test_a_solver_that_goes_on_past_its_seconds_is_left_alone():
    """It looks at its clock now and then only, which on a busy machine may be long after."""
    released, began = threading.Event(), time.monotonic()
    try:
        with pytest.raises(TimeoutError):
            interruptible(lambda: released.wait(60), seconds=0.05)
        assert time.monotonic() - began < 30
    finally:
        released.set()

    def late() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        interruptible(late, seconds=60)


def test_a_program_s_solver_is_waited_for_no_longer_than_its_limit_allows(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(mathopt, "solve", lambda *_, **__: released.wait(60))
    began = time.monotonic()
    try:
        with pytest.raises(TimeoutError):
            solve_silently(mathopt.Model(), seconds=0.1)
        assert time.monotonic() - began < 30
    finally:
        released.set()


def test_cp_sat_is_stopped():
    model = cp_model.CpModel()
    holes, birds = range(14), range(15)
    sits = {(bird, hole): model.new_bool_var("") for bird in birds for hole in holes}
    for bird in birds:
        model.add_bool_or(sits[bird, hole] for hole in holes)
    for hole in holes:
        for one in birds:
            for other in range(one):
                model.add_bool_or(sits[one, hole].negated(), sits[other, hole].negated())
    solver = single_worker()
    solver.parameters.cp_model_presolve = False
    solver.parameters.symmetry_level = 0
    solver.parameters.max_time_in_seconds = 60
    began = time.monotonic()
    interrupted(0.3, lambda: solved(solver, model))
    assert time.monotonic() - began < 20


def test_ctrl_c_is_still_seen_after_cp_sat():
    """It used to end the process on the spot."""
    model = cp_model.CpModel()
    model.maximize(model.new_bool_var(""))
    solved(single_worker(), model)
    interrupted(0.2, lambda: time.sleep(60))


def test_what_is_interrupted_before_it_begins_never_does(monkeypatch):
    started = []

    class Late(threading.Thread):
        """It begins when it is too late."""

        def start(self):
            started.append(self.run)
            raise KeyboardInterrupt

    asked = []
    monkeypatch.setattr(threading, "Thread", Late)
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: asked.append("solve"))
    started[0]()
    assert asked == []


def test_what_is_interrupted_as_it_begins_is_stopped(monkeypatch):
    class Begun(threading.Thread):
        def start(self):
            super().start()
            begun.wait(20)
            raise KeyboardInterrupt

    begun, stopped = threading.Event(), threading.Event()

    def solve():
        begun.set()
        assert stopped.wait(20)

    monkeypatch.setattr(threading, "Thread", Begun)
    with pytest.raises(KeyboardInterrupt):
        interruptible(solve, stopped.set)
    assert stopped.is_set()


def test_an_interruption_while_a_solver_is_made_leaves_none_behind(monkeypatch):
    def making(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)

    program = GrowingProgram()
    goal = Linear().add(program.variable())
    with monkeypatch.context() as patch:
        patch.setattr("tightfit.planner.solvers.lp.mathopt.IncrementalSolver", making)
        with pytest.raises(KeyboardInterrupt):
            program.solve(goal)
        time.sleep(0.6)
    assert "_solver" not in program.__dict__
    assert program.solve(goal).objective == 0.0


def test_an_interruption_that_the_conversion_of_an_answer_swallows_is_one():
    """It came out as an AttributeError, which MathOpt's conversion also raises by itself, and the search went on."""

    program = GrowingProgram()
    goal = Linear().add(program.variable())
    assert program.solve(goal).objective == 0.0
    program.__dict__["_solver"] = Swallowing()
    with pytest.raises(KeyboardInterrupt):
        program.solve(goal)
    assert program.solve(goal).objective == 0.0


@pytest.mark.parametrize("output", ["read", "broken", "closed"])
def test_the_command_line_does_not_wait_for_what_is_left_alone(output):
    script = """
import os, signal, sys, threading, time
from tightfit.planner.solvers.solver_interrupts import interruptible
from tightfit.runtime.cli import main

def app(**_):
    if sys.stdout is not None:
        sys.stdout.write("x")
    try:
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        interruptible(lambda: time.sleep(60))
    except KeyboardInterrupt:
        return main.INTERRUPTED

main.app = app
main.main(["plan"])
"""
    reader, writer = os.pipe()
    if output == "broken":
        os.close(reader)
    redirected = ">&-" if output == "closed" else ""
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {redirected}', sys.executable, script],
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=50,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (4, "tightfit: interrupted\n")
    if output != "broken":
        assert os.read(reader, 9) == (b"x" if output == "read" else b"")
        os.close(reader)


def test_an_interruption_of_a_search_made_again_keeps_what_was_found_before_it(monkeypatch):
    planner = GraphPlanner(graph_profile(layered(60, seed=1)))
    budget = int(0.8 * planner.keep_all_bytes)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = planner.plan(budget, time_limit=10, progress=interrupt)
    monkeypatch.setattr(planner, "_solve", interrupt)
    again = planner.plan(budget, time_limit=20)
    assert (again.step_seconds, again.deterministic) == (before.step_seconds, False)
    monkeypatch.setattr("tightfit.planner.graphs.graph_planner.lowest_schedule", interrupt)
    with pytest.raises(KeyboardInterrupt):
        planner.minimum_bytes(time_limit=10)


@pytest.mark.parametrize("policy", ["solver", "checkpoint-sqrt"])
def test_an_interruption_while_a_bound_is_worked_out_returns_what_is_known_to_fit(monkeypatch, policy):
    planner = GraphPlanner(graph_profile(layered(60, seed=1, training=True)))
    budget = planner.plan(1 << 60, policy="checkpoint-sqrt").peak_bytes

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tightfit.planner.graphs.bounds.bound.AnyBound.rise", interrupt)
    made = planner.plan(budget, policy=policy)
    assert made.train is not None
    assert (made.any_schedule_bound_seconds, made.deterministic) == (planner.dag.once_seconds, False)
    monkeypatch.setattr("tightfit.planner.graphs.search.eviction_search.EvictionSearch.fastest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        planner.plan(planner.floor_bytes, policy=policy)


def interrupt_once():
    """Ctrl-C as soon as a plan is there, while a better one is searched for."""
    seen = []

    def progress(told):
        if not seen and 0 < told["incumbent"] < float("inf"):
            seen.append(told)
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_comparison_of_graphs_makes_no_further_plan():
    profile = graph_profile(layered(60, seed=1))
    keep_all = GraphPlanner(profile).keep_all_bytes
    budgets = [int(share * keep_all) for share in (0.8, 0.85)]
    made = compare(profile, budgets, ["solver"], time_limit=600, solving=interrupt_once()).plans
    assert [plan.budget_bytes for plan in made] == budgets[1:]


def test_an_interrupted_comparison_of_layers_makes_no_further_plan():
    profile = small_chain(7, layers=3)
    least = minimum_budget(profile, policy="mebp")
    made = compare(profile, [least, least + 1], ["solver"], time_limit=5, solving=interrupt_once()).plans
    assert [plan.budget_bytes for plan in made] == [least + 1]


@pytest.mark.slow
def test_after_an_interruption_what_if_plans_no_further_budget():
    planner = GraphPlanner(graph_profile(layered(60, seed=1)))
    made = planner.plan(int(0.8 * planner.keep_all_bytes), time_limit=2)
    _, beside = what_if(planner, made, time_limit=600, progress=interrupt_once())
    assert [worth.change_bytes for worth in beside] == [-planner.neighbour_bytes(made.budget_bytes)]


@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("threads", [True, False])
def test_no_interruption_leaves_signals_blocked(monkeypatch, call, threads):
    """The call that blocks them may raise once it has."""
    calls = []
    real = signal.pthread_sigmask

    def interrupting(how, numbers):
        before = real(how, numbers)
        calls.append(how)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return before

    def none(*_, **__):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(signal, "pthread_sigmask", interrupting)
    if not threads:
        monkeypatch.setattr(threading, "Thread", none)
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: 3)
    assert not real(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def test_a_signal_that_ends_a_program_is_never_the_solvers():
    """The kernel gives it to any thread that takes it, and the one that waits for an answer would sleep on."""
    blocked = interruptible(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} <= blocked
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
