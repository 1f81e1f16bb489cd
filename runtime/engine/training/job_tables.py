"""What a job says of its weights and trainables, in the lean process: a deep model has thousands of them, which as the lists and
strings that JSON makes take kilobytes each.
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
    """Byte offset in the arena of what stays there unpacked; negative: nothing does."""
    packed_at: int


class Place(NamedTuple):
    """Where a persistent tensor is between steps: at a byte offset of the arena or, if that is negative, in the spill file."""

    number: int
    at: int


class Trainable(NamedTuple):
    name: str
    shape: tuple[int, ...]
    value: Place
    gradient: int
    """A tensor's number."""
    states: tuple[Place, ...]
    """Of the optimizer, in the order of `STATES`."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of all that an update reads."""
        return (self.value.number, self.gradient, *(state.number for state in self.states))


SEPARATOR = "\0"
"""between names, which are one string in the job: JSON's own strings and lists leave holes where they were"""


class Names(Sequence[str]):
    """The parts of `text`: thousands of strings take twice as much."""

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
    """`said` has the names, and dtypes and shapes that occur; `numbers` of each weight the places of its dtype and shape there, its
    packed bytes and its two offsets.
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
    """`said` has the names, and the shapes that occur; `numbers` of each trainable the place of its shape there, its gradient, and
    tensor and offset of its value and of each state.
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
        value, *states = (Place(rest[i], rest[i + 1]) for i in range(0, len(rest), 2))
        return Trainable(self.names[index], self._shapes[shape], value, gradient, tuple(states))

    def __iter__(self) -> Iterator[Trainable]:
        return (self[index] for index in range(len(self)))
