"""Limits what a process may reserve and how long it may compute, and explains memory errors that come of the shell's
limits (`ulimit -v`, `ulimit -d`).
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tightfit.runtime.common.units import MIB, format_size

LIMITS = (
    (resource.RLIMIT_AS, "address space", "v", 1024 * MIB),
    (resource.RLIMIT_DATA, "data segment", "d", 256 * MIB),
)
"""(limit, name, ulimit's letter, bytes that are hardly enough): on two cores, planning a small decoder takes 900 MiB of
address space and 230 MiB of data segment"""
LEAST_BYTES = 256 * MIB
"""of address space, below which no solver is loaded: a process that has loaded the planner and solved nothing takes 230
MiB"""
SIGNS = ("allocate memory", "bad_alloc", "memoryerror", "memory could not be had", "failed to map", "start new thread")
"""parts of the messages with which Python, PyTorch, libraries and the loader report that they got no memory, in lower
case"""
NEARLY = 0.9
"""share of the limit from which on it counts as nearly reached"""


@contextmanager
def allocating(most: int) -> Iterator[None]:
    """While entered, this process may reserve at most `most` bytes more than it has: beyond that any of its threads
    gets a MemoryError.
    """
    before, highest = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/statm") as file:
        bound = int(file.read().split()[5]) * resource.getpagesize() + most
    bound = min([bound, *(limit for limit in (before, highest) if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_DATA, (bound, highest))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, highest))


@contextmanager
def processor_time(most: float, error: Exception) -> Iterator[None]:
    """While entered, this process may compute for `most` seconds: then its main thread gets the error, also within a
    match of a regular expression. Nothing is limited for other threads.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, most)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def limited(*, hardly_enough: bool = False) -> str | None:
    """Describe the limit on what this process, and each process that it starts, may reserve; None if there is none.

    With `hardly_enough`, only a limit below the least that planning needs counts.
    """
    for number, name, letter, least in LIMITS:
        limit = resource.getrlimit(number)[0]
        if limit != resource.RLIM_INFINITY and (limit < least or not hardly_enough):
            return f"the {name} of this process is limited to {format_size(limit)} (ulimit -{letter} {limit >> 10})"
    return None


def enough_for_a_solver() -> None:
    """Raise MemoryError if the limit is below what loading a solver takes: without memory, libraries may end the
    process.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < LEAST_BYTES:
        raise MemoryError


def memory_advice(message: str, *, unexpected: bool) -> str | None:
    """Advice on an error with this `message`, if it comes of such a limit; else None.

    Libraries that get no memory fail with messages of all kinds. So an `unexpected` error is attributed to the limit if
    the limit was nearly reached, whatever the message.
    """
    limit = limited()
    if limit is None or not (any(sign in message.lower() for sign in SIGNS) or (unexpected and _nearly_reached())):
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
