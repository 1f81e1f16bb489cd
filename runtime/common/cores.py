"""Reads from /proc how long the cores have been at work. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

STAT = Path("/proc/stat")


def busy_seconds(cores: Collection[int], stat: Path = STAT) -> float | None:
    """CPU seconds that these cores, by their numbers, were at work since boot, time stolen by a host included; None
    where the system does not tell.
    """
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return None
    names = {f"cpu{number}" for number in cores}
    ticks = 0
    for name, *fields in map(str.split, lines):
        if name in names:
            user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(int, fields[:8])
            ticks += user + nice + system + interrupts + soft + stolen
    return ticks / os.sysconf("SC_CLK_TCK")
