"""Puts several samples into each row of a batch, and of pairs of answers both answers into rows of one batch.

The samples of an epoch come in their shuffled order (`tightfit.runtime.engine.training.records.shuffled`), those of an
evaluation in the order of the file, and `WAITING` of them wait for a row. A row begins with the one that has waited
longest, and is filled with the longest that fits, again and again. So each sample comes once in an epoch or an
evaluation, and waits for at most `WAITING` rows; the last batch may have empty rows. Which samples a step has depends
on the samples' lengths, the batch's shape, the seed and the step alone; which an evaluation batch has, on lengths,
shape and the batch's number.

The two answers of a pair are samples that may lie in any rows of the same batch. Into each batch go the pairs that
wait, in their turn, if there is still room for both answers, each in the fullest row that has room; so a pair waits for
at most `WAITING` batches.

The rows of a batch follow from those before it, which a run that resumes therefore makes again, without reading the
samples.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count, islice

from tightfit.runtime.engine.training.records import RecordFile, shuffled
from tightfit.runtime.engine.training.sample_order import Rows

WAITING = 64
REMEMBERED = 64
"""latest batches whose rows are kept: the stages of a pipeline take a step's batch twice"""
EPOCHS_COUNTED = 16
"""epochs whose batches are counted, at most, to say how many steps an epoch has"""


def rows_of(records: RecordFile, order: Iterable[int]) -> Iterator[list[int]]:
    """The rows of the samples whose indices come in `order`. Only those that wait are in memory, by their indices and
    lengths.
    """
    coming = enumerate(order)
    waiting: list[tuple[int, int, int]] = []
    """(length, turn, index), the shortest first"""

    def refill() -> None:
        for turn, index in islice(coming, WAITING - len(waiting)):
            insort(waiting, (records.length(index), turn, index))

    refill()
    while waiting:
        row, room = [], records.seq
        next_one = min(range(len(waiting)), key=lambda place: waiting[place][1])
        while next_one >= 0:
            length, _, index = waiting.pop(next_one)
            row.append(index)
            room -= length
            refill()
            next_one = bisect_left(waiting, (room + 1,)) - 1
        yield row


def batches_of_epoch(records: RecordFile, *, batch: int, seed: int, epoch: int) -> Iterator[Rows]:
    """The rows of an epoch, `batch` at a time; the last batch may have fewer."""
    count = _count(records)
    return _batches(records, (shuffled(turn, count, seed, epoch) for turn in range(count)), batch)


def batches_of_steps(records: RecordFile, *, batch: int, seed: int) -> Iterator[Rows]:
    """Those of all epochs, without end."""
    for epoch in count():
        yield from batches_of_epoch(records, batch=batch, seed=seed, epoch=epoch)


def batches_of_evaluation(records: RecordFile, *, batch: int) -> Iterator[Rows]:
    """The rows of an evaluation, `batch` at a time; the last batch may have fewer."""
    return _batches(records, range(_count(records)), batch)


def _count(records: RecordFile) -> int:
    """Samples, or pairs of them."""
    return len(records) // 2 if records.pairs else len(records)


def _batches(records: RecordFile, order: Iterable[int], batch: int) -> Iterator[Rows]:
    if records.pairs:
        yield from batches_of_pairs(records, order, batch)
        return
    rows = rows_of(records, order)
    while rows_of_batch := list(islice(rows, batch)):
        yield rows_of_batch


def batches_of_pairs(records: RecordFile, order: Iterable[int], batch: int) -> Iterator[Rows]:
    """The batches of the pairs whose numbers come in `order`, of at most `batch` rows, two or more."""
    coming = iter(order)
    waiting: list[int] = []
    while waiting := waiting + list(islice(coming, WAITING - len(waiting))):
        rows: Rows = [[] for _ in range(batch)]
        room = [records.seq] * batch
        place = 0
        while place < len(waiting):
            if _put_pair(records, waiting[place], rows, room):
                del waiting[place]
                waiting += islice(coming, 1)
            else:
                place += 1
        yield [row for row in rows if row]


def _put_pair(records: RecordFile, pair: int, rows: Rows, room: list[int]) -> bool:
    """Put the answers of a pair into the `rows` that have so much `room` left, the longer one first, if there is room
    for both.
    """
    taken = list(room)
    found = []
    for length, index in sorted(((records.length(index), index) for index in (2 * pair, 2 * pair + 1)), reverse=True):
        fitting = [number for number, left in enumerate(taken) if left >= length]
        if not fitting:
            return False
        number = min(fitting, key=taken.__getitem__)
        taken[number] -= length
        found.append((number, index))
    room[:] = taken
    for number, index in found:
        rows[number].append(index)
    return True


class SharedRows:
    """The rows of any of the batches that `begin` makes, from the first on."""

    def __init__(self, begin: Callable[[], Iterator[Rows]]) -> None:
        self._from_first = begin
        self._begin()

    def batch(self, number: int) -> Rows:
        """The rows of batch `number`, counted from 0. Batches are asked for in about their order."""
        if number < self._next - len(self._latest):
            self._begin()
        while self._next <= number:
            self._latest.append(next(self._batches))
            self._next += 1
        return self._latest[number - self._next]

    def _begin(self) -> None:
        self._latest: deque[Rows] = deque(maxlen=REMEMBERED)
        self._next = 0
        self._batches = self._from_first()


class Packed:
    """Samples share rows (`tightfit.runtime.engine.training.sample_order.SampleOrder`)."""

    shared = True

    def __init__(self, records: RecordFile, seed: int) -> None:
        self._records, self._seed = records, seed
        self._of_steps: SharedRows | None = None
        self._of_evaluation: SharedRows | None = None

    def of_step(self, step: int, batch: int) -> Rows:
        if self._of_steps is None:
            self._of_steps = SharedRows(partial(batches_of_steps, self._records, batch=batch, seed=self._seed))
        return self._of_steps.batch(step)

    def of_evaluation(self, number: int, batch: int) -> Rows:
        if self._of_evaluation is None:
            self._of_evaluation = SharedRows(partial(batches_of_evaluation, self._records, batch=batch))
        return self._of_evaluation.batch(number)

    def epoch_steps(self, batch: int, epochs: float) -> float:
        counted = range(max(1, min(EPOCHS_COUNTED, math.ceil(epochs))))
        made = (batches_of_epoch(self._records, batch=batch, seed=self._seed, epoch=epoch) for epoch in counted)
        return sum(1 for epoch in made for _ in epoch) / len(counted)

    def evaluation_count(self, batch: int) -> int:
        return sum(1 for _ in batches_of_evaluation(self._records, batch=batch))
