"""The form in which the tensors of a micro-batch pass over a cut: one message, as they are or rounded to 8 or 4 bits.

A message begins with `HEADER_BYTES` that nothing uses yet; then come the tensors, each at a multiple of `ALIGNMENT`.
Rounded, a tensor is a float32 scale for every row (of its last dimension), then the whole numbers: 8 bits each, or 4
bits, two to a byte, the first in the low half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SENDING = 2
"""buffers from which messages over one cut in one direction are sent: one on its way, one being filled"""
RECEIVING_DOWN = 2
"""buffers for gradients that arrive"""
PAGE = 4096
"""buffers are whole pages"""
HEADER_BYTES = ALIGNMENT = 64
BITS = (0, 4, 8)
"""0: the tensors as they are"""
ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2, "bool": 1}


@dataclass(frozen=True, kw_only=True)
class Passing:
    """A tensor that passes over a cut."""

    shape: tuple[int, ...]
    dtype: str
    """torch dtype without the prefix"""

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    def wire_bytes(self, bits: int) -> int:
        """Bytes in a message."""
        if not bits or self.dtype not in ("float32", "bfloat16", "float16"):
            return math.prod(self.shape) * ITEM_BYTES[self.dtype]
        return self.rows * (4 + -(-self.columns * bits // 8))


def offsets(passing: Sequence[Passing], bits: int) -> tuple[list[int], int]:
    """Where each tensor begins in a message, and the bytes of the message."""
    places, end = [], HEADER_BYTES
    for one in passing:
        places.append(end)
        end += -(-one.wire_bytes(bits) // ALIGNMENT) * ALIGNMENT
    return places, end


def ring(ahead_below: int) -> int:
    """Buffers for activations that arrive from a member which runs `ahead_below` micro-batches ahead."""
    return ahead_below + 1


def paged(size: int) -> int:
    """The bytes of the whole pages that hold `size` bytes."""
    return -(-size // PAGE) * PAGE


def put(tensor: Tensor, room: Tensor, bits: int) -> None:
    """Write a contiguous tensor to `room`, uint8 of its `wire_bytes`."""
    import torch

    if not bits or not tensor.is_floating_point():
        room.view(tensor.dtype).copy_(tensor.reshape(-1))
        return
    rows = tensor.reshape(-1, tensor.shape[-1])
    scales, codes = _parts(room, rows.shape[0])
    most = (1 << (bits - 1)) - 1
    for row in _blocks(rows):
        wide = rows[row].float()
        scale = wide.abs().amax(1).div_(most)
        scales[row] = scale
        whole = wide.div_(scale.clamp_(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).round_().clamp_(-most, most)
        if bits == 8:
            codes[row].view(torch.int8).copy_(whole)
        else:
            half = whole.add_(8).to(torch.uint8)
            low, high = half[:, 0::2], half[:, 1::2]
            codes[row] = low
            codes[row][:, : high.shape[1]] |= high << 4


def take(room: Tensor, tensor: Tensor, bits: int) -> None:
    """Read a contiguous tensor from `room`, as `put` wrote it."""
    import torch

    if not bits or not tensor.is_floating_point():
        tensor.reshape(-1).copy_(room.view(tensor.dtype))
        return
    rows = tensor.view(-1, tensor.shape[-1])
    scales, codes = _parts(room, rows.shape[0])
    for row in _blocks(rows):
        scale = scales[row].unsqueeze(1)
        if bits == 8:
            rows[row].copy_(codes[row].view(torch.int8).float().mul_(scale))
        else:
            packed = codes[row]
            rows[row][:, 0::2] = (packed & 15).float().sub_(8).mul_(scale)
            high = (packed >> 4).float().sub_(8).mul_(scale)
            rows[row][:, 1::2] = high[:, : tensor.shape[-1] // 2]


def _parts(room: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    import torch

    return room[: 4 * rows].view(torch.float32), room[4 * rows :].view(rows, -1)


ROWS = 256
"""rows that are rounded at once, so that the workspace is small"""


def _blocks(rows: Tensor) -> list[slice]:
    return [slice(begin, begin + ROWS) for begin in range(0, rows.shape[0], ROWS)]
