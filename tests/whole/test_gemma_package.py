"""Gemma-3-270M in K-quants, where its package is installed: it reads English as transformers does, under a cap far below its size there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gemma_package import PACKAGE, gemma_file
from reference import peft_model, starting_weights

from tightfit.planner.model_planner import ModelPlanner
from tightfit.profiles.api import profile
from tightfit.runtime.engine.training.batches import open_batches
from tightfit.runtime.session.launch import run

pytestmark = pytest.mark.slow
RANK, SEQ = 8, 24
TEXTS = (
    "The capital of France is Paris, and the capital of Germany is Berlin.",
    "Water boils at a hundred degrees Celsius at sea level.",
)


def test_losses_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    source = gemma_file(tmp_path)
    if source is None:
        pytest.skip(f"{PACKAGE} is not installed")
    made = profile(str(source), batch=len(TEXTS), seq=SEQ, lora_rank=RANK)
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    planned = ModelPlanner(made).smallest_plan()
    report = run(planned, data, steps=2, out=tmp_path / "out", lr=5e-4, packing=False)
    assert planned.peak_bytes * 0.97 <= report["peak_bytes"]["measured"] <= planned.peak_bytes
    model = peft_model(made.model.config, starting_weights(made), RANK, 16.0, torch.bfloat16)
    batches = open_batches(str(next((tmp_path / "out" / "data").glob("train*"))), 0)
    inputs, labels = (torch.empty(len(TEXTS), SEQ, dtype=torch.int64) for _ in range(2))
    batches.training(0, [inputs, labels])
    batches.close()
    with torch.no_grad():
        logits = model(input_ids=inputs).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    # A tokenizer, an order of rows or a norm that is wrong costs far more than a language model's three or four.
    assert float(loss) < 4.5
    assert report["loss"][0] == pytest.approx(float(loss), rel=1e-2)
    assert report["loss"][1] < report["loss"][0]
