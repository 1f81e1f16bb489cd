"""Batches of pairs of answers for the training process. Only what fills a batch imports PyTorch.

The last tensor of a batch says which answer each place belongs to, and what the loss knows of it
(`tightfit.runtime.engine.cpu.preference`). So both answers of a pair may lie in any rows of a batch: in two of their
own, the chosen answer and below it the rejected one, or in rows that samples share
(`tightfit.runtime.engine.training.packing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.training.packing import Packed
from tightfit.runtime.engine.training.records import RecordFile, TokenRecord
from tightfit.runtime.engine.training.references import References, references_path
from tightfit.runtime.engine.training.sample_order import Apart, Rows, SampleOrder

if TYPE_CHECKING:
    from torch import Tensor

DPO, ORPO = "dpo", "orpo"
"""losses of pairs"""


def pairs_in(rows: Rows) -> list[int]:
    """The pairs whose answers lie in these rows of records, in the order of the first of their answers."""
    return list(dict.fromkeys(index // 2 for row in rows for index in row))


class PairsApart:
    """Each answer of `count` pairs has a row of its own, the rejected one below the chosen one; a batch goes on into
    the next epoch.
    """

    shared = False

    def __init__(self, count: int, seed: int) -> None:
        self._pairs = Apart(count, seed)

    def of_step(self, step: int, batch: int) -> Rows:
        return self._rows(self._pairs.of_step(step, batch // 2))

    def of_evaluation(self, number: int, batch: int) -> Rows:
        return self._rows(self._pairs.of_evaluation(number, batch // 2))

    def epoch_steps(self, batch: int, epochs: float) -> float:
        return self._pairs.epoch_steps(batch // 2, epochs)

    def evaluation_count(self, batch: int) -> int:
        return self._pairs.evaluation_count(batch // 2)

    @staticmethod
    def _rows(pairs: Rows) -> Rows:
        return [[2 * pair + answer] for (pair,) in pairs for answer in (0, 1)]


class PairBatches:
    """Batches from a record file of pairs, for a decoder's loss of pairs.

    `inputs` are input_ids, labels and, where samples may share rows, positions, int64 [2 * pairs, seq], and last the
    number of the answer at each place, -1 for none, with DPO also that answer's log-probability in the reference model,
    float64 [1 or 2, 2 * pairs, seq]. For ORPO, whose likelihood is of prompt and answer, chosen answers have labels for
    the prompt too.
    """

    def __init__(self, path: str, seed: int, loss: str, *, packing: bool = False) -> None:
        """With `packing` answers share rows."""
        self._records = RecordFile.open(path)
        if not self._records.pairs:
            raise InputError(f"{path}: its samples are no pairs of answers; prepare the data again")
        self._loss = loss
        self.path = path
        self.pairs = len(self._records) // 2
        self._order: SampleOrder = Packed(self._records, seed) if packing else PairsApart(self.pairs, seed)
        self.fingerprint = self._records.fingerprint
        self.samples: int | None = None
        self.references: References | None = None
        """open once they are known; until then their places in a batch are 0"""

    def of_step(self, step: int, pairs: int) -> list[int]:
        """The pairs in the batch of training step `step` (from 0), whose rows have room for `pairs` without packing."""
        return pairs_in(self._order.of_step(step, 2 * pairs))

    def of_references(self, steps: int | None, pairs: int) -> Iterator[Rows]:
        """The rows of the pairs that so many steps see, each pair once and as the first epoch has them; with None those
        of an evaluation.
        """
        if steps is None:
            for number in range(self._order.evaluation_count(2 * pairs)):
                yield self._order.of_evaluation(number, 2 * pairs)
            return
        left = self.pairs
        for number in range(steps):
            rows = self._order.of_step(number, 2 * pairs)[
                : 2 * left
            ]  # rows of pairs apart may have begun the next epoch
            left -= len(pairs_in(rows))
            yield rows
            if not left:
                break

    def without_references(self, steps: int | None, pairs: int) -> Iterator[Rows]:
        """Those of `of_references` in which the references of some pair are missing."""
        assert self.references is not None
        for rows in self.of_references(steps, pairs):
            if any(self.references.get(pair) is None for pair in pairs_in(rows)):
                yield rows

    def training(self, step: int, inputs: Sequence[Tensor]) -> int:
        found = self.fill(self._order.of_step(step, inputs[0].shape[0]), inputs)
        self.samples = len(found) // 2
        return sum(record.length for record in found)

    def epoch_steps(self, batch: int, epochs: float = 1.0) -> float:
        return self._order.epoch_steps(2 * batch, epochs)

    def evaluation_count(self, inputs: Sequence[Tensor]) -> int:
        return self._order.evaluation_count(inputs[0].shape[0])

    def evaluation(self, number: int, inputs: Sequence[Tensor]) -> list[TokenRecord]:
        return self.fill(self._order.of_evaluation(number, inputs[0].shape[0]), inputs)

    def fill(self, rows: Rows, inputs: Sequence[Tensor]) -> list[TokenRecord]:
        """Write the answers of whole pairs into a batch, from its first row on; what is behind them is padding. The
        pairs are numbered in the order of their answers. Returns the records of the answers.
        """
        *tokens, known = inputs
        if self._order.shared:
            records = self._records.fill_rows(rows, *tokens)
        else:
            records = self._records.fill([index for (index,) in rows], *tokens)
        known.fill_(-1.0)
        numbers = {pair: number for number, pair in enumerate(pairs_in(rows))}
        for index, record in zip((index for row in rows for index in row), records, strict=True):
            pair, side = divmod(index, 2)
            begins = int((record.labels >= 0).int().argmax())
            answer = slice(record.begin + begins, record.begin + record.length)
            known[0].view(-1)[answer] = 2 * numbers[pair] + side
            if self._loss == ORPO and side == 0:
                record.labels[:begins] = record.input_ids[1 : begins + 1]
            elif self.references is not None:
                known[1].view(-1)[answer] = self._reference(pair)[side]
        return records

    def _reference(self, pair: int) -> tuple[float, float]:
        """The log-probabilities of a pair's answers in the reference model."""
        assert self.references is not None
        found = self.references.get(pair)
        if found is None:
            raise RunError(
                f"{self.references.path}: the references of pair {pair + 1} are damaged; continue with"
                f" {spelled('resume', True)}, which computes them again"
            )
        return found

    def open_references(self, conditions: Mapping[str, Any]) -> References:
        """The file of references of these pairs, computed under the run's `conditions`."""
        told = {**conditions, "data": self.fingerprint}
        self.references = References(references_path(self.path), pairs=self.pairs, fingerprint=told)
        return self.references

    def close(self) -> None:
        self._records.close()
        if self.references is not None:
            self.references.close()
