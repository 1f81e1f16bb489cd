"""Gemma-3-270M in K-quants, where its package is installed: it reads English as transformers does, under a cap far
below its size there.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gemma_package import PACKAGE, gemma_file
from reference import all_layers, loss_of, peft_model, starting_weights, training_batches

from tightfit.planner.model_planner import ModelPlanner
from tightfit.profiles.api import profile
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
    model = peft_model(made.model.config, starting_weights(made), all_layers(RANK, 16.0), torch.bfloat16)
    (inputs,) = training_batches(tmp_path / "out", 1, len(TEXTS), SEQ)
    with torch.no_grad():
        loss = loss_of(model, *inputs)
    # A tokenizer, an order of rows or a norm that is wrong costs far more than a language model's three or four.
    assert float(loss) < 4.5
    assert report["loss"][0] == pytest.approx(float(loss), rel=1e-2)
    assert report["loss"][1] < report["loss"][0]
