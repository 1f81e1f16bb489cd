"""The options of a run in one record, checked, for the command line and Python callers alike."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from typing import Any

from tightfit.runtime.common.errors import InputError

SCHEDULES = ("constant", "linear", "cosine")
LARGEST_SEED = 10**12
"""a step's own seed is about a million times as large, which must fit into 64 bits"""
LEAST = {"steps": 1, "warmup_steps": 0, "seed": 0, "checkpoint_every": 0, "keep_checkpoints": 1}
"""smallest value of each option that is a whole number"""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What decides how a run trains and saves; numbers of numpy and torch become Python's own, since they are written as JSON.

    Raises InputError, which names the option, its value and what it may be, for a value that is not allowed.
    """

    steps: int | None = None
    """steps in all; None: a Session, which ends when its program says so"""
    lr: float = 2e-4
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    """steps over which the learning rate rises from zero"""
    seed: int = 0
    """of the adapter's start and the order of the data"""
    checkpoint_every: int = 50
    """steps between checkpoints; 0: only at the end"""
    keep_checkpoints: int = 2
    packing: bool = True
    """whether samples of a language model share the rows of a training batch, where the model allows it"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.name != "steps":
                object.__setattr__(self, field.name, _checked(field.name, value))


def finite(name: str, value: Any) -> float:
    """`value` as a float, for a learning rate or weight decay. Raises InputError unless it is finite and at least 0."""
    try:
        number = float("nan") if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last from a torch tensor of several elements
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise InputError(f"{name} {value}: give a finite number of at least 0")
    return number


def _checked(name: str, value: Any) -> Any:
    if name == "packing":
        if not isinstance(value, bool):
            raise InputError(f"packing {value!r}: give True or False")
        return value
    if name == "schedule":
        if not isinstance(value, str) or value not in SCHEDULES:
            raise InputError(f"schedule {value!r} is not known; choose one of {', '.join(SCHEDULES)}")
        return value
    return whole(name, value) if name in LEAST else finite(name, value)


def whole(name: str, value: Any) -> int:
    """`value` as an int. Raises InputError if it is not a whole number, or not in the range of the option `name`."""
    try:
        number = int(operator.index(value))
    except TypeError as error:
        raise InputError(f"{name} {value!r}: give a whole number") from error
    if number < LEAST[name]:
        raise InputError(f"{name} {number}: give at least {LEAST[name]}")
    if name == "seed" and number > LARGEST_SEED:
        raise InputError(f"seed {number}: give at most {LARGEST_SEED}")
    return number
