"""Evaluations without training against those of a run: the same figures to the bit, within the predicted memory."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from places import SOURCES
from reference import CONFIGS
from tiny_models import byte_level_tokenizer, random_weights, write_directory

from tightfit.planner.io import save_plan
from tightfit.planner.plan import plan
from tightfit.planner.schema import Plan
from tightfit.profiles.api import profile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.results.evaluation import evaluate
from tightfit.runtime.session.launch import run

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.filterwarnings("ignore:.*tie:UserWarning"),  # peft says that a copy of a tied module comes apart
    pytest.mark.slow,
]

FIGURES = ("loss", "accuracy", "questions", "records")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "held-out.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "Is the fox quick? ", "choices": ["positive", "negative"], "answer": 0},
        {"prompt": "lazy dog? ", "choices": ["positive", "negative"], "answer": 1},
        {"text": "The quick brown fox jumps over the lazy dog."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    config = CONFIGS["llama"]
    folder = tmp_path_factory.mktemp("model")
    write_directory(folder, config, random_weights(config), tokenizer=byte_level_tokenizer())
    made = profile(str(folder), batch=2, seq=32, lora_rank=4, modules_to_save=("lm_head",), dora=True)
    return plan(made, 1 << 40)


@pytest.fixture(scope="module")
def ran(planned: Plan, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder of a run, its report)"""
    out = tmp_path_factory.mktemp("run")
    return out, run(planned, data, steps=3, out=out, lr=1e-2, eval_data=data)


def left() -> list[Path]:
    folder = cache_directory() / "evaluations"
    return list(folder.iterdir()) if folder.exists() else []


@pytest.mark.slow
def test_figures_are_those_of_a_run(planned: Plan, data: Path, ran: tuple[Path, dict[str, Any]]) -> None:
    out, report = ran
    seen: list[tuple[str, int, int]] = []
    after = evaluate(planned, data, adapter=out / "adapter", stages=lambda *one: seen.append(one))
    before = evaluate(planned, data)
    for own, when in ((before, "before"), (after, "after")):
        assert {name: own[name] for name in FIGURES} == {name: report["evaluation"][when][name] for name in FIGURES}
        assert own["perplexity"] == math.exp(own["loss"])
        assert own["questions"] == 2
        assert own["peak_bytes"]["measured"] <= own["peak_bytes"]["predicted"] <= report["peak_bytes"]["predicted"]
        assert own["base"] == report["base"]
    assert before["loss"] != after["loss"]
    assert evaluate(planned, data, adapter=out)["loss"] == after["loss"]  # the run's own folder
    assert ("evaluating", 1, 3) in seen or ("evaluating", 1, 4) in seen
    assert left() == []


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "tightfit.runtime.cli.main", "eval", *words]


@pytest.mark.slow
def test_the_command_line(planned: Plan, data: Path, ran: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    save_plan(planned, tmp_path / "plan.json")
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    words = command(str(tmp_path / "plan.json"), "--data", str(data), "--adapter", str(ran[0] / "adapter"))
    answer = subprocess.run([*words, "--json", "-o", str(tmp_path / "found.json")], env=environment, capture_output=True, text=True, check=True)  # fmt: skip
    told = json.loads(answer.stdout)
    assert {name: told[name] for name in FIGURES} == {name: ran[1]["evaluation"]["after"][name] for name in FIGURES}
    assert set(told["processes"]) == {"training", "supervisor"}
    assert told["peak_bytes"]["measured"] <= told["peak_bytes"]["predicted"]
    assert told["preparation_bytes"] > 0
    assert json.loads((tmp_path / "found.json").read_text()) == told
    assert "evaluating …" in answer.stderr
    text = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^perplexity +{told['perplexity']:.3f} *$", text, re.MULTILINE)
    assert f"{told['accuracy']:.3f} on 2 questions" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "plan.json"]
    assert left() == []
    wrong = subprocess.run(command(str(tmp_path / "plan.json"), "--data", str(data), "--adapter", str(tmp_path)), env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert wrong.returncode == 2
    assert "No such file or directory; give the folder of an adapter" in wrong.stderr
    assert left() == []


def test_an_interrupted_evaluation_leaves_nothing(planned: Plan, data: Path, tmp_path: Path) -> None:
    save_plan(planned, tmp_path / "plan.json")
    many = tmp_path / "many.jsonl"
    many.write_text(data.read_text() * 4000)
    words = command(str(tmp_path / "plan.json"), "--data", str(many))
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("evaluating"):
                break
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        rest = child.stderr.read()
    assert child.returncode == 4
    assert rest.endswith("tightfit: interrupted; start again\n")
    assert left() == []


def test_data_that_no_plan_takes_are_refused(planned: Plan, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a", "completion": "The quick brown fox " * 30}) + "\n")
    with pytest.raises(InputError, match=r"long\.jsonl"):
        evaluate(planned, tmp_path / "long.jsonl")
    assert evaluate(planned, tmp_path / "long.jsonl", truncate=True)["records"] == 1
    assert left() == []
