"""Kernels of an embedding and of a loss head that are trained in full, a slice of their rows at a time.

A slice is float32 [V, H], rows start .. start + V of a table, with start = base + offset: `base` is an int64 scalar, so
that the layers that hold slices of one size share a program. Every operator reads one slice, and each backward makes
the gradient of one; none needs the table as a whole. Gradients are added up in the order of the tokens, so that they
are the same to the bit whatever the threads. Matrix products are made in the type in which the model computes: a slice
is rounded to it where it is used, into a scratch tensor that is an output, so that the plan places it.

Shapes as in `tightfit.runtime.engine.cpu.operators`: T = batch * seq flat tokens, H = hidden size, V = rows of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.cpu.attention import LOG2_E
from tightfit.runtime.engine.cpu.products import blocks, multiply, multiply_wide, narrow

BLOCK_ELEMENTS = 1 << 18
"""float32 elements of the rows that are gathered, or added, at a time: 1 MiB"""
HEAD_ROWS = 256
"""tokens per block of a loss head: bounds its workspace whatever the batch"""


def head_scratch(tokens: int) -> int:
    """Rows of a loss head's scratch for a batch of `tokens`."""
    return min(tokens, HEAD_ROWS)


def check_ids(ids: Tensor, vocabulary: int | None = None) -> None:
    """Raises InputError for an input id below 0, or not below the rows of the embedding, `vocabulary`."""
    if not ids.numel():
        return
    least = int(ids.min())
    if least < 0:
        raise InputError(
            f"the input ids hold {least}, and no token is below 0: what is to be ignored is marked in the labels, input"
            " is padded with a token"
        )
    if vocabulary is not None and (most := int(ids.max())) >= vocabulary:
        raise InputError(
            f"the input ids hold {most}, and the embedding has {vocabulary} rows; the data was tokenised for another"
            " model"
        )


def table_rows(
    before: Tensor,
    rows: Tensor,
    ids: Tensor,
    base: Tensor,
    offset: int,
    vocabulary: int,
    scale: float,
    padding: int,
    *,
    out: Sequence[Tensor],
) -> None:
    """`before` with the rows of a slice, times scale, in the places of the ids that lie in it.

    before [T, H]; rows float32 [V, H]; ids int64 [T] or [batch, seq], below `vocabulary`, the rows of the whole table;
    `padding` is for the backward. out [T, H]. A row is rounded to the type of `before`, then multiplied in it. Raises
    InputError for an id outside the table.
    """
    (y,) = out
    flat = ids.reshape(-1)
    check_ids(flat, vocabulary)
    y.copy_(before)
    places, slice_rows = _inside(flat, int(base) + offset, rows.shape[0])
    for part in _row_blocks(places.numel(), rows.shape[1]):
        y.index_copy_(0, places[part], _scaled(rows.index_select(0, slice_rows[part]).to(y.dtype), scale))


def _scaled(rows: Tensor, scale: float) -> Tensor:
    return rows.mul_(scale) if scale != 1.0 else rows


def table_rows_backward(
    dy: Tensor,
    rows: Tensor,
    ids: Tensor,
    base: Tensor,
    offset: int,
    scale: float,
    padding: int,
    *,
    out: Sequence[Tensor],
) -> None:
    """The gradient of a slice: the sum of scale * dy over the tokens of each row, in their order. out float32 [V, H].

    dy [T, H]. The row of the token `padding` gets none, as with PyTorch's ``padding_idx``; -1: no row is left out.
    `rows` is not read: the slice is there because its update follows.
    """
    (gradient,) = out
    gradient.zero_()
    flat = ids.reshape(-1)
    places, slice_rows = _inside(flat, int(base) + offset, rows.shape[0], leave_out=padding)
    for part in _row_blocks(places.numel(), dy.shape[1]):
        gradient.index_add_(0, slice_rows[part], dy.index_select(0, places[part]).float(), alpha=scale)


def _inside(ids: Tensor, start: int, count: int, leave_out: int = -1) -> tuple[Tensor, Tensor]:
    """(places, rows of the slice) of the ids in start .. start + count, without the id `leave_out`."""
    rows = ids - start
    in_slice = (rows >= 0) & (rows < count)
    if leave_out >= 0:
        in_slice &= ids != leave_out
    places = in_slice.nonzero().view(-1)
    return places, rows.index_select(0, places)


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    return blocks(rows, max(1, BLOCK_ELEMENTS // max(1, columns)))


def table_head(
    lse: Tensor,
    own: Tensor,
    hidden: Tensor,
    rows: Tensor,
    labels: Tensor,
    base: Tensor,
    offset: int,
    cap: float,
    dtype: torch.dtype,
    rounded: bool,
    *,
    out: Sequence[Tensor],
) -> None:
    """Fold one slice of a loss head into the log of the sum of exp(logit) over the slices, and find the labels' logits.

    lse, own float32 [T]: both over the slices before, -inf and 0 before the first. hidden float32 [T, H], values of
    `dtype`; labels int64 [T] or [batch, seq], below 0 for none. With a `cap` above 0 a logit is cap * tanh(logit /
    cap). With `rounded`, products are made in `dtype` if the processor does that.

    out: lse and own with this slice; and as scratch the slice in `dtype` [V, H], and logits of `head_scratch(T)` tokens
    in `dtype` (one row unless `rounded`) and in float32. Nothing is rounded to float32: there the first scratch is one
    element.
    """
    new_lse, new_own, rounded_rows, short, wide = out
    weight = _rounded(rows, rounded_rows, dtype)
    flat, start = labels.reshape(-1), int(base) + offset
    for part in blocks(hidden.shape[0], HEAD_ROWS):
        logits = _logits(hidden[part].to(dtype), weight, short, wide, rounded)
        if cap:
            logits.div_(cap).tanh_().mul_(cap)
        index, in_slice = _labels(flat[part], start, rows.shape[0])
        new_own[part] = torch.where(in_slice, logits.gather(1, index[:, None])[:, 0], own[part])
        maximum = torch.maximum(lse[part], logits.amax(1))
        before = torch.exp2((lse[part] - maximum).mul_(LOG2_E))
        total = logits.sub_(maximum[:, None]).mul_(LOG2_E).exp2_().sum(1)
        new_lse[part] = total.add_(before).log_().add_(maximum)


def table_head_backward(
    dlse: Tensor,
    down: Tensor,
    lse: Tensor,
    new_lse: Tensor,
    hidden: Tensor,
    rows: Tensor,
    labels: Tensor,
    base: Tensor,
    offset: int,
    cap: float,
    dtype: torch.dtype,
    rounded: bool,
    *,
    out: Sequence[Tensor],
) -> None:
    """Gradients of `table_head`, whose logits are made again: of a logit, exp(logit - new_lse) * dlse, and `down` more
    for the label's own.

    dlse, down float32 [T]: gradients of its results; lse: its argument, new_lse: its result; the rest as there.

    out: gradients of lse and own float32 [T], of hidden float32 [T, H], of the slice float32 [V, H]; scratch as there,
    and one more [`head_scratch(T)`, V] float32 for the slope of capped logits (one element without a cap).
    """
    old_dlse, old_down, dhidden, drows, rounded_rows, short, wide, slopes = out
    flat, start = labels.reshape(-1), int(base) + offset
    for part in blocks(hidden.shape[0], HEAD_ROWS):
        weight = _rounded(rows, rounded_rows, dtype)  # anew: the gradient of the block before was put there
        narrow_hidden = hidden[part].to(dtype)
        logits = _logits(narrow_hidden, weight, short, wide, rounded)
        slope = slopes[: logits.shape[0]]
        if cap:
            torch.square(logits.div_(cap).tanh_(), out=slope).neg_().add_(1.0)
            logits.mul_(cap)
        index, in_slice = _labels(flat[part], start, rows.shape[0])
        gradient = logits.sub_(new_lse[part, None]).mul_(LOG2_E).exp2_().mul_(dlse[part, None])
        gradient.scatter_add_(1, index[:, None], torch.where(in_slice, down[part], 0.0)[:, None])
        if cap:
            gradient.mul_(slope)
        old_dlse[part] = torch.exp2((lse[part] - new_lse[part]).mul_(LOG2_E)).mul_(dlse[part])
        old_down[part] = torch.where(in_slice, 0.0, down[part])
        first = part.start == 0
        if dtype is torch.float32:
            multiply((gradient, weight, 1.0), out=dhidden[part])
            multiply((gradient.t(), narrow_hidden, 1.0), out=drows, addend=None if first else drows)
        elif rounded and narrow(dtype):
            gradient = short[: gradient.shape[0]].copy_(gradient)
            multiply((gradient, weight, 1.0), out=dhidden[part])
            torch.mm(gradient.t(), narrow_hidden, out=rounded_rows)
            for block in _row_blocks(*drows.shape):
                drows[block].copy_(rounded_rows[block]) if first else drows[block].add_(rounded_rows[block])
        else:
            multiply_wide((gradient, weight, 1.0), out=dhidden[part])
            multiply_wide((gradient.t(), narrow_hidden, 1.0), out=drows, addend=None if first else drows)


def _rounded(rows: Tensor, scratch: Tensor, dtype: torch.dtype) -> Tensor:
    """A slice in the type that the model computes in."""
    return rows if dtype is torch.float32 else scratch.copy_(rows)


def _logits(hidden: Tensor, weight: Tensor, short: Tensor, wide: Tensor, rounded: bool) -> Tensor:
    """hidden @ weight.T in float32, in a part of `wide`."""
    logits = wide[: hidden.shape[0]]
    if hidden.dtype is torch.float32:
        multiply((hidden, weight.t(), 1.0), out=logits)
    elif rounded and narrow(hidden.dtype):
        scores = short[: hidden.shape[0]]
        multiply((hidden, weight.t(), 1.0), out=scores)
        logits.copy_(scores)
    else:
        multiply_wide((hidden, weight.t(), 1.0), out=logits)
    return logits


def _labels(labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """(the labels' rows in a slice, 0 where they are not in it; whether they are)."""
    rows = labels - start
    in_slice = (rows >= 0) & (rows < count)
    return rows.clamp_(0, count - 1), in_slice
