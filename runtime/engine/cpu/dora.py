"""The operators of DoRA on the CPU: a projection whose rows have trained lengths, y = m * (W + s B A) x / ||W + s B
A||.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation"; as there (section 4.3), the norm of each row is
a constant to the gradient. The product z = (W + s B A) x is that of a LoRA pair
(`tightfit.runtime.engine.cpu.operators`).

The norm is taken of W + s B A itself, a block of rows at a time. Its square is also ||W||² + 2 s W·(B A) + s² ||B A||²,
which would need no row of B A; but rows of W have to be widened to float32 for either, multiplying them by A takes as
many operations as adding s B A to them, and where s B A nearly cancels W, that sum loses all digits.

The last output of each operator is scratch, float32, for a block of rows: an output so that the plan places it, as for
`tightfit.head_chunk`. The block has as many rows as the scratch.

Shapes: T = batch * seq flat tokens, I and O = inputs and outputs of a projection, R = rank of its pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.products import blocks

aten = torch.ops.aten

BLOCK_ELEMENTS = 1 << 18  # float32 elements of a block: 1 MiB. With half of it they take a tenth longer or more.


def norm_scratch(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scratch of `dora_norm` for a weight [rows, columns]."""
    return min(rows, max(1, BLOCK_ELEMENTS // max(1, columns))), columns


def scale_scratch(rows: int, columns: int, dtype: torch.dtype, *, backward: bool) -> tuple[int, int, int]:
    """Shape of the scratch of `dora_scale` or its backward for a product [rows, columns]: one element where nothing has
    to be widened.
    """
    return (1, 1, 1) if dtype is torch.float32 else (1 + backward, *norm_scratch(rows, columns))


def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float, *, out: Sequence[Tensor]) -> None:
    """The length of each row of W + scale * B @ A. weight [O, I], A float32 [R, I], B float32 [O, R].

    out: lengths float32 [O], and scratch float32 [`norm_scratch`].
    """
    norm, scratch = out
    for rows in blocks(weight.shape[0], scratch.shape[0]):
        wide = scratch[: rows.stop - rows.start].copy_(weight[rows])
        aten.linalg_vector_norm.out(wide.addmm_(b[rows], a, alpha=scale), 2, [1], out=norm[rows])


def dora_scale(z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, *, out: Sequence[Tensor]) -> None:
    """y = z * magnitude / norm (+ bias), rounded once. z [T, O]; magnitude, norm and bias float32 [O].

    out: y [T, O], and scratch float32 [`scale_scratch`].
    """
    y, scratch = out
    scale = magnitude / norm
    if z.dtype is torch.float32:
        torch.mul(z, scale, out=y)
        if bias is not None:
            y.add_(bias)
        return
    for rows in blocks(z.shape[0], scratch.shape[1]):
        wide = scratch[0, : rows.stop - rows.start].copy_(z[rows]).mul_(scale)
        y[rows].copy_(wide if bias is None else wide.add_(bias))


def dora_scale_backward(dy: Tensor, z: Tensor, magnitude: Tensor, norm: Tensor, *, out: Sequence[Tensor]) -> None:
    """out: dz [T, O] = dy * magnitude / norm; d magnitude float32 [O], the sum over tokens of dy * z, divided by norm;
    scratch float32 [`scale_scratch`].
    """
    dz, dmagnitude, scratch = out
    scale = magnitude / norm
    if z.dtype is torch.float32:
        torch.sum(torch.mul(dy, z, out=dz), 0, out=dmagnitude)  # dz is not needed yet
        torch.mul(dy, scale, out=dz)
    else:
        dmagnitude.zero_()
        for rows in blocks(z.shape[0], scratch.shape[1]):
            wide, product = scratch[:, : rows.stop - rows.start].unbind()
            wide.copy_(dy[rows])
            dmagnitude.add_(product.copy_(z[rows]).mul_(wide).sum(0))
            dz[rows].copy_(wide.mul_(scale))
    dmagnitude.div_(norm)
