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

SIZES = (64 << 10, 2 << 20)
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
        return {name: _figures(channel, transfer, address, group) for name, transfer in transfers.items()}
    finally:
        channel.close()
        file.close()


def _figures(channel: Channel, transfer: Transfer, address: int, group: _Group) -> dict[str, float]:
    """Lines through the seconds of a small and of a large transfer, both beside a computation, as those of a run are."""
    (small_taken, small_lost), (large_taken, large_lost) = (
        _beside(channel, transfer, address, size, group) for size in SIZES
    )
    small, large = SIZES
    per_byte = max((large_taken - small_taken) / (large - small), 1e-12)
    lost_per_byte = max(0.0, (large_lost - small_lost) / (large - small))
    return {
        "bytes_per_second": 1.0 / per_byte,
        "latency_seconds": max(0.0, small_taken - per_byte * small),
        "compute_seconds_per_byte": lost_per_byte,
        "compute_seconds_per_transfer": max(0.0, small_lost - lost_per_byte * small),
    }


def _beside(channel: Channel, transfer: Transfer, address: int, size: int, group: _Group) -> tuple[float, float]:
    """Seconds from the request of a transfer until it is done, and those that computing loses to it.

    It takes longer beside a computation than alone: its thread waits for a core and for Python's lock (on two Zen 5 cores
    2 MiB in 1.9 ms beside, 1.5 ms alone). The upper quartile, since what comes late is waited for and what comes early
    gains nothing. System calls and copies need a core, and an operator waits for its slowest one: what is lost is the
    median of a group with a transfer beside it less that of one alone, in turn.
    """
    alone, together, taken = [], [], []
    group.run()

    def timed(offset: int, begin: float) -> None:
        transfer(address, size, offset)
        taken.append(time.perf_counter() - begin)

    for turn in range(GROUPS):
        begin = time.perf_counter()
        group.run()
        alone.append(time.perf_counter() - begin)
        offset = turn * size % (SCRATCH_BYTES - size) // SIZES[0] * SIZES[0]
        begin = time.perf_counter()
        ticket = channel.submit(timed, offset, begin)
        group.run()
        together.append(time.perf_counter() - begin)
        channel.wait(ticket)
    return statistics.quantiles(taken, n=4)[2], statistics.median(together) - statistics.median(alone)


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
