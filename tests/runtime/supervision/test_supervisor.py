"""The process that a run keeps alive beside its training process: what it holds, and what becomes of a run that it
watches.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tightfit.profiles.api import load_profile
from tightfit.runtime.common import interpreter
from tightfit.runtime.supervision import supervisor
from tightfit.runtime.supervision.cgroup import MemoryCgroup

MIB = 1 << 20
ALLOWED = 25 * MIB
"""that a supervisor may hold"""
OURS = ("tightfit",)


@pytest.fixture(scope="module")
def begin(work, cache):
    """Start `tightfit run` of the tiny model as a person does: the process."""

    def start(out: Path, *words: str, plan: Path = work / "plan.json") -> subprocess.Popen[str]:
        command = interpreter.command(
            "tightfit.runtime.cli.main", "run", str(plan), "--data", "random", "-o", str(out), *words
        )
        environment = os.environ | {"PYTHONPATH": interpreter.python_path()}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )

    return start


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def memory_group(pid: int) -> str:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line for line in lines if ":memory:" in line or line.startswith("0::"))


def training_began(process: subprocess.Popen[str], out: Path, steps: int = 1) -> int:
    """Wait for the first steps; the training process."""
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    [training] = children(process.pid)
    return training


@pytest.mark.slow
def test_only_a_small_process_is_alive_beside_the_training_process(begin, tmp_path):
    """The command's own process: it has given back what preparing the run took, and is in the training process's
    cgroup.
    """
    process = begin(tmp_path / "out", "--steps", "100000")
    try:
        training = training_began(process, tmp_path / "out", 20)
        held, mapped = resident(process.pid), Path(f"/proc/{process.pid}/maps").read_text()
        assert held < ALLOWED
        assert "libtorch" not in mapped
        assert "numpy" not in mapped
        if (group := MemoryCgroup.create(64 * MIB)) is not None:
            group.remove()
            assert "tightfit-" in memory_group(process.pid)
        assert memory_group(process.pid) == memory_group(training)
        process.send_signal(signal.SIGINT)  # the step is finished and saved
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 4
    assert not out
    told = err.splitlines()[-1]
    assert told.startswith("tightfit: interrupted after step ")
    assert told.endswith("continue with --resume")
    assert not any((tmp_path / "out" / name).exists() for name in ("job", "order", "show"))


def test_the_report_has_each_process_and_their_sum(begin, work, tmp_path):
    process = begin(tmp_path / "out", "--steps", "3", "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    report = json.loads(out)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    floor = load_profile(work / "profile.json").device.floor
    training, watching = report["processes"]["training"], report["processes"]["supervisor"]
    assert watching["predicted"] == floor.supervisor_bytes < ALLOWED
    assert 0.8 * watching["predicted"] < watching["measured"] <= watching["predicted"]
    for kind in ("predicted", "measured"):
        assert report["peak_bytes"][kind] == training[kind] + watching[kind]
    assert report["peak_bytes"]["measured"] <= report["peak_bytes"]["predicted"]
    assert report["preparation_bytes"] > watching["measured"]
    assert report["program_bytes"] is None
    # A cgroup that this test's process made is given back by the process that left it.
    assert not list(Path("/sys/fs/cgroup").glob(f"**/tightfit-{process.pid}-*"))


def test_it_imports_the_standard_library_alone():
    def imported(first: str) -> set[str]:
        told = "print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
        return set(json.loads(subprocess.check_output([sys.executable, "-c", f"import sys, json{first};{told}"])))

    assert imported(", tightfit.runtime.supervision.supervisor") - imported("") - sys.stdlib_module_names == set(OURS)


def test_what_it_measures_of_itself_is_what_one_holds():
    told = int(subprocess.check_output(supervisor.command("--measure"), text=True))
    assert 5 * MIB < told < ALLOWED


def test_a_run_whose_supervisor_is_killed_is_saved(begin, tmp_path):
    out = tmp_path / "out"
    process = begin(out, "--steps", "100000")
    training = training_began(process, out)
    process.kill()
    process.communicate()
    begun = time.monotonic()
    while Path(f"/proc/{training}/stat").exists() and time.monotonic() < begun + 60:
        time.sleep(0.05)
    [checkpoint] = out.glob("checkpoint-*")
    reached = int(checkpoint.name.partition("-")[2])
    again = begin(out, "--steps", str(reached + 1), "--resume", "--json")
    answer, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert json.loads(answer)["resumed_step"] == reached
