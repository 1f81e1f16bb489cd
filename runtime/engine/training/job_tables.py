"""Compact tables of a job's weights and trainables, whose entries are made when they are asked for.

A deep model has thousands of them. As the Python lists and strings that a JSON parser makes, each would take kilobytes
of the training process.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class StoredWeight(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    packed_bytes: int
    at: int
    """Byte offset in the arena of the unpacked weight, if it stays there between steps; negative: it does not."""
    packed_at: int
    """The same of the packed weight."""


class TensorPlace(NamedTuple):
    """Where a persistent tensor is between steps: at a byte offset of the arena or, if that is negative, in the spill
    file.
    """

    number: int
    at: int


class Trainable(NamedTuple):
    name: str
    shape: tuple[int, ...]
    value: TensorPlace
    gradient: int
    """Tensor number of its gradient; -1: no schedule makes one."""
    states: tuple[TensorPlace, ...]
    """The optimizer's states, in the order of the header's `states`."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """Tensor numbers of what an update reads: value, gradient, states."""
        return (self.value.number, self.gradient, *(state.number for state in self.states))


SEPARATOR = "\0"
"""Stands between the names, which the job holds as one string: a JSON list of strings would leave holes in the heap
once it is freed.
"""


class Names(Sequence[str]):
    """The parts of `text` between separators, cut out when asked for: thousands of Python strings take twice the
    memory.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._ends = array("i", [i for i, letter in enumerate(text) if letter == SEPARATOR])
        if text:
            self._ends.append(len(text))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        end = self._ends[index]
        return self._text[self._text.rfind(SEPARATOR, 0, end) + 1 : end]


class Weights(Sequence[StoredWeight]):
    """The weights of a job.

    `said` holds their names, and lists of the dtypes and shapes that occur. `numbers` holds five numbers for each
    weight: the indices of its dtype and shape in those lists, its packed bytes, and the offsets `at` and `packed_at`.
    """

    def __init__(self, said: Mapping[str, Any], numbers: array[int]) -> None:
        self._names = Names(said["names"])
        self._dtypes: list[str] = said["dtypes"]
        self._shapes = [tuple(shape) for shape in said["shapes"]]
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        dtype, shape, *places = self._numbers[5 * index : 5 * index + 5]
        return StoredWeight(self._names[index], self._dtypes[dtype], self._shapes[shape], *places)

    def __iter__(self) -> Iterator[StoredWeight]:
        return (self[index] for index in range(len(self)))


class Trainables(Sequence[Trainable]):
    """The trainables of a job.

    `said` holds their names and a list of the shapes that occur. `numbers` holds for each trainable the index of its
    shape in that list, the tensor number of its gradient, and tensor number and offset of its value and of each state.
    """

    def __init__(self, said: Mapping[str, Any], numbers: array[int]) -> None:
        self.names = Names(said["names"])
        self._shapes = [tuple(shape) for shape in said["shapes"]]
        self._numbers = numbers
        self._width = len(numbers) // max(1, len(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        start = index * self._width
        shape, gradient, *rest = self._numbers[start : start + self._width]
        value, *states = (TensorPlace(rest[i], rest[i + 1]) for i in range(0, len(rest), 2))
        return Trainable(self.names[index], self._shapes[shape], value, gradient, tuple(states))

    def __iter__(self) -> Iterator[Trainable]:
        return (self[index] for index in range(len(self)))
