"""What a step of an answer consists of: programs of a few tokens, without PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tightfit.profiles.schema import FrozenRecord, Layer, Operator, Program
from tightfit.runtime.common.errors import InputError

MIXTURE = "it is a mixture of experts, whose matrices are read whole for a step and not for each token"


INSTEAD = (
    "merge the adapter into a model of its own (tightfit merge) and generate with transformers, or with llama.cpp where"
    " it has the family"
)
"""what to do with a model that cannot answer here"""


def refused_answers(family: str, why: str) -> InputError:
    """The error of a decoder that cannot answer with a cache."""
    return InputError(f"a {family} decoder cannot answer token by token here: {why}; {INSTEAD}")


class AnswerStep(FrozenRecord):
    """The forward of so many new tokens, whose attention is `runtime.engine.generation.names.ATTEND`; the result is the
    hidden states, float32 [tokens, H].
    """

    tokens: int
    programs: list[Program]
    layers: list[Layer]
    result: str

    @property
    def calls(self) -> Iterator[tuple[Layer, Operator]]:
        """All operators, in order."""
        programs = {program.name: program for program in self.programs}
        for layer in self.layers:
            for operator in programs[layer.program].operators:
                yield layer, operator


class AnswerSteps(FrozenRecord):
    """A step of one token and one of a group, and the head."""

    steps: list[AnswerStep]
    head: str
    """name of its matrix in the store"""
    bias: str | None
    cap: float | None
    """soft cap of the logits"""
    vocab: int
    numbers: dict[str, list[float]] = {}
    """constants that the steps read and the store does not hold, float32, by name"""

    @property
    def one(self) -> AnswerStep:
        return self.steps[0]

    def step_of(self, tokens: int) -> AnswerStep:
        """The step of so many tokens, fewer than a group: that of one token and that of a group with all numbers in
        between, or that of a group where more than numbers tell them apart.
        """
        one, group = self.steps
        try:
            between = _between(one.model_dump(), group.model_dump(), tokens, group.tokens)
        except _Apart:
            return group
        return AnswerStep.model_validate(between)


class Answers(FrozenRecord):
    """The steps of a decoder's answers, or why it has none."""

    steps: dict[int, AnswerSteps]
    """by the fewest tokens of a question and its answer for which they hold: longrope turns positions otherwise in long
    ones
    """
    refused: str | None = None

    def of(self, tokens: int) -> AnswerSteps:
        """The steps for so many tokens of a question and its answer. Raises InputError where the decoder has none."""
        if self.refused is not None:
            raise InputError(self.refused)
        return self.steps[max(fewest for fewest in self.steps if fewest <= tokens)]


class _Apart(Exception):  # noqa: N818  caught where it is raised
    """Two steps differ in more than the number of their tokens."""


def _between(one: Any, group: Any, tokens: int, most: int) -> Any:
    """What stands for `tokens` tokens where these stand for one and for `most`."""
    if one == group:
        return one
    if isinstance(one, dict) and isinstance(group, dict) and one.keys() == group.keys():
        return {key: _between(one[key], group[key], tokens, most) for key in one}
    if isinstance(one, list) and isinstance(group, list) and len(one) == len(group):
        return [_between(*both, tokens, most) for both in zip(one, group, strict=True)]
    if isinstance(one, (int, float)) and group == most * one:
        return one * tokens
    raise _Apart


def operand_of(argument: Any) -> Mapping[str, Any]:
    """The operand that a tensor argument is."""
    operand: Mapping[str, Any] = argument["operand"]
    return operand
