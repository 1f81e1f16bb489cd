"""What a person sees of a run: one line that changes on a terminal, now and then a line elsewhere. Always on stderr.

The standard library only: the process that shows it counts against the budget of the run.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Self, TextIO

from tightfit.runtime.common.errors import RunError
from tightfit.runtime.common.units import MIB, format_size, padding_text

QUIET_SECONDS = 10.0
"""between two lines where stderr is no terminal"""
BAR_CELLS = 10
COLUMNS = 80
"""of a terminal that does not tell its width; what is shown of a step fits"""
ERASE_LINE = "\r\x1b[2K"
RED, PLAIN = "\x1b[31m", "\x1b[0m"
NEARLY_FULL = 0.995
"""of the budget, from which on the peak is shown in red"""


class TrainingProgress:
    """A run: what is prepared or evaluated (`stage`), and each step's loss, tokens per second, time left and memory."""

    def __init__(
        self,
        *,
        steps: int,
        tokens_per_step: int | None,
        budget: int,
        other_bytes: int = 0,
        file: TextIO | None = None,
    ) -> None:
        """`tokens_per_step` are the places for tokens in a step's rows, padding included; None of a module. `other_bytes` are what other
        processes of the run hold beside the training process, of whose memory each step tells.
        """
        self._steps, self._tokens, self._budget, self._other = steps, tokens_per_step, budget, other_bytes
        self._file = file or sys.stderr
        self.live = self._file.isatty()
        self._stage: str | None = None
        self._pace: float | None = None
        self._real: float | None = None
        """tokens of a step that are no padding"""
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._write(ERASE_LINE)

    def stage(self, what: str, done: int, total: int) -> None:
        """Something before, between or after the steps: `done` of `total`."""
        if what != self._stage:
            self._stage = what
            self._line(f"{what} …", now=True)
        elif done < total:
            self._line(f"{what}: {done} of {total}")
        if self.live:
            self._show(f"{what} {_bar(done, total)} {done}/{total}")

    def __call__(
        self, step: int, loss: float, seconds: float, resident: int, peak: int, tokens: int | None = None
    ) -> None:
        """One finished step, counted from 1; `seconds` it took, bytes that the training process holds now and held at its peak so far, and its
        `tokens`, padding left out.
        """
        self._stage = None
        # The first steps are slower (pages are touched for the first time): a moving mean forgets them.
        self._pace = _moved(self._pace, seconds)
        rate, padding = f"{self._pace:.3f} s per step", ""
        if tokens is not None:
            self._real = _moved(self._real, tokens)
            rate = f"{self._real / self._pace:,.0f} tokens/s"
            padding = f" ({padding_text(1 - self._real / self._tokens)})" if self._tokens else ""
        left = round(self._pace * (self._steps - step))
        loss_text, left_text = f"loss {loss:.4f}", f"{left // 60}:{left % 60:02d} left"
        resident, peak = resident + self._other, peak + self._other
        memory = f"memory {format_size(resident)}, peak {format_size(peak)} of {format_size(self._budget)}"
        told = f"step {step}/{self._steps}: {loss_text}, {rate}{padding}, {left_text}, {memory}"
        self._line(told, now=step == self._steps)
        if self.live:
            full = peak > NEARLY_FULL * self._budget
            held = f"{peak / MIB:.1f} of {format_size(self._budget)}"
            # Where a line has no room for it, the report alone tells how much is padding.
            bar = _bar(step, self._steps)
            self._show(f"{bar} {step}/{self._steps} {loss_text}, {rate}, {left_text}, {held}", red=full)

    @property
    def stepped(self) -> bool:
        """Whether any step was taken."""
        return self._pace is not None

    def _line(self, text: str, *, now: bool = False) -> None:
        """A plain line where there is no terminal and none was written lately, or `now`."""
        moment = time.monotonic()
        if not self.live and (now or moment - self._said >= QUIET_SECONDS):
            self._write(f"{text}\n")
            self._said = moment

    def _show(self, text: str, *, red: bool = False) -> None:
        """The line of a terminal, cut to its width."""
        text = text[: (os.get_terminal_size(self._file.fileno()).columns or COLUMNS) - 1]
        self._write(f"{ERASE_LINE}{RED}{text}{PLAIN}" if red else f"{ERASE_LINE}{text}")

    def _write(self, text: str) -> None:
        """Raises RunError where nobody reads it any more."""
        try:
            self._file.write(text)
            self._file.flush()
        except BrokenPipeError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())  # further words go nowhere
            raise RunError("messages cannot be shown any more: what read stderr has ended") from error


def _moved(mean: float | None, value: float) -> float:
    """A moving mean with one more value."""
    return value if mean is None else 0.8 * mean + 0.2 * value


def _bar(done: int, total: int) -> str:
    cells = BAR_CELLS * done // max(total, 1)
    return "━" * cells + "┄" * (BAR_CELLS - cells)
