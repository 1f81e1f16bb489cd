"""What a run counts by its loss: how much a batch weighs in an update of several steps, and the scores of an
evaluation.

A kind of loss is a class of `Loss`: of tokens and of whole batches here, of pairs of answers in
`tightfit.runtime.engine.training.pair_scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tightfit.runtime.engine.training.records import TokenRecord

if TYPE_CHECKING:
    from torch import Tensor


class Scores(Protocol):
    """The losses of an evaluation, counted up batch by batch."""

    def add(self, loss: float, losses: Tensor | None, inputs: Sequence[Tensor], records: Sequence[TokenRecord]) -> None:
        """Add a batch: its mean loss, the loss of each token if the schedule tells them, its tensors, and the records
        in it.
        """
        ...

    def result(self, seconds: float) -> dict[str, Any]:
        """As `tightfit.runtime.engine.training.trainer.Training.evaluate` returns it."""
        ...


class Loss(Protocol):
    """A kind of loss."""

    refers: bool
    """whether it compares with what the model with its adapter switched off says of the same batch (DPO)"""

    def weight(self, inputs: Sequence[Tensor]) -> int:
        """How many terms the loss of a batch is a mean over: the weight of its gradient in an update of several
        steps.
        """
        ...

    def of_step(self, losses: Tensor | None, inputs: Sequence[Tensor], samples: int | None) -> dict[str, float]:
        """What the metrics say of a training step beside its loss."""
        ...

    def scores(self) -> Scores: ...


class TokenLoss:
    """Of a decoder: the mean over labelled tokens. Its records may be choices of questions."""

    refers = False

    def weight(self, inputs: Sequence[Tensor]) -> int:
        return int((inputs[1] >= 0).sum())

    def of_step(self, losses: Tensor | None, inputs: Sequence[Tensor], samples: int | None) -> dict[str, float]:
        return {}

    def scores(self) -> Scores:
        return RecordScores()


class BatchLoss(TokenLoss):
    """Of a module: it is not known what the loss of a batch is a mean over, so each batch weighs 1."""

    def weight(self, inputs: Sequence[Tensor]) -> int:
        return 1


class RecordScores:
    """Scores of records, whose losses are sums over tokens, or of batches without records."""

    def __init__(self) -> None:
        self._best: dict[int, tuple[float, int, bool]] = {}
        """of each question, by its example: (summed loss, number, whether it is right) of the likeliest choice; of
        equal ones the first, in whatever order they come
        """
        self._total, self._labelled, self._records = 0.0, 0, 0

    def add(self, loss: float, losses: Tensor | None, inputs: Sequence[Tensor], records: Sequence[TokenRecord]) -> None:
        if losses is None:
            self._total, self._labelled = self._total + loss, self._labelled + 1
            return
        for record in records:
            own = float(losses.view(-1)[record.begin : record.begin + record.length].sum())
            self._records += 1
            if record.choice < 0 or record.answer:
                self._total, self._labelled = self._total + own, self._labelled + int((record.labels >= 0).sum())
            if record.choice >= 0:
                choice = (own, record.choice, record.answer)
                self._best[record.example] = min(self._best.get(record.example, choice), choice)

    def result(self, seconds: float) -> dict[str, Any]:
        best = self._best
        return {
            "loss": self._total / max(1, self._labelled),
            "accuracy": sum(answer for *_, answer in best.values()) / len(best) if best else None,
            "questions": len(best),
            "records": self._records,
            "seconds": seconds,
        }


def loss_of_pairs(header: Mapping[str, Any]) -> str | None:
    """The loss of a job whose model learns from pairs of answers; None: it has another."""
    return header["preference"]["loss"] if header.get("preference") else None


def loss_of(header: Mapping[str, Any], kernels: Mapping[str, Callable[..., None]]) -> Loss:
    """The loss of a job with this header; `kernels` are the device's fused operators by name."""
    if header.get("preference"):
        from tightfit.runtime.engine.training.pair_scores import SCORES, PairLoss

        return PairLoss(kernels[SCORES], **header["preference"])
    return TokenLoss() if header["kind"] == "decoder" else BatchLoss()
