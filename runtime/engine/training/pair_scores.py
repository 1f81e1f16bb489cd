"""The scores of an evaluation on pairs of answers, and what else is read off their token losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tightfit.runtime.engine.training.pairs import DPO, ORPO

if TYPE_CHECKING:
    from torch import Tensor

SCORES = "tightfit.preference_scores"


def averaged(labels: Tensor) -> int:
    """Pairs in a batch's labels [2 * pairs, seq]: rows that are not all padding, halved."""
    return int((labels >= 0).any(1).sum()) // 2


def scores_of(
    kernel: Callable[..., None], losses: Tensor, labels: Tensor, known: Tensor, loss: str, beta: float
) -> list[Tensor]:
    """The results of `tightfit.runtime.engine.cpu.preference.preference_scores`, which is `kernel`, for a batch in host memory."""
    pairs = labels.shape[0] // 2
    made = [torch.empty(size, dtype=torch.float64) for size in (2 * pairs, pairs, pairs, pairs, pairs)]
    kernel(losses, labels, known, loss, beta, out=made)
    return made


def answers_of(kernel: Callable[..., None], losses: Tensor, labels: Tensor) -> list[float]:
    """The log-probability of the answer in each row, from token losses and labels, which are of answers alone."""
    known = torch.zeros(labels.shape[0], dtype=torch.float64)
    found: list[float] = scores_of(kernel, losses, labels, known, DPO, 1.0)[0].tolist()
    return found


class PairScores:
    """The scores of an evaluation on pairs, counted up batch by batch, so that they do not depend on the size of a batch."""

    def __init__(self, kernel: Callable[..., None], loss: str, beta: float) -> None:
        """`kernel` is the device's `SCORES`."""
        self._kernel, self._loss, self._beta = kernel, loss, beta
        self._pairs = self._right = 0
        self._terms = self._margins = self._unlikely = self._tokens = 0.0

    def add(self, losses: Tensor | None, inputs: Sequence[Tensor], rows: int) -> None:
        """Add a batch, whose first `rows` rows are pairs: the losses of its tokens, and its tensors."""
        assert losses is not None
        pairs = rows // 2
        made = scores_of(self._kernel, losses, inputs[1], inputs[2], self._loss, self._beta)
        terms, margins, unlikely, tokens = (one[:pairs] for one in made[1:])
        self._pairs += pairs
        self._right += int((margins > 0).sum())
        self._terms += float(terms.sum())
        self._margins += float(margins.sum())
        self._unlikely += float(unlikely.sum())
        self._tokens += float(tokens.sum())

    def result(self, seconds: float) -> dict[str, Any]:
        """As `tightfit.runtime.engine.training.trainer.Training.evaluate` returns it."""
        pairs = max(1, self._pairs)
        likelihood = self._unlikely / max(1.0, self._tokens) if self._loss == ORPO else 0.0
        return {
            "loss": self._terms / pairs + likelihood,
            "accuracy": None,
            "questions": 0,
            "records": 2 * self._pairs,
            "pairs": self._pairs,
            "reward_accuracy": self._right / pairs,
            "reward_margin": self._margins / pairs,
            "seconds": seconds,
        }
