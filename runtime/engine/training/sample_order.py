"""Which samples a batch has, and in which rows: a class for each way, `Apart` here, `Packed` in a file of its own.

The order of an epoch is the permutation of `shuffled`, which depends on the seed and the epoch alone; an evaluation
takes the order of the file. Batches of tokens and of pairs (`batches`, `pairs`) choose the way.
"""

from __future__ import annotations

from typing import Protocol

from tightfit.runtime.engine.training.records import shuffled

Rows = list[list[int]]
"""of each row of a batch the indices of its samples"""


class SampleOrder(Protocol):
    """One way. Batches are asked for in about their order; which samples one has does not depend on what was asked
    before.
    """

    shared: bool
    """whether samples share rows"""

    def of_step(self, step: int, batch: int) -> Rows:
        """The rows in the batch of training step `step`, from 0, which has at most `batch` rows."""
        ...

    def of_evaluation(self, number: int, batch: int) -> Rows:
        """Those in evaluation batch `number`, from 0."""
        ...

    def epoch_steps(self, batch: int, epochs: float) -> float:
        """Steps that go once through the samples; where epochs differ, the mean of the first `epochs`."""
        ...

    def evaluation_count(self, batch: int) -> int:
        """Number of evaluation batches."""
        ...


class Apart:
    """Each of `count` samples has a row of its own; a batch goes on into the next epoch."""

    shared = False

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed

    def of_step(self, step: int, batch: int) -> Rows:
        places = (divmod(step * batch + row, self._count) for row in range(batch))
        return [[shuffled(place, self._count, self._seed, epoch)] for epoch, place in places]

    def of_evaluation(self, number: int, batch: int) -> Rows:
        return [[index] for index in range(number * batch, min((number + 1) * batch, self._count))]

    def epoch_steps(self, batch: int, epochs: float) -> float:
        return self._count / batch

    def evaluation_count(self, batch: int) -> int:
        return -(-self._count // batch)
