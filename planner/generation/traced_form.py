"""What the steps of a decoder that transformers builds need beside its matrices: a place for every value of their programs.

A step's values lie in one stretch of memory, each for as long as an operator is yet to read it. What a layer's program makes for
itself takes the same places in every layer; what passes between layers has its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tightfit.planner.generation.places import Places
from tightfit.profiles.models.answer_steps import AnswerStep, AnswerSteps, operand_of
from tightfit.runtime.engine.generation.job import Seen
from tightfit.runtime.engine.generation.names import ATTEND, GATHER, HELD, PROJECTION, VALUES
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
    """Offsets from `start` on at which no two values that live at once overlap, large ones first; and where the last one ends."""
    placed: list[tuple[int, Life]] = []
    for life in sorted(lives, key=lambda one: (-one.bytes, one.first, one.name)):
        at = start
        for other_at, other in sorted(placed, key=lambda one: one[0]):
            apart = other.last < life.first or life.last < other.first
            if not apart and other_at < at + life.bytes and at < other_at + other.bytes:
                at = other_at + other.bytes
        placed.append((at, life))
    return {life.name: at for at, life in placed}, max((at + life.bytes for at, life in placed), default=start)


def layout(step: AnswerStep) -> Layout:
    """Places for the values of a step of one group of tokens."""
    programs = {program.name: program for program in step.programs}
    own: dict[str, list[Life]] = {}
    for program in step.programs:
        spans: dict[str, list[int]] = {}
        for place, operator in enumerate(program.operators):
            for name in (*operator.inputs, *(made for made in operator.outputs if made is not None)):
                spans.setdefault(name, []).append(place)
        sizes = {value.name: aligned(value.bytes) for value in program.values}
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
    bindings = {layer.program: layer.bindings for layer in step.layers}
    places, end = {}, start
    for name, lives in own.items():
        places[name], stop = packed([life for life in lives if life.name not in bindings[name]], start)
        end = max(end, stop)
    return Layout(bytes=end, passed=between, own=places)


@dataclass(frozen=True)
class TracedForm:
    """See `tightfit.planner.generation.problem.DecoderForm`."""

    steps: AnswerSteps

    @property
    def head(self) -> str:
        return self.steps.head

    @property
    def vocab(self) -> int:
        return self.steps.vocab

    @cached_property
    def seen(self) -> tuple[Seen, ...]:
        found = []
        for _, call in self.steps.one.calls:
            if call.target == ATTEND:
                kv_heads, width, window, _ = call.args[5:]
                columns = operand_of(call.args[0])["size"][1]
                found.append(Seen(heads=columns // width, kv_heads=kv_heads, width=width, window=window))
        return tuple(found)

    def matrices(self) -> Iterator[str]:
        for layer, call in self.steps.one.calls:
            if call.target == PROJECTION:
                yield layer.bindings[operand_of(call.args[1])["value"]]

    def constants(self, entries: Mapping[str, Entry]) -> Places:
        """Norms, biases, frequencies, and whatever else of the store operators read that are not matrix products."""
        found: Places = {}
        for step in self.steps.steps:
            values = {program.name: {value.name: value for value in program.values} for program in step.programs}
            for layer, call in step.calls:
                apart = {PROJECTION: call.args[1:2], GATHER: call.args[:1]}.get(call.target, [])
                matrices = {operand_of(argument)["value"] for argument in apart}
                for name in call.inputs:
                    value = values[layer.program][name]
                    if value.kind in HELD and name not in matrices:
                        found[layer.bindings[name]] = tuple(value.shape), value.dtype
        if self.steps.bias is not None:
            found[self.steps.bias] = entries[self.steps.bias].shape, "float32"
        return found

    def activations(self, tokens: int, group: int) -> Places:
        sizes = [
            layout.bytes * (1 if step.tokens == 1 else -(-tokens // step.tokens))
            for step, layout in zip(self.steps.steps, self._layouts, strict=True)
        ]
        return {VALUES: ((max(sizes) // 4,), "float32")}

    def job(self) -> dict[str, Any]:
        return {"steps": [self._of_job(step, layout) for step, layout in zip(self.steps.steps, self._layouts)]} | {
            "bias": self.steps.bias,
            "cap": self.steps.cap,
        }

    @cached_property
    def _layouts(self) -> list[Layout]:
        return [layout(step) for step in self.steps.steps]

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
