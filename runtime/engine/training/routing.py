"""Which matrices of a mixture of experts a step does without: those of experts that no row of the step goes through.

A schedule reads and unpacks the matrices of all experts, so that it holds whatever a router chooses. Once the numbers
of the chosen experts are in memory, reads and unpackings of the others are left out: the operator that is given their
matrices does not touch them. Only matrices that are read anew in every step are among these, and only those of which a
step has one set of rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from tightfit.runtime.engine.device.device import Device

WIDTH = 6
"""numbers of an entry: weight, its first expert, how many it has, elements of the numbers of the chosen experts, and
the tensors that hold these in training and in evaluation (-1: none does)
"""


class Routing:
    """`unneeded` says whether a weight's read or unpacking may be left out at this point of the schedule."""

    def __init__(self, entries: Sequence[int], device: Device, where: array[int]) -> None:
        """`entries`: `WIDTH` numbers for each weight, one after the other; `where`: offsets of tensors in the arena."""
        self._device, self._where = device, where
        self._entries = array("i", entries)
        self._starts = array("i", [-1]) * (1 + max(entries[::WIDTH], default=-1))
        """where each weight's entry begins, -1 if it has none: numbers, and no object for each of the thousands that a
        large mixture has
        """
        for start, weight in enumerate(entries[::WIDTH]):
            self._starts[weight] = WIDTH * start
        self._told: dict[int, frozenset[int] | None] = {}
        """By the number of its tensor, the experts that are chosen in it, None as long as nobody has asked; it is here
        while the tensor has its contents.
        """
        training, evaluation = self._entries[WIDTH - 2 :: WIDTH], self._entries[WIDTH - 1 :: WIDTH]
        self._tensors = frozenset(training + evaluation) - {-1}
        self.left_out = 0
        """reads that were left out in the step so far"""

    def made(self, tensor: int) -> None:
        """An operator has filled a tensor."""
        if tensor in self._tensors:
            self._told[tensor] = None

    def freed(self, tensor: int) -> None:
        self._told.pop(tensor, None)

    def unneeded(self, weight: int) -> bool:
        start = self._starts[weight] if weight < len(self._starts) else -1
        if start < 0:
            return False
        first, count, elements, *tensors = self._entries[start + 1 : start + WIDTH]
        told = [tensor for tensor in tensors if tensor in self._told]
        if len(told) != 1:
            return False
        chosen = self._told[told[0]]
        if chosen is None:
            numbers = self._device.tensor(self._where[told[0]], (elements,), "int64")
            chosen = self._told[told[0]] = frozenset(numbers.tolist())
        return chosen.isdisjoint(range(first, first + count))
