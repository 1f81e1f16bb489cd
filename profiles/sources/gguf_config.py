"""Turns GGUF metadata into a Hugging Face style config.

Key names are those of the GGUF specification (``llama.block_count``, ...). Fields that llama.cpp's
`convert_hf_to_gguf.py` drops are filled with the values that llama.cpp's code for the architecture assumes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from tightfit.profiles.models.family import family_of_gguf
from tightfit.runtime.common.errors import InputError

HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


def config_from_metadata(
    metadata: dict[str, Any], *, vocabulary: int, tied: bool, rope_factors: Sequence[float] | None
) -> dict[str, Any]:
    """The config of a decoder. `rope_factors` is the file's rope_freqs tensor, of head_dim / 2 numbers, if it has one.

    `vocabulary` is the number of tokens; `tied` says whether the file has no head of its own. Raises InputError for an
    unsupported architecture or a missing key.
    """
    architecture = metadata.get("general.architecture")
    family = family_of_gguf(architecture)
    assert family.gguf is not None

    def required(key: str) -> Any:
        if f"{architecture}.{key}" not in metadata:
            raise InputError(f"GGUF metadata lacks {architecture}.{key}; convert the model again")
        return metadata[f"{architecture}.{key}"]

    def optional(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    heads, hidden, layers = required("attention.head_count"), required("embedding_length"), required("block_count")
    head_dim = optional("attention.key_length") or optional("rope.dimension_count") or hidden // heads
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": required("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": optional("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": round(float(required("attention.layer_norm_rms_epsilon")), 12),
        "rope_theta": float(optional("rope.freq_base", family.theta)),
        "max_position_embeddings": optional("context_length", 0),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }
    for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        if f"tokenizer.ggml.{name}_token_id" in metadata:
            config[key] = metadata[f"tokenizer.ggml.{name}_token_id"]
    if (repository := _repository(metadata)) is not None:
        config["adapter_base"] = repository
    config |= family.gguf.settings(optional, layers, hidden // heads, head_dim)
    scaling = optional("rope.scaling.type")
    if rope_factors is not None:
        config["rope_scaling"] = llama3_scaling(rope_factors, config["rope_theta"], head_dim)
    elif scaling == "linear" or (scaling is None and optional("rope.scaling.factor") not in (None, 1.0)):
        config["rope_scaling"] = {"rope_type": "linear", "factor": float(required("rope.scaling.factor"))}
    elif scaling not in (None, "none"):
        raise InputError(f"GGUF rope scaling {scaling!r} is not supported; supported: none, linear, llama3")
    return config


def _repository(metadata: dict[str, Any]) -> str | None:
    """The Hugging Face id of the model that the file was converted from, if its metadata name it.

    Not `general.base_model`, the model that this one was trained from, nor `general.repo_url`, which is often that of
    the GGUF files.
    """
    repository = metadata.get("general.source.huggingface.repository")
    if isinstance(repository, str) and re.fullmatch(HUB_ID, repository):
        return repository
    for key in ("general.source.repo_url", "general.source.url"):
        match = re.fullmatch(rf"https?://(?:www\.)?huggingface\.co/({HUB_ID})/?", str(metadata.get(key)))
        if match:
            return match[1]
    return None


def llama3_scaling(factors: Sequence[float], theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 rope scaling whose divisors are `factors`, head_dim / 2 of them.

    A GGUF file holds only the divisors of the rotary frequencies. The largest one is taken as the factor, and the
    bounds are assumed to be those of every published Llama 3; the divisors are then recomputed as a check. Raises
    InputError if they differ.
    """
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": round(max(factors, default=0.0), 3),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    try:
        expected = [_divisor(theta ** (dimension / head_dim), scaling["factor"]) for dimension in range(0, head_dim, 2)]
    except (ArithmeticError, TypeError):  # of a base or a factor that is no positive number
        expected = []
    if len(factors) != len(expected) or not all(map(partial(math.isclose, rel_tol=1e-3), factors, expected)):
        raise InputError("the GGUF's rope_freqs are not Llama 3's rope scaling; use the model's Hugging Face directory")
    return scaling


def _divisor(wavelength: float, factor: float) -> float:
    """What Llama 3's rope scaling divides a frequency by; its wavelength is in tokens / 2 pi."""
    smooth = min(max((8192 / (2 * math.pi * wavelength) - 1.0) / 3.0, 0.0), 1.0)
    return 1 / ((1 - smooth) / factor + smooth)
