"""Clocks that are given to a planner."""

from __future__ import annotations

import random
import time


class Ticking:
    """A clock that goes on by `tick` seconds whenever it is read, and now and then by `jump` more."""

    def __init__(self, tick: float, jump: float = 0.0) -> None:
        self.tick, self.jump, self.now, self.chance = tick, jump, 0.0, random.Random(0)

    def __call__(self) -> float:
        self.now += self.tick + (self.jump if self.chance.random() < 0.1 else 0.0)
        return self.now


class Stopping:
    """The clock on the wall, but the first readings each find that a program has been stopped for some time."""

    def __init__(self) -> None:
        self.left = 20

    def __call__(self) -> float:
        if self.left:
            self.left -= 1
            time.sleep(0.02)
        return time.monotonic()
