"""Which operators of a program in tiles are run to measure it: those of three tiles. The figures of the others follow
from theirs.

Operators that do the same in every tile take the same time. The attention of the n-th tile attends to n tiles: from the
second on it takes the same products more often, so that its time grows evenly. Running all tiles of a long text would
take as long as a step, many times over.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightfit.runtime.engine.training.job import BEGINS_AT, TILES_AT, operator_key

ENDS = (0, 1, -1)
"""of a program's tiles, and of the operators that attend to more and more of them: those that are run"""
Operator = Mapping[str, Any]
Values = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Between:
    """An operator that is not run, by the numbers of two that are: it attends to more tiles than one and to fewer than
    the other.
    """

    shorter: int
    longer: int
    share: float
    """how far it lies from the shorter one to the longer one"""

    def of(self, figures: Mapping[int, float]) -> float:
        """Its figure, from those of the operators that are run."""
        return (1 - self.share) * figures[self.shorter] + self.share * figures[self.longer]


@dataclass(frozen=True)
class Sample:
    """The operators of a program that are not run, by number."""

    equal: Mapping[int, int]
    """-> the number of one that is run and does the same in another tile"""
    between: Mapping[int, Between]

    def stand_in(self, number: int) -> int | None:
        """The first operator that is run in the place of this one; None: this one is run."""
        if number in self.between:
            return min(self.between[number].shorter, self.between[number].longer)
        return self.equal.get(number)


def sample(program: Mapping[str, Any]) -> Sample:
    """Which operators of a profile's program (as a dict) are not run, since others tell their figures."""
    values = {value["name"]: value for value in program["values"]}
    tiles = program.get("tiles", 1)
    run = {end % tiles for end in ENDS}
    equal: dict[int, int] = {}
    same: dict[str, list[int]] = {}
    for number, operator in enumerate(program["operators"]):
        same.setdefault(work(operator, values), []).append(number)
    for numbers in same.values():
        each, left = divmod(len(numbers), tiles)
        if not left:
            equal |= {number: numbers[place % each] for place, number in enumerate(numbers) if place // each not in run}
    return Sample(equal, _between(program["operators"], values))


def work(operator: Operator, values: Values) -> str:
    """A key that is equal for operators that do the same with tensors of the same layouts and kinds, wherever these, or
    the part of something larger that they work on, begin.
    """
    args = operator["args"]
    begins = BEGINS_AT.get(operator["target"])
    if begins is not None:
        args = [*args[:begins], None, *args[begins + 1 :]]
    key = operator_key({**operator, "args": _without_offsets(args)}, values)
    return json.dumps([key, [values[name]["kind"] for name in operator["inputs"]]])


def _without_offsets(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_without_offsets(item) for item in argument]
    if isinstance(argument, dict) and "operand" in argument:
        return {"operand": {**argument["operand"], "offset": 0}}
    return argument


def _between(operators: Sequence[Operator], values: Values) -> dict[int, Between]:
    """Of the operators that attend to more and more tiles, all but the two with the fewest and the one with the
    most.
    """
    series: dict[str, dict[int, int]] = {}
    for number, operator in enumerate(operators):
        if operator["target"] in TILES_AT and not operator["args"][-1]:  # with a sliding window all attend to as many
            count = len(operator["args"][TILES_AT[operator["target"]]])
            series.setdefault(_work_on_any_tiles(operator, values), {}).setdefault(count, number)
    result = {}
    for by_count in series.values():
        counts = sorted(by_count)
        run = sorted({counts[end] for end in ENDS if end < len(counts)})
        for shorter, longer in itertools.pairwise(run):
            for count in counts:
                if shorter < count < longer:
                    share = (count - shorter) / (longer - shorter)
                    result[by_count[count]] = Between(by_count[shorter], by_count[longer], share)
    return result


def _work_on_any_tiles(operator: Operator, values: Values) -> str:
    """A key that is equal for operators that differ only in how many tiles they attend to."""

    def layouts(argument: Any) -> Any:
        if isinstance(argument, list):
            return sorted({json.dumps(layouts(item)) for item in argument})
        if not isinstance(argument, dict):
            return argument
        operand = argument["operand"]
        return [values[operand["value"]]["dtype"], operand["size"], operand["stride"]]

    return json.dumps([operator["target"], layouts([*operator["args"]])])
