"""LoRA settings against transformers + peft + autograd: losses and gradients, and whole runs that peft and a second run start
from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import CONFIGS, peft_name
from safetensors.torch import load_file
from tiny_models import byte_level_tokenizer
from torch._subclasses import FakeTensorMode
from traced import interpret, random_batch

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.profiles.api import profile
from tightfit.profiles.models.decoder import Decoder
from tightfit.profiles.models.decoder_config import decoder_shape
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.tracing.torch_ops import DECOMPOSITIONS, INFERENCE
from tightfit.profiles.tracing.trace import Trace, trace
from tightfit.runtime.engine.training.adapter import CONFIG, WEIGHTS, adapter_config
from tightfit.runtime.session.launch import run

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

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


def traced_decoder(config: dict[str, Any], lora: LoraConfig) -> tuple[Decoder, Trace]:
    with FakeTensorMode():
        module = Decoder(decoder_shape(config), dtype=torch.float32, lora=lora)
        sample = {name: torch.zeros(BATCH, SEQ, dtype=torch.int64) for name in ("input_ids", "labels")}
    return module, trace(module, sample, decompositions=DECOMPOSITIONS, inference=INFERENCE)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_and_gradients_are_those_of_peft(setting: str, family: str) -> None:
    config = CONFIGS[family]
    module, traced = traced_decoder(config, SETTINGS[setting])
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(p.shape, generator=generator) * (0.5 if p.dim() == 1 else 0.08)
        for name, p in module.named_parameters()
    }
    batch = random_batch(config, BATCH, SEQ)
    made = interpret(traced, weights, batch)
    base = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    told = adapter_config(module.lora, [], "base") | {"base_model_name_or_path": None, "inference_mode": False}
    model = peft.get_peft_model(base, peft.LoraConfig(**told))
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            theirs[peft_name(name, theirs)].copy_(value)
    logits = model(input_ids=batch["input_ids"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    loss.backward()
    assert float(made[traced.loss]) == pytest.approx(float(loss.detach()), rel=1e-5)
    trained = [tensor.name for tensor in traced.tensors if tensor.kind == "trainable"]
    assert {peft_name(name, theirs) for name in trained} == {n for n, p in theirs.items() if p.requires_grad}
    for name in trained:
        exact = theirs[peft_name(name, theirs)].grad
        assert float((made[f"grad:{name}"] - exact).norm()) < 1e-4 * float(exact.norm()), name


def test_layers_below_the_first_pair_take_no_part_in_the_backward() -> None:
    _, traced = traced_decoder(CONFIGS["llama"], LoraConfig(rank=4, layers=(2,)))
    programs = {program.name: program for program in traced.programs}

    def backward(layer: int) -> list[str]:
        (found,) = (one for one in traced.layers if one.name == f"model.layers.{layer}")
        return [one.target for one in programs[found.program].operators if one.phase == "backward"]

    assert not backward(0)
    assert not backward(1)
    assert "tightfit.lora_backward" in backward(2)


def test_a_run_of_some_layers_and_a_second_one_that_starts_from_its_adapter(tmp_path: Path, cache: Path) -> None:
    folder, data = tmp_path / "model", tmp_path / "data.jsonl"
    config = CONFIGS["llama"]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    model.save_pretrained(folder)
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
    loaded = peft.PeftModel.from_pretrained(model, place, autocast_adapter_dtype=False)
    held = {name.replace(".default.", "."): p for name, p in loaded.named_parameters() if ".lora_" in name}
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[name].detach(), value) for name, value in tensors.items())
    # Its settings are those of the second run, which goes on from its values.
    second = profile(str(folder), batch=2, seq=16, dtype="float32", base="16bit", adapter=place)
    assert [tensor.name for tensor in second.tensors] == [tensor.name for tensor in first.tensors]
    smallest = plan(second, ModelPlanner(second).minimum().peak_bytes)
    run(smallest, data, steps=1, out=tmp_path / "again", lr=0.0, weight_decay=0.0, adapter=place)
    again = load_file(tmp_path / "again" / "adapter" / WEIGHTS)
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
