"""Measures how much of the processor other programs use, since times measured meanwhile come out too long."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tightfit.runtime.common.cores import busy_seconds
from tightfit.runtime.common.progress import Progress

BUSY_SHARE = 1 / 8
"""Share of the cores of our threads; if other programs take more, times are not those of an idle machine."""
LOOK_SECONDS = 0.3
WAIT_SECONDS, WAITING_LOOK_SECONDS = 60.0, 2.0
"""how long other programs are waited for, and how long the cores have to be free then"""
STAT = Path("/proc/stat")


def our_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _used_by_others() -> float | None:
    """CPU seconds that other programs have used on our cores since boot, time stolen by a host included; None if
    unknown.
    """
    busy = busy_seconds(os.sched_getaffinity(0), STAT) if hasattr(os, "sched_getaffinity") else None
    return None if busy is None else busy - sum(os.times()[:4])


def _now() -> float:
    return time.monotonic()


@dataclass(frozen=True)
class OtherPrograms:
    """Counts the cores that other programs use from now on, among those that this process may use.

    Child processes of this one count as other programs until they have ended and been waited for. What this process
    becomes by `exec` can go on counting with the same fields.
    """

    began: float = field(default_factory=_now)
    used: float | None = field(default_factory=_used_by_others)

    def cores(self) -> float:
        """Cores used by others, averaged since this object was made; 0 if the system does not tell."""
        used = _used_by_others()
        if used is None or self.used is None:
            return 0.0
        return max(0.0, used - self.used) / max(time.monotonic() - self.began, 1e-9)

    def taken(self, threads: int) -> float:
        """How many of the cores for a computation with `threads` threads the others take."""
        return max(0.0, self.cores() - max(0, our_cores() - threads))


def crowded(taken_cores: float, threads: int) -> bool:
    """Whether others take so many of the cores for `threads` threads (over `BUSY_SHARE`) that measured times suffer."""
    return taken_cores > BUSY_SHARE * threads


def taken_now(threads: int, seconds: float = LOOK_SECONDS) -> float:
    """Cores that other programs take from `threads` threads at present, watched for so many seconds."""
    others = OtherPrograms()
    time.sleep(seconds)
    return others.taken(threads)


def wait_for_cores(threads: int, tell: Callable[[str], None], progress: Progress | None = None) -> None:
    """Wait until other programs leave `threads` threads the cores, at most `WAIT_SECONDS`. `tell` is called with what
    people should know, `progress` as progress(stage, seconds waited, most seconds).
    """
    taken, began, most = taken_now(threads), _now(), round(WAIT_SECONDS)
    if not crowded(taken, threads):
        return
    tell(f"other programs use {taken:.1f} of the cores: waiting for them, at most {most} s (--no-wait goes on at once)")
    while crowded(taken, threads):
        waited = _now() - began
        if waited >= WAIT_SECONDS:
            tell(
                f"other programs still use {taken:.1f} of the cores: going on beside them, so seconds come out too long"
            )
            return
        if progress is not None:
            progress("waiting for other programs", round(waited), most)
        taken = taken_now(threads, WAITING_LOOK_SECONDS)
    tell(f"the cores are free after {_now() - began:.0f} s")
