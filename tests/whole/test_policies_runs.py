"""Policies in the capped child: runs that are resumed, long runs, and runs that are killed at any point."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import ROOT
from safetensors.torch import load_file
from tiny_plans import CONFIG, decoder_profile, device, naive_plan

from tightfit.planner.model_planner import ModelPlanner
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.session.launch import run

SETTINGS = {"lr": 1e-3, "seed": 5, "cgroup": False}
UNLIMITED = 1 << 40


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    """Four layers; one thread, since operators this small only wait for a second one."""
    made = decoder_profile(tmp_path_factory.mktemp("store"), config=CONFIG | {"num_hidden_layers": 4}, batch=8, seq=12)
    return ModelPlanner(made.model_copy(update={"device": device(threads=1)}))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mezo", "lcsb"])
def test_a_resumed_run_is_the_run_that_never_stopped(planner, policy, tmp_path):
    """Stopped in the middle of a cycle; evaluated before and after; an adapter either way."""
    plan = planner.plan(UNLIMITED, policy=policy)
    whole = run(plan, "random", steps=7, out=tmp_path / "whole", eval_data="random", **SETTINGS)
    run(plan, "random", steps=3, out=tmp_path / "part", **SETTINGS)
    resumed = run(plan, "random", steps=7, out=tmp_path / "part", resume=True, **SETTINGS)
    assert (resumed["resumed_step"], resumed["loss"]) == (3, whole["loss"])
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "part")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    moved = load_file(adapters[0])
    assert all(value.any() for name, value in moved.items() if "lora_B" in name)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    own = [
        [x["seconds"] for x in lines[1:] if x["step"] % len(plan.steps) == place] for place in range(len(plan.steps))
    ]
    assert whole["step_seconds"]["measured"] == pytest.approx(statistics.mean(map(statistics.median, own)))
    assert whole["policy"] == policy
    assert whole["evaluation"]["before"]["loss"] != whole["evaluation"]["after"]["loss"]
    assert whole["peak_bytes"]["measured"] <= whole["budget_bytes"]
    with pytest.raises(InputError, match=r"made with (another optimizer|layers without a backward)"):
        run(planner.plan(UNLIMITED, policy="mebp"), "random", steps=9, out=tmp_path / "part", resume=True, **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mezo", "lcsb"])
def test_memory_does_not_grow_over_200_steps(policy, tmp_path):
    """What the process holds after a step, from the tenth on."""
    shallow = decoder_profile(tmp_path / "store", batch=1, seq=12)
    plan = ModelPlanner(shallow.model_copy(update={"device": device(threads=1)})).plan(UNLIMITED, policy=policy)
    run(plan, "random", steps=200, out=tmp_path / "run", checkpoint_every=40, **SETTINGS)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held = [line["resident_bytes"] for line in lines]
    assert len(held) == 200
    assert max(held[150:]) <= max(held[10:50]) + (128 << 10)


def spill_files(pid: int, directory: Path) -> list[int]:
    """Bytes of the files without a name that a process holds open in a directory, once they have any."""
    found = []
    with contextlib.suppress(OSError):  # a process that has ended meanwhile
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target, facts = path.readlink(), path.stat()
                if target.is_relative_to(directory) and facts.st_nlink == 0 and facts.st_size:
                    found.append(facts.st_size)
    return found


def first_step(out):
    return (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 0


MOMENTS = {
    "loading": lambda out, told: bool(told),
    "first step": lambda out, told: first_step(out),
    "saving": lambda out, told: bool(list(out.glob(".checkpoint-*"))) or bool(list(out.glob("checkpoint-*"))),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_leaves_no_spill_file(planner, moment, tmp_path):
    """Whenever it is killed: the file has no name, so the kernel takes it back with the process."""
    profile = planner.profile
    plan = naive_plan(profile, offload=[t.name for t in profile.tensors if t.kind == "trainable"])
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    out = tmp_path / "run"
    code = (
        "from tightfit.planner.schema import Plan\nfrom tightfit.runtime.session.launch import run\n"
        f"plan = Plan.model_validate_json(open({str(tmp_path / 'plan.json')!r}).read())\n"
        f"run(plan, 'random', steps=100_000, out={str(out)!r}, checkpoint_every=1, keep_checkpoints=3, cgroup=False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 120
    child, seen = 0, []
    while not (child and seen and MOMENTS[moment](out, seen)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        started = children.read_text().split()
        child = int(started[0]) if started else 0
        seen = seen or (spill_files(child, out) if child else [])
        time.sleep(0.01)
    for pid in (process.pid, child):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert seen[0] >= 2 * sum(t.bytes for t in profile.tensors if t.kind == "trainable")
    known = ("data", "job", "metrics.jsonl", "checkpoint-", ".checkpoint-")
    assert [path.name for path in out.iterdir() if not path.name.startswith(known)] == []
    held = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    assert held < seen[0]
