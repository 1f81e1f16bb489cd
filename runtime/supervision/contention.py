"""Notices when steps take longer than expected because other programs hold the cores of a training process, and when
they take longer or shorter although none does.

Linux counts for each thread how long it ran, and how long it was ready to run and waited for a core
(``/proc/PID/task/TID/schedstat``, nanoseconds). A thread may wait for others of its own process, too; so the cores also
have to be at work for somebody else (``/proc/stat``).

A run does not go on with fewer threads of itself: PyTorch divides sums among its threads, so that their last bits, and
with them the results, may depend on the number of threads. The standard library only: the process that does this counts
against the budget.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.runtime.common.cores import busy_seconds

LOOK_SECONDS = 2.0
"""least time between two looks"""
LEAST_STEPS = 2
"""steps between two looks"""
SLOWER = 1.2
"""a step is slow from so many times the expected seconds on"""
OFF, FEWEST = 0.15, 3
"""a notice is given if at least `FEWEST` steps differ from the expected seconds by this share though no other program
is in the way
"""
CROWDED, FREE = 1 / 8, 1 / 16
"""Cores for which the threads wait and which others use: above the first others are in the way, up to the second none
is.
"""
QUIET_SECONDS = 60.0
"""least time between two notices of the same kind"""
PROC = Path("/proc")
CROWDING = re.compile(r"other programs use (?P<cores>[\d.]+) of the cores: .+|(?P<free>the cores are free\b).*: .+")
"""the notices of `Contention.step` that others are in the way, and that they no longer are"""


def crowding_of(line: str) -> float | None:
    """The cores that other programs use by a notice that a run has written, 0 where they are free again; None for any
    other line.
    """
    found = CROWDING.fullmatch(line.strip())
    return None if found is None else float(found["cores"] or 0)


@dataclass(frozen=True, kw_only=True)
class CoreUsage:
    """How long a process's threads ran and waited, and how long cores were busy: seconds since its start, or since
    boot.
    """

    ran: float
    """that the process's threads were on a core"""
    waited: float
    """that its threads were ready to run and had no core"""
    busy: float
    """that the cores which it may use were at work, for anybody"""


def usage_of(process: int) -> CoreUsage | None:
    """The present usage of a process; None where it has ended, or the system does not tell."""
    ran = waited = 0
    try:
        for thread in os.listdir(PROC / str(process) / "task"):
            run_time, wait_time, *_ = (PROC / str(process) / "task" / thread / "schedstat").read_text().split()
            ran += int(run_time)
            waited += int(wait_time)
        busy = busy_seconds(os.sched_getaffinity(process))
    except (OSError, ValueError, AttributeError):  # a thread that has just ended too: the next look will do
        return None
    return None if busy is None else CoreUsage(ran=ran / 1e9, waited=waited / 1e9, busy=busy)


class Contention:
    """Follows the steps of a training process (`step`); `figures` is what its report says."""

    def __init__(
        self,
        *,
        threads: int,
        expected_seconds: float,
        busy_machine: bool = False,
        usage: Callable[[], CoreUsage | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`expected_seconds` are what a step is expected to take with `threads` compute threads; they were measured
        beside other programs on a `busy_machine`. `usage` reads the present usage of the process, as `usage_of` does.
        """
        self._threads, self._expected, self._busy_machine = threads, expected_seconds, busy_machine
        self._usage, self._clock = usage, clock
        self._crowded = self._differed = False
        self._last_notices = {True: -QUIET_SECONDS, False: -QUIET_SECONDS}
        self._steps, self._seconds, self._waited, self._others = 0, 0.0, 0.0, 0.0
        """of all steps during which others were in the way: their number, and sums over them"""
        self._at = 0.0
        self._before: CoreUsage | None = None
        self._taken: list[float] | None = None
        """since the last look; None: there was no step yet"""

    def _begin(self) -> None:
        self._at, self._before, self._taken = self._clock(), self._usage(), []

    def step(self, seconds: float) -> str | None:
        """Count a step that took `seconds`. Returns a notice for people, if there is one now. The first step, which
        builds kernels, is passed over.
        """
        if self._taken is None:
            self._begin()
            return None
        self._taken.append(seconds)
        elapsed = self._clock() - self._at
        if elapsed < LOOK_SECONDS or len(self._taken) < LEAST_STEPS:
            return None
        before, now, steps, expected = self._before, self._usage(), self._taken, self._expected
        self._begin()
        if before is None or now is None:
            return None
        ran, waited = now.ran - before.ran, now.waited - before.waited
        others = max(0.0, now.busy - before.busy - ran)
        mean = sum(steps) / len(steps)
        held_up = min(waited, others) / elapsed
        slow, free, was_crowded = mean > SLOWER * expected, held_up <= FREE, self._crowded
        self._crowded = not free and (was_crowded or (held_up > CROWDED and slow))
        if self._crowded and slow:
            self._steps += len(steps)
            self._seconds += sum(steps)
            self._waited += waited * sum(steps) / elapsed
            self._others += others * sum(steps) / elapsed
        if free and not self._differed and len(steps) >= FEWEST and 0 < OFF * expected < abs(mean - expected):
            self._differed = True
            takes = f"a step takes {mean:.3f} s, the mean of the last {len(steps)}"
            if self._busy_machine:
                return f"the cores are free: {takes}; beside other programs {expected:.3f} s were expected"
            return f"{takes}, where {expected:.3f} s are expected, and no other program is in the way: the run goes on"
        if self._crowded == was_crowded or self._clock() - self._last_notices[self._crowded] < QUIET_SECONDS:
            return None
        self._last_notices[self._crowded] = self._clock()
        if free:
            return f"the cores are free again: a step takes {mean:.3f} s"
        return (
            f"other programs use {others / elapsed:.1f} of the cores: the last {len(steps)} steps took {mean:.3f} s"
            f" each where {expected:.3f} s are expected, and the run's threads waited {waited / elapsed * mean:.3f} s"
            f" of each for a core; {self._advice}"
        )

    @property
    def _advice(self) -> str:
        if self._threads == 1:
            return "end the other program, or let it wait; results stay the same to the bit"
        return (
            "end the other program, or let it wait; results stay the same to the bit. Where it has to go on, leave it"
            f" a core: `tightfit profile --threads {self._threads - 1}`, plan that and start anew (fewer threads sum in"
            " another order, so that a run cannot go over to them)"
        )

    @property
    def figures(self) -> dict[str, Any] | None:
        """For the report: how many steps other programs were in the way of, and means over these of their seconds, of
        the seconds for which the run's threads waited for a core, and of the cores that others used; None if there were
        none.
        """
        if not self._steps:
            return None
        return {
            "steps": self._steps,
            "step_seconds": self._seconds / self._steps,
            "waited_seconds": self._waited / self._steps,
            "others_cores": self._others / self._seconds,
        }
