"""What the steps of a decoder need beside its matrices: a place for every value of their programs.

A step's values lie in one stretch of memory, each for as long as an operator is yet to read it. What a layer's program
makes for itself takes the same places in every layer; what passes between layers has its own. An operator that may
write over its first input does, where nobody reads that afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tightfit.planner.generation.places import Places
from tightfit.profiles.models.answer_steps import AnswerStep, AnswerSteps, operand_of
from tightfit.profiles.schema import Program
from tightfit.runtime.engine.generation.job import Seen
from tightfit.runtime.engine.generation.names import ATTEND, GATHER, HELD, OVERWRITING, PROJECTION, VALUES
from tightfit.runtime.engine.generation.sizes import aligned
from tightfit.runtime.engine.weights.layout import Entry


@dataclass(frozen=True, kw_only=True)
class Life:
    """A value, from the operator that makes it to the last that reads it, both included."""

    name: str
    bytes: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Offsets of a step's values, in bytes."""

    bytes: int
    passed: dict[str, int]
    """what passes between layers, by name"""
    own: dict[str, dict[str, int]]
    """what a program makes for itself, by program and name"""


def packed(lives: Iterable[Life], start: int = 0) -> tuple[dict[str, int], int]:
    """Offsets from `start` on at which no two values that live at once overlap, large ones first; and where the last
    one ends.
    """
    placed: list[tuple[int, Life]] = []
    for life in sorted(lives, key=lambda life: (-life.bytes, life.first, life.name)):
        at = start
        for other_at, other in sorted(placed, key=lambda pair: pair[0]):
            apart = other.last < life.first or life.last < other.first
            if not apart and other_at < at + life.bytes and at < other_at + other.bytes:
                at = other_at + other.bytes
        placed.append((at, life))
    return {life.name: at for at, life in placed}, max((at + life.bytes for at, life in placed), default=start)


def layout(step: AnswerStep) -> Layout:
    """Places for the values of a step of one group of tokens."""
    programs = {program.name: program for program in step.programs}
    bound_names = {layer.program: layer.bindings.keys() for layer in step.layers}
    own: dict[str, list[Life]] = {}
    shared: dict[str, dict[str, str]] = {}
    for program in step.programs:
        spans: dict[str, list[int]] = {}
        for place, operator in enumerate(program.operators):
            for name in (*operator.inputs, *(made for made in operator.outputs if made is not None)):
                spans.setdefault(name, []).append(place)
        sizes = {value.name: aligned(value.bytes) for value in program.values}
        for name in bound_names[program.name]:
            spans.pop(name, None)
        shared[program.name] = _overwritten(program, spans)
        own[program.name] = [
            Life(name=name, bytes=sizes[name], first=places[0], last=places[-1]) for name, places in spans.items()
        ]
    passed: dict[str, Life] = {}
    for place, layer in enumerate(step.layers):
        for value in programs[layer.program].values:
            bound = layer.bindings.get(value.name)
            if bound is None or value.kind in HELD:
                continue
            first = passed[bound].first if bound in passed else 0 if value.kind == "batch" else place
            passed[bound] = Life(name=bound, bytes=aligned(value.bytes), first=first, last=place)
    last = passed[step.result]
    passed[step.result] = Life(name=last.name, bytes=last.bytes, first=last.first, last=len(step.layers))
    between, start = packed(passed.values())
    places, end = {}, start
    for name, lives in own.items():
        places[name], stop = packed(lives, start)
        for made, read in shared[name].items():
            places[name][made] = places[name][read]
        end = max(end, stop)
    return Layout(bytes=end, passed=between, own=places)


def _overwritten(program: Program, spans: dict[str, list[int]]) -> dict[str, str]:
    """Whose place an operator's output takes, by its name; `spans`, of each value that has a place the operators that
    use it, then say of the one how long the other is there.
    """
    values = {value.name: value for value in program.values}
    owners: dict[str, str] = {}
    for place, operator in enumerate(program.operators):
        if operator.target not in OVERWRITING:
            continue
        read, made = operand_of(operator.args[0]), values[str(operator.outputs[0])]
        value, owner = values[read["value"]], owners.get(read["value"], read["value"])
        alike = (value.bytes, read["size"], read["stride"]) == (made.bytes, made.shape, made.stride)
        if alike and made.name in spans and owner in spans and spans[owner][-1] == place:
            spans[owner] += spans.pop(made.name)
            owners[made.name] = owner
    return owners


@dataclass(frozen=True)
class DecoderForm:
    """A decoder as a plan for answers sees it, whose passes take up to `rows` tokens of a prompt at a time: where that
    is less than a group, so are the tokens of its step.
    """

    steps: AnswerSteps
    rows: int

    @cached_property
    def head(self) -> str:
        """Name of the matrix that makes logits."""
        return self.steps.head

    @cached_property
    def seen(self) -> tuple[Seen, ...]:
        """What each layer's attention sees."""
        seen = []
        for _, call in self.steps.one.calls:
            if call.target == ATTEND:
                kv_heads, width, window, _ = call.args[5:]
                columns = operand_of(call.args[0])["size"][1]
                seen.append(Seen(heads=columns // width, kv_heads=kv_heads, width=width, window=window))
        return tuple(seen)

    def matrices(self) -> Iterator[str]:
        """All matrices but the head, in the order in which a pass needs them."""
        for layer, call in self.steps.one.calls:
            if call.target == PROJECTION:
                yield layer.bindings[operand_of(call.args[1])["value"]]

    def constants(self, entries: Mapping[str, Entry]) -> Places:
        """What else of the store stays in memory, unpacked: norms, biases, frequencies, and whatever else of the store
        operators read that are not matrix products.
        """
        places: Places = {}
        for step in self.steps.steps:
            values = {program.name: {value.name: value for value in program.values} for program in step.programs}
            for layer, call in step.calls:
                apart = {PROJECTION: call.args[1:2], GATHER: call.args[:1]}.get(call.target, [])
                matrices = {operand_of(argument)["value"] for argument in apart}
                for name in call.inputs:
                    value = values[layer.program][name]
                    if value.kind in HELD and name not in matrices:
                        places[layer.bindings[name]] = tuple(value.shape), value.dtype
        if self.steps.bias is not None:
            places[self.steps.bias] = entries[self.steps.bias].shape, "float32"
        return places

    def activations(self, tokens: int) -> Places:
        """Tensors of a pass of so many tokens."""
        sizes = [
            layout.bytes * (1 if step.tokens == 1 else -(-tokens // step.tokens)) for step, layout in self._laid_out
        ]
        return {VALUES: ((max(sizes) // 4,), "float32")}

    def job(self) -> dict[str, Any]:
        """Fields of a `GenerationJob` that say how to compute."""
        return {
            "vocab": self.steps.vocab,
            "head": self.head,
            "seen": self.seen,
            "steps": [self._of_job(step, layout) for step, layout in self._laid_out],
            "bias": self.steps.bias,
            "cap": self.steps.cap,
            "numbers": self.steps.numbers,
        }

    @cached_property
    def _laid_out(self) -> list[tuple[AnswerStep, Layout]]:
        one, group = self.steps.steps
        several = self.steps.step_of(self.rows) if self.rows < group.tokens else group
        return [(step, layout(step)) for step in (one, several)]

    def _of_job(self, step: AnswerStep, layout: Layout) -> dict[str, Any]:
        return {
            "tokens": step.tokens,
            "passed": layout.passed,
            "result": step.result,
            "layers": [[layer.program, layer.bindings] for layer in step.layers],
            "programs": {
                program.name: {
                    "own": layout.own[program.name],
                    "values": {
                        value.name: value.model_dump(include={"shape", "stride", "dtype", "bytes", "kind"})
                        for value in program.values
                    },
                    "operators": [
                        operator.model_dump(include={"target", "args", "kwargs", "outputs", "gathers"})
                        for operator in program.operators
                    ],
                }
                for program in step.programs
            },
        }
