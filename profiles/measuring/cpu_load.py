"""How much of the processor other programs use: what is measured beside them comes out slower than it is."""

from __future__ import annotations

import os
import time
from pathlib import Path

BUSY_SHARE = 1 / 8
"""of our threads' cores: where others take more, times are not those of an idle machine"""
LOOK_SECONDS = 0.3
STAT = Path("/proc/stat")


class Others:
    """Cores that other programs use from now on, of those that this process may use. Its own children count as its own once they have ended."""

    def __init__(self) -> None:
        self.began, self.used = time.monotonic(), _used_by_others()

    def cores(self) -> float:
        """The mean since the beginning; 0 where the system does not tell."""
        used = _used_by_others()
        if used is None or self.used is None:
            return 0.0
        return max(0.0, used - self.used) / max(time.monotonic() - self.began, 1e-9)

    def taken(self, threads: int) -> float:
        """The part of it that computing with `threads` would go without."""
        return max(0.0, self.cores() - max(0, our_cores() - threads))


def crowded(taken_cores: float, threads: int) -> bool:
    """Whether others take so much of `threads` cores that it tells in what is measured."""
    return taken_cores > BUSY_SHARE * threads


def taken_now(threads: int) -> float:
    """What computing with `threads` would go without, looked at for a moment."""
    others = Others()
    time.sleep(LOOK_SECONDS)
    return others.taken(threads)


def our_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _used_by_others() -> float | None:
    """Seconds that our cores have been busy with anything else, what the host took away included; None: not known."""
    try:
        lines = STAT.read_text().splitlines()
        own = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    ticks = 0
    for name, *fields in map(str.split, lines):
        if name in own:
            user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(int, fields[:8])
            ticks += user + nice + system + interrupts + soft + stolen
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])
