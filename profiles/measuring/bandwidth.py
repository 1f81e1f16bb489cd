"""Measures the channels between memory and disk: bandwidth, latency, and by how much a transfer slows down computation.

Transfers are made as in a run: direct reads and writes in place, carried out by the thread of
`tightfit.runtime.engine.device.channels`.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tightfit.runtime.engine.cpu.pages import HUGE_BYTES, make_pages
from tightfit.runtime.engine.cpu.products import multiply
from tightfit.runtime.engine.device.channels import TransferChannel
from tightfit.runtime.engine.device.spill import SpillFile

SIZES = (64 << 10, 2 << 20)
SCRATCH_BYTES = 64 << 20
LEAST_TURNS, MOST_TURNS = 10, 100
"""Transfers of each kind and size. Kinds and sizes alternate, so that a shared disk that is slow for a second affects
all alike."""
MOST_SECONDS = 4.0
"""Time for all turns together; `LEAST_TURNS` are made even if they take longer."""
GROUP_SECONDS = 4e-3
QUEUED = 4
"""transfers that are requested at once"""
FASTER = 1.5
"""A bandwidth above this many times that of the fastest such transfers alone cannot be right."""
REFERENCE_TURNS = 25
"""times that the reference computation is timed, a tenth of a second in all"""
Transfer = Callable[[int, int, int], None]
"""Called as transfer(address, bytes, offset in the file)."""


def measure_channels(folder: Path, dtype: str) -> dict[str, dict[str, Any]]:
    """Measure the disk that holds `folder`: {"read": …, "write": …}, each the fields of a
    `tightfit.profiles.schema.Channel`.

    `dtype` is the name of the torch dtype that operators compute in meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = SpillFile(str(folder), SCRATCH_BYTES)
    channel = TransferChannel()
    try:
        buffer = make_pages(SIZES[-1] + HUGE_BYTES, used=True)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        address += -address % HUGE_BYTES
        random_bytes = os.urandom(SIZES[-1])
        ctypes.memmove(address, random_bytes, len(random_bytes))
        for offset in range(0, SCRATCH_BYTES, SIZES[-1]):
            file.write(address, SIZES[-1], offset)
        workload = LayerWorkload(getattr(torch, dtype))
        transfers: dict[str, Transfer] = {"write": file.write, "read": file.read}
        return measure_transfers(channel, transfers, address, workload)
    finally:
        channel.close()
        file.close()


def measure_transfers(
    channel: TransferChannel, transfers: Mapping[str, Transfer], address: int, workload: LayerWorkload
) -> dict[str, dict[str, Any]]:
    """`TransferChannel` fields for each kind of transfer, measured while `workload` computes and `QUEUED` transfers
    wait in the queue, as in a run.

    Latency and seconds per byte are those of the line through the mean times of small and of large transfers. A
    transfer takes longer during a computation than alone, because its thread waits for a core and for Python's lock. It
    also slows the computation down: system calls and copies need a core, and an operator waits for its slowest thread.
    The compute time lost is the time of the groups that run during the transfers minus that of as many groups at the
    speed of one that ran alone just before.

    Waiting for a core may take small transfers as long as large ones, so that the line between them gives more bytes
    per second than any disk moves. No transfer is faster during a computation than alone; where the line says so, the
    bandwidth is that of transfers alone, and the latency what large transfers took beside it.
    """
    kinds = list(itertools.product(transfers, SIZES))
    seconds_of: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    compute_lost: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    least: dict[tuple[str, int], float] = dict.fromkeys(kinds, math.inf)
    file_offsets = {name: index * SCRATCH_BYTES // len(transfers) for index, name in enumerate(transfers)}
    workload.run()
    started = time.perf_counter()
    for turn in range(MOST_TURNS):
        if turn >= LEAST_TURNS and time.perf_counter() - started > MOST_SECONDS:
            break
        for name, size in kinds:
            # Kinds use distant parts of the file: a disk may still hold in its own memory what was written last.
            positions = (file_offsets[name] + (QUEUED * turn + index) * size for index in range(QUEUED))
            offsets = [position % (SCRATCH_BYTES - size) // SIZES[0] * SIZES[0] for position in positions]
            least[name, size] = min(least[name, size], _alone(channel, transfers[name], address, size, offsets[0]))
            start = time.perf_counter()
            workload.run()
            alone_seconds = time.perf_counter() - start
            seconds, beside_seconds, runs = _beside_work(channel, workload, transfers[name], address, size, offsets)
            seconds_of[name, size] += seconds
            compute_lost[name, size].append((beside_seconds - runs * alone_seconds) / QUEUED)
    figures: dict[str, dict[str, Any]] = {}
    for name in transfers:
        latency, per_byte = _line([_mean(seconds_of[name, size]) for size in SIZES])
        # Disturbances only ever lengthen a transfer, so the shortest ones tell most about the disk.
        _, least_per_byte = _line([least[name, size] for size in SIZES])
        least_per_byte = least_per_byte or least[name, SIZES[-1]] / SIZES[-1]
        if per_byte * FASTER < least_per_byte:
            per_byte = least_per_byte
            latency = max(0.0, _mean(seconds_of[name, SIZES[-1]]) - per_byte * SIZES[-1])
        lost_per_transfer, lost_per_byte = _line([statistics.median(compute_lost[name, size]) for size in SIZES])
        figures[name] = {
            "bytes_per_second": 1.0 / per_byte,
            "latency_seconds": latency,
            "compute_seconds_per_byte": lost_per_byte,
            "compute_seconds_per_transfer": lost_per_transfer,
        }
    return figures


def _mean(seconds: Sequence[float]) -> float:
    """The mean without the tenth that took longest: the queue's time is a sum, but not of what the machine did
    otherwise.
    """
    undisturbed = sorted(seconds)[: max(1, len(seconds) - len(seconds) // 10)]
    return statistics.fmean(undisturbed)


def _line(seconds: Sequence[float]) -> tuple[float, float]:
    """(seconds of a transfer of no bytes, seconds per byte), by the line through the `seconds` at the two `SIZES`."""
    (small, large), (small_seconds, large_seconds) = SIZES, seconds
    per_byte = max(0.0, (large_seconds - small_seconds) / (large - small))
    return max(0.0, small_seconds - per_byte * small), per_byte


def _alone(channel: TransferChannel, transfer: Transfer, address: int, size: int, offset: int) -> float:
    """Seconds from requesting a transfer until it is done, with no computation running."""
    start = time.perf_counter()
    channel.wait(channel.submit(lambda: transfer(address, size, offset)))
    return time.perf_counter() - start


def _beside_work(
    channel: TransferChannel,
    workload: LayerWorkload,
    transfer: Transfer,
    address: int,
    size: int,
    offsets: Sequence[int],
) -> tuple[list[float], float, int]:
    """(seconds of each transfer, seconds of the groups that ran meanwhile, number of those groups)."""
    transfer_seconds: list[float] = []

    def timed(offset: int) -> None:
        start = time.perf_counter()
        try:
            transfer(address, size, offset)
        finally:
            transfer_seconds.append(time.perf_counter() - start)

    runs, ticket = 0, 0
    start = time.perf_counter()
    for offset in offsets:
        ticket = channel.submit(timed, offset)
    while not runs or len(transfer_seconds) < len(offsets):
        workload.run()
        runs += 1
    compute_seconds = time.perf_counter() - start
    channel.wait(ticket)
    return transfer_seconds, compute_seconds, runs


def reference_seconds() -> float:
    """Seconds of a computation that is the same for all models, by which the machine can be compared with what it was
    before.
    """
    workload = LayerWorkload(torch.bfloat16)
    seconds = []
    for _ in range(REFERENCE_TURNS):
        start = time.perf_counter()
        workload.run()
        seconds.append((time.perf_counter() - start) / workload.count)
    return statistics.median(seconds)


class LayerWorkload:
    """A computation like a layer's, about as long as the largest transfer: a wide matrix product, narrow ones, an
    addition.
    """

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
