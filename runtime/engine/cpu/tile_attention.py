"""Causal attention of one tile of a long row: its queries attend to the keys of this tile and of those before it.

The keys and values of each tile are tensors of their own, which the plan places and moves one by one. A block of
queries goes through the keys a piece at a time, always in the order of the row, with a running maximum and sum of
softmax (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention").
So the scratch depends neither on how many tiles there are nor on how long they are. As in
`tightfit.runtime.engine.cpu.attention`, arithmetic is in float32 and softmax is computed with powers of two.

What a query does not see lies before the first key that it sees: of its sample, where several share the row, or of a
sliding window. Pieces that no query of a block sees are left out.

Shapes: a tile of S tokens, H query heads and K key heads of D columns each, H / K query heads to each key head; tile j
has keys [S_j, K * D], and the last tile of a list is that of the queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.attention import HIDDEN, LEAST_KEYS, LEAST_QUERIES, LOG2_E, QUERIES, SCORES
from tightfit.runtime.engine.cpu.products import blocks, onednn

KEYS = 4 * LEAST_KEYS
"""most keys of a piece, which begins at a multiple of `LEAST_KEYS` in its tile; so there are few different products"""
LOWEST = -3e38
"""maximum of no scores: below what masking makes of a score, and its difference from any maximum is finite"""


def tile_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    positions: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    *,
    out: Sequence[Tensor],
) -> None:
    """Attention of a tile's queries to the keys of all tiles so far, inside each sample.

    q [S, H * D] and keys[j] [S_j, K * D] are rotated; values[j] like keys[j]. positions int64, S elements: of each
    query in its sample, which begins where it is 0; None: the row is one sample. With a `window` above 0 a query sees
    that many keys at most: its own and those just before it. out: y like q; float32 [H, S], the base-2 logarithms of
    the softmax's sums, which the backward needs; and scratch of `tile_attention_scratch` elements, an output only so
    that the plan places it.
    """
    y, lse, scratch = out
    tile = _Tile(scratch, q, keys, positions, heads, kv_heads, window)
    key_room, value_room, query_room, result_room = tile.piece(), tile.piece(), tile.block(), tile.block()
    score_room = tile.scores()
    with onednn(q.dtype):
        for part in tile.parts():
            queries = tile.copied(q, query_room, part).mul_(scale * LOG2_E)
            attended = tile.of(result_room, part).zero_()
            maximum = attended.new_full((*attended.shape[:2], 1), LOWEST)
            total = torch.zeros_like(maximum)
            for piece in tile.pieces(part):
                weights = tile.scored(queries, tile.wide(keys, piece, key_room), score_room, part, piece)
                raised = torch.maximum(maximum, weights.amax(-1, keepdim=True))
                shrink = maximum.sub_(raised).exp2_()
                total.mul_(shrink).add_(weights.sub_(raised).exp2_().sum(-1, keepdim=True))
                attended.mul_(shrink).baddbmm_(weights, tile.wide(values, piece, value_room))
                maximum = raised
            tile.grouped(y, part).copy_(tile.apart(attended.div_(total)))
            tile.sums(lse, part).copy_(tile.apart(maximum.add_(total.log2_())).squeeze(-1))


def tile_attention_backward(
    dy: Tensor, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], y: Tensor, lse: Tensor,
    positions: Tensor | None, key_sums: Sequence[Tensor] | None, value_sums: Sequence[Tensor] | None, heads: int,
    kv_heads: int, scale: float, window: int, *, out: Sequence[Tensor],
) -> None:  # fmt: skip
    """Gradients of `tile_attention`, added to what later tiles have contributed to those of the keys and values.

    dy and y are like q, lse is the second output. key_sums[j] and value_sums[j] float32 [S_j, K * D]: the sums so far;
    None for the last tile of the row, whose backward is the first. out: dq like q; the new sums, float32, of all keys
    and then of all values; and scratch of `tile_attention_scratch(..., backward=True)` elements. A new sum may have the
    place of the old one.
    """
    dq, *sums, scratch = out
    for new, old in zip(sums, _known(key_sums, value_sums, len(sums)), strict=True):
        if old is None:
            new.zero_()
        elif new.data_ptr() != old.data_ptr():
            new.copy_(old)
    key_gradients, value_gradients = sums[: len(keys)], sums[len(keys) :]
    tile = _Tile(scratch, q, keys, positions, heads, kv_heads, window)
    key_room, value_room = tile.piece(), tile.piece()
    buffers = [tile.block() for _ in range(3)]
    first, second = tile.scores(), tile.scores()
    with onednn(q.dtype):
        for part in tile.parts():
            queries = tile.copied(q, buffers[0], part).mul_(scale * LOG2_E)
            upstream = tile.copied(dy, buffers[1], part)
            gradient = tile.copied(y, buffers[2], part)
            # The mean that softmax's backward subtracts from each row: see `attention_backward`.
            mean = gradient.mul_(upstream).sum(-1, keepdim=True)
            logarithms = tile.sums(lse, part).reshape(mean.shape)
            gradient.zero_()
            for piece in tile.pieces(part):
                piece_keys, piece_values = tile.wide(keys, piece, key_room), tile.wide(values, piece, value_room)
                weights = tile.scored(queries, piece_keys, first, part, piece).sub_(logarithms).exp2_()
                tile.add_product(value_gradients, piece, weights, upstream, 1.0)
                weight = second[: weights.numel()].view(weights.shape)
                torch.bmm(upstream, piece_values.transpose(1, 2), out=weight)
                weight.sub_(mean).mul_(weights)
                # The factor LOG2_E of `queries` belongs to exp2 and not to the scores.
                tile.add_product(key_gradients, piece, weight, queries, 1 / LOG2_E)
                gradient.baddbmm_(weight, piece_keys)
            tile.grouped(dq, part).copy_(tile.apart(gradient.mul_(scale)))


def tile_attention_scratch(
    tile: int, longest: int, heads: int, queries: int, keys: int, *, backward: bool = False
) -> int:
    """Elements of the scratch, float32, of `tile_attention`, or of its backward.

    `tile` are the rows of q, `longest` the most of any key tile; `queries` and `keys` are the columns of q and of keys.
    """
    block, piece = _queries(tile, longest, heads), min(KEYS, longest)
    count_of_blocks, scores = (3, 2) if backward else (2, 1)
    return 2 * piece * keys + count_of_blocks * block * queries + (scores * heads + 1) * block * piece


def _queries(tile: int, longest: int, heads: int) -> int:
    """Tokens that make a block of queries."""
    return min(tile, QUERIES if QUERIES * heads * min(KEYS, longest) <= SCORES else LEAST_QUERIES)


def _known(
    key_sums: Sequence[Tensor] | None, value_sums: Sequence[Tensor] | None, count: int
) -> Sequence[Tensor | None]:
    return [None] * count if key_sums is None or value_sums is None else [*key_sums, *value_sums]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Keys of one tile that a block of queries is multiplied with at once."""

    tile: int
    rows: slice
    place: int
    """of the first of them in the row"""
    last: bool
    """whether it is of the queries' own tile, which has keys that lie ahead of some queries"""


class _Tile:
    """One tile's queries and the pieces of keys that they attend to; copies them into the scratch, grouped by head."""

    def __init__(
        self,
        scratch: Tensor,
        q: Tensor,
        keys: Sequence[Tensor],
        positions: Tensor | None,
        heads: int,
        kv_heads: int,
        window: int,
    ) -> None:
        self.rest = scratch.view(-1)
        self.heads, self.kv_heads, self.width = heads, kv_heads, q.shape[1] // heads
        self.count = q.shape[0]
        self.lengths = [tensor.shape[0] for tensor in keys]
        longest = max(self.lengths)
        self.rows, self.keys = _queries(self.count, longest, heads), min(KEYS, longest)
        self.future = torch.full((self.rows, self.rows), -math.inf).triu_(1)
        self.places = torch.arange(self.keys, dtype=torch.float32)
        self.hidden = self._room(self.rows * self.keys)
        start = sum(self.lengths) - self.count
        own = torch.arange(start, start + self.count, dtype=torch.float32)
        self.first_seen: Tensor | None = None
        """place in the row of the first key that each query sees, float32 [S]; None: that is the row's first"""
        if positions is not None:
            self.first_seen = own - positions.reshape(-1)
        if window:
            windows = own - (window - 1)
            self.first_seen = windows if self.first_seen is None else torch.maximum(self.first_seen, windows)

    def parts(self) -> Iterator[slice]:
        """The ranges of tokens that make the blocks of queries."""
        return blocks(self.count, self.rows)

    def pieces(self, part: slice) -> Iterator[_Piece]:
        """The pieces of which some query of the block sees a key, in the order of the row."""
        low = 0 if self.first_seen is None else int(self.first_seen[part].min())
        start = 0
        for tile, length in enumerate(self.lengths):
            last = tile == len(self.lengths) - 1
            begin = max(0, low - start) // LEAST_KEYS * LEAST_KEYS
            end = min(length, -(-part.stop // LEAST_KEYS) * LEAST_KEYS) if last else length
            if low - start < end:
                for first in range(begin, end, self.keys):
                    yield _Piece(tile, slice(first, min(end, first + self.keys)), start + first, last)
            start += length

    def _room(self, elements: int) -> Tensor:
        room, self.rest = self.rest[:elements], self.rest[elements:]
        return room

    def piece(self) -> Tensor:
        """A flat part of the scratch for a piece of keys or values."""
        return self._room(self.kv_heads * self.keys * self.width)

    def block(self) -> Tensor:
        """A flat part of the scratch for a block of queries, or of tensors shaped like them."""
        return self._room(self.heads * self.rows * self.width)

    def scores(self) -> Tensor:
        """A flat part of the scratch for the scores of a block of queries with a piece of keys."""
        return self._room(self.heads * self.rows * self.keys)

    def wide(self, tensors: Sequence[Tensor], piece: _Piece, room: Tensor) -> Tensor:
        """A float32 copy [K, piece, D] of a piece of keys or values."""
        narrow = tensors[piece.tile][piece.rows]
        shape = self.kv_heads, narrow.shape[0], self.width
        return room[: math.prod(shape)].view(shape).copy_(narrow.view(-1, self.kv_heads, self.width).transpose(0, 1))

    def of(self, room: Tensor, part: slice) -> Tensor:
        """The beginning of `room` as the tensor [K, H / K * tokens of the part, D]."""
        shape = self.kv_heads, self.heads // self.kv_heads * (part.stop - part.start), self.width
        return room[: math.prod(shape)].view(shape)

    def apart(self, x: Tensor) -> Tensor:
        """View such a tensor, or one with other columns, as [K, H / K, part, columns]."""
        group = self.heads // self.kv_heads
        return x.view(self.kv_heads, group, x.shape[1] // group, x.shape[2])

    def copied(self, x: Tensor, room: Tensor, part: slice) -> Tensor:
        """Copy the tokens `part` of `x` [S, H * D] into `room`, as float32 [K, H / K * part, D]."""
        result = self.of(room, part)
        self.apart(result).copy_(self.grouped(x, part))
        return result

    def grouped(self, x: Tensor, part: slice) -> Tensor:
        """View the tokens `part` of `x` [S, H * D] as [K, H / K, part, D]."""
        return x[part].view(-1, self.kv_heads, self.heads // self.kv_heads, self.width).permute(1, 2, 0, 3)

    def sums(self, lse: Tensor, part: slice) -> Tensor:
        """View the tokens `part` of `lse` [H, S] as [K, H / K, part]."""
        return lse.view(self.kv_heads, self.heads // self.kv_heads, self.count)[..., part]

    def scored(self, queries: Tensor, keys: Tensor, room: Tensor, part: slice, piece: _Piece) -> Tensor:
        """Compute masked scores [K, H / K * part, piece] into `room`."""
        count, width = part.stop - part.start, keys.shape[1]
        shape = *queries.shape[:2], width
        scores = room[: math.prod(shape)].view(shape)
        torch.bmm(queries, keys.transpose(1, 2), out=scores)
        by_head = scores.view(-1, count, width)
        if piece.last and piece.rows.stop > part.start:
            # A piece begins before the block or with it, and ends with it or behind it: both go by `LEAST_KEYS`.
            diagonal = slice(part.start - piece.rows.start, part.stop - piece.rows.start)
            by_head[:, :, diagonal].add_(self.future[:count, :count])
            by_head[:, :, diagonal.stop :].fill_(-math.inf)
        if self.first_seen is not None and float(self.first_seen[part].max()) > piece.place:
            # -1 for keys that lie before the first that a query sees, else 0.
            hidden = self.hidden[: count * width].view(count, width)
            torch.sub(self.places[:width], self.first_seen[part, None] - piece.place, out=hidden).clamp_(-1.0, 0.0)
            by_head.add_(hidden, alpha=HIDDEN)
        return scores

    def add_product(self, sums: Sequence[Tensor], piece: _Piece, weights: Tensor, right: Tensor, factor: float) -> None:
        """Add factor * weights.T @ right, of all query heads of a key head, to the piece's rows [S_j, K * D] of the
        sums.
        """
        target = sums[piece.tile][piece.rows]
        for head in range(self.kv_heads):
            columns = slice(head * self.width, (head + 1) * self.width)
            target[:, columns].addmm_(weights[head].t(), right[head], alpha=factor)
