"""Hands the metrics of a run to TensorBoard or Weights & Biases, from a process that is no part of the run.

A run's processes count against its budget, and these libraries take more memory than a run's supervisor; so a run
writes ``metrics.jsonl``, and whoever wants curves elsewhere starts `tightfit report` beside it, or afterwards.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.new_lines import NewLines
from tightfit.runtime.session.output import is_locked

LOOK_SECONDS = 1.0
SUFFIX = ".tightfit"
"""of the names of event files"""
EVALUATION = "eval_"
"""prefix of the figures of an evaluation"""
NO_FIGURES = ("step", "time")


class Tracker(Protocol):
    """A library that a run's figures are handed to."""

    def log(self, step: int, seconds: float, figures: dict[str, float]) -> None:
        """Take the `figures` after `step`; `seconds` since 1970 when they were made."""

    def flush(self) -> None:
        """See to it that what was logged so far can be looked at."""

    def close(self) -> None: ...


Open = Callable[[Path, dict[str, Any]], Tracker]
"""open(output folder of a run, first line of its metrics)"""


class TensorBoard:
    """An event file in the run's folder ``tensorboard``, in the place of the one that an earlier report made."""

    def __init__(self, out: Path, first: dict[str, Any]) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ModuleNotFoundError as error:
            raise _missing(error, "tensorboard") from error
        folder = out / "tensorboard"
        for old in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()
        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)

    def log(self, step: int, seconds: float, figures: dict[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=figure) for name, figure in figures.items()]
        self._writer.add_event(self._event(wall_time=seconds, step=step, summary=self._summary(value=values)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B of the same name as the output folder. Reported again, a run is the same one there: it is known by
    the first line of its metrics, whose seconds no other run shares.
    """

    def __init__(self, out: Path, first: dict[str, Any]) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise _missing(error, "wandb") from error
        identity = hashlib.sha256(json.dumps(first).encode()).hexdigest()[:16]
        # Project, entity and whether it works offline are said by WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE.
        try:
            self._run = wandb.init(id=identity, name=out.name, dir=str(out), resume="allow")
        except wandb.Error as error:
            raise RunError(f"W&B takes no run: {error}; `wandb login`, or set WANDB_MODE=offline") from error

    def log(self, step: int, seconds: float, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Open] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def track(out: Path, tracker: str, *, follow: bool, tell: Callable[[int], None] = lambda step: None) -> dict[str, int]:
    """Hand the metrics of the run in `out` to a `tracker`, one of `TRACKERS`; with `follow` until the run ends.

    `tell(step)` is called after each look at the file. Returns the numbers of steps and evaluations. Ctrl-C ends it as
    the run's end does. Raises InputError where there is no run, or the tracker is not installed.
    """
    if tracker not in TRACKERS:
        raise InputError(f"tracker {tracker!r} is not known; choose one of {', '.join(TRACKERS)}")
    out = out.absolute()
    lines = NewLines(out / "metrics.jsonl")
    opened: Tracker | None = None
    counts = {"steps": 0, "evaluations": 0}
    # A resumed run takes steps again, and the trackers know them already. An evaluation comes after its step.
    done = (-1, False)
    try:
        while True:
            running = follow and out.is_dir() and is_locked(out)
            for line in lines:
                position = (line["step"], EVALUATION + "loss" in line)
                if position <= done:
                    continue
                done = position
                opened = opened or TRACKERS[tracker](out, line)
                opened.log(line["step"], line.get("time", time.time()), _figures(line))
                counts["evaluations" if position[1] else "steps"] += 1
            if opened:
                opened.flush()
                tell(done[0])
            if not running:
                break
            time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        pass
    finally:
        if opened:
            opened.close()
    if opened is None:
        raise InputError(f"{out} holds no steps of a run; name the output folder of `tightfit run`")
    return counts


def _figures(line: dict[str, Any]) -> dict[str, float]:
    """The figures of a line of the metrics by the names under which trackers group them."""
    group = "eval" if EVALUATION + "loss" in line else "train"
    return {
        f"{group}/{name.removeprefix(EVALUATION)}": figure for name, figure in line.items() if name not in NO_FIGURES
    }


def _missing(error: ModuleNotFoundError, extra: str) -> InputError:
    return InputError(f"{error.name} is not installed: pip install 'tightfit[{extra}]'")
