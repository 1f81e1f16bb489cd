"""The trace of a step: how long each instruction and each transfer took, for `tightfit.runtime.session.rehearsal`.

Two files of float32 seconds in the run's folder, which grow with every traced step. `INSTRUCTIONS` has two figures for each
instruction of the schedule: its own seconds, and those in which it waited for the disk. `TRANSFERS` has two for each transfer in
the order of their requests: when it began and ended, counted from the step's start. Both are written in small pieces, so that a trace
takes `PIECE` figures of memory however long the schedule is.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable
from typing import Any

from tightfit.runtime.common.files import write_all

INSTRUCTIONS, TRANSFERS = "trace.instructions", "trace.transfers"
PIECE = 4096
"""figures that are written at once"""


class StepTrace:
    """Records the steps between `begin` and `end`."""

    def __init__(self, folder: str) -> None:
        self._files = [
            os.open(os.path.join(folder, name), os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o644)
            for name in (INSTRUCTIONS, TRANSFERS)
        ]
        self._figures = [array("f"), array("f")]
        self._began = self._waited = 0.0

    def begin(self) -> None:
        self._began, self._waited = time.perf_counter(), 0.0

    def instruction(self, seconds: float, waited: float) -> None:
        """Record an instruction. `waited`: seconds that the step has waited for the disk since it began."""
        stalled = waited - self._waited
        self._waited = waited
        figures = self._figures[0]
        figures.append(seconds - stalled)
        figures.append(stalled)
        if len(figures) >= PIECE:
            self._write(0)

    def transfer(self, make: Callable[..., Any], *arguments: Any) -> None:
        """Make a transfer and record it; called in the channel's thread."""
        begun = time.perf_counter()
        make(*arguments)
        self._figures[1].extend((begun - self._began, time.perf_counter() - self._began))

    def end(self) -> None:
        """Write what is left of the step, whose transfers are all done."""
        self._write(0)
        self._write(1)

    def close(self) -> None:
        for file in self._files:
            os.close(file)

    def _write(self, kind: int) -> None:
        write_all(self._files[kind], self._figures[kind].tobytes())
        del self._figures[kind][:]
