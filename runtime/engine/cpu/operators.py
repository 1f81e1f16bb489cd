"""The fused operators of a decoder on the CPU, as the runtime executes them: `OPERATORS[target](*args, out=(...))`.

Every operator writes into the tensors that it is given and goes through its rows in blocks that stay in cache, so that
it touches memory once and needs a small, fixed workspace. It computes in float32 and rounds once, at the end; gates and
the scale of embeddings, which are multiplied in the tensors' type, round twice. Matrix products are those of
`tightfit.runtime.engine.cpu.products`. `tightfit.profiles.tracing.torch_ops` registers the same functions with torch,
together with their backward, so that a traced graph names them.

Shapes: T = batch * seq flat tokens, H = hidden size, I and O = inputs and outputs of a projection, R = rank of its LoRA
pair, V = rows of one slice of the loss head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu import products
from tightfit.runtime.engine.cpu.attention import LOG2_E, attention, attention_backward
from tightfit.runtime.engine.cpu.batch_norm import batch_norm, batch_norm_inference, keep_state
from tightfit.runtime.engine.cpu.cached_attention import cache_tokens, cached_attention
from tightfit.runtime.engine.cpu.cross_entropy import cross_entropy_backward
from tightfit.runtime.engine.cpu.dora import dora_norm, dora_scale, dora_scale_backward
from tightfit.runtime.engine.cpu.dropout import (
    dropout,
    dropout_lora_backward,
    dropout_lora_down,
    dropout_projection_backward,
)
from tightfit.runtime.engine.cpu.experts import experts, experts_backward
from tightfit.runtime.engine.cpu.gates import buffered, gated, gated_backward, row_blocks
from tightfit.runtime.engine.cpu.lstm import lstm, lstm_backward
from tightfit.runtime.engine.cpu.preference import preference_loss, preference_scores
from tightfit.runtime.engine.cpu.products import blocks, multiply
from tightfit.runtime.engine.cpu.rotary import rotary, rotary_backward
from tightfit.runtime.engine.cpu.router_loss import counted_tokens, router_loss, router_totals, router_totals_backward
from tightfit.runtime.engine.cpu.tables import (
    HEAD_ROWS,
    check_ids,
    table_head,
    table_head_backward,
    table_rows,
    table_rows_backward,
)
from tightfit.runtime.engine.cpu.tile_attention import tile_attention, tile_attention_backward

aten = torch.ops.aten

STATE_COLUMNS = 3  # running maximum, running sum, logit of the label


def copy(x: Tensor, *, out: Sequence[Tensor]) -> None:
    """Copy x into out, whose strides and dtype may differ."""
    out[0].copy_(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, *, out: Sequence[Tensor]) -> None:
    """y = x / rms(x) * weight (or 1 + weight, as Gemma stores it). x [T, H], weight float32 [H]; out: y [T, H], rstd
    float32 [T, 1].
    """
    y, rstd = out
    scale = weight.float() + 1.0 if unit_offset else weight.float()
    for rows, (wide, square) in buffered(2, *x.shape):
        wide.copy_(x[rows])
        torch.rsqrt(torch.square(wide, out=square).mean(-1, keepdim=True).add_(eps), out=rstd[rows])
        y[rows].copy_(wide.mul_(rstd[rows]).mul_(scale))


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool, *, out: Sequence[Tensor]
) -> None:
    """dx = rstd * (g - n * mean(g * n)), with g = dy * weight and n = x * rstd. The weight is frozen."""
    (dx,) = out
    scale = weight.float() + 1.0 if unit_offset else weight.float()
    for rows, (normed, wide, product) in buffered(3, *x.shape):
        normed.copy_(x[rows]).mul_(rstd[rows])
        wide.copy_(dy[rows]).mul_(scale)
        mean = torch.mul(wide, normed, out=product).mean(-1, keepdim=True)
        dx[rows].copy_(wide.addcmul_(normed, mean, value=-1.0).mul_(rstd[rows]))


def lora_down(x: Tensor, a: Tensor, *, out: Sequence[Tensor]) -> None:
    """low = x @ A.T. x [T, I], A float32 [R, I]; out [T, R]. Source of the pair: Hu et al. 2021, "LoRA"."""
    multiply((x, a.t(), 1.0), out=out[0])


def projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    b: Tensor | None,
    scale: float,
    *,
    out: Sequence[Tensor],
) -> None:
    """y = x @ W.T (+ bias) + scale * low @ B.T. x [T, I], W [O, I], bias [O], low [T, R], B float32 [O, R]; out
    [T, O]. Without a pair (`low` and `b` None) y is what a pair with B = 0 gives.
    """
    (y,) = out
    pair = () if low is None or b is None else ((low, b.t(), scale),)
    multiply((x, weight.t(), 1.0), *pair, out=y, addend=bias)


def lora_backward(dy: Tensor, x: Tensor, low: Tensor, b: Tensor, scale: float, *, out: Sequence[Tensor]) -> None:
    """out: d low [T, R], d A float32 [R, I], d B float32 [O, R] of `projection` and `lora_down`."""
    dlow, da, db = out
    multiply((dy, b, scale), out=dlow)
    multiply((dlow.t(), x, 1.0), out=da)
    # Takes half the time of dy.T @ low, because the wide operand is not transposed.
    multiply((low.t(), dy, scale), out=db.t())


def projection_backward(
    dy: Tensor,
    weight: Tensor,
    dlow: Tensor | None,
    a: Tensor | None,
    addend: Tensor | None,
    dtype: torch.dtype | None = None,
    *,
    out: Sequence[Tensor],
) -> None:
    """dx = dy @ W + d low @ A (+ addend: what other uses of x, or other rows of W, add to its gradient). out [T, I] of
    the type `dtype`, that of dy if that is None; it may be the addend. `dlow` and `a` are None without a pair.
    """
    (dx,) = out
    pair = () if dlow is None or a is None else ((dlow, a, 1.0),)
    multiply((dy, weight, 1.0), *pair, out=dx, addend=addend)


def embed_rows(weight: Any, ids: Tensor, scale: float, *, out: Sequence[Tensor], store: Any = None) -> None:
    """Rows of a table for ids [T], times scale. out [T, H]. Raises InputError for ids below 0.

    With a store, `weight` is the tensor's name in it and rows are read from disk.
    """
    (y,) = out
    flat = ids.reshape(-1)
    check_ids(flat)
    _gather(weight, flat, y, store)
    if scale != 1.0:
        y.mul_(scale)


def head_rows(weight: Any, labels: Tensor, *, out: Sequence[Tensor], store: Any = None) -> None:
    """The head's row of every label; row 0 for labels below 0, which mark tokens without a label.

    labels [T], out [T, H]; `weight` and `store` as in `embed_rows`.
    """
    _gather(weight, labels.reshape(-1).clamp(min=0), out[0], store)


def _gather(weight: Any, rows: Tensor, out: Tensor, store: Any) -> None:
    if store is None:
        torch.index_select(weight, 0, rows, out=out)
    else:
        store.gather_rows(weight, rows, out)


def head_begin(hidden: Tensor, gradient: bool = True, *, out: Sequence[Tensor]) -> None:
    """The loss head's state before the first slice: float32 [T, 3 + H] = maximum, sum, label's logit, sum of exp * row.

    Without `gradient` it is [T, 3]: the last part, which only the gradient needs, is left out.
    """
    (state,) = out
    state.zero_()
    state[:, 0].fill_(-math.inf)


def head_chunk(
    state: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    start: int,
    rounded: bool = True,
    *,
    out: Sequence[Tensor],
) -> None:
    """Fold one slice of the vocabulary into the state: softmax over the logits of all slices, one slice at a time.

    `state` is as `head_begin` makes it. If it has no columns for the sum of exp * row, the product that adds to that
    sum is left out; the rest is the same to the bit. hidden [T, H]; weight [V, H] = rows start .. start + V of the
    head; labels int64 [T] or [batch, seq]. With `rounded`, a bfloat16 weight is multiplied in bfloat16 if the processor
    does that.

    out: the new state, and two scratch tensors for the logits of a block of tokens: `head_scratch(T)` x V in the
    weight's type (one row unless `rounded`) and in float32. Scratch is an output so that the plan places it; on the
    heap it would stay resident for the rest of the step. Source of the running rescale: Milakov and Gimelshein 2018,
    "Online normalizer calculation for softmax".
    """
    new, narrow, wide = out
    single = weight.dtype is torch.float32
    in_narrow = rounded and not single and products.narrow(weight.dtype)
    product = multiply if in_narrow or single else products.multiply_wide
    flat = labels.reshape(-1)
    for rows in blocks(hidden.shape[0], HEAD_ROWS):
        count = rows.stop - rows.start
        old, updated, logits = state[rows], new[rows], wide[:count]
        scores = narrow[:count] if in_narrow else logits
        product((hidden[rows], weight.t(), 1.0), out=scores)
        if in_narrow:
            logits.copy_(scores)
        index = flat[rows] - start
        in_slice = (index >= 0) & (index < weight.shape[0])
        index = index.clamp_(0, weight.shape[0] - 1)
        updated[:, 2] = torch.where(in_slice, logits.gather(1, index[:, None])[:, 0], old[:, 2])
        maximum = torch.maximum(old[:, 0], logits.amax(1))
        # exp2, as it is faster than exp: see `tightfit.runtime.engine.cpu.attention`.
        shrink = torch.exp2((old[:, 0] - maximum).mul_(LOG2_E))
        logits.sub_(maximum[:, None]).mul_(LOG2_E).exp2_()
        updated[:, 0] = maximum
        updated[:, 1] = torch.addcmul(logits.sum(1), old[:, 1], shrink)
        if state.shape[1] == STATE_COLUMNS:
            continue
        accumulated = updated[:, STATE_COLUMNS:]
        torch.mul(old[:, STATE_COLUMNS:], shrink[:, None], out=accumulated)
        if in_narrow or single:
            product_rows = torch.mm(scores.copy_(logits) if in_narrow else scores, weight)
            for part in row_blocks(*product_rows.shape):
                accumulated[part].add_(product_rows[part])
            del product_rows  # so that it and the next block's are not in memory together
        else:
            product((logits, weight, 1.0), out=accumulated, addend=accumulated)


def head_finish(
    state: Tensor, rows: Tensor, labels: Tensor, counted: Tensor | None = None, *, out: Sequence[Tensor]
) -> None:
    """The loss and its gradient from the state after the last slice; rows [T, H] are the output of `head_rows`.

    counted: the labels of the whole batch of which these tokens are a part; None: they are all of it. out: loss float32
    [] (the labelled tokens' part of the mean over those of the batch), token losses float32 [T] (0 where unlabelled), d
    loss / d hidden [T, H].
    """
    loss, token_losses, dhidden = out
    labelled, count = _mean_loss(state, labels, counted, loss, token_losses)
    head_weighted(state, rows, labelled.float().div_(count), out=(dhidden,))


def head_weighted(state: Tensor, rows: Tensor, weights: Tensor, *, out: Sequence[Tensor]) -> None:
    """The gradient of a loss whose derivative by the negative log-likelihood of each token is `weights`, float32 [T].

    out: d loss / d hidden [T, H]; state and rows as in `head_finish`.
    """
    (dhidden,) = out
    for part, (block,) in buffered(1, *dhidden.shape):
        torch.div(state[part, STATE_COLUMNS:], state[part, 1, None], out=block)
        dhidden[part].copy_(block.sub_(rows[part]).mul_(weights[part, None]))


def head_mean(state: Tensor, labels: Tensor, counted: Tensor | None = None, *, out: Sequence[Tensor]) -> None:
    """The loss and token losses alone, as in `head_finish`, from a state with or without the gradient's columns."""
    _mean_loss(state, labels, counted, *out)


def _mean_loss(
    state: Tensor, labels: Tensor, counted: Tensor | None, loss: Tensor, token_losses: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill the losses; returns which tokens are labelled (bool [T]), and how many of the batch are, as a tensor, at
    least 1.
    """
    labelled = labels.reshape(-1) >= 0
    count = (labelled if counted is None else counted >= 0).sum().clamp_(min=1)
    token_losses.copy_(torch.where(labelled, state[:, 0] + state[:, 1].log() - state[:, 2], 0.0))
    loss.copy_(token_losses.sum() / count)
    return labelled, count


def send(x: Tensor, direction: str, number: int, bits: int, *, out: Sequence[Tensor | None], stage: Any = None) -> None:
    """Send x to a neighbour in a pipeline: tensor `number` of a micro-batch's message "up" or "down". out: a scalar
    that stands for the loss where this member does not compute it, or nothing.

    `stage` is a `tightfit.runtime.engine.fleet.stage.PipelineStage`; without one, while kernels are warmed, nothing is
    sent.
    """
    for scalar in out:
        if scalar is not None:
            scalar.zero_()
    if stage is not None:
        stage.send(x, direction, number)


def receive(direction: str, number: int, bits: int, *, out: Sequence[Tensor], stage: Any = None) -> None:
    """Receive tensor `number` of a micro-batch's message from a neighbour in a pipeline; as `send`."""
    if stage is not None:
        stage.receive(out[0], direction, number)


OPERATORS: dict[str, Callable[..., None]] = {
    "tightfit.copy": copy,
    "tightfit.cache_tokens": cache_tokens,
    "tightfit.cached_attention": cached_attention,
    "tightfit.rms_norm": rms_norm,
    "tightfit.rms_norm_backward": rms_norm_backward,
    "tightfit.lora_down": lora_down,
    "tightfit.projection": projection,
    "tightfit.lora_backward": lora_backward,
    "tightfit.projection_backward": projection_backward,
    "tightfit.dropout": dropout,
    "tightfit.dropout_lora_down": dropout_lora_down,
    "tightfit.dropout_lora_backward": dropout_lora_backward,
    "tightfit.dropout_projection_backward": dropout_projection_backward,
    "tightfit.batch_norm": batch_norm,
    "tightfit.batch_norm_inference": batch_norm_inference,
    "tightfit.keep_state": keep_state,
    "tightfit.cross_entropy_backward": cross_entropy_backward,
    "tightfit.lstm": lstm,
    "tightfit.lstm_backward": lstm_backward,
    "tightfit.dora_norm": dora_norm,
    "tightfit.dora_scale": dora_scale,
    "tightfit.dora_scale_backward": dora_scale_backward,
    "tightfit.attention": attention,
    "tightfit.attention_backward": attention_backward,
    "tightfit.rotary": rotary,
    "tightfit.rotary_backward": rotary_backward,
    "tightfit.tile_attention": tile_attention,
    "tightfit.tile_attention_backward": tile_attention_backward,
    "tightfit.counted_tokens": counted_tokens,
    "tightfit.router_totals": router_totals,
    "tightfit.router_totals_backward": router_totals_backward,
    "tightfit.router_loss": router_loss,
    "tightfit.experts": experts,
    "tightfit.experts_backward": experts_backward,
    "tightfit.adapted_experts": experts,
    "tightfit.adapted_experts_backward": experts_backward,
    "tightfit.gated": gated,
    "tightfit.gated_backward": gated_backward,
    "tightfit.embed_rows": embed_rows,
    "tightfit.head_rows": head_rows,
    "tightfit.head_begin": head_begin,
    "tightfit.head_chunk": head_chunk,
    "tightfit.head_finish": head_finish,
    "tightfit.head_mean": head_mean,
    "tightfit.head_weighted": head_weighted,
    "tightfit.preference_loss": preference_loss,
    "tightfit.preference_scores": preference_scores,
    "tightfit.table_rows": table_rows,
    "tightfit.table_rows_backward": table_rows_backward,
    "tightfit.table_head": table_head,
    "tightfit.table_head_backward": table_head_backward,
    "tightfit.send": send,
    "tightfit.receive": receive,
}
