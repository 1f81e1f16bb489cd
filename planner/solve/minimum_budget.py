"""The smallest budget, once something is known to fit: lower and lower, until one byte less has no plan."""

from __future__ import annotations

from collections.abc import Callable

from tightfit.planner.schedule.realize import Schedule

ROUNDS = 50
"""questions asked"""
SHRINK = 8
"""what is too far below by this factor is tried again so much nearer"""


def lowered(
    best: Schedule, below: Callable[[Schedule, int], Schedule | None], floor_bytes: int, step: int = 1
) -> tuple[Schedule, bool]:
    """The last of a row of ever lower schedules, and whether one byte less has none, or would be below `floor_bytes`.

    `below`: a schedule that peaks that many bytes below another, or None where none is found; it may raise TimeoutError, and
    the last one found is then what there is.
    """
    for _ in range(ROUNDS):
        if best.peak_bytes <= floor_bytes:
            return best, True
        step = min(step, best.peak_bytes - floor_bytes)
        try:
            found = below(best, step)
        except TimeoutError:
            return best, False
        if found is not None:
            # Farther below the end is sooner found.
            step = 2 * (best.peak_bytes - found.peak_bytes)
            best = found
        elif step > 1:
            step = max(1, step // SHRINK)
        else:
            return best, True
    return best, False
