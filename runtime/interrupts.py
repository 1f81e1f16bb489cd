"""Ctrl-C, remembered: the planner turns it into its best plan so far, and C code into errors of its own."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """While entered, Ctrl-C is `seen`, whatever becomes of the KeyboardInterrupt that it raises."""

    def __init__(self) -> None:
        self.seen = False
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        # A background job of a shell is started with Ctrl-C ignored, and goes on ignoring it.
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._noticed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._before)

    def _noticed(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        raise KeyboardInterrupt
