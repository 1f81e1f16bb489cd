"""The options of a run in one record, checked, for the command line and Python callers alike."""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass, fields, replace
from typing import Any

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.options import option, said, types_of

SCHEDULES = ("constant", "linear", "cosine")
LARGEST_SEED = 10**12
"""a step's own seed is about a million times as large, which must fit into 64 bits"""
KEPT_SHARES = ("beta1", "beta2", "momentum")
"""options that say what share of a state an update keeps"""
EPOCHS = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?epochs?")
"""an interval in epochs, as in `1 epoch` and `0.5epochs`"""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What decides how a run trains and saves; numbers of numpy and torch become Python's own, since they are written as JSON.

    `tightfit run`, `tightfit fleet run`, the service's `/v1/runs` and the form on its page have the fields that are made
    by `option`, and take from there what they say of each (`tightfit.runtime.common.options`). Raises InputError, which names the option, its value
    and what it may be, for a value that is not allowed, and for options that exclude or need each other.
    """

    steps: int | None = option(
        None,
        "Steps in all, each of one batch; of a fleet, micro-batches of all members together.",
        least=1,
        primary=True,
    )
    """None: they follow from `epochs`, or in a Session, its program says when to end"""
    epochs: float | None = option(
        None, "How often to go through the data, in place of a number of steps; may be a fraction.", primary=True
    )
    """None: `steps` says when to end"""
    lr: float = option(2e-4, "Learning rate of the plan's optimizer.", label="Learning rate", least=0, primary=True)
    schedule: str = option(
        "constant", "Course of the learning rate: constant, linear or cosine.", choices=SCHEDULES, primary=True
    )
    warmup_steps: int = option(0, "Steps over which the learning rate rises from zero.", label="Warm-up steps", least=0)
    warmup_ratio: float | None = option(
        None,
        "Warm-up as a share of all steps, for example 0.03.",
        label="Warm-up ratio",
        metavar="SHARE",
        least=0,
        most=1,
        primary=True,
    )
    """rounded up to whole steps"""
    min_lr_ratio: float = option(
        0.0,
        "Share of the learning rate at which a linear or cosine schedule ends.",
        label="Last share of the rate",
        metavar="SHARE",
        least=0,
        most=1,
    )
    weight_decay: float = option(0.0, "Decoupled weight decay.", least=0)
    beta1: float | None = option(
        None, "Share that the first moment keeps at an update: 0.9 unless given (adamw, adam, lion).", least=0, most=1
    )
    beta2: float | None = option(
        None, "Share that the second moment keeps: 0.999 unless given; of lion's momentum 0.99.", least=0, most=1
    )
    eps: float | None = option(
        None,
        "Added to the root of the second moment: 1e-8 unless given (adamw, adam); of adafactor its smallest root, 1.2e-7.",
        least=0,
    )
    eps2: float | None = option(
        None,
        "Smallest root mean square of a tensor that its steps are scaled by: 0.001 unless given (adafactor).",
        least=0,
    )
    beta2_decay: float | None = option(
        None,
        "Exponent of an update's number that is the share of its gradient in the second moment: -0.8 unless given (adafactor).",
        most=0,
    )
    clip_threshold: float | None = option(
        None, "Largest root mean square of a step, before the learning rate: 1 unless given (adafactor).", least=1
    )
    momentum: float | None = option(
        None, "Share that the momentum keeps at an update: 0.9 unless given (momentum).", least=0, most=1
    )
    seed: int = option(0, "Seed of the adapter's start, the order of the data and dropout.", least=0, most=LARGEST_SEED)
    checkpoint_every: int = option(50, "Steps between checkpoints; 0: only at the end.", least=0)
    keep_checkpoints: int = 2
    eval_every: int | str | None = option(
        None,
        "Evaluate on the held-out data after every so many steps or epochs, too.",
        label="Evaluate every",
        metavar="STEPS|'N epochs'",
        primary=True,
    )
    """steps between evaluations, or epochs (``"1 epoch"``); None: only before the first step and after the last"""
    keep_best: bool = option(False, "Keep the adapter of the best evaluation in the folder best/.")
    early_stopping: int | None = option(
        None, "End after so many evaluations in a row that were no better than the best.", metavar="COUNT", least=1
    )
    """None: the run takes all steps"""
    packing: bool = option(
        False,
        "Let short samples share the rows of batches, in training and evaluations, each attending to itself alone.",
    )
    """where the model allows it"""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None or one.default is not None:
                object.__setattr__(self, one.name, _checked(one.name, value))
        if self.steps is not None and self.epochs is not None:
            raise InputError(f"{spelled('steps', self.steps)} and {spelled('epochs', self.epochs)}: give one of them")
        if self.warmup_steps and self.warmup_ratio is not None:
            raise InputError(
                f"{spelled('warmup_steps', self.warmup_steps)} and {spelled('warmup_ratio', self.warmup_ratio)}: give one of them"
            )
        for name in KEPT_SHARES:
            if getattr(self, name) == 1:
                raise InputError(f"{spelled(name)} 1: nothing would be learned; give a number from 0 to below 1")
        if self.min_lr_ratio and self.schedule == "constant":
            raise InputError(
                f"{spelled('min_lr_ratio')} {self.min_lr_ratio:g}: the constant schedule does not fall; choose linear or cosine"
            )
        for name in ("keep_best", "early_stopping"):
            if getattr(self, name) and self.eval_every is None:
                raise InputError(
                    f"{spelled(name)}: there is one evaluation, after the last step; give {spelled('eval_every')}, the steps between evaluations"
                )

    def check_end(self) -> None:
        """Raise InputError where nothing says when the run ends."""
        if self.steps is None and self.epochs is None:
            raise InputError(
                "a run needs its number of steps, or of epochs; only a Session goes on until its program ends it"
            )

    def over(self, epoch_steps: float | None, *, of_update: int) -> RunOptions:
        """These options with everything in steps, for data of which `epoch_steps` steps are an epoch.

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
        return replace(self, steps=steps, epochs=None, warmup_steps=warmup, warmup_ratio=None, eval_every=every)


LEAST = {name: int(one.least or 0) for name, one in said(RunOptions).items() if int in types_of(RunOptions, name)} | {
    "eval_every": 1,
    "keep_checkpoints": 1,
}
"""smallest value of each option that is a whole number"""


def finite(name: str, value: Any) -> float:
    """`value` as a float. Raises InputError unless it is finite and in the range that is said of the option `name`."""
    least, most = said(RunOptions)[name].least, said(RunOptions)[name].most
    number = _number(value)
    if math.isfinite(number) and (least is None or least <= number) and (most is None or number <= most):
        return number
    if least is not None and most is not None:
        raise InputError(f"{spelled(name)} {value}: give a number from {least:g} to {most:g}")
    raise InputError(
        f"{spelled(name)} {value}: give a finite number of at "
        + (f"least {least:g}" if least is not None else f"most {most:g}")
    )


def _number(value: Any) -> float:
    """`value` as a float; nan where it is no number."""
    try:
        return float("nan") if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last from a torch tensor of several elements
        return float("nan")


def _checked(name: str, value: Any) -> Any:
    if name == "packing":
        if not isinstance(value, bool):
            raise InputError(f"{spelled('packing')} {value!r}: give True or False")
        return value
    if name == "schedule":
        if not isinstance(value, str) or value not in SCHEDULES:
            raise InputError(f"{spelled('schedule')} {value!r} is not known; choose one of {', '.join(SCHEDULES)}")
        return value
    if name == "keep_best":
        return bool(value)
    if name == "epochs":
        if not 0 < (number := _number(value)) < float("inf"):
            raise InputError(f"{spelled('epochs')} {value}: give a finite number above 0")
        return number
    if name == "eval_every" and isinstance(value, str):
        return _interval(value)
    return whole(name, value) if name in LEAST else finite(name, value)


def _interval(text: str) -> int | str:
    """An interval between evaluations as it was written: a number of steps, or of epochs."""
    if text.strip().isdecimal():
        return whole("eval_every", int(text))
    if _epochs(text) > 0:
        return text
    raise InputError(f"{spelled('eval_every')} {text!r}: give a number of steps, or of epochs as in '0.5 epochs'")


def _epochs(text: str) -> float:
    """The number of epochs in the words `text`; 0 where they are no interval in epochs."""
    found = EPOCHS.fullmatch(text.strip())
    return float(found[1]) if found else 0.0


def whole(name: str, value: Any) -> int:
    """`value` as an int. Raises InputError if it is not a whole number, or not in the range of the option `name`."""
    try:
        number = int(operator.index(value))
    except TypeError as error:
        raise InputError(f"{spelled(name)} {value!r}: give a whole number") from error
    if number < LEAST[name]:
        raise InputError(f"{spelled(name)} {number}: give at least {LEAST[name]}")
    if name == "seed" and number > LARGEST_SEED:
        raise InputError(f"{spelled('seed')} {number}: give at most {LARGEST_SEED}")
    return number
