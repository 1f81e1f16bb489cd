"""The smallest budget, once something is known to fit: lower and lower, until one byte less has no plan."""

from __future__ import annotations

from collections.abc import Callable

from planner.carry_out import Schedule

ROUNDS = 20
SHRINK = 16
"""what is too far below by this factor is tried again so much nearer"""


def lowered(
    best: Schedule, below: Callable[[Schedule, int], Schedule | None], floor_bytes: int, step: int = 1
) -> Schedule:
    """The last of a row of ever lower schedules; one byte less has none unless there were ROUNDS of them.

    `below`: a schedule that peaks that many bytes below another, or None where none is found. Nothing is looked for below `floor_bytes`.
    """
    for _ in range(ROUNDS):
        if best.peak_bytes <= floor_bytes:
            break
        found = below(best, step)
        if found is not None:
            # Farther below the end is sooner found.
            step = 2 * (best.peak_bytes - found.peak_bytes)
            best = found
        elif step > 1:
            step = max(1, step // SHRINK)
        else:
            break
    return best
