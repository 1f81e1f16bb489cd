"""What a step of an answer consists of, for a decoder that transformers builds: programs of a few tokens, without PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tightfit.profiles.schema import FrozenRecord, Layer, Operator, Program


class AnswerStep(FrozenRecord):
    """The forward of so many new tokens, whose attention is `runtime.engine.generation.names.ATTEND`; the result is the hidden states, float32 [tokens, H]."""

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

    @property
    def one(self) -> AnswerStep:
        return self.steps[0]


def operand_of(argument: Any) -> Mapping[str, Any]:
    """The operand that a tensor argument is."""
    found: Mapping[str, Any] = argument["operand"]
    return found
