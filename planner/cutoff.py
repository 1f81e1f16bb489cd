"""`Cutoff`: the moment at which a search ends. The clock only cuts; all else depends on results and on work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

LONGEST = 86400.0
"""seconds that a solver is given at most: a day"""
Clock = Callable[[], float]
"""seconds since any moment, never less than at the call before"""


class Cutoff:
    """`seconds` from now on, by the clock `now`."""

    def __init__(self, seconds: float = math.inf, now: Clock = time.monotonic) -> None:
        self.now = now
        self.started = now()
        self.ends = self.started + seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the search began."""
        return self.now() - self.started

    @property
    def over(self) -> bool:
        """Whether the search has to end."""
        return self.now() >= self.ends

    def left(self) -> float:
        """Seconds until the end, `LONGEST` at most. Raises TimeoutError where none are left."""
        seconds = self.ends - self.now()
        if seconds <= 0:
            raise TimeoutError
        return min(seconds, LONGEST)

    def check(self) -> None:
        """Raise TimeoutError where the search has to end."""
        if self.over:
            raise TimeoutError


NEVER = Cutoff()
"""what nothing cuts"""
