"""Files of mixtures of experts: what is stored are the values that transformers reads, and what the file's types
hold.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from decoder_families import sized
from gguf.quants import dequantize, quantize
from reference import CONFIGS, checkpoint, stored_weights
from safetensors.torch import load_file, save_file
from tiny_models import byte_level_tokenizer, k_quant, random_weights, write_gguf
from torch import Tensor

from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.weights.describe import describe
from tightfit.profiles.weights.source import Source
from tightfit.profiles.weights.store_file import build_store
from tightfit.runtime.common.errors import InputError

EXPERTS, WIDTH = 6, 32
CONFIG = CONFIGS["llama"] | {
    "model_type": "qwen3_moe", "head_dim": 16, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH,
    "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip
GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"


def stored(source: Source, folder: Path) -> dict[str, Tensor]:
    """Every tensor of the source's store in float32."""
    return stored_weights(build_store(source, folder))


def test_gguf_weights_are_those_that_transformers_reads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_gguf(tmp_path / "m.gguf", CONFIG, random_weights(CONFIG), tokenizer=byte_level_tokenizer())
    # transformers does not read from the file how wide experts are.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, config=transformers.AutoConfig.for_model(**CONFIG)
    )
    source = resolve(str(tmp_path / "m.gguf"))
    for key, value in CONFIG.items():
        if "expert" in key or key in ("norm_topk_prob", "hidden_size"):
            assert source.config[key] == value, key
    found, reference = stored(source, tmp_path), theirs.state_dict()
    assert set(found) == set(describe(CONFIG)) == set(reference)
    for name, tensor in found.items():
        assert torch.equal(tensor, reference[name].float().reshape(tensor.shape)), name


@pytest.mark.parametrize("kinds", [("Q4_1", "Q4_1", "Q8_0"), ("Q8_0", "Q4_1", "Q4_0"), ("BF16", "BF16", "F16")])
def test_gates_ups_and_downs_may_have_types_of_their_own(kinds: tuple[str, str, str], tmp_path: Path) -> None:
    """Where gate and up are quantised differently, their common matrix is in bfloat16, as unpacking would have it."""
    weights = random_weights(CONFIG)
    names = [DOWN.replace("down_proj", f"{part}_proj.weight") for part in ("gate", "up", "down")]
    path = write_gguf(tmp_path / "m.gguf", CONFIG, weights, kinds=dict(zip(names, kinds)))
    found = stored(resolve(str(path), base="16bit" if "F16" in kinds else None), tmp_path)

    def values(part: Tensor, kind: str) -> Tensor:
        code = gguf.GGMLQuantizationType[kind]
        return torch.tensor(dequantize(quantize(part.contiguous().numpy(), code), code))

    gates, ups = weights[GATE_UP].view(EXPERTS, 2, WIDTH, -1).unbind(1)
    both = torch.stack([values(gates, kinds[0]), values(ups, kinds[1])], dim=1).flatten(0, 2)
    assert torch.equal(found[GATE_UP], both.float() if kinds[0] == kinds[1] else both.bfloat16().float())
    downs = values(weights[DOWN], kinds[2]).flatten(0, 1)
    assert torch.equal(found[DOWN], downs.float())


def test_k_quants_of_experts_are_kept_code_for_code(tmp_path: Path) -> None:
    config = CONFIG | {"hidden_size": 256, "moe_intermediate_size": 256}
    weights = random_weights(config)
    names = {part: DOWN.replace("down_proj", f"{part}_proj.weight") for part in ("gate", "up", "down")}
    kinds = dict.fromkeys(names.values(), "Q4_K") | {names["down"]: "Q6_K"}
    source = resolve(str(write_gguf(tmp_path / "m.gguf", config, weights, kinds=kinds)))
    assert source.entries[GATE_UP].format == "q4_k"
    assert source.entries[DOWN].format == "q6_k"
    found = stored(source, tmp_path)
    parts = {}
    for part, name in names.items():
        blocks = k_quant(kinds[name], (EXPERTS, 256, 256), len(name))
        parts[part] = torch.tensor(dequantize(blocks, gguf.GGMLQuantizationType[kinds[name]])).view(EXPERTS, 256, 256)
    both = torch.stack([parts["gate"], parts["up"]], dim=1).flatten(0, 2)
    assert torch.allclose(found[GATE_UP], both, rtol=0, atol=1e-6)
    assert torch.allclose(found[DOWN], parts["down"].flatten(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True], ids=["a tensor for each expert", "one for all"])
def test_directories_hold_experts_apart_or_together(fused: bool, tmp_path: Path) -> None:
    model = checkpoint(CONFIG, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in tensors
    if fused:
        tensors = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        tensors |= {name: t.contiguous() for name, t in model.state_dict().items() if ".experts." in name}
        save_file(tensors, path, {"format": "pt"})
    found, reference = stored(resolve(str(tmp_path / "model"), base="16bit"), tmp_path), model.state_dict()
    for name in (GATE_UP, DOWN):
        assert torch.equal(found[name], reference[name].bfloat16().float().flatten(0, 1)), name
    if fused:
        tensors[DOWN] = tensors[DOWN][:, :, :16].contiguous()
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(InputError, match=r"has shape \[6, 64, 16\] where \[6, 64, 32\] is due"):
            build_store(resolve(str(tmp_path / "model")), tmp_path)


def test_mxfp4_of_gpt_oss_is_kept_code_for_code(tmp_path: Path) -> None:
    """The values are those of transformers' own conversion; gates and ups stand in turn there and one after the other
    here.
    """
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    config = sized("gpt_oss", head_dim=16, num_local_experts=EXPERTS, num_experts_per_tok=2, intermediate_size=WIDTH)
    checkpoint(config, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(9)
    exact = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(110, 130, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = convert(blocks, scales, dtype=torch.float32).mT
        apart = torch.cat([values[:, ::2], values[:, 1::2]], dim=1) if name.endswith("gate_up_proj") else values
        exact[name] = apart.flatten(0, 1)
    save_file(tensors, path, {"format": "pt"})
    stated = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | stated))
    source = resolve(str(tmp_path / "model"))
    assert source.entries[GATE_UP].format == source.entries[DOWN].format == "mxfp4"
    found = stored(source, tmp_path)
    assert len(exact) == 2 * config["num_hidden_layers"]
    for name, values in exact.items():
        assert torch.equal(found[name], values), name
    tensors[f"{GATE_UP}_scales"][0, 0, 0] = 255
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="gate_up_proj_blocks' holds NaN or infinity"):
        build_store(resolve(str(tmp_path / "model")), tmp_path)
