"""Kills a run and its training process (SIGKILL) once it has saved a checkpoint, and resumes it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from places import ROOT, SOURCES

from tightfit.planner.io import save_plan
from tightfit.planner.schema import Plan
from tightfit.runtime.common.interpreter import command
from tightfit.runtime.common.run_folder import find_checkpoints


def kill_run(plan: Path, data: Path | str, out: Path, *, after: int, lr: float, checkpoint_every: int) -> int:
    """Run the plan in the file `plan` in a process of its own, without end, and kill it when a checkpoint of step `after` or a
    later one is in `out`. Returns the step of the last checkpoint, when the training process has ended too.
    """
    script = (
        "from tightfit.planner.io import load_plan; from tightfit.runtime.session.launch import run\n"
        f"run(load_plan({str(plan)!r}), {str(data)!r}, steps=1_000_000, out={str(out)!r}, lr={lr}, checkpoint_every={checkpoint_every})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": f"{SOURCES}:{ROOT / 'tests' / 'helpers'}"},
    )
    while not any(step >= after for step, _ in find_checkpoints(str(out))):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    for child in [*map(int, found.split()), process.pid]:
        os.kill(child, signal.SIGKILL)
    process.wait()
    lock = os.open(out, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # which the child has until the kernel has buried it
    os.close(lock)
    return find_checkpoints(str(out))[-1][0]


def run_with_a_kill(plan: Plan, data: str, folder: Path, *, steps: int, lr: float, seed: int) -> Path:
    """Run a plan for so many steps on packed samples, kill it after its second step and resume it; the folder with its results."""
    save_plan(plan, folder / "plan.json")
    out = folder / "killed"
    words = [str(folder / "plan.json"), "--data", data, "--output", str(out), "--packing", "--steps", str(steps)]
    settings = ["--lr", str(lr), "--seed", str(seed), "--no-cgroup", "--checkpoint-every", "2"]
    started = subprocess.Popen(
        [*command("tightfit.runtime.cli.main", "run"), *words, *settings], start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-2").exists():
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    subprocess.run([*command("tightfit.runtime.cli.main", "run"), *words, *settings, "--resume"], check=True)
    return out
