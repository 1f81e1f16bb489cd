"""A process beside this one, and comparisons that two processes share."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from synthetic import small_chain

import planner.compare
from planner.beside import Beside
from planner.compare import compare
from planner.plan import Planner

PATIENCE = 20.0


def gone(pid):
    """Whether a process has ended, within some seconds."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def gone_now(pid):
    return not Path(f"/proc/{pid}").exists()


def test_answers_come_in_order():
    with Beside(lambda: map(str, range(100))) as beside:
        assert list(beside.arrived(all_=True)) == [str(number) for number in range(100)]
        assert list(beside.arrived()) == []
        assert list(beside.arrived(all_=True)) == []


def test_nobody_waits_until_an_answer_is_taken(tmp_path):
    """Answers of many times what a pipe holds."""

    def answers():
        for number in range(5):
            yield bytes([number]) * (1 << 20)
        (tmp_path / "all").touch()

    with Beside(answers) as beside:
        until = time.monotonic() + PATIENCE
        while not (tmp_path / "all").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        assert [answer[0] for answer in beside.arrived(all_=True)] == [0, 1, 2, 3, 4]


def test_a_copy_is_as_this_process_was():
    there = {"before"}
    with Beside(lambda: [sorted(there)]) as beside:
        there.add("since")
        assert list(beside.arrived(all_=True)) == [["before"]]


@pytest.mark.parametrize("error", [ValueError, MemoryError])
def test_a_copy_that_fails_ends_with_what_it_has_sent(error, capfd):
    def answers():
        yield 1
        raise error("for the test")

    with Beside(answers) as beside:
        assert list(beside.arrived(all_=True)) == [1]
    assert capfd.readouterr().err == ""


def test_a_copy_that_is_killed_ends_too():
    def answers():
        yield os.getpid()
        time.sleep(600)
        yield 0

    with Beside(answers) as beside:
        arrived = beside.arrived(all_=True)
        os.kill(next(arrived), signal.SIGKILL)
        assert list(arrived) == []


def test_it_is_gone_afterwards_whatever_it_was_doing():
    def answers():
        yield os.getpid()
        time.sleep(600)

    class ForTheTest(Exception):
        pass

    def fail():
        with Beside(answers) as beside:
            pids.append(next(beside.arrived(all_=True)))
            assert not gone_now(pids[0])
            raise ForTheTest

    pids = []
    with pytest.raises(ForTheTest):
        fail()
    assert gone(pids[0])


def test_where_there_is_no_process_more_no_answers_come(monkeypatch):
    def fork():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with Beside(lambda: [1]) as beside:
        assert list(beside.arrived(all_=True)) == []


def test_ctrl_c_is_not_for_the_copy():
    def answers():
        os.kill(os.getpid(), signal.SIGINT)
        yield signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    with Beside(answers) as beside:
        assert list(beside.arrived(all_=True)) == [True]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_it_does_not_outlive_this_process():
    script = (
        "import os, time\nfrom planner.beside import Beside\n"
        "def answers():\n    yield os.getpid()\n    time.sleep(600)\n"
        "with Beside(answers) as beside:\n    print(next(beside.arrived(all_=True)), flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert not gone_now(pid)
    finally:
        process.kill()
        process.communicate()
    assert gone(pid)


# --- comparisons -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile():
    return small_chain(12, layers=3)


@pytest.fixture(scope="module")
def budgets(profile):
    """Smallest first; what is planned beside are the first three."""
    smallest = Planner(profile).minimum_bytes()
    return [int(smallest * (1 + 0.04 * step)) for step in range(7)]


@pytest.fixture(scope="module")
def compared(profile, budgets):
    return compare(profile, budgets, ["solver", "mebp"])


def told(comparison):
    """All but how long it took."""
    return [plan.model_copy(update={"solve_seconds": 0.0, "fingerprint": ""}) for plan in comparison.plans]


def test_a_comparison_is_complete_and_each_plan_told_once(profile, budgets, compared, monkeypatch):
    pids, planned, done = [], [], []

    class Seen(Beside):
        def __enter__(self):
            entered = super().__enter__()
            pids.append(self._process.pid)
            return entered

    monkeypatch.setattr(planner.compare, "Beside", Seen)
    again = compare(
        profile, budgets, ["solver", "mebp"], planned=planned.append, progress=lambda *state: done.append(state[1])
    )
    assert len(pids) == 1
    cells = list(itertools.product(budgets, ["solver", "mebp"]))
    assert sorted((plan.budget_bytes, plan.policy) for plan in planned) == sorted(cells)
    assert [(plan.budget_bytes, plan.policy) for plan in again.plans] == cells
    assert (done[0], done[-1]) == (0, len(cells))
    assert done == sorted(done)
    assert told(again) == told(compared)
    assert gone(pids[0])


@pytest.mark.parametrize("alone", ["one core", "killed", "in a thread"])
def test_a_comparison_without_another_process(profile, budgets, compared, monkeypatch, alone):
    """On one core the same; where the other process is killed the rest is planned here, and so from other columns."""
    if alone == "one core":
        monkeypatch.setattr(planner.compare, "our_cores", lambda: 1)
        assert told(compare(profile, budgets, ["solver", "mebp"])) == told(compared)
        return
    planned, results = [], []
    if alone == "killed":

        class Killed(Beside):
            def __enter__(self):
                entered = super().__enter__()
                self._process.kill()
                return entered

        monkeypatch.setattr(planner.compare, "Beside", Killed)
        results.append(compare(profile, budgets, ["solver", "mebp"], planned=planned.append))
    else:
        monkeypatch.setattr(planner.compare, "Beside", None)

        def work():
            results.append(compare(profile, budgets, ["solver", "mebp"], planned=planned.append))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    (result,) = results
    assert len(planned) == len(result.plans) == 2 * len(budgets)
    for mine, other in zip(result.plans, compared.plans):
        assert mine.status == other.status
        assert mine.peak_bytes <= mine.budget_bytes
        assert mine.step_seconds == pytest.approx(other.step_seconds, rel=0.01)


def test_an_error_of_the_other_process_is_raised_here(profile, budgets, monkeypatch):
    original = Planner.plan

    def plan(self, budget, **options):
        if budget == budgets[1]:
            raise ValueError("for the test")
        return original(self, budget, **options)

    monkeypatch.setattr(Planner, "plan", plan)
    with pytest.raises(ValueError, match="for the test"):
        compare(profile, budgets, ["solver"])


def test_an_interrupted_comparison_keeps_what_the_other_process_sent(profile, budgets, monkeypatch):
    made = []

    class Seen(Beside):
        def __enter__(self):
            made.append(self)
            return super().__enter__()

    monkeypatch.setattr(planner.compare, "Beside", Seen)
    waited = []

    def interrupt(what, done, total):
        if waited:
            raise KeyboardInterrupt
        if made:
            waited.append(made[0]._receiver.poll(PATIENCE))

    result = compare(profile, budgets, ["solver"], progress=interrupt)
    assert waited == [True]
    assert {plan.budget_bytes for plan in result.plans} & set(budgets[:3])
    assert set(budgets[-3:]) <= {plan.budget_bytes for plan in result.plans}
