"""Runs by epochs, evaluated between their steps, ended early: the same bits at every budget and after kill -9."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from in_process import drawn_records
from tiny_plans import decoder_profile, naive_plan

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.run_folder import find_checkpoints
from tightfit.runtime.session.launch import run

SEQ, BATCH = 24, 2
TRAINED = 5
"""training records: an epoch has 2.5 steps, of rows of one sample"""
APART = {"packing": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def profile(folder):
    return decoder_profile(folder / "store")


@pytest.fixture(scope="module")
def plans(profile):
    """Plans that hold as much and as little as they can."""
    trainables = [tensor.name for tensor in profile.tensors if tensor.kind == "trainable"]
    return naive_plan(profile), naive_plan(profile, offload=trainables, recompute=True)


@pytest.fixture(scope="module")
def data(folder):
    return drawn_records(folder / "train.records", TRAINED, 1, seq=SEQ)


@pytest.fixture(scope="module")
def asked(folder):
    """A run that learns its few records by heart, and is the best on others after eight of its steps."""
    held_out = drawn_records(folder / "held_out.records", 3, 2, seq=SEQ)
    return {"epochs": 6.0, "lr": 5e-2, "seed": 5, "eval_data": held_out, "eval_every": 2, "keep_best": True} | APART


@pytest.fixture(scope="module")
def whole(plans, data, asked, folder):
    """A run from its start to its end, and its folder."""
    out = folder / "whole"
    return run(plans[0], data, out=out, **asked), out


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def adapter(out: Path, name: str = "adapter") -> bytes:
    return (out / name / "adapter_model.safetensors").read_bytes()


def untimed(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations, without what differs from run to run."""
    return [one | {"seconds": 0.0} for one in report["evaluations"]]


def test_epochs_become_steps_and_are_told(whole):
    report, out = whole
    assert len(report["loss"]) == 15  # 6 x 5 records in batches of 2
    assert report["epochs"] == 6.0
    steps = [line for line in lines_of(out) if "loss" in line]
    assert [line["epoch"] for line in steps] == [round(0.4 * step, 4) for step in range(1, 16)]
    assert {line["lr"] for line in steps} == {5e-2}
    assert all(before["time"] <= after["time"] for before, after in itertools.pairwise(steps))


def test_evaluations_between_the_steps_are_those_of_runs_that_end_there(whole, plans, data, asked, tmp_path):
    """The loss, and what is kept of the best, to the bit."""
    report, out = whole
    between = [line for line in lines_of(out) if "eval_loss" in line]
    assert [line["step"] for line in between] == [0, 2, 4, 6, 8, 10, 12, 14, 15]
    assert [(one["step"], one["loss"]) for one in report["evaluations"]] == [
        (line["step"], line["eval_loss"]) for line in between
    ]
    assert report["evaluations"][0]["loss"] == report["evaluation"]["before"]["loss"]
    assert report["evaluations"][-1]["loss"] == report["evaluation"]["after"]["loss"]
    losses = {one["step"]: one["loss"] for one in report["evaluations"][1:]}
    best = min(losses, key=losses.__getitem__)
    assert best < 10  # it is neither the last, or this shows nothing, nor too late to end early
    assert report["best"] == {"step": best, "loss": losses[best], "accuracy": None, "path": str(out / "best")}
    short = {"lr": asked["lr"], "seed": asked["seed"], "eval_data": asked["eval_data"]} | APART
    ended = run(plans[0], data, steps=best, out=tmp_path / "short", **short)
    assert ended["evaluation"]["after"]["loss"] == losses[best]
    assert adapter(tmp_path / "short") == adapter(out, "best") != adapter(out)
    assert (out / "best" / "adapter_config.json").read_bytes() == (out / "adapter" / "adapter_config.json").read_bytes()


class Killer:
    """Kills the training process with SIGKILL when it has told something for a number of times."""

    def __init__(self, after: int) -> None:
        self.left = after

    def stage(self, what: str, *told: Any) -> None:
        if what.startswith("evaluating"):
            self()

    def __call__(self, *told: Any) -> None:
        self.left -= 1
        if self.left == 0:
            (child,) = (
                int(word)
                for task in Path("/proc/self/task").iterdir()
                for word in (task / "children").read_text().split()
            )
            os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_wherever_it_is_killed_it_comes_out_the_same(whole, plans, data, asked, tmp_path):
    """Killed at steps and in evaluations, resumed under the other budget in turn, until it gets through."""
    options = asked | {"checkpoint_every": 3}
    report, killed = None, 0
    for attempt in range(20):
        killer = Killer(4 + 3 * attempt)
        resume = bool(find_checkpoints(str(tmp_path)))
        try:
            report = run(
                plans[attempt % 2],
                data,
                out=tmp_path,
                resume=resume,
                overwrite=not resume,
                progress=killer,
                stages=killer.stage,
                **options,
            )
            break
        except RunError as error:
            assert "was ended by SIGKILL" in str(error)
            killed += 1
    assert killed > 2
    assert report is not None
    assert report["loss"] == whole[0]["loss"]
    assert untimed(report) == untimed(whole[0])
    assert adapter(tmp_path) == adapter(whole[1])
    assert adapter(tmp_path, "best") == adapter(whole[1], "best")
    assert report["best"] == whole[0]["best"] | {"path": str(tmp_path / "best")}
    kept = lines_of(tmp_path)
    assert [line["step"] for line in kept if "loss" in line] == list(range(1, 16))
    assert len({line["step"] for line in kept if "eval_loss" in line}) == len(report["evaluations"])


def test_of_questions_the_accuracy_is_told(plans, data, asked, folder, tmp_path):
    questions = drawn_records(folder / "questions.records", 3, 3, questions=True, seq=SEQ)
    report = run(plans[0], data, out=tmp_path, **asked | {"epochs": 0.8, "eval_data": questions})
    assert [one["accuracy"] for one in report["evaluations"]] == [
        report["evaluation"][when]["accuracy"] for when in ("before", "after")
    ]
    assert report["best"]["accuracy"] == report["evaluation"]["after"]["accuracy"]


def test_peft_loads_what_is_kept_of_the_best(whole, plans):
    peft = pytest.importorskip("peft")
    told = peft.PeftConfig.from_pretrained(str(whole[1] / "best"))
    assert told.r == plans[0].model.lora["rank"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "steps is missing: give the number of steps, or epochs"),
        ({"steps": 2, "eval_every": 1}, "eval_every 1: there is nothing to evaluate on; give held-out data"),
        ({"epochs": 1, "eval_every": "1 epoch"}, "eval_every 1 epoch: there is nothing to evaluate on"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_made(plans, data, tmp_path, options, message):
    with pytest.raises(InputError) as caught:
        run(plans[0], data, out=tmp_path / "run", **options)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_columns_of_data_that_have_none_are_refused(plans, tmp_path):
    with pytest.raises(InputError, match=r"^columns question: the data given have none; leave them out$"):
        run(plans[0], "random", steps=1, out=tmp_path, columns={"prompt": "question"})
    assert list(tmp_path.iterdir()) == []


def test_more_steps_than_the_epochs_are_cannot_be_taken_back(whole, plans, data, asked):
    _, out = whole
    with pytest.raises(InputError, match=r"steps 8: the run in .* has reached step 15; give at least 15"):
        run(plans[0], data, out=out, resume=True, **asked | {"epochs": 3.0})
    assert adapter(out)


def test_an_epoch_of_samples_that_share_rows_has_as_many_steps_as_their_batches(plans, data, tmp_path):
    """No two of these samples fit into a row, and the last batch of an epoch has one row less."""
    report = run(plans[0], data, out=tmp_path, epochs=2.0, seed=5, packing=True)
    assert len(report["loss"]) == 2 * 3
    assert report["epochs"] == 2.0
