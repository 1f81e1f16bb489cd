"""Puts several samples into each row of a training batch.

The samples of an epoch come in their shuffled order (`tightfit.runtime.engine.training.records.shuffled`), and `WAITING` of them
wait for a row. A row begins with the one that has waited longest, and is filled with the longest that fits, again and again.
So each sample comes once in an epoch, and waits for at most `WAITING` rows; the last batch of an epoch may have empty rows.
Which samples a step has depends on the samples' lengths, the batch's shape, the seed and the step alone.

A step's rows follow from those before it, which a run that resumes therefore makes again, without reading the samples.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from itertools import chain, count, islice

from tightfit.runtime.engine.training.records import RecordFile, shuffled

WAITING = 64
REMEMBERED = 64
"""latest steps whose rows are kept: the stages of a pipeline take a step's batch twice"""
Rows = list[list[int]]
"""of each row the indices of its samples"""


def rows_of_epoch(records: RecordFile, *, seed: int, epoch: int) -> Iterator[list[int]]:
    """The rows of an epoch. Only the samples that wait are in memory, by their indices and lengths."""
    samples = len(records)
    coming = ((turn, shuffled(turn, samples, seed, epoch)) for turn in range(samples))
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
    rows = rows_of_epoch(records, seed=seed, epoch=epoch)
    while made := list(islice(rows, batch)):
        yield made


class SharedRows:
    """The rows of any step of a run."""

    def __init__(self, records: RecordFile, *, batch: int, seed: int) -> None:
        self._records, self._batch, self._seed = records, batch, seed
        self._begin()

    def step(self, number: int) -> Rows:
        """The rows of step `number`, counted from 0. Steps are asked for in about their order."""
        if number < self._next - len(self._latest):
            self._begin()
        while self._next <= number:
            self._latest.append(next(self._steps))
            self._next += 1
        return self._latest[number - self._next]

    def _begin(self) -> None:
        self._latest: deque[Rows] = deque(maxlen=REMEMBERED)
        self._next = 0
        self._steps = chain.from_iterable(
            batches_of_epoch(self._records, batch=self._batch, seed=self._seed, epoch=epoch) for epoch in count()
        )
