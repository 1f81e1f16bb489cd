"""LoRA settings against transformers + peft + autograd: losses and gradients."""

from __future__ import annotations

import pytest
import torch
from reference import (
    CONFIGS,
    errors_above,
    gradients_of,
    loss_of,
    peft_model,
)
from traced import fake_decoder, loss_and_gradients, random_batch, trace_decoder, trace_step

from tightfit.profiles.models.lora import LoraConfig
from tightfit.runtime.engine.training.adapter import adapter_config, adapter_key

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
