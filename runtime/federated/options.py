"""The options of federated rounds, for the command line and the file of settings that the rounds' process reads."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator

from tightfit.profiles.option_fields import option
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.session.options import LARGEST_SEED, RateOptions, Schedule

LARGEST_ROUNDS = 1_000_000


class RoundOptions(RateOptions):
    """How a federated run goes, as its settings file has it. A new adapter and the order of the data are drawn by
    `seed`.
    """

    rounds: int = Field(ge=1, le=LARGEST_ROUNDS)
    fleet: str
    """path of the folder with the fleet's plan"""
    out: str
    least: int = option(1, "Devices that have to answer in a round.", word="--min", metavar="N", ge=1)
    timeout: float | None = option(
        None,
        "Of a round at most; three times what is planned and a minute if left out.",
        metavar="SECONDS",
        gt=0,
    )
    grace: float = option(
        30.0, "Of a round in which devices that are not there may still come.", metavar="SECONDS", ge=0
    )
    schedule: Schedule = option("constant", "Course of the learning rate over the rounds: constant, linear or cosine.")
    adapter: str = ""
    """folder of the adapter that the first round starts from; empty: a new one"""
    meet: str = "127.0.0.1"
    """split rounds: address of the server at which its runs listen, as devices reach it"""
    port: int = 29400
    """the first of the ports where they do, one for each device; 0: any that are free"""
    cgroup: bool = True
    """of these runs"""

    @model_validator(mode="after")
    def _seeds(self) -> Self:
        if self.seed + self.rounds > LARGEST_SEED:
            raise InputError(
                f"{spelled('seed')} {self.seed}: give at most {LARGEST_SEED - self.rounds}, since each round has a seed"
                " of its own"
            )
        return self

    def rate(self, number: int) -> float:
        """The learning rate of round `number`, counted from 1."""
        done = (number - 1) / self.rounds
        factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.lr * factor[self.schedule]
