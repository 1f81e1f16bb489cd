"""The gates of MLPs, activation(gate) * up, and the blocks in which they and other operators go through the rows of a
tensor.

A block stays in cache. Gates are multiplied in the tensors' type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.products import blocks

aten = torch.ops.aten

BLOCK_ELEMENTS = 1 << 18  # float32 elements per block: 1 MiB. With half of it gates and norms take a sixth longer.
GELU = 2 * math.sqrt(2 / math.pi)
GELU_CUBE = 0.044715 * GELU
GELU_BUFFERS = 3
CLAMPED = "clamped "


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    return blocks(rows, max(1, BLOCK_ELEMENTS // max(1, columns)))


def buffered(count: int, rows: int, columns: int) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Blocks of rows, each with `count` float32 buffers of its shape.

    All buffers are one allocation, reused by every block: buffers that are allocated and freed in turn leave holes in
    the heap, into which the next operator's buffers do not fit.
    """
    parts = list(row_blocks(rows, columns))
    buffers = torch.empty(count, parts[0].stop if parts else 0, columns, dtype=torch.float32)
    for part in parts:
        yield part, buffers[:, : part.stop - part.start].unbind()


def gated(gate: Tensor, up: Tensor, activation: str, *, out: Sequence[Tensor]) -> None:
    """y = activation(gate) * up; all [T, F]. activation: silu, gelu_tanh, or ``clamped ALPHA LIMIT``: x * sigmoid(ALPHA
    * x) of a gate of at most LIMIT, and up + 1, of up between -LIMIT and LIMIT, in the place of up (gpt-oss).
    """
    (y,) = out
    for rows, buffers in buffered(0 if activation == "silu" else GELU_BUFFERS, *gate.shape):
        if activation == "silu":
            aten.silu.out(gate[rows], out=y[rows])
        elif activation.startswith(CLAMPED):
            y[rows].copy_(_clamped(gate[rows], up[rows], activation, None, *buffers)[0])
            continue
        else:
            _gelu(gate[rows], y[rows], None, *buffers)
        y[rows].mul_(up[rows])


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str, *, out: Sequence[Tensor]) -> None:
    """out: d gate, d up; all [T, F]."""
    dgate, dup = out
    for rows, buffers in buffered(0 if activation == "silu" else GELU_BUFFERS, *gate.shape):
        torch.mul(dy[rows], up[rows], out=dgate[rows])
        if activation == "silu":
            aten.silu.out(gate[rows], out=dup[rows])
            aten.silu_backward.grad_input(dgate[rows], gate[rows], grad_input=dgate[rows])
        elif activation.startswith(CLAMPED):
            _, slope, plain = _clamped(gate[rows], up[rows], activation, dy[rows], *buffers)
            dgate[rows].copy_(slope)
            dup[rows].copy_(plain)
            continue
        else:
            _gelu(gate[rows], dup[rows], dgate[rows], *buffers)
        dup[rows].mul_(dy[rows])


def _clamped(
    gate: Tensor, up: Tensor, activation: str, dy: Tensor | None, wide: Tensor, share: Tensor, other: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(what is made, gradient of the gate, gradient of up), float32, in buffers of these sizes; without dy the first
    alone.
    """
    alpha, limit = map(float, activation.removeprefix(CLAMPED).split())
    wide.copy_(gate).clamp_(max=limit)
    torch.mul(wide, alpha, out=share).sigmoid_()
    other.copy_(up).clamp_(-limit, limit).add_(1.0)
    if dy is None:
        return wide.mul_(share).mul_(other), share, other
    slope = other.mul_(dy)  # of x * s, times dy * (up + 1), with s' = alpha * s * (1 - s)
    made = wide * share
    slope.mul_(share.addcmul_(made, 1.0 - share, value=alpha)).masked_fill_(gate > limit, 0.0)
    return made, slope, made.mul_(dy).masked_fill_(up.abs() > limit, 0.0)


def _gelu(x: Tensor, out: Tensor, gradient: Tensor | None, wide: Tensor, square: Tensor, share: Tensor) -> None:
    """out = gelu_tanh(x) = x * s, with s = sigmoid(z) = (1 + tanh(z / 2)) / 2 and z = x * (GELU + GELU_CUBE * x * x).

    `gradient`, if given, holds the gradient of out and is overwritten with that of x. PyTorch's own GELU computes a
    hyperbolic tangent, which takes four times as long as a sigmoid.
    """
    wide.copy_(x)
    torch.square(wide, out=square)
    torch.mul(square, GELU_CUBE, out=share).add_(GELU).mul_(wide).sigmoid_()
    out.copy_(wide.mul_(share))
    if gradient is not None:
        # d (x s) = s + x s (1 - s) z', with z' = GELU + 3 * GELU_CUBE * x * x.
        slope = square.mul_(3 * GELU_CUBE).add_(GELU).mul_(wide)
        slope.addcmul_(slope, share, value=-1.0).add_(share)
        gradient.copy_(slope.mul_(wide.copy_(gradient)))
