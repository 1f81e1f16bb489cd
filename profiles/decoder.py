"""Decoder language models as one plain module, built from a Hugging Face config.

Llama, Mistral, Qwen2, Qwen3 and Gemma3 (text) differ in a few switches (`DecoderShape`). Parameter names are Hugging
Face's, so that weights and adapters need no renaming. The base is frozen; every projection carries a LoRA pair in
float32. Hidden states are flat, [batch * seq, hidden]: each projection is then one matrix product.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profiles.errors import InputError
from profiles.register import attention, embed_rows, gated, head_loss, lora_linear, rms_norm

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ATTENTION = ("full_attention", "sliding_attention")
ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
PLAIN = {"final_logit_softcapping": None, "attn_logit_softcapping": None, "use_bidirectional_attention": False}
"""what transformers computes otherwise where it is set, by what leaves it off"""
HEAD_SLICE_BYTES = 6 << 20  # unpacked bytes of one vocabulary slice of the loss head, at most


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
    """RMSNorm over each head of q and k (Qwen3, Gemma3)."""
    unit_offset: bool
    """RMSNorm multiplies by 1 + weight (Gemma)."""
    post_norms: bool
    """RMSNorm on the output of attention and MLP as well (Gemma)."""
    embed_scale: float
    attention_scale: float
    windows: tuple[int | None, ...]
    """Per layer: the sliding window in tokens, or None for full attention."""
    thetas: tuple[float, ...]
    """Per layer: the base of the rotary frequencies."""
    rope_scaling: tuple[tuple[str, Any], ...]
    """Items of the config's rope scaling, for layers with full attention."""


def decoder_shape(config: dict[str, Any]) -> DecoderShape:
    """Read a Hugging Face config. Raises InputError naming the field that is missing or not supported."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")

    hidden, layers, heads = (_whole(config, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    gemma = family == "gemma3_text"
    kv_heads = _whole(config, "num_key_value_heads", heads)
    head_dim = _whole(config, "head_dim", 256 if gemma else hidden // heads)
    if heads % kv_heads:
        raise InputError(
            f"config field 'num_attention_heads' = {heads} is not a multiple of 'num_key_value_heads' = {kv_heads}"
        )
    if head_dim % 2:
        raise InputError(f"config field 'head_dim' = {head_dim} must be even for rotary embeddings")
    name = config.get("hidden_activation") or config.get("hidden_act") or ("gelu_pytorch_tanh" if gemma else "silu")
    if name not in ACTIVATIONS:
        raise InputError(f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    for key, plain in PLAIN.items():
        if config.get(key) not in (None, plain):
            raise InputError(f"config field {key!r} = {config[key]!r} is not supported; supported: {plain!r}")
    full, local = _rope(config, gemma)
    scaling = {k: v for k, v in full.items() if k != "rope_theta"}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_NUMBERS or scaling.get("partial_rotary_factor") not in (None, 1):
        raise InputError(f"rope scaling {scaling!r} is not supported; supported: {', '.join(ROPE_NUMBERS)}")
    for key in ROPE_NUMBERS[kind]:
        _number(scaling, key)
    windows = _windows(config, family, layers)
    return DecoderShape(
        family=family,
        vocab=_whole(config, "vocab_size"),
        hidden=hidden,
        intermediate=_whole(config, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=_number(config, "rms_norm_eps", 1e-6),
        activation=ACTIVATIONS[name],
        tied=bool(config.get("tie_word_embeddings", gemma)),
        attention_bias=bool(config.get("attention_bias", False)) or family == "qwen2",
        output_bias=bool(config.get("attention_bias", False)) and family not in ("mistral", "qwen2"),
        mlp_bias=bool(config.get("mlp_bias", False)),
        head_norm=family in ("qwen3", "gemma3_text"),
        unit_offset=gemma,
        post_norms=gemma,
        embed_scale=math.sqrt(hidden) if gemma else 1.0,
        attention_scale=_number(config, "query_pre_attn_scalar", 256) ** -0.5 if gemma else head_dim**-0.5,
        windows=windows,
        thetas=tuple(local if gemma and w is not None else _number(full, "rope_theta") for w in windows),
        rope_scaling=tuple(sorted((k, v) for k, v in scaling.items() if isinstance(v, (int, float, str)))),
    )


def _number(config: dict[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"config field {key!r} must be a positive number, not {value!r}")
    return float(value)


def _whole(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """A count; `default` where there is none, or null."""
    value = config.get(key) or default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise InputError(f"config field {key!r} must be a positive whole number, not {value!r}")
    return value


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"config field {key!r} must be an object, not {value!r}")
    return dict(value)


def _rope(config: dict[str, Any], gemma: bool) -> tuple[dict[str, Any], float]:
    """(full-attention rope parameters, local theta), from the old flat fields or the new nested ones."""
    parameters = _section(config, "rope_parameters")
    if "full_attention" in parameters:
        local = _section(parameters, "sliding_attention")
        return {"rope_theta": 1_000_000.0 if gemma else 10000.0} | _section(parameters, "full_attention"), _number(
            local, "rope_theta", 10000.0
        )
    full = _section(config, "rope_scaling") | parameters
    full.setdefault("rope_theta", config.get("rope_theta") or (1_000_000.0 if gemma else 10000.0))
    local = {"rope_local_base_freq": config.get("rope_local_base_freq") or 10000.0}
    return full, _number(local, "rope_local_base_freq")


def _windows(config: dict[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    types = config.get("layer_types")
    window = config.get("sliding_window", 4096 if family == "mistral" else None)  # transformers' default
    if types is None and family == "gemma3_text":
        every = _whole(config, "sliding_window_pattern", _whole(config, "_sliding_window_pattern", 6))
        types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
        window = window or 4096
    if types is None and family == "mistral" and window:
        types = ["sliding_attention"] * layers
    if types is None and family in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        full = config.get("max_window_layers", 28)
        if isinstance(full, bool) or not isinstance(full, int):
            raise InputError(f"config field 'max_window_layers' must be a whole number, not {full!r}")
        types = ["sliding_attention" if i >= full else "full_attention" for i in range(layers)]
    if types is None:
        return (None,) * layers
    if not isinstance(types, list) or any(kind not in ATTENTION for kind in types):
        raise InputError(f"config field 'layer_types' must be a list of {' and '.join(ATTENTION)}, not {types!r}")
    if len(types) != layers:
        raise InputError(f"config field 'layer_types' has {len(types)} entries for {layers} layers")
    size = _whole({"sliding_window": window}, "sliding_window") if window and "sliding_attention" in types else None
    return tuple(size if kind == "sliding_attention" else None for kind in types)


class Norm(nn.Module):
    def __init__(self, width: int, shape: DecoderShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=torch.float32), requires_grad=False)
        self.eps, self.unit_offset = shape.eps, shape.unit_offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.unit_offset)[0]  # type: ignore[no-any-return]


class Factor(nn.Module):
    """One LoRA factor, float32."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns, dtype=torch.float32))


class Projection(nn.Module):
    """Frozen x @ W.T (+ bias) plus the trained scale * x @ A.T @ B.T."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=torch.float32), requires_grad=False) if bias else None
        self.scale = alpha / rank if rank else 0.0
        if rank:
            self.lora_A, self.lora_B = Factor(rank, inputs), Factor(outputs, rank)

    def forward(self, x: Tensor) -> Tensor:
        if not self.scale:
            return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))
        pair = self.lora_A.weight, self.lora_B.weight
        return lora_linear(x, self.weight, self.bias, *pair, self.scale)[0]  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, shape: DecoderShape, index: int, dtype: torch.dtype, rank: int, alpha: float) -> None:
        super().__init__()
        self.shape, self.window = shape, shape.windows[index]
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = Projection(shape.hidden, q, shape.attention_bias, dtype, rank, alpha)
        self.k_proj = Projection(shape.hidden, kv, shape.attention_bias, dtype, rank, alpha)
        self.v_proj = Projection(shape.hidden, kv, shape.attention_bias, dtype, rank, alpha)
        self.o_proj = Projection(q, shape.hidden, shape.output_bias, dtype, rank, alpha)
        if shape.head_norm:
            self.q_norm, self.k_norm = Norm(shape.head_dim, shape), Norm(shape.head_dim, shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        shape = self.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if shape.head_norm:
            q = self.q_norm(q.view(-1, shape.head_dim)).view(q.shape)
            k = self.k_norm(k.view(-1, shape.head_dim)).view(k.shape)
        y, *_ = attention(q, k, v, cos, sin, mask, shape.heads, shape.kv_heads, shape.attention_scale)
        return self.o_proj(y)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, shape: DecoderShape, dtype: torch.dtype, rank: int, alpha: float) -> None:
        super().__init__()
        self.activation = shape.activation
        self.gate_proj = Projection(shape.hidden, shape.intermediate, shape.mlp_bias, dtype, rank, alpha)
        self.up_proj = Projection(shape.hidden, shape.intermediate, shape.mlp_bias, dtype, rank, alpha)
        self.down_proj = Projection(shape.intermediate, shape.hidden, shape.mlp_bias, dtype, rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.activation))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    def __init__(self, shape: DecoderShape, index: int, dtype: torch.dtype, rank: int, alpha: float) -> None:
        super().__init__()
        self.post_norms = shape.post_norms
        self.self_attn = Attention(shape, index, dtype, rank, alpha)
        self.mlp = Mlp(shape, dtype, rank, alpha)
        self.input_layernorm = Norm(shape.hidden, shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape)
        if shape.post_norms:
            self.pre_feedforward_layernorm = Norm(shape.hidden, shape)
            self.post_feedforward_layernorm = Norm(shape.hidden, shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask)
        if not self.post_norms:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))  # type: ignore[no-any-return]


class Table(nn.Module):
    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype), requires_grad=False)


class Body(nn.Module):
    def __init__(self, shape: DecoderShape, dtype: torch.dtype, rank: int, alpha: float) -> None:
        super().__init__()
        self.embed_tokens = Table(shape.vocab, shape.hidden, dtype)
        self.layers = nn.ModuleList(DecoderLayer(shape, i, dtype, rank, alpha) for i in range(shape.layers))
        self.norm = Norm(shape.hidden, shape)


class Decoder(nn.Module):
    """forward(input_ids [batch, seq], labels [batch, seq]) -> (loss float32 [], token losses float32 [batch * seq]).

    labels[b, t] is the token that position t is to predict, -100 where there is none. Right padding needs no mask:
    attention is causal and padded positions carry no label.
    """

    def __init__(self, shape: DecoderShape, *, dtype: torch.dtype, rank: int, alpha: float) -> None:
        super().__init__()
        self.shape = shape
        self.dtype = dtype
        self.model = Body(shape, dtype, rank, alpha)
        if not shape.tied:
            self.lm_head = Table(shape.vocab, shape.hidden, dtype)
        element = torch.empty((), dtype=dtype).element_size()
        self.slice_rows = head_slice_rows(shape, element)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        shape, seq = self.shape, input_ids.shape[1]
        scale = float(torch.tensor(shape.embed_scale, dtype=self.dtype)) if shape.embed_scale != 1.0 else 1.0
        x = embed_rows(self.model.embed_tokens.weight, input_ids, scale)
        tables = {key: rotary_table(shape, seq, *key) for key in sorted(set(self._rope_keys()))}
        masks = {w: window_mask(seq, w) for w in sorted({w for w in shape.windows if w is not None and w < seq})}
        for layer, window, key in zip(self.model.layers, shape.windows, self._rope_keys(), strict=True):
            x = layer(x, *tables[key], masks.get(window) if window is not None else None)
        head = self.model.embed_tokens if shape.tied else self.lm_head
        loss, token_losses, _ = head_loss(self.model.norm(x), head.weight, labels, self.slice_rows)
        return loss, token_losses

    def _rope_keys(self) -> list[tuple[float, bool]]:
        """(theta, scaled) per layer; Gemma scales the full-attention layers only."""
        gemma = self.shape.family == "gemma3_text"
        return [
            (theta, not (gemma and w is not None))
            for theta, w in zip(self.shape.thetas, self.shape.windows, strict=True)
        ]


def head_slice_rows(shape: DecoderShape, element_bytes: int) -> int:
    """Vocabulary rows per slice of the loss head: the power of two (as checksums need) next below `HEAD_SLICE_BYTES` unpacked."""
    return min(shape.vocab, 1 << max(7, (HEAD_SLICE_BYTES // (shape.hidden * element_bytes)).bit_length() - 1))


def rotary_table(shape: DecoderShape, seq: int, theta: float, scaled: bool) -> tuple[Tensor, Tensor]:
    """cos, sin float32 [seq, head_dim / 2]. Scaling as in transformers' modeling_rope_utils (linear, llama3)."""
    steps = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    frequencies = 1.0 / (theta**steps)
    scaling = dict(shape.rope_scaling) if scaled else {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        frequencies = frequencies / scaling["factor"]
    elif kind == "llama3":
        low, high, original = (
            scaling["low_freq_factor"],
            scaling["high_freq_factor"],
            scaling["original_max_position_embeddings"],
        )
        wavelength = 2 * math.pi / frequencies
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies
        far = torch.where(wavelength > original / low, frequencies / scaling["factor"], frequencies)
        middle = (wavelength <= original / low) & (wavelength >= original / high)
        frequencies = torch.where(middle, blended, far)
    angles = torch.arange(seq, dtype=torch.float32)[:, None] * frequencies[None, :]
    return angles.cos(), angles.sin()


def window_mask(seq: int, window: int) -> Tensor:
    """Additive causal mask float32 [seq, seq] that lets each position see itself and window - 1 positions before it."""
    positions = torch.arange(seq)
    distance = positions[:, None] - positions[None, :]
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(seq, seq).masked_fill(hidden, -math.inf)
