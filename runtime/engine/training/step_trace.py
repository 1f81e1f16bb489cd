"""The trace of a step: how long each instruction and each transfer took, for `tightfit.runtime.session.rehearsal`.

Two files of float32 seconds in the run's folder, which grow with every traced step. `INSTRUCTIONS` has two figures for
each instruction of the schedule: its own seconds, and those in which it waited for the disk. `TRANSFERS` has two for
each transfer in the order of their requests: when it began and ended, counted from the step's start. Both are written
in pieces of `PIECE` figures, whose memory is taken at the start: an array that grows while operators run leaves holes
in the heap, up to 2 MB of them, which a run without a trace does not hold.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable
from typing import Any

from tightfit.runtime.common.files import write_all

INSTRUCTIONS, TRANSFERS = "trace.instructions", "trace.transfers"
PIECE = 1024
"""figures that are written at once"""


class StepTrace:
    """Records the steps between `begin` and `end`."""

    def __init__(self, folder: str) -> None:
        self._files = [
            os.open(os.path.join(folder, name), os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o644)
            for name in (INSTRUCTIONS, TRANSFERS)
        ]
        self._figures = [array("f", bytes(4 * PIECE)) for _ in self._files]
        self._filled = [0, 0]
        self._began = self._waited = 0.0

    def begin(self) -> None:
        self._began, self._waited = time.perf_counter(), 0.0

    def instruction(self, seconds: float, waited: float) -> None:
        """Record an instruction. `waited`: seconds that the step has waited for the disk since it began."""
        stalled = waited - self._waited
        self._waited = waited
        self._add(0, seconds - stalled, stalled)

    def transfer(self, make: Callable[..., Any], *arguments: Any) -> None:
        """Make a transfer and record it; called in the channel's thread."""
        begun = time.perf_counter()
        make(*arguments)
        self._add(1, begun - self._began, time.perf_counter() - self._began)

    def end(self) -> None:
        """Write what is left of the step, whose transfers are all done."""
        self._write(0)
        self._write(1)

    def close(self) -> None:
        for file in self._files:
            os.close(file)

    def _add(self, kind: int, first: float, second: float) -> None:
        figures, filled = self._figures[kind], self._filled[kind]
        figures[filled], figures[filled + 1] = first, second
        self._filled[kind] = filled + 2
        if filled + 2 == PIECE:
            self._write(kind)

    def _write(self, kind: int) -> None:
        write_all(self._files[kind], memoryview(self._figures[kind])[: self._filled[kind]].cast("B"))
        self._filled[kind] = 0
