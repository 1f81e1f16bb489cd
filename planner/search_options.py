"""What a search is given: a budget, a limit of time, a gap; checked, and how the time is shared out."""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, SupportsIndex

from tightfit.runtime.common.errors import InputError

if TYPE_CHECKING:
    pass


ANY_SHARE = 0.1
"""of the time limit, for the bound that holds for any schedule"""


LEAST_SHARE = 0.7
"""of the time limit, for the smallest budget where the one asked for may be below it, unless it clearly is not: what fits comes
before what is fast
"""


LONGEST_LIMIT = 1e9
"""seconds of a time limit: thirty years, which every solver's clock can count"""


FINISH_SECONDS = 6e-5
"""to write a plan down and replay it, per operator of the step: left out of what the search may take"""


HELD_SHARE = 0.05
"""of the time limit, at most, for as many times that as `HELD_UP` says: other programs may take most of the processor"""


def checked_budget(budget_bytes: object) -> int:
    """A budget as a plain int. Raises InputError where it is no int of bytes above 0."""
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, SupportsIndex):
        raise InputError(
            f"a budget is an int of bytes, not {budget_bytes!r}; `tightfit.parse_size` makes one of '600MiB'"
        )
    size = operator.index(budget_bytes)
    if size <= 0:
        raise InputError(f"a budget of {budget_bytes} bytes is no budget; name a positive size such as 600MiB")
    return size


def checked_limit(time_limit: object) -> float:
    """A time limit as a plain float. Raises InputError where it is no number of seconds above 0."""
    if not isinstance(time_limit, Real) or not 0 < float(time_limit) <= LONGEST_LIMIT:
        raise InputError(
            f"a time limit of {time_limit!r} s is none; name a number of seconds above 0, at most {LONGEST_LIMIT:.0e}"
        )
    return float(time_limit)


def checked_gap(gap: object) -> float:
    """A gap that is enough as a plain float. Raises InputError where it is no share of the step's time from 0 to below 1."""
    if isinstance(gap, bool) or not isinstance(gap, Real) or not 0 <= float(gap) < 1:
        raise InputError(
            f"a gap of {gap!r} is none; name a share of the step's time from 0 to below 1, such as 0.001 for 0.1 %"
        )
    return float(gap)


def finish_seconds(operators: int, time_limit: float) -> float:
    """Seconds of a time limit that are left to write a plan of so many operators down and replay it."""
    alone = FINISH_SECONDS * operators
    return max(alone, min(HELD_UP * alone, HELD_SHARE * time_limit))


Progress = Callable[[dict[str, float | str]], None]


HELD_UP = 4.0
"""times what they take on an idle machine: as much is left for them where it is within that share"""


NEIGHBOUR_BYTES = 50 << 20
"""by which the budgets differ at which it is asked what memory is worth"""
