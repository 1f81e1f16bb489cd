"""The options of a search: checks of budget, time limit and gap, and the shares into which a time limit is divided."""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Real
from typing import SupportsIndex

from tightfit.runtime.common.errors import InputError

ANY_SHARE = 0.1
"""share of the time limit for the bound that holds for any schedule"""
LEAST_SHARE = 0.7
"""share of the time limit for the smallest budget, where the requested budget may be below it: finding a plan that fits
comes before finding a fast one
"""
LONGEST_LIMIT = 1e9
"""largest time limit in seconds: thirty years, which every solver can represent"""
FINISH_SECONDS = 6e-5
"""seconds per operator of the step for writing a plan down and replaying it; the search leaves them free"""
HELD_SHARE = 0.05
"""share of the time limit up to which the search leaves `HELD_UP` times as many seconds free, as other programs may use
the processor
"""
HELD_UP = 4.0
"""factor on the seconds that writing down and replaying take on an idle machine, applied within `HELD_SHARE` of the
time limit
"""
NEIGHBOUR_BYTES = 50 << 20
"""distance in bytes between the budgets whose bounds are compared to value memory"""
Progress = Callable[[dict[str, float | str]], None]


def checked_budget(budget_bytes: object) -> int:
    """A budget in bytes as a plain int. Raises InputError where it is not an int above 0."""
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, SupportsIndex):
        raise InputError(
            f"a budget is an int of bytes, not {budget_bytes!r}; `tightfit.parse_size` makes one of '600MiB'"
        )
    size = operator.index(budget_bytes)
    if size <= 0:
        raise InputError(f"a budget of {budget_bytes} bytes is no budget; name a positive size such as 600MiB")
    return size


def checked_limit(time_limit: object) -> float:
    """A time limit in seconds as a plain float. Raises InputError where it is not a number above 0, or above
    `LONGEST_LIMIT`.
    """
    if not isinstance(time_limit, Real) or not 0 < float(time_limit) <= LONGEST_LIMIT:
        raise InputError(
            f"a time limit of {time_limit!r} s is none; name a number of seconds above 0, at most {LONGEST_LIMIT:.0e}"
        )
    return float(time_limit)


def checked_gap(gap: object) -> float:
    """The gap at which a search may stop, as a plain float. Raises InputError where it is not a number from 0 to below
    1.
    """
    if isinstance(gap, bool) or not isinstance(gap, Real) or not 0 <= float(gap) < 1:
        raise InputError(
            f"a gap of {gap!r} is none; name a share of the step's time from 0 to below 1, such as 0.001 for 0.1 %"
        )
    return float(gap)


def finish_seconds(operators: int, time_limit: float) -> float:
    """Seconds of a time limit that the search leaves free for writing down and replaying a plan of
    so many operators.
    """
    alone = FINISH_SECONDS * operators
    return max(alone, min(HELD_UP * alone, HELD_SHARE * time_limit))
