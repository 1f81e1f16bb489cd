"""Rotary embedding of positions (Su et al. 2021, "RoFormer"): its frequencies, and the rotation of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    """Turn the half-split pairs of float32 [n, K, H / K, t, D] by the tables' angles [t, D / 2] or [n, 1, 1, t, D / 2], in
    place.
    """
    half = cos.shape[-1]
    step = max(1, TURNED_ELEMENTS // max(1, x[..., :1, :].numel()))
    for rows in blocks(x.shape[3], step):
        first, second = x[..., rows, :half], x[..., rows, half:]
        c, s = cos[..., rows, :], sin[..., rows, :]
        original = first.clone()
        first.mul_(c).addcmul_(second, s, value=-1.0)
        second.mul_(c).addcmul_(original, s)
