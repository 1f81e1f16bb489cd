"""Reads rows of the quantised matrices that `tightfit.profiles.sources.quantised` has found: in the store's form, or
unpacked where it has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tightfit.profiles.sources.quantised import (
    FourBitLayout,
    Int8Layout,
    Load,
    QuantisedMatrix,
    ZeroPointLayout,
)
from tightfit.runtime.common.errors import InputError

NIBBLES = torch.arange(0, 32, 4, dtype=torch.int32)
AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
"""Columns of eight that AWQ packs into the nibbles of an int32, lowest nibble first."""
COLUMN_OF_AWQ = torch.argsort(AWQ_ORDER)


def row_reader(matrix: QuantisedMatrix, load: Load) -> Callable[[int, int], Tensor]:
    """Reads rows of a matrix, as in `tightfit.profiles.weights.source.SourceTensor`; `load` gives the tensors of its
    file.
    """
    layout = matrix.layout
    if isinstance(layout, FourBitLayout):
        return _four_bit(matrix, layout, load)
    return _int8(matrix, layout, load) if isinstance(layout, Int8Layout) else _zero_points(matrix, layout, load)


def _four_bit(matrix: QuantisedMatrix, layout: FourBitLayout, load: Load) -> Callable[[int, int], Tensor]:
    name, columns = matrix.entry.name, matrix.entry.columns
    group = math.gcd(columns, layout.block)
    table = load(f"{name}.quant_map").whole().float().view(-1)
    cache: dict[str, Tensor] = {}

    def scales() -> Tensor:
        """Float32 scale of every block."""
        absmax = load(f"{name}.absmax").whole().view(-1)
        if layout.nested:
            codes, outer = (load(f"{name}.nested_{part}").whole().float().view(-1) for part in ("quant_map", "absmax"))
            outer_scales = outer.repeat_interleave(layout.nested_block)[: len(absmax)]
            return codes[absmax.int()] * outer_scales + torch.tensor(layout.mean)
        return absmax.float()

    def rows(start: int, stop: int) -> Tensor:
        if not cache:
            cache["scales"] = scales()
        first, last = start * columns // 2, -(-stop * columns // 2)
        packed = load(name).rows(first, last).reshape(-1)
        codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)  # the first of two is the high nibble
        codes = codes[start * columns - 2 * first :][: (stop - start) * columns].view(-1, group)
        blocks = torch.arange(start * columns // group, stop * columns // group) * group // layout.block
        scale = cache["scales"][blocks].view(-1, 1)
        if not matrix.packable:
            return (table[codes.int()] * scale).view(stop - start, columns)
        nibbles = codes[:, 0::2] | codes[:, 1::2] << 4
        return torch.cat([nibbles, scale.view(torch.uint8)], dim=1).view(stop - start, -1)

    return rows


def _int8(matrix: QuantisedMatrix, layout: Int8Layout, load: Load) -> Callable[[int, int], Tensor]:
    name, columns = matrix.entry.name, matrix.entry.columns

    def rows(start: int, stop: int) -> Tensor:
        codes = load(name).rows(start, stop).reshape(-1, columns)
        scale = load(layout.scales).whole().float().view(-1, 1)[start:stop].contiguous()
        return torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], dim=1)

    return rows


def _zero_points(matrix: QuantisedMatrix, layout: ZeroPointLayout, load: Load) -> Callable[[int, int], Tensor]:
    method, parts, group = layout.method, layout.parts, layout.group
    inputs = matrix.entry.columns
    order = load(parts["g_idx"]).whole().view(-1).long() if "g_idx" in parts else torch.arange(inputs) // group

    def rows(start: int, stop: int) -> Tensor:
        first, last = start // 8, -(-stop // 8)  # words that hold eight columns each
        wanted_rows = slice(start - 8 * first, stop - 8 * first)
        zeros = _columns(load(parts["qzeros"]).columns(first, last), method)[:, wanted_rows].T + layout.offset
        scales = load(parts["scales"]).columns(start, stop).T
        if method == "gptq":
            words = load(parts["qweight"]).columns(start, stop)
            codes = (words.unsqueeze(1) >> NIBBLES.view(1, 8, 1) & 15).reshape(inputs, -1).T
        else:
            codes = _columns(load(parts["qweight"]).columns(first, last), method)[:, wanted_rows].T
        if not matrix.packable:
            return (codes - zeros[:, order]).float() * scales.float()[:, order]
        half_scales = scales.half()
        if not torch.equal(half_scales.float(), scales.float()):
            raise InputError(
                f"tensor {parts['scales']!r} holds scales that are no float16 numbers; use the model's 16-bit weights"
            )
        pairs = codes.to(torch.uint8).reshape(-1, group)
        scale = half_scales.reshape(-1).contiguous().view(torch.uint8).view(-1, 2)
        zero = zeros.to(torch.uint8).reshape(-1, 1)
        return torch.cat([pairs[:, 0::2] | pairs[:, 1::2] << 4, scale, zero], dim=1).view(stop - start, -1)

    return rows


def _columns(words: Tensor, method: str) -> Tensor:
    """Nibbles of int32 [n, m] that hold eight columns each, in the columns' order: int32 [n, 8 * m]."""
    nibbles = words.unsqueeze(2) >> NIBBLES & 15
    return (nibbles if method == "gptq" else nibbles[:, :, COLUMN_OF_AWQ]).reshape(len(words), -1)
