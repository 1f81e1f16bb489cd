"""Profiles of a model's parts: the layers that one member of a pipeline computes, with what passes over the cuts.

A **stage** is a run of neighbouring layers. Its profile is an ordinary one, of which an ordinary plan is made: before its
layers stands a layer `RECEIVE_LAYER`, whose forward receives what the layers below hand up and whose backward sends the
gradients down, and behind them a layer `SEND_LAYER`, whose forward sends and whose backward receives. Sending and
receiving are operators (`tightfit.send`, `tightfit.receive`), so that tensors that pass over a cut are kept, spilled and
freed like all others. They take no time here but that of a copy; the fleet's clock says how long a stage waits.

What layers below the cut make of constants and positions alone (angles of rotary embeddings, masks) does not pass: the
stage makes it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tightfit.planner.fleet.member_profiles import COPY_BYTES_PER_SECOND, HAND_OVER_SECONDS, alone_profile, raised
from tightfit.planner.problem.messages import Direction, message_operator
from tightfit.planner.problem.step_graph import StepGraph, step_graph
from tightfit.profiles.schema import POSITIONS, Layer, Operator, Profile, Program, Tensor, Value
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.fleet.message import ITEM_BYTES, Passing
from tightfit.runtime.engine.training.job import RECEIVE, SEND

RECEIVE_LAYER, SEND_LAYER = "received", "sent"
"""the operators' targets"""
LOSS = "sent/loss"
"""scalar that stands for the loss where the stage does not compute it; its value means nothing"""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What passes between the layers before number `at` and those from it on."""

    at: int
    up: tuple[str, ...]
    """activations, by their global names, in the order in which they are sent"""
    down: tuple[str, ...]
    """gradients"""
    up_bytes: int
    down_bytes: int
    up_passing: tuple[Passing, ...]
    """their form, in the same order"""
    down_passing: tuple[Passing, ...]


def cuts(profile: Profile) -> list[Cut]:
    """All places where a model can be cut: both sides have something that is trained, gradients pass down,
    and messages can hold what passes.
    """
    graph = step_graph(profile)
    made = _Makers(profile, graph)
    trained = [_trained(profile, graph, layer) for layer in range(len(profile.layers))]
    result = []
    for at in range(1, len(profile.layers)):
        if not any(trained[:at]) or not any(trained[at:]):
            continue
        cut = made.cut(at)
        if cut.up and cut.down and all(one.dtype in ITEM_BYTES for one in (*cut.up_passing, *cut.down_passing)):
            result.append(cut)
    return result


def stage_profile(
    profile: Profile, below: Cut | None, above: Cut | None, *, micro_batches: int, extra_bytes: int = 0, bits: int = 0
) -> Profile:
    """The profile of the layers between two cuts; None: from the first layer, or to the last.

    Its updates are AdamW's of `micro_batches` accumulated micro-batches. `extra_bytes`: what the process holds for its
    messages. `bits`: 8 to send activations and gradients rounded to 8 bits per row, 0 as they are.
    """
    graph = step_graph(profile)
    first, last = (below.at if below else 0), (above.at if above else len(profile.layers))
    if not 0 <= first < last <= len(profile.layers):
        raise InputError(f"layers {first} to {last} are no stage of a model of {len(profile.layers)} layers")
    maker = _Makers(profile, graph)
    programs: dict[str, Program] = {}
    layers: list[Layer] = []
    known = {program.name: program for program in profile.programs}
    if below:
        for layer, kept in maker.again(first, last):
            part = _part(known[layer.program], kept)
            programs[part.name] = part
            layers.append(layer.model_copy(update={"program": part.name, "bindings": _bound(layer, part)}))
        program, layer = _passage(maker, RECEIVE_LAYER, below, bits)
        programs[program.name] = program
        layers.append(layer)
    for layer in profile.layers[first:last]:
        programs[layer.program] = known[layer.program]
        layers.append(layer)
    if above:
        program, layer = _passage(maker, SEND_LAYER, above, bits)
        programs[program.name] = program
        layers.append(layer)
    bound = {name for layer in layers for name in layer.bindings.values()}
    bound |= {f"grad:{name}" for name in bound}
    tensors = [tensor for tensor in profile.tensors if tensor.kind == "batch" or tensor.name in bound]
    declared = {tensor.name for tensor in tensors}
    tensors += [
        maker.tensor(name) for name in sorted(bound - declared) if name in graph.storages and name not in declared
    ]
    if above:
        tensors.append(Tensor(name=LOSS, kind="activation", shape=[], dtype="float32", bytes=4))
    own = alone_profile(profile, micro_batches)
    figures = {tensor.name: tensor for tensor in own.tensors}
    changes: dict[str, Any] = {
        "tensors": [figures.get(tensor.name, tensor) for tensor in tensors],
        "programs": list(programs.values()),
        "layers": layers,
        "device": raised(profile.device, extra_bytes),
        "fingerprint": _fingerprint(profile, first, last, micro_batches, extra_bytes, bits),
    }
    if above:
        changes |= {"loss": LOSS, "token_losses": None}
    return own.model_copy(update=changes)


def _fingerprint(profile: Profile, *numbers: int) -> str:
    return hashlib.sha256(f"{profile.fingerprint} stage {numbers}".encode()).hexdigest()


def _trained(profile: Profile, graph: StepGraph, layer: int) -> bool:
    return any(graph.storages[name].kind == "trainable" for name in graph.names[layer].values())


class _Makers:
    """What the storages of a profile's step are made of."""

    def __init__(self, profile: Profile, graph: StepGraph) -> None:
        self.profile, self.graph = profile, graph
        self.steps = {step.index: step for step in (*graph.steps, *graph.inference)}
        self.values = {
            graph.names[number][value.name]: value
            for number, layer in enumerate(profile.layers)
            for value in next(p for p in profile.programs if p.name == layer.program).values
        }
        self.by_output: dict[str, int] = {}
        for step in graph.steps:
            for name in filter(None, step.outputs):
                self.by_output.setdefault(name, step.index)
        self.constant: dict[str, bool] = {}

    def made_of_constants(self, name: str) -> bool:
        """Whether an activation follows from constants and the tokens' positions, without tokens, weights and what is
        trained.
        """
        if name not in self.constant:
            step = self.by_output.get(name)
            operator = None if step is None else self._operator(step)
            self.constant[name] = (
                self.graph.storages[name].kind == "constant" or name == POSITIONS
                if step is None
                else operator is not None
                and operator.recomputable
                and not operator.gathers
                and all(self.made_of_constants(one) for one in self.graph.steps[step].inputs)
            )
        return self.constant[name]

    def _operator(self, step: int) -> Operator:
        one = self.graph.steps[step]
        program = self.profile.layers[one.layer].program
        return next(p for p in self.profile.programs if p.name == program).operators[one.operator]

    def cut(self, at: int) -> Cut:
        below = [step for step in self.steps.values() if step.layer < at]
        beyond = [step for step in self.steps.values() if step.layer >= at]
        activations = {n for s in below if s.phase != "backward" for n in s.outputs if n is not None}
        gradients = {n for s in beyond if s.phase == "backward" for n in s.outputs if n is not None}
        read_above = {name for step in beyond for name in step.inputs}
        read_below = {name for step in below if step.phase == "backward" for name in step.inputs}
        # In the order in which they are made.
        up = tuple(
            name
            for name in self.by_output
            if name in activations and name in read_above and not self.made_of_constants(name)
        )
        # What the forward above the cut makes for the backward below it does not exist in the models that are traced.
        down = tuple(name for name in self.by_output if name in gradients and name in read_below)
        size = self.graph.storages
        return Cut(
            at=at,
            up=up,
            down=down,
            up_bytes=sum(size[name].bytes for name in up),
            down_bytes=sum(size[name].bytes for name in down),
            up_passing=tuple(map(self.passing, up)),
            down_passing=tuple(map(self.passing, down)),
        )

    def passing(self, name: str) -> Passing:
        value = self.values[name]
        return Passing(shape=tuple(value.shape), dtype=value.dtype)

    def again(self, first: int, last: int) -> list[tuple[Layer, list[int]]]:
        """The layers before `first` with those of their operators that make, of constants, what layers from there to
        `last` read.
        """
        wanted = [
            name
            for step in self.steps.values()
            if first <= step.layer < last
            for name in step.inputs
            if name in self.by_output and self.graph.steps[self.by_output[name]].layer < first
            if self.made_of_constants(name)
        ]
        kept: set[int] = set()
        while wanted:
            step = self.by_output.get(wanted.pop())
            if step is not None and step not in kept:
                kept.add(step)
                wanted.extend(self.graph.steps[step].inputs)
        by_layer: dict[int, list[int]] = {}
        for step in sorted(kept):
            by_layer.setdefault(self.graph.steps[step].layer, []).append(self.graph.steps[step].operator)
        return [(self.profile.layers[layer], operators) for layer, operators in sorted(by_layer.items())]

    def tensor(self, name: str) -> Tensor:
        """A value that a layer keeps to itself as one that several layers use."""
        declared = next((tensor for tensor in self.profile.tensors if tensor.name == name), None)
        if declared is not None:
            return declared
        value = self.values[name]
        return Tensor(name=name, kind=value.kind, shape=value.shape, dtype=value.dtype, bytes=value.bytes)

    def value(self, name: str, local: str) -> Value:
        return self.values[name].model_copy(update={"name": local})


def _part(program: Program, kept: Sequence[int]) -> Program:
    """The program with some of its operators, which run in the forward and for inference."""
    operators = [program.operators[position] for position in kept]
    used = {name for one in operators for name in (*one.inputs, *filter(None, one.outputs))}
    return Program(
        name=f"{program.name}, constants",
        values=[value for value in program.values if value.name in used],
        operators=operators,
    )


def _bound(layer: Layer, part: Program) -> dict[str, str]:
    names = {value.name for value in part.values}
    return {value: name for value, name in layer.bindings.items() if value in names}


def _passage(maker: _Makers, name: str, cut: Cut, bits: int) -> tuple[Program, Layer]:
    """The layer at one side of a cut: of `RECEIVE_LAYER` or `SEND_LAYER`."""
    ahead, behind = (RECEIVE, SEND) if name == RECEIVE_LAYER else (SEND, RECEIVE)
    values: list[Value] = []
    operators: list[Operator] = []
    bindings: dict[str, str] = {}
    if name == SEND_LAYER:
        values.append(Value(name="loss", shape=[], stride=[], dtype="float32", bytes=4, kind="activation"))
        bindings["loss"] = LOSS
    phases: tuple[tuple[Literal["forward", "backward"], str, Direction, Iterable[str]], ...] = (
        ("forward", ahead, "up", cut.up),
        ("backward", behind, "down", cut.down),
    )
    for phase, target, direction, passing in phases:
        for number, passed in enumerate(passing):
            value = maker.value(passed, f"{direction}{number}")
            values.append(value)
            bindings[value.name] = passed
            seconds = HAND_OVER_SECONDS + value.bytes / COPY_BYTES_PER_SECOND
            operators.append(message_operator(target, value, number, bits, seconds, phase=phase, direction=direction))
    if name == SEND_LAYER:
        last = max(place for place, one in enumerate(operators) if one.phase == "forward")
        operators[last] = operators[last].model_copy(update={"outputs": ["loss"]})
    return Program(name=f"{name} {cut.at}", values=values, operators=operators), Layer(
        name=name, program=f"{name} {cut.at}", bindings=bindings
    )
