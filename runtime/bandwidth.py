"""The channels between memory and disk: bandwidth, latency, and what a transfer costs the computation beside it.

Transfers are those of a run: direct reads and writes in place, carried out by the thread of `runtime.channels`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from profiles.products import multiply
from runtime.channels import Channel
from runtime.spill import SpillFile

SIZES = (64 << 10, 512 << 10, 4 << 20)
BESIDE_SIZES = (64 << 10, 2 << 20)
SCRATCH_BYTES = 64 << 20
GROUPS = 48
"""groups of operators timed alone, and as many with a transfer beside them"""
GROUP_SECONDS = 4e-3
Transfer = Callable[[int, int, int], None]
"""(address, bytes, offset in the file)"""


def measure_channels(folder: Path, dtype: str) -> dict[str, dict[str, float]]:
    """`read` and `write` as `profiles.schema.Channel` fields; `dtype` is the one that operators compute in."""
    folder.mkdir(parents=True, exist_ok=True)
    file = SpillFile(str(folder), SCRATCH_BYTES)
    channel = Channel()
    try:
        buffer = mmap.mmap(-1, SIZES[-1])
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        for start in range(0, SIZES[-1], 1 << 16):
            buffer[start : start + (1 << 16)] = os.urandom(1 << 16)
        for offset in range(0, SCRATCH_BYTES, SIZES[-1]):
            file.write(address, SIZES[-1], offset)
        group = _Group(getattr(torch, dtype))
        transfers: dict[str, Transfer] = {"write": file.write, "read": file.read}
        return {
            name: _alone(transfer, address) | _beside(channel, transfer, address, group)
            for name, transfer in transfers.items()
        }
    finally:
        channel.close()
        file.close()


def _alone(transfer: Transfer, address: int) -> dict[str, float]:
    seconds = {}
    for size in SIZES:
        times = []
        for offset in range(0, SCRATCH_BYTES - size + 1, size)[:32]:
            begin = time.perf_counter()
            transfer(address, size, offset)
            times.append(time.perf_counter() - begin)
        seconds[size] = statistics.median(times)
    small, large = SIZES[0], SIZES[-1]
    per_byte = max((seconds[large] - seconds[small]) / (large - small), 1e-12)
    return {"bytes_per_second": 1.0 / per_byte, "latency_seconds": max(0.0, seconds[small] - per_byte * small)}


def _beside(channel: Channel, transfer: Transfer, address: int, group: _Group) -> dict[str, float]:
    """What computing loses to a transfer: system calls and copies need a core, and an operator waits for its slowest one."""
    lost = {size: _lost(channel, transfer, address, size, group) for size in BESIDE_SIZES}
    small, large = BESIDE_SIZES
    per_byte = max(0.0, (lost[large] - lost[small]) / (large - small))
    per_transfer = max(0.0, lost[small] - per_byte * small)
    return {"compute_seconds_per_byte": per_byte, "compute_seconds_per_transfer": per_transfer}


def _lost(channel: Channel, transfer: Transfer, address: int, size: int, group: _Group) -> float:
    """Median of a group with a transfer beside it less the median of one alone, in turn."""
    alone, together = [], []
    group.run()
    for turn in range(GROUPS):
        begin = time.perf_counter()
        group.run()
        alone.append(time.perf_counter() - begin)
        offset = turn * size % (SCRATCH_BYTES - size) // SIZES[0] * SIZES[0]
        begin = time.perf_counter()
        ticket = channel.submit(transfer, address, size, offset)
        group.run()
        together.append(time.perf_counter() - begin)
        channel.wait(ticket)
    return statistics.median(together) - statistics.median(alone)


class _Group:
    """A layer's mix, about as long as the largest transfer: a product, a pass over memory, narrow products."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.products = [_operands(1024, 576, 1536, dtype), *[_operands(1024, 576, 8, dtype)] * 3]
        self.passed = [torch.zeros(1024, 1536, dtype=dtype) for _ in range(3)]
        begin = time.perf_counter()
        for _ in range(4):
            self._once()
        self.count = max(1, round(GROUP_SECONDS * 4 / (time.perf_counter() - begin)))

    def run(self) -> None:
        for _ in range(self.count):
            self._once()

    def _once(self) -> None:
        for left, right, out in self.products:
            multiply((left, right, 1.0), out=out)
        torch.add(self.passed[0], self.passed[1], out=self.passed[2])


def _operands(rows: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    return left, right, torch.empty(rows, columns, dtype=dtype)
