"""Shows the progress of a run on stderr: one line that is redrawn on a terminal, an occasional plain line elsewhere.

The standard library only: the process that shows it counts against the budget of the run.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from tightfit.runtime.common.errors import RunError
from tightfit.runtime.common.units import MIB, format_size, padding_text

QUIET_SECONDS = 10.0
"""least time between two lines if stderr is not a terminal"""
BAR_CELLS = 10
COLUMNS = 80
"""width of a terminal that does not report one; the line of a step fits into it"""
ERASE_LINE = "\r\x1b[2K"
RED, PLAIN = "\x1b[31m", "\x1b[0m"
NEARLY_FULL = 0.995
"""share of the budget from which on the line is red"""


STAGE = re.compile(r"(?P<stage>.+?)(?: …|: (?P<done>\d+) of (?P<total>\d+))")
"""a line of `TrainingProgress.stage` where stderr is no terminal"""


def stage_of(line: str) -> dict[str, Any] | None:
    """What a line that a run has written to stderr says of its stage: `stage`, and how far it is, `done` of `total`,
    where the line says it; None for any other line.
    """
    found = STAGE.fullmatch(line.strip())
    if found is None:
        return None
    return {name: int(text) if text.isdigit() else text for name, text in found.groupdict().items() if text is not None}


class TrainingProgress:
    """Shows a run: what is prepared or evaluated (`stage`), and after each step loss, tokens per second, time left,
    memory.
    """

    def __init__(
        self,
        *,
        steps: int,
        tokens_per_step: int | None,
        budget: int,
        other_bytes: int = 0,
        epoch_steps: float | None = None,
        file: TextIO | None = None,
    ) -> None:
        """`tokens_per_step` counts the positions in a step's rows, padding included; None for a module.

        `other_bytes` is what the run's other processes hold; it is added to the training process's memory that each
        step reports. `epoch_steps` are the steps of an epoch; None if unknown. `file` is stderr by default.
        """
        self._steps, self._tokens, self._budget, self._other = steps, tokens_per_step, budget, other_bytes
        self._epoch_steps = epoch_steps
        self._file = file or sys.stderr
        self.live = self._file.isatty()
        self._stage: str | None = None
        self._pace: float | None = None
        self._real: float | None = None
        """moving mean of a step's tokens without padding"""
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._write(ERASE_LINE)

    def stage(self, what: str, done: int, total: int) -> None:
        """Show how far work beside the steps has come, such as preparing or evaluating: `done` of `total`."""
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
        """Show a finished step, counted from 1: its loss and seconds, and its `tokens` without padding, None if
        unknown.

        `resident` and `peak` are bytes of the training process, now and at its peak so far.
        """
        self._stage = None
        # The first steps are slower (pages are touched for the first time): a moving mean forgets them.
        self._pace = _moving_mean(self._pace, seconds)
        rate, padding = f"{self._pace:.3f} s per step", ""
        if tokens is not None:
            self._real = _moving_mean(self._real, tokens)
            rate = f"{self._real / self._pace:,.0f} tokens/s"
            padding = f" ({padding_text(1 - self._real / self._tokens)})" if self._tokens else ""
        left = round(self._pace * (self._steps - step))
        loss_text, left_text = f"loss {loss:.4f}", f"{left // 60}:{left % 60:02d} left"
        resident, peak = resident + self._other, peak + self._other
        memory = f"memory {format_size(resident)}, peak {format_size(peak)} of {format_size(self._budget)}"
        epoch = f"epoch {step / self._epoch_steps:.2f}" if self._epoch_steps else ""
        in_epoch = f" ({epoch})" if epoch else ""
        line = f"step {step}/{self._steps}{in_epoch}: {loss_text}, {rate}{padding}, {left_text}, {memory}"
        self._line(line, now=step == self._steps)
        if self.live:
            nearly_full = peak > NEARLY_FULL * self._budget
            used = f"{peak / MIB:.1f} of {format_size(self._budget)}"
            # The terminal's line has no room for the share of padding; the report has it.
            live_line = f"{_bar(step, self._steps)} {step}/{self._steps} {loss_text}, {rate}, {left_text}, {used}"
            with_epoch = live_line.replace(" loss", f" {epoch} loss") if epoch else live_line
            self._show(with_epoch if len(with_epoch) < self._columns else live_line, red=nearly_full)

    def evaluated(self, result: Mapping[str, Any]) -> None:
        """Show the result of an evaluation between the steps, as the training process tells it; it stays on a
        terminal.
        """
        accuracy = f", accuracy {result['eval_accuracy']:.3f}" if "eval_accuracy" in result else ""
        if "eval_reward_accuracy" in result:
            accuracy = f", chosen answer wins in {result['eval_reward_accuracy']:.1%}"
        best = ", the best so far" if result["best"] else ""
        over = "; the run ends, since none was better for as long as it was to wait" if result["over"] else ""
        text = f"evaluated after step {result['step']}: loss {result['eval_loss']:.4f}{accuracy}{best}{over}"
        self.note(text)

    def note(self, text: str) -> None:
        """Say what people should know about how the run goes; it stays on a terminal."""
        self._write(f"{ERASE_LINE}{text}\n" if self.live else f"{text}\n")

    @property
    def stepped(self) -> bool:
        """Whether any step was taken."""
        return self._pace is not None

    def _line(self, text: str, *, now: bool = False) -> None:
        """Write a plain line if stderr is not a terminal and none was written lately, or if `now`."""
        time_now = time.monotonic()
        if not self.live and (now or time_now - self._last_line >= QUIET_SECONDS):
            self._write(f"{text}\n")
            self._last_line = time_now

    def _show(self, text: str, *, red: bool = False) -> None:
        """Redraw the terminal's line with `text`, cut to the terminal's width."""
        text = text[: self._columns - 1]
        self._write(f"{ERASE_LINE}{RED}{text}{PLAIN}" if red else f"{ERASE_LINE}{text}")

    @property
    def _columns(self) -> int:
        """Width of the terminal."""
        return os.get_terminal_size(self._file.fileno()).columns or COLUMNS

    def _write(self, text: str) -> None:
        """Write to the file. Raises RunError if its reader has closed the pipe."""
        try:
            self._file.write(text)
            self._file.flush()
        except BrokenPipeError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())  # further words go nowhere
            raise RunError("messages cannot be shown any more: what read stderr has ended") from error


def _moving_mean(mean: float | None, value: float) -> float:
    """A moving mean with one more value."""
    return value if mean is None else 0.8 * mean + 0.2 * value


def _bar(done: int, total: int) -> str:
    cells = BAR_CELLS * done // max(total, 1)
    return "━" * cells + "┄" * (BAR_CELLS - cells)
