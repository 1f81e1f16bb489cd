"""The evaluations that a run makes between its steps: when one is due, which was the best, when they end the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

STATE = "evaluations"
"""key in the state of a checkpoint"""


@dataclass(kw_only=True)
class Evaluations:
    """The evaluations so far, and what follows from them. They belong to one held-out data set."""

    every: int
    """steps between evaluations"""
    last: int
    """the last step of the run, after which there is one in any case"""
    patience: int | None
    """evaluations in a row that are no better than the best, after which the run ends; None: it goes on"""
    data: str
    """fingerprint of the held-out data"""
    step: int = 0
    """the step after which the latest was made; 0: there is none yet"""
    latest: dict[str, Any] | None = None
    """result of the latest, as `tightfit.runtime.engine.training.trainer.Training.evaluate` returns it"""
    best: dict[str, Any] | None = None
    """`step`, `loss` and `accuracy` of the best"""
    since_best: int = 0
    """evaluations after the best"""

    @classmethod
    def of(cls, header: Mapping[str, Any], data: str | None, state: Mapping[str, Any]) -> Evaluations | None:
        """Those that the settings in a job's `header` ask for, with what the state of a checkpoint knows of earlier
        ones.

        None where there are no held-out data or none is asked for between the steps.
        """
        if data is None or not header.get("eval_every"):
            return None
        known = state.get(STATE) or {}
        return cls(
            every=header["eval_every"],
            last=header["steps"],
            patience=header["early_stopping"],
            data=data,
            **{name: known[name] for name in ("step", "latest", "best", "since_best") if known.get("data") == data},
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of them."""
        return {name: value for name, value in asdict(self).items() if name not in ("every", "last", "patience")}

    def due(self, step: int) -> bool:
        """Whether one is due after `step` that was not made yet."""
        return step > self.step and (step % self.every == 0 or step == self.last)

    def add(self, step: int, result: Mapping[str, Any]) -> bool:
        """Note the result of the evaluation after `step`; returns whether it is the best so far.

        Of evaluations with questions the one of the highest accuracy is the best, of equal ones and of those without
        the one of the lowest loss.
        """
        self.step, self.latest = step, dict(result)
        better = not math.isnan(result["loss"]) and (self.best is None or _merit(result) > _merit(self.best))
        if better:
            self.best = {"step": step, "loss": result["loss"], "accuracy": result["accuracy"]}
        self.since_best = 0 if better else self.since_best + 1
        return better

    @property
    def over(self) -> bool:
        """Whether the run ends before its last step, since none has been better than the best for as long as it was
        asked to wait.
        """
        return self.patience is not None and self.since_best >= self.patience and self.step < self.last


def _merit(result: Mapping[str, Any]) -> tuple[float, float]:
    accuracy = result["accuracy"]
    return (0.0 if accuracy is None else accuracy, -result["loss"])
