"""Rotary embedding and causal attention inside each sample, in float32 whatever the inputs' type, and their gradients.

A block of queries is multiplied with all the keys that it attends to at once. The matrices are as large as the cache
allows, softmax needs no running maximum, and most keys that are in the future of every query of the block are left out.
PyTorch's own kernel works on 32 queries and 512 keys at a time and multiplies future keys too: for 256 tokens of
bfloat16, 12 query heads of 128 columns and 2 key heads, on one Zen 5 core, it takes 4.3 ms forward and 7.2 backward;
this takes 1.9 and 4.3, and with MKL's products, which float32 tensors use, 3.3 and 8.3. Softmax is computed with powers
of two: PyTorch's `exp` is MKL's, which took 4 times as long there as its `exp2`, and 19 times for masked scores. All
copies and scores lie in a scratch tensor that the plan places.

A row may hold several samples, one after the other. A block of queries is then multiplied with the keys from about the
first that any of its samples has, and what lies before each sample is masked: rows of short samples take less than a
row of one. A row of one sample is computed as if rows of several did not exist, to the bit.

Shapes: n rows of T tokens, H query heads and K key heads of D columns each, H / K query heads to each key head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.products import blocks, onednn
from tightfit.runtime.engine.cpu.rotary import rotate

LOG2_E = math.log2(math.e)
TOKENS = 256
"""most tokens that are computed together, in whole rows (at least one)"""
QUERIES, LEAST_QUERIES = 128, 64
"""tokens of each row that make a block of queries; the smaller number where the larger makes more than `SCORES`
scores"""
SCORES = 1 << 20
"""most float32 scores for which blocks have `QUERIES` tokens"""
SHARES, LEAST_KEYS = 4, 128
"""Keys are divided into at most `SHARES` shares of at least `LEAST_KEYS`, and a block of queries is multiplied with
every share that has a key it may see. Shares keep the number of different products small: each costs some 0.3 MB of
machine code."""
FEW_KEYS = 2 * QUERIES
"""of a row of several samples, the keys that a block of queries is multiplied with if that is enough and shares are
larger: one more product
"""
HIDDEN = 1e38
"""subtracted from masked scores: softmax makes 0 of them, and the differences of such scores are finite"""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    *,
    out: Sequence[Tensor],
) -> None:
    """Rotary embedding (half-split pairs) and causal attention inside each sample.

    q [n * T, H * D], k and v [n * T, K * D]; cos, sin float32 [T, D / 2] by position; mask float32 [T, T] by places in
    a row is added to the scores instead of the causal mask. positions int64 [n, T]: of each token in its sample, which
    begins where it is 0; None: each row is one sample. out: y like q; float32 [n, H, T], the base-2 logarithms of the
    softmax's sums, which the backward needs; and scratch of the shape `attention_scratch`, an output only so that the
    plan places it. The backward rotates q and k again, so that the rotated ones need not be saved.
    """
    y, lse, scratch = out
    for step in _steps(scratch, q, (cos, sin), positions, heads, kv_heads):
        rows = step.tokens
        keys, values = step.whole(k[rows], turned=True), step.whole(v[rows])
        queries, attended = step.block(), step.block()
        scores = step.scores()
        for part in step.parts():
            queries_part = step.copied(q[rows], queries, part, turned=True).mul_(scale * LOG2_E)
            seen = step.seen(part, mask)
            weights = step.scored(queries_part, keys, scores, mask, part, seen)
            maximum = weights.amax(-1, keepdim=True)
            total = weights.sub_(maximum).exp2_().sum(-1, keepdim=True)
            result = step.of(attended, part)
            torch.bmm(weights, values[:, seen], out=result)
            step.grouped(y[rows], part).copy_(step.apart(result.div_(total)))
            sums = step.sums(lse, part)
            sums.copy_(maximum.add_(total.log2_()).view_as(sums))


def attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None,
    positions: Tensor | None, heads: int, kv_heads: int, scale: float, *, out: Sequence[Tensor],
) -> None:  # fmt: skip
    """Gradients of `attention`. dy and y are like q, lse is its second output.

    out: dq, dk, dv, shaped like q, k, v, and scratch of the shape `attention_scratch(..., backward=True)`.
    """
    dq, dk, dv, scratch = out
    seq = cos.shape[0]
    for step in _steps(scratch, q, (cos, sin), positions, heads, kv_heads):
        rows = step.tokens
        keys, values = step.whole(k[rows], turned=True), step.whole(v[rows])
        key_gradients, value_gradients = step.whole(), step.whole()
        buffers = [step.block() for _ in range(3)]
        first, second = step.scores(), step.scores()
        for part in step.parts():
            queries = step.copied(q[rows], buffers[0], part, turned=True).mul_(scale * LOG2_E)
            upstream = step.copied(dy[rows], buffers[1], part)
            result = step.copied(y[rows], buffers[2], part)
            # Softmax's backward subtracts from each row its mean weighted by the attention, which is the sum of y * dy:
            # Dao et al. 2022, "FlashAttention".
            mean = result.mul_(upstream).sum(-1, keepdim=True)
            seen = step.seen(part, mask)
            weights = step.scored(queries, keys, first, mask, part, seen)
            weights.sub_(step.sums(lse, part).reshape(mean.shape)).exp2_()
            value_gradients[:, seen].baddbmm_(weights.transpose(1, 2), upstream)
            weight = second[: weights.numel()].view(weights.shape)
            torch.bmm(upstream, values[:, seen].transpose(1, 2), out=weight)
            weight.sub_(mean).mul_(weights)
            key_gradients[:, seen].baddbmm_(weight.transpose(1, 2), queries)
            torch.bmm(weight, keys[:, seen], out=result)
            gradient = step.apart(result.mul_(scale))
            step.turn(gradient, part, back=True)
            step.grouped(dq[rows], part).copy_(gradient)
        key_gradients.mul_(1 / LOG2_E)  # they have the factor LOG2_E, which belongs to exp2 and not to the scores
        all_tokens = slice(0, seq)
        for target, gradient, turns in ((dk, key_gradients, True), (dv, value_gradients, False)):
            grouped = gradient.view(-1, kv_heads, 1, seq, gradient.shape[-1])
            if turns:
                step.turn(grouped, all_tokens, back=True)
            step.grouped(target[rows], all_tokens, kv_heads).copy_(grouped)


def attention_scratch(
    tokens: int, seq: int, heads: int, queries: int, keys: int, *, backward: bool = False
) -> tuple[int, int]:
    """Shape of the scratch of `attention`, or of its backward: float32, a row for each row of tokens that is worked on
    at a time.

    `tokens` are all rows of q, `seq` those of one row of tokens; `queries` and `keys` are the columns of q and of k.
    """
    block_tokens = _queries(seq, heads)
    whole_tensors, blocks, scores = (4, 3, 2) if backward else (2, 2, 1)
    packed_rows = seq * (queries // heads) + block_tokens * seq  # angles and masks of rows that hold several samples
    columns = (
        packed_rows + whole_tensors * seq * keys + blocks * block_tokens * queries + scores * heads * block_tokens * seq
    )
    return min(tokens // seq, _together(seq)), columns


def _together(seq: int) -> int:
    """Rows of tokens worked on at a time; few, so that their float32 copies stay small."""
    return max(1, TOKENS // seq)


def _queries(seq: int, heads: int) -> int:
    """Tokens of each row that make a block of queries."""
    fits = QUERIES * heads * seq * _together(seq) <= SCORES
    return min(seq, QUERIES if fits else LEAST_QUERIES)


def _steps(
    scratch: Tensor,
    q: Tensor,
    tables: tuple[Tensor, Tensor],
    positions: Tensor | None,
    heads: int,
    kv_heads: int,
) -> Iterator[_TokenPass]:
    """Go through the rows of tokens, a few at a time; where q is bfloat16, with oneDNN's products if they are faster
    (`onednn`).
    """
    seq = tables[0].shape[0]
    count = q.shape[0] // seq
    last_positions: list[int] = []
    if positions is not None:
        positions = positions.view(count, seq)
        last_positions = positions[:, -1].tolist()
    with onednn(q.dtype):
        for rows in blocks(count, _together(seq)):
            packed = any(position != seq - 1 for position in last_positions[rows])
            row_positions = positions[rows] if positions is not None and packed else None
            yield _TokenPass(scratch, rows, tables, row_positions, heads, kv_heads, q.shape[1] // heads)


class _TokenPass:
    """The rows of tokens of one pass: copies their tensors into the scratch, grouped by head."""

    def __init__(
        self,
        scratch: Tensor,
        samples: slice,
        tables: tuple[Tensor, Tensor],
        positions: Tensor | None,
        heads: int,
        kv_heads: int,
        width: int,
    ) -> None:
        """`positions` of the tokens of these rows; None if every row is one sample."""
        seq = tables[0].shape[0]
        self.rest = scratch.view(-1)
        self.samples = samples
        self.tokens = slice(samples.start * seq, samples.stop * seq)
        self.count, self.seq, self.width = samples.stop - samples.start, seq, width
        self.heads, self.kv_heads = heads, kv_heads
        self.rows = _queries(seq, heads)
        self.future = torch.full((self.rows, self.rows), -math.inf).triu_(1)
        self.begun: Tensor | None = None
        """place in the row at which each token's sample begins, float32 [n, T]; None: every row is one sample"""
        self.tables = tables
        """of each token, or of those of each row where rows hold several samples: [n, 1, 1, T, D / 2]"""
        if positions is not None:
            self.places = torch.arange(seq, dtype=torch.float32)
            self.begun = self.places - positions
            self.hidden = self._room(self.count * self.rows * seq)
            flat, half = positions.reshape(-1), tables[0].shape[1]
            rooms = [self._room(flat.numel() * half).view(-1, half) for _ in tables]
            for table, room in zip(tables, rooms):
                torch.index_select(table, 0, flat, out=room)
            cos, sin = (room.view(self.count, 1, 1, seq, half) for room in rooms)
            self.tables = cos, sin

    def parts(self) -> Iterator[slice]:
        """The ranges of tokens, the same in each row, that make the blocks of queries."""
        return blocks(self.seq, self.rows)

    def _room(self, elements: int) -> Tensor:
        room, self.rest = self.rest[:elements], self.rest[elements:]
        return room

    def whole(self, x: Tensor | None = None, *, turned: bool = False) -> Tensor:
        """A float32 copy [n * K, T, D] of keys or values [n * T, K * D], rotated if `turned`; zeros if `x` is None."""
        shape = self.count * self.kv_heads, self.seq, self.width
        result = self._room(math.prod(shape)).view(shape)
        if x is None:
            return result.zero_()
        grouped = result.view(self.count, self.kv_heads, 1, self.seq, self.width)
        all_tokens = slice(0, self.seq)
        grouped.copy_(self.grouped(x, all_tokens, self.kv_heads))
        if turned:
            self.turn(grouped, all_tokens)
        return result

    def block(self) -> Tensor:
        """A flat part of the scratch for a block of queries, or of tensors shaped like them."""
        return self._room(self.count * self.heads * self.rows * self.width)

    def scores(self) -> Tensor:
        """A flat part of the scratch for the scores of a block of queries."""
        return self._room(self.count * self.heads * self.rows * self.seq)

    def of(self, room: Tensor, part: slice) -> Tensor:
        """The beginning of `room` as the tensor [n * K, H / K * tokens of the part, D]."""
        rows = self.heads // self.kv_heads * (part.stop - part.start)
        shape = self.count * self.kv_heads, rows, self.width
        return room[: math.prod(shape)].view(shape)

    def apart(self, x: Tensor) -> Tensor:
        """View such a tensor as [n, K, H / K, part, D]."""
        group = self.heads // self.kv_heads
        return x.view(self.count, self.kv_heads, group, x.shape[1] // group, self.width)

    def copied(self, x: Tensor, room: Tensor, part: slice, *, turned: bool = False) -> Tensor:
        """Copy the tokens `part` of `x` [n * T, H * D] into `room`, as float32 [n * K, H / K * part, D], rotated if
        `turned`.
        """
        result = self.of(room, part)
        grouped = self.apart(result).copy_(self.grouped(x, part))
        if turned:
            self.turn(grouped, part)
        return result

    def turn(self, x: Tensor, part: slice, *, back: bool = False) -> None:
        """Rotate the tokens `part`, float32 [n, K, H / K, part, D], by the angles of their positions, in place."""
        cos, sin = (table[..., part, :] for table in self.tables)
        rotate(x, cos, -sin if back else sin)

    def grouped(self, x: Tensor, part: slice, heads: int | None = None) -> Tensor:
        """View the tokens `part` of `x` [n * T, heads * D] as [n, K, heads / K, part, D]."""
        group = (heads or self.heads) // self.kv_heads
        return x.view(self.count, self.seq, self.kv_heads, group, self.width)[:, part].permute(0, 2, 3, 1, 4)

    def sums(self, lse: Tensor, part: slice) -> Tensor:
        """View these samples' tokens `part` of `lse` [n, H, T] as [n, K, H / K, part]."""
        grouped = lse[self.samples].view(self.count, self.kv_heads, self.heads // self.kv_heads, self.seq)
        return grouped[..., part]

    def seen(self, part: slice, mask: Tensor | None) -> slice:
        """The keys that a block of queries is multiplied with.

        Of rows that are one sample each: with the causal mask the shares that the block may see (`SHARES`), else all.
        """
        step = max(LEAST_KEYS, -(-self.seq // SHARES)) if mask is None else self.seq
        if self.begun is None:
            return slice(0, min(self.seq, -(-part.stop // step) * step))
        needed = part.stop - int(self.begun[:, part.start].min())
        count = FEW_KEYS if needed <= FEW_KEYS < step else min(self.seq, -(-needed // step) * step)
        low = max(0, part.stop - count)
        return slice(low, low + count)

    def scored(
        self, queries: Tensor, keys: Tensor, room: Tensor, mask: Tensor | None, part: slice, seen: slice
    ) -> Tensor:
        """Compute masked scores [n * K, H / K * part, seen] of the keys `seen` into `room`."""
        shape = *queries.shape[:2], seen.stop - seen.start
        scores = room[: math.prod(shape)].view(shape)
        torch.bmm(queries, keys[:, seen].transpose(1, 2), out=scores)
        count = part.stop - part.start
        heads = scores.view(-1, count, shape[2])
        if mask is None:
            diagonal = slice(part.start - seen.start, part.stop - seen.start)
            heads[:, :, diagonal].add_(self.future[:count, :count])
            heads[:, :, diagonal.stop :].fill_(-math.inf)
        else:
            heads.add_(mask[part, seen], alpha=LOG2_E)
        if self.begun is not None:
            # -1 for keys that lie before the query's sample, else 0.
            hidden = self.hidden[: self.count * count * shape[2]].view(self.count, 1, count, shape[2])
            torch.sub(self.places[seen], self.begun[:, None, part, None], out=hidden).clamp_(-1.0, 0.0)
            heads.view(self.count, -1, count, shape[2]).add_(hidden, alpha=HIDDEN)
        return scores
