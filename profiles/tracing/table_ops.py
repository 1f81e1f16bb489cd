"""Registers the operators of trained embeddings and heads (`tightfit.runtime.engine.cpu.tables`) with torch for
tracing, as `tightfit.profiles.tracing.torch_ops` does the others.

Each is differentiable by itself: a slice of an embedding hands the gradient of the slices before it on, and one of a
head makes its logits again from hidden states and the log-sum-exp that it left. So a slice is a layer of its own to the
planner, and nothing has to be decomposed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tightfit.profiles.tracing.torch_ops import Shape, _define, _library, _same
from tightfit.runtime.common.processor import NARROW
from tightfit.runtime.engine.cpu.tables import head_scratch


def _scratch(hidden: Tensor, rows: Tensor, dtype: torch.dtype, rounded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty scratch of `table_head`: the slice and logits in `dtype`, and logits in float32."""
    tokens, whole = head_scratch(hidden.shape[0]), dtype is not torch.float32
    return (
        rows.new_empty(rows.shape if whole else (1, 1), dtype=dtype),
        rows.new_empty((tokens if rounded else 1, rows.shape[0]), dtype=dtype),
        rows.new_empty((tokens, rows.shape[0])),
    )


table_rows = _define(
    "table_rows",
    "(Tensor before, Tensor rows, Tensor ids, Tensor base, int offset, int vocabulary, float scale, int padding) ->"
    " Tensor",
    lambda before, *_: (_same(before),),
)
table_rows_backward = _define(
    "table_rows_backward",
    "(Tensor dy, Tensor rows, Tensor ids, Tensor base, int offset, float scale, int padding) -> Tensor",
    lambda dy, rows, *_: (_same(rows),),
)
table_head = _define(
    "table_head",
    "(Tensor lse, Tensor own, Tensor hidden, Tensor rows, Tensor labels, Tensor base, int offset, float cap,"
    " ScalarType dtype, bool rounded) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda lse, own, hidden, rows, labels, base, offset, cap, dtype, rounded: (
        _same(lse),
        _same(own),
        *_scratch(hidden, rows, dtype, rounded),
    ),
)
table_head_backward = _define(
    "table_head_backward",
    "(Tensor dlse, Tensor down, Tensor lse, Tensor new_lse, Tensor hidden, Tensor rows, Tensor labels, Tensor base,"
    " int offset, float cap, ScalarType dtype, bool rounded) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
    " Tensor, Tensor)",
    lambda dlse, down, lse, new_lse, hidden, rows, labels, base, offset, cap, dtype, rounded: (
        *map(_same, (lse, lse, hidden, rows)),
        *_scratch(hidden, rows, dtype, rounded),
        rows.new_empty((head_scratch(hidden.shape[0]), rows.shape[0]) if cap else (1, 1)),
    ),
)


def rounds(dtype: torch.dtype) -> bool:
    """Whether products of a trained head are made in `dtype` here, and not in float32."""
    return NARROW and dtype is not torch.float32


@register_flop_formula([torch.ops.tightfit.table_head])
def _head_flops(lse: Shape, own: Shape, hidden: Shape, rows: Shape, *_: Any, **__: Any) -> int:
    return 2 * hidden[0] * rows[0] * rows[1]


@register_flop_formula([torch.ops.tightfit.table_head_backward])
def _head_backward_flops(
    dlse: Shape, down: Shape, lse: Shape, new_lse: Shape, hidden: Shape, rows: Shape, *_: Any, **__: Any
) -> int:
    return 6 * hidden[0] * rows[0] * rows[1]


def _rows_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, rows, ids, base, ctx.offset, _, ctx.scale, ctx.padding = inputs
    ctx.save_for_backward(rows, ids, base)


def _rows_grad(ctx: Any, dy: Tensor) -> Any:
    # The places that a slice fills are empty before it, so that what is handed on to them is read by no slice.
    drows = table_rows_backward(dy, *ctx.saved_tensors, ctx.offset, ctx.scale, ctx.padding)
    return dy, drows, None, None, None, None, None, None


def _head_setup(ctx: Any, inputs: Any, output: Any) -> None:
    lse, _, hidden, rows, labels, base, *ctx.rest = inputs
    ctx.save_for_backward(lse, output[0], hidden, rows, labels, base)
    ctx.mark_non_differentiable(*output[2:])


def _head_grad(ctx: Any, dlse: Tensor, down: Tensor, *_: Any) -> Any:
    gradients = table_head_backward(dlse, down, *ctx.saved_tensors, *ctx.rest)[:4]
    return *gradients, None, None, None, None, None, None


torch.library.register_autograd("tightfit::table_rows", _rows_grad, setup_context=_rows_setup, lib=_library)
torch.library.register_autograd("tightfit::table_head", _head_grad, setup_context=_head_setup, lib=_library)
