"""The loss of pairs of answers as a run counts it, and what else is read off their token losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tightfit.runtime.engine.training.pairs import DPO, ORPO

if TYPE_CHECKING:
    from torch import Tensor

    from tightfit.runtime.engine.training.records import TokenRecord

SCORES = "tightfit.preference_scores"


def scores_of(
    kernel: Callable[..., None], losses: Tensor, labels: Tensor, known: Tensor, loss: str, beta: float
) -> list[Tensor]:
    """The results of `tightfit.runtime.engine.cpu.preference.preference_scores`, which is `kernel`, for a batch in host
    memory.
    """
    places = labels.numel()
    sizes: list[tuple[int, ...]] = [(places,), (places // 2,), (places // 2,), (), ()]
    made = [torch.empty(size, dtype=torch.float64) for size in sizes]
    kernel(losses, labels, known, loss, beta, out=made)
    return made


def answers_of(kernel: Callable[..., None], losses: Tensor, labels: Tensor, known: Tensor) -> list[float]:
    """The log-probability of each answer of a batch, by its number."""
    found: list[float] = scores_of(kernel, losses, labels, known, DPO, 1.0)[0].tolist()
    return found


class PairLoss:
    """Of DPO or ORPO (`tightfit.runtime.engine.training.losses.Loss`): a mean over pairs."""

    def __init__(self, kernel: Callable[..., None], loss: str, beta: float) -> None:
        """`kernel` is the device's `SCORES`."""
        self._kernel, self._loss, self._beta = kernel, loss, beta
        self.refers = loss == DPO

    def weight(self, inputs: Sequence[Tensor]) -> int:
        """Pairs of the batch, whose answers are numbered."""
        return (int(inputs[-1][0].max()) + 2) // 2

    def of_step(self, losses: Tensor | None, inputs: Sequence[Tensor], samples: int | None) -> dict[str, float]:
        """The share of the pairs in which the chosen answer has the higher reward, and the margin; nothing where the
        number of pairs is unknown.
        """
        if not samples:
            return {}
        scores = self.scores()
        scores.add_pairs(losses, inputs, samples)
        result = scores.result(0.0)
        return {name: result[name] for name in ("reward_accuracy", "reward_margin")}

    def scores(self) -> PairScores:
        return PairScores(self._kernel, self._loss, self._beta)


class PairScores:
    """The scores of an evaluation on pairs, counted up batch by batch, so that they do not depend on the size of a
    batch.
    """

    def __init__(self, kernel: Callable[..., None], loss: str, beta: float) -> None:
        """`kernel` is the device's `SCORES`."""
        self._kernel, self._loss, self._beta = kernel, loss, beta
        self._pairs = self._right = 0
        self._terms = self._margins = self._unlikely = self._tokens = 0.0

    def add(self, loss: float, losses: Tensor | None, inputs: Sequence[Tensor], records: Sequence[TokenRecord]) -> None:
        self.add_pairs(losses, inputs, len(records) // 2)

    def add_pairs(self, losses: Tensor | None, inputs: Sequence[Tensor], pairs: int) -> None:
        """Add a batch with so many pairs: the losses of its tokens, and its tensors."""
        assert losses is not None
        made = scores_of(self._kernel, losses, inputs[1], inputs[-1], self._loss, self._beta)
        _, terms, margins, unlikely, tokens = made
        self._pairs += pairs
        self._right += int((margins[:pairs] > 0).sum())
        self._terms += float(terms[:pairs].sum())
        self._margins += float(margins[:pairs].sum())
        self._unlikely += float(unlikely)
        self._tokens += float(tokens)

    def result(self, seconds: float) -> dict[str, Any]:
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
