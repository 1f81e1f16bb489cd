"""The meter: compares the process's resident set with the cap between instructions, and records timelines of it."""

from __future__ import annotations

import time
from array import array

from tightfit.runtime.common.errors import CapError
from tightfit.runtime.engine.device.resident import ResidentReader, memory

EVERY = 16
"""Instructions between two readings; a reading takes about 2 microseconds."""
SAMPLES = 2048
"""most samples of a timeline"""


class Meter:
    """Raises CapError once the resident set is above `cap_bytes`. During a watched step it also records a timeline.

    A peak between two readings is found after the step: `check_peak` reads VmHWM, which misses nothing.
    """

    def __init__(self, cap_bytes: int, budget_bytes: int | None = None) -> None:
        """`cap_bytes` is this process's share of the budget; `budget_bytes`, by default the same, is that of the whole
        run.
        """
        self.cap_bytes = cap_bytes
        self.budget_bytes = cap_bytes if budget_bytes is None else budget_bytes
        self._resident = ResidentReader()
        self._samples = array("q", [0]) * (3 * SAMPLES)
        self._count = 0
        self._start: float | None = None
        self._gap = 0.0
        self._last = 0.0

    def check(self, instruction: int) -> None:
        """Compare with the cap if it is time for a reading; called after every instruction. Raises CapError above the
        cap.
        """
        if self._start is not None:
            now = time.perf_counter() - self._start
            if now - self._last >= self._gap and self._count < SAMPLES:
                self._last = now
                index = 3 * self._count
                self._samples[index], self._samples[index + 1], self._samples[index + 2] = (
                    instruction,
                    int(now * 1e6),
                    self._resident(),
                )
                self._count += 1
        if instruction % EVERY == 0 and self._resident() > self.cap_bytes:
            self.refuse(self._resident())

    def check_peak(self) -> int:
        """VmHWM in bytes. Raises CapError if it is above the cap."""
        peak = memory().peak
        if peak > self.cap_bytes:
            self.refuse(peak)
        return peak

    def refuse(self, measured: int) -> None:
        others = self.budget_bytes - self.cap_bytes
        supervisor_share = f", of which {others / 2**20:.1f} are the supervisor's" if others else ""
        raise CapError(
            f"the process holds {measured / 2**20:.1f} MiB and the cap is {self.budget_bytes / 2**20:.1f}"
            f" MiB{supervisor_share}; profile again on this machine (the floor may have changed) and plan anew"
        )

    def watch(self, expected_seconds: float) -> None:
        """Record a timeline of the step that starts now, its samples spread evenly over about `expected_seconds`."""
        self._count, self._last, self._gap = 0, -1.0, expected_seconds / (SAMPLES * 0.8)
        self._start = time.perf_counter()

    def stop(self) -> list[tuple[int, float, int]]:
        """End the timeline; returns its samples: (instruction, seconds since the step's start, resident bytes)."""
        self._start = None
        s = self._samples
        return [(s[i], s[i + 1] / 1e6, s[i + 2]) for i in range(0, 3 * self._count, 3)]
