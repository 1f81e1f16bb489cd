"""Handles signals that ask the program to end: records Ctrl-C for the planner, and passes signals on to a run's
child.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; what containers and batch systems send; what the kernel sends when a terminal is closed"""
IMPATIENT_SECONDS = 1.0
"""A SIGINT within this time after another counts as the same Ctrl-C: `timeout` and some shells send it to each process
and again to its group."""


class Interrupts:
    """While entered, Ctrl-C sets `seen` before it raises KeyboardInterrupt, which other code may swallow."""

    def __init__(self) -> None:
        self.seen = False
        self._handling = _handling((signal.SIGINT,), self._noticed)

    def __enter__(self) -> Self:
        self._handling.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handling.__exit__(kind, error, trace)

    def _noticed(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        raise KeyboardInterrupt


class ThirdInterrupt(KeyboardInterrupt):
    """A third Ctrl-C was pressed: stop waiting for the child, which the second could not kill."""


class SignalRelay:
    """Passes signals that ask to end on to child processes; `asked` says whether there were any."""

    def __init__(self) -> None:
        self.asked = False
        self._pressed: list[float] = []  # times of each separate Ctrl-C
        self._children: list[subprocess.Popen[bytes]] = []

    def to(self, child: subprocess.Popen[bytes]) -> None:
        """Pass signals on to `child` too from now on; one that came before is passed on now."""
        self._children.append(child)
        if self.asked:
            child.terminate()

    def take(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        now = time.monotonic()
        if number == signal.SIGINT and (not self._pressed or now - self._pressed[-1] > IMPATIENT_SECONDS):
            self._pressed.append(now)
        for child in self._children:
            end = child.kill if len(self._pressed) > 1 else child.terminate
            end()
        if len(self._pressed) > 2:
            raise ThirdInterrupt


@contextmanager
def relayed_signals() -> Iterator[SignalRelay]:
    """While entered, a signal that asks to end is passed on to the children as SIGTERM, on which they save and end.

    SIGTERM is used because background jobs of a shell ignore SIGINT. A second Ctrl-C kills them, a third raises
    GivenUp.
    """
    passing = SignalRelay()
    with _handling(ENDING, passing.take):
        yield passing


@contextmanager
def _handling(numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Set `handler` for these signals while entered, except for signals that are ignored or that the program handles
    itself.

    Shells start background jobs with SIGINT ignored, and nohup ignores SIGHUP; that stays so. For SIGINT a handler of
    the program, such as Python's own, is replaced all the same.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    replaced = {
        number: former
        for number, former in before.items()
        if former is signal.SIG_DFL or (number == signal.SIGINT and former not in (signal.SIG_IGN, None))
    }
    try:
        for number in replaced:
            signal.signal(number, handler)
        yield
    finally:
        for number, former in replaced.items():
            signal.signal(number, former)
