"""Other programs on a run's cores: what is counted, when it is said, and a run beside a busy loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tightfit.planner.io import save_plan
from tightfit.planner.plan import plan
from tightfit.profiles.api import load_profile
from tightfit.runtime.common import interpreter
from tightfit.runtime.supervision import contention
from tightfit.runtime.supervision.contention import Contention, CoreUsage, usage_of

EXPECTED = 0.125


class Machine:
    """A clock, and the usage of a process of two threads whose steps take as long as they are told to."""

    def __init__(self, threads: int = 2, *, busy_machine: bool = False) -> None:
        self.now, self.ran, self.waited, self.busy = 0.0, 0.0, 0.0, 0.0
        self.contention = Contention(
            threads=threads,
            expected_seconds=EXPECTED,
            busy_machine=busy_machine,
            usage=lambda: CoreUsage(ran=self.ran, waited=self.waited, busy=self.busy),
            clock=lambda: self.now,
        )

    def steps(self, count: int, seconds: float, *, waited: float = 0.0, others: float = 0.0) -> list[str]:
        """Take steps during which both threads run; `waited` and `others` are cores. What was said."""
        said = []
        for _ in range(count):
            self.now += seconds
            self.ran += 2 * seconds * (1 - waited / 2)
            self.waited += waited * seconds
            self.busy += 2 * seconds * (1 - waited / 2) + others * seconds
            said.append(self.contention.step(seconds))
        return [text for text in said if text is not None]


def test_a_run_that_others_slow_down_says_so_once_and_when_it_is_over() -> None:
    machine = Machine()
    assert machine.steps(97, 0.125) == []
    (said,) = machine.steps(28, 0.5, waited=0.5, others=0.5)
    assert said.startswith(
        "other programs use 0.5 of the cores: the last 4 steps took 0.500 s each where 0.125 s are expected, and the run's"
        " threads waited 0.250 s of each for a core; end the other program, or let it wait; results stay the same to the bit"
    )
    assert "`tightfit profile --threads 1`" in said
    assert machine.steps(48, 0.125) == ["the cores are free again: a step takes 0.125 s"]
    figures = machine.contention.figures
    assert figures == pytest.approx({"steps": 28, "step_seconds": 0.5, "waited_seconds": 0.25, "others_cores": 0.5})


def test_it_is_not_said_again_and_again() -> None:
    machine = Machine()
    said = [machine.steps(8, 0.5, waited=cores, others=cores) for cores in 20 * [0.5, 0.0]]
    assert len([text for some in said for text in some if text.startswith("other programs")]) == 3  # in 160 s


def test_the_cores_are_free_again_only_where_nobody_is_in_the_way() -> None:
    """Others stay, and steps become as quick as expected for a while; then they go."""
    machine, crowded = Machine(), {"waited": 0.5, "others": 0.5}
    assert len(machine.steps(20, 0.5, **crowded)) == 1
    assert machine.steps(600, 0.14, **crowded) == []
    assert machine.steps(40, 0.125) == ["the cores are free again: a step takes 0.125 s"]
    figures = machine.contention.figures
    assert figures is not None
    assert 20 <= figures["steps"] < 25, "those that were as quick as expected do not count"


def test_seconds_expected_beside_other_programs_are_not_those_of_free_cores() -> None:
    """What was rehearsed beside others is as it was then; once they have gone a step takes less, which is said once."""
    machine = Machine(busy_machine=True)
    assert machine.steps(80, 0.125, waited=0.5, others=0.5) == []
    assert machine.steps(400, 0.03125) == [
        "the cores are free: a step takes 0.031 s, the mean of the last 64; beside other programs 0.125 s were expected"
    ]


@pytest.mark.parametrize(
    "way",
    [
        {"seconds": 0.125, "waited": 0.5, "others": 0.5},  # as fast as planned
        {"seconds": 0.5, "waited": 0.0, "others": 1.0},  # others have cores to themselves
        {"seconds": 0.5, "waited": 0.5, "others": 0.0},  # its own threads wait for each other
        {"seconds": 0.5, "waited": 0.05, "others": 0.05},
    ],
)
def test_what_is_not_the_fault_of_others_is_not_said(way: dict[str, float]) -> None:
    machine = Machine()
    said = machine.steps(100, **way)
    assert not [line for line in said if line.startswith("other programs")]
    assert machine.contention.figures is None


@pytest.mark.parametrize(("seconds", "count"), [(0.2, 1), (0.08, 1), (0.13, 0)])
def test_steps_that_differ_though_nothing_is_in_the_way_are_told_of_once(seconds: float, count: int) -> None:
    said = Machine().steps(100, seconds)
    assert len(said) == count
    assert all(
        f"a step takes {seconds:.3f} s, " in line and "where 0.125 s are expected, and no other" in line
        for line in said
    )


def test_one_thread_is_not_told_to_be_fewer() -> None:
    (said,) = Machine(threads=1).steps(10, 0.5, waited=0.5, others=0.5)
    assert "--threads" not in said


def test_where_the_system_tells_nothing_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contention, "PROC", tmp_path)
    assert usage_of(os.getpid()) is None
    silent = Contention(threads=2, expected_seconds=EXPECTED, usage=lambda: None, clock=iter(range(100)).__next__)
    assert [silent.step(9.0) for _ in range(10)] == [None] * 10


def test_sums_of_pytorch_depend_on_the_number_of_threads() -> None:
    """Why a run does not go over to fewer threads."""
    had, differ = torch.get_num_threads(), 0
    try:
        for seed in range(8):
            numbers = torch.randn(1_000_001, generator=torch.Generator().manual_seed(seed))
            sums = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                sums.append(float(numbers.sum()))
            differ += sums[0] != sums[1]
    finally:
        torch.set_num_threads(had)
    assert differ


BUSY = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); print(flush=True)\nwhile True: pass"


@pytest.fixture
def busy() -> Iterator[int]:
    """A busy loop, pinned to one of our cores: the core."""
    core = min(os.sched_getaffinity(0))
    loop = subprocess.Popen([sys.executable, "-c", BUSY, str(core)], stdout=subprocess.PIPE)
    assert loop.stdout
    loop.stdout.readline()
    yield core
    loop.kill()
    loop.wait()
    loop.stdout.close()


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not count waiting threads")
def test_what_is_counted_is_what_a_process_beside_a_busy_loop_waits(busy: int) -> None:
    other = subprocess.Popen([sys.executable, "-c", BUSY, str(busy)], stdout=subprocess.PIPE)
    assert other.stdout
    try:
        other.stdout.readline()
        before = usage_of(other.pid)
        time.sleep(2)
        after = usage_of(other.pid)
        assert before is not None
        assert after is not None
        ran, waited = after.ran - before.ran, after.waited - before.waited
        assert ran + waited == pytest.approx(2, rel=0.3)
        assert waited > 0.3
        assert after.busy - before.busy > ran
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not count waiting threads")
def test_a_run_beside_a_busy_loop_notices_it(busy: int, work: Path, tmp_path: Path) -> None:
    """With one thread, on the core of the loop alone, so that it waits for it whatever else the machine does."""
    measured = load_profile(work / "profile.json")
    device = measured.device.model_copy(update={"threads": 1})
    # As planned for a machine that is faster, so that steps are slow however fast this one is.
    fast = [
        program.model_copy(
            update={"operators": [one.model_copy(update={"seconds": one.seconds / 100}) for one in program.operators]}
        )
        for program in measured.programs
    ]
    made = plan(measured.model_copy(update={"device": device, "programs": fast}), 1 << 40, policy="keep-all")
    words = ["run", str(save_plan(made, tmp_path / "plan.json")), "--data", "random", "--steps", "300"]
    command = interpreter.command("tightfit.runtime.cli.main", *words, "-o", str(tmp_path / "out"), "--json")
    child = subprocess.Popen(
        ["taskset", "--cpu-list", str(busy), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": interpreter.python_path()},
    )
    said, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors
    held = json.loads(said)["contention"]
    assert held["step_seconds"] > 1.2 * made.step_seconds
    assert 0 < held["waited_seconds"] < held["step_seconds"]
    assert "other programs use" in errors
    assert "end the other program" in errors
