"""The experts of a mixture on the CPU: gated MLPs, with biases or without, of which a router chooses some for each row of x.

A call has the matrices of a few experts, slices of those of all, and adds what each makes of its rows to a sum in float32, in the
order of the experts. How many rows an expert has is known only while the step runs. They are taken in blocks of few sizes
(`blocks_of`), of which the last is filled up with zeros: oneDNN keeps code for every shape of a product that it has met, and scratch,
which is an output so that the plan places it, has the size of the largest block, whatever the router chooses. What is between an
expert's matrices is made again in the backward, of a block at a time.

Shapes: T = batch * seq flat tokens, H = hidden size, F = width of an expert, E = experts of a call, k = experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.gates import gated, gated_backward
from tightfit.runtime.engine.cpu.products import multiply
from tightfit.runtime.engine.device.expert_blocks import blocks_of, largest_block


def experts_scratch(tokens: int, hidden: int, width: int, *, backward: bool) -> tuple[int, int]:
    """Elements of the two scratch outputs of `experts`, or of its backward: of x's type, and of float32."""
    rows = largest_block(tokens)
    return rows * ((3 * hidden + 6 * width) if backward else (2 * hidden + 3 * width)), rows * max(hidden, width)


def experts(
    total: Tensor | None,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    first: int,
    of: int,
    activation: str,
    *,
    out: Sequence[Tensor],
) -> None:
    """y = total + for each row of x the sum of weights * down(gated(gate(x), up(x))) over its experts of this call.

    total: float32 [T, H], the sum over the experts before, or None; y may be the same tensor. x [T, H]; index int64 [T, k]: each row's
    experts, numbered from 0 to `of` - 1; weights [T, k]. gate_up [E * 2 * F, H]: of each expert the rows of its gate and then those of
    its up; down [E * H, F]; up_bias [E, 2 * F] and down_bias [E, H] are added to what they make; `first` is the number of the first of
    these experts; `activation` as `gated` has it. out: y, and scratch as `experts_scratch` has it.
    """
    y, narrow, wide = out
    _begin(y, total)
    hidden, width = x.shape[1], down.shape[1]
    flat = weights.reshape(-1)
    for number, places, size in _blocks_of(index, first, down.shape[0] // hidden):
        tokens = places // index.shape[1]
        rows, made, both, inner = _carved(narrow, size, hidden, hidden, 2 * width, width)
        _take(x, tokens, rows)
        own = gate_up[2 * width * number : 2 * width * (number + 1)]
        multiply((rows, own.t(), 1.0), out=both, addend=None if up_bias is None else up_bias[number])
        gated(both[:, :width], both[:, width:], activation, out=(inner,))
        own = down[hidden * number : hidden * (number + 1)]
        multiply((inner, own.t(), 1.0), out=made, addend=None if down_bias is None else down_bias[number])
        (added,) = _carved(wide, len(tokens), hidden)
        added.copy_(made[: len(tokens)]).mul_(flat[places].float()[:, None])
        y.index_add_(0, tokens, added)


def experts_backward(
    total: Tensor | None,
    weights_total: Tensor | None,
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    first: int,
    of: int,
    activation: str,
    *,
    out: Sequence[Tensor],
) -> None:
    """out: total + what the experts of this call contribute to the gradient of x, float32 [T, H]; weights_total + the gradient of
    their weights, float32 [T, k]; and scratch. The totals are those of the experts before, or None; the outputs may be the same tensors.
    """
    dx, dweights, narrow, wide = out
    _begin(dx, total)
    _begin(dweights, weights_total)
    hidden, width = x.shape[1], down.shape[1]
    flat, dflat = weights.reshape(-1), dweights.view(-1)
    for number, places, size in _blocks_of(index, first, down.shape[0] // hidden):
        tokens, count = places // index.shape[1], len(places)
        rows, drows, made, both, dboth, inner, dinner = _carved(
            narrow, size, hidden, hidden, hidden, 2 * width, 2 * width, width, width
        )
        own = gate_up[2 * width * number : 2 * width * (number + 1)]
        _take(x, tokens, rows)
        _take(dy, tokens, drows)
        multiply((rows, own.t(), 1.0), out=both, addend=None if up_bias is None else up_bias[number])
        multiply((drows, down[hidden * number : hidden * (number + 1)], 1.0), out=dinner)
        gate, up = both[:, :width], both[:, width:]
        gated(gate, up, activation, out=(inner,))
        # dy of an expert is weight * dy, so that the gradient of the weight is dy . down(inner) = (dy @ down) . inner + dy . bias.
        (products,) = _carved(wide, count, width)
        torch.mul(dinner[:count], inner[:count], out=products)
        sums = products.sum(1)
        if down_bias is not None:
            (products,) = _carved(wide, count, hidden)
            sums += torch.mul(drows[:count], down_bias[number], out=products).sum(1)
        dflat[places] = sums
        dinner[:count].mul_(flat[places].to(dinner.dtype)[:, None])
        gated_backward(dinner, gate, up, activation, out=(dboth[:, :width], dboth[:, width:]))
        multiply((dboth, own, 1.0), out=made)
        (added,) = _carved(wide, count, hidden)
        dx.index_add_(0, tokens, added.copy_(made[:count]))


def _begin(out: Tensor, total: Tensor | None) -> None:
    """Let a sum go on from `total`, which may be the same tensor, or begin."""
    if total is None:
        out.zero_()
    elif total.data_ptr() != out.data_ptr():
        out.copy_(total)


def _blocks_of(index: Tensor, first: int, count: int) -> Iterator[tuple[int, Tensor, int]]:
    """(number among the `count` experts from `first` on, places in the flat `index` of some of its rows, size of the block that they
    fill), of one expert after the other and in the order of its rows.
    """
    flat = index.reshape(-1)
    for number in range(count):
        places = (flat == first + number).nonzero().view(-1)
        for size in blocks_of(len(places), largest_block(len(index))):
            yield number, places[:size], size
            places = places[size:]


def _take(x: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """Fill `rows` with those of x that have the numbers `tokens`, and what is left of them with zeros."""
    torch.index_select(x, 0, tokens, out=rows[: len(tokens)])
    rows[len(tokens) :].zero_()


def _carved(scratch: Tensor, rows: int, *columns: int) -> list[Tensor]:
    """Tensors of so many rows, and of these numbers of columns, out of flat scratch, one behind the other."""
    parts = scratch[: rows * sum(columns)].split([rows * number for number in columns])
    return [part.view(rows, number) for part, number in zip(parts, columns)]
