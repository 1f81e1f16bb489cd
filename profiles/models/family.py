"""What a family of decoders has that others have not: one `Family` each, in a file of `profiles.models.families`.

What is left at its default is as in Llama. A new family is a new file; `family_of` finds it by the ``model_type`` of a config.json,
`family_of_gguf` by the architecture that a GGUF file names.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

from tightfit.runtime.common.errors import InputError

Config = Mapping[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"
LayerTypes = tuple[list[str] | None, int | None]
"""`FULL` or `SLIDING` of each layer, None: all full; and the sliding window in tokens"""
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
"""tensors of a GGUF file -> Hugging Face's names"""


def all_full(config: Config, layers: int, window: int | None) -> LayerTypes:
    """No layer of the family has a sliding window unless the config says so."""
    return None, window


@dataclass(frozen=True, kw_only=True)
class GgufFacts:
    """How llama.cpp writes the family."""

    architecture: str
    """``general.architecture``"""
    names: Mapping[str, str] = field(default_factory=lambda: GGUF_NAMES)
    permuted: bool = False
    """whether rows of q and k stand in the order of its interleaved rotary embedding"""
    norm_offset: float = 0.0
    """added to the weights of norms"""
    settings: Callable[[Callable[..., Any], int, int, int], dict[str, Any]] = lambda have, layers, width, head_dim: {}
    """(have(key, default) of the metadata, layers, hidden size / heads, head_dim) -> fields of the config that metadata leave out"""


@dataclass(frozen=True, kw_only=True)
class Family:
    model_type: str
    """of its config.json"""
    wrapped_as: tuple[str, ...] = ()
    """other names of it: those of multimodal wrappers' text models"""
    head_dim: int | None = None
    """where the config says nothing; None: hidden size / heads"""
    activation: str = "silu"
    tied: bool = False
    """whether head and embedding are one where the config says nothing"""
    theta: float = 10_000.0
    """base of the rotary frequencies where the config says nothing"""
    local_theta: bool = False
    """whether layers with a sliding window have a base of their own, and no rope scaling"""
    always_biased: bool = False
    """whether q, k and v have biases whatever the config says"""
    output_bias: bool = True
    """whether ``attention_bias`` goes for the output projection too"""
    head_norm: bool = False
    """RMSNorm over each head of q and k"""
    unit_offset: bool = False
    """RMSNorm multiplies by 1 + weight"""
    post_norms: bool = False
    """RMSNorm on the output of attention and MLP as well"""
    scaled_embedding: bool = False
    """whether embeddings are multiplied by the root of the hidden size"""
    attention_scalar: float | None = None
    """of ``query_pre_attn_scalar`` where the config says nothing; None: attention is scaled by head_dim"""
    window: int | None = None
    """the sliding window where the config has no field of it"""
    layer_types: Callable[[Config, int, int | None], LayerTypes] = all_full
    """(config, layers, sliding window) -> kinds of the layers where the config does not list them"""
    gguf: GgufFacts | None = None


@cache
def families() -> dict[str, Family]:
    """By model_type."""
    from tightfit.profiles.models import families as folder

    modules = [import_module(f"{folder.__name__}.{found.name}") for found in pkgutil.iter_modules(folder.__path__)]
    known: list[Family] = [module.FAMILY for module in modules]
    return {family.model_type: family for family in known}


def family_of(config: Config) -> Family:
    """Raises InputError where the config's model_type is of no family."""
    name = config.get("model_type")
    family = families().get(name) if isinstance(name, str) else None
    if family is None:
        raise InputError(f"model_type {name!r} is not supported; supported: {', '.join(families())}")
    return family


def family_of_gguf(architecture: object) -> Family:
    """Raises InputError for an architecture of no family."""
    known = {family.gguf.architecture: family for family in families().values() if family.gguf is not None}
    family = known.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise InputError(f"GGUF architecture {architecture!r} is not supported; supported: {', '.join(known)}")
    return family
