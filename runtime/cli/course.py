"""How far `tightfit train` has come, as a file in the output folder: each stage is a program of its own in one process.

What a stage has loaded is gone when the next one begins, since the process becomes a new program (exec); its number,
its terminal and the lock on the folder stay. So a small device holds no planner while it measures, and nothing but a
supervisor beside a rehearsal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel

from tightfit.runtime.common.interpreter import command, replace_process
from tightfit.runtime.common.strict_json import read_json

COURSE = ".course.json"
BEGIN, MEASURE, PLAN, REHEARSE, LEARN = "begin", "measure", "plan", "rehearse", "learn"
SMALLER, RUN = "smaller", "run"
NAMES = {
    BEGIN: "reading the data",
    MEASURE: "measuring",
    PLAN: "planning",
    REHEARSE: "rehearsing",
    LEARN: "learning",
    SMALLER: "planning for less",
}
"""stage -> what it does, in words"""


class Course(BaseModel):
    """What the stages of `tightfit train` leave for each other, beside profile, plan and options."""

    lock: int | None = None
    """descriptor of the lock on the output folder"""
    resume: bool = False
    overwrite: bool = False
    """how the run begins"""
    rounds: int = 0
    """rehearsals so far"""
    folder: Path | None = None
    """where the present rehearsal lies"""
    others: tuple[float, float | None] | None = None
    """fields of the `OtherPrograms` that was made when it began"""
    stage_bytes: dict[str, tuple[int | None, int]] = {}
    """what a stage does -> bytes that it was predicted to hold, if that was predicted, and that it has held, its
    workers included
    """

    @classmethod
    def read(cls, output: Path) -> Course:
        return cls.model_validate(read_json(output / COURSE))

    def held(self, stage: str) -> None:
        """Note what this process and its workers have held in a stage."""
        from tightfit.profiles.worker_process import held_bytes, predicted_bytes
        from tightfit.runtime.engine.device.resident import memory

        name, own, predicted = NAMES[stage], memory().peak, predicted_bytes()
        earlier_predicted, earlier = self.stage_bytes.get(name, (None, 0))
        foreseen = max(earlier_predicted or 0, predicted) or None
        self.stage_bytes[name] = foreseen, max(earlier, own + held_bytes())

    def next_program(self, output: Path, words: Sequence[str], stage: str) -> list[str]:
        """The command line of the next stage, for which all is written down."""
        (output / COURSE).write_text(self.model_dump_json(), encoding="utf-8")
        assert self.lock is not None
        os.set_inheritable(self.lock, True)
        return command("tightfit.runtime.cli.main", "train", *words, f"--at={stage}")

    def become(self, output: Path, words: Sequence[str], stage: str) -> NoReturn:
        """Go on with another stage, as a new program in this process."""
        replace_process(self.next_program(output, words, stage))


@contextmanager
def forgotten(output: Path) -> Iterator[None]:
    """When the block ends, what the stages have left for each other is removed."""
    try:
        yield
    finally:
        with suppress(OSError):
            (output / COURSE).unlink(missing_ok=True)


def rehearsal_end(folder: Path) -> dict[str, Any] | None:
    """The error with which a rehearsal in `folder` ended; None: with none."""
    from tightfit.runtime.supervision.supervisor import REHEARSED

    failure: dict[str, Any] | None = read_json(folder / "out" / REHEARSED)
    return failure
