"""The metadata of a GGUF file, made from a Hugging Face directory: what llama.cpp reads of a config.json and a
tokenizer.json.

For the families, rope scalings and tokenizers that tightfit reads from GGUF files. What is written is read back and has
to be the same decoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from tightfit.profiles.models.decoder_config import DecoderShape, decoder_shape
from tightfit.profiles.models.family import family_of
from tightfit.profiles.sources.directory_tokenizer import directory_vocabulary
from tightfit.profiles.sources.gguf_config import config_from_metadata
from tightfit.profiles.sources.gguf_metadata import MetadataValue
from tightfit.profiles.sources.gguf_tokenizer import CONTROL, SPLITS, USER_DEFINED, implied_merges
from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.profiles.weights.source import Source
from tightfit.profiles.weights.tensor_file import contents
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.results.gguf_file import GgufTensor

Kind = gguf.GGUFValueType
NORMAL, UNKNOWN, UNUSED, BYTE = 1, 2, 5, 6
"""further values of tokenizer.ggml.token_type"""
FACTORS = "rope_freqs.weight"


def metadata_of(source: Source, way: str) -> dict[str, MetadataValue]:
    """The metadata of a directory's model. Raises InputError, which names the `way` out, for what they cannot say."""
    shape, config = decoder_shape(source.config), source.config
    facts = family_of(config).gguf
    assert facts is not None
    numbers: dict[str, int | float] = {
        "block_count": shape.layers,
        "context_length": int(config.get("max_position_embeddings") or 0),
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.intermediate,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.head_dim,
        "vocab_size": shape.vocab,
        "attention.layer_norm_rms_epsilon": shape.eps,
        "rope.freq_base": max(shape.thetas),
    }
    if window := max((window or 0 for window in shape.windows), default=0):
        numbers["attention.sliding_window"] = window
    scaling = dict(shape.rope_scaling)
    metadata = {
        "general.type": _text(gguf.GGUFType.MODEL),
        "general.name": _text(source.name),
        "general.quantization_version": MetadataValue(value=gguf.GGML_QUANT_VERSION, kind=int(Kind.UINT32)),
    }
    metadata |= {f"{facts.architecture}.{key}": _number(value) for key, value in numbers.items()}
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        metadata[f"{facts.architecture}.rope.scaling.type"] = _text("linear")
        metadata[f"{facts.architecture}.rope.scaling.factor"] = _number(float(scaling["factor"]))
    _check(source, shape, {"general.architecture": _text(facts.architecture), **metadata}, way)
    vocabulary = directory_vocabulary(Path(source.path))
    if vocabulary is None:
        raise InputError(f"{source.path}: no tokenizer.json, and a GGUF file holds the tokenizer; {way}")
    return metadata | _tokenizer(source, vocabulary, shape.vocab, way)


def rope_factors(source: Source) -> list[GgufTensor]:
    """The divisors of the rotary frequencies under Llama 3's rope scaling, as a tensor; none without it."""
    factors = _factors(decoder_shape(source.config))
    if factors is None:
        return []
    return [GgufTensor(name=FACTORS, shape=list(factors.shape), kind="F32", chunks=lambda: [contents(factors)])]


def _factors(shape: DecoderShape) -> Tensor | None:
    """float32 [head_dim / 2]"""
    scaling = dict(shape.rope_scaling)
    if scaling.get("rope_type", scaling.get("type")) != "llama3":
        return None
    wavelength = 2 * torch.pi * shape.thetas[0] ** (torch.arange(0, shape.head_dim, 2).double() / shape.head_dim)
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    smooth = ((float(scaling["original_max_position_embeddings"]) / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / float(scaling["factor"]) + smooth)).float()


def _check(source: Source, shape: DecoderShape, metadata: Mapping[str, MetadataValue], way: str) -> None:
    """Raise InputError unless reading the metadata gives the same decoder."""
    values = {key: value.value for key, value in metadata.items()}
    divisors = _factors(shape)
    factors = None if divisors is None else divisors.tolist()
    try:
        config = config_from_metadata(values, vocabulary=shape.vocab, tied=shape.tied, rope_factors=factors)
    except InputError as error:
        raise InputError(f"{source.path}: {error}; {way}") from error
    # GGUF metadata do not say which biases there are; the tensors show it.
    biased = shape.attention_bias and not family_of(source.config).always_biased
    decoder = decoder_shape(config | {"attention_bias": biased, "mlp_bias": shape.mlp_bias})
    differing = [
        name
        for name, value in vars(replace(shape, padding=None, rope_scaling=())).items()
        if value != getattr(replace(decoder, padding=None, rope_scaling=()), name)
    ]
    if differing:
        raise InputError(
            f"{source.path}: llama.cpp's metadata for {shape.family} models cannot say its {', '.join(differing)};"
            f" {way}"
        )


# --- tokenizers -------------------------------------------------------------------------------------------------------


def _tokenizer(source: Source, vocabulary: Vocabulary, size: int, way: str) -> dict[str, MetadataValue]:
    tokenizer = json.loads(vocabulary.tokenizer.to_str())
    model = tokenizer["model"]
    token_of = {index: token for token, index in vocabulary.tokenizer.get_vocab().items()}
    if token_of and max(token_of) >= size:
        raise InputError(
            f"{source.path}: its tokenizer has token {max(token_of)}, and the model has {size}; download it again"
        )
    tokens = [token_of.get(index, f"[PAD{index}]") for index in range(size)]
    types = [NORMAL if index in token_of else UNUSED for index in range(size)]
    for added in tokenizer.get("added_tokens") or ():
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model.get("merges") or ()
    ]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        metadata = _sentence_piece(tokenizer, tokens, types, merges)
    else:
        metadata = _byte_level(tokenizer, merges) if model["type"] == "BPE" else None
    if metadata is None:
        raise InputError(f"{source.path}: its tokenizer is of a kind that tightfit cannot write to GGUF; {way}")
    metadata["tokenizer.ggml.tokens"] = MetadataValue(value=tokens, kind=int(Kind.ARRAY), inner=int(Kind.STRING))
    metadata["tokenizer.ggml.token_type"] = MetadataValue(value=types, kind=int(Kind.ARRAY), inner=int(Kind.INT32))
    special = {
        "bos": vocabulary.bos_token,
        "eos": vocabulary.eos_token,
        "padding": vocabulary.pad_token,
        "unknown": vocabulary.special_tokens.get("unk_token"),
    }
    for name, token in special.items():
        if (index := vocabulary.token_id(token)) is not None:
            metadata[f"tokenizer.ggml.{name}_token_id"] = MetadataValue(value=index, kind=int(Kind.UINT32))
    metadata["tokenizer.ggml.add_bos_token"] = MetadataValue(value=vocabulary.add_bos, kind=int(Kind.BOOL))
    if vocabulary.chat_template:
        metadata["tokenizer.chat_template"] = _text(vocabulary.chat_template)
    if vocabulary.tool_template:
        metadata["tokenizer.chat_template.tool_use"] = _text(vocabulary.tool_template)
        metadata["tokenizer.chat_templates"] = MetadataValue(
            value=["tool_use"], kind=int(Kind.ARRAY), inner=int(Kind.STRING)
        )
    return metadata


def _byte_level(text: Mapping[str, Any], merges: list[tuple[str, ...]]) -> dict[str, MetadataValue] | None:
    """BPE over bytes; None: texts are split in a way of which tightfit does not know llama.cpp's name."""
    pre = text.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    kinds = [part.get("type") for part in parts]
    normalizer = (text.get("normalizer") or {}).get("type")
    name = None
    if kinds == ["Split", "ByteLevel"] and parts[0]["behavior"] == "Isolated" and not parts[1]["use_regex"]:
        pattern = parts[0]["pattern"].get("Regex")
        name = next((name for name, split_pattern in SPLITS.items() if split_pattern == pattern), None)
    elif kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
        name = "smollm"
    elif kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        name = "gpt-2"
    ignores_merges = bool(text["model"].get("ignore_merges"))
    if name is None or normalizer != ("NFC" if name == "qwen2" else None) or ignores_merges != (name == "llama-bpe"):
        return None
    return {
        "tokenizer.ggml.model": _text("gpt2"),
        "tokenizer.ggml.pre": _text(name),
        "tokenizer.ggml.merges": MetadataValue(
            value=[" ".join(merge) for merge in merges], kind=int(Kind.ARRAY), inner=int(Kind.STRING)
        ),
        "tokenizer.ggml.add_space_prefix": MetadataValue(
            value=bool(parts[-1]["add_prefix_space"]), kind=int(Kind.BOOL)
        ),
    }


def _sentence_piece(
    text: Mapping[str, Any], tokens: list[str], types: list[int], merges: list[tuple[str, ...]]
) -> dict[str, MetadataValue] | None:
    """BPE with byte fallback, whose merges follow from scores that fall from token to token; None: they do not."""
    scores = [-float(index) for index in range(len(tokens))]
    vocabulary: dict[str, int] = text["model"]["vocab"]
    added = {token_entry["content"] for token_entry in text.get("added_tokens") or ()}
    plain = [merge for merge in merges if "".join(merge) not in added]
    order = [vocabulary["".join(merge)] for merge in plain]
    implied = {merge for merge in implied_merges(vocabulary, scores) if "".join(merge) not in added}
    if set(plain) != implied or order != sorted(order):
        return None
    for index, token in enumerate(tokens):
        if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
            types[index] = BYTE
    unknown = vocabulary[text["model"]["unk_token"]]
    types[unknown] = UNKNOWN
    return {
        "tokenizer.ggml.model": _text("llama"),
        "tokenizer.ggml.unknown_token_id": MetadataValue(value=unknown, kind=int(Kind.UINT32)),
        "tokenizer.ggml.scores": MetadataValue(value=scores, kind=int(Kind.ARRAY), inner=int(Kind.FLOAT32)),
        "tokenizer.ggml.add_space_prefix": MetadataValue(value=_prefixed(text), kind=int(Kind.BOOL)),
    }


def _prefixed(text: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text, by the normalizer or, in newer files, by the pre-tokenizer."""
    normalizer = text.get("normalizer") or {}
    pre = text.get("pre_tokenizer") or {}
    metaspace = pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"
    parts = normalizer.get("normalizers", [normalizer])
    return metaspace or any(part.get("type") == "Prepend" for part in parts)


def _text(value: str) -> MetadataValue:
    return MetadataValue(value=value, kind=int(Kind.STRING))


def _number(value: float) -> MetadataValue:
    return MetadataValue(value=value, kind=int(Kind.UINT32 if isinstance(value, int) else Kind.FLOAT32))
