"""Registers the experts of a mixture (`tightfit.runtime.engine.cpu.experts`) with torch for tracing, as
`tightfit.profiles.tracing.torch_ops` does the other operators.

All experts of a layer are one differentiable operator for torch. A trace decomposes it into calls for a few experts
each, whose matrices are weights of their own to the planner: slices of the rows of those of all experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tightfit.profiles.tracing.torch_ops import DECOMPOSITIONS, Shape, _define, _differentiable, _library
from tightfit.runtime.engine.cpu.experts import Pairs, experts_scratch


def _scratch(x: Tensor, down: Tensor, *, backward: bool, rank: int = 0) -> tuple[Tensor, Tensor]:
    narrow, wide = experts_scratch(x.shape[0], x.shape[1], down.shape[1], backward=backward, rank=rank)
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
    "(Tensor? total, Tensor? weights_total, Tensor dy, Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor"
    " down, Tensor? up_bias, Tensor? down_bias, int first, int of, str activation) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda total, weights_total, dy, x, index, weights, gate_up, down, up_bias, down_bias, first, of, activation: (
        x.new_empty(x.shape, dtype=torch.float32),
        weights.new_empty(weights.shape, dtype=torch.float32),
        *_scratch(x, down, backward=True),
    ),
)


PAIR_ARGUMENTS = "Tensor up_a, Tensor up_b, Tensor down_a, Tensor down_b, float scale"
adapted_experts = _define(
    "adapted_experts",
    "(Tensor? total, Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor down, Tensor? up_bias,"
    f" Tensor? down_bias, int first, int of, str activation, {PAIR_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    lambda total, x, index, weights, gate_up, down, up_bias, down_bias, first, of, activation, up_a, *_: (
        x.new_empty(x.shape, dtype=torch.float32),
        *_scratch(x, down, backward=False, rank=len(up_a) // of),
    ),
)
adapted_experts_backward = _define(
    "adapted_experts_backward",
    "(Tensor? total, Tensor? weights_total, Tensor dy, Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor"
    f" down, Tensor? up_bias, Tensor? down_bias, int first, int of, str activation, {PAIR_ARGUMENTS}, Tensor?"
    " up_a_total, Tensor? up_b_total, Tensor? down_a_total, Tensor? down_b_total) -> (Tensor, Tensor, Tensor, Tensor,"
    " Tensor, Tensor, Tensor, Tensor)",
    lambda total, weights_total, dy, x, index, weights, gate_up, down, up_bias, down_bias, first, of, kind, *pairs: (
        x.new_empty(x.shape, dtype=torch.float32),
        weights.new_empty(weights.shape, dtype=torch.float32),
        *_scratch(x, down, backward=True, rank=len(pairs[0]) // of),
        *(torch.empty_like(factor) for factor in pairs[: len(Pairs._fields)]),
    ),
)


def _rows(index: Shape, down: Shape, hidden: int, of: int) -> float:
    """Rows of the experts of a call where all experts have equally many."""
    return math.prod(index) * (down[0] / hidden) / of


@register_flop_formula([torch.ops.tightfit.experts])
def _flops(
    total: Any, x: Shape, index: Shape, weights: Any, gate_up: Any, down: Shape, up_bias: Any, down_bias: Any,
    first: int,
    of: int, activation: str, **_: Any,
) -> int:  # fmt: skip
    return int(2 * 3 * x[1] * down[1] * _rows(index, down, x[1], of))


@register_flop_formula([torch.ops.tightfit.experts_backward])
def _backward_flops(
    total: Any, weights_total: Any, dy: Any, x: Shape, index: Shape, weights: Any, gate_up: Any, down: Shape,
    up_bias: Any,
    down_bias: Any, first: int, of: int, activation: str, **_: Any,
) -> int:  # fmt: skip
    """Five products: the gate and the way up again, and the gradients of three."""
    return int(2 * 5 * x[1] * down[1] * _rows(index, down, x[1], of))


def _pair_flops(x: Shape, index: Shape, down: Shape, of: int, up_a: Shape) -> float:
    """Of the products of all pairs of a call in one direction."""
    hidden, width = x[1], down[1]
    return 2 * (up_a[0] / of) * (2 * hidden + 3 * width) * _rows(index, down, hidden, of)


@register_flop_formula([torch.ops.tightfit.adapted_experts])
def _adapted_flops(
    total: Any, x: Shape, index: Shape, weights: Any, gate_up: Any, down: Shape, up_bias: Any, down_bias: Any,
    first: int,
    of: int, activation: str, up_a: Shape, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return int(2 * 3 * x[1] * down[1] * _rows(index, down, x[1], of) + _pair_flops(x, index, down, of, up_a))


@register_flop_formula([torch.ops.tightfit.adapted_experts_backward])
def _adapted_backward_flops(
    total: Any, weights_total: Any, dy: Any, x: Shape, index: Shape, weights: Any, gate_up: Any, down: Shape,
    up_bias: Any,
    down_bias: Any, first: int, of: int, activation: str, up_a: Shape, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Beside the products without pairs: those of pairs again, and the gradients of inputs and factors."""
    return int(2 * 5 * x[1] * down[1] * _rows(index, down, x[1], of) + 3 * _pair_flops(x, index, down, of, up_a))


_library.define(
    "mixture(Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor down, Tensor? up_bias, Tensor? down_bias,"
    " str activation, int at_once, Tensor? up_a, Tensor? up_b, Tensor? down_a, Tensor? down_b, float scale) -> Tensor"
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
    down_bias: Tensor | None, activation: str, at_once: int, up_a: Tensor | None = None, up_b: Tensor | None = None,
    down_a: Tensor | None = None, down_b: Tensor | None = None, scale: float = 0.0,
) -> Tensor:  # fmt: skip
    total = None
    for own, first, of in _groups(x, (gate_up, down, up_bias, down_bias), at_once):
        given = total, x, index, weights, *own, first, of, activation
        if up_a is None:
            total, *_ = some_experts(*given)
        else:
            total, *_ = adapted_experts(*given, up_a, up_b, down_a, down_b, scale)
    assert total is not None
    return total.to(x.dtype)  # type: ignore[no-any-return]


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.activation, ctx.at_once = inputs[:MIXTURE_INPUTS]
    *pairs, ctx.scale = inputs[MIXTURE_INPUTS:]
    ctx.save_for_backward(*tensors, *pairs)


MIXTURE_INPUTS = 9
"""of `mixture`, before its pairs"""


def _grad(ctx: Any, dy: Tensor) -> Any:
    x, index, weights, gate_up, down, up_bias, down_bias, *pairs = ctx.saved_tensors
    adapted = pairs[0] is not None
    dx = dweights = None
    gradients: list[Tensor | None] = [None] * len(pairs)
    dy = dy.contiguous()
    for own, first, of in _groups(x, (gate_up, down, up_bias, down_bias), ctx.at_once):
        given = dx, dweights, dy, x, index, weights, *own, first, of, ctx.activation
        if adapted:
            dx, dweights, _, _, *gradients = adapted_experts_backward(*given, *pairs, ctx.scale, *gradients)
        else:
            dx, dweights, *_ = some_experts_backward(*given)
    assert dx is not None
    assert dweights is not None
    return dx.to(x.dtype), None, dweights.to(weights.dtype), *[None] * (MIXTURE_INPUTS - 3), *gradients, None


mixture = _differentiable("mixture", open_mixture, _fake, _grad, _setup)
DECOMPOSITIONS[mixture] = open_mixture
