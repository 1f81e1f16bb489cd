import json
import math

import pytest
import torch
from reference import CONFIGS
from safetensors.torch import save_file

from tightfit.profiles.models.decoder_config import WRAPPED_BODY
from tightfit.runtime.engine.training.adapter import WEIGHTS, adapter_config, adapter_key, initialise

LAYER = "model.layers.0.self_attn.q_proj"


def test_configuration_names_the_modules():
    names = [
        f"model.layers.{i}.{m}.lora_{ab}.weight"
        for i in range(2)
        for m in ("self_attn.q_proj", "mlp.down_proj")
        for ab in "AB"
    ]
    config = adapter_config({"rank": 8, "alpha": 16.0}, names, "base")
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 16.0, "base")


def test_peft_reads_the_configuration():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**adapter_config({"rank": 4, "alpha": 8.0}, [f"{LAYER}.lora_A.weight"], "base"))
    assert config.target_modules == {"q_proj"}
    assert config.r == 4


def test_initial_values_are_pefts_distribution_and_depend_on_name_and_seed():
    def made(name, seed):
        out = torch.full((8, 576), 9.0)
        initialise(name, seed, out)
        return out

    a = made(f"{LAYER}.lora_A.weight", 0)
    reference = torch.empty(8, 576)
    torch.nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    assert abs(a.abs().max() - reference.abs().max()) < 1e-3
    assert abs(a.std() - reference.std()) < 1e-3
    assert torch.equal(a, made(f"{LAYER}.lora_A.weight", 0))
    assert not torch.equal(a, made(f"{LAYER}.lora_A.weight", 1))
    assert not torch.equal(a, made("model.layers.1.self_attn.q_proj.lora_A.weight", 0))
    assert not made(f"{LAYER}.lora_B.weight", 0).any()


def test_an_adapter_fits_the_language_model_of_a_multimodal_one_and_nothing_else_of_it(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    text = CONFIGS["gemma3_text"] | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"patch_size": 14}, mm_tokens_per_image=4
    )
    base = transformers.AutoModelForCausalLM.from_config(config)
    wanted = {}
    for name, projection in base.named_modules():
        if name.startswith(WRAPPED_BODY) and name.endswith("_proj"):
            stem = "model." + name.removeprefix(WRAPPED_BODY)
            wanted[f"{stem}.lora_A.weight"] = torch.randn(4, projection.in_features)
            wanted[f"{stem}.lora_B.weight"] = torch.randn(projection.out_features, 4)
    told = adapter_config({"rank": 4, "alpha": 8.0}, wanted, "base", WRAPPED_BODY)
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    save_file({adapter_key(name, WRAPPED_BODY): value for name, value in wanted.items()}, tmp_path / WEIGHTS)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).named_parameters()
    found = {name.replace(".default.", "."): value for name, value in loaded if ".lora_" in name}
    assert len(wanted) == 14
    assert found.keys() == {adapter_key(name, WRAPPED_BODY) for name in wanted}
    assert all(torch.equal(found[adapter_key(name, WRAPPED_BODY)], value) for name, value in wanted.items())
