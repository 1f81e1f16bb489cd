"""Registers the loss of a mixture's routers (`tightfit.runtime.engine.cpu.router_loss`) with torch for tracing, as
`tightfit.profiles.tracing.torch_ops` does the other operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tightfit.profiles.tracing.torch_ops import _define, _library

counted_tokens = _define(
    "counted_tokens",
    "(Tensor labels) -> Tensor",
    lambda labels: (labels.new_empty(labels.numel(), dtype=torch.float32),),
)
router_totals = _define(
    "router_totals",
    "(Tensor? total, Tensor scores, Tensor counted, int chosen) -> Tensor",
    lambda total, scores, counted, chosen: (scores.new_empty((2, scores.shape[1]), dtype=torch.float32),),
)
router_totals_backward = _define(
    "router_totals_backward",
    "(Tensor dtotal, Tensor scores, Tensor counted) -> Tensor",
    lambda dtotal, scores, counted: (scores.new_empty(scores.shape),),
)
router_loss = _define(
    "router_loss",
    "(Tensor total, Tensor counted, int layers, float coefficient) -> (Tensor, Tensor)",
    lambda total, counted, layers, coefficient: (total.new_empty(()), total.new_empty(total.shape)),
)


def _save_totals(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _totals_grad(ctx: Any, dtotal: Tensor) -> Any:
    scores, counted = ctx.saved_tensors
    own, of_scores, *_ = ctx.needs_input_grad
    return dtotal if own else None, router_totals_backward(dtotal, scores, counted) if of_scores else None, None, None


def _save_loss(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _loss_grad(ctx: Any, dloss: Tensor, _: Any) -> Any:
    """The loss is a summand of that of the step, whose gradient is 1."""
    return ctx.saved_tensors[0], None, None, None


torch.library.register_autograd("tightfit::router_totals", _totals_grad, setup_context=_save_totals, lib=_library)
torch.library.register_autograd("tightfit::router_loss", _loss_grad, setup_context=_save_loss, lib=_library)
