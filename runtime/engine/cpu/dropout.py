"""Dropout on the input of LoRA pairs (Srivastava et al. 2014): each element is kept with probability 1 - p, and divided by
that.

No mask is ever stored. An element's random bits are a function of the step, the layer, the place in the layer (`site`) and
the element's index in its matrix (`tightfit.runtime.engine.device.draws`). So a forward that runs again and the backward
make the same mask again, whatever blocks a matrix is cut into and however many threads work on it. The function is
SplitMix64's (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): word i of a stream is
mix(key + i * golden ratio). A word has 64 bits and decides about four elements; p is rounded to a multiple of 1 / 65536.

In an evaluation (`Draws.step` is None) nothing is left out. Shapes are those of `tightfit.runtime.engine.cpu.operators`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu import native_dropout
from tightfit.runtime.engine.cpu.native_dropout import GOLDEN, MIX
from tightfit.runtime.engine.cpu.products import blocks, multiply
from tightfit.runtime.engine.device.draws import Draws

ROOM_BYTES = 1 << 20
"""most bytes of the rows that are dropped out, and multiplied, at a time"""
DRAWN_ELEMENTS = 1 << 18
"""elements whose words are in memory at a time: two buffers of 512 KiB"""
CHANCES = 1 << 16
"""values of the 16 bits that decide about an element"""
LANES = 4
"""elements that one word decides about"""
UNTOLD = Draws()
"""whose numbers are drawn where no run says it: while operators are measured, and in a trace's own kernels"""


def dropout(x: Tensor, p: float, site: int, *, out: Sequence[Tensor], draws: Draws = UNTOLD) -> None:
    """y = x / (1 - p) where the mask of `site` keeps x, else 0. x, out [T, I]. It is its own backward: dx is that of dy."""
    (y,) = out
    drop = _Dropout(x, p, site, draws)
    if drop.off:
        y.copy_(x)
    else:
        drop.leave_out(x, y)
        y.mul_(drop.scale)


def dropout_lora_down(
    x: Tensor, a: Tensor, p: float, site: int, *, out: Sequence[Tensor], draws: Draws = UNTOLD
) -> None:
    """low = dropout(x) @ A.T. x [T, I], A float32 [R, I]; out [T, R]."""
    (low,) = out
    drop = _Dropout(x, p, site, draws)
    for rows in drop.blocks():
        multiply((drop.dropped(x, rows), a.t(), drop.scale), out=low[rows])


def dropout_lora_backward(
    dy: Tensor,
    x: Tensor,
    low: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    site: int,
    *,
    out: Sequence[Tensor],
    draws: Draws = UNTOLD,
) -> None:
    """out: d low [T, R], d A float32 [R, I], d B float32 [O, R] of `projection` and `dropout_lora_down`."""
    dlow, da, db = out
    multiply((dy, b, scale), out=dlow)
    drop = _Dropout(x, p, site, draws)
    for rows in drop.blocks():
        part = torch.empty_like(da) if rows.start else da
        multiply((dlow[rows].t(), drop.dropped(x, rows), 1.0), out=part)
        if rows.start:
            da.add_(part)
    da.mul_(drop.scale)
    multiply((low.t(), dy, scale), out=db.t())


def dropout_projection_backward(
    dy: Tensor,
    weight: Tensor,
    dlow: Tensor,
    a: Tensor,
    p: float,
    site: int,
    addend: Tensor | None,
    *,
    out: Sequence[Tensor],
    draws: Draws = UNTOLD,
) -> None:
    """dx = dy @ W + dropout(d low @ A) (+ addend: what other uses of x add to its gradient). out [T, I]."""
    (dx,) = out
    multiply((dy, weight, 1.0), out=dx, addend=addend)
    drop = _Dropout(dx, p, site, draws)
    for rows in drop.blocks():
        dx[rows].add_(drop.product(dlow[rows], a, rows), alpha=drop.scale)


class _Dropout:
    """The mask of one matrix [T, I], with the buffers of one operator's call.

    `leave_out`, `dropped` and `product` make zeros of what is left out; whoever uses their result multiplies by `scale`.
    """

    def __init__(self, like: Tensor, p: float, site: int, draws: Draws) -> None:
        self.tokens, self.columns = like.shape
        self.off = draws.step is None
        self.threshold = min(CHANCES - 1, round(p * CHANCES))
        self.scale = 1.0 if self.off else CHANCES / (CHANCES - self.threshold)
        # A power of two, so that all blocks of most batches are equal: oneDNN keeps code for each shape.
        most = max(1, ROOM_BYTES // max(1, self.columns * like.itemsize))
        self.rows = max(1, min(self.tokens, 1 << most.bit_length() - 1))
        """of a block"""
        if self.off:
            return
        self._key = draws.key(site)
        self._like = like
        self._native = native_dropout.leave_out(8 * like.itemsize)
        self._room: Tensor | None = None
        self._words: tuple[Tensor, Tensor] | None = None

    def blocks(self) -> Iterator[slice]:
        """Blocks of rows."""
        return blocks(self.tokens, self.rows)

    def dropped(self, x: Tensor, rows: slice) -> Tensor:
        """A block of x without what is left out; in an evaluation the block itself."""
        if self.off:
            return x[rows]
        made = self._block(rows)
        self.leave_out(x[rows], made, rows.start)
        return made

    def product(self, left: Tensor, right: Tensor, rows: slice) -> Tensor:
        """left @ right, a block of a matrix like x, without what is left out."""
        made = self._block(rows)
        multiply((left, right, 1.0), out=made)
        self.leave_out(made, made, rows.start)
        return made

    def leave_out(self, x: Tensor, out: Tensor, first: int = 0) -> None:
        """out = x, rows of the matrix from row `first` on, with zeros where elements are left out; out may be x."""
        least = self.threshold - CHANCES // 2
        if self._native is not None and x.stride(1) == out.stride(1) == 1:
            places = x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0)
            self._native(*places, x.shape[0], x.shape[1], first, self._key, least)
            return
        bits, a_row = torch.int16 if x.itemsize == 2 else torch.int32, -(-self.columns // LANES)
        step = min(self.rows, max(1, DRAWN_ELEMENTS // max(1, self.columns)))
        drawn, other = self._drawing(step * a_row)
        for rows in blocks(x.shape[0], step):
            words = drawn[: (rows.stop - rows.start) * a_row]
            draw(words, other, self._key, (first + rows.start) * a_row)
            kept = words.view(torch.int16).ge_(least)  # 1 and 0
            if bits is torch.int32:
                kept = other.view(bits)[: kept.numel()].copy_(kept)
            kept = kept.view(-1, a_row * LANES)[:, : self.columns]
            torch.mul(x[rows].view(bits), kept, out=out[rows].view(bits))

    def _drawing(self, count: int) -> tuple[Tensor, Tensor]:
        """Buffers for `count` words, and for as many again or integers as wide as the elements that they decide about."""
        if self._words is None:
            wide = count * self._like.itemsize // 2
            drawn, other = torch.empty(count + wide, dtype=torch.int64).split_with_sizes([count, wide])
            self._words = drawn, other
        return self._words

    def _block(self, rows: slice) -> Tensor:
        if self._room is None:
            self._room = self._like.new_empty((self.rows, self.columns))
        return self._room[: rows.stop - rows.start]


def draw(words: Tensor, other: Tensor, key: int, first: int) -> None:
    """Fill int64 `words` with SplitMix64's of the stream `key`, from number `first` (from 0) on.

    `other`: int64, at least as large, for intermediate results.
    """
    other = other[: words.numel()]
    torch.arange(first + 1, first + 1 + words.numel(), out=words)
    words.mul_(_signed(GOLDEN)).add_(key)
    for shift, factor in MIX:
        torch.bitwise_right_shift(words, shift, out=other)
        words.bitwise_xor_(other.bitwise_and_((1 << 64 - shift) - 1))  # PyTorch's shift repeats the sign
        if factor != 1:
            words.mul_(_signed(factor))


def _signed(bits: int) -> int:
    """64 bits as a signed integer."""
    return bits - (1 << 64) if bits >> 63 else bits
