"""The options of a run in records, for the command line, the service and Python callers alike."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SkipValidation, model_validator

from tightfit.profiles.measuring.cpu_load import WAIT_SECONDS
from tightfit.profiles.option_fields import Options, option
from tightfit.profiles.options import PathText
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled

LARGEST_SEED = 10**12
"""a step's own seed is about a million times as large, which must fit into 64 bits"""
MOST_STEPS = 10_000_000
LARGEST_SETTING = 3e38
"""of an optimizer, which counts in float32"""
EPOCHS = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?epochs?")
"""an interval in epochs, as in `1 epoch` and `0.5epochs`"""


def _interval(text: str) -> int | str:
    """An interval between evaluations as it was written: a number of steps, or of epochs."""
    if text.strip().isdecimal() and 1 <= int(text) <= MOST_STEPS:
        return int(text)
    if _epochs(text) > 0:
        return text
    raise ValueError("give a number of steps, at least 1, or of epochs as in '0.5 epochs'")


def _epochs(text: str) -> float:
    """The number of epochs in the words `text`; 0 where they are no interval in epochs."""
    match = EPOCHS.fullmatch(text.strip())
    return float(match[1]) if match else 0.0


Schedule = Literal["constant", "linear", "cosine"]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Interval = Annotated[str, Field(max_length=64), AfterValidator(_interval)]
ColumnName = Annotated[str, Field(pattern=r"^[^,=]{1,256}$")]
Batches = Annotated[Iterable[Any], SkipValidation]
"""of a module, which a program gives"""


class LengthOptions(Options):
    """How long a run goes on."""

    steps: int | None = option(
        None,
        "Steps in all, each of one batch; of a fleet, micro-batches of all members together.",
        ge=1,
        le=MOST_STEPS,
        primary=True,
    )
    """None: they follow from `epochs`, or in a Session, its program says when to end"""
    epochs: float | None = option(
        None,
        "How often to go through the data, in place of a number of steps; may be a fraction.",
        gt=0,
        le=MOST_STEPS,
        primary=True,
    )
    """None: `steps` says when to end"""


class RateOptions(Options):
    """The learning rate, the decay of weights, and the seed of random numbers."""

    lr: float = option(
        2e-4, "Learning rate of the plan's optimizer.", label="Learning rate", ge=0, le=LARGEST_SETTING, primary=True
    )
    weight_decay: float = option(0.0, "Decoupled weight decay.", ge=0, le=LARGEST_SETTING)
    seed: int = option(0, "Seed of the adapter's start, the order of the data and dropout.", ge=0, le=LARGEST_SEED)


class UpdateOptions(RateOptions):
    """The settings of the optimizer, the seed, and when checkpoints are written."""

    beta1: float | None = option(
        None, "Share that the first moment keeps at an update: 0.9 unless given (adamw, adam, lion).", ge=0, lt=1
    )
    beta2: float | None = option(
        None, "Share that the second moment keeps: 0.999 unless given; of lion's momentum 0.99.", ge=0, lt=1
    )
    eps: float | None = option(
        None,
        "Added to the root of the second moment: 1e-8 unless given (adamw, adam); of adafactor its smallest root,"
        " 1.2e-7.",
        ge=0,
        le=LARGEST_SETTING,
    )
    eps2: float | None = option(
        None,
        "Smallest root mean square of a tensor that its steps are scaled by: 0.001 unless given (adafactor).",
        ge=0,
        le=LARGEST_SETTING,
    )
    beta2_decay: float | None = option(
        None,
        "Exponent of an update's number that is the share of its gradient in the second moment: -0.8 unless given"
        " (adafactor).",
        le=0,
    )
    clip_threshold: float | None = option(
        None,
        "Largest root mean square of a step, before the learning rate: 1 unless given (adafactor).",
        ge=1,
        le=LARGEST_SETTING,
    )
    momentum: float | None = option(
        None, "Share that the momentum keeps at an update: 0.9 unless given (momentum).", ge=0, lt=1
    )
    checkpoint_every: int = option(50, "Steps between checkpoints; 0: only at the end.", ge=0, le=MOST_STEPS)
    keep_checkpoints: int = Field(2, ge=1)


class RehearsalOptions(Options):
    """How a plan is carried out before it is trusted."""

    rehearse: bool = option(
        True,
        "Carry the plan out for a few steps on made-up data, where its device is this machine: what they take is what a"
        " step is expected to take, and what they teach may make another plan.",
    )
    wait: bool = option(
        True,
        f"Before measuring, wait for other programs that use the cores, up to {WAIT_SECONDS:.0f} seconds each time.",
    )


class DataOptions(Options):
    """How files of samples become batches."""

    columns: Mapping[ColumnName, ColumnName] | None = option(
        None,
        "What the data call the parts of a sample, for example prompt=question,completion=answer.",
        metavar="NAME=COLUMN,...",
        max_length=16,
        primary=True,
    )
    truncate: bool = option(
        False, "Cut samples longer than the planned sequence instead of refusing them.", primary=True
    )
    packing: bool = option(
        False,
        "Let short samples share the rows of batches, in training and evaluations, each attending to itself alone.",
    )
    """where the model allows it"""


class TrainingOptions(DataOptions, UpdateOptions, LengthOptions):
    """What decides how a run trains.

    `tightfit run`, `tightfit fleet run`, the service's `/v1/runs` and the form on its page have the fields that are
    made by `option`. Raises InputError for options that exclude or need each other, too.
    """

    schedule: Schedule = option("constant", "Course of the learning rate: constant, linear or cosine.", primary=True)
    warmup_steps: int = option(
        0, "Steps over which the learning rate rises from zero.", label="Warm-up steps", ge=0, le=MOST_STEPS
    )
    warmup_ratio: float | None = option(
        None,
        "Warm-up as a share of all steps, for example 0.03.",
        label="Warm-up ratio",
        metavar="SHARE",
        ge=0,
        le=1,
        primary=True,
    )
    """rounded up to whole steps"""
    min_lr_ratio: float = option(
        0.0,
        "Share of the learning rate at which a linear or cosine schedule ends.",
        label="Last share of the rate",
        metavar="SHARE",
        ge=0,
        le=1,
    )
    eval_every: Steps | Interval | None = option(
        None,
        "Evaluate on the held-out data after every so many steps or epochs, too.",
        label="Evaluate every",
        metavar="STEPS|'N epochs'",
        primary=True,
    )
    """steps between evaluations, or epochs (``"1 epoch"``); None: only before the first step and after the last"""
    keep_best: bool = option(False, "Keep the adapter of the best evaluation in the folder best/.")
    early_stopping: int | None = option(
        None,
        "End after so many evaluations in a row that were no better than the best.",
        metavar="COUNT",
        ge=1,
        le=MOST_STEPS,
    )
    """None: the run takes all steps"""

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise InputError(f"{spelled('steps', self.steps)} and {spelled('epochs', self.epochs)}: give one of them")
        if self.warmup_steps and self.warmup_ratio is not None:
            raise InputError(
                f"{spelled('warmup_steps', self.warmup_steps)} and {spelled('warmup_ratio', self.warmup_ratio)}: give"
                " one of them"
            )
        if self.min_lr_ratio and self.schedule == "constant":
            raise InputError(
                f"{spelled('min_lr_ratio')} {self.min_lr_ratio:g}: the constant schedule does not fall; choose linear"
                " or cosine"
            )
        for name in ("keep_best", "early_stopping"):
            if getattr(self, name) and self.eval_every is None:
                raise InputError(
                    f"{spelled(name)}: there is one evaluation, after the last step; give {spelled('eval_every')}, the"
                    " steps between evaluations"
                )
        return self

    def check_end(self) -> None:
        """Raise InputError where nothing says when the run ends, as only the program of a Session does."""
        if self.steps is None and self.epochs is None:
            raise InputError(f"{spelled('steps')} is missing: give the number of steps, or {spelled('epochs')}")

    def over(self, epoch_steps: float | None, *, of_update: int) -> TrainingOptions:
        """These options with epochs and ratios turned into steps, where an epoch of the data is `epoch_steps` steps.

        The number of steps is a multiple of `of_update`, the steps of an update, and no less than the epochs asked for.
        """
        steps, every = self.steps, self.eval_every
        if self.epochs is not None:
            assert epoch_steps is not None
            # The product may lie above a whole number by a rounding error alone.
            steps = max(1, math.ceil(round(self.epochs * epoch_steps, 6) / of_update)) * of_update
        if isinstance(every, str):
            assert epoch_steps is not None
            every = max(1, round(_epochs(every) * epoch_steps))
        warmup = self.warmup_steps
        if self.warmup_ratio is not None:
            assert steps is not None
            warmup = math.ceil(steps * self.warmup_ratio)  # as transformers has it
        return self.but(steps=steps, epochs=None, warmup_steps=warmup, warmup_ratio=None, eval_every=every)


class CappedOptions(Options):
    """Who enforces the cap of a budgeted process, and who is told how far its preparation has come."""

    cgroup: bool = True
    """whether the kernel enforces the cap where it can; otherwise the process's own meter does alone"""
    stages: Any = None
    """is called with a stage, and how much of it is done"""


class EvaluationOptions(CappedOptions, DataOptions):
    """What an evaluation takes beside its plan and its data (`tightfit.runtime.results.evaluation.evaluate`)."""

    adapter: PathText | Path | None = option(
        None,
        "Folder of the adapter, or of the run that left it; default: none, the model as training would begin.",
        metavar="DIR",
    )


class EarlierRunOptions(Options):
    """What becomes of an earlier run's results in the output folder."""

    resume: bool = False
    overwrite: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.resume and self.overwrite:
            raise InputError(
                f"{spelled('resume')} goes on from what lies in the folder, {spelled('overwrite')} replaces it: give"
                " one of them"
            )
        return self


class OutputOptions(CappedOptions, EarlierRunOptions):
    """Where results go, and what becomes of those that lie there."""

    out: PathText | Path


class SessionOptions(OutputOptions, UpdateOptions):
    """What a Session takes (`tightfit.runtime.session.session`)."""


class RunOptions(OutputOptions, TrainingOptions):
    """What a run takes beside its plan and its data (`tightfit.runtime.session.launch.run`)."""

    eval_data: PathText | Path | Batches | None = option(
        None,
        "Held-out data, evaluated before and after.",
        over_http=(
            "Held-out data, evaluated before the first step and after the last, and every eval_every steps: a file or"
            " folder under an allowed root."
        ),
        label="Held-out data",
        word="--eval",
        metavar="DIR|FILE",
        primary=True,
    )
    adapter: PathText | Path | None = option(
        None,
        "Start from the adapter in this folder, as a run leaves it, instead of a new one.",
        over_http=(
            "Start from the adapter in this folder under an allowed root, of the plan's settings, instead of a new one."
        ),
        label="Start from an adapter",
        metavar="DIR",
        primary=True,
    )
    progress: Any = None
    """is called after every step"""
    member: Any = None
    """which member of a fleet runs its plan here (`tightfit.runtime.session.fleet.Membership`)"""
    tokens: Path | None = None
    """a folder in which the data may have been kept as tokens (`tightfit.runtime.session.train`)"""
