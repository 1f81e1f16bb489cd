"""Shows the progress of long work on stderr: live bars on a terminal, an occasional plain line elsewhere."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from tightfit.runtime.common.errors import RunError
from tightfit.runtime.common.interrupts import Interrupts
from tightfit.runtime.common.units import format_seconds
from tightfit.runtime.supervision.progress import QUIET_SECONDS


class _Messages(Console):
    def on_broken_pipe(self) -> None:
        """Raise RunError if the reader of stderr has closed it; rich would end the process with a code of its own."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # further words go nowhere
        raise RunError("messages cannot be shown any more: what read stderr has ended")


def messages() -> Console:
    """The console for messages and progress, on stderr, so that stdout holds results alone.

    Text is printed as it is, without rich's markup, since paths may have brackets and colons.
    """
    return _Messages(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


class Display:
    """A progress display over one piece of work; on a terminal a live bar, elsewhere sparse plain lines."""

    def __init__(
        self,
        console: Console,
        *columns: TextColumn | BarColumn | SpinnerColumn | MofNCompleteColumn | TimeElapsedColumn,
    ) -> None:
        self.console = console
        self.live = console.is_terminal
        self._bars = Progress(*columns, console=console, transient=True, disable=not self.live)
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def _line(self, text: str, *, now: bool = False) -> None:
        """Print a plain line if stderr is not a terminal and none was printed lately, or if `now`."""
        moment = time.monotonic()
        if not self.live and (now or moment - self._last_line >= QUIET_SECONDS):
            self.console.print(text, markup=False)
            self._last_line = moment


class StagesDisplay(Display):
    """Stages that follow each other: tracing, packing, measuring. Called with (stage, done, total)."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
        )
        self._stage: str | None = None
        self._task: TaskID | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._stage, self._task = stage, self._bars.add_task(stage, total=total)
            self._line(f"{stage} …", now=True)
        elif done < total:
            self._line(f"{stage}: {done / total:.0%}")
        assert self._task is not None
        self._bars.update(self._task, completed=done, total=total)


class SolvingDisplay(Display):
    """A solver at work: best step so far, proven bound, gap, seconds."""

    def __init__(self, console: Console, time_limit: float) -> None:
        super().__init__(
            console, SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
        )
        self._limit = time_limit
        self._begun = time.monotonic()
        self._task = self._bars.add_task("solving", total=time_limit)

    def __call__(self, report: Mapping[str, float | str]) -> None:
        """Show what the planner reports: `stage`, `incumbent` and `bound` (seconds per step; 0: none yet) and `gap`."""
        text = f"solving {solver_text(report)}"
        elapsed = time.monotonic() - self._begun
        self._bars.update(self._task, description=text, completed=min(elapsed, self._limit))
        self._line(f"{text}, {elapsed:.0f} s")


class ComparisonDisplay(Display):
    """A comparison at work: which plan is being made, how many are done, and how far the solver is."""

    def __init__(self, console: Console, interrupts: Interrupts) -> None:
        super().__init__(
            console,
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._interrupts = interrupts
        self._task = self._bars.add_task("planning", total=None)
        self._what = "planning"
        self._done = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show the next of `total` plans. Raises KeyboardInterrupt if Ctrl-C was pressed during the plan before.

        The planner takes a Ctrl-C as the end of its search and returns the best plan so far; no further plan is begun.
        """
        self._what = what
        self._bars.update(self._task, description=what, completed=done, total=total)
        self._line(f"{what}: {done} of {total}", now=done == 0)
        if self._interrupts.seen and done < total:
            raise KeyboardInterrupt

    def solving(self, report: Mapping[str, float | str]) -> None:
        """Show what the planner reports of the plan that it is working on."""
        text = f"{self._what} {solver_text(report)}"
        self._bars.update(self._task, description=text)
        self._line(text)

    def elsewhere(self, report: Mapping[str, Any]) -> None:
        """Show what a service reports of a comparison: that a plan is made, or how far the solver is."""
        if "cell" in report:
            self(report["stage"], report["done"], report["total"])
        else:
            self.solving(report)


def solver_text(report: Mapping[str, float | str]) -> str:
    """Stage, best step so far, proven bound and gap, as far as they are known."""
    incumbent, bound = float(report["incumbent"]), float(report["bound"])
    parts = [f"({report['stage']})"]
    if 0 < incumbent < math.inf:
        parts.append(f"step {format_seconds(incumbent)}")
    if bound > 0:
        parts.append(f"bound {format_seconds(bound)}")
    if len(parts) == 3:
        parts.append(f"gap {report['gap']:.2%}")
    return ", ".join(parts)
