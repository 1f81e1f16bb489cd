"""The time limit of building and solving one program, which also allows for what the solver does outside of its own
time limit.
"""

from __future__ import annotations

import time

HANDED_OVER = 0.6
"""seconds, per second of building, that are set aside for handing the program to the solver and for what the solver
does after its own time limit has ended
"""


class Limit:
    """`seconds` from now on, to build a program and solve it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = time.monotonic()

    def check(self) -> None:
        """To be called while building. Raises TimeoutError where no time would be left to solve the program."""
        self.left()

    def left(self) -> float:
        """Seconds for the solver's own time limit once the program is built. Raises TimeoutError
        where none are left.
        """
        left = self.seconds - (1.0 + HANDED_OVER) * (time.monotonic() - self._started)
        if left <= 0.0:
            raise TimeoutError
        return left
