"""Registers the operators of dropout (`tightfit.runtime.engine.cpu.dropout`) with torch for tracing, as
`tightfit.profiles.tracing.torch_ops` does the others.

They are no random operators to a trace: their masks follow from the step and the layer, so that whatever they make may
be made again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tightfit.profiles.tracing.torch_ops import DECOMPOSITIONS, Shape, _define, _differentiable, _library, projection

dropout = _define("dropout", "(Tensor x, float p, int site) -> Tensor", lambda x, p, site: (x.new_empty(x.shape),))
dropout_lora_down = _define(
    "dropout_lora_down",
    "(Tensor x, Tensor a, float p, int site) -> Tensor",
    lambda x, a, p, site: (x.new_empty((x.shape[0], a.shape[0])),),
)
dropout_lora_backward = _define(
    "dropout_lora_backward",
    "(Tensor dy, Tensor x, Tensor low, Tensor b, float scale, float p, int site) -> (Tensor, Tensor, Tensor)",
    lambda dy, x, low, b, s, p, site: (
        low.new_empty(low.shape),
        b.new_empty((low.shape[1], x.shape[1])),
        b.new_empty(b.shape),
    ),
)
dropout_projection_backward = _define(
    "dropout_projection_backward",
    "(Tensor dy, Tensor weight, Tensor dlow, Tensor a, float p, int site, Tensor? addend) -> Tensor",
    lambda dy, w, dlow, a, p, site, addend: (dy.new_empty((dy.shape[0], w.shape[1])),),
)


@register_flop_formula([torch.ops.tightfit.dropout_lora_down])
def _down_flops(x: Shape, a: Shape, p: float, site: int, **_: Any) -> int:
    return 2 * x[0] * x[1] * a[0]


@register_flop_formula([torch.ops.tightfit.dropout_lora_backward])
def _lora_flops(dy: Shape, x: Shape, low: Shape, b: Shape, scale: float, p: float, site: int, **_: Any) -> int:
    return 2 * low[0] * low[1] * (2 * dy[1] + x[1])


@register_flop_formula([torch.ops.tightfit.dropout_projection_backward])
def _back_flops(
    dy: Shape, weight: Shape, dlow: Shape, a: Shape, p: float, site: int, addend: Shape | None, **_: Any
) -> int:
    return 2 * dy[0] * weight[1] * (dy[1] + dlow[1])


def _dropout_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, ctx.p, ctx.site = inputs


def _dropout_grad(ctx: Any, dy: Tensor) -> Any:
    return dropout(dy.contiguous(), ctx.p, ctx.site), None, None


torch.library.register_autograd("tightfit::dropout", _dropout_grad, setup_context=_dropout_setup, lib=_library)

# `lora_linear` with another input for the pair than for the frozen weight: x with dropout.
_library.define(
    "dropout_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, float p, int site)"
    " -> (Tensor, Tensor)"
)


def open_dropout_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float, site: int
) -> tuple[Tensor, Tensor]:
    low = dropout_lora_down(x, a, p, site)
    return projection(x, weight, bias, low, b, scale), low


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float, site: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], a.shape[0]))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, a, b, ctx.scale, ctx.p, ctx.site = inputs
    ctx.save_for_backward(x, weight, a, b, output[1])
    ctx.mark_non_differentiable(output[1])


def _grad(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, a, b, low = ctx.saved_tensors
    dlow, da, db = dropout_lora_backward(dy, x, low, b, ctx.scale, ctx.p, ctx.site)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = dropout_projection_backward(dy, weight, dlow, a, ctx.p, ctx.site, None)
    return dx, None, None, da, db, None, None, None


dropout_lora_linear = _differentiable("dropout_lora_linear", open_dropout_lora, _fake, _grad, _setup)
DECOMPOSITIONS[dropout_lora_linear] = open_dropout_lora
