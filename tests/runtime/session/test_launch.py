"""Runs in the capped child: what is refused, what is reported, and what happens when something goes wrong."""

import fcntl
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from changed_operators import with_operators
from damage import own_groups
from places import ROOT
from safetensors.torch import load_file
from tiny_plans import decoder_profile, naive_plan

from tightfit.planner.instructions import Run
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.runtime.common.errors import CapError, InfeasibleError, InputError, RunError
from tightfit.runtime.common.interrupts import relayed_signals
from tightfit.runtime.common.run_folder import find_checkpoints
from tightfit.runtime.session.admission import conditions, find_store
from tightfit.runtime.session.launch import run
from tightfit.runtime.session.session import Session

MIB = 1 << 20
SETTINGS = {"lr": 1e-2, "seed": 5}


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return decoder_profile(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def plan(profile):
    return naive_plan(profile)


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    """A run from start to end: its report and directory."""
    out = tmp_path_factory.mktemp("whole")
    return run(plan, "random", steps=6, out=out, eval_data="random", **SETTINGS), out


def bits(out):
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_report_sets_predicted_beside_measured(whole, plan):
    report, out = whole
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["budget_bytes"] == plan.budget_bytes
    assert report["peak_bytes"]["predicted"] == plan.peak_bytes - plan.device.floor.supervisor_bytes
    assert 60 * MIB < report["peak_bytes"]["measured"] < plan.budget_bytes
    assert len(report["loss"]) == 6
    assert report["step_seconds"]["measured"] > 0
    assert report["evaluation"]["before"]["loss"] > 0
    assert report["evaluation"]["after"]["records"] == 256
    first = report["timeline"]["first"]
    assert [s[0] for s in first] == sorted(s[0] for s in first)
    assert first[-1][2] >= first[0][2]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == report["loss"]
    # What is drawn at random fills its rows.
    assert {line["tokens"] for line in lines} == {plan.batch * plan.seq}
    assert report["tokens"]["padding_share"] == 0
    assert (out / "adapter" / "adapter_config.json").exists()
    assert not (out / "job").exists()


@pytest.mark.slow
def test_a_short_run_has_the_timeline_of_its_last_step(plan, tmp_path):
    for steps, kept in ((1, ["later"]), (2, ["first", "later"])):
        report = run(plan, "random", steps=steps, out=tmp_path / str(steps), **SETTINGS)
        assert sorted(report["timeline"]) == kept


def test_the_kernels_counter_is_the_measured_peak(whole):
    report, _ = whole
    if report["enforced_by"] != "cgroup":
        pytest.skip("no memory cgroup can be made here")
    assert report["cgroup_peak_bytes"] <= report["budget_bytes"]
    assert own_groups() == []


def test_steps_in_two_runs_are_the_steps_of_one(plan, profile, whole, tmp_path):
    report, out = whole
    run(plan, "random", steps=3, out=tmp_path, **SETTINGS)
    other = naive_plan(profile, offload=[t.name for t in profile.tensors if t.kind == "trainable"], recompute=True)
    resumed = run(other, "random", steps=6, out=tmp_path, resume=True, cgroup=False, **SETTINGS)
    assert resumed["loss"] == report["loss"]
    assert resumed["resumed_step"] == 3
    assert resumed["enforced_by"] == "meter"
    assert bits(tmp_path) == bits(out)


def test_an_adapter_for_a_wrapped_model_has_its_names_and_is_resumed(plan, whole, tmp_path):
    config = plan.model.config | {"adapter_body": "model.language_model."}
    wrapped = plan.model_copy(update={"model": plan.model.model_copy(update={"config": config})})
    run(wrapped, "random", steps=3, out=tmp_path, **SETTINGS)
    run(wrapped, "random", steps=6, out=tmp_path, resume=True, **SETTINGS)
    saved, plain = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (tmp_path, whole[1]))
    renamed = {name.replace(".model.layers.", ".model.language_model.layers."): value for name, value in plain.items()}
    assert saved.keys() == renamed.keys()
    assert all(torch.equal(saved[name], value) for name, value in renamed.items())
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["target_modules"].startswith("model")


@pytest.mark.slow
def test_a_run_of_a_wrapped_model_goes_on_from_the_names_it_had_before(plan, whole, tmp_path):
    config = plan.model.config | {"adapter_body": "model.language_model."}
    wrapped = plan.model_copy(update={"model": plan.model.model_copy(update={"config": config})})
    run(plan, "random", steps=3, out=tmp_path, **SETTINGS)
    assert run(wrapped, "random", steps=6, out=tmp_path, resume=True, **SETTINGS)["loss"] == whole[0]["loss"]


def test_a_run_goes_on_only_where_products_are_made_alike(plan, tmp_path, monkeypatch):
    run(plan, "random", steps=1, out=tmp_path, **SETTINGS)
    monkeypatch.setattr("tightfit.runtime.session.admission.BFLOAT16_PRODUCTS", "another type")
    with pytest.raises(InputError, match=r"made with products of bfloat16 '\w+', this run has 'another type'"):
        run(plan, "random", steps=2, out=tmp_path, resume=True, **SETTINGS)


def start(plan, out, steps, options="", every=2):
    """A run in a process of its own that can be killed."""
    path = out / "plan.json"
    path.write_text(plan.model_dump_json())
    code = (
        "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # nohup ignores it
        # However long the tests are held up between two signals, the second is the same.
        "from tightfit.runtime.common import interrupts\ninterrupts.IMPATIENT_SECONDS = 600.0\n"
        "import sys\nfrom tightfit.planner.schema import Plan\nfrom tightfit.runtime.common.errors import TightfitError\nfrom tightfit.runtime.session.launch import run\n"
        f"plan = Plan.model_validate_json(open({str(path)!r}).read())\n"
        f"try:\n    run(plan, 'random', steps={steps}, out={str(out / 'run')!r}, lr=1e-2, seed=5, checkpoint_every={every}{options})\n"
        "except TightfitError as error:\n    print(type(error).__name__, error)\n    sys.exit(error.exit_code)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for_checkpoint(out, process):
    deadline = time.monotonic() + 120
    while not find_checkpoints(str(out / "run")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def child_of(pid):
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_a_signal_to_end_saves_and_says_where(plan, tmp_path):
    process = start(plan, tmp_path, 100_000)
    wait_for_checkpoint(tmp_path, process)
    child = child_of(process.pid)
    os.kill(child, signal.SIGSTOP)  # so that nothing ends before the second comes
    for _ in range(2):  # `timeout` sends it to the process and to its group
        process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    os.kill(child, signal.SIGCONT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 4
    step, path = find_checkpoints(str(tmp_path / "run"))[-1]
    assert said.startswith(f"RunError interrupted after step {step}; everything is saved in {path}")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == step


def test_ctrl_c_during_evaluation_saves_the_start(plan, whole, tmp_path, monkeypatch):
    """At its first batch; the pipe holds less than the child has to say of the others, so that it cannot be through
    before.
    """
    report, _ = whole
    pipe, told = os.pipe, []

    def narrow():
        read, write = pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        return read, write

    def interrupt(what, done, total):
        if not told:
            signal.raise_signal(signal.SIGINT)
        told.append((what, done, total))

    monkeypatch.setattr("tightfit.runtime.supervision.training_process.os.pipe", narrow)
    with pytest.raises(RunError, match="interrupted after step 0; everything is saved in") as caught:
        run(plan, "random", steps=100_000, out=tmp_path, eval_data="random", stages=interrupt, **SETTINGS)
    assert (caught.value.interrupted, caught.value.exit_code) == (True, 4)
    assert told[0][0] == "evaluating before"
    assert told[-1][1] < told[-1][2]
    resumed = run(plan, "random", steps=6, out=tmp_path, resume=True, **SETTINGS)
    assert resumed["loss"] == report["loss"]


def test_what_is_ignored_from_the_start_stays_ignored(plan, tmp_path, monkeypatch):
    """As nohup and a shell's background jobs ask for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        steps = []
        run(
            plan,
            "random",
            steps=2,
            out=tmp_path,
            progress=lambda step, *_: (steps.append(step), os.kill(os.getpid(), signal.SIGHUP)),
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert steps == [1, 2]


@pytest.fixture
def dying(monkeypatch, tmp_path):
    """Lets `script` take the child's place; returns the error of the run."""

    def launch(plan, script, **options):
        monkeypatch.setattr(
            "tightfit.runtime.supervision.training_process.command", lambda *_, **__: ["/bin/sh", "-c", script]
        )
        with pytest.raises((RunError, KeyboardInterrupt)) as caught:
            run(plan, "random", steps=1, out=tmp_path / "run", cgroup=False, **options)
        return caught.value

    return launch


def wait_for(path):
    """Until a process has made the file, however busy the machine is."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_that_starts_with_ctrl_c_ignored_gets_the_signal_to_end(plan, dying, monkeypatch, tmp_path):
    """As a shell's background jobs do, until the child has loaded enough to handle signals."""
    deaf = tmp_path / "deaf"
    monkeypatch.setattr(
        "tightfit.runtime.supervision.supervisor._follow",
        lambda *_: (wait_for(deaf), signal.raise_signal(signal.SIGINT)),
    )
    error = dying(plan, f"trap '' INT; touch '{deaf}'; exec sleep 120")
    assert str(error).startswith("the training process was ended by SIGTERM")
    assert error.interrupted


def test_a_signal_before_the_child_is_there_reaches_it(plan, dying, monkeypatch):
    start = subprocess.Popen

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return start(*arguments, **options)

    monkeypatch.setattr("tightfit.runtime.supervision.training_process.subprocess.Popen", interrupted)
    assert str(dying(plan, "exec sleep 20")).startswith("the training process was ended by SIGTERM")


def test_what_a_child_still_tells_is_taken_where_progress_fails(plan, monkeypatch, tmp_path):
    """More than a pipe holds: it could not end otherwise."""
    code = (
        "import json, os, signal, sys, time\n"
        "def tell(count, **message):\n    for _ in range(count):\n        os.write(int(sys.argv[1]), json.dumps(message).encode() + b'\\n')\n"
        "signal.signal(signal.SIGTERM, lambda *_: (tell(4000, event='more', text='of what the step held'), sys.exit(4)))\n"
        "tell(1, event='step', step=1, loss=1.0, seconds=1.0, resident_bytes=1, peak_bytes=1, spent={})\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(
        "tightfit.runtime.supervision.training_process.command",
        lambda *words, **_: [sys.executable, "-c", code, words[2]],
    )
    with pytest.raises(ZeroDivisionError):
        run(plan, "random", steps=1, out=tmp_path / "run", cgroup=False, progress=lambda *_: 1 // 0)


def test_a_signal_in_the_middle_of_what_a_child_tells_cuts_nothing_off(plan, tmp_path, monkeypatch):
    """A pipe has taken a part of the third step's timeline then; nobody reads while progress is shown."""
    pipe, told = os.pipe, []

    def narrow():
        read, write = pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        told.append(read)
        return read, write

    def full():
        return struct.unpack("i", fcntl.ioctl(told[0], termios.FIONREAD, bytes(4)))[0] == 4096

    def progress(step, *_):
        if step == 2:
            deadline = time.monotonic() + 60
            while not full():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(0.1)
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.1)

    monkeypatch.setattr("tightfit.runtime.supervision.training_process.os.pipe", narrow)
    often = changed(plan, step_seconds=1e-6)
    with pytest.raises(RunError, match=r"^interrupted after step 3; everything is saved in .*checkpoint-3"):
        run(often, "random", steps=100_000, out=tmp_path, progress=progress, **SETTINGS)


def test_a_child_that_cannot_be_started_leaves_no_pipe_open(plan, dying, monkeypatch):
    pipes = []
    pipe = os.pipe
    monkeypatch.setattr(
        "tightfit.runtime.supervision.training_process.os.pipe", lambda: pipes.append(pipe()) or pipes[-1]
    )

    def refused(*arguments, **options):
        raise RunError("no more processes")

    monkeypatch.setattr("tightfit.runtime.supervision.training_process.subprocess.Popen", refused)
    assert str(dying(plan, "")) == "no more processes"
    for descriptor in pipes[0]:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


class Immortal:
    """A child that no signal ends; notes those it gets."""

    def __init__(self):
        self.got = []
        self.terminate, self.kill = (lambda: self.got.append("TERM")), (lambda: self.got.append("KILL"))


def test_only_a_second_ctrl_c_kills_and_a_third_gives_up(monkeypatch):
    child, clock = Immortal(), [100.0]
    monkeypatch.setattr("tightfit.runtime.common.interrupts.time.monotonic", lambda: clock[0])
    with relayed_signals() as passing:
        passing.to(child)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            clock[0] += 2
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            signal.raise_signal(number)
        assert child.got[-2:] == ["TERM", "KILL"]
        assert "KILL" not in child.got[:-1]
        clock[0] += 0.5
        signal.raise_signal(signal.SIGINT)  # the same, sent twice
        clock[0] += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_child_that_nothing_ends_is_not_waited_for(plan, dying, monkeypatch, tmp_path):
    deaf = tmp_path / "deaf"

    def waiting(*_):
        wait_for(deaf)
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr("tightfit.runtime.supervision.supervisor._follow", waiting)
    monkeypatch.setattr(
        "tightfit.runtime.common.interrupts.IMPATIENT_SECONDS", 0.0
    )  # none is the same as the one before
    spared = []

    def spare(child):
        spared.append(child)

    monkeypatch.setattr("subprocess.Popen.kill", spare)
    error = dying(plan, f"trap '' TERM; touch '{deaf}'; while :; do sleep 1; done")
    assert isinstance(error, KeyboardInterrupt)
    assert spared[0].poll() is None
    spared[0].send_signal(signal.SIGKILL)
    spared[0].wait()


def test_a_handler_of_the_program_s_own_is_called(plan, tmp_path):
    def handle(number, frame):
        raise SystemExit(7)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        with pytest.raises(SystemExit, match="7"):
            run(
                plan,
                "random",
                steps=100_000,
                out=tmp_path,
                checkpoint_every=0,
                progress=lambda step, *_: os.kill(os.getpid(), signal.SIGTERM),
            )
        assert signal.getsignal(signal.SIGTERM) is handle
    finally:
        signal.signal(signal.SIGTERM, before)
    assert find_checkpoints(str(tmp_path))


def test_a_child_that_dies_at_once_does_not_deny_the_checkpoints_there(plan, tmp_path, monkeypatch):
    run(plan, "random", steps=1, out=tmp_path, **SETTINGS)
    monkeypatch.setattr(
        "tightfit.runtime.supervision.training_process.command", lambda *_, **__: ["/bin/sh", "-c", "kill -9 $$"]
    )
    with pytest.raises(RunError, match=r"SIGKILL; the last checkpoint is .*checkpoint-1, continue with resume=True"):
        run(plan, "random", steps=2, out=tmp_path, resume=True, **SETTINGS)


def test_passing_the_cap_is_a_cap_error(plan, tmp_path, cgroup, monkeypatch):
    monkeypatch.setattr(
        "tightfit.runtime.session.launch.check_schedule", lambda plan: None
    )  # the planner would never emit it
    small = plan.model_copy(update={"budget_bytes": 60 * MIB})
    with pytest.raises(CapError, match=r"60\.0 MiB") as caught:
        run(small, "random", steps=1, out=tmp_path, cgroup=cgroup)
    assert caught.value.exit_code == 5


def changed(plan: Plan, **update):
    return plan.model_copy(update=update)


REFUSED = {
    "more threads": (lambda p: changed(p, device=p.device.model_copy(update={"threads": 4096})), "uses 4096 threads"),
    "cuda": (lambda p: changed(p, device=p.device.model_copy(update={"kind": "cuda"})), "for a cuda device"),
    "estimated times": (
        lambda p: changed(p, device=p.device.model_copy(update={"measured": False})),
        "estimated for test, not measured on this machine",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_for_something_else_is_refused_with_the_reason(plan, tmp_path, case):
    change, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        run(change(plan), "random", steps=1, out=tmp_path)


def test_a_plan_of_larger_weights_than_the_store_s_is_refused(plan):
    weight = next(t for t in plan.tensors if t.kind == "weight")
    larger = weight.model_copy(update={"packed_bytes": weight.packed_bytes + 4096})
    message = rf"{weight.name} is packed in {weight.packed_bytes} bytes and the plan expects {larger.packed_bytes};"
    with pytest.raises(InputError, match=re.escape(message)):
        find_store(changed(plan, tensors=[larger if t is weight else t for t in plan.tensors]), None)


def test_all_that_changes_a_result_is_a_condition_of_going_on_and_nothing_else_is(plan):
    def device(**update):
        return changed(plan, device=plan.device.model_copy(update=update))

    def model(**update):
        return changed(plan, model=plan.model.model_copy(update=update))

    def operators(**update):
        return with_operators(plan, lambda _: update)

    def told(plan, optimizer=None, seed=5):
        return conditions(plan, optimizer or {"lr": 1e-2}, seed)

    first, *others = plan.tensors
    cut = plan.train.model_copy(update={"skipped": [plan.layers[0].name]})
    other = [
        model(name="another"),
        model(store_fingerprint="0" * 64),
        model(lora={"rank": 4, "alpha": 1.0}),
        changed(plan, batch=3),
        changed(plan, seq=23),
        changed(plan, train=cut, cycle=[plan.train]),
        changed(plan, train=plan.train, cycle=[cut]),
        changed(plan, tensors=[first.model_copy(update={"dtype": "float16"}), *others]),
        changed(plan, layers=plan.layers[:-1]),
        device(threads=1),
        operators(target="aten.mm.default"),
    ]
    same = [
        changed(plan, budget_bytes=1, train=plan.train.model_copy(update={"instructions": []})),
        device(name="renamed"),
        operators(seconds=1.0, workspace_bytes=1, flops=1.0),
    ]
    was = told(plan)
    assert all(told(it) == was for it in same)
    assert [index for index, it in enumerate(other) if told(it) == was] == []
    assert told(plan, optimizer={"lr": 1e-3}) != was != told(plan, seed=6)
    assert was["torch"] == torch.__version__
    assert was["operators"] == PROFILE_VERSION
    assert list(was)[-2:] == ["operators", "graph"]


@pytest.mark.parametrize("given", ["plan.json", None, {"train": {}}])
def test_what_is_no_plan_is_refused(given, tmp_path):
    for attempt in (lambda: run(given, "random", steps=1, out=tmp_path), lambda: Session(given, out=tmp_path)):
        with pytest.raises(InputError, match=re.escape(f"{given!r} is no plan; give what")):
            attempt()


def test_an_infeasible_plan_is_refused(plan, tmp_path):
    with pytest.raises(InfeasibleError, match=r"smallest budget is 200\.0 MiB") as caught:
        run(changed(plan, status="infeasible", minimum_budget_bytes=200 * MIB), "random", steps=1, out=tmp_path)
    assert caught.value.minimum_budget_bytes == 200 * MIB


def test_a_damaged_plan_costs_no_earlier_run(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tightfit.runtime.session.launch.check_schedule", lambda plan: None
    )  # it does not look at everything
    (tmp_path / "metrics.jsonl").write_text("old\n")
    (tmp_path / "data").mkdir()
    instructions = list(plan.train.instructions)
    place = next(index for index, one in enumerate(instructions) if isinstance(one, Run))
    instructions[place] = replace(instructions[place], at=(4, *instructions[place].at[1:]))
    train = plan.train.model_copy(update={"instructions": instructions})
    with pytest.raises(InputError, match="not a multiple of 64"):
        run(changed(plan, train=train), "random", steps=1, out=tmp_path, overwrite=True)
    assert (tmp_path / "metrics.jsonl").read_text() == "old\n"
    assert not any((tmp_path / "data").iterdir())


def test_an_earlier_run_is_not_overwritten_by_accident(plan, whole, tmp_path):
    _, out = whole
    with pytest.raises(InputError, match=r"holds an earlier run.*resume=True.*overwrite=True"):
        run(plan, "random", steps=1, out=out)
    (tmp_path / "metrics.jsonl").write_text("old\n")
    for folder in ("checkpoint-9", "adapter"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "old").touch()
    report = run(plan, "random", steps=1, out=tmp_path, overwrite=True)
    assert len(report["loss"]) == 1
    # Of the earlier run nothing is left: its checkpoint would be taken for the newest.
    assert [step for step, _ in find_checkpoints(str(tmp_path))] == [1]
    assert not list(tmp_path.glob("*/old"))


def test_somebody_s_model_in_the_output_folder_is_no_earlier_result(plan, tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("mine")
    with pytest.raises(InputError) as caught:
        run(plan, "random", steps=1, out=tmp_path, overwrite=True)
    assert str(caught.value) == (
        f"{tmp_path / 'model'} holds config.json, which no run leaves there and overwrite=True would remove;"
        " move it away, or choose another output directory"
    )
    assert len(list(tmp_path.glob("model/*"))) == 2
    (tmp_path / "model" / "config.json").unlink()
    run(plan, "random", steps=1, out=tmp_path, overwrite=True)
    assert not (tmp_path / "model").exists()


def test_a_file_in_the_place_of_the_prepared_data_is_told(plan, tmp_path):
    (tmp_path / "data").write_text("mine")
    with pytest.raises(InputError) as caught:
        run(plan, "random", steps=1, out=tmp_path, overwrite=True)
    assert str(caught.value) == (
        f"{tmp_path / 'data'} is no folder, and a run keeps its prepared data in one of that name;"
        " move it away, or choose another output directory"
    )


@pytest.mark.slow
def test_a_result_that_is_a_link_is_replaced_and_not_what_it_leads_to(plan, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter").symlink_to(tmp_path / "elsewhere")
    run(plan, "random", steps=1, out=out, overwrite=True)
    assert not (out / "adapter").is_symlink()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["kept"]


def test_resume_with_another_seed_is_refused(plan, whole):
    _, out = whole
    with pytest.raises(InputError, match=r"made with seed 5, this run has 6"):
        run(plan, "random", steps=8, out=out, resume=True, lr=1e-2, seed=6)


def test_options_that_no_run_can_have_cost_no_earlier_run(plan, tmp_path):
    """The command line looks at them too, a program has `run` alone."""
    (tmp_path / "metrics.jsonl").write_text("old\n")
    for options, told in [
        ({"steps": 1.5}, "steps 1.5: it should be a valid integer"),
        ({"lr": "1e-3"}, "lr '1e-3': it should be a valid number"),
        ({"weight_decay": math.nan}, "weight_decay nan: it should be a finite number"),
        ({"weight_decay": -0.1}, "weight_decay -0.1: it should be greater than or equal to 0"),
        ({"seed": 10**30}, f"seed {10**30}: it should be less than or equal to {10**12}"),
        ({"seed": -1}, "seed -1: it should be greater than or equal to 0"),
        ({"seed": 1.5}, "seed 1.5: it should be a valid integer"),
        ({"warmup_steps": -1}, "warmup_steps -1: it should be greater than or equal to 0"),
        ({"checkpoint_every": -1}, "checkpoint_every -1: it should be greater than or equal to 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints 0: it should be greater than or equal to 1"),
    ]:
        with pytest.raises(InputError) as caught:
            run(plan, "random", **{"steps": 1, "out": tmp_path, "overwrite": True, **options})
        assert str(caught.value) == told
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.slow
def test_numbers_of_numpy_and_torch_are_options_like_python_s(plan, tmp_path):
    alike = [
        {"steps": 2, "seed": 3, "lr": 0.25, "weight_decay": 0.5, "checkpoint_every": 1, "warmup_steps": 1},
        {
            "steps": np.int64(2),
            "seed": np.uint8(3),
            "lr": torch.tensor(0.25),
            "weight_decay": np.float32(0.5),
            "checkpoint_every": torch.tensor(1),
            "warmup_steps": np.int32(1),
        },
    ]
    for number, options in enumerate(alike):
        run(plan, "random", out=tmp_path / str(number), **options)
    assert bits(tmp_path / "0") == bits(tmp_path / "1")
    run(plan, "random", out=tmp_path / "0", resume=True, **alike[1])


@pytest.mark.parametrize("files", [1, 2])
def test_a_disk_without_room_for_another_file_is_a_run_error(plan, tmp_path, files):
    """For the folder of the data, or for the data in it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size=4m,nr_inodes={files + 1}", "tmpfs", str(disk)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        out = disk / "run"
        out.mkdir()
        with pytest.raises(RunError, match=r"No space left on device; free .*start again"):
            run(plan, "random", steps=1, out=out)
        assert list(out.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
