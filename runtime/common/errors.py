"""The exceptions that tightfit raises, and the exit code that the command line makes of each.

TightfitError            exit code 2: bad input, unless a subclass says otherwise
├── InputError           2  a file, option or value that cannot be used
├── InfeasibleError      3  no plan fits the budget, or none was found; carries the smallest
├── RunError             4  the run failed (disk full, interrupted, child died)
│   └── MemberGoneError     another member of the fleet has ended
└── CapError             5  the measured memory reached the cap
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class TightfitError(Exception):
    """Its message says what was wrong, with the value, and what to do. `exit_code` is the command line's."""

    exit_code = 2


class InputError(TightfitError):
    exit_code = 2


class InfeasibleError(TightfitError):
    exit_code = 3

    def __init__(self, message: str, minimum_budget_bytes: int | None = None) -> None:
        super().__init__(message)
        self.minimum_budget_bytes = minimum_budget_bytes


class RunError(TightfitError):
    exit_code = 4
    interrupted = False
    """whether a signal asked the run to end; a program that runs several should then end too"""


class MemberGoneError(RunError):
    """Another member of a fleet has ended, or does not answer any more. `member` is its name."""

    def __init__(self, message: str, member: str) -> None:
        super().__init__(message)
        self.member = member


class CapError(TightfitError):
    exit_code = 5


@contextmanager
def named(place: object) -> Iterator[None]:
    """Put `place` before the message of an InputError raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
