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


@contextmanager
def passed_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """While entered, a signal to end becomes a SIGINT of the child, which saves and ends; a second Ctrl-C kills it."""
    asked: float | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        now = time.monotonic()
        if number == signal.SIGINT and asked is not None and now - asked > IMPATIENT_SECONDS:
            child.kill()
        else:
            asked = asked or now
            child.send_signal(signal.SIGINT)

    with _handling(ENDING, pass_on):
        yield


@contextmanager
def _handling(numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals that are ignored stay so: a shell starts background jobs without Ctrl-C, and nohup without the terminal's end."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    taken = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in taken:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in taken.items():
            signal.signal(number, old)
