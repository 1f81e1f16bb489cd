"""The fused operators of a decoder, as the runtime executes them: `OPERATORS[target](*args, out=(...))`.

Every operator writes into the storages it is given and walks its rows in blocks that stay in cache, so that it touches
memory once and needs a small, fixed workspace. float32 inside, rounded once on the way out. `profiles.register` makes
the same functions known to torch with their backward, so that a traced graph names them.

Shapes: T = batch * seq flat tokens, H = hidden size, V = rows of one slice of the loss head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

BLOCK_ELEMENTS = 1 << 17  # float32 elements per block: 512 KiB, half of a typical L2
ATTENTION_TOKENS = 256  # tokens per call of the attention kernel, at least one sample
HEAD_ROWS = 256  # tokens per block of the loss head: bounds its workspace whatever the batch
STATE_COLUMNS = 3  # running maximum, running sum, logit of the label


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def copy(x: Tensor, *, out: Sequence[Tensor]) -> None:
    """x in the layout of out."""
    out[0].copy_(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, *, out: Sequence[Tensor]) -> None:
    """y = x / rms(x) * weight (or 1 + weight, as Gemma stores it). x [T, H], weight float32 [H]; out: y [T, H], rstd float32 [T, 1]."""
    y, rstd = out
    scale = weight.float() + 1.0 if unit_offset else weight.float()
    for rows in _blocks(*x.shape):
        wide = x[rows].float()
        torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps), out=rstd[rows])
        if x.dtype is torch.float32:
            wide = wide * rstd[rows]
        else:
            wide.mul_(rstd[rows])
        y[rows].copy_(wide.mul_(scale))


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool, *, out: Sequence[Tensor]
) -> None:
    """dx = rstd * (g - n * mean(g * n)), with g = dy * weight and n = x * rstd. The weight is frozen."""
    (dx,) = out
    scale = weight.float() + 1.0 if unit_offset else weight.float()
    for rows in _blocks(*x.shape):
        normed = x[rows].float() * rstd[rows]
        wide = dy[rows].float() * scale
        mean = (wide * normed).mean(-1, keepdim=True)
        dx[rows].copy_(wide.addcmul_(normed, mean, value=-1.0).mul_(rstd[rows]))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    *,
    out: Sequence[Tensor],
) -> None:
    """Rotary embedding (half-split pairs) and causal attention, in float32 whatever the inputs' type.

    q [T, heads * D], k and v [T, kv_heads * D]; cos, sin float32 [seq, D / 2]; mask float32 [seq, seq] is added to the
    scores instead of the causal mask. out: y like q, log-sum-exp float32 [batch, heads, seq].

    Rotated q and k are made again in backward rather than saved. PyTorch's kernel needs no seq x seq matrix; in float32
    it is the faster one without AMX (measured: 64 tokens, batch 16, backward 5.2 ms against 34 ms in bfloat16).
    """
    y, lse = out
    seq = cos.shape[0]
    for samples in _samples(q.shape[0], seq):
        rows = slice(samples.start * seq, samples.stop * seq)
        attended, sums = aten._scaled_dot_product_flash_attention_for_cpu(
            _heads(q[rows], seq, heads, (cos, sin)), _heads(k[rows], seq, kv_heads, (cos, sin)), _heads(v[rows], seq, kv_heads),
            0.0, mask is None, attn_mask=mask, scale=scale,
        )  # fmt: skip
        y[rows].view(-1, seq, heads, attended.shape[-1]).copy_(attended.transpose(1, 2))
        lse[samples].copy_(sums)


def attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None,
    heads: int, kv_heads: int, scale: float, *, out: Sequence[Tensor],
) -> None:  # fmt: skip
    """out: d q, d k, d v, shaped like q, k, v."""
    seq = cos.shape[0]
    for samples in _samples(q.shape[0], seq):
        rows = slice(samples.start * seq, samples.stop * seq)
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads(dy[rows], seq, heads), _heads(q[rows], seq, heads, (cos, sin)), _heads(k[rows], seq, kv_heads, (cos, sin)),
            _heads(v[rows], seq, kv_heads), _heads(y[rows], seq, heads), lse[samples], 0.0, mask is None, attn_mask=mask, scale=scale,
        )  # fmt: skip
        for target, gradient, turned in zip(out, gradients, (True, True, False), strict=True):
            tokens = gradient.transpose(1, 2)
            if turned:
                tokens = _rotate(tokens, cos, -sin)
            target[rows].view(tokens.shape).copy_(tokens)


def _samples(tokens: int, seq: int) -> Iterator[slice]:
    """Samples per call: few enough tokens that the float32 copies stay small."""
    step = max(1, ATTENTION_TOKENS // seq)
    for start in range(0, tokens // seq, step):
        yield slice(start, min(tokens // seq, start + step))


def _heads(x: Tensor, seq: int, heads: int, tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """[n * seq, heads * D] to float32 [n, heads, seq, D], rotated where tables are given."""
    wide = x.view(-1, seq, heads, x.shape[1] // heads).float()
    return (wide if tables is None else _rotate(wide, *tables)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the half-split pairs of float32 [n, seq, heads, D] by the tables' angles."""
    turned = torch.empty(x.shape, dtype=torch.float32)
    half = cos.shape[1]
    c, s = cos[:, None, :], sin[:, None, :]
    torch.mul(x[..., :half], c, out=turned[..., :half]).addcmul_(x[..., half:], s, value=-1.0)
    torch.mul(x[..., half:], c, out=turned[..., half:]).addcmul_(x[..., :half], s)
    return turned


def gated(gate: Tensor, up: Tensor, activation: str, *, out: Sequence[Tensor]) -> None:
    """y = activation(gate) * up; all [T, F]. activation: silu or gelu_tanh."""
    (y,) = out
    for rows in _blocks(*gate.shape):
        _activation(gate[rows], activation, y[rows])
        y[rows].mul_(up[rows])


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str, *, out: Sequence[Tensor]) -> None:
    """out: d gate, d up; all [T, F]."""
    dgate, dup = out
    for rows in _blocks(*gate.shape):
        _activation(gate[rows], activation, dup[rows])
        dup[rows].mul_(dy[rows])
        product = dy[rows] * up[rows]
        if activation == "silu":
            aten.silu_backward.grad_input(product, gate[rows], grad_input=dgate[rows])
        else:
            aten.gelu_backward.grad_input(product, gate[rows], approximate="tanh", grad_input=dgate[rows])


def _activation(x: Tensor, activation: str, out: Tensor) -> None:
    if activation == "silu":
        aten.silu.out(x, out=out)
    else:
        aten.gelu.out(x, approximate="tanh", out=out)


def embed_rows(weight: Any, ids: Tensor, scale: float, *, out: Sequence[Tensor], store: Any = None) -> None:
    """Rows of the embedding for ids [T], times scale; out [T, H]. With a store, `weight` is the tensor's name in it and rows are read from disk."""
    (y,) = out
    if store is None:
        torch.index_select(weight, 0, ids.reshape(-1), out=y)
    else:
        store.gather_rows(weight, ids.reshape(-1), y)
    if scale != 1.0:
        y.mul_(scale)


def head_begin(hidden: Tensor, *, out: Sequence[Tensor]) -> None:
    """The empty state of the loss head: float32 [T, 3 + 2 H] = maximum, sum, label's logit, sum of exp * row, label's row."""
    (state,) = out
    state.zero_()
    state[:, 0].fill_(-math.inf)


def head_chunk(
    state: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, start: int, *, out: Sequence[Tensor]
) -> None:
    """Fold one vocabulary slice into the state: softmax over a streamed vocabulary, as attention streams its keys.

    hidden [T, H], weight [V, H] = rows start .. start + V of the head, labels int64 [T] or [batch, seq]. out: the new
    state, and scratch for a block of tokens that nobody reads: `head_scratch(T)` x V in the weight's type and in float32.
    As outputs they lie where the plan puts them; on the heap they would stay resident for the rest of the step. Source of
    the running rescale: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """
    new, narrow, wide = out
    width = hidden.shape[1]
    flat = labels.reshape(-1)
    for begin in range(0, hidden.shape[0], HEAD_ROWS):
        rows = slice(begin, min(hidden.shape[0], begin + HEAD_ROWS))
        count = rows.stop - rows.start
        old, fresh, scores, logits = state[rows], new[rows], narrow[:count], wide[:count]
        logits.copy_(torch.mm(hidden[rows], weight.t(), out=scores))
        index = flat[rows] - start
        inside = (index >= 0) & (index < weight.shape[0])
        index = index.clamp_(0, weight.shape[0] - 1)
        fresh[:, 2] = torch.where(inside, logits.gather(1, index[:, None])[:, 0], old[:, 2])
        torch.where(
            inside[:, None],
            weight[index].float(),
            old[:, STATE_COLUMNS + width :],
            out=fresh[:, STATE_COLUMNS + width :],
        )
        maximum = torch.maximum(old[:, 0], logits.amax(1))
        shrink = torch.exp(old[:, 0] - maximum)
        logits.sub_(maximum[:, None]).exp_()
        fresh[:, 0] = maximum
        fresh[:, 1] = torch.addcmul(logits.sum(1), old[:, 1], shrink)
        mixed = torch.mm(scores.copy_(logits), weight)
        accumulated = fresh[:, STATE_COLUMNS : STATE_COLUMNS + width]
        torch.mul(old[:, STATE_COLUMNS : STATE_COLUMNS + width], shrink[:, None], out=accumulated)
        accumulated.add_(mixed)


def head_scratch(tokens: int) -> int:
    """Rows of the scratch of `head_chunk`."""
    return min(tokens, HEAD_ROWS)


def head_finish(state: Tensor, labels: Tensor, dtype: torch.dtype, *, out: Sequence[Tensor]) -> None:
    """out: loss float32 [] (mean over labelled tokens), token losses float32 [T] (0 where unlabelled), d loss / d hidden [T, H]."""
    loss, token_losses, dhidden = out
    width = dhidden.shape[1]
    flat = labels.reshape(-1)
    labelled = flat >= 0
    count = labelled.sum().clamp_(min=1)
    token_losses.copy_(torch.where(labelled, state[:, 0] + state[:, 1].log() - state[:, 2], 0.0))
    loss.copy_(token_losses.sum() / count)
    weight = labelled.float().div_(count)
    for rows in _blocks(flat.shape[0], width):
        block = state[rows, STATE_COLUMNS : STATE_COLUMNS + width] / state[rows, 1, None]
        block.sub_(state[rows, STATE_COLUMNS + width :]).mul_(weight[rows, None])
        dhidden[rows].copy_(block)


OPERATORS: dict[str, Callable[..., None]] = {
    "tightfit.copy": copy,
    "tightfit.rms_norm": rms_norm,
    "tightfit.rms_norm_backward": rms_norm_backward,
    "tightfit.attention": attention,
    "tightfit.attention_backward": attention_backward,
    "tightfit.gated": gated,
    "tightfit.gated_backward": gated_backward,
    "tightfit.embed_rows": embed_rows,
    "tightfit.head_begin": head_begin,
    "tightfit.head_chunk": head_chunk,
    "tightfit.head_finish": head_finish,
}
