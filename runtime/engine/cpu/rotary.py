"""Rotary embedding of positions (Su et al. 2021, "RoFormer"): its frequencies, and the rotation of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.products import blocks

TURNED_ELEMENTS = 1 << 17
"""float32 elements that are rotated at a time"""


def rotary_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """The angle by which a pair of elements is rotated per position: float32 [head_dim / 2].

    `theta` is the base of the frequencies, `scaling` a config's rope scaling, empty for none: as in transformers'
    modeling_rope_utils (linear, llama3).
    """
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (theta**steps)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        frequencies = frequencies / scaling["factor"]
    elif kind == "llama3":
        low, high, original = (
            scaling["low_freq_factor"],
            scaling["high_freq_factor"],
            scaling["original_max_position_embeddings"],
        )
        wavelength = 2 * math.pi / frequencies
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies
        far = torch.where(wavelength > original / low, frequencies / scaling["factor"], frequencies)
        middle = (wavelength <= original / low) & (wavelength >= original / high)
        frequencies = torch.where(middle, blended, far)
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the half-split pairs of float32 [n, K, H / K, t, D] by the tables' angles [t, D / 2] or [n, 1, 1, t, D / 2],
    in place.
    """
    half = cos.shape[-1]
    step = max(1, TURNED_ELEMENTS // max(1, x[..., :1, :].numel()))
    for rows in blocks(x.shape[3], step):
        first, second = x[..., rows, :half], x[..., rows, half:]
        c, s = cos[..., rows, :], sin[..., rows, :]
        original = first.clone()
        first.mul_(c).addcmul_(second, s, value=-1.0)
        second.mul_(c).addcmul_(original, s)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, heads: int, *, out: Sequence[Tensor]) -> None:
    """Turn every head of x [S, heads * D] by its token's angles. out: y [S, heads * D], which may be x itself.

    cos, sin float32 [S, D / 2], a row for each token; with positions int64, S elements, whole tables [T, D / 2] of
    which each token takes the row of its position. Computed in float32, and rounded once if y is narrower.
    """
    _turn_rows(x, cos, sin, positions, heads, out[0], back=False)


def rotary_backward(
    dy: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    heads: int,
    dtype: torch.dtype | None = None,
    *,
    out: Sequence[Tensor],
) -> None:
    """The gradient of `rotary`: dy turned back. out: dx, of type `dtype`; None: that of dy."""
    _turn_rows(dy, cos, sin, positions, heads, out[0], back=True)


def _turn_rows(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, heads: int, y: Tensor, *, back: bool
) -> None:
    step = max(1, TURNED_ELEMENTS // max(1, x.shape[1]))
    buffer = torch.empty(0 if y.dtype is torch.float32 else min(step, x.shape[0]), x.shape[1], dtype=torch.float32)
    flat = None if positions is None else positions.reshape(-1)
    for rows in blocks(x.shape[0], step):
        turned = y[rows] if y.dtype is torch.float32 else buffer[: rows.stop - rows.start]
        turned.copy_(x[rows])
        c, s = (table[rows] if flat is None else table.index_select(0, flat[rows]) for table in (cos, sin))
        rotate(turned.view(rows.stop - rows.start, heads, -1).transpose(0, 1)[None, None], c, -s if back else s)
        if turned.dtype is not y.dtype:
            y[rows].copy_(turned)
