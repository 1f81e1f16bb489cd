"""The experts of a mixture on the CPU: gated MLPs, with biases or without, of which a router chooses some for each row
of x.

A call has the matrices of a few experts, slices of those of all, and adds what each makes of its rows to a sum in
float32, in the order of the experts. How many rows an expert has is known only while the step runs. They are taken in
blocks of few sizes (`blocks_of`), of which the last is filled up with zeros: oneDNN keeps code for every shape of a
product that it has met, and scratch, which is an output so that the plan places it, has the size of the largest block,
whatever the router chooses. What is between an expert's matrices is made again in the backward, of a block at a time.

The matrices of all experts of a layer may have LoRA pairs (`Pairs`), whose factors and gradients hold all experts, in
PEFT's order. An expert without rows has gradients of zero.

Shapes: T = batch * seq flat tokens, H = hidden size, F = width of an expert, E = experts of a call, k = experts of a
token, N = experts of the layer, R = rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.gates import gated, gated_backward
from tightfit.runtime.engine.cpu.products import multiply
from tightfit.runtime.engine.device.expert_blocks import blocks_of, largest_block


def experts_scratch(tokens: int, hidden: int, width: int, *, backward: bool, rank: int = 0) -> tuple[int, int]:
    """Elements of the two scratch outputs of `experts`, or of its backward: of x's type, and of float32. `rank`: of
    pairs, if there are any.
    """
    rows = largest_block(tokens)
    wide = rows * max(hidden, width)
    if rank:
        wide = sum(_rooms(tokens, hidden, width, rank))
    return rows * ((3 * hidden + 6 * width) if backward else (2 * hidden + 3 * width)), wide


class Pairs(NamedTuple):
    """The LoRA pairs of a layer's experts, float32, or their gradients: of gates and ups, and of downs."""

    up_a: Tensor
    """[N * R, H]: of each expert its R rows"""
    up_b: Tensor
    """[2 * F, R * N]: of the first column of each expert, the second of each, and so on"""
    down_a: Tensor
    """[N * R, F]"""
    down_b: Tensor
    """[H, R * N]"""

    def up(self, expert: int, of: int) -> tuple[Tensor, Tensor]:
        """The factors [R, H] and [2 * F, R] of an expert, by its number among those of the layer."""
        return _factors(self.up_a, self.up_b, expert, of)

    def down(self, expert: int, of: int) -> tuple[Tensor, Tensor]:
        """The factors [R, F] and [H, R]."""
        return _factors(self.down_a, self.down_b, expert, of)


def _factors(a: Tensor, b: Tensor, expert: int, of: int) -> tuple[Tensor, Tensor]:
    rank = len(a) // of
    return a[rank * expert : rank * (expert + 1)], b[:, expert::of]


class _PairOfExpert:
    """What an expert's pair adds to a product: scale * x @ A.T @ B.T. Products are made in float32, of which no library
    keeps code for each size, in parts of the scratch.
    """

    def __init__(self, factors: tuple[Tensor, Tensor], scale: float, rooms: Sequence[Tensor]) -> None:
        """`rooms`: flat, for x in float32, a product, the gradient of B, and this pair's own: B, x @ A.T, and the
        gradient of that.
        """
        self.a, b = factors
        self._x, self._product, self._gradient, own_b, self._low, self._dlow = rooms
        self._scaled_b = torch.mul(b, scale, out=_shaped(own_b, *b.shape))
        self._scale = scale

    def add(self, x: Tensor, total: Tensor) -> Tensor:
        """Add the pair's product [n, outputs] of x [n, inputs] to `total`; returns x @ A.T [n, R]."""
        low = self.low(x)
        self._add(low, self._scaled_b.t(), total)
        return low

    def low(self, x: Tensor) -> Tensor:
        """x @ A.T, float32 [n, R]."""
        return torch.mm(self._float(x), self.a.t(), out=_shaped(self._low, len(x), len(self.a)))

    def add_backward(self, dy: Tensor, total: Tensor) -> Tensor:
        """Add the gradient of x, given that of the product, to `total` [n, inputs]; returns the gradient of x @ A.T."""
        dlow = torch.mm(self._float(dy), self._scaled_b, out=_shaped(self._dlow, len(dy), len(self.a)))
        self._add(dlow, self.a, total)
        return dlow

    def add_gradients(self, dy: Tensor, x: Tensor, low: Tensor, dlow: Tensor, gradients: tuple[Tensor, Tensor]) -> None:
        """Add the gradients of A and B to `gradients`."""
        da, db = gradients
        da.addmm_(dlow.t(), self._float(x))
        made = torch.mm(low.t(), self._float(dy), out=_shaped(self._gradient, low.shape[1], dy.shape[1]))
        db.add_(made.t(), alpha=self._scale)

    def _float(self, x: Tensor) -> Tensor:
        """x in float32."""
        return x if x.dtype is torch.float32 else _shaped(self._x, *x.shape).copy_(x)

    def _add(self, left: Tensor, right: Tensor, total: Tensor) -> None:
        total.add_(torch.mm(left, right, out=_shaped(self._product, *total.shape)))


def _shaped(room: Tensor, rows: int, columns: int) -> Tensor:
    """The beginning of flat scratch as a matrix."""
    return room[: rows * columns].view(rows, columns)


def _rooms(tokens: int, hidden: int, width: int, rank: int) -> list[int]:
    """Elements of the parts of the scratch for pairs: three that both share, and three of each (`_PairOfExpert`)."""
    rows, widest = largest_block(tokens), max(hidden, 2 * width)
    return [rows * widest, rows * widest, widest * rank, *2 * [widest * rank, rows * rank, rows * rank]]


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
    *given: Any,
    out: Sequence[Tensor],
) -> None:
    """y = total + for each row of x the sum of weights * down(gated(gate(x), up(x))) over its experts of this call.

    total: float32 [T, H], the sum over the experts before, or None; y may be the same tensor. x [T, H]; index int64 [T,
    k]: each row's experts, numbered from 0 to `of` - 1; weights [T, k]. gate_up [E * 2 * F, H]: of each expert the rows
    of its gate and then those of its up; down [E * H, F]; up_bias [E, 2 * F] and down_bias [E, H] are added to what
    they make; `first` is the number of the first of these experts; `activation` as `gated` has it. `given`, where there
    are pairs: the four tensors of `Pairs`, and the scale of their products. out: y, and scratch as `experts_scratch`
    has it.
    """
    y, narrow, wide = out
    _begin(y, total)
    hidden, width = x.shape[1], down.shape[1]
    pairs_of = _pairs_of(given, of, len(x), wide)
    flat = weights.reshape(-1)
    for number, places, size in _blocks_of(index, first, down.shape[0] // hidden):
        tokens = places // index.shape[1]
        rows, made, both, inner = _carved(narrow, size, hidden, hidden, 2 * width, width)
        of_up, of_down = pairs_of(first + number)
        _take(x, tokens, rows)
        own = gate_up[2 * width * number : 2 * width * (number + 1)]
        multiply((rows, own.t(), 1.0), out=both, addend=None if up_bias is None else up_bias[number])
        if of_up is not None:
            of_up.add(rows, both)
        gated(both[:, :width], both[:, width:], activation, out=(inner,))
        own = down[hidden * number : hidden * (number + 1)]
        multiply((inner, own.t(), 1.0), out=made, addend=None if down_bias is None else down_bias[number])
        if of_down is not None:
            of_down.add(inner, made)
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
    *given: Any,
    out: Sequence[Tensor],
) -> None:
    """out: total + what the experts of this call contribute to the gradient of x, float32 [T, H]; weights_total + the
    gradient of their weights, float32 [T, k]; and scratch. The totals are those of the experts before, or None; the
    outputs may be the same tensors. `given`, where there are pairs: those and their scale as for `experts`, and totals
    of their gradients, of `Pairs` or None each; out then has these gradients, as `Pairs`, besides.
    """
    dx, dweights, narrow, wide, *made_of_pairs = out
    _begin(dx, total)
    _begin(dweights, weights_total)
    for made_total, total_before in zip(made_of_pairs, given[PAIR_GIVEN:], strict=True):
        _begin(made_total, total_before)
    hidden, width = x.shape[1], down.shape[1]
    pairs_of = _pairs_of(given, of, len(x), wide)
    flat, dflat = weights.reshape(-1), dweights.view(-1)
    for number, places, size in _blocks_of(index, first, down.shape[0] // hidden):
        tokens, count = places // index.shape[1], len(places)
        rows, drows, made, both, dboth, inner, dinner = _carved(
            narrow, size, hidden, hidden, hidden, 2 * width, 2 * width, width, width
        )
        of_up, of_down = pairs_of(first + number)
        own = gate_up[2 * width * number : 2 * width * (number + 1)]
        _take(x, tokens, rows)
        _take(dy, tokens, drows)
        multiply((rows, own.t(), 1.0), out=both, addend=None if up_bias is None else up_bias[number])
        up_low = None if of_up is None else of_up.add(rows, both)
        multiply((drows, down[hidden * number : hidden * (number + 1)], 1.0), out=dinner)
        down_dlow = None if of_down is None else of_down.add_backward(drows, dinner)
        gate, up = both[:, :width], both[:, width:]
        gated(gate, up, activation, out=(inner,))
        # dy of an expert is weight * dy, so that the gradient of the weight is dy . down(inner) = (dy @ down) . inner +
        # dy . bias.
        (products,) = _carved(wide, count, width)
        torch.mul(dinner[:count], inner[:count], out=products)
        sums = products.sum(1)
        if down_bias is not None:
            (products,) = _carved(wide, count, hidden)
            sums += torch.mul(drows[:count], down_bias[number], out=products).sum(1)
        dflat[places] = sums
        own_weights = flat[places].to(dinner.dtype)[:, None]
        dinner[:count].mul_(own_weights)
        if of_down is not None and down_dlow is not None:
            drows[:count].mul_(own_weights)
            down_dlow[:count].mul_(own_weights)
            low = of_down.low(inner)
            of_down.add_gradients(drows, inner, low, down_dlow, Pairs(*made_of_pairs).down(first + number, of))
        gated_backward(dinner, gate, up, activation, out=(dboth[:, :width], dboth[:, width:]))
        multiply((dboth, own, 1.0), out=made)
        if of_up is not None and up_low is not None:
            dlow = of_up.add_backward(dboth, made)
            of_up.add_gradients(dboth, rows, up_low, dlow, Pairs(*made_of_pairs).up(first + number, of))
        (added,) = _carved(wide, count, hidden)
        dx.index_add_(0, tokens, added.copy_(made[:count]))


PAIR_GIVEN = len(Pairs._fields) + 1
"""arguments that operators with pairs have for them: their factors and the scale"""


def _pairs_of(
    given: Sequence[Any], of: int, tokens: int, wide: Tensor
) -> Callable[[int], tuple[_PairOfExpert, _PairOfExpert] | tuple[None, None]]:
    """A function that gives the pairs of an expert's two matrices, if there are any; `wide` is scratch."""
    if not given:
        return lambda expert: (None, None)
    *factors, scale = given[:PAIR_GIVEN]
    pairs = Pairs(*factors)
    hidden, width, rank = pairs.up_a.shape[1], pairs.down_a.shape[1], len(pairs.up_a) // of
    *shared, b, low, dlow, other_b, other_low, other_dlow = wide.view(-1).split(_rooms(tokens, hidden, width, rank))
    of_up, of_down = (*shared, b, low, dlow), (*shared, other_b, other_low, other_dlow)

    def of_expert(expert: int) -> tuple[_PairOfExpert, _PairOfExpert]:
        return (
            _PairOfExpert(pairs.up(expert, of), scale, of_up),
            _PairOfExpert(pairs.down(expert, of), scale, of_down),
        )

    return of_expert


def _begin(out: Tensor, total: Tensor | None) -> None:
    """Let a sum go on from `total`, which may be the same tensor, or begin."""
    if total is None:
        out.zero_()
    elif total.data_ptr() != out.data_ptr():
        out.copy_(total)


def _blocks_of(index: Tensor, first: int, count: int) -> Iterator[tuple[int, Tensor, int]]:
    """(number among the `count` experts from `first` on, places in the flat `index` of some of its rows, size of the
    block that they fill), of one expert after the other and in the order of its rows.
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
