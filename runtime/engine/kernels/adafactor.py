"""Adafactor's update of one trainable, in place: Shazeer and Stern 2018, "Adafactor: adaptive learning rates with
sublinear memory cost", as `torch.optim.Adafactor` makes it.

It needs sums over the whole tensor: means of squared gradients over rows and over columns, and root mean squares of the
parameter and of the step. So it goes over the tensor several times, a window at a time, and has room for a window
beside it. The windows follow from the tensor's shape alone, and one thread adds each of them up, so that neither the
plan nor the number of threads changes a bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from tightfit.runtime.engine.kernels.optimizer import Adafactor

COLUMNS = 1 << 12
"""columns of a window that holds part of a matrix, at most"""
WINDOW = 7 * COLUMNS
"""elements of a window, at most; where it holds whole matrices, with their sums over rows and columns. From 32768 on
PyTorch shares an operation among threads.
"""

Shape = tuple[int, int, int]
"""matrices, rows, columns"""
Block = tuple[slice, slice, list[slice]]
"""matrices, columns, and the rows of each window in turn"""


class AdafactorUpdate:
    """Makes updates, with room for one window."""

    def __init__(self) -> None:
        self._room = torch.empty(WINDOW, dtype=torch.float32)

    def make(
        self, optimizer: Adafactor, rate: float, number: int, parameter: Tensor, gradient: Tensor, *states: Tensor
    ) -> None:
        """Make update `number` of a parameter, counted from 1, at the learning rate `rate`.

        All tensors are float32 and contiguous; all but `gradient` change in place. The state, the variance, is flat.
        For a parameter of one dimension or none it is the mean of each element's squared gradient; for one of matrices
        [..., rows, columns] it is the means over each row of every matrix, and then those over each column.
        """
        (variance,) = states
        if not parameter.numel():
            return
        shape = _matrices(parameter.shape)
        values, slopes = parameter.view(shape), gradient.view(shape)
        length = math.sqrt(parameter.numel())
        squared = sum(self._squared(values[m, r, c]) for m, c, rows in _blocks(shape) for r in rows)
        step = max(optimizer.eps2, math.sqrt(squared) / length) * min(rate, 1 / math.sqrt(number))
        if optimizer.weight_decay:
            parameter.mul_(1 - rate * optimizer.weight_decay)
        share = number**optimizer.beta2_decay
        if parameter.dim() > 1:
            self._average(slopes, *_means(variance, shape), share)
        else:
            self._average_elements(slopes, variance.view(shape), share)
        directions = self._factored if parameter.dim() > 1 else self._full
        squared = sum(self._squared(direction) for *_, direction in directions(slopes, variance, optimizer.eps))
        clipped = max(1.0, math.sqrt(squared) / (length * optimizer.clip_threshold))
        for m, r, c, direction in directions(slopes, variance, optimizer.eps):
            values[m, r, c].add_(direction, alpha=-step / clipped)

    def _average(self, slopes: Tensor, over_rows: Tensor, over_columns: Tensor, share: float) -> None:
        """Take the share `share` of the means of squared gradients [matrices, rows, columns] over rows and over columns
        from these gradients.
        """
        _, height, width = slopes.shape
        over_rows.mul_(1 - share)
        for m, c, rows in _blocks(slopes.shape):
            over_columns[m, :, c].mul_(1 - share)
            total = torch.zeros(over_columns[m, :, c].shape, dtype=torch.float64 if len(rows) > 1 else torch.float32)
            for r in rows:
                squares = self._squares(slopes[m, r, c])
                over_rows[m, r].add_(squares.sum(2, keepdim=True), alpha=share / width)
                total.add_(squares.sum(1, keepdim=True))
            over_columns[m, :, c].add_(total, alpha=share / height)

    def _average_elements(self, slopes: Tensor, means: Tensor, share: float) -> None:
        for m, c, rows in _blocks(slopes.shape):
            for r in rows:
                means[m, r, c].lerp_(self._squares(slopes[m, r, c]), share)

    def _factored(self, slopes: Tensor, variance: Tensor, eps: float) -> Iterator[tuple[slice, slice, slice, Tensor]]:
        """Yield the step's direction a window at a time: gradients over the roots of the products of the means of their
        rows and columns. Each window overwrites the one before it.
        """
        over_rows, over_columns = _means(variance, slopes.shape)
        for m, c, rows in _blocks(slopes.shape):
            overall = over_rows[m].mean(1, keepdim=True).clamp_(min=eps)
            for r in rows:
                part = slopes[m, r, c]
                direction = torch.mul(over_rows[m, r] / overall, over_columns[m, :, c], out=self._room_of(part))
                yield m, r, c, direction.clamp_(min=eps * eps).rsqrt_().mul_(part)

    def _full(self, slopes: Tensor, variance: Tensor, eps: float) -> Iterator[tuple[slice, slice, slice, Tensor]]:
        """As `_factored`, for gradients whose squares have a mean for each element."""
        means = variance.view(slopes.shape)
        for m, c, rows in _blocks(slopes.shape):
            for r in rows:
                direction = torch.clamp(means[m, r, c], min=eps * eps, out=self._room_of(means[m, r, c]))
                yield m, r, c, direction.rsqrt_().mul_(slopes[m, r, c])

    def _room_of(self, part: Tensor) -> Tensor:
        return self._room[: part.numel()].view(part.shape)

    def _squares(self, part: Tensor) -> Tensor:
        return torch.mul(part, part, out=self._room_of(part))

    def _squared(self, part: Tensor) -> float:
        """The sum of squares of a window, which may lie in the update's own buffer."""
        return self._squares(part).sum().item()


def _matrices(shape: Sequence[int]) -> Shape:
    """A parameter's shape as that of matrices; of one dimension or none, as a matrix of one column."""
    if len(shape) < 2:
        return 1, math.prod(shape), 1
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _means(variance: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The means over rows [matrices, rows, 1] and over columns [matrices, 1, columns]."""
    count, rows, columns = shape
    over_rows, over_columns = variance.split((count * rows, count * columns))
    return over_rows.view(count, rows, 1), over_columns.view(count, 1, columns)


def _blocks(shape: Sequence[int]) -> Iterator[Block]:
    """The windows of matrices: several whole matrices, or rows of one matrix or of some of its columns, from the first
    row to the last.
    """
    count, rows, columns = shape
    together = WINDOW // (rows * columns + rows + columns)
    if together:
        for first in range(0, count, together):
            yield slice(first, first + together), slice(None), [slice(None)]
        return
    width = min(columns, COLUMNS)
    height = max(1, WINDOW // width)
    windows = [slice(first, first + height) for first in range(0, rows, height)]
    for matrix in range(count):
        for first in range(0, columns, width):
            yield slice(matrix, matrix + 1), slice(first, first + width), windows
