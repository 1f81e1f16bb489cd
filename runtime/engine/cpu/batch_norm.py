"""Batch normalisation with running statistics (Ioffe and Szegedy 2015) by PyTorch's own kernel, and buffers that a step
changes.

The statistics that a batch leads to are outputs of the operator that normalises it, which may therefore run again:
`keep_state`, which runs once in a step, makes them the buffer's values.

Shapes: x, y [N, C, ...]; mean, rstd, weight, bias and running statistics float32 [C].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    *,
    out: Sequence[Tensor],
) -> None:
    """y = (x - mean) * rstd * weight + bias, with mean and variance of the batch. out: y, mean, rstd, and the running
    statistics that follow from those given and from the batch's.
    """
    y, mean, rstd, next_mean, next_var = out
    next_mean.copy_(running_mean)
    next_var.copy_(running_var)
    aten.native_batch_norm.out(
        x, weight, bias, next_mean, next_var, True, momentum, eps, out=y, save_mean=mean, save_invstd=rstd
    )


def batch_norm_inference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    *,
    out: Sequence[Tensor],
) -> None:
    """y as of `batch_norm`, with the running statistics in the place of the batch's."""
    empty = [x.new_empty(0, dtype=torch.float32) for _ in range(2)]
    aten.native_batch_norm.out(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        False,
        0.0,
        eps,
        out=out[0],
        save_mean=empty[0],
        save_invstd=empty[1],
    )


def keep_state(state: Tensor, value: Tensor, *, out: Sequence[Tensor]) -> None:
    """Make `value` that of `state`, a buffer of the module, from the next operator on. It has no output."""
    state.copy_(value)
