"""When the devices of a federated round have answered, and how many steps each takes so that the last answers soonest.

A device that takes k steps has answered after f + k·s seconds, where f is for transfers and the start of its run, and s
is a step; one that takes none is not waited for. So the times at which one more step of some device would end are the
numbers f + s, f + 2s, … of every device, and a round of n steps in all cannot end before the n-th smallest of them: of
the steps before it there are fewer than n. Taking the steps with the n smallest times ends exactly then. `shared_out`
does that, so that its answer is a best one, and with times that are lower bounds a lower bound. No search is needed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tightfit.planner.fleet.schema import Link


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a device answers."""

    fixed_seconds: float
    """of a round in which it takes part, beside the steps"""
    step_seconds: float
    """infinite for one that cannot take any"""

    def answered(self, steps: int) -> float:
        """Seconds from when a round begins until its answer is there."""
        return self.fixed_seconds + steps * self.step_seconds if steps else 0.0


def transfer_seconds(link: Link, down_bytes: int, up_bytes: int) -> float:
    """Seconds of a device's link in a round: the fleet's adapter down, its own up, and the way of each."""
    return down_bytes / link.down_bytes_per_second + up_bytes / link.up_bytes_per_second + 2 * link.latency_seconds


def shared_out(paces: Sequence[Pace], steps: int, unit: int = 1) -> list[int]:
    """How many of `steps` steps each device takes, in whole `unit`s, so that the last answer comes as soon as can be.

    Of devices that would end at the same time, earlier ones come first. `steps` is a multiple of `unit`, and some device
    has finite times.
    """
    taken = [0] * len(paces)
    ends = [
        (pace.answered(unit), at) for at, pace in enumerate(paces) if pace.fixed_seconds + pace.step_seconds < math.inf
    ]
    heapq.heapify(ends)
    for _ in range(steps // unit):
        _, at = ends[0]
        taken[at] += unit
        heapq.heapreplace(ends, (paces[at].answered(taken[at] + unit), at))
    return taken


def makespan_of(paces: Sequence[Pace], taken: Sequence[int]) -> float:
    """Seconds until the last answer is there."""
    return max(pace.answered(steps) for pace, steps in zip(paces, taken))
