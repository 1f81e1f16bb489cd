"""Attention of a few new tokens to the keys and values of all tokens so far, which a cache holds.

Computed in float32 whatever the type of the cache. Which products are made depends on the positions of the queries
alone, so that an answer is the same, to the bit, however many tokens of a prompt are worked on in one pass.

Shapes: t new tokens, n keys seen by the last of them, H query heads and K key heads of D columns each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.attention import LOG2_E
from tightfit.runtime.engine.cpu.cached_attention_sizes import queries_together
from tightfit.runtime.engine.cpu.products import blocks
from tightfit.runtime.engine.cpu.rotary import rotate


def cache_tokens(k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, out: Sequence[Tensor]) -> None:
    """Put the keys, rotated, and the values of new tokens into their places in the cache.

    k, v float32 [t, K * D]; cos, sin float32 [t, D / 2] of the tokens' positions; out: keys and values [K, t, D], and
    scratch of `cache_scratch` elements.
    """
    keys, values, scratch = out
    heads, count, width = keys.shape
    rotated = scratch.view(-1)[: k.numel()].view(heads, count, width)
    rotated.copy_(k.view(count, heads, width).transpose(0, 1))
    rotate(rotated.view(heads, 1, 1, count, width), cos, sin)
    keys.copy_(rotated)
    values.copy_(v.view(count, heads, width).transpose(0, 1))


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    window: int | None,
    before: int,
    scale: float,
    *,
    out: Sequence[Tensor],
) -> None:
    """Rotary embedding of the queries, and their causal attention to the cache.

    q float32 [t, H * D]; keys, values [K, n, D], of which the last t are those of the queries' own tokens; cos, sin
    float32 [t, D / 2]. With a `window` a token attends to itself and to `window` - 1 tokens before it; `before` counts
    the tokens that came before those in `keys`, which no query may see. out: y like q, and scratch of
    `attention_cache_scratch` elements.
    """
    y, scratch = out
    count, seen = q.shape[0], keys.shape[1]
    heads, width = keys.shape[0], keys.shape[2]
    group = q.shape[1] // (heads * width)
    queries = q.view(count, heads, group, width).permute(1, 2, 0, 3)
    answers = y.view(count, heads, group, width).permute(1, 2, 0, 3)
    for part in blocks(count, queries_together(heads * group, before + seen)):
        size = part.stop - part.start
        end = seen - count + part.stop
        first = 0 if window is None else max(0, end - size - window + 1)
        rest = scratch.view(-1)
        part_queries, rest = _room(rest, heads, group * size, width)
        result, rest = _room(rest, heads, group * size, width)
        scores, rest = _room(rest, heads, group * size, end - first)
        grouped = part_queries.view(heads, group, size, width)
        grouped.copy_(queries[:, :, part])
        rotate(grouped[None], cos[part], sin[part])
        part_queries.mul_(scale * LOG2_E)
        wide, _ = _wide(keys[:, first:end], rest)
        torch.bmm(part_queries, wide.transpose(1, 2), out=scores)
        if size > 1:
            _hide(scores.view(heads * group, size, end - first), window)
        maximum = scores.amax(-1, keepdim=True)
        total = scores.sub_(maximum).exp2_().sum(-1, keepdim=True)
        wide, _ = _wide(values[:, first:end], rest)
        torch.bmm(scores, wide, out=result)
        answers[:, :, part].copy_(result.div_(total).view(heads, group, size, width))


def _room(scratch: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    size = math.prod(shape)
    return scratch[:size].view(shape), scratch[size:]


def _wide(x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """`x` in float32: itself, or a copy in the scratch."""
    if x.dtype is torch.float32:
        return x, scratch
    room, rest = _room(scratch, *x.shape)
    return room.copy_(x), rest


def _hide(scores: Tensor, window: int | None) -> None:
    """Hide from each of the last tokens, of which `scores` [heads, t, n] are, the keys after it and before its
    window.
    """
    size, seen = scores.shape[1:]
    last = torch.full((size, size), -math.inf).triu_(1)
    scores[:, :, seen - size :].add_(last)
    if window is not None:
        # The query of row i, at place n - t + i, sees places from n - t + i - window + 1 on: of the first t places some
        # are hidden, since the keys begin with the first one that row 0 sees.
        places = torch.arange(min(size, seen))
        first_seen = torch.arange(size) + (seen - size - window + 1)
        hidden = places[None, :] < first_seen[:, None]
        scores[:, :, : len(places)].masked_fill_(hidden, -math.inf)
