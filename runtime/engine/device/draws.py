"""The key of an operator's random numbers, so that it draws the same ones wherever and however often it runs.

Also imported by the budgeted process: the standard library only.
"""

from __future__ import annotations

import hashlib


class Draws:
    """The training step and the layer for which operators draw now. The trainer sets `step`, the executor `layer`.

    Neither knows of the plan: a step's number is that of its micro-batch in the run, and layers have the names that the
    profile gives them. So every budget, every resumed run and every member of a fleet draws the same numbers.
    """

    __slots__ = ("layer", "seed", "step")

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        """seed of the run"""
        self.step: int | None = 0
        """number of the micro-batch, from 1; 0: before the first one, while kernels are warmed or measured; None: an
        evaluation, in which nothing is drawn
        """
        self.layer = ""

    def key(self, site: int) -> int:
        """64 bits, as a signed integer, that belong to seed, step, layer and place in the layer. Not for
        evaluations.
        """
        identity = f"{self.seed}:{self.step}:{self.layer}:{site}"
        return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "little", signed=True)
