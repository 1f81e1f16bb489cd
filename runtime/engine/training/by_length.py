"""Puts samples of like lengths into one batch, where a plan has shorter steps for batches of short samples.

The samples of an epoch come in their shuffled order (`tightfit.runtime.engine.training.records.shuffled`). A window of them, of several
batches, is sorted by length and cut into batches, which come in a shuffled order of their own; an incomplete batch comes last in
its epoch. So each sample comes once in an epoch. Which samples a step has depends on the samples' lengths, the size of a batch,
the seed and the step alone: a run that resumes makes no batch again but those of its window. An evaluation takes windows of the
order of the file.
"""

from __future__ import annotations

from collections.abc import Callable

from tightfit.runtime.engine.training.records import shuffled
from tightfit.runtime.engine.training.sample_order import Apart, Rows, SampleOrder

WINDOW_SAMPLES = 1024
"""most samples that are sorted together"""
WINDOWS_IN_EPOCH = 4
"""least number of windows, so that an epoch differs from the one before in more than the order of its batches"""


class SortedBatches:
    """The batches of `count` samples, of which `length` gives the positions, `batch` in each."""

    def __init__(self, count: int, batch: int, length: Callable[[int], int]) -> None:
        self._count, self._batch, self._length = count, batch, length
        self.in_epoch = -(-count // batch)
        """batches of an epoch, or of an evaluation"""
        self._latest: tuple[tuple[int | None, int, int], list[list[int]]] | None = None
        """batches of the window that was asked for last, and which one that is"""

    def of_step(self, step: int, seed: int) -> list[int]:
        """The samples in the batch of training step `step`, from 0."""
        epoch, number = divmod(step, self.in_epoch)
        window, place = divmod(number, self._in_window(seed))
        return self._window(seed, epoch, window)[place]

    def of_evaluation(self, number: int) -> list[int]:
        """The samples in evaluation batch `number`, from 0."""
        window, place = divmod(number, self._in_window(None))
        return self._window(None, 0, window)[place]

    def _in_window(self, seed: int | None) -> int:
        """Batches in a window of an epoch that is shuffled by `seed`, or of an evaluation."""
        most = self.in_epoch if seed is None else -(-self.in_epoch // WINDOWS_IN_EPOCH)
        return max(1, min(most, WINDOW_SAMPLES // self._batch))

    def _window(self, seed: int | None, epoch: int, window: int) -> list[list[int]]:
        key = (seed, epoch, window)
        if self._latest is None or self._latest[0] != key:
            self._latest = None  # the old one is not needed beside the new one
            self._latest = (key, self._made(seed, epoch, window))
        return self._latest[1]

    def _made(self, seed: int | None, epoch: int, window: int) -> list[list[int]]:
        size = self._batch * self._in_window(seed)
        places = range(window * size, min((window + 1) * size, self._count))
        found = places if seed is None else (shuffled(place, self._count, seed, epoch) for place in places)
        # The longest first, so that the shortest are left for an incomplete batch; of equal lengths in the order in which they came.
        ordered = sorted(found, key=self._length, reverse=True)
        made = [ordered[begin : begin + self._batch] for begin in range(0, len(ordered), self._batch)]
        if seed is None:
            return made
        whole = len(ordered) // self._batch
        order = [shuffled(place, whole, seed, epoch * self.in_epoch + window) for place in range(whole)]
        return [made[place] for place in order] + made[whole:]


class ByLength:
    """Samples of like lengths share a batch (`tightfit.runtime.engine.training.sample_order.SampleOrder`)."""

    shared = False

    def __init__(self, count: int, length: Callable[[int], int], seed: int) -> None:
        self._count, self._length, self._seed = count, length, seed
        self._latest: tuple[int, SortedBatches] | None = None

    def of_step(self, step: int, batch: int) -> Rows:
        return [[index] for index in self._batches(batch).of_step(step, self._seed)]

    def of_evaluation(self, number: int, batch: int) -> Rows:
        return [[index] for index in self._batches(batch).of_evaluation(number)]

    def epoch_steps(self, batch: int, epochs: float) -> float:
        return self._batches(batch).in_epoch

    def evaluation_count(self, batch: int) -> int:
        return self._batches(batch).in_epoch

    def _batches(self, batch: int) -> SortedBatches:
        if self._latest is None or self._latest[0] != batch:
            self._latest = batch, SortedBatches(self._count, batch, self._length)
        return self._latest[1]


def order_of(count: int, length: Callable[[int], int], seed: int, *, by_length: bool) -> SampleOrder:
    """How `count` samples, of which `length` gives the positions, become batches with one to a row: those of like lengths together, or
    in the order that the seed shuffles.
    """
    return ByLength(count, length, seed) if by_length else Apart(count, seed)
