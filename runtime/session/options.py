"""The options of a run: what each may be, whichever door they come through."""

from __future__ import annotations

import operator
from typing import Any

from tightfit.runtime.common.errors import InputError

SCHEDULES = ("constant", "linear", "cosine")
LARGEST_SEED = 10**12
"""each step's own seed is a million times as large, and 64 bits hold it"""
LEAST = {"steps": 1, "warmup_steps": 0, "seed": 0, "checkpoint_every": 0, "keep_checkpoints": 1}
"""of the options that are whole numbers"""


def checked(**options: Any) -> dict[str, Any]:
    """`options` as Python's own numbers, whatever of numpy or torch they were: they are written down as JSON.

    Raises InputError that names the option, its value and what it may be.
    """
    return {name: _checked(name, value) for name, value in options.items()}


def finite(name: str, value: Any) -> float:
    """A learning rate or a weight decay. Raises InputError for what is none."""
    try:
        number = float("nan") if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch's, of a tensor with several elements
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise InputError(f"{name} {value}: give a finite number of at least 0")
    return number


def _checked(name: str, value: Any) -> Any:
    if name == "schedule":
        if not isinstance(value, str) or value not in SCHEDULES:
            raise InputError(f"schedule {value!r} is not known; choose one of {', '.join(SCHEDULES)}")
        return value
    return whole(name, value) if name in LEAST else finite(name, value)


def whole(name: str, value: Any) -> int:
    """Raises InputError for what is no whole number, or not in the range of the option."""
    try:
        number = int(operator.index(value))
    except TypeError as error:
        raise InputError(f"{name} {value!r}: give a whole number") from error
    if number < LEAST[name]:
        raise InputError(f"{name} {number}: give at least {LEAST[name]}")
    if name == "seed" and number > LARGEST_SEED:
        raise InputError(f"seed {number}: give at most {LARGEST_SEED}")
    return number
