"""Runs that cannot start or go on: a full disk, Ctrl-C, the cap; the exit code, the message, and what is left."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from damage import MIB, files, fill, own_groups, small_disk
from places import ROOT

from tightfit.planner.io import save_plan
from tightfit.planner.plan import plan as solve
from tightfit.planner.plan_result import rebudgeted, sealed
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import in_memory
from tightfit.runtime.engine.start import cuda_stubs, page_out
from tightfit.runtime.session.session import Session
from tightfit.runtime.supervision.cgroup import MemoryCgroup


@pytest.fixture(autouse=True)
def cached(cache):
    """Nothing goes into the cache of the person who runs the tests."""


# --- the disk ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_while_saving(refused, tightfit, work, tmp_path):
    with small_disk(tmp_path / "disk", 2 * MIB) as disk:
        out = disk / "out"
        run = ("run", work / "plan.json", "--data", work / "data.jsonl", "-o", out)
        assert tightfit(*run, "--steps", 1)[0] == 0
        before = files(out / "checkpoint-1")
        filler = fill(disk, leave=64 * 1024)  # the data and the job still fit, a checkpoint does not
        said = refused(4, *run, "--steps", 3, "--resume")
        assert "failed: No space left on device; " in said
        assert f"{out / 'checkpoint-1'}" in said
        assert said.endswith("free disk space and continue with --resume")
        assert files(out / "checkpoint-1") == before
        assert sorted(p.name for p in out.glob("*checkpoint*")) == ["checkpoint-1"]
        assert not (out / "job").exists()
        filler.unlink()
        assert tightfit(*run, "--steps", 3, "--resume")[0] == 0


@pytest.mark.slow
def test_a_disk_that_fills_up_between_checkpoints(refused, tightfit, work, tmp_path):
    with small_disk(tmp_path / "disk", 2 * MIB) as disk:
        out = disk / "out"
        run = ("run", work / "plan.json", "--data", work / "data.jsonl", "-o", out, "--checkpoint-every", 0)
        assert tightfit(*run, "--steps", 1)[0] == 0
        metrics = (out / "metrics.jsonl").read_bytes()
        fill(disk, leave=64 * 1024)  # room for the data, the job and some hundred lines of figures
        said = refused(4, *run, "--steps", 3000, "--resume")
        path = out / "metrics.jsonl"
        assert said == f"writing {path} failed: No space left on device; free disk space and continue with --resume"
        assert path.read_bytes().startswith(metrics)
        (disk / "filler").unlink()
        assert tightfit(*run, "--steps", 3, "--resume")[0] == 0
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.slow
def test_a_folder_that_takes_no_files(refused, work, planned, tmp_path):
    with small_disk(tmp_path / "disk", MIB) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        said = refused(2, "run", work / "plan.json", "--data", work / "data.jsonl", "--steps", 1, "-o", disk)
        assert said == f"{disk}: takes no files; make it writable, or choose another output directory"
        with pytest.raises(InputError) as caught, Session(planned, out=disk):
            pass
        assert str(caught.value) == said


def test_a_finished_run_that_is_resumed_answers_with_its_report(refused, tightfit, work, tmp_path):
    out, data = tmp_path / "out", work / "data.jsonl"
    run = ("run", work / "plan.json", "--data", data, "--eval", data, "-o", out, "--checkpoint-every", 1, "--steps")
    code, answer, _ = tightfit(*run, 3, "--json")
    assert code == 0
    before = files(out)
    code, again, said = tightfit(*run, 3, "--resume", "--json")
    assert (code, json.loads(again)) == (0, json.loads(answer))
    assert said.endswith(f"already done: {out} has all 3 steps; give more --steps to go on\n")
    assert tightfit(*run, 3, "--resume")[0] == 0
    said = refused(2, *run, 2, "--resume")
    assert said.startswith(f"--steps 2: the run in {out} has reached step 3; give at least 3, or ")
    assert "made with another optimizer: lr 0.0002, now 0.5; " in refused(2, *run, 3, "--resume", "--lr", 0.5)
    assert files(out) == before
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "other"}\n')
    assert f"made with other data than {other}; " in refused(2, *run, 4, "--resume", "--data", other)
    assert files(out) == before  # the data of the run too


@pytest.mark.slow
def test_a_run_that_ended_before_its_report_is_completed_without_a_step(tightfit, work, tmp_path):
    run = ("run", work / "plan.json", "--data", work / "data.jsonl", "-o", tmp_path, "--steps", 3)
    assert tightfit(*run)[0] == 0
    (tmp_path / "report.json").unlink()
    assert tightfit(*run, "--resume")[0] == 0
    taken = [json.loads(line)["seconds"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["step_seconds"]["measured"] == pytest.approx(sum(taken[1:]) / 2)


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_again(refused, tightfit, work, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "seconds": 0.1}\n')
    run = ("run", work / "plan.json", "--data", work / "data.jsonl", "-o", tmp_path, "--steps", 1)
    said = refused(2, *run, "--resume")
    assert said.endswith(
        "no checkpoint to resume from; give --overwrite in place of --resume to start from the beginning"
    )
    said = refused(2, *run)
    assert "(metrics.jsonl); it has no checkpoint to go on from, replace it with --overwrite, or " in said
    assert "--resume" not in said
    assert tightfit(*run, "--overwrite")[0] == 0


@pytest.mark.slow
def test_the_evaluation_before_the_first_step_is_reported_after_a_resumption(tightfit, work, tmp_path):
    data, other = work / "data.jsonl", tmp_path / "other.jsonl"
    other.write_text(data.read_text().splitlines(keepends=True)[0])
    run = ("run", work / "plan.json", "--data", data, "-o", tmp_path / "out", "--steps")
    assert tightfit(*run, 1, "--eval", data)[0] == 0
    first = json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"]["before"]
    assert tightfit(*run, 2, "--eval", data, "--resume")[0] == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"]
    assert found["before"] == {name: told for name, told in first.items() if name != "peak_bytes"}
    assert found["after"]["loss"] != first["loss"]


@pytest.mark.slow
def test_other_held_out_data_are_evaluated_as_before_the_first_step_too(tightfit, work, tmp_path):
    data, other = work / "data.jsonl", tmp_path / "other.jsonl"
    other.write_text(data.read_text().splitlines(keepends=True)[0])

    def evaluated(folder, steps, evaluation, *words):
        run = ("run", work / "plan.json", "--data", data, "-o", tmp_path / folder)
        code = tightfit(*run, "--steps", steps, "--eval", evaluation, *words)[0]
        assert code == 0
        report = json.loads((tmp_path / folder / "report.json").read_text())
        return {when: told["loss"] for when, told in report["evaluation"].items()}, report["loss"]

    with_data, _ = evaluated("whole", 2, data)
    with_other, losses = evaluated("another", 2, other)
    evaluated("out", 1, data)
    assert evaluated("out", 2, other, "--resume") == (with_other, losses)
    # A run that has taken all of its steps does not answer with what it found for other data, and keeps what they
    # measured.
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert evaluated("out", 2, data, "--resume") == (with_data, losses)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {**report, "evaluation": None} == {**told, "evaluation": None}
    before = files(tmp_path / "out")
    assert evaluated("out", 2, data, "--resume") == (with_data, losses)
    assert files(tmp_path / "out") == before


@pytest.mark.slow
def test_one_run_in_a_folder(refused, tightfit, work, tmp_path):
    run = ("run", work / "plan.json", "--data", work / "data.jsonl", "-o", tmp_path / "out", "--steps")
    assert tightfit(*run, 1)[0] == 0
    before = files(tmp_path / "out")
    lock = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as a run under way holds it
    for words in (["--resume"], ["--overwrite"], []):
        said = refused(2, *run, 2, *words)
        assert said.startswith(f"another run is under way in {tmp_path / 'out'}; ")
    assert files(tmp_path / "out") == before
    os.close(lock)
    assert tightfit(*run, 2, "--resume")[0] == 0


@pytest.mark.slow
def test_a_full_disk_while_spilling(refused, tightfit, work, smallest, tmp_path):
    plan = tmp_path / "plan.json"
    save_plan(rebudgeted(smallest, budget_bytes=1 << 40), plan)
    with small_disk(tmp_path / "disk", 4 * MIB) as disk:
        out = disk / "out"
        run = ("run", plan, "--data", work / "data.jsonl", "-o", out)
        assert tightfit(*run, "--steps", 1)[0] == 0
        before = files(out)
        free = os.statvfs(disk).f_bfree
        filler = fill(disk, leave=120 * 1024)
        said = refused(4, *run, "--steps", 2, "--resume")
        assert said.startswith("the plan spills ")
        assert f" MiB and {out} has " in said
        assert said.endswith("; free disk space, or plan with more memory")
        assert files(out) == before
        filler.unlink()
        assert os.statvfs(disk).f_bfree == free, "something of the spill file stayed"
        assert tightfit(*run, "--steps", 2, "--resume")[0] == 0


def test_a_full_disk_while_profiling_and_planning(refused, work, monkeypatch, tmp_path):
    with small_disk(tmp_path / "disk", MIB) as disk:
        monkeypatch.setenv("TIGHTFIT_CACHE", str(disk / "cache"))
        filler = fill(disk, leave=32 * 1024)
        said = refused(4, "profile", work / "model", "--seq", 8, "-o", disk / "profile.json")
        assert str(disk / "cache" / "stores") in said
        assert "the weight store needs " in said
        assert said.endswith(" free; free some space or set TIGHTFIT_CACHE")
        words = ("plan", work / "profile.json", "--policy", "keep-all", "--memory", "1GiB", "-o", disk / "plan.json")
        said = refused(4, *words)
        assert said.startswith(f"{disk / 'plan.json'}: the disk is full (")
        filler.unlink()
        assert not [
            name for name in files(disk) if not name.startswith(("cache/native/unpack-", "cache/native/dropout-"))
        ]


# --- Ctrl-C and the cap ----------------------------------------------------------------------------------------------


def test_ctrl_c_saves_says_where_and_resumes(tightfit, work, tmp_path):
    run = ["run", work / "plan.json", "--data", work / "data.jsonl", "--checkpoint-every", 0, "--steps"]
    out = tmp_path / "out"
    process = subprocess.Popen(
        # More steps than are taken before the signal comes, however late that is.
        [sys.executable, "-m", "tightfit.runtime.cli.main", *map(str, run), "1000000", "-o", str(out), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, err = process.communicate(timeout=60)
    assert process.returncode == 4, err
    (saved,) = out.glob("*checkpoint*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert step > 0
    told = json.loads(said)["error"]
    assert told["message"].startswith(f"interrupted after step {step}; everything is saved in {saved}, ")
    assert "--resume" in told["message"]
    assert not (out / "adapter").exists()
    # What it had learned can be asked and merged before it goes on.
    merged = tmp_path / "merged.gguf"
    with pytest.warns(UserWarning, match=f"after step {step} is taken, its last checkpoint"):
        code, said, err = tightfit("merge", out, "--format", "gguf", "--adapter-only", "-o", merged, "--json")
    assert code == 0, err
    assert json.loads(said)["adapter"] == str(saved)
    steps = step + 20
    assert tightfit(*run, steps, "-o", out, "--resume")[0] == 0
    assert tightfit(*run, steps, "-o", tmp_path / "whole")[0] == 0
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, tmp_path / "whole")
    ]
    assert len(losses[0]) == steps
    assert losses[0] == losses[1]
    assert files(out / "adapter") == files(tmp_path / "whole" / "adapter")


def too_small(lean):
    """A plan for 40 MiB, which is less than the process takes."""
    floor = lean.device.floor.model_copy(update={"import_peak_bytes": 10 * MIB, "resident_bytes": 10 * MIB})
    device = lean.device.model_copy(update={"floor": floor})
    planned = solve(lean.model_copy(update={"device": device}), 40 * MIB, policy="keep-all")
    assert planned.status == "feasible"
    return planned


def test_files_in_memory_count_against_the_cap(refused, lean, work, tmp_path):
    group = MemoryCgroup.create(64 * MIB)
    if group is None:
        pytest.skip("no memory cgroup can be made here")
    group.remove()
    save_plan(too_small(lean), tmp_path / "plan.json")
    with small_disk(tmp_path / "disk", 4 * MIB) as disk:
        assert in_memory(disk)
        assert not in_memory(Path("/proc"))
        run = ("run", tmp_path / "plan.json", "--data", work / "data.jsonl", "--steps", 1, "-o", disk / "out")
        said = refused(5, *run)
        assert f"; {disk / 'out'} lies in memory (tmpfs), " in said
        assert "choose an output directory on a disk; " in said


def test_a_cap_that_is_passed(refused, tightfit, lean, work, tmp_path):
    """The plan was made with the figures of a machine where Python and PyTorch take 10 MiB."""
    save_plan(too_small(lean), tmp_path / "plan.json")
    out = tmp_path / "out"
    said = refused(5, "run", tmp_path / "plan.json", "--data", work / "data.jsonl", "--steps", 3, "-o", out)
    assert "cap " in said
    assert "40.0 MiB" in said
    assert "profile again on this machine" in said
    measured = max(float(word) for word in said.split() if word.replace(".", "").isdigit() and "." in word)
    assert 39 < measured < 400
    assert list(out.glob("*checkpoint*")) == []
    assert not (out / "job").exists()
    words = ("run", work / "plan.json", "--data", work / "data.jsonl", "--steps", 3, "-o", out)
    assert tightfit(*words)[0] == 0, "a plan that fits goes into the same folder"
    assert own_groups() == []


def test_a_budget_lowered_by_hand(refused, planned, tmp_path):
    """The simulator checks every plan again before it runs."""
    save_plan(sealed(planned.model_copy(update={"budget_bytes": planned.peak_bytes - 1})), tmp_path / "plan.json")
    said = refused(2, "run", tmp_path / "plan.json", "--data", "random", "--steps", 1, "-o", tmp_path / "out")
    assert said.startswith("invalid schedule (budget) at train")
    assert f"{planned.peak_bytes} bytes at the peak, {planned.peak_bytes - 1} allowed; plan again" in said
    assert not (tmp_path / "out").exists()


RUNS = {
    "no samples in the folder": (
        ["--data", "FOLDER"],
        "FOLDER: no .jsonl or .jsonl.gz file in this directory, but 1 file, 1 folder; data are files named .jsonl or .jsonl.gz, ",
    ),
    "missing held-out data": (
        ["--eval", "FOLDER/e.jsonl"],
        "FOLDER/e.jsonl: no such file; data are a .jsonl or .jsonl.gz file, ",
    ),
    "nothing to resume": (["--resume"], "FOLDER/out holds no checkpoint to resume from; leave out --resume to start"),
    "losses explode": (["--lr", "1e30"], "the loss of step 2 is not a number; lower the learning rate (lr 1e+30) or "),
    "output is a file": (["-o", "FOLDER/file"], "FOLDER/file: File exists; choose another output directory"),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_cannot_be(refused, work, tmp_path, case):
    words, message = RUNS[case]
    (tmp_path / "file").write_text("precious")
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    run = ["run", work / "plan.json", "--data", "random", "--steps", 3, "-o", tmp_path / "out"]
    assert refused(2, *run, *words).startswith(message.replace("FOLDER", str(tmp_path)))
    assert (tmp_path / "file").read_text() == "precious"
    assert not list(tmp_path.glob("out/*checkpoint*"))
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pack", "measure"])
def test_ctrl_c_while_profiling(work, tmp_path, stage):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tightfit.runtime.cli.main",
            "profile",
            str(work / "model"),
            "--seq",
            "9",
            "-o",
            str(tmp_path / "p.json"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TIGHTFIT_CACHE": str(tmp_path / "cache")},
        start_new_session=True,
    )
    assert process.stderr is not None
    said = ""
    while f"{stage} …" not in said:
        assert process.poll() is None, said
        said += process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said.splitlines()[-1]) == (4, "tightfit: interrupted")
    assert not (tmp_path / "p.json").exists()
    whole = (
        "cache/stores/model-",
        "cache/native/page_out-",
        "cache/native/cuda-stubs-",
        "cache/native/unpack-",
        "cache/native/dropout-",
    )  # what serves the next call
    assert [name for name in files(tmp_path) if not name.startswith(whole)] == []


@pytest.mark.parametrize(
    ("counted", "variable", "words"),
    [
        ("tables_on_disk", page_out.VARIABLE, "the plan counts on a file in "),
        ("cuda_stubs", cuda_stubs.VARIABLE, "the plan counts on stubs in "),
    ],
)
def test_a_plan_that_counts_on_what_cannot_be(refused, planned, tmp_path, monkeypatch, counted, variable, words):
    monkeypatch.setenv(variable, "")
    floor = planned.device.floor.model_copy(update={counted: True})
    device = planned.device.model_copy(update={"floor": floor})
    save_plan(sealed(planned.model_copy(update={"device": device})), tmp_path / "plan.json")
    said = refused(2, "run", tmp_path / "plan.json", "--data", "random", "--steps", 1, "-o", tmp_path / "out")
    assert said.startswith(words)
    assert said.endswith("profile and plan again")
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_torch(refused, planned, tmp_path):
    device = planned.device.model_copy(update={"torch_version": "1.0.0"})
    save_plan(sealed(planned.model_copy(update={"device": device})), tmp_path / "plan.json")
    said = refused(2, "run", tmp_path / "plan.json", "--data", "random", "--steps", 1, "-o", tmp_path / "out")
    assert said == (
        f"the plan was made with torch 1.0.0 and torch {torch.__version__} is installed; profile and plan again"
    )
    assert not (tmp_path / "out").exists()
