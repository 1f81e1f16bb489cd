"""The header of a GGUF file, sent without its weights, gives the configuration that opening the file gives."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
from pydantic import ValidationError
from reference import CONFIGS
from tiny_models import byte_level_tokenizer, header_of, random_weights, write_gguf

from tightfit.profiles.models.decoder_config import decoder_shape
from tightfit.profiles.sources.file_header import FileHeader, model_of_header
from tightfit.profiles.sources.gguf_source import gguf_source
from tightfit.profiles.weights.describe import decoder_tensors
from tightfit.profiles.weights.precision import Precision
from tightfit.runtime.common.errors import InputError


def write(path, family, **options):
    config = CONFIGS[family]
    return write_gguf(path / "model.gguf", config, random_weights(config), **options)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_header_gives_the_configuration_of_its_file(tmp_path, family):
    path = write(tmp_path, family, tokenizer=byte_level_tokenizer(), metadata={"general.name": "Tiny Model"})
    config, base, _ = model_of_header(FileHeader(**header_of(path)), Precision())
    assert config == gguf_source(path).config | {"_name_or_path": "Tiny Model"}
    assert base == "4bit"


@pytest.mark.parametrize(
    ("kind", "asked", "found"), [("Q8_0", None, "8bit"), ("F16", None, "4bit"), ("F16", "16bit", "16bit")]
)
def test_the_precision_is_that_in_which_the_file_would_be_stored(tmp_path, kind, asked, found):
    path = write(tmp_path, "llama", default=kind)
    _, base, embeddings = model_of_header(FileHeader(**header_of(path)), Precision(base=asked))
    assert (base, embeddings) == (found, found)


def changed(header, metadata=(), tensors=()):
    return {
        "metadata": {k: v for k, v in (header["metadata"] | dict(metadata)).items() if v is not None},
        "tensors": {k: v for k, v in (header["tensors"] | dict(tensors)).items() if v is not None},
    }


WRONG = [
    (
        {"general.architecture": None},
        {},
        "no tensor 'model.embed_tokens.weight' in the header; it is one of several files",
    ),
    ({"general.architecture": "whisper"}, {}, "GGUF architecture 'whisper' is not supported"),
    ({}, {"token_embd.weight": None}, "no tensor 'token_embd.weight'"),
    ({}, {"output_norm.weight": None}, "no tensor for 'model.norm.weight'"),
    ({}, {"output_norm.weight": {"shape": [3], "format": "F32"}}, r"'output_norm.weight' has shape \[3\] where"),
    ({}, {"blk.0.more.weight": {"shape": [3], "format": "F32"}}, "belongs to no llama decoder"),
    ({"llama.block_count": 10**9}, {}, "1000000000 layers; at most 4096 are supported"),
    ({"llama.block_count": "many"}, {}, "."),
    ({"llama.attention.head_count": 0, "llama.attention.key_length": None}, {}, "."),
    ({"llama.attention.layer_norm_rms_epsilon": "small"}, {}, "the header's metadata do not fit together"),
    ({"llama.embedding_length": -4}, {}, "."),
]


@pytest.mark.parametrize(("metadata", "tensors", "message"), WRONG)
def test_a_header_that_makes_no_model_is_refused(tmp_path, metadata, tensors, message):
    header = changed(header_of(write(tmp_path, "llama")), metadata, tensors)
    with pytest.raises(InputError, match=message):
        model_of_header(FileHeader(**header), Precision())


GALLERY = json.loads((files("tightfit.planner.service.wire") / "gallery.json").read_text())
SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


def tensors_of(config):
    return {name: {"shape": list(shape), "format": "BF16"} for name, shape in decoder_tensors(decoder_shape(config))}


@pytest.mark.parametrize("name", GALLERY)
def test_names_and_shapes_of_a_safetensors_file_tell_the_sizes_of_published_models(name):
    published = GALLERY[name]
    header = FileHeader(metadata={"format": "pt"}, tensors=tensors_of(published))
    if "num_experts" in published:
        with pytest.raises(InputError, match=r"is of a mixture of experts.* give the config\.json"):
            model_of_header(header, Precision())
        return
    config, base, embeddings = model_of_header(header, Precision())
    expected = published | ({"model_type": "llama"} if published["model_type"] == "mistral" else {})
    assert {size: config[size] for size in SIZES} == {size: expected[size] for size in SIZES}
    found, due = decoder_shape(config), decoder_shape(expected)
    assert (found.head_dim, found.intermediate, found.tied) == (due.head_dim, due.intermediate, due.tied)
    assert (base, embeddings) == (None, None)


def test_a_part_of_a_model_or_another_family_in_safetensors_is_refused():
    config = CONFIGS["llama"] | {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    whole = tensors_of(config)
    assert model_of_header(FileHeader(metadata={}, tensors=whole), Precision())[0]["num_attention_heads"] == 2
    norm = whole["model.norm.weight"]
    for changes, message in (
        ({"model.norm.weight": None}, "no tensor 'model.norm.weight' in the header; it is one of several files"),
        ({"model.layers.1.mlp.up_proj.weight": None}, "no tensor 'model.layers.1.mlp.up_proj.weight'"),
        ({"model.layers.0.mlp.experts.weight": norm}, "belongs to no llama decoder"),
        ({"model.layers.1.mlp.up_proj.weight": norm}, "has shape .* where .* is due"),
        ({"model.embed_tokens.weight": norm}, "config field 'hidden_size' must be a positive whole number"),
        ({f"model.layers.{number}.x": norm for number in range(9)}, "no tensor"),
    ):
        tensors = {name: tensor for name, tensor in (whole | changes).items() if tensor is not None}
        with pytest.raises(InputError, match=message):
            model_of_header(FileHeader(metadata={}, tensors=tensors), Precision())


def test_a_header_is_bounded():
    for tensors in ({"a": {"shape": [], "format": "F32"}}, {"a": {"shape": [1 << 40], "format": "F32"}}):
        with pytest.raises(ValidationError):
            FileHeader(metadata={}, tensors=tensors)
    with pytest.raises(ValidationError):
        FileHeader(metadata={"a": [1]}, tensors={})
