"""Standard output while HiGHS solves: dropped, and given back whoever ends last."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ortools.math_opt.python import mathopt

from tightfit.planner.solvers import highs

DESCRIPTORS = Path("/proc/self/fd")


def test_standard_output_comes_back_after_threads_that_overlap(monkeypatch):
    """The first to begin is the first to end: put back in that order, the output of the second would stay nowhere."""
    before = os.fstat(1)
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    inside = []

    def solve(*_, **__):
        if not first_in.is_set():
            first_in.set()
            assert second_in.wait(20)
        else:
            second_in.set()
            assert first_out.wait(20)
            inside.append(os.fstat(1))

    def first():
        highs.solve_silently(mathopt.Model())
        first_out.set()

    monkeypatch.setattr(highs.mathopt, "solve", solve)
    one = threading.Thread(target=first)
    one.start()
    assert first_in.wait(20)
    other = threading.Thread(target=highs.solve_silently, args=(mathopt.Model(),))
    other.start()
    one.join()
    other.join()
    nowhere = Path(os.devnull).stat()
    assert [os.path.samestat(found, nowhere) for found in inside] == [True]
    assert os.path.samestat(os.fstat(1), before)


def led_away():
    """How many descriptors lead to where standard output does, or nowhere. Others come and go with what earlier tests
    left behind.
    """
    places = [os.fstat(1), Path(os.devnull).stat()]
    count = 0
    for path in DESCRIPTORS.iterdir():
        with contextlib.suppress(OSError):
            count += any(os.path.samestat(path.stat(), place) for place in places)
    return count


def test_many_threads_leave_no_descriptors_behind():
    def solve():
        for _ in range(20):
            model = mathopt.Model()
            model.maximize(model.add_variable(lb=0.0, ub=2.0))
            assert highs.solve_silently(model).objective_value() == 2.0

    before, opened = os.fstat(1), led_away()
    threads = [threading.Thread(target=solve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.path.samestat(os.fstat(1), before)
    assert led_away() == opened


def test_a_closed_standard_output_is_left_closed():
    saved = os.dup(1)
    os.close(1)
    try:
        model = mathopt.Model()
        assert highs.solve_silently(model).termination.reason == mathopt.TerminationReason.OPTIMAL
        assert not (DESCRIPTORS / "1").exists()
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def test_a_second_opinion_gets_what_time_is_left(monkeypatch):
    granted = []

    def solve(_model, _solver, *, params):
        granted.append(params.time_limit.total_seconds())
        raise ValueError

    now = itertools.count(0.0, 2.0)
    monkeypatch.setattr(highs.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(highs.mathopt, "solve", solve)
    with pytest.raises(TimeoutError, match="takes the model"):
        highs.solve_silently(mathopt.Model(), 5.0)
    with pytest.raises(TimeoutError):
        highs.solve_silently(mathopt.Model(), 2.0)
    assert granted == [5.0, 3.0, 2.0]


def test_what_an_abandoned_solver_prints_is_dropped_and_what_python_prints_is_not():
    script = """
import os, signal, sys, threading, time
from tightfit.planner.solvers import highs

def solve(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    interrupted.wait(20)
    os.write(1, b"solver ")

interrupted, before = threading.Event(), sys.stdout
highs.mathopt.solve = solve
try:
    highs.solve_silently(highs.mathopt.Model())
except KeyboardInterrupt:
    print("interrupted", end=" ")
interrupted.set()
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join()
assert sys.stdout is before
print("after")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=50)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted after\n", "", 0)


@pytest.mark.parametrize("integer", [False, True])
def test_a_model_that_no_solver_takes_is_one_without_an_answer(integer):
    """Callers go on with what they know, as where the time is up; they ended in MathOpt's own error."""
    model = mathopt.Model()
    one = model.add_variable(lb=0, ub=10, is_integer=integer)
    model.minimize(one)
    model.add_linear_constraint(float("nan") * one >= 3)
    with pytest.raises(TimeoutError, match="takes the model"):
        highs.solve_silently(model, seconds=5)
