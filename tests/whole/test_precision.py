"""Runs on weights in 16 bits, 8 bits and the codes of quantised checkpoints, against transformers on what they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_checkpoints import four_bit, write_quantised, zero_points
from reference import CONFIGS, all_layers, loss_of, peft_model, starting_weights, training_batches
from tiny_models import byte_level_tokenizer, random_weights, write_directory, write_gguf

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.profiles.api import profile
from tightfit.runtime.session.launch import run

pytestmark = pytest.mark.usefixtures("cache")
LLAMA = CONFIGS["llama"] | {"num_hidden_layers": 2}
WIDE = LLAMA | {"hidden_size": 256, "intermediate_size": 256}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
BATCH, SEQ, RANK = 2, 24, 4


def model(case: str, folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(path, config, how it is profiled)"""
    weights, tokenizer = random_weights(LLAMA), byte_level_tokenizer()
    if case == "16bit":
        half = {name: weight.half() for name, weight in weights.items()}
        return write_directory(folder, LLAMA, half, tokenizer=tokenizer), LLAMA, {"base": case}
    if case == "Q6_K":
        path = write_gguf(folder / "m.gguf", WIDE, random_weights(WIDE), default=case, tokenizer=tokenizer)
        return path, WIDE, {}
    stated = GPTQ if case == "gptq" else {"quant_method": "bitsandbytes"}
    write_quantised(folder, LLAMA, weights, stated, zero_points if case == "gptq" else four_bit, tokenizer=tokenizer)
    return folder, LLAMA, {"embeddings": "8bit"}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["16bit", "Q6_K", "gptq", "nf4"])
def test_a_run_computes_with_the_values_that_the_file_means(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path, config, options = model(case, folder)
    made = profile(str(path), batch=BATCH, seq=SEQ, lora_rank=RANK, lora_alpha=8.0, dtype="float32", **options)
    kinds = {tensor.packed_format for tensor in made.tensors if tensor.kind == "weight"}
    due = {"16bit": {"float16"}, "Q6_K": {"q6_k"}, "gptq": {"q4_zero", "q8"}, "nf4": {"nf4", "q8"}}
    assert kinds == due[case]
    assert all(
        tensor.unpack_seconds > 0 for tensor in made.tensors if tensor.kind == "weight" and tensor.packed_format != "q8"
    )
    data = tmp_path / "train.jsonl"
    data.write_text(
        "".join(json.dumps({"text": "The quick brown fox jumps over the lazy dog."}) + "\n" for _ in range(3))
    )
    report = run(
        plan(made, ModelPlanner(made).minimum().peak_bytes), data, steps=2, out=tmp_path / "out", packing=False
    )
    reference = peft_model(config, starting_weights(made), all_layers(RANK, 8.0), torch.float32)
    (inputs,) = training_batches(tmp_path / "out", 1, BATCH, SEQ)
    loss = loss_of(reference, *inputs)
    assert report["loss"][0] == pytest.approx(float(loss.detach()), rel=2e-5)
    assert report["peak_bytes"]["measured"] <= report["budget_bytes"]


@pytest.mark.slow
def test_random_weights_are_made_again_in_the_precision_that_was_planned(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA))
    made = profile(str(config), batch=BATCH, seq=SEQ, base="16bit", embeddings="8bit")
    assert made.model.rounding == "random weights, for sizing only: 8bit, 16bit"
    report = run(plan(made, 1 << 40), "random", steps=1, out=tmp_path / "out")
    assert len(report["loss"]) == 1


def test_a_cached_profile_is_of_the_same_precision(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA | {"hidden_size": 32}))
    made = {base: profile(str(config), batch=1, seq=8, base=base, device="zen5-2core") for base in ("4bit", "16bit")}
    assert made["4bit"].fingerprint != made["16bit"].fingerprint
    packed = [sum(t.packed_bytes for t in one.tensors if t.kind == "weight") for one in made.values()]
    assert packed[1] > packed[0]
