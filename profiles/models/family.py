"""Defines `Family`, the record of how a family of decoders differs from Llama, and looks families up.

Each family is a file in `profiles.models.families`; fields left at their defaults mean "as in Llama". `family_of` finds
a family by the ``model_type`` of a config.json, `family_of_gguf` by the architecture that a GGUF file names.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

from tightfit.profiles.models import families as folder
from tightfit.runtime.common.errors import InputError

Config = Mapping[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"
LayerTypes = tuple[list[str] | None, int | None]
"""(`FULL` or `SLIDING` for each layer, or None if all are full; the sliding window in tokens, or None)."""
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of tensors in a GGUF file -> Hugging Face's names."""


def all_full(config: Config, layers: int, window: int | None) -> LayerTypes:
    """The default of `Family.layer_types`: no layer has a sliding window unless the config lists layer types."""
    return None, window


@dataclass(frozen=True, kw_only=True)
class GgufFacts:
    """How llama.cpp writes the family."""

    architecture: str
    """Value of ``general.architecture``."""
    names: Mapping[str, str] = field(default_factory=lambda: GGUF_NAMES)
    permuted: bool = False
    """Whether llama.cpp permutes the rows of q and k for its interleaved rotary embedding."""
    norm_offset: float = 0.0
    """What llama.cpp adds to the weights of norms."""
    settings: Callable[[Callable[..., Any], int, int, int], dict[str, Any]] = lambda have, layers, width, head_dim: {}
    """(have, layers, hidden size / heads, head_dim) -> config fields that the metadata leave out; have(key, default)
    reads the metadata."""


@dataclass(frozen=True, kw_only=True)
class Family:
    model_type: str
    """``model_type`` in the family's config.json."""
    wrapped_as: Mapping[str, Config] = field(default_factory=dict)
    """Other values of ``model_type`` for the same family, those of text models in multimodal wrappers and of wrappers
    whose config.json has the text model's fields beside its own; with what their fields are by default, where that
    differs.
    """
    head_dim: int | None = None
    """Default if the config has none; None means hidden size / heads."""
    activation: str = "silu"
    tied: bool = False
    """Default for whether head and embedding share one weight."""
    theta: float = 10_000.0
    """Default base of the rotary frequencies."""
    local_theta: bool = False
    """Whether layers with a sliding window have a rotary base of their own and no rope scaling."""
    always_biased: bool = False
    """Whether q, k and v have biases regardless of the config."""
    output_bias: bool = True
    """Whether ``attention_bias`` applies to the output projection too."""
    head_norm: bool = False
    """RMSNorm over each head of q and k"""
    unit_offset: bool = False
    """RMSNorm multiplies by 1 + weight"""
    post_norms: bool = False
    """RMSNorm on the output of attention and MLP as well"""
    scaled_embedding: bool = False
    """Whether embeddings are multiplied by the square root of the hidden size."""
    attention_scalar: float | None = None
    """Default of ``query_pre_attn_scalar``; None means that attention is scaled by head_dim."""
    padding: int | None = None
    """Default of ``pad_token_id``, which embeddings that are trained give no gradient to."""
    window: int | None = None
    """Default sliding window in tokens if the config has no such field."""
    layer_types: Callable[[Config, int, int | None], LayerTypes] = all_full
    """(config, layers, sliding window) -> the layers' attention types, for configs that do not list them."""
    mixture: bool = False
    """Whether layers have experts in the place of an MLP, chosen by the softmax of a router's scores."""
    gguf: GgufFacts | None = None


@cache
def families() -> dict[str, Family]:
    """Every family by its ``model_type``."""
    modules = [import_module(f"{folder.__name__}.{found.name}") for found in pkgutil.iter_modules(folder.__path__)]
    known: list[Family] = [module.FAMILY for module in modules]
    return {family.model_type: family for family in known}


def family_of(config: Config) -> Family:
    """The family of a config. Raises InputError if no family has its ``model_type``."""
    name = config.get("model_type")
    family = families().get(name) if isinstance(name, str) else None
    if family is None:
        raise InputError(f"model_type {name!r} is not supported; supported: {', '.join(families())}")
    return family


def family_of_gguf(architecture: object) -> Family:
    """The family of a GGUF file's architecture. Raises InputError if none has it."""
    known = {family.gguf.architecture: family for family in families().values() if family.gguf is not None}
    family = known.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise InputError(f"GGUF architecture {architecture!r} is not supported; supported: {', '.join(known)}")
    return family
