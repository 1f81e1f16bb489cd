"""Registers the experts of a mixture (`tightfit.runtime.engine.cpu.experts`) with torch for tracing, as
`tightfit.profiles.tracing.torch_ops` does the other operators.

All experts of a layer are one differentiable operator for torch. A trace decomposes it into calls for a few experts each, whose
matrices are weights of their own to the planner: slices of the rows of those of all experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tightfit.profiles.tracing.torch_ops import DECOMPOSITIONS, Shape, _define, _differentiable, _library
from tightfit.runtime.engine.cpu.experts import experts_scratch


def _scratch(x: Tensor, down: Tensor, *, backward: bool) -> tuple[Tensor, Tensor]:
    narrow, wide = experts_scratch(x.shape[0], x.shape[1], down.shape[1], backward=backward)
    return x.new_empty(narrow), x.new_empty(wide, dtype=torch.float32)


some_experts = _define(
    "experts",
    "(Tensor? total, Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor down, Tensor? up_bias,"
    " Tensor? down_bias, int first, int of, str activation) -> (Tensor, Tensor, Tensor)",
    lambda total, x, index, weights, gate_up, down, up_bias, down_bias, first, of, activation: (
        x.new_empty(x.shape, dtype=torch.float32),
        *_scratch(x, down, backward=False),
    ),
)
some_experts_backward = _define(
    "experts_backward",
    "(Tensor? total, Tensor? weights_total, Tensor dy, Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor down,"
    " Tensor? up_bias, Tensor? down_bias, int first, int of, str activation) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda total, weights_total, dy, x, index, weights, gate_up, down, up_bias, down_bias, first, of, activation: (
        x.new_empty(x.shape, dtype=torch.float32),
        weights.new_empty(weights.shape, dtype=torch.float32),
        *_scratch(x, down, backward=True),
    ),
)


def _rows(index: Shape, down: Shape, hidden: int, of: int) -> float:
    """Rows of the experts of a call where all experts have equally many."""
    return math.prod(index) * (down[0] / hidden) / of


@register_flop_formula([torch.ops.tightfit.experts])
def _flops(
    total: Any, x: Shape, index: Shape, weights: Any, gate_up: Any, down: Shape, up_bias: Any, down_bias: Any, first: int,
    of: int, activation: str, **_: Any,
) -> int:  # fmt: skip
    return int(2 * 3 * x[1] * down[1] * _rows(index, down, x[1], of))


@register_flop_formula([torch.ops.tightfit.experts_backward])
def _backward_flops(
    total: Any, weights_total: Any, dy: Any, x: Shape, index: Shape, weights: Any, gate_up: Any, down: Shape, up_bias: Any,
    down_bias: Any, first: int, of: int, activation: str, **_: Any,
) -> int:  # fmt: skip
    """Five products: the gate and the way up again, and the gradients of three."""
    return int(2 * 5 * x[1] * down[1] * _rows(index, down, x[1], of))


_library.define(
    "mixture(Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor down, Tensor? up_bias, Tensor? down_bias,"
    " str activation, int at_once) -> Tensor"
)
Matrices = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""gates and ups, downs, and their biases"""


def _groups(x: Tensor, matrices: Matrices, at_once: int) -> Iterator[tuple[Any, ...]]:
    """(matrices, number of the first, experts in all) of the experts of each call."""
    gate_up, down, *biases = matrices
    hidden, width = x.shape[1], down.shape[1]
    of = down.shape[0] // hidden
    for first in range(0, of, at_once):
        last = min(of, first + at_once)
        own_biases = (None if bias is None else bias[first:last] for bias in biases)
        own = gate_up[2 * width * first : 2 * width * last], down[hidden * first : hidden * last], *own_biases
        yield own, first, of


def open_mixture(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str, at_once: int,
) -> Tensor:  # fmt: skip
    total = None
    for own, first, of in _groups(x, (gate_up, down, up_bias, down_bias), at_once):
        total, *_ = some_experts(total, x, index, weights, *own, first, of, activation)
    assert total is not None
    return total.to(x.dtype)  # type: ignore[no-any-return]


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.activation, ctx.at_once = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, dy: Tensor) -> Any:
    x, index, weights, *matrices = ctx.saved_tensors
    dx = dweights = None
    dy = dy.contiguous()
    for own, first, of in _groups(x, tuple(matrices), ctx.at_once):
        given = dy, x, index, weights, *own, first, of, ctx.activation
        dx, dweights, *_ = some_experts_backward(dx, dweights, *given)
    assert dx is not None
    assert dweights is not None
    return dx.to(x.dtype), None, dweights.to(weights.dtype), *[None] * 6


mixture = _differentiable("mixture", open_mixture, _fake, _grad, _setup)
DECOMPOSITIONS[mixture] = open_mixture
