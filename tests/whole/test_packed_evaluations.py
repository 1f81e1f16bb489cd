"""Evaluations in which samples share rows against those with a row for each sample, and against transformers and peft
on one sample at a time: the same loss, accuracy and counts, by every schedule and after a resume.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_families import FAMILIES
from reference import adapted_by_peft, checkpoint, evaluated_apart, stored_weights, take
from tiny_models import byte_level_tokenizer

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.planner.schema import Plan
from tightfit.profiles.api import profile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.adapter import BODY
from tightfit.runtime.engine.training.batches import TokenBatches
from tightfit.runtime.results.evaluation import evaluate
from tightfit.runtime.session.launch import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("cache"),
]
BATCH, SEQ, STEPS = 3, 44, 4
COUNTS = ("accuracy", "questions", "records")
TRAINING: dict[str, Any] = {"lr": 5e-3, "eval_every": 2, "checkpoint_every": 2, "keep_best": True}
WORDS = ("positive", "negative", "they've 12", "the moon", "no")


def held_out() -> list[dict[str, Any]]:
    """Questions with two to five choices, and other samples between them."""
    questions = [
        {
            "prompt": f"{'lazy dog? ' * (number % 3)}fox {number}? ",
            "choices": WORDS[: 2 + number % 4],
            "answer": number % 2,
        }
        for number in range(11)
    ]
    texts = [{"prompt": "over ", "completion": word * (1 + place)} for place, word in enumerate(WORDS)]
    return [*questions[:5], *texts, *questions[5:], {"text": "The quick brown fox jumps."}]


@dataclass(frozen=True)
class Case:
    """A model of transformers, its plans, and a run whose evaluations share rows."""

    model: Any
    config: dict[str, Any]
    planned: Plan
    streaming: Plan
    """which reads weights again and again"""
    data: Path
    out: Path
    report: dict[str, Any]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Case:
    folder = tmp_path_factory.mktemp("packed")
    config = FAMILIES["Llama, no scaling"] | {"vocab_size": 320}
    model = checkpoint(config, folder / "model")
    byte_level_tokenizer().save(str(folder / "model" / "tokenizer.json"))
    data = folder / "held-out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in held_out()))
    made = profile(str(folder / "model"), batch=BATCH, seq=SEQ, lora_rank=4, dtype="float32")
    planned = plan(made, 1 << 40)
    streaming = ModelPlanner(made).plan(planned.peak_bytes, policy="mebp")
    assert planned.evaluate
    assert streaming.evaluate
    assert not planned.evaluate.read_bytes
    assert streaming.evaluate.read_bytes
    out = folder / "out"
    report = run(planned, data, steps=STEPS, out=out, eval_data=data, packing=True, **TRAINING)
    return Case(model, config, planned, streaming, data, out, report)


def records_of(case: Case) -> Path:
    return next((case.out / "data").glob("evaluate*.records"))


@pytest.mark.slow
def test_the_result_is_that_of_rows_of_their_own(case: Case) -> None:
    packed = evaluate(case.planned, case.data, adapter=case.out, packing=True)
    apart = evaluate(case.planned, case.data, adapter=case.out)
    assert packed["packing"] == {"on": True, "refused": None}
    assert apart["packing"] == {"on": False, "refused": None}
    assert packed["loss"] == pytest.approx(apart["loss"], rel=1e-6)
    assert packed["perplexity"] == math.exp(packed["loss"])
    assert {name: packed[name] for name in COUNTS} == {name: apart[name] for name in COUNTS}
    assert (packed["questions"], packed["records"]) == (11, sum(len(row.get("choices", "1")) for row in held_out()))
    assert 0 < packed["accuracy"] < 1
    # As the run with packing says, to the bit, and by another schedule.
    after = case.report["evaluation"]["after"]
    streaming = evaluate(case.streaming, case.data, adapter=case.out, packing=True)
    for other in (after, streaming):
        assert {name: other[name] for name in ("loss", *COUNTS)} == {name: packed[name] for name in ("loss", *COUNTS)}
    for one in (packed, streaming):
        assert one["peak_bytes"]["measured"] <= one["peak_bytes"]["predicted"]


def test_rows_are_shared_and_the_last_batch_is_short(case: Case) -> None:
    counts = {}
    for packing in (True, False):
        batches = TokenBatches(str(records_of(case)), 0, packing=packing)
        inputs = [torch.empty(BATCH, SEQ, dtype=torch.int64) for _ in range(3)]
        counts[packing] = batches.evaluation_count(inputs)
        last = batches.evaluation(counts[packing] - 1, inputs)
        assert 0 < len({record.begin // SEQ for record in last}) < BATCH or not packing
        batches.close()
    assert counts[True] < 0.7 * counts[False]


def test_transformers_says_the_same_of_one_sample_at_a_time(case: Case) -> None:
    take(
        case.model,
        stored_weights(case.planned.model.store),
        case.config,
        case.planned.model.config.get("adapter_body", BODY),
    )
    adapted = adapted_by_peft(case.model, case.out / "adapter")
    loss, accuracy, questions = evaluated_apart(adapted, records_of(case))
    after = case.report["evaluation"]["after"]
    assert after["loss"] == pytest.approx(loss, rel=1e-5)
    assert (after["accuracy"], after["questions"]) == (accuracy, questions)


def test_metrics_and_report_tell_it(case: Case) -> None:
    lines = [json.loads(line) for line in (case.out / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if "eval_loss" in line}
    assert list(found) == [0, 2, 4]
    assert [one["step"] for one in case.report["evaluations"]] == [0, 2, 4]
    for step, when in ((0, "before"), (4, "after")):
        told = case.report["evaluation"][when]
        assert (found[step]["eval_loss"], found[step]["eval_accuracy"]) == (told["loss"], told["accuracy"])
        assert told["records"] == 43
    apart = run(case.planned, case.data, steps=1, out=case.out.parent / "apart", eval_data=case.data)
    assert apart["evaluation"]["before"]["loss"] == pytest.approx(case.report["evaluation"]["before"]["loss"], rel=1e-6)
    assert apart["evaluation"]["before"]["accuracy"] == case.report["evaluation"]["before"]["accuracy"]


@pytest.mark.slow
def test_a_run_that_was_begun_before_evaluations_shared_rows_goes_on(case: Case, tmp_path: Path) -> None:
    """Its checkpoint has the results of rows of their own; what is trained does not depend on them."""
    run(case.planned, case.data, steps=2, out=tmp_path, eval_data=case.data, packing=True, **TRAINING)
    apart = evaluate(case.planned, case.data)
    path = tmp_path / "checkpoint-2" / "state.json"
    state = json.loads(path.read_text())
    for name in ("loss", *COUNTS):
        state["evaluated before"]["result"][name] = apart[name]
    path.write_text(json.dumps(state))
    report = run(
        case.planned, case.data, steps=STEPS, out=tmp_path, eval_data=case.data, packing=True, resume=True, **TRAINING
    )
    assert report["resumed_step"] == 2
    assert report["evaluation"]["before"]["loss"] == apart["loss"]
    assert report["evaluation"]["after"]["loss"] == case.report["evaluation"]["after"]["loss"]
    weights = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / weights).read_bytes() == (case.out / "adapter" / weights).read_bytes()
    with pytest.raises(InputError, match=r"made with samples that share rows \(--packing\); resume with the same"):
        run(case.planned, case.data, steps=6, out=tmp_path, eval_data=case.data, resume=True, **TRAINING)
