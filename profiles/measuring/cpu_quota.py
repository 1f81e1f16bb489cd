"""What a CPU quota leaves of the cores (Linux cgroups, v1 or v2: containers with `--cpus`, services with `CPUQuota`).

A process under a quota computes at full speed until its share of a period (mostly 0.1 s) is used up, and then stands
still until the next one. An operator that is timed alone mostly meets none of these pauses, a training step meets all
of them. So operators are timed by a clock that stands still with the process (`QuotaClock`), and their seconds
multiplied by what the quota costs (`slowdown`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
CONTROLLERS = ("cpu", "cpu,cpuacct", "cpuacct,cpu")
"""names of the folder in which the first version's controller of processors is mounted"""


def quota_cores(mount: Path = MOUNT, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The number of cores that this process's quotas allow it on average; None where there is no quota."""
    quotas = [cores for _, cores in _quotas(mount, own)]
    return min(quotas, default=None)


def useful_threads(cores: int, quota: float | None) -> int:
    """How many of `cores` threads a quota leaves work for."""
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def slowdown(threads: int, quota: float | None) -> float:
    """By what factor a computation with so many threads takes longer than in a moment in which the quota is not used
    up.
    """
    return 1.0 if quota is None else max(1.0, threads / quota)


class QuotaClock:
    """Seconds in which this process was not held up by a quota, for a computation with `threads` threads.

    The kernel counts what it held up on one processor after the other, once it goes on, so that a single difference of
    two readings may be wrong, and even negative: take the median of several.
    """

    def __init__(self, threads: int, mount: Path = MOUNT, own: Path = Path("/proc/self/cgroup")) -> None:
        self._threads = threads
        groups = [group for group, _ in _quotas(mount, own)]
        self._statistics = [group / "cpu.stat" for group in groups]

    def __call__(self) -> float:
        now = time.perf_counter()
        # Where quotas lie inside one another, a process is held up by one of them at a time.
        return now - sum(map(_throttled, self._statistics)) / self._threads if self._statistics else now


def _throttled(statistics: Path) -> float:
    """Seconds for which a group was held up, added up over its processors."""
    try:
        lines = statistics.read_text().splitlines()
    except OSError:
        return 0.0
    figures = {name: int(value) for name, _, value in (line.partition(" ") for line in lines) if value.isdigit()}
    return figures.get("throttled_usec", 0) / 1e6 + figures.get("throttled_time", 0) / 1e9


def _quotas(mount: Path, own: Path) -> Iterator[tuple[Path, float]]:
    """(group, cores that it allows) of this process's groups, and those around them, that have a quota."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            roots = [mount, mount / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [mount / name for name in CONTROLLERS]
        else:
            continue
        root = next((folder for folder in roots if (folder / path.strip("/")).is_dir() and _mounted(folder)), None)
        if root is None:
            continue
        group = root / path.strip("/")
        while True:
            cores = _allowed(group)
            if cores is not None:
                yield group, cores
            if group == root:
                break
            group = group.parent


def _mounted(root: Path) -> bool:
    return (root / "cgroup.procs").exists()


def _allowed(group: Path) -> float | None:
    """Cores that a group's own quota allows; None: it has none."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
