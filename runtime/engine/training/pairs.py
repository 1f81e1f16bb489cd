"""Batches of pairs of answers for the training process. Only what fills a batch imports PyTorch.

A batch has two rows for each pair, the chosen answer and below it the rejected one; its third tensor is what the loss knows of
each answer (`tightfit.runtime.engine.cpu.preference`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.training.records import RecordFile, TokenRecord
from tightfit.runtime.engine.training.references import References, references_path
from tightfit.runtime.engine.training.sample_order import Apart

if TYPE_CHECKING:
    from torch import Tensor

DPO, ORPO = "dpo", "orpo"
"""losses of pairs"""


class PairBatches:
    """Batches from a record file of pairs, for a decoder's loss of pairs.

    `inputs` are input_ids and labels, int64 [2 * pairs, seq], and either the place at which the labels of each row's answer
    begin, int64 [2 * pairs], or the log-probability of each answer in the reference model, float64 [2 * pairs]. For ORPO, whose
    likelihood is of prompt and answer, chosen rows have labels for the prompt too.
    """

    def __init__(self, path: str, seed: int, loss: str) -> None:
        self._records = RecordFile.open(path)
        if not self._records.pairs:
            raise InputError(f"{path}: its samples are no pairs of answers; prepare the data again")
        self._loss = loss
        self.path = path
        self.pairs = len(self._records) // 2
        self._order = Apart(self.pairs, seed)
        self.fingerprint = self._records.fingerprint
        self.samples: int | None = None
        self.references: References | None = None
        """open once they are known; until then their places in a batch are 0"""

    def of_step(self, step: int, pairs: int) -> list[int]:
        """The pairs in the batch of training step `step` (from 0), which has `pairs`."""
        return [pair for (pair,) in self._order.of_step(step, pairs)]

    def of_evaluation(self, number: int, pairs: int) -> list[int]:
        """The pairs in evaluation batch `number` (from 0), in the order of the file; the last one may have fewer than `pairs`."""
        return [pair for (pair,) in self._order.of_evaluation(number, pairs)]

    def of_references(self, steps: int | None, pairs: int) -> Iterator[list[int]]:
        """Batches of the pairs that so many steps see, each pair once and as the first epoch has them; with None those of an
        evaluation.
        """
        seen = self.pairs if steps is None else min(steps * pairs, self.pairs)
        for number in range(-(-seen // pairs)):
            batch = self.of_evaluation(number, pairs) if steps is None else self.of_step(number, pairs)
            yield batch[: seen - number * pairs]  # the last batch of an epoch may have begun the next one

    def without_references(self, steps: int | None, pairs: int) -> Iterator[list[int]]:
        """Those of `of_references` in which the references of some pair are missing."""
        assert self.references is not None
        for batch in self.of_references(steps, pairs):
            if any(self.references.get(pair) is None for pair in batch):
                yield batch

    def training(self, step: int, inputs: Sequence[Tensor]) -> int:
        found = self.fill(self.of_step(step, inputs[0].shape[0] // 2), inputs)
        self.samples = len(found) // 2
        return sum(record.length for record in found)

    def epoch_steps(self, batch: int, epochs: float = 1.0) -> float:
        return self._order.epoch_steps(batch, epochs)

    def evaluation_count(self, inputs: Sequence[Tensor]) -> int:
        return self._order.evaluation_count(inputs[0].shape[0] // 2)

    def evaluation(self, number: int, inputs: Sequence[Tensor]) -> list[TokenRecord]:
        return self.fill(self.of_evaluation(number, inputs[0].shape[0] // 2), inputs)

    def fill(self, pairs: Sequence[int], inputs: Sequence[Tensor]) -> list[TokenRecord]:
        """Write pairs into a batch, from its first row on; rows behind them are padding. Returns the records of their rows."""
        input_ids, labels, known = inputs
        known.zero_()
        records = self._records.fill([2 * pair + answer for pair in pairs for answer in (0, 1)], input_ids, labels)
        if self._loss == ORPO:
            for row, record in enumerate(records):
                start = int((record.labels >= 0).int().argmax())
                known[row] = start
                if row % 2 == 0:
                    labels[row, :start] = input_ids[row, 1 : start + 1]
        elif self.references is not None:
            for place, pair in enumerate(pairs):
                found = self.references.get(pair)
                if found is None:
                    raise RunError(
                        f"{self.references.path}: the references of pair {pair + 1} are damaged; continue with {spelled('resume', True)}, which computes"
                        " them again"
                    )
                known[2 * place], known[2 * place + 1] = found
        return records

    def open_references(self, conditions: Mapping[str, Any]) -> References:
        """The file of references of these pairs, computed under the run's `conditions`."""
        told = {**conditions, "data": self.fingerprint}
        self.references = References(references_path(self.path), pairs=self.pairs, fingerprint=told)
        return self.references

    def close(self) -> None:
        self._records.close()
        if self.references is not None:
            self.references.close()
