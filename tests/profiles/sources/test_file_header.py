"""The header of a GGUF file, sent without its weights, gives the configuration that opening the file gives."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from reference import CONFIGS
from tiny_models import byte_level_tokenizer, header_of, random_weights, write_gguf

from tightfit.profiles.sources.file_header import FileHeader, model_of_header
from tightfit.profiles.sources.gguf_source import gguf_source
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
        "does not say what the model is, as that of a safetensors file; choose its config.json",
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


def test_a_header_is_bounded():
    for tensors in ({"a": {"shape": [], "format": "F32"}}, {"a": {"shape": [1 << 40], "format": "F32"}}):
        with pytest.raises(ValidationError):
            FileHeader(metadata={}, tensors=tensors)
    with pytest.raises(ValidationError):
        FileHeader(metadata={"a": [1]}, tensors={})
