"""Precision: what `--base` makes of a model's matrices, and quantised checkpoints kept code for code."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoint_formats import AWQ, FLOATS, GGUF_BLOCKS, GGUF_UNPACKED, GPTQ, QUANTISED
from decoder_families import FAMILIES
from gguf.quants import dequantize
from quantised_checkpoints import FP4, four_bit, int8, write_quantised, zero_points
from reference import CONFIGS, stored_weights
from tiny_models import gguf_name, k_quant, random_weights, write_directory, write_gguf
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tightfit.profiles.models.transformers_decoder import facts
from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.weights.source import Source, without_names
from tightfit.profiles.weights.store_file import build_store
from tightfit.runtime.common.errors import InputError

LLAMA = CONFIGS["llama"] | {"num_hidden_layers": 2}
WIDE = CONFIGS["llama"] | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def stored(source: Source, directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor of the source's store, unpacked to `dtype`."""
    return stored_weights(build_store(source, directory), dtype)


# --base


@pytest.mark.parametrize(
    ("kind", "base", "form"),
    [
        ("directory", None, "q4"),
        ("directory", "8bit", "q8"),
        ("directory", "16bit", "bfloat16"),
        ("gguf", "4bit", "q4"),
        ("gguf", "16bit", "bfloat16"),
        ("config", "8bit", "q8"),
    ],
)
def test_base_is_the_precision_of_every_matrix(kind: str, base: str | None, form: str, tmp_path: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in random_weights(LLAMA).items()}
    directory = write_directory(tmp_path / "model", LLAMA, weights)
    as_floats = {name: weight.float() for name, weight in weights.items()}
    path = {
        "directory": directory,
        "gguf": write_gguf(tmp_path / "m.gguf", LLAMA, as_floats, default="BF16"),
        "config": directory / "config.json",
    }[kind]
    source = resolve(str(path), base=base)
    matrices = [entry for entry in source.entries.values() if len(entry.shape) > 1]
    assert {entry.format for entry in matrices} == {form}
    assert {entry.format for entry in source.entries.values() if len(entry.shape) == 1} == {"float32"}
    said = {
        "q4": "4-bit, rounded from bfloat16 (which changes weights by about 7 %)",
        "q8": "8-bit, rounded from bfloat16 (which changes weights by about 0.6 %)",
        "bfloat16": "bfloat16 as published",
    }
    if kind == "config":
        assert source.note == f"random weights, for sizing only: {base or '4bit'}"
        assert 0.015 < stored(source, tmp_path / "cache")[UP].std() < 0.025
        return
    assert source.note == said[form]
    found = stored(source, tmp_path / "cache")
    for name, weight in as_floats.items():
        error = float((found[name] - weight).norm() / weight.norm())
        bound = {"q4": (0.04, 0.09), "q8": (0.003, 0.006), "bfloat16": (0.0, 0.0)}[form]
        assert weight.dim() == 1 or bound[0] <= error <= bound[1], name


@pytest.mark.parametrize("kind", ["directory", "gguf", "config"])
def test_embeddings_have_a_precision_of_their_own(kind: str, tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    directory = write_directory(tmp_path / "model", LLAMA, weights)
    paths = {"directory": directory, "gguf": write_gguf(tmp_path / "m.gguf", LLAMA, weights, default="F32")}
    source = resolve(str(paths.get(kind, directory / "config.json")), base="8bit", embeddings="16bit")
    assert (source.entries[EMBEDDING].format, source.entries[UP].format) == ("bfloat16", "q8")
    if kind != "config":
        assert source.note.endswith("; embeddings 16-bit, rounded from float32")
    assert (source.base, source.embeddings) == ("8bit", "16bit")


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("file", ["safetensors", "GGUF"])
def test_16_bits_are_kept_and_32_rounded_to_bfloat16(file: str, kind: str, tmp_path: Path) -> None:
    held = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    weights = {name: weight.to(held) for name, weight in random_weights(LLAMA).items()}
    if file == "GGUF":
        as_floats = {name: weight.float() for name, weight in weights.items()}
        path = write_gguf(tmp_path / "m.gguf", LLAMA, as_floats, default=kind)
    else:
        path = write_directory(tmp_path / "model", LLAMA, weights)
    found = stored(resolve(str(path), base="16bit"), tmp_path / "cache")
    kept = torch.bfloat16 if kind == "F32" else held
    for name, weight in weights.items():
        assert weight.dim() == 1 or torch.equal(found[name], weight.to(kept).float()), name


def test_float16_stays_float16_and_is_rounded_once(tmp_path: Path) -> None:
    weights = {name: weight.half() for name, weight in random_weights(LLAMA).items()}
    source = resolve(str(write_directory(tmp_path / "model", LLAMA, weights)), base="16bit")
    assert source.note == "float16 as published"
    assert source.entries[UP].format == "float16"
    assert torch.equal(stored(source, tmp_path / "cache")[UP], weights[UP].float())
    assert torch.equal(stored(source, tmp_path / "cache", torch.bfloat16)[UP], weights[UP].bfloat16())


def test_each_precision_has_a_store_of_its_own(tmp_path: Path) -> None:
    path = str(write_directory(tmp_path / "model", LLAMA, random_weights(LLAMA)))
    chosen = [("4bit", None), ("8bit", None), ("16bit", None), ("4bit", "8bit")]
    assert len({resolve(path, base=base, embeddings=own).fingerprint for base, own in chosen}) == 4
    assert resolve(path).fingerprint == resolve(path, base="4bit").fingerprint


@pytest.mark.parametrize("option", ["base", "embeddings"])
def test_a_precision_that_is_none_is_refused(option: str, tmp_path: Path) -> None:
    path = write_directory(tmp_path / "model", LLAMA, random_weights(LLAMA))
    chosen: dict[str, Any] = {option: "2bit"}
    with pytest.raises(InputError, match=f"{option} '2bit' is not supported; supported: 4bit, 8bit, 16bit"):
        resolve(str(path), **chosen)
    chosen = {option: "4bit"}
    with pytest.raises(InputError, match=f"{option} 4bit: a.b:c is a module, whose parameters stay float32"):
        resolve("a.b:c", **chosen)


def test_quantised_weights_are_not_rounded_again(tmp_path: Path) -> None:
    path = str(write_gguf(tmp_path / "m.gguf", LLAMA, random_weights(LLAMA), default="Q8_0"))
    said = r"m\.gguf: base 4bit: it holds these weights quantised \(Q8_0\), and rounding twice loses more"
    with pytest.raises(InputError, match=said):
        resolve(path, base="4bit")
    with pytest.raises(InputError, match=r"embeddings 16bit: it holds these weights quantised \(Q8_0\)"):
        resolve(path, embeddings="16bit")
    assert resolve(path, base="8bit").fingerprint == resolve(path).fingerprint
    mixed = write_gguf(tmp_path / "n.gguf", LLAMA, random_weights(LLAMA), default="Q8_0", kinds={EMBEDDING: "BF16"})
    assert resolve(str(mixed)).note == "Q8_0 values kept exactly; embeddings bfloat16 as published"
    assert resolve(str(mixed), embeddings="4bit").entries[EMBEDDING].format == "q4"


# GGUF


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_types_are_kept_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Against the gguf package's own dequantisation in float32, rounded once."""
    path = write_gguf(tmp_path / "m.gguf", WIDE, random_weights(WIDE), default=kind)
    source = resolve(str(path))
    assert source.note == f"{kind} values kept exactly"
    found = stored(source, tmp_path, dtype)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name in (EMBEDDING, "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.v_proj.weight"):
        tensor = held[gguf_name(name, gemma=False)]
        given = torch.tensor(np.array(dequantize(tensor.data, tensor.tensor_type))).view_as(found[name]).to(dtype)
        assert torch.equal(found[name].view(torch.uint8), given.view(torch.uint8)), name
        size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        assert source.entries[name].bytes == given.numel() // size[0] * size[1]


@pytest.mark.parametrize("kind", GGUF_UNPACKED)
def test_gguf_types_that_the_store_has_no_form_of_are_unpacked_to_bfloat16(kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", WIDE, random_weights(WIDE), kinds={UP: kind})
    source = resolve(str(path))
    assert f"{kind} unpacked to bfloat16" in source.note
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.0.ffn_up.weight")
    given = torch.tensor(np.array(dequantize(tensor.data, tensor.tensor_type))).bfloat16()
    assert torch.equal(stored(source, tmp_path, torch.bfloat16)[UP], given)


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"general.source.huggingface.repository": "org/Model-1B"}, "org/Model-1B"),
        ({"general.source.repo_url": "https://huggingface.co/org/Model-1B"}, "org/Model-1B"),
        ({"general.source.url": "https://example.org/org/Model-1B"}, None),
        ({"general.base_model.0.repo_url": "https://huggingface.co/org/Parent"}, None),
    ],
)
def test_adapters_of_a_gguf_file_name_the_model_that_it_was_made_of(
    metadata: dict[str, Any], name: str | None, tmp_path: Path
) -> None:
    weights = random_weights(LLAMA)
    bare = resolve(str(write_gguf(tmp_path / "m.gguf", LLAMA, weights)))
    source = resolve(str(write_gguf(tmp_path / "n.gguf", LLAMA, weights, metadata=metadata)))
    assert source.config.get("adapter_base") == name
    assert without_names(source.config) == bare.config


def test_the_helper_s_blocks_have_every_code() -> None:
    assert len(np.unique(k_quant("Q6_K", (8, 256), 0))) == 256


# bitsandbytes, GPTQ, AWQ

MAKERS: dict[str, Callable[..., Any]] = {
    "nf4": four_bit,
    "nf4 double": functools.partial(four_bit, double=True),
    "fp4": functools.partial(four_bit, table=FP4),
    "int8": int8,
    "gptq": zero_points,
    "gptq v2": functools.partial(zero_points, version=2),
    "gptq row": functools.partial(zero_points, group=-1),
    "gptq act-order": functools.partial(zero_points, act_order=True),
    "awq": functools.partial(zero_points, method="awq"),
}
LINEAR = {"GPT-NeoX, Pythia": ".dense_"}
"""Of families whose linear layers are not called ..._proj: a part of the names of some."""
CASES = {name: (one.stated, MAKERS[name], one.note, one.form) for name, one in QUANTISED.items()}


@pytest.mark.parametrize("case", list(CASES))
def test_quantised_checkpoints_are_kept_code_for_code(case: str, tmp_path: Path) -> None:
    stated, make, note, form = CASES[case]
    values = write_quantised(tmp_path / "model", LLAMA, random_weights(LLAMA), stated, make)
    source = resolve(str(tmp_path / "model"))
    assert source.note == f"{note}; embeddings float16 as published"
    assert source.entries[UP].format == form
    assert "quantization_config" not in source.config
    rounded = stored(source, tmp_path / "cache", torch.bfloat16)
    for name, value in values.items():
        if value.dim() > 1:
            assert torch.equal(rounded[name], value.bfloat16()), name
    if form != "bfloat16":
        exact = stored(source, tmp_path / "cache")
        assert all(torch.equal(exact[name], value) for name, value in values.items())


@pytest.mark.parametrize(
    ("family", "case"),
    [("Phi-3", "gptq"), ("Gemma 2", "nf4 double"), ("Qwen3.5 (text)", "awq"), ("GPT-NeoX, Pythia", "int8")],
)
def test_quantised_checkpoints_of_decoders_of_transformers_are_kept_code_for_code(
    family: str, case: str, tmp_path: Path
) -> None:
    stated, make, note, form = CASES[case]
    config = FAMILIES[family]
    torch.manual_seed(0)
    weights = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).state_dict()
    if config.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    linear = LINEAR.get(family, "_proj.weight")
    values = write_quantised(tmp_path / "model", config, weights, stated, make, quantised=linear)
    source = resolve(str(tmp_path / "model"))
    assert note in source.note
    assert "float16 as published" in source.note
    exact = stored(source, tmp_path / "cache")
    ours = {tensor.key: tensor.name for tensor in facts(source.config).tensors}
    assert sum(source.entries[ours[name]].format == form for name in values if linear in name) >= 4
    assert all(torch.equal(exact[ours[name]], value) for name, value in values.items() if value.dim() == 2)


def test_a_quantised_part_of_another_shape_is_named(tmp_path: Path) -> None:
    config = FAMILIES["Phi-3"]
    weights = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).state_dict()

    def smaller(shape: tuple[int, int], draw: np.random.Generator) -> Any:
        return zero_points((shape[0], shape[1] // 2), draw)

    write_quantised(tmp_path / "model", config, weights, GPTQ, smaller)
    with pytest.raises(
        InputError, match=r"model: tensor 'model\.layers\.0\.\S+_proj\.weight': its shape of qweight is"
    ):
        resolve(str(tmp_path / "model"))


@pytest.mark.parametrize("case", ["nf4 double", "gptq", "awq", "int8"])
def test_rows_that_are_read_a_few_at_a_time_are_those_of_the_whole(case: str, tmp_path: Path) -> None:
    stated, make, _, _ = CASES[case]
    write_quantised(tmp_path / "model", LLAMA, random_weights(LLAMA), stated, make, shards=2)
    tensor = next(tensor for tensor in resolve(str(tmp_path / "model")).tensors() if tensor.entry.name == UP)
    whole = tensor.rows(0, tensor.entry.rows)
    for start, stop in ((0, 1), (3, 12), (7, 9), (95, 96)):
        assert torch.equal(tensor.rows(start, stop), whole[start:stop])


def test_embeddings_of_a_quantised_checkpoint_can_be_rounded(tmp_path: Path) -> None:
    stated, make, _, _ = CASES["awq"]
    write_quantised(tmp_path / "model", LLAMA, random_weights(LLAMA), stated, make)
    source = resolve(str(tmp_path / "model"), embeddings="8bit")
    assert source.note.startswith("AWQ values kept exactly; embeddings 8-bit, rounded from float16")
    assert source.entries[UP].format == "q4_zero"


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (
            {"quant_method": "hqq"},
            "weights quantised with hqq, which cannot be read; readable: GPTQ, AWQ, bitsandbytes",
        ),
        (GPTQ | {"bits": 3}, "weights GPTQ with 3 bits, which cannot be read; readable: 4 bits"),
        (AWQ | {"version": "gemv"}, "weights AWQ in the layout 'gemv', which cannot be read; readable: 'gemm'"),
        (GPTQ | {"group_size": 16}, "its shape of qzeros is (2, 8) where (4, 8) is due"),
        ({}, "no tensor 'model.layers.0.self_attn.q_proj.weight'"),
    ],
)
def test_what_cannot_be_read_says_why(stated: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_quantised(tmp_path / "model", LLAMA, random_weights(LLAMA), stated, zero_points)
    with pytest.raises(InputError) as caught:
        resolve(str(tmp_path / "model"))
    assert message in str(caught.value)
    assert str(tmp_path / "model") in str(caught.value)


def test_a_scale_that_is_not_finite_is_named_with_its_file(tmp_path: Path) -> None:
    def damaged(shape: tuple[int, int], draw: np.random.Generator) -> Any:
        parts, values = zero_points(shape, draw)
        parts["scales"][0, 0] = torch.inf
        return parts, values

    write_quantised(tmp_path / "model", LLAMA, random_weights(LLAMA), GPTQ, damaged)
    said = r"model\.safetensors: tensor 'model\.layers\.0\.self_attn\.q_proj\.weight' \(GPTQ\) holds NaN or infinity"
    with pytest.raises(InputError, match=said):
        build_store(resolve(str(tmp_path / "model")), tmp_path / "cache")


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    path = write_directory(tmp_path / "model", LLAMA, random_weights(LLAMA))
    shutil.move(path / "model.safetensors", path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(InputError, match=r"save_pretrained\('NEW'\)") as caught:
        resolve(str(path))
    assert f"{path}: pytorch_model-00001-of-00002.bin is a pickle" in str(caught.value)
