"""Work of programs and searches, counted in what they did and not in seconds: a search that is given so much work does
the same on a slow, a fast and a busy machine.

A unit is about a second of one core of 2024, whatever the work is.
"""

from __future__ import annotations

BUILT = 5e-6
"""units for each entry of a program's matrix: to build it and to hand it to the solver"""
ITERATED = 1.5e-9
"""units for each entry and each iteration of the simplex method"""
EDITED = 1e-6
"""units for each run of a schedule, whenever a search looks at the bytes of all runs"""


def building(entries: int) -> float:
    """Units for building a program of so many entries."""
    return BUILT * entries


def simplex(entries: int, iterations: int) -> float:
    """Units for building a linear program of so many entries and solving it in so many iterations."""
    return building(entries) + ITERATED * entries * iterations
