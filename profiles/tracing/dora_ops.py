"""Registers the operators of DoRA (`tightfit.runtime.engine.cpu.dora`) with torch for tracing, as
`tightfit.profiles.tracing.torch_ops` does the others.

None of them has to be decomposed: z, the product of the pair, is that of `lora_linear`, which a trace decomposes; norm
and z are values of their own, which the planner keeps or makes again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tightfit.profiles.tracing.torch_ops import Shape, _define, _library
from tightfit.runtime.engine.cpu.dora import norm_scratch, scale_scratch

dora_norm = _define(
    "dora_norm",
    "(Tensor weight, Tensor a, Tensor b, float scale) -> (Tensor, Tensor)",
    lambda w, a, b, s: (b.new_empty((w.shape[0],)), b.new_empty(norm_scratch(*w.shape))),
)
dora_scale = _define(
    "dora_scale",
    "(Tensor z, Tensor magnitude, Tensor norm, Tensor? bias) -> (Tensor, Tensor)",
    lambda z, m, norm, bias: (
        z.new_empty(z.shape),
        m.new_empty(scale_scratch(z.shape[0], z.shape[1], z.dtype, backward=False)),
    ),
)
dora_scale_backward = _define(
    "dora_scale_backward",
    "(Tensor dy, Tensor z, Tensor magnitude, Tensor norm) -> (Tensor, Tensor, Tensor)",
    lambda dy, z, m, norm: (
        z.new_empty(z.shape),
        m.new_empty(m.shape),
        m.new_empty(scale_scratch(z.shape[0], z.shape[1], z.dtype, backward=True)),
    ),
)


@register_flop_formula([torch.ops.tightfit.dora_norm])
def _norm_flops(weight: Shape, a: Shape, b: Shape, scale: float, **_: Any) -> int:
    return 2 * weight[0] * weight[1] * (a[0] + 1)


def _norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(*output)


def _norm_grad(ctx: Any, _: Tensor, __: Tensor) -> Any:
    """The norm is a constant to the gradient."""
    return None, None, None, None


def _scale_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.mark_non_differentiable(output[1])


def _scale_grad(ctx: Any, dy: Tensor, _: Tensor) -> Any:
    dz, dmagnitude, _scratch = dora_scale_backward(dy, *ctx.saved_tensors)
    return dz, dmagnitude, None, None


torch.library.register_autograd("tightfit::dora_norm", _norm_grad, setup_context=_norm_setup, lib=_library)
torch.library.register_autograd("tightfit::dora_scale", _scale_grad, setup_context=_scale_setup, lib=_library)
