"""Reads a decoder's sizes and switches from a Hugging Face config.json, with its `Family`'s defaults for what is
missing.

PyTorch is not imported here, since the service checks configs that clients send without it.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tightfit.profiles.models.family import FULL, SLIDING, Family, families, family_of
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ATTENTION = (FULL, SLIDING)
ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
PLAIN = {
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
"""Config fields that change what transformers computes and that are not supported, with the value that means off."""
LARGEST = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 15,
    "vocab_size": 1 << 20,
    "num_experts": 1 << 12,
    "num_experts_per_tok": 1 << 10,
    "moe_intermediate_size": 1 << 20,
}
"""Largest accepted value of a config field, about ten times that of the largest published models. With larger values a
tensor's size would exceed 64 bits, or merely describing the model would take hours."""
OTHER_NAMES = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "ffn_dim": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
"""What the config.json of some families that transformers builds call these fields."""
DEVIATION, MOST_DEVIATION = 0.02, 1000.0
"""Standard deviation of random weights: the default, and the largest accepted, because scales are stored in float16,
whose largest value is 65504."""
WRAPPED_BODY = "model.language_model."
"""Name prefix of the text model inside a multimodal wrapper, as transformers' AutoModelForCausalLM and PEFT have it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderShape:
    family: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    activation: str
    tied: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norm: bool
    """RMSNorm over each head of q and k."""
    unit_offset: bool
    """RMSNorm multiplies by 1 + weight."""
    post_norms: bool
    """RMSNorm on the output of attention and MLP as well."""
    embed_scale: float
    attention_scale: float
    windows: tuple[int | None, ...]
    """Per layer: the sliding window in tokens, or None for full attention."""
    thetas: tuple[float, ...]
    """Per layer: the base of the rotary frequencies."""
    rope_scaling: tuple[tuple[str, Any], ...]
    """(key, value) pairs of the config's rope scaling."""
    scaled: tuple[bool, ...]
    """Per layer: whether the rope scaling applies to it."""
    mixtures: tuple[bool, ...] = ()
    """Per layer: whether it has experts; () of a family without."""
    experts: int = 0
    chosen: int = 0
    """Experts of a token."""
    expert_width: int = 0
    shares: bool = False
    """Whether the weights of a token's experts are made to sum to 1."""
    router_loss: float | None = None
    """What the loss of the routers is multiplied by before it is added; None: it is not."""
    padding: int | None = None
    """Token whose row of the embedding gets no gradient if the embedding is trained."""

    def is_mixture(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return bool(self.mixtures) and self.mixtures[layer]

    @property
    def rotations(self) -> list[tuple[float, bool]]:
        """Per layer: the base of the rotary frequencies, and whether the rope scaling applies."""
        return list(zip(self.thetas, self.scaled, strict=True))


def text_config(read: Any) -> dict[str, Any] | None:
    """The text model's config within a parsed config.json, unwrapped if it is multimodal; None if it is no model's
    config.
    """
    if not isinstance(read, dict) or not ("model_type" in read or "text_config" in read):
        return None
    config: dict[str, Any] = dict(read)
    text = config.get("text_config")
    if isinstance(text, dict):
        outer: dict[str, Any] = {
            key: config[key]
            for key in ("model_type", "tie_word_embeddings", "torch_dtype", "dtype", "quantization_config")
            if key in config
        }
        config = outer | text | {"adapter_body": WRAPPED_BODY}
        if text.get("model_type") not in families():
            config["wrapper_type"] = read.get("model_type")
    elif "vision_config" in config:
        config["adapter_body"] = WRAPPED_BODY
    for family in families().values():
        name = config.get("model_type")
        if isinstance(name, str) and name in family.wrapped_as:
            config = dict(family.wrapped_as[name]) | config | {"model_type": family.model_type}
    return config


def handwritten(config: dict[str, Any]) -> bool:
    """Whether `tightfit.profiles.models.decoder` has the config's family and its switches.

    Else transformers builds the model (`tightfit.profiles.models.transformers_decoder`). A config that is damaged
    counts as handwritten where its family is: `decoder_shape` names what is wrong.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in families():
        return not isinstance(name, str)
    rope, _ = _rope(config, families()[name])
    kind = rope_kind(rope)
    return not isinstance(kind, str) or kind not in ("dynamic", "yarn", "longrope")


def long_positions(config: Mapping[str, Any], seq: int) -> str | None:
    """What becomes of short samples in a step of `seq` tokens where longrope turns positions otherwise in long
    sequences, in words; None: nothing.
    """
    told = config.get("rope_scaling") or config.get("rope_parameters")
    told = told if isinstance(told, Mapping) else {}
    for rope in (told, *told.values()):
        if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):
            continue
        short = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
        if isinstance(short, int) and short < seq:
            return (
                f"the long factors of longrope in every sample, as transformers has them in rows of more than {short}"
                f" tokens; a sample of at most {short} tokens, given to it alone, has the short ones: where most are,"
                f" profile with {spelled('seq', short)}"
            )
    return None


def first_lengths(config: Any) -> Iterator[int]:
    """The lengths in a config up to which a model was trained first, in order: longer sequences have rotary frequencies
    of their own (longrope).
    """
    if not isinstance(config, dict):
        return
    for key, value in sorted(config.items()):
        if key == "original_max_position_embeddings" and isinstance(value, int):
            yield value
        yield from first_lengths(value)


def decoder_shape(config: dict[str, Any]) -> DecoderShape:
    """Read a Hugging Face config. Raises InputError naming the field that is missing or not supported."""
    family = family_of(config)
    hidden, layers, heads = (_whole(config, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kv_heads = _whole(config, "num_key_value_heads", heads)
    head_dim = _whole(config, "head_dim", family.head_dim or hidden // heads)
    if heads % kv_heads:
        raise InputError(
            f"config field 'num_attention_heads' = {heads} is not a multiple of 'num_key_value_heads' = {kv_heads}"
        )
    if head_dim % 2:
        raise InputError(f"config field 'head_dim' = {head_dim} must be even for rotary embeddings")
    name = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise InputError(f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    for key, plain in PLAIN.items():
        if config.get(key) not in (None, plain):
            raise InputError(f"config field {key!r} = {config[key]!r} is not supported; supported: {plain!r}")
    full, local = _rope(config, family)
    scaling = {k: v for k, v in full.items() if k != "rope_theta"}
    kind = rope_kind(scaling)
    if not isinstance(kind, str) or kind not in ROPE_NUMBERS or scaling.get("partial_rotary_factor") not in (None, 1):
        raise InputError(f"rope scaling {scaling!r} is not supported; supported: {', '.join(ROPE_NUMBERS)}")
    for key in ROPE_NUMBERS[kind]:
        _number(scaling, key)
    windows = _windows(config, family, layers)
    scalar = (
        head_dim
        if family.attention_scalar is None
        else _number(config, "query_pre_attn_scalar", family.attention_scalar)
    )
    return DecoderShape(
        family=family.model_type,
        vocab=_whole(config, "vocab_size"),
        hidden=hidden,
        intermediate=_whole(config, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=_number(config, "rms_norm_eps", 1e-6),
        activation=ACTIVATIONS[name],
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        attention_bias=bool(config.get("attention_bias", False)) or family.always_biased,
        output_bias=bool(config.get("attention_bias", False)) and family.output_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        head_norm=family.head_norm,
        unit_offset=family.unit_offset,
        post_norms=family.post_norms,
        embed_scale=math.sqrt(hidden) if family.scaled_embedding else 1.0,
        attention_scale=scalar**-0.5,
        windows=windows,
        thetas=tuple(local if family.local_theta and w is not None else _number(full, "rope_theta") for w in windows),
        rope_scaling=tuple(sorted((k, v) for k, v in scaling.items() if isinstance(v, (int, float, str)))),
        scaled=tuple(not (family.local_theta and w is not None) for w in windows),
        padding=_padding(config, family, _whole(config, "vocab_size")),
        **(_mixture(config, layers) if family.mixture else {}),
    )


def _mixture(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """What a shape says of experts. Raises InputError where their numbers do not fit together."""
    experts = _whole(config, "num_experts", config.get("num_local_experts"))
    chosen, every = _whole(config, "num_experts_per_tok"), _whole(config, "decoder_sparse_step", 1)
    if chosen > experts:
        raise InputError(
            f"config field 'num_experts_per_tok' = {chosen} is more than the {experts} experts of 'num_experts'"
        )
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(number, int) for number in dense):
        raise InputError(f"config field 'mlp_only_layers' must be a list of layers, not {dense!r}")
    return {
        "mixtures": tuple(layer not in dense and (layer + 1) % every == 0 for layer in range(layers)),
        "experts": experts,
        "chosen": chosen,
        "expert_width": _whole(config, "moe_intermediate_size"),
        "shares": bool(config.get("norm_topk_prob", False)),
        "router_loss": _router_loss(config),
    }


def _router_loss(config: dict[str, Any]) -> float | None:
    """The factor of the routers' loss; None where a config does not ask for that loss, or its factor is 0."""
    asked = config.get("output_router_logits") and config.get("router_aux_loss_coef") != 0
    return _number(config, "router_aux_loss_coef", 0.001) if asked else None


def rope_kind(rope: Mapping[str, Any]) -> Any:
    """How positions turn by a config's parameters of it. Of Qwen-VL's three positions of a token ("mrope"), which are
    equal in a text, one is left.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    return "default" if kind == "mrope" else kind


def _padding(config: Mapping[str, Any], family: Family, vocabulary: int) -> int | None:
    """The config's token for padding, counted from the end if it is below 0; None if it is no row of the embedding."""
    token = config.get("pad_token_id", family.padding)
    if isinstance(token, bool) or not isinstance(token, int) or not -vocabulary <= token < vocabulary:
        return None
    return token % vocabulary


def initial_deviation(config: dict[str, Any]) -> float:
    """Standard deviation of random weights. Raises InputError if the config asks for one that cannot be stored."""
    deviation = _number(config, "initializer_range", DEVIATION) if config.get("initializer_range") else DEVIATION
    if deviation > MOST_DEVIATION:
        raise InputError(f"config field 'initializer_range' is {deviation}; at most {MOST_DEVIATION} is supported")
    return deviation


def check_sizes(config: Mapping[str, Any]) -> None:
    """Raises InputError for a config field that is larger than `LARGEST`, under any of its names."""
    for key in (*LARGEST, *OTHER_NAMES):
        value = config.get(key)
        if isinstance(value, int):
            _refuse_larger(key, value)


def _refuse_larger(key: str, value: int) -> None:
    most = LARGEST.get(OTHER_NAMES.get(key, key), value)
    if value > most:
        raise InputError(f"config field {key!r} is {value}; at most {most} is supported, check the config.json")


def _number(config: dict[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise InputError(f"config field {key!r} must be a positive number, not {value!r}")
    return float(value)


def _whole(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """A config field that is a count; `default` if it is missing or null."""
    value = config.get(key) or default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise InputError(f"config field {key!r} must be a positive whole number, not {value!r}")
    _refuse_larger(key, value)
    return value


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"config field {key!r} must be an object, not {value!r}")
    return dict(value)


def _rope(config: dict[str, Any], family: Family) -> tuple[dict[str, Any], float]:
    """(rope parameters of full attention, base for sliding-window layers), from the old flat fields or the new nested
    ones.
    """
    parameters = _section(config, "rope_parameters")
    if "full_attention" in parameters:
        local = _section(parameters, "sliding_attention")
        return {"rope_theta": family.theta} | _section(parameters, "full_attention"), _number(
            local, "rope_theta", 10000.0
        )
    full = _section(config, "rope_scaling") | parameters
    full.setdefault("rope_theta", config.get("rope_theta") or family.theta)
    local = {"rope_local_base_freq": config.get("rope_local_base_freq") or 10000.0}
    return full, _number(local, "rope_local_base_freq")


def _windows(config: dict[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    types = config.get("layer_types")
    window = config.get("sliding_window", family.window)
    if types is None:
        types, window = family.layer_types(config, layers, window)
    if types is None:
        return (None,) * layers
    if not isinstance(types, list) or any(kind not in ATTENTION for kind in types):
        raise InputError(f"config field 'layer_types' must be a list of {' and '.join(ATTENTION)}, not {types!r}")
    if len(types) != layers:
        raise InputError(f"config field 'layer_types' has {len(types)} entries for {layers} layers")
    size = _whole({"sliding_window": window}, "sliding_window") if window and SLIDING in types else None
    return tuple(size if kind == SLIDING else None for kind in types)
