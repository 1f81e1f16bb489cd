"""`tightfit train` on a tiny model: the adapter is that of profile, plan and run by hand, to the bit; interrupted, it
goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from damage import CONFIG, ROWS, lines
from tiny_models import byte_level_tokenizer, random_weights, write_directory

import tightfit
from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.run_folder import find_checkpoints

pytestmark = pytest.mark.usefixtures("cache")
STEPS, SEQ = 60, 32
"""the samples take up to 21 positions"""
LORA = ("--lora-rank", "4", "--lora-dropout", "0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train")
    write_directory(path / "model", CONFIG, random_weights(CONFIG), tokenizer=byte_level_tokenizer())
    (path / "data.jsonl").write_text(lines(ROWS))
    return path


def command(*words: object) -> list[str]:
    return interpreter.command("tightfit.runtime.cli.main", *map(str, words))


def started(*words: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": interpreter.python_path()}
    return subprocess.Popen(
        command(*words), env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out, err


def adapter(out: Path) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def trained(folder: Path, cache: Path) -> tuple[Path, dict[str, Any], str]:
    """(output folder, the object that --json prints, what was said beside it) of the command, started as people do."""
    file = folder / "mine.yaml"
    file.write_text("model: model\ndata: data.jsonl\nlora-rank: 4\nlora_dropout: 0.1\nsteps: 3\nwait: false\n")
    words = ("train", "--config", file, "--steps", STEPS, "--batch", 2, "--lr", "5e-3", "-o", "out", "--json")
    out, err = ended(started(*words, cwd=folder))
    return folder / "out", json.loads(out), err


@pytest.mark.slow
def test_it_does_what_the_three_commands_do(trained: Any, folder: Path, tmp_path: Path) -> None:
    out, told, said = trained
    assert f"sequence: {SEQ} tokens; the longest sample of the data has " in said
    assert "are available" in said or "are left of" in said
    profile, plan = tmp_path / "profile.json", tmp_path / "plan.json"
    ended(started("profile", folder / "model", "--seq", SEQ, "--batch", 2, *LORA, "-o", profile))
    ended(started("plan", profile, "--memory", "1GiB", "-o", plan))
    words = ("--data", folder / "data.jsonl", "--steps", STEPS, "--lr", 5e-3, "-o", tmp_path / "out")
    ended(started("run", plan, *words))
    assert adapter(out) == adapter(tmp_path / "out")
    # The data were tokenised once, to choose the length; the run took the tokens.
    assert "taking the tokens of data.jsonl" in said
    assert "tokenising" not in said
    assert not (out / ".tokens").exists()
    records = [(where / "data" / "train.records").read_bytes() for where in (out, tmp_path / "out")]
    # The header says where the data came from, in the words of the command.
    assert records[0][4096:] == records[1][4096:]
    assert json.loads((out / "report.json").read_text()) == told["report"]
    assert told["report"]["loss"] == json.loads((tmp_path / "out" / "report.json").read_text())["loss"]
    assert told["profile"]["fingerprint"] == tightfit.load_profile(out / "profile.json").fingerprint
    made = tightfit.load_plan(out / "plan.json")
    assert (told["plan"]["fingerprint"], told["plan"]["budget_bytes"]) == (made.fingerprint, made.budget_bytes)
    assert told["report"]["budget_bytes"] == made.budget_bytes


def test_the_budget_covers_what_is_alive_while_training(trained: Any) -> None:
    """The process that planned is the supervisor now, whose memory counts; no program stands beside it."""
    report = trained[1]["report"]
    assert set(report["processes"]) == {"supervisor", "training"}
    assert report["processes"]["supervisor"]["measured"] < 20 << 20
    assert report.get("program_bytes") is None
    assert report["peak_bytes"]["measured"] <= report["peak_bytes"]["predicted"]


@pytest.mark.slow
def test_interrupted_it_goes_on_with_the_folder_alone(trained: Any, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (
        "train",
        folder / "model",
        "--data",
        folder / "data.jsonl",
        "--batch",
        2,
        *LORA,
        "--lr",
        5e-3,
        "--no-wait",
        "-o",
        out,
    )
    run = started(*words, "--steps", 1_000_000, "--checkpoint-every", 1)
    while not (found := find_checkpoints(str(out))) and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate()
    assert run.returncode == 4, said
    assert "continue with --resume" in said
    reached = find_checkpoints(str(out))[-1][0]
    assert found[0][0] <= reached < STEPS
    before = (out / "plan.json").read_bytes()
    _, said = ended(started("train", "--resume", "-o", out, "--steps", STEPS, cwd=tmp_path))
    assert (out / "plan.json").read_bytes() == before
    assert adapter(out) == adapter(trained[0])
    finished, said = ended(started("train", "--resume", "-o", out, "--json", cwd=tmp_path))
    assert f"already done: {out} has all {STEPS} steps; give more --steps to go on" in said
    assert len(json.loads(finished)["report"]["loss"]) == STEPS


def test_a_program_trains_with_the_same_result(trained: Any, folder: Path, tmp_path: Path) -> None:
    options = {"batch": 2, "lora_rank": 4, "lora_dropout": 0.1, "steps": STEPS, "lr": 5e-3}
    said: set[str] = set()
    report = tightfit.train(
        str(folder / "model"),
        folder / "data.jsonl",
        tmp_path,
        memory="1GiB",
        stages=lambda what, done, total: said.add(what),
        **options,
    )
    assert report["budget_bytes"] == 1 << 30
    # The data were tokenised once here as well.
    assert f"taking the tokens of {folder / 'data.jsonl'}" in said
    assert not any("tokenising" in what for what in said)
    assert not (tmp_path / ".tokens").exists()
    assert adapter(tmp_path) == adapter(trained[0])
    with pytest.raises(TypeError, match=r"train\(\) has no option 'tokens'"):
        tightfit.train(str(folder / "model"), "random", tmp_path, steps=3, tokens=tmp_path)
    with pytest.raises(TypeError, match=r"train\(\) has no option 'stepz'"):
        tightfit.train(str(folder / "model"), "random", tmp_path, stepz=3)
    with pytest.raises(InputError, match="steps is missing: give the number of steps, or epochs"):
        tightfit.train(str(folder / "model"), "random", tmp_path)
    with pytest.raises(InputError, match="lr -1: it should be greater than or equal to 0"):
        tightfit.train(str(folder / "model"), "random", tmp_path, steps=1, lr=-1)
