"""Signals that ask to end: Ctrl-C is remembered by the planner, and all of them are passed on by a run, which saves first."""

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
"""Ctrl-C, what containers and batch systems send, and a terminal that is closed"""
IMPATIENT_SECONDS = 1.0
"""between a Ctrl-C and the next: sooner it is the same one, which `timeout` and some shells send to each process and to its group"""


class Interrupts:
    """While entered, Ctrl-C is `seen`, whatever becomes of the KeyboardInterrupt that it raises."""

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


class GivenUp(KeyboardInterrupt):
    """A third Ctrl-C: the child that the second could not kill is left to itself."""


class PassedOn:
    """Signals to end on their way to a child, and whether there were any (`asked`)."""

    def __init__(self) -> None:
        self.asked = False
        self._pressed: list[float] = []  # when Ctrl-C was, each time that counts
        self._child: subprocess.Popen[bytes] | None = None

    def to(self, child: subprocess.Popen[bytes]) -> None:
        """From now on; what came before is told to it now."""
        self._child = child
        if self.asked:
            child.terminate()

    def take(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        now = time.monotonic()
        if number == signal.SIGINT and (not self._pressed or now - self._pressed[-1] > IMPATIENT_SECONDS):
            self._pressed.append(now)
        if self._child:
            end = self._child.kill if len(self._pressed) > 1 else self._child.terminate
            end()
        if len(self._pressed) > 2:
            raise GivenUp


@contextmanager
def passed_on() -> Iterator[PassedOn]:
    """While entered, a signal to end becomes a SIGTERM of the child, which saves and ends: a shell's background jobs ignore Ctrl-C.

    A second Ctrl-C kills the child, a third raises GivenUp.
    """
    passing = PassedOn()
    with _handling(ENDING, passing.take):
        yield passing


@contextmanager
def _handling(numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals that are ignored stay so: a shell starts background jobs without Ctrl-C, and nohup without the terminal's end.

    So do those but Ctrl-C that the program handles itself.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    taken = {
        number: old
        for number, old in before.items()
        if old is signal.SIG_DFL or (number == signal.SIGINT and old not in (signal.SIG_IGN, None))
    }
    try:
        for number in taken:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in taken.items():
            signal.signal(number, old)
