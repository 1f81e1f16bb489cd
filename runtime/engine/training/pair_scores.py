"""The scores of an evaluation on pairs of answers, and what else is read off their token losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tightfit.runtime.engine.cpu.preference import answer_places, log_probabilities, pair_scores

if TYPE_CHECKING:
    from torch import Tensor

    from tightfit.runtime.engine.training.records import TokenRecord


def averaged(labels: Tensor) -> int:
    """Pairs in a batch's labels [2 * pairs, seq]: rows that are not all padding, halved."""
    return int((labels >= 0).any(1).sum()) // 2


def answers_of(losses: Tensor, labels: Tensor) -> list[float]:
    """The log-probability of the answer in each row, from token losses and labels, which are of answers alone."""
    sums, _ = log_probabilities(losses, answer_places(labels, None))
    found: list[float] = sums.tolist()
    return found


class PairScores:
    """The scores of an evaluation on pairs, counted up batch by batch: so that they do not depend on the size of a batch."""

    def __init__(self, loss: str, beta: float) -> None:
        self._loss, self._beta = loss, beta
        self._sums: dict[str, float] = {}
        self._pairs = 0

    def add(self, loss: float, losses: Tensor | None, inputs: list[Tensor], found: Sequence[TokenRecord]) -> None:
        """Add a batch: the losses of its tokens, those of the records `found`."""
        assert losses is not None
        _, labels, known = inputs
        pairs = len(found) // 2
        self._pairs += pairs
        for name, value in pair_scores(losses, labels, known, self._loss, self._beta, pairs).items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def result(self, seconds: float) -> dict[str, Any]:
        """As `tightfit.runtime.engine.training.trainer.Training.evaluate` returns it."""
        sums, pairs = self._sums, max(1, self._pairs)
        likely = sums.get("likely", 0.0) / max(1.0, sums.get("tokens", 0.0))
        return {
            "loss": sums.get("terms", 0.0) / pairs + likely,
            "accuracy": None,
            "questions": 0,
            "records": 2 * self._pairs,
            "pairs": self._pairs,
            "reward_accuracy": sums.get("right", 0.0) / pairs,
            "reward_margin": sums.get("margin", 0.0) / pairs,
            "seconds": seconds,
        }
