"""The time limit of one program: its building has a share, and so has what the solver does outside of its own clock."""

from __future__ import annotations

import time

HANDED_OVER = 0.6
"""of the seconds that building takes: until the solver has the program, and from the end of its clock to its answer"""


class Limit:
    """`seconds` from now on, to build a program and solve it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = time.monotonic()

    def check(self) -> None:
        """While building. Raises TimeoutError where no time would be left to solve what is built."""
        self.left()

    def left(self) -> float:
        """Seconds for the solver's clock, once all is built. Raises TimeoutError where there are none."""
        left = self.seconds - (1.0 + HANDED_OVER) * (time.monotonic() - self._started)
        if left <= 0.0:
            raise TimeoutError
        return left
