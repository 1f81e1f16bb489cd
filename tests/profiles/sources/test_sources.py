"""Models from GGUF files, Hugging Face directories, bare configs and factories, against independent readers."""

from __future__ import annotations

import array
import json
import os
import shutil
import struct
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoint_formats import GGUF_GROUPS
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from reference import CONFIGS, stored_weights
from tiny_models import (
    CHAT,
    SPECIAL,
    TEXT,
    byte_level_tokenizer,
    random_weights,
    sentence_piece_tokenizer,
    write_directory,
    write_gguf,
)
from torch import Tensor

from tightfit.profiles.sources import lookup
from tightfit.profiles.sources.gguf_config import llama3_scaling
from tightfit.profiles.sources.gguf_metadata import LONG, TYPES, TextList, read_header, read_metadata
from tightfit.profiles.sources.gguf_tokenizer import gguf_tokenizer, implied_merges
from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.weights.describe import describe
from tightfit.profiles.weights.source import Source
from tightfit.profiles.weights.store_file import build_store
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.data.tokenization import Encoder
from tightfit.runtime.engine.weights.store import WeightStore

LLAMA = CONFIGS["llama"]


def stored(source: Source, directory: Path) -> dict[str, Tensor]:
    """Every tensor of the source's store in float32."""
    return stored_weights(build_store(source, directory))


# GGUF


@pytest.mark.parametrize(
    ("family", "kind"), [*(("llama", kind) for kind in GGUF_GROUPS), ("qwen2", "Q4_1"), ("gemma3_text", "Q5_0")]
)
def test_gguf_values_are_kept_exactly(family: str, kind: str, tmp_path: Path) -> None:
    config, weights = CONFIGS[family], random_weights(CONFIGS[family])
    source = resolve(str(write_gguf(tmp_path / "m.gguf", config, weights, default=kind)))
    assert source.note == f"{kind} values kept exactly"
    found = stored(source, tmp_path)
    assert list(found) == list(describe(config))
    code = gguf.GGMLQuantizationType[kind]
    for name, weight in weights.items():
        expected = (
            weight if weight.dim() == 1 else torch.tensor(dequantize(gguf.quants.quantize(weight.numpy(), code), code))
        )
        if weight.dim() == 1 and family == "gemma3_text" and "norm" in name:
            assert torch.allclose(found[name], expected, atol=2e-7), name  # 1 was added and taken off in float32
        else:
            assert torch.equal(found[name], expected.float()), name


def test_gguf_weights_are_those_that_transformers_reads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_gguf(tmp_path / "m.gguf", LLAMA, random_weights(LLAMA), tokenizer=byte_level_tokenizer())
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).state_dict()
    found = stored(resolve(str(tmp_path / "m.gguf")), tmp_path)
    assert {name for name in reference if name != "lm_head.weight"} == set(found)
    for name, tensor in found.items():
        assert torch.equal(tensor, reference[name].float()), name


def test_gguf_metadata_become_the_config(tmp_path: Path) -> None:
    for family, config in CONFIGS.items():
        source = resolve(str(write_gguf(tmp_path / f"{family}.gguf", config, random_weights(config))))
        for key in (
            "model_type",
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "tie_word_embeddings",
        ):
            assert source.config[key] == config[key], (family, key)
        assert source.config["rms_norm_eps"] == config["rms_norm_eps"]
        assert source.config["rope_theta"] == config.get("rope_theta", 10000.0)
        assert (source.kind, source.has_weights, source.name) == ("gguf", True, family)
    assert source.config["sliding_window"] == 8
    assert source.config["query_pre_attn_scalar"] == 32
    assert source.config["hidden_act"] == "gelu_pytorch_tanh"


def test_llama_3_rope_scaling_is_found_again_from_its_divisors() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    parameters = scaling | {"rope_theta": 500000.0}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=parameters, max_position_embeddings=131072
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    assert llama3_scaling((plain / scaled).tolist(), 500000.0, 64) == scaling
    with pytest.raises(InputError, match="rope_freqs are not Llama 3's"):
        llama3_scaling(torch.linspace(1, 32, 32).tolist(), 500000.0, 64)


def test_linear_rope_scaling_is_kept(tmp_path: Path) -> None:
    config = CONFIGS["gemma3_text"]
    metadata = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config), metadata=metadata)
    assert resolve(str(path)).config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_a_damaged_gguf_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", LLAMA, random_weights(LLAMA), tokenizer=byte_level_tokenizer())
    data = path.read_bytes()
    for length in (2, 30, 2000, len(data) // 2, len(data) - 5000):
        path.write_bytes(data[:length])
        with pytest.raises(InputError) as caught:
            resolve(str(path))
        assert str(caught.value).startswith(f"{path}: ")
        assert caught.value.exit_code == 2
    path.write_bytes(b"GGML" + data[4:])
    with pytest.raises(InputError, match="GGUF magic invalid"):
        resolve(str(path))


def test_a_scale_that_became_infinite_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", LLAMA, random_weights(LLAMA))
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_up.weight")
    data = bytearray(path.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    with pytest.raises(
        InputError, match=r"m\.gguf: tensor 'blk\.1\.ffn_up\.weight' holds NaN or infinity, first in row 0"
    ):
        build_store(resolve(str(path)), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_gguf_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    cases: list[tuple[dict[str, Any], dict[str, Tensor], dict[str, Any], str]] = [
        (
            LLAMA | {"model_type": "mamba"},
            weights,
            {},
            "GGUF architecture 'mamba' is not supported; supported: gemma3, llama, qwen2, qwen3",
        ),
        (LLAMA, weights, {"leave_out": ("block_count",)}, "GGUF metadata lacks llama.block_count"),
        (
            LLAMA,
            {k: v for k, v in weights.items() if "layers.2.mlp.up" not in k},
            {},
            "no tensor for 'model.layers.2.mlp.up_proj.weight'",
        ),
        (
            LLAMA | {"intermediate_size": 128},
            weights,
            {},
            "tensor 'blk.0.ffn_gate.weight' has shape [96, 64] where [128, 64] is due",
        ),
        (LLAMA | {"num_hidden_layers": 2}, weights, {}, "belongs to no llama decoder"),
        (
            LLAMA,
            weights,
            {"metadata": {"split.count": 3}},
            "one of 3 parts; join them with llama.cpp's gguf-split --merge",
        ),
        (
            LLAMA,
            weights,
            {"metadata": {"llama.rope.scaling.type": "yarn"}},
            "GGUF rope scaling 'yarn' is not supported",
        ),
    ]
    for number, (config, tensors, options, message) in enumerate(cases):
        path = write_gguf(tmp_path / f"{number}.gguf", config, tensors, **options)
        with pytest.raises(InputError) as caught:
            resolve(str(path))
        assert message in str(caught.value)
        assert str(path) in str(caught.value)


def test_metadata_are_those_that_the_gguf_package_reads(tmp_path: Path) -> None:
    metadata = {"a.text": "naïve 日本語", "a.flag": True, "a.flags": [True, False], "a.words": ["", "x", "é"]}
    metadata |= {"a.whole": [1, -2, 3], "a.real": [0.5, -1.5], "a.none": 0.25}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_metadata(tmp_path / "m.gguf")
    expected = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert {key: list(value) if isinstance(value, array.array) else value for key, value in found.items()} == {
        key: value for key, value in expected.items() if not key.startswith("GGUF.")
    }
    assert len(found) == len(metadata) + 10  # and the architecture


def test_types_of_tensors_are_those_of_the_gguf_package() -> None:
    assert {
        number: (kind.name, *gguf.GGML_QUANT_SIZES[kind])
        for kind in gguf.GGML_QUANT_SIZES
        if (number := int(kind)) in TYPES
    } == TYPES


@pytest.mark.parametrize("alignment", [None, 64])
def test_tensors_lie_where_the_gguf_package_finds_them(alignment: int | None, tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    path = write_gguf(tmp_path / "m.gguf", LLAMA, weights, tokenizer=byte_level_tokenizer(), alignment=alignment)
    header, reference = read_header(path), gguf.GGUFReader(path)
    assert header.bytes == reference.data_offset
    assert [(entry.name, entry.kind, entry.shape, entry.start, entry.bytes) for entry in header.tensors] == [
        (one.name, one.tensor_type.name, tuple(reversed(one.shape.tolist())), one.data_offset, one.n_bytes)
        for one in reference.tensors
    ]


def tensor_entry(name: bytes = b"t", shape: tuple[int, ...] = (32,), kind: int = 0, start: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name + sizes + struct.pack("<IQ", kind, start)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([tensor_entry(kind=99)], "tensor 't' of type 99, which is not known"),
        ([tensor_entry(shape=(1,) * 5)], "tensor 't' with 5 dimensions"),
        ([tensor_entry(shape=())], "tensor 't' with 0 dimensions"),
        (
            [tensor_entry(shape=(33, 2), kind=2)],
            "tensor 't' with rows of 33, which are no whole number of Q4_0's blocks",
        ),
        ([tensor_entry(), tensor_entry()], "two of its tensors have the same name"),
        ([tensor_entry(start=1 << 62)], "tensor 't' at byte 4611686018427388"),
        ([tensor_entry(shape=(1 << 40, 1 << 40))], "it ends at byte"),
    ],
)
def test_damaged_entries_of_tensors_are_refused(entries: list[bytes], told: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(entries), 0) + b"".join(entries) + bytes(1024))
    with pytest.raises(InputError, match="it is truncated or damaged, download it again") as caught:
        resolve(str(path))
    assert told in str(caught.value)


def test_long_lists_of_texts_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    path, words = tmp_path / "m.gguf", [f"wörd {number}" * (number % 5) for number in range(LONG + 700)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("a.words", words)
    writer.add_uint32("a.number", 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = read_metadata(path)
    found = metadata["a.words"]
    assert isinstance(found, TextList)
    assert metadata["a.number"] == 7
    assert len(found) == len(words)
    assert list(found) == words == found[:]
    assert [found[index] for index in (0, 255, 256, LONG, -1)] == [words[index] for index in (0, 255, 256, LONG, -1)]
    with pytest.raises(IndexError):
        found[len(words)]
    content = path.read_bytes()
    path.write_bytes(content[:2000])
    with pytest.raises(InputError, match="it ends at byte 2000, inside its header"):
        read_metadata(path)
    with pytest.raises(InputError, match="it is truncated or damaged, download it again"):
        list(found)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (struct.pack("<IQQ", 1, 0, 0), "version 1, versions 2 and 3 are known"),
        (struct.pack("<IQQ", 3, 0, 1 << 40), "1099511627776 keys in its header"),
        (
            struct.pack("<IQQ", 3, 0, 2) + 2 * (struct.pack("<Q", 1) + b"k" + struct.pack("<IB", 0, 0)),
            "the key 'k' twice",
        ),
        (struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "it ends at byte 32, inside its header"),
        (struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 99), "a value of type 99"),
        (struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 50), "a list of 1125899906842624"),
        (struct.pack("<IQQQ", 3, 0, 1, 1) + b"\xff" + struct.pack("<IB", 0, 0), "codec can't decode"),
    ],
)
def test_damaged_metadata_are_refused(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + content)
    for read in (resolve, lookup.vocabulary):
        with pytest.raises(InputError, match="it is truncated or damaged, download it again") as caught:
            read(str(path))
        assert told in str(caught.value)


# Tokenizers inside GGUF


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    tokenizer = byte_level_tokenizer()
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", LLAMA, random_weights(LLAMA), tokenizer=tokenizer)
    return tokenizer, lookup.vocabulary(str(path))


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    tokenizer, config = sentence_piece_tokenizer(), LLAMA | {"vocab_size": 420}
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", config, random_weights(config), tokenizer=tokenizer)
    return tokenizer, lookup.vocabulary(str(path))


PIECES = st.lists(
    st.one_of(
        st.sampled_from([*" \n\t'09aé日🙂", "the", "positive", " review", "it's", "345", *SPECIAL]), st.text(max_size=4)
    ),
    max_size=12,
)


@settings(max_examples=150)
@given(pieces=PIECES)
def test_byte_level_tokens_are_the_original_s(byte_level: tuple[Any, Any], pieces: list[str]) -> None:
    tokenizer, vocabulary = byte_level
    text = "".join(pieces)
    ids = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=150)
@given(pieces=PIECES)
def test_sentence_piece_tokens_are_the_original_s(sentence_piece: tuple[Any, Any], pieces: list[str]) -> None:
    tokenizer, vocabulary = sentence_piece
    text = "".join(pieces)
    ids = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids


def test_special_tokens_and_chat_template_come_along(
    byte_level: tuple[Any, Any], sentence_piece: tuple[Any, Any]
) -> None:
    vocabulary = byte_level[1]
    assert (vocabulary.bos_token, vocabulary.eos_token, vocabulary.pad_token, vocabulary.add_bos) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        False,
    )
    assert vocabulary.chat_template == CHAT
    assert vocabulary.special_tokens == {"unk_token": "<|endoftext|>"}
    assert vocabulary.tokenizer.encode("<|im_end|>").ids == [vocabulary.token_id("<|im_end|>")]
    assert sentence_piece[1].add_bos
    assert sentence_piece[1].chat_template is None


def test_implied_merges_are_those_of_transformers() -> None:
    from transformers.tokenization_utils_base import generate_merges

    tokenizer = sentence_piece_tokenizer()
    ids = tokenizer.get_vocab()
    scores = [-float(index) for index in range(len(ids))]
    expected = generate_merges(ids, {token: scores[index] for token, index in ids.items()})
    assert {tuple(merge) for merge in expected} == set(implied_merges(ids, scores))


def test_an_unknown_tokenizer_is_refused_when_it_is_needed(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", LLAMA, random_weights(LLAMA), metadata={"tokenizer.ggml.model": "rwkv"})
    with pytest.raises(InputError, match="tokenizer of kind 'rwkv' is not supported; supported: gpt2, llama"):
        lookup.vocabulary(str(path))
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "poro",
        "tokenizer.ggml.tokens": ["a", "aa"],
        "tokenizer.ggml.merges": ["a a"],
    }
    path = write_gguf(tmp_path / "n.gguf", LLAMA, random_weights(LLAMA), metadata=metadata)
    with pytest.raises(InputError, match="pre-tokenizer 'poro' is not supported"):
        lookup.vocabulary(str(path))
    damaged = {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"]}
    path = write_gguf(tmp_path / "o.gguf", LLAMA, random_weights(LLAMA), metadata=metadata | damaged)
    with pytest.raises(InputError, match="merge 'a b' names no token; the file is damaged"):
        lookup.vocabulary(str(path))


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("qwen2", "it|'S|Ġ|1|2|3|4|5|Ġx|ĊĊ|Ġ|Ġy|!?"),
        ("llama-bpe", "it|'S|Ġ|123|45|Ġx|ĊĊ|Ġ|Ġy|!?"),
        ("smollm", "it|'|S|Ġ|1|2|3|4|5|Ġx|ĊĊĠ|Ġy|!?"),
        ("gpt-2", "it|'|S|Ġ12345|Ġx|ĊĊĠ|Ġy|!?"),
    ],
)
def test_split_patterns_are_the_published_ones(pre: str, expected: str, tmp_path: Path) -> None:
    ids = byte_level_tokenizer().get_vocab()
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(ids, key=lambda token: ids[token]),
        "tokenizer.ggml.merges": ["Ġ t"],
    }
    path = write_gguf(tmp_path / "m.gguf", LLAMA, random_weights(LLAMA), metadata=metadata)
    found = gguf_tokenizer(path).pre_tokenizer.pre_tokenize_str("it'S 12345 x\n\n  y!?")
    assert "|".join(word for word, _ in found) == expected


# Hugging Face directories


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_directories_are_rounded_and_norms_kept(family: str, tmp_path: Path) -> None:
    config, weights = CONFIGS[family], random_weights(CONFIGS[family])
    source = resolve(str(write_directory(tmp_path / "model", config, weights)))
    found = stored(source, tmp_path)
    assert set(found) == set(weights)
    for name, weight in weights.items():
        if weight.dim() == 1:
            assert torch.equal(found[name], weight)
        else:
            assert 0.03 < (found[name] - weight).norm() / weight.norm() < 0.09


def test_shards_give_the_same_store_as_one_file(tmp_path: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in random_weights(LLAMA).items()}
    one = resolve(str(write_directory(tmp_path / "one", LLAMA, weights)))
    many = resolve(str(write_directory(tmp_path / "many", LLAMA, weights, shards=3)))
    assert one.fingerprint != many.fingerprint
    stores = [WeightStore.open(build_store(source, tmp_path / source.name)) for source in (one, many)]
    assert stores[0].fingerprint == stores[1].fingerprint


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_multimodal_gemma_is_taken(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, weights = CONFIGS["gemma3_text"], random_weights(CONFIGS["gemma3_text"])
    wrapped = {prefix + name.removeprefix("model."): weight for name, weight in weights.items()} | {
        "vision_tower.x.weight": torch.zeros(3)
    }
    outer = {
        "model_type": "gemma3",
        "text_config": config,
        "vision_config": {"hidden_size": 3},
        "tie_word_embeddings": True,
    }
    write_directory(tmp_path / "wrapped", outer, wrapped)
    write_directory(tmp_path / "plain", config, weights)
    source = resolve(str(tmp_path / "wrapped"))
    assert source.config["model_type"] == "gemma3_text"
    assert source.config["adapter_body"] == "model.language_model."
    assert "adapter_body" not in resolve(str(tmp_path / "plain")).config
    monkeypatch.setattr("tightfit.profiles.models.decoder_config.WRAPPED_BODY", "another.")
    assert resolve(str(tmp_path / "wrapped")).fingerprint == source.fingerprint
    file = str(tmp_path / "wrapped" / "config.json")
    other = resolve(file)
    monkeypatch.undo()
    assert resolve(file).fingerprint == other.fingerprint
    with WeightStore.open(build_store(source, tmp_path)) as store:
        assert "adapter_body" not in store.config
    plain = stored(resolve(str(tmp_path / "plain")), tmp_path)
    for name, tensor in stored(source, tmp_path).items():
        assert torch.equal(tensor, plain[name])


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_a_model_saved_without_its_head_is_taken_where_it_has_none_of_its_own(prefix: str, tmp_path: Path) -> None:
    """As AutoModel names the tensors that it saves."""
    config, weights = LLAMA | {"tie_word_embeddings": True}, random_weights(LLAMA)
    weights.pop("lm_head.weight", None)
    bare = {prefix + name.removeprefix("model."): weight for name, weight in weights.items()}
    whole = stored(resolve(str(write_directory(tmp_path / "whole", config, weights))), tmp_path)
    found = stored(resolve(str(write_directory(tmp_path / "bare", config, bare))), tmp_path)
    assert found.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())
    for name, said in (("untied", {"tie_word_embeddings": False}), ("unsaid", {})):
        silent = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
        path = write_directory(tmp_path / name, silent | said, bare)
        with pytest.raises(InputError, match=r"no tensor 'lm_head.weight' .*; it was saved without its head: save it"):
            resolve(str(path))


def test_directories_bring_their_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    path = write_directory(tmp_path / "model", LLAMA, random_weights(LLAMA), tokenizer=tokenizer)
    vocabulary = lookup.vocabulary(str(path))
    assert vocabulary is not None
    assert vocabulary.tokenizer.encode(TEXT[2]).ids == tokenizer.encode(TEXT[2]).ids
    assert (vocabulary.bos_token, vocabulary.eos_token, vocabulary.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert vocabulary.chat_template == CHAT
    assert not vocabulary.add_bos
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert lookup.vocabulary(str(path)).chat_template == "{{ messages[0].content }}"  # type: ignore[union-attr]
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="unreadable tokenizer"):
        lookup.vocabulary(str(path))
    (path / "tokenizer.json").unlink()
    assert lookup.vocabulary(str(path)) is None


@pytest.mark.parametrize(
    "files",
    [
        {"special_tokens_map.json": {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}},
        {"config.json": LLAMA | {"bos_token_id": 1, "eos_token_id": 2}},
        {"generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": -1}},
        {
            "tokenizer_config.json": {"bos_token": "<|im_start|>", "eos_token": None},
            "special_tokens_map.json": {"eos_token": "<|im_end|>"},
        },
    ],
    ids=str,
)
def test_the_end_of_text_is_found_wherever_it_is_told(files: dict[str, Any], tmp_path: Path) -> None:
    """Without it no completion would end."""
    path = write_directory(tmp_path / "model", LLAMA, random_weights(LLAMA), tokenizer=byte_level_tokenizer())
    (path / "tokenizer_config.json").write_text("{}")
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    vocabulary = lookup.vocabulary(str(path))
    assert vocabulary is not None
    assert (vocabulary.bos_token, vocabulary.eos_token, vocabulary.pad_token) == ("<|im_start|>", "<|im_end|>", None)
    assert Encoder(vocabulary, 320).completion("Is it? ", "positive", ended=True)[0][-1] == 2
    settings = {"eos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert lookup.vocabulary(str(path)).eos_token == "<|endoftext|>"  # type: ignore[union-attr]


def test_a_token_before_the_text_that_is_denied_stays_away(tmp_path: Path) -> None:
    """Qwen's configs number one that its templates must not print."""
    path = write_directory(tmp_path / "model", LLAMA, random_weights(LLAMA), tokenizer=byte_level_tokenizer())
    (path / "config.json").write_text(json.dumps(LLAMA | {"bos_token_id": 1, "eos_token_id": 2}))
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|im_start|>"}))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": None}))
    vocabulary = lookup.vocabulary(str(path))
    assert vocabulary is not None
    assert (vocabulary.bos_token, vocabulary.eos_token) == (None, "<|im_end|>")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_beside_the_tokenizer_is_named(name: str, content: str, tmp_path: Path) -> None:
    path = write_directory(tmp_path / "model", LLAMA, random_weights(LLAMA), tokenizer=byte_level_tokenizer())
    (path / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name}: damaged .*; download the file again"):
        lookup.vocabulary(str(path))


def break_directory(path: Path, how: str) -> None:
    file = path / "model.safetensors"
    if how == "no config":
        (path / "config.json").unlink()
    elif how == "bad config":
        (path / "config.json").write_text("{'model_type'")
    elif how == "no model type":
        (path / "config.json").write_text("[1, 2]")
    elif how == "other family":
        (path / "config.json").write_text(json.dumps(LLAMA | {"model_type": "t5"}))
    elif how == "quantised":
        (path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": {"quant_method": "quanto"}}))
    elif how == "no weights":
        file.unlink()
    elif how == "bin":
        file.rename(path / "pytorch_model.bin")
    elif how == "truncated":
        os.truncate(file, file.stat().st_size - 10)
    elif how == "empty":
        os.truncate(file, 0)
    elif how == "flipped":
        data = bytearray(file.read_bytes())
        data[6] ^= 1
        file.write_bytes(data)
    elif how == "more layers":
        (path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 4}))
    elif how == "wider":
        (path / "config.json").write_text(json.dumps(LLAMA | {"intermediate_size": 128}))
    elif how == "integers":
        weights = random_weights(LLAMA)
        write_directory(path, LLAMA, {n: (w * 100).to(torch.int8) if w.dim() > 1 else w for n, w in weights.items()})
    elif how == "biases":
        weights = random_weights(LLAMA) | {"model.layers.1.self_attn.q_proj.bias": torch.ones(64)}
        write_directory(path, LLAMA, weights)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "config.json: No such file or directory; a model directory needs a config.json"),
        ("bad config", "config.json: not JSON"),
        ("no model type", "config.json: not a model config (no 'model_type')"),
        ("other family", "model_type 't5' is an encoder-decoder model"),
        (
            "quantised",
            "weights quantised with quanto, which cannot be read; readable: GPTQ, AWQ, bitsandbytes, MXFP4; use the",
        ),
        ("no weights", "no model.safetensors; save the model with save_pretrained(safe_serialization=True)"),
        ("bin", "pytorch_model.bin is a pickle, which runs code when it is read, and is not opened; convert it"),
        ("truncated", "model.safetensors: not a readable safetensors file"),
        ("empty", "model.safetensors: not a readable safetensors file"),
        ("flipped", "model.safetensors: not a readable safetensors file"),
        ("more layers", "no tensor 'model.layers.3.input_layernorm.weight' in its safetensors files"),
        ("wider", "tensor 'model.layers.0.mlp.gate_proj.weight' has shape [96, 64] where [128, 64] is due"),
        (
            "integers",
            "tensor 'model.embed_tokens.weight' is I8, and config.json states no quantisation that can be read; use",
        ),
        ("biases", "tensor 'model.layers.1.self_attn.q_proj.bias' belongs to no llama decoder of this config.json"),
    ],
)
def test_a_broken_directory_is_refused(how: str, message: str, tmp_path: Path) -> None:
    path = write_directory(tmp_path / "model", LLAMA, random_weights(LLAMA))
    break_directory(path, how)
    with pytest.raises(InputError) as caught:
        build_store(resolve(str(path)), tmp_path / "cache")
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    assert not any((tmp_path / "cache").glob("*"))


def test_missing_and_damaged_shards_are_named(tmp_path: Path) -> None:
    path = write_directory(tmp_path / "model", LLAMA, random_weights(LLAMA), shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard model-00002-of-00003\.safetensors is missing \(1 of 3\)"):
        resolve(str(path))
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"index.json: damaged"):
        resolve(str(path))
    # An index that others wrote names files beside it, never one that lies elsewhere.
    shutil.copy(path / "model-00001-of-00003.safetensors", tmp_path / "other.safetensors")
    for name in ("../other.safetensors", str(tmp_path / "other.safetensors"), 5, ["a"]):
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(InputError, match=r"index.json: damaged"):
            resolve(str(path))


def test_changed_weights_change_the_fingerprint(tmp_path: Path) -> None:
    path = write_directory(tmp_path / "model", LLAMA, random_weights(LLAMA))
    before = resolve(str(path)).fingerprint
    assert resolve(str(path)).fingerprint == before
    assert resolve(str(path), embeddings="8bit").fingerprint != before
    write_directory(path, LLAMA, random_weights(LLAMA, seed=1))
    assert resolve(str(path)).fingerprint != before


# Hub ids, bare configs, factories, anything else


def test_a_hub_id_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        InputError, match=r"org/model: no such directory; for a Hugging Face hub id run pip install 'tightfit\[hub\]'"
    ):
        resolve("org/model")


def test_a_hub_id_is_downloaded_and_failures_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write_directory(tmp_path / "snapshot", LLAMA, random_weights(LLAMA))
    asked: list[Any] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "org/absent":
            raise OSError("404 Client Error.\nmore")
        return str(path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    source = resolve("org/model")
    assert (source.name, source.kind) == ("org/model", "huggingface")
    assert asked == [("org/model", ["*.json", "*.safetensors", "*.jinja"])]
    assert "/" not in build_store(source, tmp_path / "cache").name
    with pytest.raises(
        InputError, match=r"org/absent: no such directory, and the Hugging Face hub answered: 404 Client Error\.; check"
    ):
        resolve("org/absent")


def test_a_bare_config_has_random_weights(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["qwen2"]))
    source = resolve(str(path))
    assert (source.kind, source.has_weights, lookup.vocabulary(str(path)), source.name) == (
        "random",
        False,
        None,
        tmp_path.name,
    )
    assert source.entries == describe(CONFIGS["qwen2"])
    assert resolve(str(path), seed=1).fingerprint != source.fingerprint
    assert all(torch.isfinite(tensor).all() for tensor in stored(source, tmp_path).values())


FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2, dtype=torch.bfloat16)
        self.register_buffer("mask", torch.tensor([True, False]))

def make():
    return Net(), (torch.zeros(2, 3, 8, 8),)

def wrong():
    return Net()

def empty():
    return nn.ReLU(), ()

def strange():
    net = Net()
    net.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    return net, ()

def frozen():
    return Net().requires_grad_(False), ()

def raises():
    raise RuntimeError("boom")

def named():
    return Net(), {"x": torch.zeros(2, 3, 8, 8)}

def scaled():
    return Net(), (torch.zeros(2, 3, 8, 8), 0.5)

value = 3
"""


@pytest.fixture
def enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Work in a folder of the test's; the path is put right afterwards, and what was imported from there is
    forgotten.
    """
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield monkeypatch.chdir
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in repr(getattr(module, "__spec__", None)):
            del sys.modules[name]


def test_a_factory_s_initial_parameters_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    state = torch.get_rng_state()
    source = resolve("tiny_factory:make")
    assert torch.equal(torch.get_rng_state(), state)
    import tiny_factory

    torch.manual_seed(0)
    module = tiny_factory.make()[0]
    config = {"factory": "tiny_factory:make", "state_dict": {key: key for key in module.state_dict()}}
    assert (source.kind, source.config, source.has_weights) == ("module", config, True)
    with WeightStore.open(build_store(source, tmp_path / "cache")) as store:
        assert set(store.entries) == set(module.state_dict())
        for name, value in module.state_dict().items():
            out = torch.empty(value.shape, dtype=torch.float32 if value.is_floating_point() else value.dtype)
            assert store.entries[name].format == (
                "float32" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
            )
            store.load(name, out)
            assert torch.equal(out, value.to(out.dtype)), name
    assert resolve("tiny_factory:make").fingerprint == source.fingerprint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "no_such_module:make",
            "No module named 'no_such_module'; it is not installed and not in the working folder {folder}; run from",
        ),
        (
            "bare.absent:make",
            "No module named 'bare.absent'; it is not installed and not in the working folder {folder}; run from",
        ),
        (
            "profiles.tiny:make",
            "No module named 'profiles.tiny' in the package at {root}/profiles/__init__.py, which comes before the working folder {folder}; rename yours",
        ),
        ("runtime:make", "module 'runtime' has no function 'make'; the module is {root}/runtime/__init__.py"),
        ("bare:make", "module 'bare' has no function 'make'; the module is {folder}/bare"),
        (
            "needy_factory:make",
            "importing 'needy_factory' needs 'no_such_package', which is not installed and not in {folder}; install it",
        ),
        ("tiny_factory:absent", "module 'tiny_factory' has no function 'absent'"),
        ("tiny_factory:value", "module 'tiny_factory' has no function 'value'"),
        ("tiny_factory:wrong", "returned Net; a factory returns (nn.Module, tuple of sample batch tensors)"),
        ("tiny_factory:frozen", "no parameter of the module requires a gradient; there is nothing to train"),
        ("tiny_factory:raises", "tiny_factory:raises raised RuntimeError: boom"),
        ("tiny_factory:named", "returned (Net, dict); a factory returns (nn.Module, tuple of sample batch tensors)"),
        ("tiny_factory:scaled", "item 1 of the sample batch is of type float; a batch is a tuple of tensors"),
        ("broken_factory:make", "importing 'broken_factory' raised NameError: name 'nowhere' is not defined"),
        ("tiny_factory:empty", "the module has no parameters; there is nothing to train"),
        ("tiny_factory:strange", "'phase' has type torch.complex64"),
    ],
)
def test_a_factory_that_cannot_be_used_says_why(
    source: str, message: str, tmp_path: Path, enter: Callable[[Path], None]
) -> None:
    (tmp_path / "tiny_factory.py").write_text(FACTORY)
    (tmp_path / "broken_factory.py").write_text("nowhere\n")
    (tmp_path / "needy_factory.py").write_text("import no_such_package.part\n")
    for path in ("bare/tiny.py", "profiles/tiny.py", "runtime.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(FACTORY)
    enter(tmp_path)
    with pytest.raises(InputError) as caught:
        resolve(source)
    assert message.format(folder=tmp_path, root=ROOT) in str(caught.value)


def test_a_factory_s_module_is_looked_for_in_the_working_folder_after_all_else(
    tmp_path: Path, enter: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("here/bare/tiny.py", "here/json.py", "there/found_first.py", "here/found_first.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(FACTORY + f"place = {path!r}\n")
    monkeypatch.syspath_prepend(tmp_path / "there")
    enter(tmp_path / "here")
    assert resolve("bare.tiny:make").kind == resolve("found_first:make").kind == "module"
    import found_first

    assert found_first.place == "there/found_first.py"
    with pytest.raises(InputError, match="module 'json' has no function 'make'"):
        resolve("json:make")
    assert sys.path[-1] == str(tmp_path / "here")
    assert sys.path.count(sys.path[-1]) == 1


def test_a_working_folder_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(
        InputError, match=r"^tiny:make: the working folder, in which a module is looked for, was removed"
    ):
        resolve("tiny:make")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for source in (str(tmp_path / "notes.txt"), str(tmp_path / "absent.gguf"), "a b c"):
        with pytest.raises(
            InputError,
            match=r"a model is a Hugging Face directory or hub id, a GGUF file, a config\.json, or package\.module:factory",
        ):
            resolve(source)


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", "/somewhere")
    assert cache_directory() == Path("/somewhere")
    monkeypatch.delenv("TIGHTFIT_CACHE")
    assert cache_directory() == Path.home() / ".cache" / "tightfit"


def test_a_gguf_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "weights", LLAMA, random_weights(LLAMA))
    assert struct.unpack("<I", path.read_bytes()[:4])[0] == gguf.GGUF_MAGIC
    assert resolve(str(path)).kind == "gguf"
