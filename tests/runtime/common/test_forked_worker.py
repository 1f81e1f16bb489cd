"""A process beside this one, and comparisons that two processes share."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from killing import ended
from synthetic import small_chain

import tightfit.planner.compare
from tightfit.planner.compare import compare
from tightfit.planner.model_planner import ModelPlanner
from tightfit.runtime.common.forked_worker import ForkedWorker, can_be_copied

PATIENCE = 20.0


def gone(pid):
    """Whether nothing is left of a process."""
    return not Path(f"/proc/{pid}").exists()


def test_answers_come_in_order():
    with ForkedWorker(lambda: map(str, range(100))) as beside:
        assert list(beside.arrived(patience=None)) == [str(number) for number in range(100)]
        assert list(beside.arrived()) == []
        assert list(beside.arrived(patience=None)) == []


def test_nobody_waits_until_an_answer_is_taken(tmp_path):
    """Answers of many times what a pipe holds."""

    def answers():
        for number in range(5):
            yield bytes([number]) * (1 << 20)
        (tmp_path / "all").touch()

    with ForkedWorker(answers) as beside:
        until = time.monotonic() + PATIENCE
        while not (tmp_path / "all").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        assert [answer[0] for answer in beside.arrived(patience=None)] == [0, 1, 2, 3, 4]


def test_what_is_found_too_late_does_not_count(tmp_path):
    """However soon it comes: each is there before the patience with the one before is over."""

    def answers():
        yield from "ab"
        (tmp_path / "both").touch()
        while not (tmp_path / "late").exists():
            time.sleep(0.01)
        for number in itertools.count():
            time.sleep(0.01)
            yield number

    with ForkedWorker(answers) as beside:
        until = time.monotonic() + PATIENCE
        while not (tmp_path / "both").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        due = time.monotonic()
        (tmp_path / "late").touch()
        assert list(beside.arrived(PATIENCE, until=due)) == ["a", "b"]


def test_a_copy_is_as_this_process_was():
    there = {"before"}
    with ForkedWorker(lambda: [sorted(there)]) as beside:
        there.add("since")
        assert list(beside.arrived(patience=None)) == [["before"]]


@pytest.mark.parametrize("error", [ValueError, MemoryError])
def test_a_copy_that_fails_ends_with_what_it_has_sent(error, capfd):
    def answers():
        yield 1
        raise error("for the test")

    with ForkedWorker(answers) as beside:
        assert list(beside.arrived(patience=None)) == [1]
    assert capfd.readouterr().err == ""


def test_a_copy_that_is_killed_ends_too():
    def answers():
        yield os.getpid()
        time.sleep(600)
        yield 0

    with ForkedWorker(answers) as beside:
        arrived = beside.arrived(patience=None)
        os.kill(next(arrived), signal.SIGKILL)
        assert list(arrived) == []


def test_it_is_gone_afterwards_whatever_it_was_doing():
    def answers():
        yield os.getpid()
        time.sleep(600)

    class ForTheTest(Exception):
        pass

    def fail():
        with ForkedWorker(answers) as beside:
            pids.append(next(beside.arrived(patience=None)))
            assert not gone(pids[0])
            raise ForTheTest

    pids = []
    with pytest.raises(ForTheTest):
        fail()
    assert gone(pids[0])


@pytest.mark.parametrize("call", ["fork", "pipe"])
def test_where_there_is_no_process_or_file_more_no_answers_come(monkeypatch, call):
    def used_up():
        raise OSError(errno.EAGAIN if call == "fork" else errno.EMFILE, "none left, for the test")

    monkeypatch.setattr(os, call, used_up)
    with ForkedWorker(lambda: [1]) as beside:
        assert list(beside.arrived(patience=None)) == []


def test_ctrl_c_is_not_for_the_copy():
    def answers():
        os.kill(os.getpid(), signal.SIGINT)
        yield "goes on"

    before = signal.getsignal(signal.SIGINT)
    with ForkedWorker(answers) as beside:
        assert list(beside.arrived(patience=None)) == ["goes on"]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_it_is_copied_ends_the_copy(monkeypatch):
    """As the terminal sends it: to both."""
    fork, pids = os.fork, []

    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        pid = fork()
        pids.append(pid)
        os.kill(pid or os.getpid(), signal.SIGINT)
        return pid

    def enter():
        with ForkedWorker(lambda: itertools.repeat(time.sleep(600))):
            raise AssertionError("it was not raised")

    monkeypatch.setattr(os, "fork", interrupted)
    with pytest.raises(KeyboardInterrupt):
        enter()
    assert len(pids) == 1
    assert gone(pids[0])


def test_an_answer_that_was_cut_short_is_the_last():
    with ForkedWorker(lambda: ["one", "two"]) as beside:
        assert beside._receiver.poll(PATIENCE)
        receive = beside._receiver.recv
        beside._receiver.recv = lambda: signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            list(beside.arrived(patience=None))
        beside._receiver.recv = receive
        assert list(beside.arrived(patience=None)) == []


@pytest.mark.parametrize("daemon", [False, True])
def test_only_daemons_may_be_there(daemon):
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait, daemon=daemon)
    thread.start()
    try:
        assert can_be_copied() is daemon
    finally:
        ended.set()
        thread.join()
    assert can_be_copied()


def test_it_does_not_outlive_this_process():
    script = (
        "import os, time\nfrom tightfit.runtime.common.forked_worker import ForkedWorker\n"
        "def answers():\n    yield os.getpid()\n    time.sleep(600)\n"
        "with ForkedWorker(answers) as beside:\n    print(next(beside.arrived(patience=None)), flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert not gone(pid)
    finally:
        process.kill()
        process.communicate()
    until = time.monotonic() + PATIENCE
    while not ended(pid):
        assert time.monotonic() < until
        time.sleep(0.01)


# --- comparisons ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile():
    return small_chain(12, layers=3)


@pytest.fixture(scope="module")
def budgets(profile):
    """Smallest first; what is planned beside are the first two."""
    smallest = ModelPlanner(profile).minimum_bytes()
    return [int(smallest * (1 + 0.04 * step)) for step in range(7)]


@pytest.fixture(scope="module")
def compared(profile, budgets):
    return compare(profile, budgets, ["solver", "mebp"])


def told(comparison):
    """All but how long it took."""
    return [plan.model_copy(update={"solve_seconds": 0.0, "fingerprint": ""}) for plan in comparison.plans]


@pytest.mark.slow
def test_a_comparison_is_complete_and_each_plan_told_once(profile, budgets, compared, monkeypatch):
    pids, planned, done = [], [], []

    class Seen(ForkedWorker):
        def __enter__(self):
            entered = super().__enter__()
            pids.append(self._process.pid)
            return entered

    monkeypatch.setattr(tightfit.planner.compare, "ForkedWorker", Seen)
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


def test_on_one_core_a_comparison_is_the_same_and_one_process_works_at_a_time(profile, budgets, compared, monkeypatch):
    monkeypatch.setattr(tightfit.planner.compare, "our_cores", lambda: 1)
    planned = []
    again = compare(profile, budgets, ["solver", "mebp"], planned=lambda plan: planned.append(plan.budget_bytes))
    assert list(dict.fromkeys(planned)) == [*budgets[:-3:-1], *budgets[1::-1], *budgets[4:1:-1]]
    assert told(again) == told(compared)


@pytest.mark.slow_but_for("killed at once")
@pytest.mark.parametrize("alone", ["killed at once", "killed after its first plan", "in a thread"])
def test_a_comparison_without_another_process(profile, budgets, compared, monkeypatch, alone):
    """What the other process does not plan is planned here, and so from other columns."""
    planned, results = [], []

    def work():
        results.append(compare(profile, budgets, ["solver", "mebp"], planned=planned.append))

    class Killed(ForkedWorker):
        def arrived(self, patience=0.0):
            first = itertools.islice(super().arrived(None), int(alone != "killed at once"))
            yield from () if not self._process.is_alive() else first
            self._process.kill()
            self._process.join()

    if alone == "in a thread":
        monkeypatch.setattr(tightfit.planner.compare, "ForkedWorker", None)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        monkeypatch.setattr(tightfit.planner.compare, "ForkedWorker", Killed)
        work()
    (result,) = results
    assert len(planned) == len(result.plans) == 2 * len(budgets)
    for mine, other in zip(result.plans, compared.plans):
        assert mine.status == other.status
        assert mine.peak_bytes <= mine.budget_bytes
        assert mine.step_seconds == pytest.approx(other.step_seconds, rel=0.01)
        assert mine.gap == pytest.approx(other.gap, abs=0.01)


def test_an_error_of_the_other_process_is_raised_here(profile, budgets, monkeypatch):
    original = ModelPlanner.plan

    def plan(self, budget, **options):
        if budget == budgets[1]:
            raise ValueError("for the test")
        return original(self, budget, **options)

    monkeypatch.setattr(ModelPlanner, "plan", plan)
    with pytest.raises(ValueError, match="for the test"):
        compare(profile, budgets, ["solver"])


def test_an_interrupted_comparison_keeps_what_the_other_process_sent(profile, budgets, monkeypatch):
    """All of it, though a pipe holds no more than one of its plans."""
    beside = []

    class Seen(ForkedWorker):
        def __enter__(self):
            beside.append(self)
            return super().__enter__()

    def answers(self, budget, **options):
        yield from cells(self, budget, **options)
        if beside and not beside[0]._process and budget == budgets[0]:
            sent.write_bytes(b"")
            time.sleep(600)

    waited = []

    def interrupt(what, done, total):
        if waited:
            raise KeyboardInterrupt
        if beside:
            until = time.monotonic() + PATIENCE
            while not sent.exists() and time.monotonic() < until:
                time.sleep(0.01)
            waited.append(done)

    cells = tightfit.planner.compare._ComparisonTable._cells
    with tempfile.TemporaryDirectory() as folder:
        sent = Path(folder) / "sent"
        monkeypatch.setattr(tightfit.planner.compare._ComparisonTable, "_cells", answers)
        monkeypatch.setattr(tightfit.planner.compare, "ForkedWorker", Seen)
        monkeypatch.setattr(tightfit.planner.compare, "our_cores", lambda: 2)
        result = compare(profile, budgets, ["solver"], progress=interrupt)
        assert sent.exists()
    assert waited == [2]
    # The two before, one here, and both of the other process.
    assert [plan.budget_bytes for plan in result.plans] == [*budgets[:2], *budgets[4:]]


@pytest.mark.slow
def test_an_interrupted_comparison_waits_for_nothing_that_the_other_process_goes_on_to_make(
    profile, budgets, monkeypatch, tmp_path
):
    """Each of its plans comes before the patience with the one before is over."""
    beside, planned = [], []

    class Seen(ForkedWorker):
        def __enter__(self):
            beside.append(self)
            return super().__enter__()

    def answers(self, budget, **options):
        for cell in cells(self, budget, **options):
            yield cell
            if beside and not beside[0]._process:
                (tmp_path / "sent").touch()
                for _ in range(3000):  # a minute
                    time.sleep(0.02)
                    yield cell

    def interrupt(what, done, total):
        if beside:
            until = time.monotonic() + PATIENCE
            while not (tmp_path / "sent").exists() and time.monotonic() < until:
                time.sleep(0.01)
            raise KeyboardInterrupt

    cells = tightfit.planner.compare._ComparisonTable._cells
    monkeypatch.setattr(tightfit.planner.compare._ComparisonTable, "_cells", answers)
    monkeypatch.setattr(tightfit.planner.compare, "ForkedWorker", Seen)
    monkeypatch.setattr(tightfit.planner.compare, "our_cores", lambda: 2)
    result = compare(profile, budgets, ["solver"], progress=interrupt, planned=planned.append)
    assert (tmp_path / "sent").exists()
    assert [plan.budget_bytes for plan in result.plans] == [budgets[1], *budgets[-2:]]
    assert len(planned) < 3000


def test_ctrl_c_while_plans_are_put_in_order_costs_none(profile, budgets, monkeypatch):
    seen, monotone = [], tightfit.planner.compare._ComparisonTable.monotone

    def interrupted(self):
        if not seen:
            seen.append(self)
            raise KeyboardInterrupt
        return monotone(self)

    monkeypatch.setattr(tightfit.planner.compare._ComparisonTable, "monotone", interrupted)
    result = compare(profile, budgets[-2:], ["mebp"])
    assert len(seen) == 1
    assert [plan.budget_bytes for plan in result.plans] == budgets[-2:]


def test_ctrl_c_in_the_last_plan_here_does_not_wait_for_the_other_process(profile, budgets, monkeypatch):
    """The planner makes its best plan of it; the display raises it again."""
    seen, plan = [], ModelPlanner.plan

    def interrupted(self, budget, **options):
        if budget in budgets[:2]:
            time.sleep(600)
        if budget == budgets[2]:
            seen.append(budget)
        return plan(self, budget, **options)

    def interrupt(what, done, total):
        if seen:
            raise KeyboardInterrupt

    monkeypatch.setattr(ModelPlanner, "plan", interrupted)
    monkeypatch.setattr(tightfit.planner.compare, "our_cores", lambda: 2)
    result = compare(profile, budgets, ["solver"], progress=interrupt)
    assert [plan.budget_bytes for plan in result.plans] == budgets[2:]
