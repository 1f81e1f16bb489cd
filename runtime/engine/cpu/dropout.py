"""Dropout on the input of LoRA pairs (Srivastava et al. 2014): each element is kept with probability 1 - p, and divided
by that.

No mask is ever stored. An element's random bits are a function of the step, the layer, the place in the layer (`site`)
and the element's index in its matrix (`tightfit.runtime.engine.device.draws`). So a forward that runs again and the
backward make the same mask again, whatever blocks a matrix is cut into and however many threads work on it. The
function is SplitMix64's (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): word i of a
stream is mix(key + i * golden ratio). A word has 64 bits and decides about four elements; p is rounded to a multiple of
1 / 65536.

In an evaluation (`Draws.step` is None) nothing is left out. Shapes are those of
`tightfit.runtime.engine.cpu.operators`.
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
DEFAULT_DRAWS = Draws()
"""the draws where no run sets any: while operators are measured, and in a trace's own kernels"""


def dropout(x: Tensor, p: float, site: int, *, out: Sequence[Tensor], draws: Draws = DEFAULT_DRAWS) -> None:
    """y = x / (1 - p) where the mask of `site` keeps x, else 0. x, out [T, I]. It is its own backward: dx is that of
    dy.
    """
    (y,) = out
    drop = _DropoutMask(x, p, site, draws)
    if drop.off:
        y.copy_(x)
    else:
        drop.leave_out(x, y)
        y.mul_(drop.scale)


def dropout_lora_down(
    x: Tensor, a: Tensor, p: float, site: int, *, out: Sequence[Tensor], draws: Draws = DEFAULT_DRAWS
) -> None:
    """low = dropout(x) @ A.T. x [T, I], A float32 [R, I]; out [T, R]."""
    (low,) = out
    drop = _DropoutMask(x, p, site, draws)
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
    draws: Draws = DEFAULT_DRAWS,
) -> None:
    """out: d low [T, R], d A float32 [R, I], d B float32 [O, R] of `projection` and `dropout_lora_down`."""
    dlow, da, db = out
    multiply((dy, b, scale), out=dlow)
    drop = _DropoutMask(x, p, site, draws)
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
    draws: Draws = DEFAULT_DRAWS,
) -> None:
    """dx = dy @ W + dropout(d low @ A) (+ addend: what other uses of x add to its gradient). out [T, I]."""
    (dx,) = out
    multiply((dy, weight, 1.0), out=dx, addend=addend)
    drop = _DropoutMask(dx, p, site, draws)
    for rows in drop.blocks():
        dx[rows].add_(drop.product(dlow[rows], a, rows), alpha=drop.scale)


class _DropoutMask:
    """The mask of one matrix [T, I], with the buffers of one operator's call.

    `leave_out`, `dropped` and `product` make zeros of what is left out; whoever uses their result multiplies by
    `scale`.
    """

    def __init__(self, like: Tensor, p: float, site: int, draws: Draws) -> None:
        self.tokens, self.columns = like.shape
        self.off = draws.step is None
        self.threshold = min(CHANCES - 1, round(p * CHANCES))
        self.scale = 1.0 if self.off else CHANCES / (CHANCES - self.threshold)
        # A power of two, so that all blocks of most batches are equal: oneDNN keeps code for each shape.
        most_rows = max(1, ROOM_BYTES // max(1, self.columns * like.itemsize))
        self.rows = max(1, min(self.tokens, 1 << most_rows.bit_length() - 1))
        """rows of a block"""
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
        block = self._block(rows)
        self.leave_out(x[rows], block, rows.start)
        return block

    def product(self, left: Tensor, right: Tensor, rows: slice) -> Tensor:
        """left @ right, a block of a matrix like x, without what is left out."""
        block = self._block(rows)
        multiply((left, right, 1.0), out=block)
        self.leave_out(block, block, rows.start)
        return block

    def leave_out(self, x: Tensor, out: Tensor, first: int = 0) -> None:
        """out = x, rows of the matrix from row `first` on, with zeros where elements are left out; out may be x."""
        least = self.threshold - CHANCES // 2
        if self._native is not None and x.stride(1) == out.stride(1) == 1:
            addresses = x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0)
            self._native(*addresses, x.shape[0], x.shape[1], first, self._key, least)
            return
        bits, words_per_row = torch.int16 if x.itemsize == 2 else torch.int32, -(-self.columns // LANES)
        step = min(self.rows, max(1, DRAWN_ELEMENTS // max(1, self.columns)))
        word_buffer, work_buffer = self._drawing(step * words_per_row)
        for rows in blocks(x.shape[0], step):
            words = word_buffer[: (rows.stop - rows.start) * words_per_row]
            draw(words, work_buffer, self._key, (first + rows.start) * words_per_row)
            mask = words.view(torch.int16).ge_(least)  # 1 and 0
            if bits is torch.int32:
                mask = work_buffer.view(bits)[: mask.numel()].copy_(mask)
            mask = mask.view(-1, words_per_row * LANES)[:, : self.columns]
            torch.mul(x[rows].view(bits), mask, out=out[rows].view(bits))

    def _drawing(self, count: int) -> tuple[Tensor, Tensor]:
        """Buffers for `count` words, and for as many again or integers as wide as the elements that they decide
        about.
        """
        if self._words is None:
            work_count = count * self._like.itemsize // 2
            word_buffer, work_buffer = torch.empty(count + work_count, dtype=torch.int64).split_with_sizes(
                [count, work_count]
            )
            self._words = word_buffer, work_buffer
        return self._words

    def _block(self, rows: slice) -> Tensor:
        if self._room is None:
            self._room = self._like.new_empty((self.rows, self.columns))
        return self._room[: rows.stop - rows.start]


def draw(words: Tensor, work: Tensor, key: int, first: int) -> None:
    """Fill int64 `words` with SplitMix64's of the stream `key`, from number `first` (from 0) on.

    `work`: int64, at least as large, for intermediate results.
    """
    work = work[: words.numel()]
    torch.arange(first + 1, first + 1 + words.numel(), out=words)
    words.mul_(_signed(GOLDEN)).add_(key)
    for shift, factor in MIX:
        torch.bitwise_right_shift(words, shift, out=work)
        words.bitwise_xor_(work.bitwise_and_((1 << 64 - shift) - 1))  # PyTorch's shift repeats the sign
        if factor != 1:
            words.mul_(_signed(factor))


def _signed(bits: int) -> int:
    """64 bits as a signed integer."""
    return bits - (1 << 64) if bits >> 63 else bits
