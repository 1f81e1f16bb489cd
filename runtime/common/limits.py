"""What the shell lets a process reserve (`ulimit -v`, `ulimit -d`), told where memory cannot be had."""

from __future__ import annotations

import resource

from tightfit.runtime.common.units import MIB, format_size

LIMITS = (
    (resource.RLIMIT_AS, "address space", "v", 1024 * MIB),
    (resource.RLIMIT_DATA, "data segment", "d", 256 * MIB),
)
"""with what is hardly enough of each: on two cores a small decoder is planned in 900 and 230 MiB"""
LEAST_BYTES = 256 * MIB
"""of which a process that has loaded the planner and solved nothing yet takes 230"""
SIGNS = ("allocate memory", "bad_alloc", "memoryerror", "memory could not be had", "failed to map", "start new thread")
"""of what Python, PyTorch, libraries and the loader say, lower case"""
NEARLY = 0.9


def limited(*, hardly_enough: bool = False) -> str | None:
    """What limits the memory of this process and, each by itself, of those that it starts, in words; None: nothing does."""
    for number, what, letter, least in LIMITS:
        limit = resource.getrlimit(number)[0]
        if limit != resource.RLIM_INFINITY and (limit < least or not hardly_enough):
            return f"the {what} of this process is limited to {format_size(limit)} (ulimit -{letter} {limit >> 10})"
    return None


def enough_for_a_solver() -> None:
    """Raise MemoryError where the shell's limit is below what loading alone takes: libraries that find none may end the process."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < LEAST_BYTES:
        raise MemoryError


def way_out(words: str, *, unexpected: bool) -> str | None:
    """What to do about an error that says `words`, where it comes of such a limit.

    Without memory libraries fail in words of all kinds: an `unexpected` error is taken for one of these where the limit was
    nearly reached.
    """
    limit = limited()
    if limit is None or not (any(sign in words.lower() for sign in SIGNS) or (unexpected and _nearly_reached())):
        return None
    return (
        f"{limit}, and PyTorch and the solvers reserve far more than they use; start it from a shell without this limit"
    )


def _nearly_reached() -> bool:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    try:
        with open("/proc/self/status") as file:
            peak = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmPeak:"))
    except (OSError, StopIteration):
        return False
    return limit != resource.RLIM_INFINITY and peak > NEARLY * limit
