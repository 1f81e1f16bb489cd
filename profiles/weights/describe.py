"""Lists a decoder's tensors and the packed format of each, from its config alone, without weights or files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tightfit.profiles.models.decoder_config import DecoderShape, decoder_shape
from tightfit.profiles.weights.precision import DEFAULT, Precision
from tightfit.runtime.engine.weights.layout import Entry

GROUPS = (32, 16, 8)
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
"""the matrices of all experts of a layer, as `tightfit.profiles.models.experts.Experts` has them"""
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def decoder_tensors(shape: DecoderShape) -> Iterable[tuple[str, tuple[int, ...]]]:
    """(Hugging Face name, shape) of every frozen tensor, in forward order."""
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        projections = (
            ("self_attn.q_proj", query, shape.hidden, shape.attention_bias),
            ("self_attn.k_proj", key_value, shape.hidden, shape.attention_bias),
            ("self_attn.v_proj", key_value, shape.hidden, shape.attention_bias),
            ("self_attn.o_proj", shape.hidden, query, shape.output_bias),
            *(() if shape.is_mixture(layer) else _mlp(shape)),
        )
        yield f"{prefix}input_layernorm.weight", (shape.hidden,)
        for name, rows, columns, bias in projections:
            yield f"{prefix}{name}.weight", (rows, columns)
            if bias:
                yield f"{prefix}{name}.bias", (rows,)
        if shape.is_mixture(layer):
            yield f"{prefix}mlp.gate.weight", (shape.experts, shape.hidden)
            yield f"{prefix}{GATE_UP}", (shape.experts * 2 * shape.expert_width, shape.hidden)
            yield f"{prefix}{DOWN}", (shape.experts * shape.hidden, shape.expert_width)
        if shape.head_norm:
            yield f"{prefix}self_attn.q_norm.weight", (shape.head_dim,)
            yield f"{prefix}self_attn.k_norm.weight", (shape.head_dim,)
        yield f"{prefix}post_attention_layernorm.weight", (shape.hidden,)
        if shape.post_norms:
            yield f"{prefix}pre_feedforward_layernorm.weight", (shape.hidden,)
            yield f"{prefix}post_feedforward_layernorm.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, shape.hidden)


def _mlp(shape: DecoderShape) -> Iterable[tuple[str, int, int, bool]]:
    """(name, rows, columns, whether it has a bias) of the projections of an MLP."""
    yield "mlp.gate_proj", shape.intermediate, shape.hidden, shape.mlp_bias
    yield "mlp.up_proj", shape.intermediate, shape.hidden, shape.mlp_bias
    yield "mlp.down_proj", shape.hidden, shape.intermediate, shape.mlp_bias


def expert_parts(name: str) -> tuple[str, ...]:
    """The names, with * for the number of an expert, of the tensors whose rows, expert by expert, are those of a tensor
    of all experts; () for any other tensor.
    """
    stem = name.removesuffix("gate_up_proj").removesuffix("down_proj")
    if name.endswith(GATE_UP):
        return tuple(f"{stem}*.{part}_proj.weight" for part in ("gate", "up"))
    return (f"{stem}*.down_proj.weight",) if name.endswith(DOWN) else ()


def packed_entry(name: str, shape: tuple[int, ...], packed_format: str) -> Entry:
    """The store entry of a tensor in format `packed_format`, or in bfloat16 if no group size divides a matrix's rows
    evenly.
    """
    if packed_format not in ("q4", "q8"):
        return Entry(name=name, shape=shape, format=packed_format)
    columns = 1
    for size in shape[1:]:
        columns *= size
    group = next((group for group in GROUPS if columns % group == 0), 0)
    return Entry(name=name, shape=shape, format=packed_format if group else "bfloat16", group=group)


def describe(
    config: dict[str, Any],
    *,
    precision: Precision = DEFAULT,
    formats: Mapping[str, str] | None = None,
) -> dict[str, Entry]:
    """Entries (name, shape, format, packed sizes) of every tensor of a decoder, in forward order.

    Matrices, among them the embedding and an untied head, are of the chosen `precision` (quantised ones in groups of
    32), vectors float32; `formats` overrides single tensors, by name.
    `tightfit.runtime.engine.weights.layout.packed_bytes(entries, "w[a:b]")` gives the bytes of a slice.
    """
    entries: dict[str, Entry] = {}
    for name, shape in decoder_tensors(decoder_shape(config)):
        default = "float32" if len(shape) == 1 else precision.format(embedding=name in EMBEDDINGS)
        entries[name] = packed_entry(name, shape, (formats or {}).get(name, default))
    return entries
