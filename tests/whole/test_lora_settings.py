"""LoRA settings against transformers + peft + autograd: losses and gradients, and whole runs that peft and a second run start
from.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference import (
    CONFIGS,
    adapted_by_peft,
    checkpoint,
    errors_above,
    gradients_of,
    loss_of,
    peft_model,
)
from safetensors.torch import load_file
from tiny_models import byte_level_tokenizer
from traced import fake_decoder, loss_and_gradients, random_batch, trace_decoder, trace_step

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.profiles.api import profile
from tightfit.profiles.models.lora import LoraConfig
from tightfit.runtime.engine.training.adapter import CONFIG, WEIGHTS, adapter_config, adapter_key
from tightfit.runtime.session.launch import run

pytest.importorskip("peft")
pytest.importorskip("transformers")

SETTINGS = {
    "attention": LoraConfig(rank=4, targets="attention"),
    "the middle layer": LoraConfig(rank=4, layers=(1,)),
    "the last layer's attention": LoraConfig(rank=4, targets="attention", layers=(2,)),
    "one projection": LoraConfig(rank=4, targets="gate_proj"),
    "ranks by pattern, rank-stabilised": LoraConfig(
        rank=4, rslora=True, rank_pattern={"q_proj": 7, r"layers\.1\..*": 2}, alpha_pattern={"down_proj": 5.0}
    ),
}
BATCH, SEQ = 3, 24


@pytest.mark.slow_but_for("attention-llama", "one projection-gemma3_text", "ranks by pattern, rank-stabilised-llama")
@pytest.mark.parametrize(
    ("setting", "family"),
    [
        ("attention", "llama"),
        ("the middle layer", "gemma3_text"),
        ("the last layer's attention", "llama"),
        ("one projection", "gemma3_text"),
        ("ranks by pattern, rank-stabilised", "llama"),
    ],
)
def test_loss_and_gradients_are_those_of_peft(setting: str, family: str) -> None:
    config = CONFIGS[family]
    module = fake_decoder(config, torch.float32, SETTINGS[setting])
    traced = trace_step(module, BATCH, SEQ)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(p.shape, generator=generator) * (0.5 if p.dim() == 1 else 0.08)
        for name, p in module.named_parameters()
    }
    batch = random_batch(config, BATCH, SEQ)
    own_loss, own = loss_and_gradients(traced, weights, batch)
    model = peft_model(config, weights, adapter_config(module.lora, [], "base"), torch.float32)
    loss = loss_of(model, batch["input_ids"], batch["labels"])
    loss.backward()
    assert own_loss == pytest.approx(float(loss.detach()), rel=1e-5)
    exact = gradients_of(model)
    assert {adapter_key(name) for name in own} == exact.keys()
    assert errors_above(1e-4, {adapter_key(name): gradient for name, gradient in own.items()}, exact) == {}


def test_layers_below_the_first_pair_take_no_part_in_the_backward() -> None:
    traced = trace_decoder(CONFIGS["llama"], torch.float32, BATCH, SEQ, LoraConfig(rank=4, layers=(2,)))
    programs = {program.name: program for program in traced.programs}

    def backward(layer: int) -> list[str]:
        (found,) = (one for one in traced.layers if one.name == f"model.layers.{layer}")
        return [one.target for one in programs[found.program].operators if one.phase == "backward"]

    assert not backward(0)
    assert not backward(1)
    assert "tightfit.lora_backward" in backward(2)


@pytest.mark.slow
def test_a_run_of_some_layers_and_a_second_one_that_starts_from_its_adapter(tmp_path: Path, cache: Path) -> None:
    folder, data = tmp_path / "model", tmp_path / "data.jsonl"
    model = checkpoint(CONFIGS["llama"], folder)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    data.write_text("".join(json.dumps({"text": f"the {word} fox jumps"}) + "\n" for word in ("quick", "lazy", "red")))
    first = profile(
        str(folder),
        batch=2,
        seq=16,
        dtype="float32",
        base="16bit",
        lora_rank=4,
        lora_targets="attention",
        lora_layers="1-2",
        rank_pattern={"q_proj": 6},
        rslora=True,
    )
    smallest = plan(first, ModelPlanner(first).minimum().peak_bytes)
    run(smallest, data, steps=3, out=tmp_path / "out", lr=1e-2)
    place = tmp_path / "out" / "adapter"
    told = json.loads((place / CONFIG).read_text())
    assert told["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert (told["layers_to_transform"], told["rank_pattern"], told["use_rslora"]) == ([1, 2], {"q_proj": 6}, True)
    tensors = load_file(place / WEIGHTS)
    adapted_by_peft(model, place)
    # Its settings are those of the second run, which goes on from its values.
    second = profile(str(folder), batch=2, seq=16, dtype="float32", base="16bit", adapter=place)
    assert [tensor.name for tensor in second.tensors] == [tensor.name for tensor in first.tensors]
    smallest = plan(second, ModelPlanner(second).minimum().peak_bytes)
    run(smallest, data, steps=1, out=tmp_path / "again", lr=0.0, weight_decay=0.0, adapter=place)
    again = load_file(tmp_path / "again" / "adapter" / WEIGHTS)
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
