"""Merged models and adapters as GGUF files, read by gguf's own reader, by tightfit, and by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from decoder_families import FAMILIES
from peft_adapters import merged_by_peft, save_adapter, save_model, tiny_model, with_values
from reference import CONFIGS
from safetensors.torch import load_file, save_file
from tiny_models import (
    CHAT,
    byte_level_tokenizer,
    gguf_name,
    llama_cpp_permute,
    random_weights,
    sentence_piece_tokenizer,
    write_directory,
    write_gguf,
)
from tokenizers import Tokenizer

from tightfit.profiles.models.decoder_config import decoder_shape
from tightfit.profiles.sources.gguf_metadata import read_typed
from tightfit.profiles.sources.lookup import resolve, vocabulary
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.results.base_values import merged_rows
from tightfit.runtime.results.merge import merge

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),  # beside a GGUF file
]
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"]}
SIZED = {name: config | {"vocab_size": 640 if name == "gemma3_text" else 320} for name, config in CONFIGS.items()}
SIZED["gemma3_text"] |= {"layer_types": ["sliding_attention"] * 4}  # as llama.cpp assumes of four layers
ROUNDING = {"F32": 0.0, "F16": 5e-4, "BF16": 4e-3, "Q8_0": 8e-3}
"""root mean square, relative to the values"""


def tensors(path: Path) -> dict[str, Any]:
    return {one.name: one for one in gguf.GGUFReader(path).tensors}


def values(one: Any) -> torch.Tensor:
    return torch.tensor(gguf.quants.dequantize(one.data, one.tensor_type))


def own_values(path: Path) -> dict[str, torch.Tensor]:
    """The values of a model as tightfit reads them."""
    source = resolve(str(path))
    return {
        tensor.entry.name: torch.cat([rows for _, rows in merged_rows(tensor, None)]).view(tensor.entry.shape)
        for tensor in source.tensors()
    }


def error(own: torch.Tensor, exact: torch.Tensor) -> float:
    return float((own - exact).norm() / exact.norm())


def with_all_merges(tokenizer: Tokenizer) -> Tokenizer:
    """As converted from SentencePiece: a merge for every split of a token into two, in the order of the tokens."""
    told = json.loads(tokenizer.to_str())
    known = told["model"]["vocab"]
    splits = [(token, token[:cut], token[cut:]) for token in known for cut in range(1, len(token))]
    found = [(known[token], left, right) for token, left, right in splits if left in known and right in known]
    told["model"]["merges"] = [[left, right] for _, left, right in sorted(found)]
    return Tokenizer.from_str(json.dumps(told))


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Path]:
    """(config, GGUF base in several types, adapter)"""
    config = SIZED[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    kinds = {"model.layers.0.self_attn.q_proj.weight": "F16", "model.layers.1.self_attn.q_proj.weight": "Q8_0"}
    base = write_gguf(
        folder / "base.gguf",
        config,
        random_weights(config),
        kinds,
        tokenizer=byte_level_tokenizer(config["vocab_size"]),
        alignment=64,
        metadata={"general.file_type": 3, "general.tags": ["a", "b"], "x.y": 2.5, "x.on": True},
    )
    model = with_values(config, own_values(base))
    return config, base, save_adapter(model, folder / "adapter", str(base), **PLAIN)


def test_what_the_adapter_does_not_touch_is_copied(case: tuple[dict[str, Any], Path, Path], tmp_path: Path) -> None:
    config, base, adapter = case
    told = merge(adapter, tmp_path / "merged.gguf", format="gguf")
    before, after = tensors(base), tensors(tmp_path / "merged.gguf")
    assert list(before) == list(after)
    changed = {name for name in before if any(part in name for part in ("attn_q.weight", "attn_k.weight", "ffn_down"))}
    assert told["adapted"] == len(changed) == 3 * config["num_hidden_layers"]
    for name, one in before.items():
        other = after[name]
        assert other.data_offset % 64 == 0
        if name not in changed:
            assert (one.tensor_type, one.data.tobytes()) == (other.tensor_type, other.data.tobytes()), name
    kinds = {name: after[name].tensor_type.name for name in changed}
    assert kinds.pop("blk.0.attn_q.weight") == "F16"
    assert set(kinds.values()) == {"Q8_0"}
    assert told["types"] == {"F16": 1, "Q8_0": len(changed) - 1}
    fields = [read_typed(path) for path in (base, tmp_path / "merged.gguf")]
    assert fields[0].pop("general.file_type").value == 3
    assert fields[1].pop("general.file_type").value == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields[0] == fields[1]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_values_are_those_that_peft_merges(case: tuple[dict[str, Any], Path, Path], dtype: str, tmp_path: Path) -> None:
    config, base, adapter = case
    merge(adapter, tmp_path / "merged.gguf", format="gguf", dtype=dtype)
    exact = merged_by_peft(with_values(config, own_values(base)), adapter).state_dict()
    own = own_values(tmp_path / "merged.gguf")
    kind = {"q8_0": "Q8_0", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    for name, value in own.items():
        assert error(value, exact[name]) < 1e-6 + ROUNDING[kind], name
    found = tensors(tmp_path / "merged.gguf")
    gemma = config["model_type"] == "gemma3_text"
    for name in own:
        if any(part in name for part in ("q_proj.weight", "k_proj.weight", "down_proj")):
            one, due = found[gguf_name(name, gemma)], exact[name].numpy()
            if config["model_type"] == "llama" and "_proj" in name and "down" not in name:
                heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
                due = llama_cpp_permute(due, heads)
            assert one.tensor_type.name == kind
            assert error(values(one), torch.tensor(np.ascontiguousarray(due))) < 1e-6 + ROUNDING[kind], name


@pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_modules_that_were_trained_in_full(family: str, names: tuple[str, ...], tmp_path: Path) -> None:
    """A head of its own in the place of a tied one."""
    config = SIZED[family]
    base = write_gguf(tmp_path / "base.gguf", config, random_weights(config), tokenizer=byte_level_tokenizer(320))
    weights = own_values(base)
    adapter = save_adapter(
        with_values(config, weights), tmp_path / "adapter", str(base), **PLAIN, modules_to_save=list(names)
    )
    merge(adapter, tmp_path / "merged.gguf", format="gguf", dtype="float32")
    exact = merged_by_peft(with_values(config, weights), adapter).state_dict()
    own = own_values(tmp_path / "merged.gguf")
    assert own.keys() == {*weights, "lm_head.weight"}
    for name, value in own.items():
        assert error(value, exact[name]) < 1e-6, name
    found = tensors(tmp_path / "merged.gguf")
    if names == ("embed_tokens",):  # the base's head, byte for byte
        head = tensors(base)["output.weight" if family == "qwen2" else "token_embd.weight"]
        assert found["output.weight"].data.tobytes() == head.data.tobytes()
    assert found["token_embd.weight"].tensor_type.name == ("F32" if "embed_tokens" in names else "Q4_1")


@pytest.mark.parametrize("family", CONFIGS)
def test_a_file_is_made_of_a_directory(family: str, tmp_path: Path) -> None:
    config = SIZED[family] | {"torch_dtype": "float32"}
    tokenizer = byte_level_tokenizer(config["vocab_size"])
    if family == "gemma3_text":
        tokenizer = with_all_merges(sentence_piece_tokenizer())
        config["vocab_size"] = tokenizer.get_vocab_size() + 12  # padded, as published models are
    if family == "llama":
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        config |= {"rope_scaling": scaling | {"original_max_position_embeddings": 8192}, "rope_theta": 5e5}
    plain = {key: value for key, value in config.items() if key != "torch_dtype"}
    weights = random_weights(plain)
    base = write_directory(tmp_path / "base", config, weights, tokenizer=tokenizer)
    adapter = save_adapter(with_values(plain, weights), tmp_path / "adapter", str(base), **PLAIN)
    merge(adapter, tmp_path / "merged.gguf", format="gguf")
    exact = merged_by_peft(with_values(plain, weights), adapter).state_dict()
    for name, value in own_values(tmp_path / "merged.gguf").items():
        assert error(value, exact[name]) < 1e-6, name
    read, theirs = resolve(str(tmp_path / "merged.gguf")).config, resolve(str(base)).config
    assert vars(decoder_shape(read)) | {"padding": None} == vars(decoder_shape(theirs)) | {"padding": None}
    own, known = vocabulary(str(tmp_path / "merged.gguf")), vocabulary(str(base))
    assert own is not None
    assert known is not None
    for text in (
        "The quick brown fox",
        "It's what they've said: we're 12 of 345",
        "naïve café — 日本語",
        "<|im_start|>user",
    ):
        assert own.tokenizer.encode(text).ids == known.tokenizer.encode(text).ids
    if family != "gemma3_text":
        assert own.chat_template == known.chat_template == CHAT
        assert own.bos_token == known.bos_token == "<|im_start|>"
        assert own.pad_token == known.pad_token == "<|im_end|>"
        assert own.add_bos is known.add_bos is False
    merge(adapter, tmp_path / "small.gguf", format="gguf", dtype="q8_0")
    kinds = {one.tensor_type.name for one in tensors(tmp_path / "small.gguf").values()}
    assert kinds == {"F32", "Q8_0"}


def test_what_llama_cpp_has_no_form_of_is_refused_with_the_way(tmp_path: Path) -> None:
    way = "merge to safetensors, and convert the folder with llama.cpp's convert_hf_to_gguf.py"
    base = save_model(tmp_path / "gpt2", FAMILIES["GPT-2"])
    settings = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapter = save_adapter(tiny_model(FAMILIES["GPT-2"]), tmp_path / "a", str(base), **settings)
    with pytest.raises(
        InputError, match=rf"gpt2 is a 'gpt2' model, whose form in llama.cpp tightfit does not know; {way}"
    ):
        merge(adapter, tmp_path / "merged.gguf", format="gguf")
    with pytest.raises(
        InputError, match=r"does not know; convert the adapter with llama\.cpp's convert_lora_to_gguf\.py"
    ):
        merge(adapter, tmp_path / "merged.gguf", format="gguf", adapter_only=True)
    for name, config, message in (
        ("windows", CONFIGS["gemma3_text"], "llama.cpp's metadata for gemma3_text models cannot say its windows"),
        ("bare", CONFIGS["qwen2"], "no tokenizer.json, and a GGUF file holds the tokenizer"),
    ):
        base = save_model(tmp_path / name, config)
        adapter = save_adapter(tiny_model(config), tmp_path / f"{name}-adapter", str(base), **PLAIN)
        with pytest.raises(InputError, match=f"{message}.*; {way}"):
            merge(adapter, tmp_path / "merged.gguf", format="gguf")
    assert not (tmp_path / "merged.gguf").exists()


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 11}}]
)
def test_adapters_alone(case: tuple[dict[str, Any], Path, Path], settings: dict[str, Any], tmp_path: Path) -> None:
    """As convert_lora_to_gguf.py writes them: llama.cpp adds alpha / rank * B A to each weight in its own order of
    rows.
    """
    config, base, _ = case
    weights = own_values(base)
    adapter = save_adapter(with_values(config, weights), tmp_path / "adapter", str(base), **(PLAIN | settings))
    merge(adapter, tmp_path / "lora.gguf", format="gguf", adapter_only=True)
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")

    def said(key: str) -> Any:
        return reader.fields[key].contents()

    architecture = {"gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    assert (said("general.architecture"), said("general.type"), said("adapter.type")) == (
        architecture,
        "adapter",
        "lora",
    )
    assert said("adapter.lora.alpha") == 6.0
    found = {one.name: values(one) for one in reader.tensors}
    merged = merged_by_peft(with_values(config, weights), adapter).state_dict()
    assert len(found) == 6 * config["num_hidden_layers"]
    for name, weight in weights.items():
        key = gguf_name(name, config["model_type"] == "gemma3_text")
        if f"{key}.lora_a" not in found:
            continue
        a, b = found[f"{key}.lora_a"], found[f"{key}.lora_b"]
        assert a.shape[0] == b.shape[1] == (2 if "k_proj" in name and settings else 4)
        change = (merged[name] - weight).numpy()
        if config["model_type"] == "llama" and "down" not in name:
            change = llama_cpp_permute(
                change, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            )
        assert error(said("adapter.lora.alpha") / len(a) * b @ a, torch.tensor(np.ascontiguousarray(change))) < 1e-5, (
            name
        )
    if not settings:
        tensors_of = load_file(adapter / "adapter_model.safetensors")
        assert torch.equal(
            found["blk.0.ffn_down.weight.lora_b"],
            tensors_of["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"],
        )


def test_adapters_that_are_more_than_pairs_are_refused(case: tuple[dict[str, Any], Path, Path], tmp_path: Path) -> None:
    config, base, _ = case
    model = with_values(config, own_values(base))
    for settings, what in (
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"modules_to_save": ["lm_head"]}, "modules that were trained in full"),
    ):
        adapter = save_adapter(model, tmp_path / what, str(base), **PLAIN, **settings)
        with pytest.raises(
            InputError,
            match=f"has {what}, and an adapter of llama.cpp has LoRA pairs alone; merge it without adapter_only",
        ):
            merge(adapter, tmp_path / "lora.gguf", format="gguf", adapter_only=True)


def logits_by_llama_cpp(file: Path, ids: list[int], lora: Path | None = None) -> torch.Tensor:
    """llama.cpp's logits [len(ids), vocabulary] of a model, with an adapter applied beside it if there is one."""
    bindings = pytest.importorskip("llama_cpp_py_sync._cffi_bindings")
    library, ffi = bindings.get_lib(), bindings.get_ffi()
    with pytest.importorskip("llama_cpp_py_sync").Llama(
        str(file), n_ctx=64, n_threads=1, type_k="f32", type_v="f32"
    ) as opened:
        if lora is not None:
            adapter = library.llama_adapter_lora_init(opened._model, str(lora).encode())
            assert adapter != ffi.NULL
            taken = ffi.new("struct llama_adapter_lora *[]", [adapter])
            assert library.llama_set_adapters_lora(opened._ctx, taken, 1, ffi.new("float[]", [1.0])) == 0
        batch = library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        assert library.llama_decode(opened._ctx, batch) == 0
        size = 4 * len(ids) * opened.n_vocab
        found = torch.frombuffer(
            bytearray(ffi.buffer(library.llama_get_logits(opened._ctx), size)), dtype=torch.float32
        )
        library.llama_batch_free(batch)
        return found.view(len(ids), -1)


@pytest.mark.parametrize("family", CONFIGS)
def test_llama_cpp_computes_what_peft_does(family: str, tmp_path: Path) -> None:
    """llama.cpp's logits of a merged file, and of the base with the adapter beside it."""
    tokenizer = byte_level_tokenizer(SIZED[family]["vocab_size"])
    config = SIZED[family] | {"vocab_size": tokenizer.get_vocab_size()}
    weights = random_weights(config)
    base = write_directory(tmp_path / "base", config, weights, tokenizer=tokenizer)
    adapter = save_adapter(with_values(config, weights), tmp_path / "adapter", str(base), **PLAIN)
    none = tmp_path / "none"
    none.mkdir()
    zeros = {key: torch.zeros_like(value) for key, value in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(zeros, none / "adapter_model.safetensors")
    (none / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    merge(adapter, tmp_path / "merged.gguf", format="gguf", dtype="float32")
    merge(none, tmp_path / "base.gguf", format="gguf", dtype="float32")
    merge(adapter, tmp_path / "lora.gguf", format="gguf", adapter_only=True)
    ids = list(range(10, 26))
    with torch.no_grad():
        exact, plain = (
            model(torch.tensor([ids])).logits[0]
            for model in (merged_by_peft(with_values(config, weights), adapter), with_values(config, weights))
        )
    for file, lora, due in (
        ("merged.gguf", None, exact),
        ("base.gguf", tmp_path / "lora.gguf", exact),
        ("base.gguf", None, plain),
    ):
        own = logits_by_llama_cpp(tmp_path / file, ids, lora)
        assert (own - due).abs().max() < 1e-2 * (exact - plain).abs().max()  # its GELU is a table
