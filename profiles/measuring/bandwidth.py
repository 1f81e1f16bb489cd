"""The channels between memory and disk: bandwidth, latency, and what a transfer costs the computation beside it.

Transfers are those of a run: direct reads and writes in place, carried out by the thread of `tightfit.runtime.engine.device.channels`.
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
from tightfit.runtime.engine.device.channels import Channel
from tightfit.runtime.engine.device.spill import SpillFile

SIZES = (64 << 10, 2 << 20)
SCRATCH_BYTES = 64 << 20
LEAST_TURNS, MOST_TURNS = 10, 100
"""transfers of each kind and size, one of each in turn: a shared disk is slow for a second and then fast again"""
MOST_SECONDS = 4.0
"""for all turns, unless fewer than the least are done by then"""
GROUP_SECONDS = 4e-3
ATTEMPTS = 3
"""to measure anew what came out impossible"""
FASTER = 1.5
"""times the bytes per second of the same transfers alone, at their fastest: above that no measurement can be right"""
Transfer = Callable[[int, int, int], None]
"""(address, bytes, offset in the file)"""


def measure_channels(folder: Path, dtype: str) -> dict[str, dict[str, Any]]:
    """`read` and `write` as `tightfit.profiles.schema.Channel` fields; `dtype` is the one that operators compute in."""
    folder.mkdir(parents=True, exist_ok=True)
    file = SpillFile(str(folder), SCRATCH_BYTES)
    channel = Channel()
    try:
        buffer = make_pages(SIZES[-1] + HUGE_BYTES, used=True)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        address += -address % HUGE_BYTES
        noise = os.urandom(SIZES[-1])
        ctypes.memmove(address, noise, len(noise))
        for offset in range(0, SCRATCH_BYTES, SIZES[-1]):
            file.write(address, SIZES[-1], offset)
        group = Group(getattr(torch, dtype))
        transfers: dict[str, Transfer] = {"write": file.write, "read": file.read}
        return measure_transfers(channel, transfers, address, group)
    finally:
        channel.close()
        file.close()


def measure_transfers(
    channel: Channel, transfers: Mapping[str, Transfer], address: int, group: Group
) -> dict[str, dict[str, Any]]:
    """Figures of each kind of transfer: lines through the medians of small and of large ones, each beside `group`.

    A transfer takes longer beside a computation than alone: its thread waits for a core and for Python's lock. And it takes
    from it: system calls and copies need a core, and an operator waits for its slowest one. Lost is what groups take
    longer than the one alone just before.

    On a busy machine the medians of small and of large transfers may come so near each other that the line between them says
    more bytes a second than any disk moves. No transfer is faster beside a computation than alone: what is, is measured again, and where
    it stays so the figure of the transfers alone takes its place, and `doubt` says so.
    """
    figures: dict[str, dict[str, Any]] = {}
    fastest: dict[str, float] = {}
    impossible, attempts = list(transfers), 0
    while impossible and attempts < ATTEMPTS:
        figures, fastest = _measured(channel, transfers, address, group)
        impossible = [name for name in transfers if figures[name]["bytes_per_second"] > FASTER * fastest[name]]
        attempts += 1
    for name in impossible:
        found, alone = figures[name]["bytes_per_second"], fastest[name]
        figures[name]["bytes_per_second"] = alone
        figures[name]["doubt"] = (
            f"{name}s came out at {found / 1e6:,.0f} MB/s beside a computation, which is not possible, in each of {ATTEMPTS} attempts:"
            f" the {alone / 1e6:,.0f} MB/s of transfers alone are taken; profile again"
        )
    return figures


def _measured(
    channel: Channel, transfers: Mapping[str, Transfer], address: int, group: Group
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """The figures of `measure_transfers` by one attempt, and the bytes per second of each kind alone, at its fastest."""
    kinds = list(itertools.product(transfers, SIZES))
    taken: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    lost: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    least: dict[tuple[str, int], float] = dict.fromkeys(kinds, math.inf)
    apart = {name: number * SCRATCH_BYTES // len(transfers) for number, name in enumerate(transfers)}
    group.run()
    started = time.perf_counter()
    for turn in range(MOST_TURNS):
        if turn >= LEAST_TURNS and time.perf_counter() - started > MOST_SECONDS:
            break
        for name, size in kinds:
            # Not what was written last, which a disk may still hold in its memory: kinds are far from each other.
            place = turn * size + apart[name]
            offset = place % (SCRATCH_BYTES - size) // SIZES[0] * SIZES[0]
            least[name, size] = min(least[name, size], _alone(channel, transfers[name], address, size, offset))
            begin = time.perf_counter()
            group.run()
            alone = time.perf_counter() - begin
            seconds, beside, groups = _beside(channel, group, transfers[name], address, size, offset)
            taken[name, size].append(seconds)
            lost[name, size].append(beside - groups * alone)
    figures: dict[str, dict[str, Any]] = {}
    fastest = {}
    for name in transfers:
        latency, per_byte = _line([statistics.median(taken[name, size]) for size in SIZES])
        lost_per_transfer, lost_per_byte = _line([statistics.median(lost[name, size]) for size in SIZES])
        figures[name] = {
            "bytes_per_second": 1.0 / max(per_byte, 1e-12),
            "latency_seconds": latency,
            "compute_seconds_per_byte": lost_per_byte,
            "compute_seconds_per_transfer": lost_per_transfer,
        }
        # What holds a transfer up only makes it longer: the shortest ones tell most of the disk.
        _, least_per_byte = _line([least[name, size] for size in SIZES])
        fastest[name] = 1.0 / (least_per_byte or least[name, SIZES[-1]] / SIZES[-1])
    return figures, fastest


def _line(seconds: Sequence[float]) -> tuple[float, float]:
    """What a transfer of no bytes takes, and what each byte adds, from the seconds at `SIZES`."""
    (small, large), (small_seconds, large_seconds) = SIZES, seconds
    per_byte = max(0.0, (large_seconds - small_seconds) / (large - small))
    return max(0.0, small_seconds - per_byte * small), per_byte


def _alone(channel: Channel, transfer: Transfer, address: int, size: int, offset: int) -> float:
    """Seconds from a request until its transfer is done, with nothing beside it."""
    begin = time.perf_counter()
    channel.wait(channel.submit(lambda: transfer(address, size, offset)))
    return time.perf_counter() - begin


def _beside(
    channel: Channel, group: Group, transfer: Transfer, address: int, size: int, offset: int
) -> tuple[float, float, int]:
    """Seconds from a request until its transfer is done, and those of the groups meanwhile, with their number."""
    done: list[float] = []

    def timed() -> None:
        try:
            transfer(address, size, offset)
        finally:
            done.append(time.perf_counter())

    groups = 0
    begin = time.perf_counter()
    ticket = channel.submit(timed)
    while not groups or not done:
        group.run()
        groups += 1
    beside = time.perf_counter() - begin
    channel.wait(ticket)
    return done[0] - begin, beside, groups


class Group:
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
