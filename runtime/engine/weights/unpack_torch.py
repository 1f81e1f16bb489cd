"""Unpacks the formats that keep other tools' codes, where `tightfit.runtime.engine.weights.native` has no compiled
function: with PyTorch, a few groups at a time. Values are computed in float32 and rounded once to the output type.

The layouts of K-quants are those of llama.cpp's ggml-quants.c (dequantize_row_q2_K and its like).

Imported by the budgeted process when such a format is first met there: torch and the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tightfit.runtime.engine.weights.layout import INT8_STEP, MXFP4, NF4, Entry, group_bytes

AT_ONCE = 1 << 14
"""Elements unpacked at a time, whose intermediate results take up to 14 bytes each."""


def unpack_groups(entry: Entry, packed: Tensor, out: Tensor) -> None:
    """Unpack whole rows as `tightfit.runtime.engine.weights.store.unpack` does."""
    values = _VALUES[entry.format]
    groups = packed.view(-1, group_bytes(entry.format, entry.group))
    at_once = max(1, AT_ONCE // entry.group)
    for source, target in zip(groups.split(at_once), out.view(-1, entry.group).split(at_once), strict=True):
        target.copy_(values(source).view(target.shape))


def _number(groups: Tensor, offset: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """The number at byte `offset` of every group, float32 [groups, 1]."""
    return groups[:, offset : offset + dtype.itemsize].clone(memory_format=torch.contiguous_format).view(dtype).float()


def _nibbles(groups: Tensor, size: int) -> Tensor:
    """The nibbles in the first `size` bytes, element 2j low and 2j + 1 high: uint8 [groups, 2 * size]."""
    part = groups[:, :size]
    return torch.stack([part & 15, part >> 4], dim=2).view(len(groups), -1)


def _q4_zero(groups: Tensor) -> Tensor:
    size = groups.shape[1] - 3
    scale, zero = _number(groups, size), groups[:, size + 2 :].float()
    return (_nibbles(groups, size).float() - zero) * scale


def _nf4(groups: Tensor) -> Tensor:
    size = groups.shape[1] - 4
    table = torch.tensor(NF4, dtype=torch.float32)
    return table[_nibbles(groups, size).int()] * _number(groups, size, torch.float32)


def _int8(groups: Tensor) -> Tensor:
    codes = groups[:, 4:].view(torch.int8).float()
    return codes.mul_(_number(groups, 0, torch.float32)).mul_(torch.tensor(INT8_STEP, dtype=torch.float32))


def _fifth(bits: Tensor) -> Tensor:
    """Bit e of uint8 [groups, 4] for e in 0..31, in the place of a code's fifth bit: uint8 [groups, 32]."""
    return ((bits.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)) & 1).view(len(bits), 32) << 4


def _q5(groups: Tensor, offset: int) -> Tensor:
    """Codes of a block of q5_0 or q5_1, whose high bits begin at byte `offset`: float32 [groups, 32]."""
    part = groups[:, offset + 4 :]
    return (torch.cat([part & 15, part >> 4], dim=1) | _fifth(groups[:, offset : offset + 4])).float()


def _q5_0(groups: Tensor) -> Tensor:
    return (_q5(groups, 2) - 16) * _number(groups, 0)


def _q5_1(groups: Tensor) -> Tensor:
    return _q5(groups, 4) * _number(groups, 0) + _number(groups, 2)


def _scaled(codes: Tensor, scales: Tensor, least: Tensor | None = None) -> Tensor:
    """codes [groups, 256] times scales [groups, runs], each for a run of elements, less `least` [groups, runs]."""
    values = codes.float().view(*scales.shape, -1).mul_(scales.unsqueeze(2))
    return values if least is None else values.sub_(least.unsqueeze(2))


def _pairs(part: Tensor) -> Tensor:
    """Two bits from each place of bytes [groups, 64], by halves, places and bytes: uint8 [groups, 2, 4, 32]."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    return (part.reshape(-1, 2, 1, 32) >> shifts) & 3


def _q2_k(groups: Tensor) -> Tensor:
    scales = groups[:, :16]
    codes = _pairs(groups[:, 16:80]).reshape(-1, 256)
    return _scaled(codes, _number(groups, 80) * (scales & 15).float(), _number(groups, 82) * (scales >> 4).float())


def _q3_k(groups: Tensor) -> Tensor:
    high = (groups[:, None, :32] >> torch.arange(8, dtype=torch.uint8).view(1, 8, 1)) & 1
    codes = (_pairs(groups[:, 32:96]).reshape(-1, 8, 32) | high << 2).view(-1, 256).to(torch.int8) - 4
    low, top = groups[:, 96:104], groups[:, 104:108]
    scales = torch.cat([low & 15, low >> 4], dim=1)
    scales |= torch.cat([(top >> shift & 3) << 4 for shift in (0, 2, 4, 6)], dim=1)
    return _scaled(codes, _number(groups, 108) * (scales.float() - 32))


def _scales_and_minima(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the eight runs of a q4_k or q5_k block, from its bytes 0 to 16: float32 [groups, 8] each."""
    scale, least, both = groups[:, 4:8], groups[:, 8:12], groups[:, 12:16]
    scales = torch.cat([scale & 63, (both & 15) | (scale >> 2 & 48)], dim=1)
    minima = torch.cat([least & 63, (both >> 4) | (least >> 2 & 48)], dim=1)
    return _number(groups, 0) * scales.float(), _number(groups, 2) * minima.float()


def _halves(part: Tensor) -> Tensor:
    """Low nibbles of each 32 bytes, then their high ones: uint8 [groups, 256] of bytes [groups, 128]."""
    part = part.reshape(-1, 4, 1, 32)
    return torch.cat([part & 15, part >> 4], dim=2).view(-1, 256)


def _q4_k(groups: Tensor) -> Tensor:
    return _scaled(_halves(groups[:, 16:]), *_scales_and_minima(groups))


def _q5_k(groups: Tensor) -> Tensor:
    high = (groups[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8).view(1, 8, 1)) & 1
    return _scaled(_halves(groups[:, 48:]) | high.view(-1, 256) << 4, *_scales_and_minima(groups))


def _q6_k(groups: Tensor) -> Tensor:
    low = groups[:, :128].reshape(-1, 2, 1, 64)
    codes = torch.cat([low & 15, low >> 4], dim=2).view(-1, 2, 4, 32) | _pairs(groups[:, 128:192]) << 4
    scales = groups[:, 192:208].contiguous().view(torch.int8).float()
    return _scaled(codes.reshape(-1, 256).to(torch.int8) - 32, _number(groups, 208) * scales)


def _mxfp4(groups: Tensor) -> Tensor:
    """Codes of 4 bits (sign, two bits of exponent, one of mantissa) times 2 to the power of byte 0 - 127."""
    table = torch.tensor(MXFP4, dtype=torch.float32)
    codes = torch.cat([groups[:, 1:] & 15, groups[:, 1:] >> 4], dim=1)
    exponent = groups[:, :1].int()
    half = torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return table[codes.int()] * half.view(torch.float32)


_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_zero": _q4_zero,
    "nf4": _nf4,
    "int8": _int8,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "mxfp4": _mxfp4,
}
"""Float32 values of groups, uint8 [groups, bytes of one], by format."""
