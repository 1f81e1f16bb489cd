"""Registers the operators for tiles of a long row (`tightfit.runtime.engine.cpu.tile_attention`, and the rotation of
queries and keys by themselves) with torch for tracing, as `tightfit.profiles.tracing.torch_ops` does the others.

Each is differentiable by itself. Through several tiles, autograd adds what each contributes to the gradient of a key in
the key's type. `tile_attention_backward` adds in float32 to the sums that it is given, from the last tile to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tightfit.profiles.tracing.torch_ops import Shape, _define, _library, _same
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.cpu.tile_attention import tile_attention_scratch

Tiles = Sequence[Tensor]


def _rotated(x: Tensor, cos: Tensor, positions: Tensor | None, heads: int, dtype: torch.dtype | None) -> Tensor:
    tokens, columns = x.shape
    if columns != heads * 2 * cos.shape[1]:
        raise InputError(
            f"rotary: {columns} columns are not {heads} heads of {2 * cos.shape[1]}, twice the tables' columns"
        )
    if positions is None and cos.shape[0] != tokens:
        raise InputError(
            f"rotary: {tokens} tokens and {cos.shape[0]} rows of the tables; without positions they are equal"
        )
    _check_positions("rotary", positions, tokens)
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _check_positions(operator: str, positions: Tensor | None, tokens: int) -> None:
    if positions is not None and (positions.dtype is not torch.int64 or positions.numel() != tokens):
        raise InputError(
            f"{operator}: positions are {positions.dtype} of {positions.numel()} elements; int64, one for each of"
            f" {tokens} tokens"
        )


rotary = _define(
    "rotary",
    "(Tensor x, Tensor cos, Tensor sin, Tensor? positions, int heads) -> Tensor",
    lambda x, cos, sin, positions, heads: (_rotated(x, cos, positions, heads, None),),
)
rotary_backward = _define(
    "rotary_backward",
    "(Tensor dy, Tensor cos, Tensor sin, Tensor? positions, int heads, ScalarType? dtype=None) -> Tensor",
    lambda dy, cos, sin, positions, heads, dtype=None: (_rotated(dy, cos, positions, heads, dtype),),
)


def _check_tiles(
    q: Tensor, keys: Tiles, values: Tiles, positions: Tensor | None, heads: int, kv_heads: int, window: int
) -> None:
    """Raises InputError for tensors that are not a tile's queries and the keys and values of all tiles so far."""
    if not keys or len(keys) != len(values):
        raise InputError(
            f"tile_attention: {len(keys)} tiles of keys and {len(values)} of values; there is one of each for every"
            " tile"
        )
    if kv_heads < 1 or heads % kv_heads or q.shape[1] % heads:
        raise InputError(
            f"tile_attention: {q.shape[1]} columns in {heads} query heads and {kv_heads} key heads; each divides the"
            " one before"
        )
    columns = q.shape[1] // heads * kv_heads
    for number, (key, value) in enumerate(zip(keys, values)):
        if key.shape != value.shape or key.shape[1] != columns:
            raise InputError(
                f"tile_attention: keys {list(key.shape)} and values {list(value.shape)} of tile {number}; both have"
                f" {columns} columns and as many rows"
            )
    if keys[-1].shape[0] != q.shape[0]:
        raise InputError(
            f"tile_attention: {q.shape[0]} queries and {keys[-1].shape[0]} keys in the last tile, which is the"
            " queries' own"
        )
    if window < 0:
        raise InputError(f"tile_attention: the window is {window}; it is a number of keys, 0 for all of them")
    _check_positions("tile_attention", positions, q.shape[0])


def _scratch(q: Tensor, keys: Tiles, heads: int, *, backward: bool) -> Tensor:
    longest = max(tensor.shape[0] for tensor in keys)
    elements = tile_attention_scratch(q.shape[0], longest, heads, q.shape[1], keys[0].shape[1], backward=backward)
    return q.new_empty(elements, dtype=torch.float32)


def _forward_outputs(
    q: Tensor,
    keys: Tiles,
    values: Tiles,
    positions: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_tiles(q, keys, values, positions, heads, kv_heads, window)
    lse = q.new_empty((heads, q.shape[0]), dtype=torch.float32)
    return _same(q), lse, _scratch(q, keys, heads, backward=False)


def _backward_outputs(
    dy: Tensor, q: Tensor, keys: Tiles, values: Tiles, y: Tensor, lse: Tensor, positions: Tensor | None,
    key_sums: Tiles | None, value_sums: Tiles | None, heads: int, kv_heads: int, scale: float, window: int,
) -> list[Tensor]:  # fmt: skip
    _check_tiles(q, keys, values, positions, heads, kv_heads, window)
    if (key_sums is None) != (value_sums is None):
        raise InputError(
            "tile_attention_backward: sums of keys or of values alone; later tiles contribute to both or to neither"
        )
    for sums, tiles in ((key_sums, keys), (value_sums, values)):
        if sums is not None and [(s.shape, s.dtype) for s in sums] != [(t.shape, torch.float32) for t in tiles]:
            raise InputError(
                "tile_attention_backward: the sums are not float32 tensors shaped like the keys, one for each tile"
            )
    new_sums = [tensor.new_empty(tensor.shape, dtype=torch.float32) for tensor in (*keys, *values)]
    return [_same(q), *new_sums, _scratch(q, keys, heads, backward=True)]


SIZES = "int heads, int kv_heads, float scale, int window"
tile_attention = _define(
    "tile_attention",
    f"(Tensor q, Tensor[] keys, Tensor[] values, Tensor? positions, {SIZES}) -> (Tensor, Tensor, Tensor)",
    _forward_outputs,
)
tile_attention_backward = _define(
    "tile_attention_backward",
    "(Tensor dy, Tensor q, Tensor[] keys, Tensor[] values, Tensor y, Tensor lse, Tensor? positions, Tensor[]? key_sums,"
    f" Tensor[]? value_sums, {SIZES}) -> Tensor[]",
    _backward_outputs,
)


def _scores(q: Shape, keys: Sequence[Shape], window: int) -> int:
    """How many keys all queries of a tile see together."""
    earlier = sum(shape[0] for shape in keys[:-1])
    seen = range(earlier + 1, earlier + q[0] + 1)
    return sum(min(count, window) for count in seen) if window else (seen[0] + seen[-1]) * q[0] // 2


@register_flop_formula([torch.ops.tightfit.tile_attention])
def _attention_flops(
    q: Shape, keys: Sequence[Shape], values: Any, positions: Any, heads: int, kv_heads: int, scale: float, window: int,
    **_: Any,
) -> int:  # fmt: skip
    """Of two products with the keys that each query sees, in a row of one sample."""
    return 2 * 2 * q[1] * _scores(q, keys, window)


@register_flop_formula([torch.ops.tightfit.tile_attention_backward])
def _attention_backward_flops(
    dy: Shape, q: Shape, keys: Sequence[Shape], values: Any, y: Any, lse: Any, positions: Any, key_sums: Any,
    value_sums: Any, heads: int, kv_heads: int, scale: float, window: int, **_: Any,
) -> int:  # fmt: skip
    return 5 * 2 * q[1] * _scores(q, keys, window)


def _rotary_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, *tables, ctx.heads = inputs
    ctx.save_for_backward(*tables)


def _rotary_grad(ctx: Any, dy: Tensor) -> Any:
    return rotary_backward(dy.contiguous(), *ctx.saved_tensors, ctx.heads), None, None, None, None


def _attention_setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, keys, values, positions, *ctx.rest = inputs
    ctx.tiles = len(keys)
    ctx.save_for_backward(q, *output[:2], positions, *keys, *values)
    ctx.mark_non_differentiable(*output[1:])


def _attention_grad(ctx: Any, dy: Tensor, _: Any, __: Any) -> Any:
    q, y, lse, positions, *both = ctx.saved_tensors
    keys, values = both[: ctx.tiles], both[ctx.tiles :]
    dq, *sums, _ = tile_attention_backward(dy.contiguous(), q, keys, values, y, lse, positions, None, None, *ctx.rest)
    gradients = [gradient.to(tensor.dtype) for gradient, tensor in zip(sums, both)]
    return dq, gradients[: ctx.tiles], gradients[ctx.tiles :], None, None, None, None, None


torch.library.register_autograd("tightfit::rotary", _rotary_grad, setup_context=_rotary_setup, lib=_library)
torch.library.register_autograd(
    "tightfit::tile_attention", _attention_grad, setup_context=_attention_setup, lib=_library
)
