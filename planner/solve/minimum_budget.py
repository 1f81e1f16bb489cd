"""The smallest budget at which a plan is found, from a schedule that is known: lower and lower, until one byte less has
none.
"""

from __future__ import annotations

from collections.abc import Callable

from tightfit.planner.schedule.realize import Schedule

ROUNDS = 50
"""lower schedules asked for, at most"""
SHRINK = 8
"""where no schedule is found so far below, the distance is divided by this"""


def lower_peak(
    best: Schedule, below: Callable[[Schedule, int], Schedule | None], floor_bytes: int, step: int = 1
) -> tuple[Schedule, bool]:
    """The lowest schedule found from `best` down, and whether none was found one byte lower, or that would be below
    `floor_bytes`.

    `below`: asked with a schedule and a number of bytes, a schedule whose peak is lower by at least these, or None
    where none is found; where it raises TimeoutError, the lowest one so far is the answer. `step`: bytes to begin with.
    """
    for _ in range(ROUNDS):
        if best.peak_bytes <= floor_bytes:
            return best, True
        step = min(step, best.peak_bytes - floor_bytes)
        try:
            lower = below(best, step)
        except TimeoutError:
            return best, False
        if lower is not None:
            # Larger steps after a success: fewer schedules are asked for.
            step = 2 * (best.peak_bytes - lower.peak_bytes)
            best = lower
        elif step > 1:
            step = max(1, step // SHRINK)
        else:
            return best, True
    return best, False
